"""The front end for Flax Linen models."""
