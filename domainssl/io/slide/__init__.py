"""Whole slides, tiles and feature bags."""
