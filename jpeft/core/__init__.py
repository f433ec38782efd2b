"""The engine: trees, sites, geometries and the bound method, in JAX alone."""
