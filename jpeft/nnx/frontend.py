"""The front end for Flax NNX models; see `jpeft.core.frontend.FrontEnd`."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from jpeft.checks import shown
from jpeft.core.entering import model_kwargs
from jpeft.core.frontend import is_bypassed
from jpeft.core.peft import Peft
from jpeft.core.signatures import form_of
from jpeft.core.sites import BOX, MERGE, Survey
from jpeft.core.tree import Path, Tree, abstract_array, combine, flatten, is_array, join
from jpeft.nnx import checks
from jpeft.nnx.dropout import reseed
from jpeft.nnx.module import adapted_module, check_plain, of_own_classes, readable
from jpeft.nnx.outputs import shift_embedding, with_outputs
from jpeft.nnx.peft import NnxPeft
from jpeft.nnx.state import by_path, copied, like, modules, to_state, to_tree
from jpeft.nnx.survey import METHOD, survey

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
          ValueError: the model holds an adapter already, or a Param that is no array.
        """
        check_plain(model)
        graphdef, params, rest = nnx.split(of_own_classes(model), nnx.Param, ...)
        checks.check_parameters(params)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), params)
        return cls(graphdef, abstract, rest)

    @functools.cached_property
    def shapes(self) -> dict[Path, tuple[int, ...]]:
        """The shapes of the model's parameters."""
        return {path: x.shape for path, x in by_path(self.state).items() if x is not None}

    @functools.cached_property
    def classes(self) -> dict[Path, type]:
        """The classes of the model's modules."""
        model = nnx.merge(self.graphdef, self.state, copied(self.rest))
        return {path: type(module) for path, module in modules(model)}

    def now(self, model: nnx.Module) -> NnxFrontEnd:
        """The front end for a model in place of the one that was bound: it runs with its own flags and other state.

        Raises:
          ValueError: its modules or parameters are not those that were bound, or it holds an adapter.
        """
        found = NnxFrontEnd.of(model)
        checks.check_classes(found.classes, self.classes)
        checks.check_leaves(flatten(to_tree(model)), self.shapes)
        return found

    def tree(self, params: Any) -> Tree:
        """Parameters as nested dicts of arrays.

        Raises:
          ValueError: an array was deleted.
        """
        tree = to_tree(params)
        checks.check_usable(by_path(tree))
        return tree

    def like(self, tree: Tree, params: Any) -> Any:
        """Nested dicts of arrays in the form of ``params``: a new module, a state, or mappings."""
        if not isinstance(params, nnx.Module):
            return like(tree, params)
        self.now(params)
        return readable(like(tree, params))

    def kept(self, model: nnx.Module) -> Any:
        """The graphdef, which has no arrays."""
        return self.graphdef

    def survey(self, model: nnx.Module, params: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Survey:
        """The candidate sites of a model, found in one abstract call."""
        own = dict(kwargs)
        _check_inputs(model, inputs)
        method = checks.method_name(model, own.pop("method", "__call__"))
        for name in ("rest", "mutable") if checks.takes_rngs(type(model), method) else ("rest", "mutable", "rngs"):
            own.pop(name, None)
        return survey(of_own_classes(model), inputs, own, method)

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
        if not isinstance(mutable, bool):
            raise TypeError(f"mutable must be True, to return (y, rest), or False, got {shown(mutable)}")
        model = self._adapted(peft, params, adapter, rest, checks.dropout_key(peft, rngs))
        method = checks.method_name(model, method)
        plain = model_kwargs(peft.method, own)
        self._check_form(peft, inputs, plain, method)
        own = plain if is_bypassed() else own
        if rngs is not None and not isinstance(rngs, nnx.Rngs):
            reseed(model, rngs)
        if rngs is not None and checks.takes_rngs(self.classes[()], method):
            own["rngs"] = nnx.Rngs(**rngs) if isinstance(rngs, Mapping) else rngs
        try:
            y = getattr(model, method)(*inputs, **own)
        except Exception as error:
            if (path := checks.abstract_path(model)) is None:
                raise
            raise ValueError(
                f"the call fails, and {join(path)!r} is an abstract array, as in the model that was bound: give values "
                "as rest=nnx.state(model, nnx.Not(nnx.Param))"
            ) from error
        return (y, nnx.state(model, nnx.Not(nnx.Param))) if mutable else y

    def _check_form(self, peft: Peft, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], method: str) -> None:
        """Checks that a call reads the weights that it changes as attributes, as the call did that was bound.

        A call of the form that was bound, or that was checked before, costs nothing; another one is traced once.

        Raises:
          ValueError: it reads a weight in another way, e.g. by `nnx.state`.
        """
        form = form_of(inputs, {**kwargs, METHOD: method})
        if peft.form is None or form is None or form == peft.form or is_bypassed():
            return
        if (peft, form) not in self.checked:
            self.checked[peft, form] = self._problem(peft, inputs, kwargs, method)
        if problem := self.checked[peft, form]:
            raise ValueError(problem)

    @functools.cached_property
    def checked(self) -> dict[Any, str | None]:
        """The problem of each checked call of another form than the bound one; None where there is none."""
        return {}

    def _problem(self, peft: Peft, inputs: Any, kwargs: Mapping[str, Any], method: str) -> str | None:
        inputs, own = jax.tree.map(_abstract, (inputs, dict(kwargs)))
        model = nnx.merge(self.graphdef, copied(self.state), copied(self.rest))
        try:
            found = survey(model, inputs, own, method)
        except Exception:  # the call itself raises it too, or it needs values
            return None
        sites = [a.site for a in peft.actions if a.site.kind == "weight" and not a.site.calls_alone]
        bound = {site.weight_path for site in sites if site.via != MERGE}
        via = {site.weight_path: site.via for site in found.weights if site.weight_path in bound}
        boxes = [path for path, way in via.items() if way == BOX]
        unread = {path for path, way in via.items() if way == MERGE} | (set(boxes) - set(found.boxable(boxes)))
        if not unread:
            return None
        return (
            f"this call reads {join(min(unread))!r} in another way than the call that {peft.method.name} was bound "
            "with, not as an attribute of its module, and would not see its change; bind with the method= and flags of "
            "this call"
        )

    def plain(self, params: Any, rest: Any = None) -> Any:
        """The model without an adapter, over these parameters, and other state that is ``rest`` or lies with them.

        Raises:
          TypeError: ``rest`` is no state.
          ValueError: a leaf is missing, or ``rest`` has one that is no other state of the model.
        """
        leaves = flatten(to_tree(params))
        if rest is None:
            others = to_state(self.rest, leaves, partial=True)
            return with_outputs(nnx.merge(self.graphdef, to_state(self.state, leaves), others))
        rest = nnx.state(rest, nnx.Not(nnx.Param)) if isinstance(rest, nnx.Module) else rest
        if not isinstance(rest, Mapping):
            raise TypeError(f"rest must be other state, as nnx.state(model, nnx.Not(nnx.Param)), got {shown(rest)}")
        others = by_path(rest)
        checks.check_rest(others, by_path(self.rest))
        return with_outputs(nnx.merge(self.graphdef, to_state(self.state, leaves), to_state(self.rest, others)))

    def _adapted(self, peft: Peft, params: Any, adapter: Tree, rest: Any, dropout: Any) -> Any:
        """The model with an adapter in it; where adapters are bypassed, with that of `intercept`, or with none.

        A module that is given as ``params`` runs as it is now.
        """
        model = self.now(params) if isinstance(params, nnx.Module) else self
        if not is_bypassed():
            others = {*by_path(model.rest), *(path for path, _ in peft.structure)}
            checks.check_leaves(flatten(to_tree(params)), self.shapes, others)
            return adapted_module(peft, model, params, adapter, rest=rest, dropout=dropout)
        if found := _intercepted.get():
            params, adapter = found[-1].split(to_tree(params))
            return adapted_module(found[-1], model, params, adapter, rest=rest)
        return readable(model.plain(params, rest))

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
            return self._adapted(peft, params, adapter, rest, dropout)

        return module

    def shift_embedding(self, shift: Any, found: list[Any]) -> AbstractContextManager[None]:
        """See `jpeft.nnx.outputs`."""
        return shift_embedding(shift, found)


@contextlib.contextmanager
def _intercepting(peft: Peft) -> Iterator[None]:
    token = _intercepted.set((*_intercepted.get(), peft))
    try:
        yield
    finally:
        _intercepted.reset(token)


def _abstract(x: Any) -> Any:
    return abstract_array(x) if is_array(x) else x


def _check_inputs(model: nnx.Module, inputs: tuple[Any, ...]) -> None:
    """Checks that the first input is not the model's parameters, which a Linen module takes.

    Raises:
      TypeError: it is.
    """
    if not inputs or not isinstance(inputs[0], Mapping | nnx.Module):
        return
    given, own = set(flatten(to_tree(inputs[0]))), set(flatten(to_tree(model)))
    is_state = isinstance(inputs[0], nnx.State) or inputs[0] is model
    if is_state or (isinstance(inputs[0], Mapping) and "params" in inputs[0]) or (given and given <= own):
        name = type(model).__name__
        raise TypeError(f"{name} is a flax.nnx Module, which has its parameters: bind(model, *inputs), without params")
