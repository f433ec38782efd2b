"""NNX models as people write them: layers of every kind, stacked in every way."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jpeft
from tests.zoo import numbers


class One(nnx.Module):
    """One layer, whose output passes through a nonlinearity: it is no head."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, *args):
        return jnp.tanh(self.layer(*args))


class Doubled(nnx.Linear):
    """A subclass that calls its parent's method."""

    def __call__(self, x):
        return super().__call__(x) * 2


class Shared(nnx.Module):
    """One module under two names."""

    def __init__(self, rngs):
        self.a = self.b = nnx.Linear(8, 8, rngs=rngs)
        self.c = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.c(self.b(jnp.tanh(self.a(x))))


class Tied(nnx.Module):
    """One Variable in two modules, and a table that another module reads."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.a, self.b = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.b.kernel = self.a.kernel

    def __call__(self, ids):
        h = self.b(jnp.tanh(self.a(self.embed(ids))))
        return h @ self.embed.embedding[...].T


class Embedder(nnx.Module):
    """tunix's: a table of its own, with a method for each direction."""

    def __init__(self, rngs):
        self.input_embedding = nnx.Param(jax.random.normal(rngs.params(), (11, 8)))

    @jax.named_scope("encode")
    def encode(self, ids):
        return self.input_embedding[(ids,)] * jnp.sqrt(8.0)

    @jax.named_scope("decode")
    def decode(self, x):
        return jnp.dot(x, self.input_embedding[...].T)


class Lookup(nnx.Module):
    def __init__(self, rngs):
        self.embedder = Embedder(rngs)

    def __call__(self, ids):
        return self.embedder.decode(jnp.tanh(self.embedder.encode(ids)))


class Experts(nnx.Module):
    """Stacked experts, read inside a larger method."""

    def __init__(self, rngs):
        self.up = nnx.Param(jax.random.normal(rngs.params(), (3, 8, 12)) * 0.3)
        self.down = nnx.Param(jax.random.normal(rngs.params(), (3, 12, 8)) * 0.3)

    def __call__(self, x):
        h = jnp.tanh(jnp.einsum("btd,edf->betf", x, self.up[...]))
        return jnp.einsum("betf,efd->betd", h, self.down[...]).sum(1)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Param(jax.random.normal(rngs.params(), (16, 8)) * 0.1)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.0, rngs=rngs)

    def __call__(self, x):
        return x + self.drop(jnp.tanh(self.up(self.norm(x)))) @ self.down[...]


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attn(x, mask=nnx.make_causal_mask(x[..., 0]))


# Functions of stacked weights after which it cannot be told which layer is where.
OPAQUE = {"rolled": lambda w: jnp.roll(w, 1, 0), "scaled": lambda w: w * 1.5, "every second": lambda w: w[::2]}


class Stack(nnx.Module):
    """Layers in a list, or stacked and run by a scan."""

    def __init__(self, rngs, how, layer=Layer, count=3):
        self.how = how
        if how.startswith("loop"):
            self.layers = nnx.List([layer(rngs) for _ in range(count)])
            return

        @nnx.split_rngs(splits=count)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return layer(rngs)

        self.layers = make(rngs)
        if how == "lax.scan, axis 1":  # MaxText's param_scan_axis
            state = nnx.state(self.layers, nnx.Param)
            nnx.update(self.layers, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), state))

    def __call__(self, x):
        if self.how == "loop":
            for layer in self.layers:
                x = layer(x)
            return x
        if self.how == "loop, transforms":
            for layer in self.layers:
                graphdef, state = nnx.split(layer)
                x = jax.checkpoint(lambda s, x, graphdef=graphdef: nnx.merge(graphdef, s)(x))(state, x)
                x = nnx.remat(lambda layer, x: layer(x))(layer, x)
                x = nnx.jit(lambda layer, x: layer(x))(layer, x)
            return x
        if self.how.startswith("nnx.scan"):

            def run(x, layer):
                return layer(x)

            run = nnx.remat(run) if "remat" in self.how else run
            axes = nnx.StateAxes({nnx.Param: 0, ...: 0}) if "axes" in self.how else 0
            return nnx.scan(run, in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)(x, self.layers)
        graphdef, params, rest = nnx.split(self.layers, nnx.Param, ...)
        if self.how == "lax.scan, axis 1":
            params = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), params)

        def step(x, states):
            return nnx.merge(graphdef, *states)(x), None

        states, count = (params, rest), jax.tree.leaves(params)[0].shape[0]

        def layer(i):
            return jax.tree.map(lambda x: x[i], states)

        if self.how == "indexed, loop":
            for i in range(count):
                x, _ = step(x, layer(i))
            return x
        if self.how == "indexed, fori_loop":
            return jax.lax.fori_loop(0, count, lambda i, x: step(x, layer(i))[0], x)
        if self.how == "indexed, lax.scan":
            return jax.lax.scan(lambda x, i: step(x, layer(i)), x, jnp.arange(count))[0]
        if self.how == "indexed, in two parts":
            x, _ = jax.lax.scan(step, x, layer(slice(1)))
            return jax.lax.scan(step, x, layer(slice(1, None)))[0]
        if self.how == "indexed, in another order":
            states = layer(jnp.array([2, 0, 1]))
        if self.how in OPAQUE:
            params = jax.tree.map(OPAQUE[self.how], params)
            return jax.lax.scan(lambda x, params: step(x, (params, layer(0)[1])), x, params)[0]
        step = jax.checkpoint(step) if "remat" in self.how else step
        return jax.lax.scan(step, x, states)[0]


def rngs(seed=0):
    return nnx.Rngs(seed)


TOKENS = np.arange(6).reshape(2, 3)
X = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)
IMAGE = np.random.default_rng(0).normal(size=(2, 6, 6, 4)).astype(np.float32)

LAYERS = {
    "Linear": (lambda: One(nnx.Linear(8, 6, rngs=rngs())), X),
    "Linear without bias": (lambda: One(nnx.Linear(8, 6, use_bias=False, rngs=rngs())), X),
    "LinearGeneral, axes": (lambda: One(nnx.LinearGeneral((5, 8), (2, 3), axis=(-2, -1), rngs=rngs())), X),
    "LinearGeneral, batch": (lambda: One(nnx.LinearGeneral(8, 6, axis=-1, batch_axis={0: 3}, rngs=rngs())), X),
    "Einsum": (lambda: One(nnx.Einsum("btd,dnh->btnh", (8, 2, 3), bias_shape=(2, 3), rngs=rngs())), X),
    "Einsum, batch": (lambda: One(nnx.Einsum("btd,bdh->bth", (3, 8, 4), rngs=rngs())), X),
    "Conv": (lambda: One(nnx.Conv(4, 6, (3, 3), strides=2, rngs=rngs())), IMAGE),
    "Conv, groups": (lambda: One(nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=rngs())), IMAGE),
    "ConvTranspose": (lambda: One(nnx.ConvTranspose(4, 6, (3, 3), strides=(2, 2), rngs=rngs())), IMAGE),
    "a subclass": (lambda: One(Doubled(8, 6, rngs=rngs())), X),
    "a shared module": (lambda: Shared(rngs()), X),
    "tunix's Embedder": (lambda: Lookup(rngs()), TOKENS),
    "experts": (lambda: One(Experts(rngs())), X),
    "attention": (lambda: Attention(rngs()), X),
}
BOXED = {"a shared Variable": (lambda: Tied(rngs()), TOKENS)}
HOW = (
    "loop", "loop, transforms", "nnx.scan", "nnx.scan, remat", "nnx.scan, axes", "lax.scan", "lax.scan, remat",
    "lax.scan, axis 1", "indexed, loop", "indexed, fori_loop", "indexed, lax.scan", "indexed, in two parts",
    "indexed, in another order",
)  # fmt: skip
STACKS = {how: (lambda how=how: Stack(rngs(), how), X) for how in HOW}
# As many layers as the layers are wide: shapes alone do not tell which axis is which.
for how in ("lax.scan", "lax.scan, axis 1"):
    STACKS[f"{how}, square"] = (lambda how=how: Stack(rngs(), how, count=8), X)
STACKS["nnx.scan, one layer"] = (lambda: Stack(rngs(), "nnx.scan", count=1), X)
MODELS = LAYERS | BOXED | STACKS


def moved(peft, model, scale=0.1, seed=1):
    """An adapter away from its start. What does not train is as it starts."""
    fresh = peft.init(jax.random.key(0), model)
    drawn, held = numbers(jax.eval_shape(lambda: fresh), scale, seed), peft.non_trainable_paths
    start = jpeft.core.tree.flatten(fresh)
    return jpeft.core.tree.map_with_path(lambda path, x: start[path] if path in held else x, drawn)
