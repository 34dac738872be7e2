"""Shared by objectives and tasks: optimiser, guard, sharding, resume checks."""
