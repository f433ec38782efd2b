"""The contract: what holds for every method on every use of a weight. The tables are in `tests.zoo`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze
from jax.sharding import PartitionSpec

import jpeft
from jpeft.binding import bind_survey, survey_model
from jpeft.core import backend, geometry
from jpeft.core.tree import flatten, unflatten
from tests.zoo import LAYERS, METHODS, MODES, USES, Model, moved, numbers, parameters

# The law: every method on every use of a weight, in these modes and dtypes; with --whole-product, in all.
CELLS = (("plain", "float32"), ("scan", "float32"), ("remat", "bfloat16"))
WHOLE = tuple((mode, dtype) for mode in MODES for dtype in ("float32", "bfloat16"))
# Every method, in every mode, on the uses it names first.
EACH = [
    pytest.param(use, mode, method, id=f"{use}-{mode}-{method}")
    for method, entry in METHODS.items()
    for use, mode in zip(entry.uses[:3] * 3, MODES, strict=False)
]


def pytest_generate_tests(metafunc):
    if {"mode", "dtype"} <= set(metafunc.fixturenames):
        cells = WHOLE if metafunc.config.getoption("whole_product") else CELLS
        metafunc.parametrize(("mode", "dtype"), cells, ids=lambda v: v)


@pytest.fixture(autouse=True)
def quick_compiles():
    """These models are tiny: XLA's optimizations cost more than they give."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def bound(use: str, mode: str, method: str, dtype: str = "float32"):
    case = USES[use]
    model, x = Model(case.op(jnp.dtype(dtype)), mode), case.input(jnp.dtype(dtype))
    params = parameters(model, x)
    return METHODS[method].make(case).bind(model, params, x), model, params, x


def mergeable(peft: jpeft.Peft) -> bool:
    return all(m.mergeable for m in peft.method.methods())


def close(got, want, tolerance: float = 1e-5):
    """Equal within a tolerance on the scale of the whole array."""
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))


def differ(a, b) -> bool:
    return bool(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max() > 1e-3)


@pytest.mark.parametrize("use", USES)
def test_running_under_an_adapter_is_running_the_unmodified_model_on_the_merged_tree(use, mode, dtype, monkeypatch):
    if dtype == "bfloat16":  # on an accelerator's layout
        monkeypatch.setattr(backend, "flatten_tokens", lambda: False)
    case = USES[use]
    model, x = Model(case.op(jnp.dtype(dtype)), mode), case.input(jnp.dtype(dtype))
    params = parameters(model, x)
    seen = survey_model(model, params, (x,), {})
    pefts = {n: bind_survey(e.make(case), model, params, seen) for n, e in METHODS.items() if use in e.uses}
    pefts = {name: made for name, made in pefts.items() if mergeable(made)}
    assert {"LoRA", "IA3", "IA3 feedforward", "LoRA + IA3"} <= set(pefts)
    assert {s.via for s in pefts["LoRA"].sites} == {case.via}

    @jax.jit  # one program for all methods: compiling is what takes the time
    def run(params, adapters):
        applied = [pefts[name].apply(params, own, x) for name, own in adapters.items()]
        trees = [params, *(pefts[name].merge(params, own) for name, own in adapters.items())]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        return applied, jax.vmap(lambda p: model.apply({"params": p}, x))(stacked)

    applied, (base, *merged) = run(params, {name: moved(made, params) for name, made in pefts.items()})
    for name, got, want in zip(pefts, applied, merged, strict=True):
        assert got.dtype == want.dtype == jnp.dtype(dtype), name
        close(got, want, 1e-5 if dtype == "float32" else 0.04)
        assert differ(got, base), name


@pytest.mark.parametrize(("use", "mode", "method"), EACH)
def test_a_fresh_adapter_changes_nothing_and_every_leaf_of_a_moved_one_learns(use, mode, method):
    peft, model, params, x = bound(use, mode, method)
    before = jax.tree.map(np.array, params)

    @jax.jit
    def run(params, fresh, adapter):
        loss = lambda a: jnp.sin(peft.apply(params, a, x)).sum()  # noqa: E731
        out = {"base": model.apply({"params": params}, x), "fresh": peft.apply(params, fresh, x)}
        return out | {"moved": peft.apply(params, adapter, x)}, jax.grad(loss)(adapter)

    fresh = peft.init(jax.random.key(0), params)
    y, grads = run(params, fresh, moved(peft, params))
    if METHODS[method].identity:
        close(y["fresh"], y["base"], 1e-6)  # not to the bit: XLA fuses the two programs differently
    else:
        assert differ(y["fresh"], y["base"])
    assert differ(y["moved"], y["base"])
    for path, grad in flatten(grads).items():
        # A key's bias, or a prefix's, shifts every score of a query alike, which softmax does not see.
        no_gradient = path[-2:] == ("key", "bias") or (path[-1] in ("prefix_key_bias", "bias") and "Prefix" in method)
        assert np.abs(grad).max() > 1e-7 or no_gradient, path
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert jax.tree.structure(fresh) == jax.tree.structure(grads)
    assert {p: (x.shape, x.dtype.name) for p, x in flatten(fresh).items()} == dict(peft.structure)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_stack_compile_once_and_come_back_from_disk(method, tmp_path):
    peft, model, params, x = bound(METHODS[method].uses[0], "scan", method)
    adapters = [moved(peft, params, seed=s) for s in range(3)]
    traces = []

    @jax.jit
    def step(params, adapter):
        traces.append(None)
        loss = lambda a: (peft.apply(params, a, x) ** 2).mean()  # noqa: E731
        return jax.tree.map(lambda a, g: a - 0.1 * g, adapter, jax.grad(loss)(adapter))

    jax.block_until_ready(step(params, step(params, adapters[0])))
    assert len(traces) == 1

    one = jax.jit(peft.apply)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *adapters)
    many = jax.jit(jax.vmap(peft.apply, in_axes=(None, 0, None)))(params, stacked, x)
    close(many, jnp.stack([one(params, a, x) for a in adapters]))

    jpeft.save(tmp_path / "adapter", peft, adapters[1], params)
    again, loaded = jpeft.load(tmp_path / "adapter", model, params, x)
    assert again == peft and hash(again) == hash(peft)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters[1])


@pytest.mark.parametrize("method", METHODS)
def test_a_peft_is_functions_of_trees(method):
    peft, _, params, _ = bound(METHODS[method].uses[0], "scan", method)
    adapter = moved(peft, params)
    full = jpeft.combine(params, adapter)

    labels = peft.labels(full)
    assert jax.tree.structure(labels) == jax.tree.structure(full)
    assert {p for p, v in flatten(labels).items() if v == "trainable"} == set(
        flatten(adapter)
    ) - peft.non_trainable_paths
    assert set(jax.tree.leaves(peft.labels(adapter))) == {"trainable"}

    trainable, frozen = jpeft.partition(full, labels)
    assert set(flatten(trainable)) == set(flatten(adapter))
    jax.tree.map(np.testing.assert_array_equal, jpeft.combine(trainable, frozen), full)

    base, own = peft.split(full)
    assert set(flatten(base)) == set(flatten(params))
    jax.tree.map(np.testing.assert_array_equal, own, adapter)

    restored = jpeft.methods.from_dict(peft.method.to_dict())
    assert restored == peft.method
    assert all(site.name in peft.summary() for site in peft.sites)


@pytest.mark.parametrize("method", METHODS)
def test_abstract_parameters_give_abstract_adapters_of_the_same_shapes(method):
    peft, model, params, x = bound(METHODS[method].uses[0], "scan", method)
    shapes = jax.eval_shape(lambda: params)
    abstract = METHODS[method].make(USES[METHODS[method].uses[0]]).bind(model, shapes, jax.eval_shape(lambda: x))
    assert abstract == peft
    adapter = abstract.init(jax.random.key(0), shapes)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(adapter))
    assert {p: (leaf.shape, leaf.dtype.name) for p, leaf in flatten(adapter).items()} == dict(peft.structure)


# --- what a parameter tree may be -------------------------------------------------------------------------------------


class Boxed(nn.Module):
    """Two scanned dense layers whose kernels carry axis names, in the box that ``box`` makes."""

    box: object

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            box: object

            @nn.compact
            def __call__(self, x, _):
                init = self.box(nn.initializers.lecun_normal(), ("embed", "mlp"))
                x = nn.Dense(8, kernel_init=init, name="up")(x)
                init = self.box(nn.initializers.lecun_normal(), ("mlp", "embed"))
                return nn.Dense(4, kernel_init=init, name="down")(x), None

        scan = nn.scan(
            Layer,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(self.box, name="layers")(x, None)[0] * 2


@pytest.mark.parametrize(("with_box", "kind"), [
    (nn.with_partitioning, nn.Partitioned), (nn.with_logical_partitioning, nn.LogicallyPartitioned)
])  # fmt: skip
def test_boxed_parameters_name_the_axes_of_the_adapter(with_box, kind):
    model, x = Boxed(with_box), jnp.ones((2, 4))
    params = parameters(model, x)
    method = jpeft.Chain(jpeft.LoRA(rank=2), jpeft.IA3(targets=["up"]), jpeft.Train(r".*/down/bias"))
    peft = method.bind(model, params, x)
    adapter = peft.init(jax.random.key(0), params)
    layers = adapter["layers"]
    assert isinstance(layers["up"]["lora_a"], kind)
    assert layers["up"]["lora_a"].names == ("embed", "layers", None)
    assert layers["up"]["lora_a"].value.shape == (4, 3, 2)
    assert layers["up"]["lora_b"].names == (None, "layers", "mlp")
    assert layers["down"]["lora_a"].names == ("mlp", "layers", None)
    assert layers["up"]["ia3_out"].names == ("mlp", "layers")
    assert nn.get_partition_spec(adapter)["layers"]["down"]["lora_b"] == PartitionSpec(None, "layers", "embed")

    adapter = numbers(adapter)
    merged = peft.merge(params, adapter)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    y = peft.apply(params, adapter, x)
    close(y, model.apply({"params": merged}, x))
    close(y, peft.apply(nn.unbox(params), nn.unbox(adapter), x))
    assert differ(y, model.apply({"params": params}, x))


@pytest.mark.parametrize("use", ["dense", "raw", "embed, tied by its table"])
def test_frozen_dicts_and_numpy_leaves_are_trees_too(use):
    peft, model, params, x = bound(use, "scan", "LoRA")
    adapter = moved(peft, params)
    want = peft.apply(params, adapter, x)

    frozen = freeze(params)
    assert isinstance(peft.init(jax.random.key(0), frozen), FrozenDict)
    assert isinstance(peft.merge(frozen, adapter), FrozenDict)
    assert jax.tree.structure(peft.merge(frozen, adapter)) == jax.tree.structure(frozen)
    close(peft.apply(frozen, freeze(adapter), x), want)

    arrays = jax.tree.map(np.asarray, params)
    assert METHODS["LoRA"].make(USES[use]).bind(model, arrays, np.asarray(x)) == peft
    fresh = peft.init(jax.random.key(0), arrays)
    jax.tree.map(np.testing.assert_array_equal, fresh, peft.init(jax.random.key(0), params))
    close(peft.apply(arrays, jax.tree.map(np.asarray, adapter), x), want)


def test_all_variables_may_stand_where_parameters_do():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Dense(4, name="op")(x)
            return nn.BatchNorm(use_running_average=not train, name="norm")(x)

    model, x = Normed(), jnp.arange(12.0).reshape(3, 4)
    variables = model.init(jax.random.key(0), x)
    peft = jpeft.LoRA(rank=2).bind(model, variables, x)
    adapter = moved(peft, variables)
    assert set(peft.merge(variables, adapter)) == {"op", "norm"}
    y, state = peft.apply(variables, adapter, x, train=True, mutable=["batch_stats"])
    merged = {"params": peft.merge(variables, adapter), "batch_stats": variables["batch_stats"]}
    want, want_state = model.apply(merged, x, train=True, mutable=["batch_stats"])
    close(y, want)
    jax.tree.map(close, state, want_state)


def test_leaves_of_a_site_depend_on_the_key_and_its_path_alone():
    class Two(nn.Module):
        names: tuple[str, ...]

        @nn.compact
        def __call__(self, x):
            return sum(nn.Dense(4, name=n)(x) for n in self.names) * 2

    x = jnp.ones((1, 4))
    one, two = Two(("b",)), Two(("a", "b"))
    few = parameters(one, x)
    many = parameters(two, x)
    lora = jpeft.LoRA(rank=2)
    first = lora.bind(one, few, x).init(jax.random.key(0), few)
    second = lora.bind(two, many, x).init(jax.random.key(0), many)
    np.testing.assert_array_equal(first["b"]["lora_a"], second["b"]["lora_a"])
    assert differ(second["a"]["lora_a"], second["b"]["lora_a"])


def test_scanned_layers_and_parts_start_from_numbers_of_their_own():
    peft, _, params, _ = bound("fused qkv", "scan", "LoRA")
    a = peft.init(jax.random.key(0), params)["block"]["op"]["lora_a"]
    assert a.shape == (LAYERS, 3, 4, 2)
    flat = np.asarray(a).reshape(LAYERS * 3, -1)
    assert len(np.unique(flat, axis=0)) == LAYERS * 3


# --- bad input --------------------------------------------------------------------------------------------------------


def test_an_adapter_that_does_not_fit_is_refused_by_path():
    peft, _, params, x = bound("dense", "plain", "LoRA")
    adapter = moved(peft, params)
    leaves = flatten(adapter)
    short = unflatten({p: v for p, v in leaves.items() if p[-1] != "lora_a"})
    with pytest.raises(ValueError, match="lacks 'block/op/lora_a'"):
        peft.apply(params, short, x)
    extra = unflatten({**leaves, ("block", "op", "lora_c"): jnp.ones(3)})
    with pytest.raises(ValueError, match="'block/op/lora_c' that LoRA does not; nearest: block/op/lora_"):
        peft.merge(params, extra)
    wide = unflatten({**leaves, ("block", "op", "lora_a"): jnp.ones((4, 3))})
    with pytest.raises(ValueError, match=r"'block/op/lora_a' has shape \(4, 3\), expected \(4, 2\)"):
        peft.apply(params, wide, x)
    with pytest.raises(ValueError, match="params lack 'block/op/kernel'"):
        peft.apply({"other": params["block"]}, adapter, x)


def test_parameters_that_do_not_fit_the_model_are_refused_by_name():
    peft, model, params, x = bound("dense", "plain", "LoRA")
    method = peft.method
    with pytest.raises(ValueError, match=r'params do not fit Model: .*"kernel".*"/block/op"'):
        method.bind(model, {"block": {"op": {"bias": params["block"]["op"]["bias"]}}}, x)
    with pytest.raises(ValueError, match="params do not fit Model"):
        method.bind(model, {}, x)
    with pytest.raises(ValueError, match=r"params do not fit Model: .*shape"):
        method.bind(model, jax.tree.map(lambda v: v[..., :-1], params), x)
    with pytest.raises(ValueError, match="params lack 'block/op/kernel', which this Peft was bound to"):
        peft.init(jax.random.key(0), {"block": {"up": params["block"]["op"]}})


def test_a_weight_that_is_not_floating_is_refused():
    _, model, params, x = bound("dense", "plain", "LoRA")
    whole = {"block": {"op": {**params["block"]["op"], "kernel": jnp.ones((4, 6), jnp.int32)}}}
    with pytest.raises(ValueError, match="LoRA: the weight of 'block/op' is int32, and only a floating one"):
        jpeft.LoRA(targets=["op"]).bind(model, whole, x)


@pytest.mark.parametrize("method", [jpeft.PrefixTuning(length=2), jpeft.Bottleneck(targets=r".*/op")])
def test_what_is_no_change_of_a_weight_says_that_it_cannot_be_merged(method):
    _, model, params, x = bound("attention", "plain", "LoRA")
    peft = method.bind(model, params, x)
    with pytest.raises(ValueError, match="'block/op' cannot be merged"):
        peft.merge(params, moved(peft, params))


def test_two_methods_of_a_chain_that_keep_the_same_leaf_are_refused():
    _, model, params, x = bound("dense", "plain", "LoRA")
    lora = jpeft.LoRA(rank=2, targets=["op"])
    with pytest.raises(ValueError, match="both keep a leaf at 'block/op/lora_a'"):
        jpeft.Chain(lora, lora).bind(model, params, x)
    with pytest.raises(ValueError, match="both keep a leaf at 'block/op/bias'"):
        jpeft.Chain(jpeft.BitFit(), jpeft.Train(["bias"])).bind(model, params, x)


@pytest.mark.parametrize("order", [0, 1])
def test_a_weight_that_trains_may_have_a_low_rank_update_too(order):
    _, model, params, x = bound("dense", "plain", "LoRA")
    members = [jpeft.Train(["op/kernel"]), jpeft.LoRA(rank=2, targets=["op"])]
    peft = jpeft.Chain(*(members[::-1] if order else members)).bind(model, params, x)
    adapter = moved(peft, params)
    assert set(adapter["block"]["op"]) == {"kernel", "lora_a", "lora_b"}
    own = adapter["block"]["op"]
    kernel = own["kernel"] + own["lora_a"] @ own["lora_b"]
    want = 2 * (x @ kernel + params["block"]["op"]["bias"])
    close(peft.apply(params, adapter, x), want)
    close(model.apply({"params": peft.merge(params, adapter)}, x), want)


# --- geometries from outside ------------------------------------------------------------------------------------------


class Flipped(nn.Module):
    """A linear layer of somebody else's, its weight ``w`` stored ``(out, in)``."""

    features: int

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (self.features, x.shape[-1]))
        return x @ w.T + self.param("bias", nn.initializers.normal(), (self.features,))


def _of_call(call: geometry.Call) -> geometry.Geometry:
    return geometry.Contraction(leaf="w", spec="...i,oi->...o", shape=call.shapes["w"], stored=call.shapes["w"])


@pytest.mark.parametrize("owner", [Flipped, "Flipped"])
@pytest.mark.parametrize("how", [
    "...i,oi->...o",
    geometry.Contraction(leaf="w", spec="...i,oi->...o", shape=(6, 4), stored=(6, 4)),
    _of_call,
], ids=["einsum", "geometry", "function"])  # fmt: skip
@pytest.mark.parametrize("method", ["LoRA", "IA3", "IA3 feedforward"])
def test_register_geometry_puts_a_foreign_weight_on_the_fused_path(owner, how, method, registries):
    model, x = Model(lambda x: Flipped(6, name="op")(x), "scan"), jnp.arange(24.0).reshape(2, 3, 4) / 24
    params = parameters(model, x)
    make = METHODS[method].make
    raw = make(USES["raw"]).bind(model, params, x)
    assert [(s.name, s.via) for s in raw.sites] == [("block/op/w", "box")]

    jpeft.register_geometry(owner, how)
    peft = make(USES["dense"]).bind(model, params, x)
    (site,) = peft.sites
    assert (site.name, site.via, site.inputs, site.outputs) == ("block/op", "fused", 4, 6)
    adapter = moved(peft, params)
    y = peft.apply(params, adapter, x)
    close(y, model.apply({"params": peft.merge(params, adapter)}, x))
    assert differ(y, model.apply({"params": params}, x))


def test_register_geometry_refuses_what_is_no_geometry():
    with pytest.raises(ValueError, match="expected an einsum of two operands"):
        jpeft.register_geometry("Mine", "io")
    with pytest.raises(ValueError, match="every axis of the weight"):
        jpeft.register_geometry("Mine", "bi,iz->b")
    with pytest.raises(TypeError, match="geometry must be an einsum, a Geometry or a function"):
        jpeft.register_geometry("Mine", 3)


def test_a_fused_weight_that_does_not_divide_is_refused():
    _, model, params, x = bound("dense", "plain", "LoRA")
    with pytest.raises(ValueError, match="6 outputs, which do not divide into 4 parts"):
        jpeft.LoRA(targets=["op"], parts=4).bind(model, params, x)
