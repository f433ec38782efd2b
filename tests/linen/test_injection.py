"""Adapters run in a Linen model whose code is unchanged: under every transform and in every style of module."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

import jpeft
from jpeft.core.tree import flatten
from tests.linen.pairs import pairwise
from tests.zoo import moved, parameters

X = jnp.asarray(np.random.default_rng(5).normal(size=(2, 3, 4)), jnp.float32)
LORA = jpeft.LoRA(rank=2, targets=r".*")
BOTTLENECK = jpeft.Bottleneck(size=2, targets=r".*op")


def close(got: Any, want: Any, tolerance: float = 1e-5):
    def compare(a, b):
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=tolerance, rtol=tolerance)

    jax.tree.map(compare, got, want)


def differ(a: Any, b: Any) -> bool:
    return bool(np.abs(np.float32(a) - np.float32(b)).max() > 1e-3)


def both(peft: jpeft.Peft, params: Any, adapter: Any, *inputs: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The outputs under an adapter, and those of the model on merged weights, from one compiled program."""

    @jax.jit
    def run(params, adapter):
        y = peft.apply(params, adapter, *inputs, **kwargs)
        return y, peft.model.apply({"params": peft.merge(params, adapter)}, *inputs, **kwargs)

    return run(params, adapter)


def holds(model: nn.Module, *inputs: Any, method: Any = LORA, vias: Any = None, **kwargs: Any) -> tuple[Any, Any, Any]:
    """Binds a method and checks that the adapter has the same effect whichever way the model is run."""
    inputs = inputs if inputs or kwargs else (X,)
    params = parameters(model, *inputs, **kwargs)
    peft = method.bind(model, params, *inputs, **kwargs)
    adapter = moved(peft, params)
    if vias is not None:
        assert {s.name: s.via for s in peft.sites} == vias

    @jax.jit
    def run(params, adapter):
        full = jpeft.combine(params, adapter)
        out = {
            "base": model.apply({"params": params}, *inputs, **kwargs),
            "apply": peft.apply(params, adapter, *inputs, **kwargs),
            "module": peft.module.apply({"params": full}, *inputs, **kwargs),
            "bound": peft.module.bind({"params": full})(*inputs, **kwargs),
        }
        with peft.intercept():
            out["intercept"] = model.apply({"params": peft.overlay(params, adapter)}, *inputs, **kwargs)
        if peft.mergeable:
            out["merged"] = model.apply({"params": peft.merge(params, adapter)}, *inputs, **kwargs)
        return out

    y = run(params, adapter)
    base = y.pop("base")
    for value in y.values():
        close(value, y["apply"])
    assert any(differ(a, b) for a, b in zip(jax.tree.leaves(y["apply"]), jax.tree.leaves(base), strict=True))
    return peft, params, adapter


# --- modules ----------------------------------------------------------------------------------------------------------


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="b")(nn.tanh(nn.Dense(6, name="a")(x))) * 2


class Setup(nn.Module):
    def setup(self):
        self.a = nn.Dense(6)
        self.layers = [nn.Dense(6), nn.Dense(4)]

    def __call__(self, x):
        x = nn.tanh(self.a(x))
        for layer in self.layers:
            x = layer(x)
        return x * 2

    def encode(self, x):
        return self.a(x) * 2


class Shared(nn.Module):
    """One module called twice."""

    @nn.compact
    def __call__(self, x):
        op = nn.Dense(4, name="op")
        return op(nn.tanh(op(x))) * 2


class Attribute(nn.Module):
    """A module given as an attribute, and called by keyword."""

    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.inner(inputs=x) * 2


class ByKeyword(nn.Module):
    @nn.compact
    def __call__(self, *, ids, states):
        table = nn.Embed(5, 4, name="table")(inputs=ids)
        return nn.Dense(4, name="op")(inputs=table + states) * 2


class Override(nn.Dense):
    """A subclass whose call does its own arithmetic: the geometry of its parent does not hold."""

    @nn.compact
    def __call__(self, inputs):
        kernel = self.param("kernel", nn.initializers.normal(), (inputs.shape[-1], self.features))
        return (inputs**2) @ kernel


class Squared(nn.Dense):
    """A subclass that squares its weight."""

    @nn.compact
    def __call__(self, inputs):
        return inputs @ self.param("kernel", nn.initializers.normal(), (inputs.shape[-1], self.features)) ** 2


class Super(nn.Dense):
    """A subclass whose call adds to its parent's."""

    @nn.compact
    def __call__(self, inputs):
        return nn.tanh(super().__call__(inputs + 1))


class Holder(nn.Module):
    kind: Any
    wrap: Any = staticmethod(lambda k: k)

    @nn.compact
    def __call__(self, x):
        return self.wrap(self.kind)(4, name="op")(x) * 2


class Tuples(nn.Module):
    """Its submodule returns a tuple."""

    @nn.compact
    def __call__(self, x):
        class Two(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Dense(4, name="d")(x), x

        y, z = Two(name="op")(x)
        return y * 2, {"z": z}, None


class ShareScope(nn.Module):
    """Two modules in one scope: the parameters of the inner are the outer's."""

    def setup(self):
        self.dense = nn.Dense(4)
        nn.share_scope(self, self.dense)

    def __call__(self, x):
        return self.dense(x) * 2


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return ShareScope(name="op")(x)


class Sums(nn.Module):
    """Several inputs, some of them integers, and a field without a hash."""

    config: Any

    @nn.compact
    def __call__(self, ids, x, scale=1.0):
        table = nn.Embed(5, 4, name="table")
        y = nn.Dense(4, name="mix")(table(ids) + x)
        return nn.Dense(3, dtype=jnp.float32, name="counts")(ids[..., None]) * scale, table.attend(y)


@pytest.mark.parametrize(("model", "names"), [
    (Compact(), {"a", "b"}),
    (Setup(), {"a", "layers_0", "layers_1"}),
    (Shared(), {"op"}),
    (Attribute(nn.Dense(4)), {"inner"}),
    (Holder(Override), {"op/kernel"}),
    (Holder(Super), {"op"}),
    (Tuples(), {"op/d"}),
    (Outer(), {"op"}),
    (nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(4)]), {"layers_0", "layers_2"}),
    (nn.Dense(4), {"."}),
], ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "")  # fmt: skip
def test_every_style_of_module(model, names):
    peft, *_ = holds(model)
    assert {s.name for s in peft.sites} == names


def test_inputs_by_keyword_and_of_every_kind():
    ids = jnp.array([[0, 1, 4], [2, 2, 3]])
    holds(ByKeyword(), ids=ids, states=X)
    peft, params, adapter = holds(Sums({"un": ["hashable"]}), ids, X, scale=3.0)
    assert {s.via for s in peft.sites} == {"fused"}

    @jax.jit
    def run(params, adapter):
        return peft.apply(params, adapter, ids, X, 3.0), peft.apply(params, adapter, x=X, ids=ids, scale=3.0)

    close(*run(params, adapter))


@struct.dataclass
class Result:
    states: Any
    nothing: Any = None


@pytest.mark.parametrize("wrap", [
    lambda y: Result(y), lambda y: {"y": y, "n": None}, lambda y: (y, (y, 3)), lambda y: [y],
], ids=["dataclass", "dict", "tuple", "list"])  # fmt: skip
def test_models_return_what_they_like(wrap):
    class Returns(nn.Module):
        @nn.compact
        def __call__(self, x):
            return wrap(nn.Dense(4, name="op")(x))

    model = Returns()
    params = parameters(model, X)
    peft = jpeft.LoRA(rank=2, targets=["op"]).bind(model, params, X)
    adapter = moved(peft, params)
    got, want = peft.apply(params, adapter, X), model.apply({"params": peft.merge(params, adapter)}, X)
    assert type(got) is type(want)
    close(got, want)


def test_a_model_may_return_nothing():
    class Nothing(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("out", "y", nn.Dense(4, name="op")(x))

    model = Nothing()
    params = parameters(model, X)
    peft = jpeft.LoRA(rank=2, targets=["op"]).bind(model, params, X, mutable=["out"])
    adapter = moved(peft, params)
    assert peft.apply(params, adapter, X) is None
    _, state = peft.apply(params, adapter, X, mutable=["out"])
    _, want = model.apply({"params": peft.merge(params, adapter)}, X, mutable=["out"])
    close(state, want)


KINDS = {"Dense": nn.Dense, "Super": Super}
LIFTS = {
    "remat": nn.remat,
    "jit": nn.jit,
    "vmap shared": functools.partial(nn.vmap, in_axes=0, variable_axes={"params": None}, split_rngs={"params": False}),
    "vmap 0": functools.partial(nn.vmap, in_axes=0, variable_axes={"params": 0}, split_rngs={"params": True}),
    "vmap -1": functools.partial(
        nn.vmap, in_axes=1, out_axes=1, variable_axes={"params": -1}, split_rngs={"params": True}
    ),
}
LIFTED_METHODS = {"Bottleneck": BOTTLENECK, "LoRA": LORA, "IA3": jpeft.IA3(targets=r".*")}


@pytest.mark.parametrize(("kind", "lift", "method"), pairwise(KINDS, LIFTS, LIFTED_METHODS))
def test_a_linear_layer_that_is_itself_lifted(kind, lift, method):
    peft, *_ = holds(Holder(KINDS[kind], LIFTS[lift]), method=LIFTED_METHODS[method])
    assert [s.name for s in peft.sites] == ["op"]
    assert {s.via for s in peft.sites} == {"fused"}


# --- weights in use elsewhere -----------------------------------------------------------------------------------------


class TiedTable(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(5, 4, name="embed")
        return nn.Dense(4, name="op")(embed(ids)) @ embed.embedding.T


class TiedVariables(nn.Module):
    def setup(self):
        self.embed = nn.Embed(5, 4)
        self.op = nn.Dense(4)

    def __call__(self, ids):
        x = self.op(self.embed(ids))
        return x @ self.embed.variables["params"]["embedding"].T


class TiedNestedApply(nn.Module):
    """HuggingFace's: the head is a module of its own, run on another's table."""

    def setup(self):
        self.embed = nn.Embed(5, 4)
        self.lm_head = nn.Dense(5, use_bias=False)
        self.op = nn.Dense(4)

    def __call__(self, ids):
        x = self.op(self.embed(ids))
        return self.lm_head.apply({"params": {"kernel": self.embed.variables["params"]["embedding"].T}}, x)


class AppliedTwice(nn.Module):
    """A layer called as itself, and once more in a nested root that is given its variables."""

    def setup(self):
        self.op = nn.Dense(4)

    def __call__(self, ids):
        x = self.op(nn.one_hot(ids, 4))
        return x + 3 * nn.Dense(4, parent=None).apply({"params": self.variables["params"]["op"]}, x)


class LaxTied(nn.Module):
    """As `TiedVariables`, through `lax` rather than an operator."""

    def setup(self):
        self.embed = nn.Embed(5, 4)

    def __call__(self, ids):
        x = self.embed(ids)
        table = self.embed.variables["params"]["embedding"]
        return jax.lax.dot_general(x, jnp.asarray(table, jnp.float32), (((2,), (1,)), ((), ())))


@pytest.mark.parametrize(("model", "via"), [
    (TiedTable(), {"embed": "box", "op": "fused"}),
    (TiedVariables(), {"embed": "merge", "op": "fused"}),
    (TiedNestedApply(), {"embed": "merge", "op": "fused"}),
    (AppliedTwice(), {"op": "box"}),
    (LaxTied(), {"embed": "merge"}),
], ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "")  # fmt: skip
@pytest.mark.parametrize("method", [LORA, jpeft.IA3(targets=r".*")], ids=lambda m: m.name)
def test_a_weight_that_is_used_in_two_places_changes_in_both(model, via, method):
    holds(model, jnp.array([[0, 1, 4], [2, 2, 3]]), method=method, vias=via)


# --- scans ------------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    features: int = 4
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.tanh(nn.Dense(self.features, name="op")(x))
        return nn.Dropout(self.rate, deterministic=False)(x) if self.rate else x, None


class Scanned(nn.Module):
    """Layers under a scan, of any axis, in any number of nestings."""

    axes: tuple[int, ...] = (0,)
    remat: bool = False
    length: int = 3
    split_dropout: bool = True

    @nn.compact
    def __call__(self, x):
        kind = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        for i, axis in enumerate(reversed(self.axes)):
            kind = nn.scan(
                kind,
                variable_axes={"params": axis},
                split_rngs={"params": True} | ({"dropout": True} if self.split_dropout else {}),
                length=self.length + i,
            )
        return kind(name="layers")(x, None)[0] * 2


@pytest.mark.parametrize(("axes", "remat"), [
    ((0,), False), ((1,), False), ((-1,), False), ((0,), True), ((1,), True), ((-1,), True),
    *(pytest.param(axes, False, marks=[] if axes in ((1, 0), (1, -1)) else pytest.mark.exhaustive)
      for axes in ((0, 0), (1, 0), (0, 1), (-1, 1), (1, -1))),
])  # fmt: skip
def test_scans_stack_the_adapter_as_they_stack_the_base(axes, remat):
    method = jpeft.Chain(LORA, jpeft.IA3(targets=r".*"), jpeft.Bottleneck(size=2, targets=r".*op"))
    model = Scanned(axes, remat)
    params = parameters(model, X)
    peft = method.bind(model, params, X)
    assert {s.via for s in peft.sites} == {"fused"}
    adapter = moved(peft, params)
    kernel, leaf = params["layers"]["op"]["kernel"], adapter["layers"]["op"]["lora_a"]
    assert sorted(set(kernel.shape) - {4}) == sorted(set(leaf.shape) - {4, 2})
    weights = jpeft.Chain(*method.members[:2]).bind(model, params, X)
    own = {"layers": {"op": {k: v for k, v in adapter["layers"]["op"].items() if "bottleneck" not in k}}}

    @jax.jit
    def run(params, adapter, own):
        merged = model.apply({"params": weights.merge(params, own)}, X)
        return peft.apply(params, adapter, X), weights.apply(params, own, X), merged

    y, y_of_weights, merged = run(params, adapter, own)
    close(y_of_weights, merged)
    assert differ(y, y_of_weights)


def test_a_scanned_layer_is_that_layer():
    """A scan equals a loop over the layers, also for a method that cannot be merged."""
    model, layer = Scanned((1,)), Layer()
    params = parameters(model, X)
    method = jpeft.Chain(LORA, BOTTLENECK)
    peft = method.bind(model, params, X)
    adapter = moved(peft, params)
    layers = [jax.tree.map(lambda v, i=i: v[:, i], (params["layers"], adapter["layers"])) for i in range(3)]
    bound = method.bind(layer, layers[0][0], X)

    @jax.jit
    def run(params, adapter, layers):
        x = X
        for own, leaves in layers:
            x, _ = bound.apply(own, leaves, x)
        return peft.apply(params, adapter, X), x * 2

    close(*run(params, adapter, layers))


class Wrapping(nn.Module):
    """A module that has nothing but a scan inside: its own scope is not stacked."""

    @nn.compact
    def __call__(self, x):
        return Scanned(name="encoder")(x) + 0


def test_the_output_of_a_module_around_a_scan_has_leaves_that_are_not_stacked():
    holds(Wrapping(), method=jpeft.Bottleneck(size=2, targets=["encoder"]))
    peft, *_ = holds(Wrapping(), method=jpeft.Bottleneck(size=2, targets=["encoder/layers"]))
    assert dict(peft.structure)[("encoder", "layers", "bottleneck_down")][0] == (3, 4, 2)


def test_one_cell_over_time_has_one_adapter():
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.RNN(nn.GRUCell(5), name="rnn")(x) * 2

    peft, *_ = holds(Recurrent())
    assert all(s.stack == () for s in peft.sites)


def test_tracing_a_scanned_model_does_not_grow_with_depth():
    def size(length):
        model = Scanned(length=length)
        shapes = jax.eval_shape(lambda: parameters(model, X))
        peft = LORA.bind(model, shapes, X)
        adapter = peft.init(jax.random.key(0), shapes)
        step = jax.grad(lambda a, p: peft.apply(p, a, X).sum())
        return len(str(jax.make_jaxpr(step)(adapter, shapes)).splitlines())

    assert size(48) == size(2)


# --- jit, grad, vmap --------------------------------------------------------------------------------------------------


def test_two_methods_on_one_tree_do_not_share_the_trace_of_a_jitted_module():
    model = Holder(nn.Dense, nn.jit)
    params = parameters(model, X)
    pefts = [jpeft.LoRA(rank=2, alpha=alpha, targets=["op"]).bind(model, params, X) for alpha in (2, 4)]
    adapter = moved(pefts[0], params)
    base = model.apply({"params": params}, X)
    one, two = (p.apply(params, adapter, X) - base for p in pefts)
    close(two, 2 * one, 1e-4)
    modules = [p.module.apply({"params": jpeft.combine(params, adapter)}, X) - base for p in pefts]
    close(modules, [one, two])
    close(model.apply({"params": params}, X), base)


def test_the_base_takes_no_gradient_and_a_stack_of_adapters_serves_a_batch():
    model = Compact()
    params = parameters(model, X)
    peft = LORA.bind(model, params, X)
    adapters = [moved(peft, params, seed=s) for s in (1, 2)]
    stacked = jax.tree.map(lambda *v: np.stack(v), *adapters)

    @jax.jit
    def run(adapters, stacked):
        def loss(adapter):
            return (peft.apply(params, adapter, X) ** 2).sum()

        def merged_loss(adapter):
            return (model.apply({"params": peft.merge(params, adapter)}, X) ** 2).sum()

        per_example = jax.vmap(peft.apply, in_axes=(None, 0, 0))(params, stacked, X)
        one_by_one = jnp.stack([peft.apply(params, a, x) for a, x in zip(adapters, X, strict=True)])
        return per_example, one_by_one, jax.grad(loss)(adapters[0]), jax.grad(merged_loss)(adapters[0])

    per_example, one_by_one, grads, merged_grads = run(adapters, stacked)
    close(per_example, one_by_one)
    close(grads, merged_grads, 1e-3)
    assert jax.tree.structure(grads) == jax.tree.structure(adapters[0])


# --- a whole model ----------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """A causal transformer as people write them: scanned, rematerialized layers, one table for both ends.

    The bias of its keys is left out below: it shifts every score of a query alike, which softmax does not see.
    """

    @nn.compact
    def __call__(self, ids):
        class TransformerLayer(nn.Module):
            @nn.compact
            def __call__(self, x, mask):
                h = nn.LayerNorm(name="before_attention")(x)
                x = x + nn.MultiHeadDotProductAttention(2, name="attention")(h, mask=mask)
                h = nn.LayerNorm(name="before_ffn")(x)
                return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(12, name="up")(h))), None

        embed = nn.Embed(11, 8, name="embed")
        scan = nn.scan(
            nn.remat(TransformerLayer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=3,
        )
        x, _ = scan(name="layers")(embed(ids), nn.make_causal_mask(ids, dtype=bool))
        return embed.attend(nn.LayerNorm(name="last")(x))


@pytest.mark.parametrize("method", [
    pytest.param(jpeft.LoRA(rank=2, targets=r".*/(query|value)"), marks=pytest.mark.exhaustive),
    jpeft.Chain(jpeft.LoRA(rank=2), jpeft.LoRA(rank=3, targets=["embed"])),
    jpeft.Chain(jpeft.IA3(targets=["key", "value", "down"], feedforward=["down"]), jpeft.BitFit(exclude=["key/bias"])),
    jpeft.Chain(jpeft.Bottleneck(size=2, activation="tanh", targets=r".*/down"), jpeft.PrefixTuning(length=2)),
], ids=["query, value", "all-linear and table", "IA3 and biases", "bottleneck and prefix"])  # fmt: skip
def test_three_steps_of_a_scanned_decoder_change_every_adapter_leaf_and_no_base_bit(method):
    model, ids = Decoder(), jnp.array([[1, 5, 2, 9, 4], [3, 3, 8, 0, 10]])
    params = parameters(model, ids)
    before = jax.tree.map(np.array, params)
    peft = method.bind(model, params, ids)
    start = moved(peft, params)
    tx = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def step(params, adapter, state):
        def loss(adapter):
            logits = peft.apply(params, adapter, ids[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(adapter)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    adapter, state, losses = start, jax.jit(tx.init)(start), []
    for _ in range(3):
        adapter, state, value = step(params, adapter, state)
        losses.append(float(value))
    assert losses[2] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, params, before)
    for path, moved_leaf in flatten(adapter).items():
        assert (np.asarray(moved_leaf) != np.asarray(flatten(start)[path])).any(), path
    if peft.mergeable:
        close(*both(peft, params, adapter, ids), 1e-4)


# --- apply's own arguments --------------------------------------------------------------------------------------------


class Stateful(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4, name="op")(x)
        seen = self.variable("cache", "seen", jnp.zeros, x.shape)
        seen.value = seen.value + x
        self.sow("intermediates", "mine", x)
        return nn.BatchNorm(use_running_average=not train, name="norm")(x)


@pytest.mark.parametrize(("train", "mutable"), [
    (True, ["batch_stats", "cache"]), (False, "cache"), (True, ["params", "cache", "batch_stats"]), (True, True),
    (True, nn.DenyList("intermediates")),
], ids=["list", "string", "params", "everything", "all but"])  # fmt: skip
def test_mutable_collections_come_back_without_a_trace_of_the_adapter(train, mutable):
    model = Stateful()
    variables = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), jax.eval_shape(model.init, jax.random.key(0), X))
    variables.pop("intermediates", None)
    params = variables["params"]
    peft = LORA.bind(model, variables, X, mutable=["cache"])
    assert {s.via for s in peft.sites} == {"fused"}
    adapter = moved(peft, params)
    y, state = peft.apply(variables, adapter, X, train=train, mutable=mutable)
    merged = variables | {"params": peft.merge(params, adapter)}
    want, want_state = model.apply(merged, X, train=train, mutable=mutable)
    close(y, want)
    assert set(state) == set(want_state)
    for name in set(state) - {"params"}:
        close(state[name], want_state[name])
    if "params" in state:
        jax.tree.map(np.testing.assert_array_equal, state["params"], params)


def test_binding_with_mutable_parameters_finds_the_same_sites():
    model = Compact()
    params = parameters(model, X)
    assert LORA.bind(model, params, X, mutable=True) == LORA.bind(model, params, X)


def test_captured_intermediates_are_the_adapted_ones():
    model = Setup()
    params = parameters(model, X)
    peft = LORA.bind(model, params, X)
    adapter = moved(peft, params)
    _, got = peft.apply(params, adapter, X, capture_intermediates=True, mutable=["intermediates"])
    _, want = model.apply(
        {"params": peft.merge(params, adapter)}, X, capture_intermediates=True, mutable=["intermediates"]
    )
    close(got, want)


@pytest.mark.parametrize("method", ["encode", Setup.encode, lambda m, x: m.encode(x) + 1], ids=["name", "own", "any"])
def test_other_methods_of_the_model(method):
    model = Setup()
    params = parameters(model, X)
    peft = LORA.bind(model, params, X)
    adapter = moved(peft, params)
    want = model.apply({"params": peft.merge(params, adapter)}, X, method=method)
    close(peft.apply(params, adapter, X, method=method), want)
    close(peft.module.apply({"params": jpeft.combine(params, adapter)}, X, method=method), want)
    one = jpeft.LoRA(rank=2, targets=["a"]).bind(model, params, X, method=method)
    assert one.sites == peft.sites[:1]


@pytest.mark.parametrize(("dtype", "param_dtype"), [
    (jnp.bfloat16, jnp.float32), (None, jnp.bfloat16), (jnp.float32, jnp.bfloat16),
])  # fmt: skip
def test_mixed_precision_is_the_modules_own(dtype, param_dtype):
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, dtype=dtype, param_dtype=param_dtype, name="op")(x) * 2

    model = Mixed()
    x = X.astype(param_dtype)
    params = parameters(model, x)
    peft = LORA.bind(model, params, x)
    adapter = moved(peft, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(peft.init(jax.random.key(0), params))} == {jnp.dtype("float32")}
    y, merged = both(peft, params, adapter, x)
    assert y.dtype == merged.dtype == jax.eval_shape(model.apply, {"params": params}, x).dtype
    close(y, merged, 0.1)
    assert jax.eval_shape(peft.merge, params, adapter)["op"]["kernel"].dtype == param_dtype


# --- dropout ----------------------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic: bool | None = True):
        return nn.Dense(4, name="op")(nn.Dropout(0.0)(x, deterministic=bool(deterministic))) * 2


class Training(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(4, name="op")(x) * 2


@pytest.mark.parametrize(("model", "on", "off"), [
    (Dropping(), {"deterministic": False}, {"deterministic": True}),
    (Training(), {"train": True}, {"train": False}),
    (Training(), {"train": np.True_}, {"train": np.False_}),
    (Training(), {"train": jnp.array(True)}, {"train": jnp.array(False)}),
    (Compact(), {}, None),
], ids=["deterministic", "train", "numpy", "array", "silent"])  # fmt: skip
def test_adapter_dropout_obeys_the_caller(model, on, off):
    params = parameters(model, X)
    peft = jpeft.LoRA(rank=2, dropout=0.5, targets=r".*").bind(model, params, X)
    adapter = moved(peft, params)
    rngs = {"dropout": jax.random.key(0)}
    plain = model.apply({"params": peft.merge(params, adapter)}, X)
    one = peft.apply(params, adapter, X, rngs=rngs, **on)
    assert differ(one, plain)
    assert differ(one, peft.apply(params, adapter, X, rngs={"dropout": jax.random.key(1)}, **on))
    close(one, peft.apply(params, adapter, X, rngs=rngs, **on))
    close(peft.apply(params, adapter, X, **on), plain)
    close(peft.apply(params, adapter, X, rngs={"other": jax.random.key(0)}, **on), plain)
    if off is not None:
        close(peft.apply(params, adapter, X, rngs=rngs, **off), plain)
    if "train" in on:  # a traced flag decides inside the computation
        traced = jax.jit(lambda train: peft.apply(params, adapter, X, rngs=rngs, train=train))
        close(traced(True), one)
        close(traced(False), plain)


def test_adapter_dropout_drops_at_its_rate_and_keeps_the_mean():
    model, x = nn.Dense(3), jnp.ones((4096, 8))
    params = parameters(model, x)
    peft = jpeft.LoRA(rank=2, dropout=0.25, targets=r".*").bind(model, params, x)
    adapter = moved(peft, params)

    @jax.jit
    def run(params, adapter, key):
        dropped = peft.apply(params, adapter, x, rngs={"dropout": key})
        return model.apply({"params": params}, x), peft.apply(params, adapter, x), dropped

    base, plain, dropped = map(np.asarray, run(params, adapter, jax.random.key(0)))
    close((dropped - base).mean(0), (plain - base).mean(0), 0.03)
    # Each entry of the input is kept with 3/4 and scaled by 4/3: the variance of x A is 1/3 of the sum of its squares.
    change = ((1 / 3) * (np.asarray(adapter["lora_a"]) @ np.asarray(adapter["lora_b"])) ** 2).sum(0)
    close((dropped - plain).var(0) / change, jnp.ones(3), 0.1)


def test_every_scanned_layer_draws_its_own_and_an_unsplit_rng_is_an_error():
    lora = jpeft.LoRA(rank=2, dropout=0.5, targets=r".*")
    rngs = {"dropout": jax.random.key(0)}
    split, shared = Scanned(), Scanned(split_dropout=False)
    params = parameters(split, X)
    peft = lora.bind(split, params, X)
    adapter = moved(peft, params)
    unsplit = lora.bind(shared, params, X)

    @jax.jit
    def run(params, adapter):
        dropped = peft.apply(params, adapter, X, rngs=rngs)
        return dropped, peft.apply(params, adapter, X), unsplit.apply(params, adapter, X)

    dropped, plain, plain_unsplit = run(params, adapter)
    assert differ(dropped, plain)
    close(plain_unsplit, plain)
    with pytest.raises(ValueError, match=r"'layers/op'.*split_rngs=.'dropout': True"):
        unsplit.apply(params, adapter, X, rngs=rngs)


def test_dropout_where_only_a_box_reaches_is_refused():
    with pytest.raises(ValueError, match="dropout acts on a module's input, but 'op/kernel' is reached only as"):
        model = Holder(Squared)
        jpeft.LoRA(dropout=0.1, targets=r".*").bind(model, parameters(model, X), X)


# --- peft.module and peft.intercept -----------------------------------------------------------------------------------


class Larger(nn.Module):
    """The adapted model as a part of another."""

    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(self.inner(nn.Dense(4, name="before")(x)))


@pytest.mark.parametrize(
    "model", [Compact(), Setup(), Scanned((1,), True), Holder(Override)], ids=lambda m: type(m).__name__
)
def test_the_module_is_a_module(model):
    params = parameters(model, X)
    peft = jpeft.Chain(LORA, jpeft.Train(r".*bias") if "bias" in str(params) else jpeft.IA3(targets=r".*")).bind(
        model, params, X
    )
    full = jpeft.combine(params, moved(peft, params))

    made = jax.jit(peft.module.init)(jax.random.key(0), X)["params"]
    assert jax.tree.structure(made) == jax.tree.structure(full)

    larger = Larger(peft.module)
    outside = {k: v for k, v in parameters(Larger(model), X).items() if k != "inner"}
    whole = jax.eval_shape(larger.init, jax.random.key(0), X)["params"]
    assert jax.tree.structure(whole) == jax.tree.structure(outside | {"inner": full})

    @jax.jit
    def run(made, full):
        y = peft.module.apply({"params": made}, X), model.apply({"params": peft.split(made)[0]}, X)
        merged = Larger(model).apply({"params": outside | {"inner": peft.merge(*peft.split(full))}}, X)
        return y, (larger.apply({"params": outside | {"inner": full}}, X), merged)

    for got, want in run(made, full):
        close(got, want)


def test_the_module_under_a_scan_of_a_larger_one():
    layer = Layer()
    params = parameters(layer, X)
    peft = LORA.bind(layer, params, X)

    class Stack(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            body = lambda module, x, _: module(x, None)  # noqa: E731
            scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return scan(self.inner, x, None)[0]

    fulls = [jpeft.combine(params, moved(peft, params, seed=s)) for s in (1, 2)]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *fulls)
    y = Stack(peft.module).apply({"params": {"inner": stacked}}, X)
    x = X
    for full in fulls:
        x, _ = peft.module.apply({"params": full}, x)
    close(y, x)


def test_the_bare_interceptor_with_combine_and_with_overlay():
    model = Compact()
    params = parameters(model, X)
    peft = LORA.bind(model, params, X)
    adapter = moved(peft, params)
    want = peft.apply(params, adapter, X)
    with peft.intercept():
        close(model.apply({"params": jpeft.combine(params, adapter)}, X), want)
        close(model.apply({"params": peft.overlay(params, adapter)}, X), want)
        assert differ(model.apply({"params": params}, X), want)  # a tree without an adapter is the base
    assert differ(model.apply({"params": jpeft.combine(params, adapter)}, X), want)


def test_applying_inside_the_interceptor_applies_once():
    model = Compact()
    params = parameters(model, X)
    peft = LORA.bind(model, params, X)
    adapter = moved(peft, params)
    want = peft.apply(params, adapter, X)
    with peft.intercept():
        close(peft.apply(params, adapter, X), want)
        close(peft.module.apply({"params": jpeft.combine(params, adapter)}, X), want)


@pytest.mark.parametrize("model", [Holder(Squared), TiedVariables()], ids=["box", "merge"])
def test_the_bare_interceptor_says_where_combine_is_not_enough(model):
    x = X if isinstance(model, Holder) else jnp.array([[0, 1]])
    params = parameters(model, x)
    peft = LORA.bind(model, params, x)
    adapter = moved(peft, params)
    with peft.intercept(), pytest.raises(ValueError, match=r"give the model peft.overlay\(params, adapter\)"):
        model.apply({"params": jpeft.combine(params, adapter)}, x)

    @jax.jit
    def run(params, adapter):
        with peft.intercept():
            y = model.apply({"params": peft.overlay(params, adapter)}, x)
        return y, peft.apply(params, adapter, x)

    close(*run(params, adapter))


def test_a_call_of_another_form_than_was_bound_is_an_error_and_not_a_wrong_number():
    model, x = nn.DenseGeneral(3, axis=(-2, -1)), jnp.ones((2, 4, 3))
    params = parameters(model, x)
    peft = LORA.bind(model, params, x)
    adapter = moved(peft, params)
    apply = jax.jit(peft.apply)
    close(apply(params, adapter, x[0]), apply(params, adapter, x)[0])
    batched, y = nn.DenseGeneral(3, axis=(-1,), batch_dims=(0,)), jnp.ones((2, 3, 4))
    own = parameters(batched, y)
    other = LORA.bind(batched, own, y)
    with pytest.raises(ValueError, match=r"was bound as .* bind with inputs of the same form"):
        other.apply(own, moved(other, own), jnp.ones((2, 5, 3, 4)))


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"model must be a flax\.linen Module or a flax\.nnx Module, got dict"):
        LORA.bind({}, {}, X)

    @dataclasses.dataclass
    class Wrapper:
        module: nn.Module

    with pytest.raises(TypeError, match=r"got Wrapper; bind its \.module"):
        LORA.bind(Wrapper(nn.Dense(4)), {}, X)
    with pytest.raises(TypeError, match="params must be a tree of mappings"):
        LORA.bind(nn.Dense(4), jnp.ones(3), X)


class FieldNames(nn.Dense):
    """A linear layer whose fields have the names of attributes of `nn.Module`."""

    path: str = "elsewhere"
    make_rng: int = 3


def test_fields_of_a_layer_may_have_the_names_of_module_attributes():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return FieldNames(3, name="d")(x)

    model, x = Model(), jnp.ones((3, 5))
    params = model.init(jax.random.key(0), x)["params"]
    peft = jpeft.LoRA(rank=1, targets="d", dropout=0.5, init_weights="random").bind(model, params, x)
    assert [site.via for site in peft.sites] == ["fused"]
    adapter = peft.init(jax.random.key(1), params)
    dropped = peft.apply(params, adapter, x, rngs={"dropout": jax.random.key(2)})
    assert not np.allclose(dropped, peft.apply(params, adapter, x))
