"""Losses: pure functions on tensors, in float32 under any autocast."""
