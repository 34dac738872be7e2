"""SSL4EO-S12 v1.1, releases A and B."""
