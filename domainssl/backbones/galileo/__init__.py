"""Galileo: groups of bands of many sensors, in space and time, as tokens of one transformer."""
