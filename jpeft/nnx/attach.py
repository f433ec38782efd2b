"""The stateful form: a module with a trainable adapter in it."""

from __future__ import annotations

from typing import Any, cast

from flax import nnx

from jpeft.binding import bind
from jpeft.core.method import Method
from jpeft.core.peft import Peft
from jpeft.core.tree import Tree
from jpeft.nnx.module import adapted_module
from jpeft.nnx.peft import NnxPeft


def attach(
    model: nnx.Module,
    method: Method | NnxPeft,
    /,
    *inputs: Any,
    rngs: nnx.Rngs,
    adapter: Tree | None = None,
    statistics: Any = None,
    **kwargs: Any,
) -> tuple[Any, NnxPeft]:
    """A copy of a model with a trainable adapter in it, and the bound method.

    The copy is of subclasses of the model's own classes, with the model's paths and attributes, over the same arrays;
    the model itself stays as it was. Leaves that train are `AdapterParam`s, frozen ones are not; the base's parameters
    keep their types. Leave the base out of what you donate: its arrays are the model's. ``nnx.jit`` returns new arrays
    for all that a module holds; ``nnx.jit(step, graph_updates=False)`` leaves the base shared.

    Dropout of the adapter follows ``train()`` and ``eval()``. The copy of an abstract model is abstract: `nnx.update`
    gives it arrays. Outside of a call, a module's weights read as the base's; where a call reads them in a way that was
    not bound, they are merged.

    Args:
      model: the model.
      method: the method, or a Peft of this model, which needs no inputs.
      *inputs: what the model is called with; arrays may be ``jax.ShapeDtypeStruct``.
      rngs: ``rngs.params()`` is the key of a fresh adapter, ``rngs.dropout()`` that of its dropout.
      adapter: an adapter in place of a fresh one.
      statistics: see `Peft.init`.
      **kwargs: as for the call.

    Raises:
      ValueError: the model holds an adapter already, is not the one that was bound, or the method cannot act on it.

    >>> import jax.numpy as jnp, jpeft, optax
    >>> from flax import nnx
    >>> model, x = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 4))
    >>> model = nnx.Sequential(model)
    >>> tuned, peft = jpeft.nnx.attach(model, jpeft.LoRA(rank=2, targets=r".*"), x, rngs=nnx.Rngs(1))
    >>> optimizer = nnx.Optimizer(tuned, optax.adam(1e-3), wrt=jpeft.nnx.AdapterParam)
    >>> def loss(model, x):
    ...     return (model(x) ** 2).mean()
    >>> trained = nnx.DiffState(0, jpeft.nnx.AdapterParam)
    >>> grads = nnx.grad(loss, argnums=trained)(tuned, x)
    >>> _ = optimizer.update(tuned, grads)
    >>> sorted(peft.adapter(tuned)["layers"]["0"])
    ['lora_a', 'lora_b']
    """
    if not isinstance(model, nnx.Module) or not isinstance(rngs, nnx.Rngs):
        given = f"a {type(model).__name__} and a {type(rngs).__name__}"
        raise TypeError(f"attach takes a nnx.Module and rngs=nnx.Rngs(...), got {given}")
    peft = method if isinstance(method, Peft) else bind(method, model, *inputs, **kwargs)
    if not isinstance(peft, NnxPeft):
        raise TypeError(f"this Peft is bound to a {type(peft.model).__name__}, not to a flax.nnx Module")
    now = cast(Any, peft.frontend).now(model)
    params = peft.frontend.tree(model)
    adapter = peft.init(rngs.params(), params, statistics) if adapter is None else adapter
    return adapted_module(peft, now, params, adapter, rngs=rngs), peft
