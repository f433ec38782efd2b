"""Tasks: each owns everything that differs by task."""
