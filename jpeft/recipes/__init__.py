"""Recipes: fine-tuning runs from configuration to result."""
