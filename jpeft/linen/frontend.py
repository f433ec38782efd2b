"""The front end for Flax Linen models; see `jpeft.core.frontend.FrontEnd`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
from flax import errors

from jpeft.core.entering import model_kwargs
from jpeft.core.frontend import is_bypassed
from jpeft.core.peft import Peft
from jpeft.core.signatures import form_of
from jpeft.core.sites import Survey
from jpeft.core.tree import Tree, flatten, like, split_variables, unflatten
from jpeft.linen import inject
from jpeft.linen.box import Changed, overlay
from jpeft.linen.calls import called, check_form
from jpeft.linen.embedding_shift import shift_embedding
from jpeft.linen.module import PeftModule
from jpeft.linen.survey import survey


@dataclass(frozen=True)
class LinenFrontEnd:
    """Runs Linen modules with the interceptor of `jpeft.linen.inject` and the boxes of `jpeft.linen.box`."""

    @property
    def accepted(self) -> str:
        return "a flax.linen Module"

    def accepts(self, model: Any) -> bool:
        """Whether ``model`` is a Linen module."""
        return isinstance(model, nn.Module)

    @property
    def holds_params(self) -> bool:
        """A Linen module has no parameters of its own."""
        return False

    @property
    def bound(self) -> type[Peft]:
        """See `FrontEnd.bound`."""
        return Peft

    def kept(self, model: Any) -> Any:
        """The module, which has no arrays."""
        return model

    def tree(self, params: Any) -> Tree:
        """The parameters, without other collections."""
        return split_variables(params)[0]

    def like(self, tree: Tree, params: Any) -> Any:
        """A tree in the container type of ``params``."""
        return like(tree, split_variables(params)[0])

    def survey(self, model: Any, params: Tree, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Survey:
        """The candidate sites of a model, found in one abstract ``model.apply``."""
        tree, others = split_variables(params)
        try:
            found = survey(model, {"params": tree, **others}, inputs, kwargs)
        except (errors.ScopeParamNotFoundError, errors.ScopeParamShapeError, errors.ScopeCollectionNotFound) as e:
            raise ValueError(f"params do not fit {type(model).__name__}: {e}") from e
        return dataclasses.replace(found, form=form_of(inputs, kwargs))

    def called(self, model: Any, run: Callable[..., Any], *args: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs and keyword arguments of the first call of a model in ``run(*args)``, abstract."""
        return called(model, run, *args)

    def run(self, peft: Peft, params: Tree, adapter: Tree, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """``model.apply`` under the adapter."""
        tree, others = split_variables(params)
        if is_bypassed():
            own = model_kwargs(peft.method, kwargs)
            return peft.model.apply({**others, "params": tree}, *inputs, **own)
        check_form(peft, {**others, "params": tree}, inputs, model_kwargs(peft.method, kwargs))
        full = self.overlay(peft, tree, adapter)
        with self.intercept(peft):
            out = peft.model.apply({**others, "params": full}, *inputs, **kwargs)
        return _without_adapter(out, tree) if kwargs.get("mutable") else out

    def overlay(self, peft: Peft, params: Tree, adapter: Tree) -> Any:
        """See `Peft.overlay`."""
        return overlay(peft, params, adapter)

    def intercept(self, peft: Peft) -> AbstractContextManager[None]:
        """See `Peft.intercept`."""
        return inject.intercept(peft)

    def module(self, peft: Peft) -> PeftModule:
        """See `Peft.module`."""
        return PeftModule(peft)

    def shift_embedding(self, shift: Any, found: list[Any]) -> AbstractContextManager[None]:
        """See `jpeft.linen.embedding_shift`."""
        return shift_embedding(shift, found)


LINEN = LinenFrontEnd()


def _without_adapter(out: Any, params: Tree) -> Any:
    """``(y, state)`` from ``model.apply(mutable=...)``, with base leaves only in ``state["params"]``."""
    y, state = out
    if "params" not in state:
        return out
    found = flatten(state["params"])
    kept = {p: x.value if isinstance(x := found[p], Changed) else x for p in flatten(params) if p in found}
    return y, like({**{k: v for k, v in state.items() if k != "params"}, "params": unflatten(kept)}, state)
