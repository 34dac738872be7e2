"""Generators of the embedded sample data, in each domain's real on-disk format."""
