"""Tiles with image time series: TreeSatAI, PASTIS."""
