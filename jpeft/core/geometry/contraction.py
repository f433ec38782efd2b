"""Weights used in an einsum: dense layers, projections to heads, experts."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core import backend
from jpeft.core.dataflow.views import DOT, VMAPPED, Use, View, joined, paired
from jpeft.core.geometry.base import Call, Geometry


def along_axes(
    ndim: int, axis: tuple[int, ...], batch: tuple[int, ...], shape: tuple[int, ...], stored: tuple[int, ...]
) -> Contraction:
    """The geometry of a general dense layer, whose weight has axes ``[batch..., in..., out...]``.

    Args:
      ndim: the number of axes of the input.
      axis: those that are summed over, in the order of the weight's.
      batch: those that are axes of the weight and of the output too.
      shape: shape of the weight.
      stored: shape of the stored weight.
    """
    xs, outs = string.ascii_lowercase[:ndim], string.ascii_uppercase[: len(shape) - len(axis) - len(batch)]
    if not batch and axis == tuple(range(ndim - len(axis), ndim)):  # the last axes: inputs of any rank
        ins = xs[: len(axis)]
        return Contraction(spec=f"...{ins},{ins}{outs}->...{outs}", shape=shape, stored=stored)
    dims, ins = "".join(xs[d] for d in batch), "".join(xs[a] for a in axis)
    rest = "".join(c for c in xs if c not in dims + ins)
    return Contraction(spec=f"{xs},{dims}{ins}{outs}->{dims}{rest}{outs}", shape=shape, stored=stored)


def einsum(call: Call) -> Contraction | None:
    """The geometry of ``nn.Einsum(x[, eqn])`` and ``nnx.Einsum``, and of those of other packages, such as Gemma's.

    Theirs take the equation first, or have it as ``einsum_str``, and may call the parameter ``w``.
    """
    strings = [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, str)]
    spec = strings[0] if strings else getattr(call.module, "einsum_str", None)
    argument = next((i for i, a in enumerate(call.args) if a is not None and not isinstance(a, str)), None)
    weights = [n for n, s in call.shapes.items() if n != "bias" and len(s) >= 2]
    if spec is None or argument is None or len(weights) != 1:
        return None
    try:
        labels_of(spec)
    except ValueError:
        return None  # not a matrix, e.g. because the einsum sums over an axis of the weight alone
    shape = call.shapes[weights[0]]
    return Contraction(leaf=weights[0], argument=argument, spec=spec.replace(" ", ""), shape=shape, stored=shape)


def labels_of(spec: str) -> tuple[str, str, str]:
    """The axis labels of input, weight and output in an einsum spec.

    Raises:
      ValueError: not an einsum of two operands, or one whose weight is not a matrix.

    >>> labels_of("...i,io->...o")
    ('...i', 'io', '...o')
    """
    try:
        operands, y = spec.replace(" ", "").split("->")
        x, w = operands.split(",")
    except ValueError:
        raise ValueError(f"geometry {spec!r}: expected an einsum of two operands, such as '...i,io->...o'") from None
    used = set(w.replace("...", ""))
    if "." in w or not used <= set(x) | set(y) or len(used) != len(w):
        raise ValueError(f"geometry {spec!r}: every axis of the weight (second operand) must be in the input or output")
    return x, w, y


def _free_labels(n: int) -> str:
    """Labels for the axes of an ellipsis, from a block of Unicode that no spec uses."""
    return "".join(chr(0x4E00 + i) for i in range(n))


@dataclass(frozen=True)
class Contraction(Geometry):
    """A weight used as ``y = einsum(spec, x, w)``, e.g. ``...i,io->...o`` for a dense layer.

    An axis of the weight that is in x but not in y is an input, in y but not in x an output, in both a batch axis.

    Attributes:
      spec: the einsum, with the input as first and the weight as second operand.
      shape: shape of the weight in the einsum.
      stored: shape of the stored weight, which may be flattened (T5X).
    """

    spec: str = "...i,io->...o"
    shape: tuple[int, ...] = ()
    stored: tuple[int, ...] = ()

    @property
    def _roles(self) -> tuple[str, str, str]:
        """Labels of the weight's batch, input and output axes."""
        x, w, y = labels_of(self.spec)
        batch = "".join(c for c in w if c in x and c in y)
        return batch, "".join(c for c in w if c in x and c not in y), "".join(c for c in w if c not in x)

    def _size(self, labels: str) -> int:
        w = labels_of(self.spec)[1]
        return math.prod(self.shape[w.index(c)] for c in labels)

    @property
    def batch(self) -> tuple[int, ...]:
        labels = self._roles[0]
        return (self._size(labels),) if labels else ()

    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        w = labels_of(self.spec)[1]
        if self.stored and self.stored != self.shape:  # flattened to [in, out]
            return (), (0,), (1,)
        batch, ins, outs = (tuple(w.index(c) for c in role) for role in self._roles)
        return batch, ins, outs

    def explains(self, use: Use, shape: tuple[int, ...]) -> bool:
        found, operand = use.product, use.operand
        stored = View.of(self.stored).reshape(self.shape)
        if found.kind != DOT or operand is None or use.returned is None or stored is None:
            return False
        x, w, y = labels_of(self.spec)
        if "..." in x:
            free = _free_labels(len(shape) - len(x.replace("...", "")))
            x, y = x.replace("...", free), y.replace("...", free)
        if found.weight.fixed or found.weight.flipped or operand.fixed or operand.flipped or len(x) != len(shape):
            return False
        batch, ins, _ = self._roles
        mine, theirs = dict(zip(w, stored.axes, strict=True)), dict(zip(x, View.of(shape, "x").axes, strict=True))
        for pairs, labels in ((found.contracted, ins), (found.batch, batch)):
            axes = [(found.weight.axes[i], operand.axes[j]) for i, j in pairs]
            if paired(axes) != paired([(mine[c], theirs[c]) for c in labels]):
                return False
        return use.returned.without(VMAPPED).axes == tuple(joined(mine.get(c) or theirs.get(c, ())) for c in y)

    def view(self, w: jax.Array) -> jax.Array:
        _, labels, _ = labels_of(self.spec)
        batch, ins, outs = self._roles
        w = _transpose(w.reshape(self.shape), labels, batch + ins + outs)
        return w.reshape(*self.batch, self._size(ins), self._size(outs))

    def unview(self, m: jax.Array) -> jax.Array:
        _, labels, _ = labels_of(self.spec)
        order = "".join(self._roles)
        m = m.reshape([self._size(c) for c in order])
        return _transpose(m, order, labels).reshape(self.stored or self.shape)

    def _bias_labels(self) -> str:
        _, w, y = labels_of(self.spec)
        return "".join(c for c in y if c in w)  # in the order of the output, to which the bias is added

    def view_bias(self, b: jax.Array) -> jax.Array:
        labels = self._bias_labels()
        batch, _, outs = self._roles
        b = _transpose(b.reshape([self._size(c) for c in labels]), labels, batch + outs)
        return b.reshape(*self.batch, self._size(outs))

    def unview_bias(self, m: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        batch, _, outs = self._roles
        m = m.reshape([self._size(c) for c in batch + outs])
        return _transpose(m, batch + outs, self._bias_labels()).reshape(shape)

    def _layout(self, call: Call) -> tuple[str, str, str, dict[str, int]]:
        """Labels of the call's x and y without ellipsis, labels of its token axes, and the size of each axis of x."""
        x, w, y = labels_of(self.spec)
        shape = call.args[self.argument].shape
        if "..." in x:
            free = _free_labels(len(shape) - len(x.replace("...", "")))
            x, y = x.replace("...", free), y.replace("...", free)
        if len(x) != len(shape):
            raise ValueError(
                f"geometry {self.spec!r} was bound to inputs of rank {len(x)}; this call has rank {len(shape)}"
            )
        return x, y, "".join(c for c in x if c not in w), dict(zip(x, shape, strict=True))

    def _flat(self, x: jax.Array, labels: str, tokens: str, features: str, sizes: dict[str, int]) -> jax.Array:
        """An input or output as ``[batch..., tokens..., features]``."""
        x = _transpose(x, labels, self._roles[0] + tokens + features)
        middle = [math.prod(sizes[c] for c in tokens)] if backend.flatten_tokens() else [sizes[c] for c in tokens]
        return x.reshape(*self.batch, *middle, self._size(features))

    def operand(self, call: Call, dtype: Any) -> jax.Array:
        labels, _, tokens, sizes = self._layout(call)
        return self._flat(call.args[self.argument].astype(dtype), labels, tokens, self._roles[1], sizes)

    def restore(self, call: Call, x: jax.Array) -> jax.Array:
        labels, _, tokens, sizes = self._layout(call)
        order = self._roles[0] + tokens + self._roles[1]
        return _transpose(x.reshape([sizes[c] for c in order]), order, labels)

    def result(self, call: Call, y: jax.Array) -> jax.Array:
        _, labels, tokens, sizes = self._layout(call)
        return self._flat(y, labels, tokens, self._roles[2], sizes)

    def output(self, call: Call, y: jax.Array) -> jax.Array:
        _, labels, tokens, sizes = self._layout(call)
        order = self._roles[0] + tokens + self._roles[2]
        return _transpose(y.reshape([sizes[c] if c in sizes else self._size(c) for c in order]), order, labels)

    @property
    def takes_operand(self) -> bool:
        return self.spec == "...i,io->...o"


def _transpose(x: jax.Array, labels: str, order: str) -> jax.Array:
    return x if labels == order else jnp.transpose(x, [labels.index(c) for c in order])
