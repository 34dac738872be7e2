"""Rasters on a map grid: zarr, GeoTIFF, EOPF."""
