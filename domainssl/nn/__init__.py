"""Building blocks that know tensors and coordinates only."""
