"""Transformations of gradients and updates for the leaves of particular methods, for optax."""
