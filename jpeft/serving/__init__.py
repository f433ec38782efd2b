"""Generation and what serves it."""
