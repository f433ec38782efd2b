"""The interface of a front end, which runs the models of one module system.

`jpeft.core` knows trees and sites, but no modules. A front end finds the sites of a model and runs the model under an
adapter; `jpeft.frontends` picks the front end for a model.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from jpeft.core.sites import Survey


class FrontEnd(Protocol):
    """The interface of a front end: static and hashable. ``peft`` is a `Peft` that was bound through it.

    Attributes:
      accepted: the models that it accepts, for error messages, such as "a Linen module".
    """

    @property
    def accepted(self) -> str: ...

    @property
    def holds_params(self) -> bool:
        """Whether a model has its parameters, so that `bind` takes none beside it."""
        ...

    @property
    def bound(self) -> type[Any]:
        """The class of a `Peft` that is bound through it."""
        ...

    def kept(self, model: Any) -> Any:
        """The part of a model that a `Peft` keeps, without its arrays."""
        ...

    def tree(self, params: Any) -> Any:
        """Parameters as nested mappings, without other state of the model.

        Raises:
          TypeError: they are none.
        """
        ...

    def like(self, tree: Any, params: Any) -> Any:
        """Nested mappings in the form of ``params``."""
        ...

    def survey(self, model: Any, params: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Survey:
        """The candidate sites of a model, found in one abstract call.

        Raises:
          ValueError: ``params`` do not fit the model.
        """
        ...

    def called(self, model: Any, run: Callable[..., Any], *args: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs and keyword arguments of the first call of a model in ``run(*args)``, abstract.

        Raises:
          ValueError: it does not call the model.
        """
        ...

    def run(self, peft: Any, params: Any, adapter: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The outputs of the model under the adapter. See `Peft.apply`."""
        ...

    def overlay(self, peft: Any, params: Any, adapter: Any) -> Any:
        """The tree that the unmodified model runs on inside `intercept`. See `Peft.overlay`."""
        ...

    def intercept(self, peft: Any) -> AbstractContextManager[None]:
        """A context in which module calls apply the adapter leaves that lie beside their own. See `Peft.intercept`."""
        ...

    def module(self, peft: Any) -> Any:
        """A module whose parameters are the base's and the adapter's combined. See `Peft.module`."""
        ...

    def shift_embedding(self, shift: Any, found: list[Any]) -> AbstractContextManager[None]:
        """A context in which models that run `bypassed` have ``shift`` added to the output of their first embedding.

        Args:
          shift: an array like that output; None adds nothing.
          found: gets the output's shape and dtype, once. It stays empty if a model embeds nothing.
        """
        ...


_bypassed: contextvars.ContextVar[bool] = contextvars.ContextVar("bypassed", default=False)


@contextlib.contextmanager
def bypassed() -> Iterator[None]:
    """A context in which front ends ignore adapters, to compare programs with and without one."""
    token = _bypassed.set(True)
    try:
        yield
    finally:
        _bypassed.reset(token)


def is_bypassed() -> bool:
    """Whether this runs inside `bypassed`."""
    return _bypassed.get()


_output_map: contextvars.ContextVar[Callable[[Any], Any] | None] = contextvars.ContextVar("output_map", default=None)


@contextlib.contextmanager
def mapped_outputs(function: Callable[[Any], Any]) -> Iterator[None]:
    """A context in which a front end that runs a model applies ``function`` to each array of every module's output."""
    token = _output_map.set(function)
    try:
        yield
    finally:
        _output_map.reset(token)


def output_map() -> Callable[[Any], Any] | None:
    """The function of `mapped_outputs`, if this runs inside it."""
    return _output_map.get()
