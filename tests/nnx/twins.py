"""NNX models with the parameters of the Linen ones of `tests.zoo`: the same paths, shapes and outputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tests.zoo import LAYERS, numbers

MODES = ("plain", "scan", "remat", "scan over the state")


def _called(op: Any, x: Any) -> Any:
    return op(x)


@dataclass(frozen=True)
class Twin:
    """An NNX module like that of a `tests.zoo.Use`, and how it is called."""

    make: Callable[..., Any]
    call: Callable[[Any, Any], Any] = _called


class Block(nnx.Module):
    def __init__(self, twin: Twin, dtype: Any, rngs: nnx.Rngs):
        self.call, self.op = twin.call, twin.make(dtype=dtype, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: Any) -> tuple[Any, Any]:
        y = self.call(self.op, x)
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


class GatedFFN(nnx.Module):
    def __init__(self, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.gating_einsum = nnx.Param(jnp.zeros((2, 4, 5), dtype))
        self.linear = nnx.Param(jnp.zeros((5, 4), dtype))

    def __call__(self, x: Any) -> Any:
        gating = self.gating_einsum[...]
        return (nnx.gelu(x @ gating[0]) * (x @ gating[1])) @ self.linear[...]


class InLoop(nnx.Module):
    def __init__(self, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.w = nnx.Param(jnp.zeros((4, 4), dtype))

    def __call__(self, x: Any) -> Any:
        w = self.w[...]
        return jax.lax.scan(lambda h, x: (h := nnx.tanh(h @ w + x), h), x[0], x)[1]


def _of(kind: Any, *args: Any, **fields: Any) -> Callable[..., Any]:
    return lambda **own: kind(*args, **fields, **own)


def _masked(op: Any, x: Any) -> Any:
    return op(x, mask=nnx.make_causal_mask(x[..., 0], dtype=bool))


TWINS: dict[str, Twin] = {
    "dense": Twin(_of(nnx.Linear, 4, 6)),
    "dense without bias": Twin(_of(nnx.Linear, 4, 6, use_bias=False)),
    "dense_general": Twin(_of(nnx.LinearGeneral, 4, (2, 3))),
    "dense_general, axes": Twin(_of(nnx.LinearGeneral, (2, 4), 5, axis=(-2, -1))),
    "dense_general, batch": Twin(_of(nnx.LinearGeneral, 4, (5, 2), axis=(-1,), batch_axis={0: 3})),
    "einsum": Twin(_of(nnx.Einsum, "BTD,DNH->BTNH", (4, 2, 3), (2, 3))),
    "einsum, experts": Twin(_of(nnx.Einsum, "GTD,GDF->GTF", (3, 4, 5), (3, 5))),
    "einsum, 3 fused": Twin(_of(nnx.Einsum, "BSD,3KDH->3BSKH", (3, 2, 4, 5))),
    "conv 2-D strided": Twin(_of(nnx.Conv, 4, 6, (3, 2), strides=(2, 1))),
    "conv 2-D grouped": Twin(_of(nnx.Conv, 4, 6, (3, 3), feature_group_count=2)),
    "conv transposed": Twin(_of(nnx.ConvTranspose, 4, 6, (3, 3), strides=(2, 2))),
    "embed": Twin(_of(nnx.Embed, 7, 6)),
    "embed, attend": Twin(_of(nnx.Embed, 7, 6), lambda op, x: op.attend(x)),
    "embed, tied by attend": Twin(_of(nnx.Embed, 7, 6), lambda op, x: op.attend(nnx.gelu(op(x)))),
    "fused qkv": Twin(_of(nnx.Linear, 4, 12)),
    "attention": Twin(_of(nnx.MultiHeadAttention, num_heads=2, in_features=8, decode=False), _masked),
    "raw": Twin(GatedFFN),
    "raw, in a loop": Twin(InLoop),
}


def twin(use: str, mode: str, dtype: Any, params: Any) -> nnx.Module:
    """The twin of a Linen model, with its parameters."""
    model = nnx.eval_shape(lambda: Model(TWINS[use], mode, dtype, nnx.Rngs(0)))
    graphdef, state, rest = nnx.split(model, nnx.Param, ...)
    found = {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    values = {tuple(key.key for key in path): x for path, x in flat}
    assert values.keys() == found.keys(), (values.keys(), found.keys())
    for path, variable in found.items():
        assert variable.get_raw_value().shape == values[path].shape, path
        variable.set_raw_value(values[path])
    rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if not _is_key(x) else jax.random.key(0), rest)
    return nnx.merge(graphdef, state, rest)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


__all__ = ["MODES", "TWINS", "numbers", "twin"]
