"""Meshes, shardings, batches and several processes."""
