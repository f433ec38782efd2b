"""Errors whose message tells the user what to change."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user. The command line prints its message as one line, without a traceback."""


class AdapterError(ValueError):
    """An adapter that cannot be read or does not belong to the model."""


class ModelError(ValueError):
    """A model folder or parameter tree that cannot be used."""


class MergeError(ValueError):
    """Merged weights that are not finite."""


class PlanError(UserError):
    """A training step that cannot be planned."""
