"""Recognise, describe and measure the data at a path."""
