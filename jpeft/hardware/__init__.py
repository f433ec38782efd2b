"""Accelerators: topologies, peak rates, utilization."""
