"""A pass of an adapted model without methods."""

from __future__ import annotations

import contextvars
from typing import Any

from flax import nnx

from jpeft.core.entering import not_called
from jpeft.core.tree import Path
from jpeft.nnx.adapted import original
from jpeft.nnx.outputs import captured
from jpeft.nnx.state import copied, modules

_is_plain: contextvars.ContextVar[bool] = contextvars.ContextVar("is_plain", default=False)


def is_plain() -> bool:
    """Whether this runs in a pass without methods."""
    return _is_plain.get()


def run_plain(
    module: Any, called: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], at: Path | None = None
) -> Any:
    """The outputs of an adapted model without methods. It runs on a copy, whose state is lost.

    Args:
      module: the model.
      called: the name of the method that the caller calls.
      method: the name of another method, or empty.
      args: the arguments.
      kwargs: the other arguments.
      at: the path of a module, whose output is given beside the model's.

    Raises:
      ValueError: the pass does not call that module.
    """
    graphdef, state = nnx.split(module)
    copy = nnx.merge(graphdef, copied(state))
    inner = {} if at is None else dict(modules(copy))
    found = captured(inner[at]) if at in inner else []
    token = _is_plain.set(True)
    try:
        y = getattr(original(type(module)), method or called)(copy, *args, **kwargs)
    finally:
        _is_plain.reset(token)
    if at is None:
        return y
    if not found:
        raise ValueError(not_called(at))
    return y, found[-1]
