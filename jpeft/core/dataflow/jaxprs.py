"""Helpers of every walk over a jaxpr: the jaxprs in an equation, and its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Calls whose jaxpr runs as if its equations stood in place of the call.
INLINED = frozenset({"jit", "pjit", "closed_call", "core_call"})


def is_call(name: str) -> bool:
    """Whether a primitive of this name runs a jaxpr once, on all of its operands."""
    return name in INLINED or name.startswith(("remat", "checkpoint", "custom_jvp_call", "custom_vjp_call"))


def open_jaxpr(value: Any) -> Any:
    """The jaxpr of a parameter of an equation, or None if that is not one."""
    value = getattr(value, "jaxpr", value) if hasattr(value, "consts") else value
    return value if hasattr(value, "eqns") and hasattr(value, "invars") else None


def bind(eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    """The outputs of an equation as it is."""
    params = eqn.primitive.get_bind_params(eqn.params)
    # Before jax 0.11, functions that an equation calls come apart from its parameters.
    functions, params = params if isinstance(params, tuple) else ((), params)
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*functions, *values, **params)
    return out if eqn.primitive.multiple_results else [out]
