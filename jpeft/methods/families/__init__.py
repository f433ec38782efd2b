"""Algebra that several methods share."""
