"""Configurations: reading, merging and checking YAML."""
