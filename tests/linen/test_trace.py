"""Weights that are changed on the way to their product, and products that a trace shows: the law by every path."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

import jpeft
from jpeft.binding import survey_model
from tests.contract import close, differ
from tests.zoo import GatedFFN, NamedEinsum, SharedScope, Standardized, moved, numbers, parameters

X = jax.random.normal(jax.random.key(0), (2, 4, 8))
IDS = jnp.array([[0, 1, 6]])


def _weight(module: nn.Module, *shape: int, name: str = "w") -> jax.Array:
    return module.param(name, nn.initializers.normal(), shape)


class SetUp(nn.Module):
    """Weights that are read, and one of them changed, before the call."""

    def setup(self):
        self.w = _weight(self, 8, 8)
        self.u = 2 * _weight(self, 8, 8, name="u")

    def __call__(self, x):
        return x @ self.w + x @ self.u


class OwnVariables(nn.Module):
    """A module that reads its own variables instead of asking for the parameter."""

    change: Any

    @nn.compact
    def __call__(self, x):
        _weight(self, 8, 8)
        return 2 * (x @ self.change(self.variables["params"]["w"]))


class TreeNorm(nn.Module):
    """A model that also sums over its tree of parameters, by the names in it."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(8, name="op")(x)
        leaves = jax.tree_util.tree_leaves_with_path(self.variables["params"])
        return y * sum(jnp.sum(w**2) for path, w in leaves if path[-1].key == "kernel")


class Elsewhere(nn.Module):
    """A normalized layer beside an ordinary one."""

    kind: Any

    @nn.compact
    def __call__(self, x):
        norm = self.kind(nn.Dense(8, name="normalized"))
        x = norm(x, update_stats=False) if self.kind is nn.SpectralNorm else norm(x)
        return 2 * nn.Dense(8, name="op")(x)


class Raw(nn.Module):
    """A raw weight of a shape, used by a function."""

    shape: tuple[int, ...]
    use: Any

    @nn.compact
    def __call__(self, x):
        return self.use(x, _weight(self, *self.shape)) * 2


def _attention(x, w):
    q, k, v = jnp.einsum("btd,cdnh->cbtnh", x, w)
    return jnp.einsum("bnts,bsnh->btnh", nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k)), v)


def _split(x, w):
    a, b, c = jnp.split(w, 3, axis=1)
    return (x @ a) * jnp.tanh(x @ b) + x @ c


def _checkpointed(x, w):
    return jax.checkpoint(lambda x, w: jnp.tanh(x @ w))(x, w)


class Lifted(nn.Module):
    """A raw weight in a lifted module."""

    lift: Any

    @nn.compact
    def __call__(self, x):
        return 2 * self.lift(_Tanh)(name="op")(x)


class _Tanh(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = jnp.tanh(x @ _weight(self, 8, 8))
        return y if _ is None else (y, None)


class Scanned(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x):
        kind = nn.scan(nn.remat(_Tanh), variable_axes={"params": self.axis}, split_rngs={"params": True}, length=8)
        return 2 * kind(name="op")(x, jnp.zeros(8))[0]


class Gives(nn.Module):
    @nn.compact
    def __call__(self):
        return _weight(self, 8, 8)


class Takes(nn.Module):
    """A weight that goes from its module to another, and one that goes down to a child."""

    @nn.compact
    def __call__(self, x):
        return self.multiplied(x @ Gives(name="gives")(), _weight(self, 8, 8)) * 2

    def multiplied(self, x, w):
        return x @ w


class Queries(nn.Module):
    """Learned queries: a parameter that is multiplied as an input."""

    @nn.compact
    def __call__(self, x):
        q = nn.Dense(8, name="q")(_weight(self, 5, 8, name="queries"))
        return jnp.einsum("qd,btd->bqt", q, nn.Dense(8, name="k")(x)) * 2


class Table(nn.Module):
    """A raw embedding table that is the head too."""

    @nn.compact
    def __call__(self, ids):
        table = _weight(self, 7, 8, name="table")
        return nn.tanh(table[ids]) @ table.T


class Transposing(nn.Module):
    """A foreign class of a known name that transposes its output."""

    @nn.compact
    def __call__(self, x):
        class Einsum(nn.Module):
            @nn.compact
            def __call__(self, eqn, x):
                return jnp.swapaxes(jnp.einsum(eqn, x, _weight(self, 8, 4, 2)), 1, 2)

        return 2 * Einsum(name="op")("btd,dnh->btnh", x)


# The model, and the path that each of its weights takes.
CASES: dict[str, tuple[nn.Module, dict[str, str]]] = {
    "read in setup": (SetUp(), {"w": "fused", "u": "box"}),
    "own variables": (OwnVariables(jnp.asarray), {"w": "fused"}),
    "own variables, changed": (OwnVariables(jnp.square), {"w": "merge"}),
    "sum over the tree": (TreeNorm(), {"op": "merge"}),
    "weight norm elsewhere": (Elsewhere(nn.WeightNorm), {"normalized": "merge", "op": "fused"}),
    "spectral norm elsewhere": (Elsewhere(nn.SpectralNorm), {"normalized": "merge", "op": "fused"}),
    "q, k, v and heads": (Raw((3, 8, 2, 4), _attention), {"w": "fused"}),
    "split": (Raw((8, 24), _split), {"w": "fused"}),
    "uneven parts": (Raw((8, 24), lambda x, w: (x @ w[:, :5]).sum() + x @ w[:, 5:]), {"w": "box"}),
    "reshaped": (Raw((8, 24), lambda x, w: jnp.einsum("btd,dcf->btcf", x, w.reshape(8, 3, 8))), {"w": "fused"}),
    "twice": (Raw((8, 8), lambda x, w: nn.tanh(x @ w) @ w), {"w": "fused"}),
    "and transposed": (Raw((8, 16), lambda x, w: nn.tanh(x @ w) @ w.T), {"w": "box"}),
    "scaled": (Raw((8, 8), lambda x, w: x @ (w / 3)), {"w": "box"}),
    "scaled afterwards": (Raw((8, 8), lambda x, w: nn.gelu(x @ w / 3)), {"w": "fused"}),
    "masked": (Raw((8, 8), lambda x, w: x @ jnp.tril(w)), {"w": "box"}),
    "one output": (Raw((8, 1), lambda x, w: (x @ w)[..., 0]), {"w": "fused"}),
    "in low precision": (Raw((8, 8), lambda x, w: x @ w.astype(jnp.float8_e4m3fn).astype(x.dtype)), {"w": "box"}),
    "checkpointed": (Raw((8, 8), _checkpointed), {"w": "box"}),
    "in a branch": (Raw((8, 8), lambda x, w: jax.lax.cond(x[0, 0, 0] > 9, lambda: x, lambda: x @ w)), {"w": "box"}),
    "vmapped by hand": (Raw((2, 8, 8), lambda x, w: jax.vmap(jnp.matmul)(x, w)), {"w": "fused"}),
    "three operands": (Raw((8, 2, 8), lambda x, w: jnp.einsum("btd,dnf,n->btf", x, w, jnp.ones(2))), {"w": "fused"}),
    "squared input": (Raw((8, 8, 3), lambda x, w: jnp.einsum("bti,ijk,btj->btk", x, w, x)), {"w": "fused"}),
    "remat": (Lifted(nn.remat), {"op/w": "fused"}),
    "jit": (Lifted(nn.jit), {"op/w": "fused"}),
    "vmap 1": (
        Lifted(lambda m: nn.vmap(m, variable_axes={"params": 1}, split_rngs={"params": True}, axis_size=2)),
        {"op/w": "fused"},
    ),
    "scan 1": (Scanned(1), {"op/w": "fused"}),
    "scan -1": (Scanned(-1), {"op/w": "fused"}),
    "passed on": (Takes(), {"gives/w": "box", "w": "fused"}),
    "learned queries": (Queries(), {"queries": "box", "k": "fused", "q": "fused"}),
    "raw table": (Table(), {"table": "fused"}),
    "transposing Einsum": (Transposing(), {"op": "fused"}),
}  # fmt: skip


def _bound(model: nn.Module) -> tuple[jpeft.Peft, Any, Any, Any]:
    x = IDS if isinstance(model, Table) else X
    shapes = jax.eval_shape(model.init, jax.random.key(1), x)
    variables = {**jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes), "params": numbers(shapes["params"])}
    peft = jpeft.LoRA(rank=3, targets=".*").bind(model, variables, x)
    return peft, variables, moved(peft, variables), x


@pytest.fixture(scope="module")
def laws() -> dict[str, Any]:
    """For each case the path of each weight, the outputs of base, adapter and merged tree, and both gradients."""
    bound = {name: _bound(model) for name, (model, _) in CASES.items()}

    def run(name: str, variables: Any, adapter: Any) -> Any:
        peft, _, _, x = bound[name]

        def applied(adapter: Any) -> Any:
            return peft.apply(variables, adapter, x)

        def merged(adapter: Any) -> Any:
            return peft.model.apply({**variables, "params": peft.merge(variables, adapter)}, x)

        def loss(adapter: Any, outputs: Any) -> Any:
            y = outputs(adapter)
            return jnp.sum(y**2), y

        grads, ys = zip(*(jax.grad(loss, has_aux=True)(adapter, f) for f in (applied, merged)), strict=True)
        return peft.model.apply(variables, x), *ys, grads

    trees = {name: (variables, adapter) for name, (_, variables, adapter, _) in bound.items()}
    out = jax.jit(lambda trees: {name: run(name, *both) for name, both in trees.items()})(trees)  # one program
    return {name: ({s.name: s.via for s in bound[name][0].sites}, *out[name]) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_running_under_an_adapter_is_running_the_merged_tree(name, laws):
    vias, base, applied, merged, gradients = laws[name]
    assert vias == CASES[name][1]
    close(applied, merged)
    assert differ(applied, base)
    for got, want in zip(*map(jax.tree.leaves, gradients), strict=True):
        close(got, want, 1e-4)


@pytest.mark.parametrize("name", ["own variables", "q, k, v and heads", "scan 1", "transposing Einsum"])
@pytest.mark.parametrize("kind", [lambda tree: jax.tree.map(np.asarray, tree), freeze], ids=["numpy", "frozen"])
def test_parameters_of_any_kind_without_jit(name, kind, laws):
    peft, variables, adapter, x = _bound(CASES[name][0])
    close(peft.apply(kind(variables), adapter, x), laws[name][2])


# --- what a traced call does beside its products ----------------------------------------------------------------------


class Writes(nn.Module):
    """A call that writes variables, here and in a child, draws random numbers and takes Python values."""

    @nn.compact
    def __call__(self, x, mode: str, train: bool = False):
        y = x @ _weight(self, 8, 8)
        self.sow("intermediates", "y", y)
        y = nn.BatchNorm(use_running_average=not train, name="norm")(y)
        cache = self.variable("cache", "last", jnp.zeros, y.shape)
        cache.value = cache.value + y
        return {"y": nn.Dropout(0.5, deterministic=not train)(y), "mode": mode, "cache": cache.value, "none": None}


def test_a_traced_call_writes_its_variables_and_returns_any_value():
    model = Writes()
    variables = model.init(jax.random.key(0), X, "a")
    rngs, mutable = {"dropout": jax.random.key(1)}, ["batch_stats", "cache", "intermediates"]
    peft = jpeft.LoRA(rank=2, init_weights="random", targets="w").bind(
        model, variables, X, "a", train=True, rngs=rngs, mutable=mutable
    )
    assert [s.via for s in peft.sites] == ["fused"]
    adapter = peft.init(jax.random.key(2), variables)
    y, state = peft.apply(variables, adapter, X, "b", train=True, rngs=rngs, mutable=mutable)
    merged = {**variables, "params": peft.merge(variables, adapter)}
    want, want_state = model.apply(merged, X, "b", train=True, rngs=rngs, mutable=mutable)
    assert y["mode"] == "b" and y["none"] is None
    assert jax.tree.structure(state) == jax.tree.structure(want_state)
    for got, expected in zip(jax.tree.leaves((y, state)), jax.tree.leaves((want, want_state)), strict=True):
        close(got, expected) if not isinstance(got, str) else None


def test_many_adapters_at_once_and_dropout_on_a_traced_product():
    model = GatedFFN(5)
    params = parameters(model, X)
    peft = jpeft.LoRA(rank=2, dropout=0.5).bind(model, params, X)
    assert {s.via for s in peft.sites} == {"fused"}
    adapters = [moved(peft, params, seed=seed) for seed in (1, 2)]

    @jax.jit
    def run(adapters):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
        together = jax.vmap(lambda a: peft.apply(params, a, X))(stacked)
        dropped = peft.apply(params, adapters[0], X, rngs={"dropout": jax.random.key(0)})
        return together, dropped, [peft.apply(params, a, X) for a in adapters]

    together, dropped, alone = run(adapters)
    close(together, np.stack(alone))
    assert differ(dropped, alone[0])


@pytest.mark.parametrize("method", [
    jpeft.IA3(targets=".*", feedforward=".*linear"),
    jpeft.LoRA(rank=2, targets=".*linear", parts=2, init_weights="random"),
    jpeft.Chain(
        jpeft.LoRA(rank=2, targets=".*gating.*"),
        jpeft.IA3(targets=".*", feedforward=".*linear"),
        jpeft.Bottleneck(targets="op"),
    ),
], ids=["IA3", "parts", "Chain"])  # fmt: skip
def test_every_method_acts_on_a_traced_product(method):
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return GatedFFN(6, name="op")(x) * 2

    model = Outer()
    params = parameters(model, X)
    weights = [m for m in method.methods() if not isinstance(m, jpeft.methods.OutputMethod)]
    peft = jpeft.Chain(*weights).bind(model, params, X) if len(weights) > 1 else weights[0].bind(model, params, X)
    adapter = moved(peft, params)
    close(peft.apply(params, adapter, X), model.apply({"params": peft.merge(params, adapter)}, X))
    assert differ(peft.apply(params, adapter, X), model.apply({"params": params}, X))
    whole = method.bind(model, params, X)
    assert whole.apply(params, moved(whole, params), X).shape == X.shape


# --- quantized bases --------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Two scanned feed-forward layers of raw weights."""

    @nn.compact
    def __call__(self, x):
        kind = nn.scan(nn.remat(_Residual), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return kind(name="layers")(x, None)[0] * 2


class _Residual(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + GatedFFN(64, name="mlp")(x), None


def test_a_traced_product_over_a_quantized_weight_is_that_over_the_dequantized_one():
    x = jax.random.normal(jax.random.key(0), (1, 3, 64))
    model = Layers()
    params = parameters(model, x)
    base = jax.tree.map(lambda w: jpeft.quantization.quantize_array(w, "nf4") if w.ndim > 2 else w, params)
    peft = jpeft.LoRA(rank=2).bind(model, base, x)
    assert {s.via for s in peft.sites} == {"fused"}
    adapter = moved(peft, params)
    plain = jpeft.dequantize(base)

    @jax.jit
    def run(base, plain, adapter):
        both = [lambda a, p=p: peft.apply(p, a, x) for p in (base, plain)]
        return [(f(adapter), jax.grad(lambda a, f=f: jnp.sum(f(a) ** 2))(adapter)) for f in both]

    for got, want in zip(*map(jax.tree.leaves, run(base, plain, adapter)), strict=True):
        close(got, want)
    with peft.intercept(), pytest.raises(ValueError, match=r"give the model peft.overlay\(params, adapter\)"):
        model.apply({"params": jpeft.combine(base, adapter)}, x)


def test_a_quantized_weight_that_a_function_of_the_tree_reads_is_refused():
    kind = nn.map_variables(nn.Dense, "params", lambda tree: jax.tree.map(lambda w: 2 * w, tree), init=True)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(64, name="op")(kind(64, name="mapped")(x)) * 2

    x = jnp.ones((1, 64))
    params = parameters(Model(), x)
    quantized = {n: {**p, "kernel": jpeft.quantization.quantize_array(p["kernel"], "int8")} for n, p in params.items()}
    with pytest.raises(
        ValueError, match=r"'mapped/kernel' is quantized .int8., but the model reads it through a function"
    ):
        jpeft.LoRA(targets=["op"]).bind(Model(), quantized, x)
    peft = jpeft.LoRA(targets=["op"]).bind(Model(), {**quantized, "mapped": params["mapped"]}, x)
    assert [s.via for s in peft.sites] == ["fused"]
    with pytest.raises(ValueError, match=r"'mapped/kernel' is quantized .int8."):  # after it was bound
        peft.apply(quantized, moved(peft, params), x)


# --- what "all-linear" takes ------------------------------------------------------------------------------------------


class Returns(nn.Module):
    """A block that returns what it computes on the way, as big_vision's ViT does, and a head."""

    @nn.compact
    def __call__(self, x):
        out = {}
        out["sa"] = y = nn.MultiHeadDotProductAttention(2, name="attention")(x, x)
        x = x + y
        out["mlp"] = y = nn.Dense(8, name="second")(nn.gelu(nn.Dense(8, name="first")(x)))
        out["logits"] = nn.Dense(3, name="predictions")(x + y).astype(jnp.float32)
        out["raw"] = (x + y) @ _weight(self, 8, 3, name="scores") + self.param("b", nn.initializers.zeros, (3,))
        return x, out


def test_a_head_is_an_output_that_nothing_else_consumes():
    params = parameters(Returns(), X)
    weights = survey_model(Returns(), params, (X,), {}).weights
    assert {s.name for s in weights if s.head} == {"predictions", "scores"}
    peft = jpeft.LoRA().bind(Returns(), params, X)
    linear = {*(f"attention/{n}" for n in ("query", "key", "value", "out")), "first", "second"}
    assert {s.name for s in peft.sites} == linear
    assert set(peft.left_alone) == {"predictions/kernel", "scores"}
    assert "left alone: 2 parameters of two or more axes, listed by .left_alone: " in peft.summary()


def test_weights_of_modules_that_were_not_called_are_left_alone_by_name():
    class Two(nn.Module):
        def setup(self):
            self.used, self.other = nn.Dense(8), nn.Dense(8)

        def __call__(self, x):
            return 2 * self.used(x)

        def both(self, x):
            return self(x), self.other(x)

    params = Two().init(jax.random.key(0), X, method="both")["params"]
    assert jpeft.LoRA().bind(Two(), params, X).left_alone == ("other/kernel",)
    assert jpeft.LoRA().bind(Two(), params, X, method="both").left_alone == ("other/kernel",)  # a head there


class Gemma(nn.Module):
    """Two blocks with a feed-forward of raw weights, of einsums in one scope, or of layers."""

    kind: str

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            y = nn.RMSNorm(name=f"norm_{i}")(x)
            if self.kind == "raw":
                x = x + GatedFFN(128, name=f"mlp_{i}")(y)
            else:
                x = x + SharedScope(128, name=f"mlp_{i}")(y)
        return 2 * x


@pytest.mark.parametrize("kind", ["raw", "shared"])
def test_a_feed_forward_of_raw_weights_is_linear_and_costs_what_a_layer_costs(kind):
    x = jnp.ones((4, 32, 64))
    model = Gemma(kind)
    params = parameters(model, x)
    peft = jpeft.LoRA(rank=4).bind(model, params, x)
    names = ["linear", "gating_einsum" if kind == "raw" else "kernel"]
    assert {(s.name, s.via) for s in peft.sites} == {(f"mlp_{i}/{n}", "fused") for i in range(2) for n in names}
    assert peft.left_alone == ()

    def flops(loss, tree):
        cost = jax.jit(jax.grad(loss)).lower(tree).compile().cost_analysis()
        assert cost is not None
        return cost["flops"]

    full = flops(lambda p: jnp.sum(model.apply({"params": p}, x) ** 2), params)
    lora = flops(lambda a: jnp.sum(peft.apply(params, a, x) ** 2), peft.init(jax.random.key(0), params))
    assert lora / full <= 0.68


def test_a_standardized_layer_keeps_its_name_and_a_named_einsum_has_its_own():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Standardized(8, name="standardized")(x)
            return 2 * NamedEinsum((8, 4), "gate", name="einsum")("...d,dh->...h", x)

    params = parameters(Model(), X)
    peft = jpeft.LoRA(targets=".*").bind(Model(), params, X)
    assert [(s.name, s.via) for s in peft.sites] == [("einsum/gate", "fused"), ("standardized", "box")]
    leaves = {
        "/".join(str(k.key) for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(moved(peft, params))
    }
    assert "standardized/lora_a" in leaves and "einsum/gate_lora_a" in leaves


# --- mapped axes ------------------------------------------------------------------------------------------------------


class Mapped(nn.Module):
    """A model that averages over axes of the caller's vmaps."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, axis_name=("rows", "columns"), name="norm")(nn.Dense(8)(x))
        return 2 * nn.Dense(8)(x + jax.lax.axis_index("rows").astype(x.dtype))


def test_a_model_that_names_axes_of_a_vmap_is_bound_outside_of_it():
    def mapped(f):
        return jax.vmap(jax.vmap(f, axis_name="columns"), axis_name="rows")

    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))
    model, mutable = Mapped(), ["batch_stats"]
    shapes = jax.eval_shape(lambda: mapped(lambda x: model.init(jax.random.key(0), x))(x))
    variables = jax.tree.map(lambda s: jax.random.normal(jax.random.key(1), s.shape[2:]), shapes)
    peft = jpeft.LoRA(rank=2, init_weights="random").bind(model, variables, x[0, 0], mutable=mutable)
    adapter = peft.init(jax.random.key(2), variables)
    y, _ = mapped(lambda x: peft.apply(variables, adapter, x, mutable=mutable))(x)
    merged = {**variables, "params": peft.merge(variables, adapter)}
    want, _ = mapped(lambda x: model.apply(merged, x, mutable=mutable))(x)
    close(y, want)
    with pytest.raises(NameError, match="unbound axis name: "):
        peft.apply(variables, adapter, x[0, 0], mutable=mutable)


# --- calls of another form than was bound -----------------------------------------------------------------------------


class Forms(nn.Module):
    """A model with more ways to be called than one, which use its weights in other ways."""

    def setup(self):
        self.w = _weight(self, 8, 8)
        self.d, self.e = nn.Dense(8), nn.Embed(8, 8)

    def __call__(self, x, decay: bool = False):
        y = self.d(jnp.tanh(x @ self.w)) * 2 + self.e(jnp.array([1, 2, 3, 4]))
        return y + (self.variables["params"]["d"]["kernel"] ** 2).sum() if decay else y

    def transposed(self, x):
        return x @ self.w.T

    def multiplied(self, x):
        return x @ self.variables["params"]["w"]

    def kernel(self, x):
        return x @ self.d.variables["params"]["kernel"]

    def table(self, x):
        return x @ self.e.embedding.T

    def norm(self, x):
        return x * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(self.variables["params"]))

    def attend(self, x):
        return self.e.attend(x)

    def twice(self, x):
        return self.d(self.d(x)) + self(x)


@pytest.fixture(scope="module")
def forms() -> Any:
    params = parameters(Forms(), X)
    peft = jpeft.LoRA(rank=2, init_weights="random", targets=".*").bind(Forms(), params, X)
    return peft, params, peft.init(jax.random.key(0), params)


@pytest.mark.parametrize(("kwargs", "leaf"), [
    ({"method": "transposed"}, "w"), ({"method": "multiplied"}, "w"), ({"method": "kernel"}, "d/kernel"),
    ({"method": "table"}, "e/embedding"), ({"method": "norm"}, "d/kernel"), ({"decay": True}, "d/kernel"),
], ids=str)  # fmt: skip
def test_a_call_that_uses_a_weight_otherwise_than_was_bound_is_refused(kwargs, leaf, forms):
    peft, params, adapter = forms
    with pytest.raises(
        ValueError, match=f"this call uses '{leaf}' in another way than the call that LoRA was bound with"
    ):
        peft.apply(params, adapter, X, **kwargs)
    own = jpeft.LoRA(rank=2, init_weights="random", targets=".*").bind(Forms(), params, X, **kwargs)
    adapter = own.init(jax.random.key(0), params)
    close(own.apply(params, adapter, X, **kwargs), Forms().apply({"params": own.merge(params, adapter)}, X, **kwargs))


@pytest.mark.parametrize(
    "kwargs", [{"method": "twice"}, {"method": "attend"}, {"decay": False}, {"mutable": ["a"]}], ids=str
)
def test_a_call_of_another_form_that_uses_weights_as_they_were_bound_runs(kwargs, forms):
    peft, params, adapter = forms
    y = jax.jit(lambda a: peft.apply(params, a, X, **kwargs))(adapter)
    want = Forms().apply({"params": peft.merge(params, adapter)}, X, **kwargs)
    for got, expected in zip(jax.tree.leaves(y), jax.tree.leaves(want), strict=True):
        close(got, expected)


# --- parameters that are no arrays ------------------------------------------------------------------------------------


class Mappings(nn.Module):
    """A parameter that is a mapping, one without elements, and a layer with an axis of metadata alone."""

    @nn.compact
    def __call__(self, x):
        p = self.param("p", lambda key: {"w": jnp.ones((8, 8)), "deep": {"b": jnp.ones(8)}})
        assert set(p) == {"w", "deep"} and set(p["deep"]) == {"b"}
        x = nn.add_metadata_axis(nn.Dense, {"params": 0}, {})(8, name="named")(x @ p["w"] + p["deep"]["b"])
        return 2 * x + (x @ _weight(self, 8, 0, name="empty")).sum()


@pytest.mark.parametrize("scanned", [False, True])
def test_a_parameter_may_be_a_mapping_or_empty_or_have_axes_of_metadata(scanned):
    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            def body(module, x, _):
                return Mappings(name="own")(x), None

            if not scanned:
                return Mappings(name="own")(x)
            kind = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return kind(self, x, None)[0]

    params = parameters(Layers(), X)
    peft = jpeft.LoRA(rank=2, init_weights="random", targets=[r"own/p/w", "named"]).bind(Layers(), params, X)
    assert {s.name: s.via for s in peft.sites} == {"own/p/w": "box", "own/named": "fused"}
    adapter = peft.init(jax.random.key(0), params)
    close(peft.apply(params, adapter, X), Layers().apply({"params": peft.merge(params, adapter)}, X))
    with pytest.raises(ValueError, match="params must be nested mappings of arrays; 'own/p' is a list"):
        jpeft.LoRA().bind(Layers(), {"own": {**params["own"], "p": [jnp.ones(2)]}}, X)
