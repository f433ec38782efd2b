"""Errors whose message tells the user what to change."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can mend. The command line prints it as one line, without a traceback."""


class AdapterError(ValueError):
    """An adapter that cannot be read, or does not belong to this model. The message says what, and what to do."""


class ModelError(ValueError):
    """A model folder or tree that cannot be used; the message is one line that names what is wrong."""


class PlanError(UserError):
    """A training step that cannot be planned."""
