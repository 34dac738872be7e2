"""Pure functions that judge features: neighbours, probes, retrieval, spread."""
