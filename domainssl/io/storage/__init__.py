"""Paths, archives and remote stores."""
