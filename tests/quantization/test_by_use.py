"""`jpeft.quantize` with a model or a Peft: linear weights are quantized in their layers; what is left is said."""

import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze

import jpeft
from jpeft.core.fingerprint import fingerprint
from jpeft.core.quantized import Quantized, quantize_leaf
from jpeft.core.tree import flatten, join, map_with_path
from jpeft.quantization import unquantized

X = np.random.default_rng(1).normal(size=(2, 64)).astype(np.float32)


def quantized_paths(tree):
    return {join(path) for path, leaf in flatten(tree).items() if isinstance(leaf, Quantized)}


def init(model, *inputs, **kwargs):
    return jax.jit(functools.partial(model.init, **kwargs))(jax.random.key(0), *inputs)["params"]


# --- what is quantized ----------------------------------------------------------------------------------------------


class Einsum(nn.Module):
    """As Gemma's: a raw weight `w` in a module of its own."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.param("w", nn.initializers.normal(0.1), self.shape))


class FeedForward(nn.Module):
    """As Gemma's: two weights of one scope, neither named kernel."""

    @nn.compact
    def __call__(self, x):
        gating = self.param("gating_einsum", nn.initializers.normal(0.1), (2, 64, 128))
        out = self.param("linear", nn.initializers.normal(0.1), (128, 64))
        return (nn.gelu(x @ gating[0]) * (x @ gating[1])) @ out


class Gemma(nn.Module):
    dense: bool = False  # a layer whose weight is named kernel

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(32, 64, name="embedder")
        x = table(ids) + self.param("pos_embedding", nn.initializers.normal(0.1), (4, 64))
        x = x + Einsum((4, 64, 16), name="q")("td,ndh->tnh", x).reshape(4, 64)
        x = x + FeedForward(name="mlp")(x)
        if self.dense:
            x = nn.Dense(64, name="cond")(x)
        return table.attend(x)


IDS = np.arange(4) % 32
LINEAR = {"q/w", "mlp/gating_einsum", "mlp/linear"}


@functools.cache
def gemma(dense=False):
    model = Gemma(dense)
    return model, init(model, IDS)


@pytest.mark.parametrize("how", ["model", "peft", pytest.param("abstract inputs", marks=pytest.mark.exhaustive)])
def test_linear_weights_are_quantized_whatever_their_names(how):
    model, params = gemma()
    given = {
        "model": (model, IDS),
        "peft": (jpeft.LoRA(rank=2, targets=["q"]).bind(model, params, IDS),),
        "abstract inputs": (model, jax.ShapeDtypeStruct(IDS.shape, IDS.dtype)),
    }[how]
    base = jpeft.quantize({"params": params, "cache": {}}, "int8", *given, block=16)["params"]
    assert quantized_paths(base) == LINEAR
    assert unquantized(base) == ["embedder/embedding", "pos_embedding"]
    run = jax.jit(model.apply)
    got, wanted, full = (run({"params": tree}, IDS) for tree in (base, jpeft.dequantize(base), params))
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_allclose(got, full, atol=0.02)


@pytest.mark.exhaustive
def test_an_adapter_trains_over_weights_of_any_name():
    model, params = gemma()
    peft = jpeft.LoRA(rank=2, targets="all-linear").bind(model, params, IDS)
    base = jpeft.quantize(params, "nf4", peft, block=16)
    adapter = jax.tree.map(lambda x: x + 0.1, peft.init(jax.random.key(0), base))
    gradient = jax.jit(jax.grad(lambda adapter, base: (peft.apply(base, adapter, IDS) ** 2).sum()))
    both = (jax.tree.leaves(gradient(adapter, b)) for b in (base, jpeft.dequantize(base)))
    for got, wanted in zip(*both, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_without_a_model_it_says_what_it_left():
    _, params = gemma()
    with pytest.raises(jpeft.TargetError, match=r"left 3 weights .*unquantized: .*gating_einsum.* give it the model"):
        jpeft.quantize(params, block=16)
    _, params = gemma(dense=True)
    with pytest.warns(UserWarning, match=r"left 3 weights .* unquantized: .*mlp/linear.*give it the model"):
        base = jpeft.quantize(params, block=16)
    assert quantized_paths(base) == {"cond/kernel"}
    # Named, or excluded, it was meant.
    assert quantized_paths(jpeft.quantize(params, block=16, targets=["cond"])) == {"cond/kernel"}
    assert quantized_paths(jpeft.quantize(params, block=16, exclude=["w", "mlp"])) == {"cond/kernel"}
    assert quantized_paths(jpeft.quantize(params, block=16, targets=r"mlp/.*|q/w")) == LINEAR


class Mapped(nn.Module):
    """A layer whose weight the model reads through a function of the tree, beside a plain one."""

    @nn.compact
    def __call__(self, x):
        center = functools.partial(jax.tree.map, lambda w: w - w.mean())
        x = nn.map_variables(nn.Dense, "params", center, init=True)(64, name="mapped")(x)
        return nn.Dense(8, name="plain")(x) @ jnp.ones((8, 8))


def test_a_weight_that_the_model_reads_through_a_function_of_the_tree_is_left():
    model = Mapped()
    params = init(model, X)
    with pytest.warns(UserWarning, match=r"left 1 weight .*mapped/kernel.*; of mapped/kernel, the model reads it thr"):
        base = jpeft.quantize(params, "int8", model, X)
    assert quantized_paths(base) == {"plain/kernel"}
    run = jax.jit(model.apply)
    got, wanted = (run({"params": tree}, X) for tree in (base, jpeft.dequantize(base)))
    np.testing.assert_array_equal(got, wanted)
    with pytest.raises(ValueError, match="cannot quantize 'mapped/kernel': the model reads it through a function"):
        jpeft.quantize(params, "int8", model, X, targets=["mapped"])
    assert quantized_paths(jpeft.quantize(params, "int8", model, X, exclude=["mapped"])) == {"plain/kernel"}


def test_mistakes_with_a_model_raise():
    model, params = gemma()
    peft = jpeft.LoRA(rank=2, targets=["q"]).bind(model, params, IDS)
    other = {**params, "q": {"w": jnp.ones((4, 64, 8))}}
    cases = [
        (ValueError, "a Peft comes after it", lambda: jpeft.quantize(params, peft)),
        (TypeError, "a Peft and inputs", lambda: jpeft.quantize(params, "nf4", peft, IDS)),
        (TypeError, "got blocks without a model", lambda: jpeft.quantize(params, "nf4", blocks=2)),
        (TypeError, "must be a flax.linen Module", lambda: jpeft.quantize(params, "nf4", IDS)),
        (ValueError, r"have 'q/w' of shape \(4, 64, 8\)", lambda: jpeft.quantize(other, "nf4", peft)),
        (ValueError, "lack 'embedder/embedding'", lambda: jpeft.quantize({"q": params["q"]}, "nf4", peft)),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


# --- stacks of layers along any axis --------------------------------------------------------------------------------


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.DenseGeneral((2, 64), name="heads")(nn.Dense(128, name="up")(x))
        return x + jnp.tanh(h).sum(-2), None


class Stacked(nn.Module):
    """Layers that a scan or vmap stacks along an axis; T5X and MaxText have a scan along axis 1."""

    axis: int
    lift: str = "scan"

    @nn.compact
    def __call__(self, x):
        options = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        if self.lift == "scan":
            return nn.scan(Layer, length=3, **options)(name="layers")(x, None)[0]
        if self.lift == "vmap":
            return nn.vmap(Layer, axis_size=3, in_axes=(None, None), **options)(name="layers")(x, None)[0].sum(0)
        inner = nn.scan(Layer, length=2, variable_axes={"params": 0}, split_rngs={"params": True})
        return nn.vmap(inner, axis_size=3, in_axes=(None, None), **options)(name="layers")(x, None)[0].sum(0)


@functools.cache
def stacked(axis, lift="scan"):
    model = Stacked(axis, lift)
    return model, init(model, X), jax.jit(lambda p: model.apply({"params": p}, X))


STACKS = [(1, "scan"), (1, "both"), (-1, "vmap"), (-1, "scan"), (-2, "scan"), (1, "vmap"), (-1, "both")]
FORMS = list(itertools.product(("nf4", "int8"), (True, False)))


@pytest.mark.parametrize(
    ("axis", "lift", "scheme", "double"),
    [
        pytest.param(*stack, *form, marks=[] if form == FORMS[0] and stack in STACKS[:2] else pytest.mark.exhaustive)
        for stack in STACKS
        for form in FORMS
    ],
)
def test_layers_may_be_stacked_along_any_axis(axis, lift, scheme, double):
    model, params, run = stacked(axis, lift)
    for given in ((), (model, X)):
        base = jpeft.quantize(params, scheme, *given, block=16, double=double)
        assert len(quantized_paths(base)) == 2 and fingerprint(base) == fingerprint(params)
        assert np.abs(np.asarray(run(base)) - run(jpeft.dequantize(base))).max() == 0.0


def test_with_the_model_each_layer_has_the_codes_of_the_layer_alone():
    model, params, _ = stacked(1)
    base = jpeft.quantize(params, "nf4", model, X, block=16)
    whole = base["layers"]["up"]["kernel"]  # [64, 3, 128]
    for i in range(3):
        alone = jpeft.quantization.quantize_array(params["layers"]["up"]["kernel"][:, i], "nf4", 16)
        np.testing.assert_array_equal(whole.codes[:, i], alone.codes)
        np.testing.assert_array_equal(whole.scales[:, i], alone.scales)
        np.testing.assert_array_equal(whole.groups[i], alone.groups)
    assert whole.bits == alone.bits and whole.shape == (64, 3, 128)


@pytest.mark.parametrize("known", [pytest.param(True, marks=pytest.mark.exhaustive), False])
def test_an_adapter_trains_over_layers_along_another_axis(known):
    model, params, _ = stacked(1)
    peft = jpeft.LoRA(rank=2, targets="all-linear").bind(model, params, X)
    base = jpeft.quantize(params, "nf4", *((peft,) if known else ()), block=16)
    plain = jpeft.dequantize(base)
    adapter = jax.tree.map(lambda x: x + 0.05, peft.init(jax.random.key(0), base))
    loss = jax.jit(jax.value_and_grad(lambda a, b: (peft.apply(b, a, X) ** 2).sum()))
    (value, got), (other, wanted) = loss(adapter, base), loss(adapter, plain)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5 * np.abs(w).max())
    merged = peft.merge(base, adapter)
    np.testing.assert_allclose(model.apply({"params": merged}, X), peft.apply(base, adapter, X), rtol=1e-4, atol=1e-4)
    again = peft.merge(base, adapter, requantize=True)
    assert again["layers"]["up"]["kernel"].stack == base["layers"]["up"]["kernel"].stack


def test_loftq_over_layers_along_another_axis():
    model, params, _ = stacked(1)
    peft = jpeft.LoRA(rank=4, targets=["up"]).bind(model, params, X)
    base, adapter = jpeft.loftq(peft, {"params": params}, jax.random.key(0), block=16, targets=["up"])
    assert base.keys() == {"params"} and quantized_paths(base) == {"params/layers/up/kernel"}
    full, merged = (tree["layers"]["up"]["kernel"] for tree in (params, peft.merge(base["params"], adapter)))
    rounded = jpeft.dequantize(base)["params"]["layers"]["up"]["kernel"]
    assert np.linalg.norm(merged - full) < 0.95 * np.linalg.norm(rounded - full)


def test_parameters_that_a_scan_returns_keep_their_values():
    model, params, _ = stacked(1)
    base = jpeft.quantize(params, "nf4", model, X, block=16)
    for tree in (base, jpeft.quantize(params, "nf4", block=16)):
        _, state = jax.jit(functools.partial(model.apply, mutable=["params"]))({"params": tree}, X)
        wanted = jpeft.dequantize(tree)
        for got, leaf in zip(*map(jax.tree.leaves, (jpeft.dequantize(state["params"]), wanted)), strict=True):
            np.testing.assert_array_equal(got, leaf)


def test_a_tree_that_was_quantized_for_another_axis_runs():
    _, params, run = stacked(1)
    base = map_with_path(lambda p, x: quantize_leaf(x, "nf4", 16, True) if p[-1] == "kernel" else x, params)
    base["layers"]["up"]["kernel"] = quantize_leaf(params["layers"]["up"]["kernel"], "nf4", 16, True, (-1,))
    plain = jpeft.dequantize(base)
    assert np.abs(np.asarray(run(base)) - run(plain)).max() == 0.0


@pytest.mark.parametrize("scheme", ["nf4", pytest.param("int8", marks=pytest.mark.exhaustive)])
def test_blocks_along_the_axis_of_the_layers_are_refused(scheme):
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}}
            return nn.scan(Layer, length=4, **options)(name="layers")(x, None)[0]

    model = Deep()
    params = init(model, X)
    base = jpeft.quantize(params, scheme, block=4, targets=["up"])
    with pytest.raises(ValueError, match=re.escape("(64, 4, 128) is quantized in blocks along axis 1, along which")):
        model.apply({"params": base}, X)
    right = jpeft.quantize(params, scheme, model, X, block=4, targets=["up"])
    got, wanted = (model.apply({"params": tree}, X) for tree in (right, jpeft.dequantize(right)))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.exhaustive
def test_names_of_axes_follow_the_layers():
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}}
            scan = nn.scan(Inner, length=3, metadata_params={nn.PARTITION_NAME: "layers"}, **options)
            return scan(name="layers")(x, None)[0]

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
            return nn.Dense(64, kernel_init=kernel, name="up")(x), None

    model = Named()
    params = init(model, X)
    for base in (jpeft.quantize(params, "nf4", block=16), jpeft.quantize(params, "nf4", model, X, block=16)):
        leaf = base["layers"]["up"]["kernel"]
        assert leaf.codes.names == leaf.scales.names == ("embed", "layers", "mlp")
        run = jax.jit(model.apply)
        got, wanted = (run({"params": tree}, X) for tree in (base, jpeft.dequantize(base)))
        np.testing.assert_array_equal(got, wanted)


# --- kinds of trees ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_trees_of_numpy_and_frozen_dicts(dtype):
    weight = np.random.default_rng(0).normal(size=(64, 8)).astype(jnp.dtype(dtype))
    variables = {"params": {"d": {"kernel": weight, "bias": np.zeros(8)}}, "batch_stats": {"n": np.zeros(3, int)}}
    for tree in (variables, freeze(variables), {"params": variables["params"]}):
        base = jpeft.quantize(tree, "int8")
        assert type(base) is type(tree) and base.keys() == tree.keys()
        leaf = base["params"]["d"]["kernel"]
        assert leaf.dtype == leaf.unbox().dtype == (jnp.float32 if dtype == "float64" else weight.dtype)
        np.testing.assert_allclose(np.asarray(leaf.unbox(), float), weight.astype(float), atol=0.02)
        assert isinstance(base, FrozenDict) == isinstance(tree, FrozenDict)


def test_abstract_trees_with_a_model():
    model, params, _ = stacked(1)
    shapes = jax.eval_shape(lambda: params)
    abstract = jpeft.quantize(shapes, "nf4", model, X, block=16)
    base = jpeft.quantize(params, "nf4", model, X, block=16)
    assert jax.tree.structure(abstract) == jax.tree.structure(base)
    for a, b in zip(*map(jax.tree.leaves, (abstract, base)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
