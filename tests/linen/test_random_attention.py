"""Random models with attentions that nobody registered, in both module systems, under random methods.

Every one gives finite outputs, which equal those of keys and values prepended by hand where the method is a prefix,
or is refused with a reason.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.core.tree import flatten
from jpeft.models.ops import masked_softmax
from tests.linen.foreign_attentions import COLLECTION, prepended, rotated
from tests.zoo import moved, numbers, parameters

pytestmark = pytest.mark.usefixtures("quick_compiles", "standard_promotion")
WIDTH, DIM, LENGTH, BATCH, PREFIX, VOCABULARY = 16, 4, 5, 2, 3, 24
IDS = np.random.default_rng(0).integers(1, VOCABULARY, (BATCH, LENGTH))
PADDING = np.array([[1] * LENGTH, [1] * (LENGTH - 2) + [0] * 2])


@dataclasses.dataclass(frozen=True)
class Form:
    """How a model is written."""

    system: str
    mode: str
    core: str
    softmax: str
    mask: str
    heads: tuple[int, int]
    cap: float | None
    norm: bool
    dtype: str
    quantized: bool
    method: str


CHOICES: dict[str, list[Any]] = {
    "system": ["linen", "linen", "nnx"],
    "mode": ["plain", "scan", "remat", "scan, remat", "vmap"],
    "core": ["repeated", "grouped", "folded", "jax", "by head"],
    "softmax": ["jax", "by hand", "custom_jvp", "divided last", "sink"],
    "mask": ["none", "causal", "padding", "both"],
    "heads": [(4, 4), (4, 2), (4, 1)],
    "cap": [None, 3.0],
    "norm": [False, True],
    "dtype": ["float32", "float32", "bfloat16"],
    "quantized": [False, False, True],
    "method": ["prefix"] * 4 + ["network", "prompt", "cartridge", "llama", "bottleneck", "houlsby", "parallel", "lora"],
}
METHODS = {
    "prefix": lambda: jpeft.PrefixTuning(length=PREFIX),
    "network": lambda: jpeft.PrefixTuning(length=PREFIX, reparametrize=True, hidden=6, embedding=5),
    "prompt": lambda: jpeft.methods.PromptTuning(length=PREFIX),
    "cartridge": lambda: jpeft.methods.Cartridge(length=PREFIX),
    "llama": lambda: jpeft.methods.LlamaAdapter(length=PREFIX),
    "bottleneck": lambda: jpeft.Bottleneck(size=2, targets=r".*attn"),
    "houlsby": lambda: jpeft.methods.Houlsby(size=2, targets=r".*attn"),
    "parallel": lambda: jpeft.methods.ParallelAdapter(size=2, targets=r".*attn"),
    "lora": lambda: jpeft.Chain(jpeft.LoRA(rank=2), jpeft.PrefixTuning(length=PREFIX)),
}


def drawn(seed):
    rng = np.random.default_rng(seed)
    return Form(**{name: values[rng.integers(len(values))] for name, values in CHOICES.items()})


# --- attentions -------------------------------------------------------------------------------------------------------


def mixed(form, logits, mask, values, sink, product):
    """The softmax of logits, and the product with values, in the way of a form; ``mask`` may be None."""
    if form.cap is not None:
        logits = jnp.tanh(logits / form.cap) * form.cap
    hidden = logits if mask is None else jnp.where(mask, logits, -1e30)
    if form.softmax == "jax":
        p = jax.nn.softmax(hidden.astype(jnp.float32), axis=-1)
    elif form.softmax == "custom_jvp":
        p = masked_softmax(hidden, None)
    elif form.softmax == "sink":
        column = jnp.broadcast_to(sink.astype(hidden.dtype), (*hidden.shape[:-1], 1))
        p = jax.nn.softmax(jnp.concatenate([hidden, column], axis=-1), axis=-1)[..., :-1]
    else:
        e = jnp.exp(hidden - jax.lax.stop_gradient(hidden.max(-1, keepdims=True)))
        if form.softmax == "divided last":
            y, total = product(e.astype(values.dtype), values), product(e.astype(values.dtype), jnp.ones_like(values))
            return y / total
        p = e / e.sum(-1, keepdims=True)
    return product(p.astype(values.dtype), values)


def attention(form, q, k, v, mask):
    """Queries ``[batch, queries, heads, dim]`` that attend to keys; ``mask [batch, 1, queries, keys]`` or None."""
    groups, sink = q.shape[2] // k.shape[2], jnp.ones(())
    if form.core == "jax":
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=DIM**-0.5)
    q = q * DIM**-0.5
    if form.core == "grouped":
        q = q.reshape(*q.shape[:2], k.shape[2], groups, DIM)
        logits, mask = jnp.einsum("btkgh,bskh->bkgts", q, k), None if mask is None else mask[:, :, None]
        y = mixed(form, logits, mask, v, sink, functools.partial(jnp.einsum, "bkgts,bskh->bkgth"))
        return jnp.moveaxis(y, 3, 1).reshape(*y.shape[:1], y.shape[3], -1, DIM)
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    if form.core == "folded":
        folded = [jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], DIM) for x in (q, k, v)]
        if mask is not None:
            mask = jnp.repeat(jnp.broadcast_to(mask, (len(q), *mask.shape[1:]))[:, 0], q.shape[2], axis=0)
        y = mixed(form, folded[0] @ folded[1].mT, mask, folded[2], sink, jnp.matmul)
        return jnp.moveaxis(y.reshape(len(q), -1, *y.shape[1:]), 1, 2)
    if form.core == "by head":
        own = None if mask is None else mask[:, 0]

        def one(q, k, v):
            return mixed(form, q @ k.mT, own, v, sink, jnp.matmul)

        return jax.vmap(one, in_axes=2, out_axes=2)(q, k, v)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    y = mixed(form, logits, mask, v, sink, functools.partial(jnp.einsum, "bhqk,bkhd->bhqd"))
    return jnp.moveaxis(y, 1, 2)


def mask_of(form, attention_mask, length):
    mask = None
    if form.mask in ("causal", "both"):
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    if form.mask in ("padding", "both") and attention_mask is not None:
        seen = (attention_mask > 0)[:, None, None, :]
        mask = seen if mask is None else mask & seen
    return mask


# --- models -----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    form: Form

    @nn.compact
    def __call__(self, x, mask, positions):
        heads, kv_heads = self.form.heads
        q, k, v = (
            nn.Dense(n * DIM, dtype=x.dtype, name=name)(x).reshape(*x.shape[:2], n, DIM)
            for n, name in ((heads, "q"), (kv_heads, "k"), (kv_heads, "v"))
        )
        if self.form.norm:
            q, k = nn.RMSNorm(dtype=x.dtype, name="q_norm")(q), nn.RMSNorm(dtype=x.dtype, name="k_norm")(k)
        q, k = rotated(q, positions), rotated(k, positions)
        k, v, mask, _ = prepended(self, k, v, mask)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), dtype=x.dtype, name="o")(attention(self.form, q, k, v, mask))


class Block(nn.Module):
    form: Form

    @nn.compact
    def __call__(self, x, mask, positions):
        x = x + Attention(self.form, name="attn")(nn.RMSNorm(dtype=x.dtype, name="norm")(x), mask, positions)
        return x + nn.Dense(WIDTH, dtype=x.dtype, name="mlp")(nn.gelu(x)), None


class Linen(nn.Module):
    form: Form

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, position_ids=None):
        form, dtype = self.form, jnp.dtype(self.form.dtype)
        x = nn.Embed(VOCABULARY, WIDTH, dtype=dtype, name="embed")(input_ids)
        mask = mask_of(form, attention_mask, input_ids.shape[1])
        positions = jnp.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        block = nn.remat(Block) if "remat" in form.mode else Block
        if "scan" in form.mode:
            axes = {"params": 0, COLLECTION: 0}
            block = nn.scan(block, axes, split_rngs={"params": True}, in_axes=nn.broadcast, length=2)
            x, _ = block(form, name="layers")(x, mask, positions)
        else:
            x, _ = block(form, name="layer")(x, mask, positions)
        return nn.Dense(VOCABULARY, dtype=dtype, name="head")(x)


class NnxAttention(nnx.Module):
    def __init__(self, form, rngs):
        heads, kv_heads = form.heads
        self.form = form
        for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            setattr(self, name, nnx.Linear(WIDTH, n * DIM, dtype=jnp.dtype(form.dtype), rngs=rngs))
        self.o = nnx.Linear(heads * DIM, WIDTH, dtype=jnp.dtype(form.dtype), rngs=rngs)

    def __call__(self, x, mask, positions, given=None):
        q, k, v = (getattr(self, name)(x).reshape(*x.shape[:2], -1, DIM) for name in "qkv")
        q, k = rotated(q, positions), rotated(k, positions)
        if given is not None:
            wide = [jnp.broadcast_to(y.astype(x.dtype), (len(x), *y.shape)) for y in given]
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(wide, (k, v), strict=True))
            mask = None if mask is None else jnp.pad(mask, ((0, 0),) * 3 + ((PREFIX, 0),), constant_values=True)
        y = attention(self.form, q, k, v, mask)
        return self.o(y.reshape(*x.shape[:2], -1))


class Nnx(nnx.Module):
    def __init__(self, form, rngs):
        self.form = form
        self.embed = nnx.Embed(VOCABULARY, WIDTH, dtype=jnp.dtype(form.dtype), rngs=rngs)
        self.attn = NnxAttention(form, rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, dtype=jnp.dtype(form.dtype), rngs=rngs)

    def __call__(self, input_ids, attention_mask=None, position_ids=None, given=None):
        x = self.embed(input_ids)
        mask = mask_of(self.form, attention_mask, input_ids.shape[1])
        positions = jnp.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        run = nnx.remat(type(self.attn).__call__) if "remat" in self.form.mode and given is None else None
        y = run(self.attn, x, mask, positions) if run else self.attn(x, mask, positions, given)
        return self.head(x + y)


@dataclasses.dataclass
class Built:
    """A model, its parameters, and a function that runs it with keys and values by hand."""

    model: Any
    params: Any
    by_hand: Any


def built(form):
    if form.system == "linen":
        model = Linen(form)
        params = parameters(model, IDS)
        plain = params
        if form.quantized:
            params = jpeft.quantize(params, "nf4", model, IDS, block=4)
            plain = jpeft.dequantize(params)
        return Built(model, params, lambda a, *xs: model.apply({"params": plain, COLLECTION: a}, *xs))
    model = nnx.eval_shape(lambda: Nnx(form, nnx.Rngs(0)))
    nnx.update(model, numbers(nnx.state(model, nnx.Param)))

    def by_hand(adapter, *xs):
        return model(*xs, given=(adapter["attn"]["prefix_key"], adapter["attn"]["prefix_value"]))

    return Built(model, nnx.state(model, nnx.Param), by_hand)


# The words of refusals: what cannot be done, and why.
REFUSALS = ("not known", "cannot act on", "have none", "which has a derivative of its own")


@pytest.mark.parametrize("seed", [pytest.param(i, marks=[pytest.mark.exhaustive] * (i >= 20)) for i in range(200)])
def test_a_random_model(seed):
    form = drawn(seed)
    own, inputs = built(form), (IDS, PADDING if "padding" in form.mask or form.mask == "both" else None)
    try:
        bound = (own.model, own.params) if form.system == "linen" else (own.model,)
        peft = METHODS[form.method]().bind(*bound, *inputs)
    except ValueError as e:
        assert any(words in str(e) for words in REFUSALS), (form, e)
        pytest.skip(f"{form}: {e}")
    adapter = (
        moved(peft, own.params, 0.5)
        if form.system == "linen"
        else numbers(jax.eval_shape(lambda: peft.init(jax.random.key(0), own.params)), 0.5)
    )

    def run(params, adapter, *inputs):
        return peft.apply(params, adapter, *inputs)

    def rows(params, adapter, *inputs):
        one = lambda *xs: run(params, adapter, *(x[None] for x in xs))[0]  # noqa: E731
        return jax.vmap(one)(*(x for x in inputs if x is not None))

    y = jax.jit(rows if form.mode == "vmap" else run)(own.params, adapter, *inputs)
    assert y.shape == (BATCH, LENGTH, VOCABULARY) and y.dtype == form.dtype, form
    assert np.isfinite(np.asarray(y, np.float32)).all(), form
    if form.method == "prefix":
        want = jax.jit(own.by_hand)(adapter, *inputs)
        tolerance = 1e-5 if form.dtype == "float32" else 4e-2
        scale = max(1, np.abs(np.asarray(want, np.float32)).max())
        np.testing.assert_allclose(
            np.asarray(y, np.float32), np.asarray(want, np.float32), rtol=0, atol=tolerance * scale, err_msg=str(form)
        )
    if form.dtype == "float32" and seed % 4 == 0:
        grads = jax.jit(jax.grad(lambda a: jnp.sin(run(own.params, a, *inputs)).sum()))(adapter)
        assert all(np.isfinite(g).all() for g in flatten(grads).values()), form
