"""The protocol of a front end: how the engine runs models of one module system.

`jpeft.core` knows trees and sites. A front end finds the sites of a module and runs the module under an adapter;
`jpeft.binding` picks the one that accepts a model.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from jpeft.core.sites import Survey

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class FrontEnd(Protocol):
    """Static and hashable. ``peft`` is a `jpeft.core.peft.Peft` that was bound through this front end."""

    def accepts(self, model: Any) -> bool:
        """Whether ``model`` is a module of this kind."""
        ...

    def survey(self, model: Any, params: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Survey:
        """The sites of a model, found in one abstract call.

        Raises:
          ValueError: ``params`` are not the model's.
        """
        ...

    def run(self, peft: Any, params: Any, adapter: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The outputs of the model under the adapter."""
        ...

    def overlay(self, peft: Any, params: Any, adapter: Any) -> Any:
        """The tree that the unmodified model runs on inside `intercept`."""
        ...

    def intercept(self, peft: Any) -> AbstractContextManager[None]:
        """A context in which calls of the model's modules apply the adapter's leaves that they find beside their own."""
        ...

    def module(self, peft: Any) -> Any:
        """A module of this kind whose parameters are the base's and the adapter's together."""
        ...


_bypassed: contextvars.ContextVar[bool] = contextvars.ContextVar("bypassed", default=False)


@contextlib.contextmanager
def bypassed() -> Iterator[None]:
    """A context in which front ends run models as if there were no adapter, to compare a program with and without."""
    token = _bypassed.set(True)
    try:
        yield
    finally:
        _bypassed.reset(token)


def is_bypassed() -> bool:
    """Whether this runs inside `bypassed`."""
    return _bypassed.get()
