"""NNX models with the parameters of the Linen ones of `tests.zoo`: the same paths, shapes and outputs."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jpeft.core.tree import flatten
from tests.zoo import LAYERS, MASK, rounded, rounding

MODES = ("plain", "scan", "remat", "scan over the state")


def _called(block: Any, x: Any) -> Any:
    return block.op(x)


@dataclass(frozen=True)
class Twin:
    """An NNX module like that of a `tests.zoo.Use`, what lies beside it in its block, and how the two are called."""

    make: Callable[..., Any]
    call: Callable[[Any, Any], Any] = _called
    beside: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


class Block(nnx.Module):
    def __init__(self, twin: Twin, dtype: Any, rngs: nnx.Rngs):
        self.call = twin.call
        for name, make in {"op": twin.make, **twin.beside}.items():
            setattr(self, name, make(dtype=dtype, param_dtype=dtype, rngs=rngs))

    def __call__(self, x: Any) -> tuple[Any, Any]:
        y = self.call(self, x)
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = x * (1 + 0.1 * jnp.tanh(y.mean())).astype(x.dtype)
        return x, y


class Model(nnx.Module):
    """`tests.zoo.Model`, scanned by ``nnx.scan`` or by ``jax.lax.scan`` over its state."""

    def __init__(self, twin: Twin, mode: str, dtype: Any, rngs: nnx.Rngs):
        self.mode = mode
        if "scan" not in mode:
            self.block = Block(twin, dtype, rngs)
            return

        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs) -> Block:
            return Block(twin, dtype, rngs)

        self.block = make(rngs)

    def hidden_states(self, x: Any) -> Any:
        return x

    def __call__(self, x: Any) -> Any:
        def run(x: Any, block: Block) -> tuple[Any, Any]:
            return block(x)

        if self.mode == "plain":
            _, y = self.block(x)
        elif self.mode == "remat":
            _, y = nnx.remat(run)(x, self.block)
        elif self.mode == "scan":
            _, y = nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(x, self.block)
        else:
            graphdef, state = nnx.split(self.block)
            _, y = jax.lax.scan(lambda x, state: nnx.merge(graphdef, state)(x), x, state)
        return y * 2


# --- modules that read their weights themselves -----------------------------------------------------------------------


class Raw(nnx.Module):
    """Parameters by name, and a function of them and the input."""

    def __init__(self, run: Callable[..., Any], shapes: Mapping[str, tuple[int, ...]], **given: Any):
        self.run, self.names = run, tuple(shapes)
        for name, shape in shapes.items():
            setattr(self, name, nnx.Param(jnp.zeros(shape, given["dtype"])))

    def __call__(self, x: Any) -> Any:
        return self.run(x, *(getattr(self, name)[...] for name in self.names))


def _raw(run: Callable[..., Any], **shapes: tuple[int, ...]) -> Callable[..., Any]:
    return lambda **given: Raw(run, shapes, **given)


class Einsum(Raw):
    """A foreign class of this name, whose equation comes with the call, and whose parameter is called ``w``."""

    def __init__(self, shape: tuple[int, ...], **given: Any):
        super().__init__(lambda x, w: None, {"w": shape}, **given)

    def __call__(self, eqn: str, x: Any) -> Any:  # type: ignore[override]
        return jnp.einsum(eqn, x, self.w[...])


class NormalizedEinsum(Raw):
    def __call__(self, eqn: str, x: Any) -> Any:  # type: ignore[override]
        w = self.w[...]
        return jnp.einsum(eqn, x, w / jnp.linalg.norm(w, axis=0))


NormalizedEinsum.__name__ = NormalizedEinsum.__qualname__ = "Einsum"


class Standardized(nnx.Linear):
    """The weight is standardized before the product, in a method of the class that calls its parent's."""

    def __call__(self, x: Any) -> Any:
        w = self.kernel[...]
        return x @ ((w - w.mean(0)) / (w.std(0) + 1e-5)) + self.bias[...]


class DenseGeneral(Raw):
    """T5X and Flaxformer: the kernel of many axes is stored as a matrix."""

    def __init__(self, axis: tuple[int, ...], sizes: tuple[int, ...], features: tuple[int, ...], **given: Any):
        def run(x: Any, w: Any) -> Any:
            dims = tuple(a % x.ndim for a in axis)
            return jax.lax.dot_general(x, w.reshape(sizes + features), ((dims, tuple(range(len(axis)))), ((), ())))

        super().__init__(run, {"kernel": (math.prod(sizes), math.prod(features))}, **given)


def _gated(x: Any, gating: Any, linear: Any) -> Any:
    return (nnx.gelu(x @ gating[0]) * (x @ gating[1])) @ linear


def _looped(x: Any, w: Any) -> Any:
    return jax.lax.scan(lambda h, x: (h := nnx.tanh(h @ w + x), h), x[0], x)[1]


# --- the twins --------------------------------------------------------------------------------------------------------


def _of(kind: Any, *args: Any, **fields: Any) -> Callable[..., Any]:
    return lambda **own: kind(*args, **fields, **own)


def _einsum(*args: Any) -> Twin:
    return Twin(_of(nnx.Einsum, *args))


def _conv(outputs: int, *args: Any, kind: Any = nnx.Conv, **fields: Any) -> Twin:
    return Twin(_of(kind, 4, outputs, *args, **fields))


def _with_spec(kind: Any, spec: str, *args: Any) -> Twin:
    return Twin(_of(kind, *args), lambda block, x: block.op(spec, x))


def _masked_conv(**own: Any) -> Any:
    return nnx.Conv(4, 6, (3,), mask=MASK.astype(own["dtype"]), **own)


def _masked(block: Any, x: Any) -> Any:
    return block.op(x, mask=nnx.make_causal_mask(x[..., 0], dtype=bool))


_SPEC = "BSD,CKDH->CBSKH"
TWINS: dict[str, Twin] = {
    "dense": Twin(_of(nnx.Linear, 4, 6)),
    "dense without bias": Twin(_of(nnx.Linear, 4, 6, use_bias=False)),
    "dense, one vector": Twin(_of(nnx.Linear, 4, 6)),
    "dense_general": Twin(_of(nnx.LinearGeneral, 4, (2, 3))),
    "dense_general, axes": Twin(_of(nnx.LinearGeneral, (2, 4), 5, axis=(-2, -1))),
    "dense_general, first axes": Twin(_of(nnx.LinearGeneral, (3, 4), (5, 2), axis=(1, 0))),
    "dense_general, batch": Twin(_of(nnx.LinearGeneral, 4, (5, 2), axis=(-1,), batch_axis={0: 3})),
    "dense_general, two batch": Twin(_of(nnx.LinearGeneral, 4, 5, axis=(2,), batch_axis={0: 2, 1: 3})),
    "einsum": _einsum("BTD,DNH->BTNH", (4, 2, 3), (2, 3)),
    "einsum, many in": _einsum("BTNH,NHD->BTD", (2, 3, 5), (5,)),
    "einsum, stored outputs first": _einsum("BTD,HND->BTNH", (3, 2, 4), (2, 3)),
    "einsum, batch": _einsum("BTND,NDH->BTNH", (2, 4, 5), (2, 5)),
    "einsum, experts": _einsum("GTD,GDF->GTF", (3, 4, 5), (3, 5)),
    "einsum, 3 fused": _einsum("BSD,3KDH->3BSKH", (3, 2, 4, 5)),
    "einsum, any rank": _einsum("...i,io->...o", (4, 6), (6,)),
    "conv 1-D": _conv(6, (3,)),
    "conv 1-D causal": _conv(6, (3,), padding="CAUSAL"),
    "conv 2-D strided": _conv(6, (3, 2), strides=(2, 1)),
    "conv 2-D grouped": _conv(6, (3, 3), feature_group_count=2),
    "conv 2-D depthwise": _conv(8, (3, 3), feature_group_count=4),
    "conv 2-D dilated": _conv(6, (3, 3), kernel_dilation=2, input_dilation=2, padding=((1, 1), (2, 1))),
    "conv 2-D circular": _conv(6, (3, 3), padding="CIRCULAR"),
    "conv 2-D padded, no batch": _conv(6, (3, 3), padding=1),
    "conv 2-D, batches": _conv(6, (2, 2)),
    "conv 3-D valid": _conv(5, (2, 2, 2), padding="VALID"),
    "conv masked": Twin(_masked_conv),
    "conv transposed": _conv(6, (3, 3), kind=nnx.ConvTranspose, strides=(2, 2)),
    "conv transposed, kernel too": _conv(6, (3,), kind=nnx.ConvTranspose, strides=(2,), transpose_kernel=True),
    "embed": Twin(_of(nnx.Embed, 7, 6)),
    "embed, attend": Twin(_of(nnx.Embed, 7, 6), lambda block, x: block.op.attend(x)),
    "embed, tied by attend": Twin(_of(nnx.Embed, 7, 6), lambda block, x: block.op.attend(nnx.gelu(block.op(x)))),
    "dense on tokens": Twin(
        _of(nnx.Linear, 4, 6), lambda block, x: block.op(block.table(x)), {"table": _of(nnx.Embed, 7, 4)}
    ),
    "embed, tied by its table": Twin(
        _of(nnx.Embed, 7, 6), lambda block, x: nnx.gelu(block.op(x)) @ block.op.embedding[...].T
    ),
    "fused qkv": Twin(_of(nnx.Linear, 4, 12)),
    "fused qkv, heads": Twin(_of(nnx.LinearGeneral, 4, (3, 2, 2))),
    "attention": Twin(_of(nnx.MultiHeadAttention, num_heads=2, in_features=8, decode=False), _masked),
    "raw": Twin(_raw(_gated, gating_einsum=(2, 4, 5), linear=(5, 4))),
    "raw, in a loop": Twin(_raw(_looped, w=(4, 4))),
    "standardized": Twin(_of(Standardized, 4, 6)),
    "product of its own": Twin(_of(nnx.Linear, 4, 6, dot_general=rounded)),
    "product that rounds the weight": Twin(_of(nnx.Linear, 4, 6, dot_general=rounding)),
    "named Einsum": _with_spec(NormalizedEinsum, "...i,io->...o", None, {"w": (4, 6)}),
    "FlaxConv1D": Twin(_raw(lambda x, w, b: x @ w.T + b, kernel=(6, 4), bias=(6,))),
    "Gemma Einsum": _with_spec(Einsum, "BTD,NDH->BTNH", (2, 4, 3)),
    "Gemma Einsum, fused kv": _with_spec(Einsum, _SPEC, (2, 3, 4, 5)),
    "T5X DenseGeneral": Twin(_of(DenseGeneral, (-1,), (4,), (2, 3))),
    "T5X DenseGeneral, axes": Twin(_of(DenseGeneral, (-2, -1), (2, 4), (5,))),
}


def twin(use: str, mode: str, dtype: Any, params: Any) -> nnx.Module:
    """The twin of a Linen model, with its parameters."""
    graphdef, state, rest = nnx.split(
        nnx.eval_shape(lambda: Model(TWINS[use], mode, dtype, nnx.Rngs(0))), nnx.Param, ...
    )
    if jax.tree.leaves(rest):  # otherwise there is nothing to compute
        rest = nnx.split(Model(TWINS[use], mode, dtype, nnx.Rngs(0)), nnx.Param, ...)[2]
    return nnx.merge(graphdef, _filled(state, params), rest)


def _filled(state: Any, params: Any) -> Any:
    """A state of new Variables with values by path."""
    state = jax.tree.map(lambda x: x, state)
    found = {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    values = flatten(params)
    assert values.keys() == found.keys(), (values.keys(), found.keys())
    for path, variable in found.items():
        assert variable.get_raw_value().shape == values[path].shape, path
        variable.set_raw_value(values[path])
    return state


def run(model: nnx.Module, params: Any, x: Any) -> Any:
    """The output of a model over other parameters."""
    graphdef, state, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graphdef, _filled(state, params), jax.tree.map(lambda x: x, rest))(x)


def abstract(model: nnx.Module) -> Any:
    """A model with shapes in the place of its arrays."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.eval_shape(lambda: state))
