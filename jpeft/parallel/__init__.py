"""Device meshes, sharding rules, batches, and several processes."""
