"""The operation at a site, changed by one method after the other: the same in every module system."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.actions import Active, merge_layer, merge_matrix
from jpeft.core.geometry import Call, Lookup, Parts, Patches, attend
from jpeft.core.method import Drops, Leaves, ModuleContext
from jpeft.core.nested import first_array, replace_first
from jpeft.core.sites import Site, map_axes
from jpeft.core.tree import split_arrays


def whole_geometry(site: Site) -> Any:
    """The geometry of the whole weight, where a method splits it into parts."""
    return site.geometry.inner if isinstance(site.geometry, Parts) else site.geometry


def change_output(active: Active, inputs: Any, y: Any, dropout: Drops, rerun: Any) -> Any:
    """A module's output with its first floating array changed by one action.

    Args:
      active: the action.
      inputs: the call's arguments.
      y: its output.
      dropout: the method's dropout.
      rerun: runs the module on another first argument.

    Raises:
      ValueError: the output has no such array.
    """
    out, x = first_array(y), first_array(inputs)
    if out is None:
        raise ValueError(
            f"{active.site.name!r} was bound where it returns an array, and returns {type(y).__name__} here"
        )
    x = first_array(inputs, floating=False) if x is None else x  # an embedding's token ids
    leaves = active.used(active.leaves, out.dtype)
    context = ModuleContext(active.context, dropout, lambda z: first_array(rerun(z)))
    changed = active.action.method.apply(leaves, x, out, context)
    if jnp.shape(changed) != out.shape:
        raise ValueError(
            f"{active.action.method.name}.apply returned {jnp.shape(changed)} for an output {out.shape} of "
            f"{active.site.name!r}; it must keep the shape"
        )
    changed = changed.astype(out.dtype)
    if (on := active.leaves.get(active.action.mask)) is not None:
        changed = jnp.where(on.reshape(()), changed, out)
    return replace_first(y, changed)


def change_inputs(active: Active, inputs: Any, dropout: Drops) -> Any:
    """A call's arguments, with the floating arrays among them changed by one action.

    Args:
      active: the action.
      inputs: the arguments.
      dropout: the method's dropout.
    """
    arrays, restore = split_arrays(inputs)
    places = [i for i, x in enumerate(arrays) if np.ndim(x) and jnp.issubdtype(x.dtype, jnp.floating)]
    given = tuple(arrays[i] for i in places)
    leaves = active.used(active.leaves, given[0].dtype if given else jnp.float32)
    context = ModuleContext(active.context, dropout, _not_yet)
    on = active.leaves.get(active.action.mask)
    for i, x in zip(places, active.action.method.feed(leaves, given, context), strict=True):
        changed = x.astype(arrays[i].dtype)
        arrays[i] = changed if on is None else jnp.where(on.reshape(()), changed, arrays[i])
    return restore(arrays)


def _not_yet(x: Any) -> Any:
    raise ValueError("a method that changes the inputs of a module cannot run it before")


# --- calls of linear layers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """The operation at a site, as the next method finds it: the module's own, changed by the methods so far.

    Attributes:
      call: the call as geometries see it.
      run: computes the output from an input, both in the module's own layout.
      weight: computes the weight as it is stored.
      bias: computes the bias as it is stored.
      dtype: dtype of the computation.
      plain: see `jpeft.core.method.Linear.plain`.
      dropout: the dropout of the next method's input.
    """

    call: Call
    run: Callable[[Any], Any]
    weight: Callable[[], jax.Array]
    bias: Callable[[], jax.Array | None]
    dtype: Any
    plain: bool
    dropout: Dropout

    def then(self, active: Active, run: Callable[[Any], Any]) -> Operation:
        """The operation after one more action, which computes its output by ``run``."""

        def merged() -> tuple[jax.Array, jax.Array | None]:
            return merge_layer([active.action], [active.shared], [active.leaves], self.weight(), self.bias())

        bias = (lambda: merged()[1]) if active.action.changes_bias else self.bias
        return dataclasses.replace(self, run=run, weight=lambda: merged()[0], bias=bias, plain=False)


class _Linear:
    """The original operation, as a weight method sees it: see `jpeft.core.method.Linear`."""

    def __init__(
        self, call: Callable[[Any], jax.Array], merged: Callable[[Any], jax.Array],
        weight: Any, bias: Any, dropout: Any, context: Mapping[str, Any], plain: bool = False,
    ):  # fmt: skip
        self._call, self._weight, self._bias = call, weight, bias
        self.merged, self.dropout, self.context, self.plain = merged, dropout, context, plain
        self.sampled = dropout.sampled

    def __call__(self, x: Any) -> jax.Array:
        return self._call(x)

    @property
    def weight(self) -> jax.Array:
        return self._weight()

    @property
    def bias(self) -> jax.Array | None:
        return self._bias()


class ChangedOperation:
    """An operation changed by one action: a function of the input in the module's own layout."""

    def __init__(self, active: Active, operation: Operation):
        self.active, self.operation = active, operation
        self.geometry: Any = active.site.geometry

    def __call__(self, raw: Any) -> Any:
        geometry, call = self.geometry, self.operation.call
        call = dataclasses.replace(call, args=with_item(call.args, geometry.argument, raw))
        x = geometry.operand(call, self.operation.dtype)
        y = self._batched(call, raw, x) if geometry.batch else self._single(call, raw, x)
        return geometry.output(call, y)

    def weight(self) -> jax.Array:
        return self.geometry.view(self.operation.weight().astype(self.operation.dtype))

    def bias(self) -> jax.Array | None:
        b = self.operation.bias()
        return None if b is None else self.geometry.view_bias(b.astype(self.operation.dtype))

    def _single(self, call: Call, raw: Any, x: Any) -> jax.Array:
        """The output ``[tokens..., out]`` of a weight that is one matrix."""
        geometry, operation = self.geometry, self.operation

        def original(z: Any) -> jax.Array:
            if geometry.takes_operand:
                return operation.run(z)
            if z is x:
                return geometry.result(call, operation.run(raw))
            restored = geometry.restore(call, z)
            if restored is not None:
                return geometry.result(call, operation.run(restored))
            return _affine(z, self.weight(), self.bias())

        return self._applied(self.active.leaves, original, self.weight, self.bias, x, operation.plain)

    def _batched(self, call: Call, raw: Any, x: Any) -> jax.Array:
        """The output ``[batch..., tokens..., out]`` of several matrices: the method is mapped over them.

        The module is called once, outside of the map.
        """
        geometry = self.geometry
        y0 = geometry.result(call, self.operation.run(raw))

        def one(leaves: Leaves, x: Any, y0: jax.Array, w: jax.Array, b: jax.Array | None) -> jax.Array:
            def original(z: Any) -> jax.Array:
                return y0 if z is x else _affine(z, w, b)

            return self._applied(leaves, original, lambda: w, lambda: b, x)

        # The parts of a fused weight share their input; experts and groups each have their own.
        shared = isinstance(geometry, Parts)
        mapped = jax.vmap(one, in_axes=(0, None, 0, 0, 0)) if shared else one
        mapped = map_axes(mapped, len(geometry.batch) - shared)
        return mapped(self.active.leaves, x, y0, self.weight(), self.bias())

    def _applied(self, leaves: Leaves, original: Any, weight: Any, bias: Any, x: Any, plain: bool = False) -> jax.Array:
        """The method's output for one matrix.

        Args:
          leaves: its leaves as they are stored.
          original: the operation without it.
          weight: computes the weight.
          bias: computes the bias.
          x: the input.
          plain: see `jpeft.core.method.Linear.plain`.
        """
        dtype, action = self.operation.dtype, self.active.action
        merged = functools.partial(_merged_product, self.active, leaves, weight, bias, dtype)
        base = _Linear(original, merged, weight, bias, self.operation.dropout, self.active.context, plain)
        return action.apply(self.active.used(leaves, dtype), leaves, base, x)


def _merged_product(active: Active, leaves: Leaves, weight: Any, bias: Any, dtype: Any, z: Any) -> jax.Array:
    """See `jpeft.core.method.Linear.merged`."""

    @jax.checkpoint
    def product(leaves: Leaves, w: jax.Array, b: jax.Array | None) -> jax.Array:
        w, b = merge_matrix(active.action, active.shared, leaves, w, b)
        return _affine(z, w.astype(dtype), None if b is None else b.astype(dtype))

    return product(leaves, weight(), bias())


def change_attend(active: Active, operation: Operation) -> Callable[[Any], Any]:
    """`nn.Embed.attend` changed by one action: the changed lookup, transposed."""
    leaves, dtype = active.used(active.leaves, operation.dtype), operation.dtype

    def weight() -> jax.Array:
        return operation.weight().astype(dtype)

    merged = functools.partial(_merged_product, active, active.leaves, weight, lambda: None, dtype)
    base = _Linear(lambda z: z @ weight(), merged, weight, lambda: None, no_dropout, active.context)

    def run(query: Any) -> Any:
        lookup = functools.partial(active.action.apply, leaves, active.leaves, base)
        return attend(lookup, query.astype(dtype), active.site.inputs)

    return run


def _affine(x: Any, w: jax.Array, b: jax.Array | None) -> jax.Array:
    y = x @ w
    return y if b is None else y + b


def with_item(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    """A tuple with another item at an index."""
    return (*items[:index], item, *items[index + 1 :])


# --- dropout ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Dropout:
    """The random numbers of a method in a call: see `jpeft.core.method.Linear`.

    Attributes:
      key: a PRNG key; None draws nothing.
      deterministic: a traced flag that turns them off, or False.
    """

    key: jax.Array | None = None
    deterministic: Any = False

    def __call__(self, x: Any, rate: float) -> Any:
        return x if self.key is None else dropped(self.key, self.deterministic, x, rate)

    def part(self, index: int) -> Dropout:
        """The random numbers of a part of the method, independent of other parts'."""
        return self if self.key is None else dataclasses.replace(self, key=jax.random.fold_in(self.key, index))

    def sampled(self, sample: Callable[[jax.Array], jax.Array], otherwise: jax.Array) -> jax.Array:
        if self.key is None:
            return otherwise
        y = sample(jax.random.fold_in(self.key, 1))  # independent of the dropout of the input
        return jnp.where(self.deterministic, otherwise, y) if isinstance(self.deterministic, jax.Array) else y


no_dropout = Dropout()


def dropped(key: jax.Array, deterministic: Any, x: Any, rate: float) -> Any:
    """``x`` with entries dropped at a rate and the rest scaled up; token ids are not dropped."""
    if rate == 0.0 or isinstance(x, Lookup):
        return x
    if isinstance(x, Patches):
        return x.map(lambda image: dropped(key, deterministic, image, rate))
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    y = jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros_like(x))
    return jnp.where(deterministic, x, y) if isinstance(deterministic, jax.Array) else y
