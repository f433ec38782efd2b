"""The front end for a model."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jpeft.core.frontend import FrontEnd
from jpeft.core.tree import Tree


def front_end(model: Any) -> FrontEnd:
    """The front end for a model.

    Raises:
      TypeError: no front end accepts ``model``.
      ValueError: ``model`` holds an adapter already.
    """
    # Imported late: a program that uses one module system does not import the other.
    if (nnx := sys.modules.get("flax.nnx")) is not None and isinstance(model, nnx.Module):
        from jpeft.nnx.frontend import NnxFrontEnd

        return NnxFrontEnd.of(model)
    from jpeft.linen.frontend import LINEN

    if LINEN.accepts(model):
        return LINEN
    hint = "; a function of parameters takes method.bind_function(fn, params, *inputs)" if callable(model) else ""
    hint = "; bind its .module" if LINEN.accepts(getattr(model, "module", None)) else hint
    raise TypeError(f"model must be {LINEN.accepted} or a flax.nnx Module, got {type(model).__name__}{hint}")


def arguments(
    model: Any, inputs: Sequence[Any], call: str, *, functions: bool = False
) -> tuple[FrontEnd, Any, tuple[Any, ...]]:
    """The front end for a model, its parameters and its inputs, from ``(params, *inputs)`` or, for NNX, the inputs.

    Args:
      model: the model.
      inputs: what was given after the model.
      call: the call as it should be, for the error.
      functions: whether any other callable is a plain function of parameters.

    Raises:
      TypeError: no front end accepts ``model``, or the parameters are missing.
    """
    if functions and _is_function(model):
        from jpeft.function import FunctionFrontEnd

        found: FrontEnd = FunctionFrontEnd()
    else:
        found = front_end(model)
    if found.holds_params:
        return found, model, tuple(inputs)
    if not inputs:
        raise TypeError(f"{call}: {type(model).__name__} needs params, as from model.init")
    params, *rest = inputs
    return found, params, tuple(rest)


def _is_function(model: Any) -> bool:
    """Whether a model is a function, jitted or not, and not an object that may hold a module."""
    return inspect.isroutine(model) or inspect.isroutine(getattr(model, "__wrapped__", None))


def as_tree(params: Any) -> tuple[Tree, Callable[[Tree], Any]]:
    """Parameters as nested mappings, and the function that puts others of that form into the form of these.

    Only states and modules of NNX have another form.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not (isinstance(params, nnx.Module) or _holds_variables(params, nnx.Variable)):
        return params, lambda tree: tree
    from jpeft.nnx.module import readable
    from jpeft.nnx.state import like, to_tree

    is_module = isinstance(params, nnx.Module)
    return to_tree(params), lambda tree: readable(like(tree, params)) if is_module else like(tree, params)


def axis_names(params: Any) -> Tree | None:
    """The names of the axes of parameters by path, from the metadata of NNX's Variables; None where there are none.

    Linen's are in boxes around the arrays.
    """
    if (nnx := sys.modules.get("flax.nnx")) is None or as_tree(params)[0] is params:
        return None
    from jpeft.nnx.state import axis_names

    return axis_names(nnx.state(params, nnx.Param) if isinstance(params, nnx.Module) else params)


def _holds_variables(params: Any, kind: type) -> bool:
    if isinstance(params, Mapping):
        return any(_holds_variables(child, kind) for child in params.values())
    return isinstance(params, kind)
