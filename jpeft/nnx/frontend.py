"""The front end for Flax NNX models; see `jpeft.core.frontend.FrontEnd`."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jpeft.core.frontend import is_bypassed
from jpeft.core.peft import Peft
from jpeft.core.sites import Survey
from jpeft.core.tree import Tree, combine, flatten, is_array
from jpeft.nnx.module import adapted_module, holds_adapter, of_own_classes, readable
from jpeft.nnx.peft import NnxPeft
from jpeft.nnx.state import copied, like, to_state, to_tree
from jpeft.nnx.survey import survey

# The adapter that `intercept` puts into the models that run.
_intercepted: contextvars.ContextVar[tuple[Peft, ...]] = contextvars.ContextVar("intercepted", default=())


class _Found(Exception):
    """The first call of a model."""


_looking: contextvars.ContextVar[bool] = contextvars.ContextVar("looking", default=False)


@dataclass(frozen=True, eq=False)
class NnxFrontEnd:
    """Runs copies of one NNX model with the subclasses of `jpeft.nnx.adapted`.

    Attributes:
      graphdef: the model without its arrays, as it was when it was bound.
      state: its parameters, abstract: their Variables and containers.
      rest: its other state, as it was when it was bound.
    """

    graphdef: Any
    state: Any
    rest: Any

    accepted = "a flax.nnx Module"
    holds_params = True
    bound: type[Peft] = NnxPeft

    @classmethod
    def of(cls, model: nnx.Module) -> NnxFrontEnd:
        """The front end for a model, which it does not keep.

        Raises:
          ValueError: the model holds an adapter already.
        """
        if holds_adapter(model):
            raise ValueError(
                f"this {type(model).__name__} holds an adapter already; take it out with peft.detach(model), or bind a "
                "Chain of both methods"
            )
        graphdef, params, rest = nnx.split(of_own_classes(model), nnx.Param, ...)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), params)
        return cls(graphdef, abstract, rest)

    def tree(self, params: Any) -> Tree:
        """Parameters as nested dicts of arrays."""
        return to_tree(params)

    def like(self, tree: Tree, params: Any) -> Any:
        """Nested dicts of arrays in the form of ``params``: a new module, a state, or mappings."""
        return readable(like(tree, params)) if isinstance(params, nnx.Module) else like(tree, params)

    def kept(self, model: nnx.Module) -> Any:
        """The graphdef, which has no arrays."""
        return self.graphdef

    def survey(self, model: nnx.Module, params: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Survey:
        """The candidate sites of a model, found in one abstract call."""
        own = dict(kwargs)
        _check_inputs(model, inputs)
        for name in ("rest", "mutable", "rngs"):
            own.pop(name, None)
        return survey(of_own_classes(model), inputs, own, own.pop("method", "__call__"))

    def called(self, model: Any, run: Callable[..., Any], *args: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs and keyword arguments of the first call of the model in ``run(*args)``, abstract."""
        token = _looking.set(True)
        try:
            jax.eval_shape(run, *args)
        except _Found as found:
            inputs, kwargs = found.args
            return inputs, kwargs
        finally:
            _looking.reset(token)
        raise ValueError(f"loss_fn does not call {type(model).__name__}; it must run peft.apply of a Peft")

    def run(self, peft: Peft, params: Any, adapter: Tree, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Runs a copy of the model under the adapter; ``rest``, ``mutable``, ``rngs`` and ``method`` are its own."""
        own = dict(kwargs)
        rest, mutable, rngs = own.pop("rest", None), own.pop("mutable", False), own.pop("rngs", None)
        method = own.pop("method", "__call__")
        if _looking.get():
            raise _Found(*jax.tree.map(_abstract, (inputs, dict(kwargs))))
        key = rngs.get("dropout") if isinstance(rngs, Mapping) else rngs
        if is_bypassed():
            found = _intercepted.get()
            model = self._intercepted(found[-1], params, rest) if found else self.plain(params, rest)
        else:
            model = adapted_module(peft, self, params, adapter, rest=rest, dropout=key)
        y = getattr(model, method)(*inputs, **own)
        if mutable is False:
            return y
        return y, nnx.state(model, nnx.Not(nnx.Param))

    def plain(self, params: Any, rest: Any = None) -> Any:
        """The model without an adapter, over these parameters."""
        state = to_state(self.state, flatten(to_tree(params)))
        return nnx.merge(self.graphdef, state, copied(self.rest if rest is None else rest))

    def _intercepted(self, peft: Peft, full: Any, rest: Any) -> Any:
        params, adapter = peft.split(to_tree(full))
        return adapted_module(peft, self, params, adapter, rest=rest)

    def overlay(self, peft: Peft, params: Any, adapter: Tree) -> Any:
        """See `Peft.overlay`."""
        return combine(to_tree(params), adapter)

    def intercept(self, peft: Peft) -> AbstractContextManager[None]:
        """A context in which models that run without an adapter of their own hold that of ``peft``."""
        return _intercepting(peft)

    def module(self, peft: Peft) -> Any:
        """The function from parameters and an adapter to the model with that in it."""

        def module(params: Any, adapter: Tree, *, rest: Any = None, dropout: Any = None) -> Any:
            """A new module like the model, with an adapter in it.

            Args:
              params: the parameters.
              adapter: the adapter.
              rest: the other state; by default, as it was when the method was bound.
              dropout: a PRNG key for the adapter's own dropout; without one it is off.
            """
            return adapted_module(peft, self, params, adapter, rest=rest, dropout=dropout)

        return module


@contextlib.contextmanager
def _intercepting(peft: Peft) -> Iterator[None]:
    token = _intercepted.set((*_intercepted.get(), peft))
    try:
        yield
    finally:
        _intercepted.reset(token)


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(jnp.shape(x), x.dtype) if is_array(x) else x


def _check_inputs(model: nnx.Module, inputs: tuple[Any, ...]) -> None:
    """Checks that the first input is not the model's parameters, which a Linen module takes.

    Raises:
      TypeError: it is.
    """
    if not inputs or not isinstance(inputs[0], Mapping) or isinstance(inputs[0], nnx.Module):
        return
    given, own = set(flatten(to_tree(inputs[0]))), set(flatten(to_tree(model)))
    if isinstance(inputs[0], nnx.State) or "params" in inputs[0] or (given and given <= own):
        name = type(model).__name__
        raise TypeError(f"{name} is a flax.nnx Module, which has its parameters: bind(model, *inputs), without params")
