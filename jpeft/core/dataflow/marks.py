"""Marks: equations that tell where module calls begin and end in a trace, and what their arrays are."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

ENTER = "enter"  # a call begins; the array is one of the module's own parameters
INPUT = "input"  # the array is the input that the call's geometry reads
OUTPUT = "output"  # the array is the call's (first) output
EXIT = "exit"  # the call ends
SCOPE = "scope"  # the array is a parameter below a module; the name is the paths of both

mark_p = Primitive("jpeft_mark")


def mark(x: Any, kind: str, call: int, name: Hashable = None) -> None:
    """Adds an equation without effect on ``x`` to the trace.

    Args:
      x: the array.
      kind: ``ENTER``, ``INPUT``, ``OUTPUT``, ``EXIT`` or ``SCOPE``.
      call: number of the call; for ``SCOPE``, any.
      name: for ``ENTER``, the name of the parameter; for ``SCOPE``, the module's path and the parameter's.
    """
    mark_p.bind(x, kind=kind, call=call, name=name, batched=())


@mark_p.def_abstract_eval
def _abstract(x: Any, **params: Any) -> Any:
    return x


def _batched(args: Any, dims: Any, **params: Any) -> Any:
    # Under vmap the equation has an axis more: `batched` keeps where, innermost vmap first.
    (x,), (dim,) = args, dims
    return mark_p.bind(x, **{**params, "batched": (*params["batched"], dim)}), dim


def _differentiated(primals: Any, tangents: Any, **params: Any) -> Any:
    return mark_p.bind(*primals, **params), tangents[0]


batching.primitive_batchers[mark_p] = _batched
ad.primitive_jvps[mark_p] = _differentiated


# --- calls of any module ----------------------------------------------------------------------------------------------

BEGIN, END = "begin", "end"
CALL = "call_mark"

call_p = Primitive(CALL)
call_p.multiple_results = True


def begin_call(call: int, arrays: Sequence[Any] = ()) -> None:
    """Marks that a call of a module begins.

    Args:
      call: number of the call.
      arrays: its arguments that are arrays. They show the axes that vmaps add around the module.
    """
    call_p.bind(*arrays, kind=BEGIN, call=call, batched=((),) * len(arrays))


def end_call(call: int) -> None:
    """Marks that a call of a module ends."""
    call_p.bind(kind=END, call=call, batched=())


@call_p.def_abstract_eval
def _abstract_call(*xs: Any, **params: Any) -> list[Any]:
    return list(xs)


def _impl_call(*xs: Any, **params: Any) -> list[Any]:
    return list(xs)


def _batched_call(args: Any, dims: Any, **params: Any) -> Any:
    batched = tuple((*own, dim) for own, dim in zip(params["batched"], dims, strict=True))
    return call_p.bind(*args, **{**params, "batched": batched}), list(dims)


def _differentiated_call(primals: Any, tangents: Any, **params: Any) -> Any:
    return call_p.bind(*primals, **params), list(tangents)


call_p.def_impl(_impl_call)
batching.primitive_batchers[call_p] = _batched_call
ad.primitive_jvps[call_p] = _differentiated_call
# A loop that is compiled while the model is traced, with a call inside, runs as if the marks were not there.
mlir.register_lowering(call_p, mlir.lower_fun(_impl_call, multiple_results=True))
