"""Networks that everybody uses afterwards: one file per family, and the registry."""
