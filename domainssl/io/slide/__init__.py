"""Whole slides: pyramids, tissue, tile grids, pictures, bags of features."""
