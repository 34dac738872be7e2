"""Readers: open, window, georeference and write what is on disk."""
