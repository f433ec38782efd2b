"""Accelerators: chips, topologies, and model FLOPs utilization."""
