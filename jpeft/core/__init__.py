"""The engine: trees, sites, geometries and the bound method, free of any module system."""
