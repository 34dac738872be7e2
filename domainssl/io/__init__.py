"""Bytes to arrays and back; nothing here is random."""
