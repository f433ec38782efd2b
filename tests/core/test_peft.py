"""A Peft on trees of every kind, and what it refuses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze
from jax.sharding import PartitionSpec

import jpeft
from jpeft.core.tree import flatten, unflatten
from tests import contract
from tests.contract import close, differ
from tests.zoo import LAYERS, METHODS, USES, Entry, moved, numbers, parameters

pytestmark = pytest.mark.usefixtures("quick_compiles")


def bound(use: str, mode: str, method: str):
    return contract.bound(METHODS[method], use, mode)


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


@pytest.mark.parametrize("name", ["LoRA", "Train"])  # the leaves of the second are the base's too
def test_two_trees_in_the_wrong_order_are_told_as_that(name, tmp_path):
    model, x = nn.Sequential([nn.Dense(4), nn.Dense(2)]), jnp.ones((1, 4))
    params = model.init(jax.random.key(0), x)["params"]
    method = {"LoRA": jpeft.LoRA(rank=2, targets="layers_0"), "Train": jpeft.Train("layers_1")}[name]
    peft = method.bind(model, params, x)
    adapter = peft.init(jax.random.key(1), params)
    order = "in the wrong order: the adapter was given as params, and params as the adapter"
    for call, made in {
        "peft.apply(params, adapter, *inputs)": lambda a, b: peft.apply(a, b, x),
        "peft.merge(params, adapter)": peft.merge,
        "peft.overlay(params, adapter)": peft.overlay,
        "jpeft.save(path, peft, adapter, params)": lambda a, b: jpeft.save(tmp_path / "a", peft, b, a),
        "jpeft.hf.save(path, peft, adapter, params)": lambda a, b: jpeft.hf.save(tmp_path / "a", peft, b, a),
    }.items():
        for base in (params, {"params": params}, freeze(params)):
            with pytest.raises(ValueError) as caught:
                made(adapter, base)
            assert str(caught.value) == f"{call}: the two trees are {order}"
    with pytest.raises(ValueError, match=order):
        jax.jit(peft.apply)(adapter, params, x)
    assert not list(tmp_path.iterdir())
    full = jpeft.combine(params, adapter)
    for given, error, message in (
        ((params, x), TypeError, r"adapter must be a tree, .* an array of shape \(1, 4\); was the adapter left out\?"),
        ((adapter, x), TypeError, r"adapter must be a tree, .* an array of shape \(1, 4\); was params left out\?"),
        ((x, adapter), TypeError, r"params must be a tree, as from model.init, got an array of shape \(1, 4\)"),
        ((params, None, x), TypeError, "adapter must be a tree, as from peft.init, got a NoneType"),
        ((params, full, x), ValueError, r"holds the base's leaves too; give it alone: peft.split\(full\)"),
        (
            (params, {"x": x}),
            ValueError,
            f"lacks 'layers_.*' and all other leaves of this {name}; it has 'x'",
        ),
    ):
        with pytest.raises(error, match=message):
            peft.apply(*given)
    assert peft.apply(params, adapter, x).shape == (1, 2)


def test_the_adapter_of_another_peft_is_told_and_nothing_of_the_checks_is_in_a_program():
    peft, _, params, x = bound("dense", "plain", "LoRA")
    other = contract.bound(METHODS["IA3"], "dense", "plain")[0]
    with pytest.raises(ValueError, match=r"and all other leaves of this LoRA; it has .*: is it another Peft's\?"):
        peft.merge(params, moved(other, params))
    with pytest.raises(TypeError, match=r"the adapter must be a tree, as from peft.init, got an array"):
        peft.check(x)
    adapter = moved(peft, params)
    run = lambda p, a: peft.frontend.run(peft, p, a, (x,), {})  # noqa: E731
    assert str(jax.make_jaxpr(run)(params, adapter)) == str(
        jax.make_jaxpr(lambda p, a: peft.apply(p, a, x))(params, adapter)
    )


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


@pytest.mark.parametrize("use", ["conv 2-D grouped", "dense_general, batch", "einsum, experts"])
def test_an_output_has_no_batch_axes_where_its_weight_has(use):
    method = jpeft.Bottleneck(size=2, targets=r".*/op")
    contract.check_learns({"Bottleneck": Entry(lambda _: method, (use,))}, use, "plain")
