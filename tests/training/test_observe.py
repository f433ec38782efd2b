"""Statistics of data: the inputs of weights and the gradients of a loss, against what JAX itself gives."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jpeft
from jpeft.core.tree import flatten
from jpeft.methods import WeightMethod
from tests.contract import close
from tests.zoo import USES, Model, numbers, parameters

IDS = jnp.array([[3, 5, 7, 2], [4, 1, 0, 0]])
MASK = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]])


@dataclass(frozen=True, kw_only=True)
class FromInputs(WeightMethod):
    """A method whose leaf is what was observed."""

    observes: ClassVar[str | None] = "covariance"

    def init(self, key: Any, site: Any, w: Any, statistics: Any) -> Any:
        return dict(statistics)

    def merge(self, leaves: Any, w: Any, b: Any) -> Any:
        return w, b


@dataclass(frozen=True, kw_only=True)
class FromGradient(FromInputs):
    observes: ClassVar[str | None] = "gradient"


def setting(use, mode="plain", dtype="float32"):
    """``(model, params, x, loss_fn)``; the loss weighs outputs differently, so that gradients say something."""
    case = USES[use]
    model, x = Model(case.op(jnp.dtype(dtype)), mode), case.input(jnp.dtype(dtype))
    params = parameters(model, x)

    def loss_fn(adapter, params, batch, rng):
        y = model.apply({"params": params}, batch)
        return jnp.sin(y.astype(jnp.float32)).mean(), {}

    return model, params, x, loss_fn


@pytest.mark.parametrize(("use", "mode"), [("dense", "scan"), ("raw", "plain"), ("einsum, experts", "remat")])
def test_a_gradient_is_that_of_the_weight(use, mode):
    model, params, x, loss_fn = setting(use, mode)
    method = FromGradient(targets=USES[use].targets)
    found = jpeft.observe(method, model, params, loss_fn, [x, 2 * x])
    peft = method.bind(model, params, x)
    want = [flatten(jax.grad(lambda p, b=b: loss_fn({}, p, b, None)[0])(params)) for b in (x, 2 * x)]
    for site in peft.sites:
        mean = (want[0][site.weight_path] + want[1][site.weight_path]) / 2
        close(found[site.name]["gradient"].reshape(mean.shape), mean)
    adapter = peft.init(jax.random.key(0), params, statistics=found)
    assert {x.shape for x in flatten(adapter).values()} == {found[s.name]["gradient"].shape for s in peft.sites}


class Layers(nn.Module):
    """Scanned layers that store their inputs too."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            dtype: Any

            @nn.compact
            def __call__(self, x, _):
                self.sow("intermediates", "x", x)
                return nn.tanh(nn.Dense(4, name="op", dtype=self.dtype)(x)) + x, None

        kind = nn.scan(Layer, variable_axes={"params": 0, "intermediates": 0}, split_rngs={"params": True}, length=3)
        return kind(self.dtype, name="layers")(x, None)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_covariance_is_that_of_the_inputs_in_float32(dtype):
    model, x = Layers(jnp.dtype(dtype)), 0.1 * jax.random.normal(jax.random.key(0), (5, 6, 4)).astype(dtype)
    params = parameters(model, x)
    _, state = model.apply({"params": params}, x, mutable=["intermediates"])
    rows = np.asarray(state["intermediates"]["layers"]["x"][0], np.float64).reshape(3, -1, 4)
    method = FromInputs(targets=["op"])
    peft = method.bind(model, params, x)

    def loss_fn(adapter, params, batch, rng):
        return (peft.apply(params, adapter, batch).astype(jnp.float32) ** 2).mean(), {}

    found = jpeft.observe(method, model, params, loss_fn, [x, x])["layers/op"]["covariance"]
    assert found.dtype == jnp.float32
    close(found, np.einsum("lni,lnj->lij", rows, rows) / rows.shape[1])


@pytest.mark.parametrize("kind", [FromInputs, FromGradient])
def test_layers_that_the_method_does_not_act_on_and_stacks_along_another_axis(kind):
    """The statistics are those of all layers, in front, and a start takes those of its own layer."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(4, name="op")(x)) + x, None

    class Stack(nn.Module):
        axis: int

        @nn.compact
        def __call__(self, x):
            kind = nn.scan(Layer, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3)
            return kind(name="layers")(x, None)[0]

    def observed(model, params, **fields):
        method = kind(targets=["op"], **fields)
        found = jpeft.observe(
            method, model, params, lambda a, p, b, r: ((model.apply({"params": p}, b) ** 2).mean(), {}), [x]
        )
        return method, found

    x = jax.random.normal(jax.random.key(0), (5, 4))
    params = parameters(Stack(0), x)
    _, want = observed(Stack(0), params)
    moved = jax.tree.map(lambda w: jnp.moveaxis(w, 0, 1), params)
    method, found = observed(Stack(1), moved, overrides={"op": {"layers": [0, 2]}})
    statistic = found["layers/op"][method.observes]
    close(statistic, want["layers/op"][method.observes])
    peft = method.bind(Stack(1), moved, x)
    adapter = peft.init(jax.random.key(0), moved, statistics=found)
    jitted = jax.jit(lambda params: peft.init(jax.random.key(0), params, statistics=observed(Stack(1), params)[1]))
    close(jitted(moved)["layers"]["op"][method.observes], adapter["layers"]["op"][method.observes])
    close(jnp.moveaxis(adapter["layers"]["op"][method.observes], 1, 0), statistic)


def test_padding_does_not_count():
    from jpeft.models.bert import Bert, BertConfig

    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = Bert(config)
    params = parameters(model, IDS, MASK)

    def loss_fn(adapter, params, batch, rng):
        states = model.apply({"params": params}, *batch)
        return jnp.where(batch[1][..., None] == 1, states**2, 0.0).sum(), {}

    method = FromInputs(targets=["query"])
    whole = jpeft.observe(method, model, params, loss_fn, [(IDS, MASK)])
    rows = [jpeft.observe(method, model, params, loss_fn, [(ids, mask)]) for ids, mask in (
        (IDS[:1], MASK[:1]), (IDS[1:, :2], MASK[1:, :2]),
    )]  # fmt: skip
    for name, own in whole.items():
        close(own["covariance"], (4 * rows[0][name]["covariance"] + 2 * rows[1][name]["covariance"]) / 6)


def test_a_quantized_base_and_a_mesh_give_the_same():
    model, params, x, loss_fn = setting("dense", "scan")
    x = jnp.concatenate([x, -x], axis=0)
    method = FromInputs(targets=USES["dense"].targets)
    want = jpeft.observe(method, model, params, loss_fn, [x])
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jpeft.shard(params, mesh, [(".*kernel", PartitionSpec(None, None, "fsdp"))])
    batch = jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp")))
    (name,) = want
    close(jpeft.observe(method, model, sharded, loss_fn, [batch])[name]["covariance"], want[name]["covariance"])
    codes = jpeft.quantize(params, "int8", block=2)
    found = jpeft.observe(method, model, codes, loss_fn, [x])
    close(found[name]["covariance"], want[name]["covariance"], 0.02)
    peft = method.bind(model, codes, x)
    peft.init(jax.random.key(0), codes, statistics=want)  # of the same weights, before they were quantized


def test_what_cannot_be_observed_is_told():
    model, params, x, loss_fn = setting("dense")
    targets = USES["dense"].targets
    method = FromInputs(targets=targets)
    peft = method.bind(model, params, x)
    found = jpeft.observe(method, model, params, loss_fn, [x])
    (name,) = found
    with pytest.raises(ValueError, match="starts from data; give init what was observed"):
        peft.init(jax.random.key(0), params)
    with pytest.raises(ValueError, match=f"the statistics lack '{name}'"):
        peft.init(jax.random.key(0), params, statistics={"other": {}})
    for junk in ({name: 3}, [found]):
        with pytest.raises(TypeError, match=r"statistics must be those that jpeft\.observe returned"):
            peft.init(jax.random.key(0), params, statistics=junk)
    with pytest.raises(ValueError, match="hold covariance, FromGradient needs gradient"):
        FromGradient(targets=targets).bind(model, params, x).init(jax.random.key(0), params, statistics=found)
    with pytest.raises(ValueError, match=r"has shape \(3, 3\), expected \(4, 4\); it is of another model"):
        peft.init(jax.random.key(0), params, statistics={name: {"covariance": jnp.eye(3)}})
    with pytest.raises(ValueError, match="were observed on another weight"):
        peft.init(jax.random.key(0), jax.tree.map(lambda w: w + 1, params), statistics=found)
    with pytest.raises(ValueError, match="batches is empty"):
        jpeft.observe(method, model, params, loss_fn, [])
    with pytest.raises(ValueError, match="LoRA starts without data"):
        jpeft.observe(jpeft.LoRA(targets=targets), model, params, loss_fn, [x])
    with pytest.raises(ValueError, match="loss_fn does not call Model"):
        jpeft.observe(method, model, params, lambda a, p, b, r: (b.sum(), {}), [x])
    with pytest.raises(ValueError, match="the loss does not depend on the output"):
        jpeft.observe(method, model, params, lambda *a: (0 * loss_fn(*a)[0], {}), [x])
    table, table_params, ids, table_loss = setting("embed")
    with pytest.raises(ValueError, match="it is an embedding table; leave it out with exclude"):
        jpeft.observe(replace(method, targets=r".*/op"), table, table_params, table_loss, [ids])


def wide(dtype="float32"):
    """``(model, params, x, loss_fn)`` where inputs and gradients have few directions that matter."""
    model = nn.Dense(40)
    x = numbers(jax.ShapeDtypeStruct((64, 3), jnp.float32)) @ numbers(jax.ShapeDtypeStruct((3, 48), jnp.float32))
    params = parameters(model, x)

    def loss_fn(adapter, params, batch, rng):
        y = model.apply({"params": params}, batch)
        return (y**2).mean(), {}

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(40, name="op")(x)

    model = Net()
    return model, {"op": params}, x, loss_fn


@pytest.mark.parametrize("kind", [FromInputs, FromGradient])
def test_a_sketch_of_a_wide_weight_tells_the_directions_that_matter(kind):
    model, params, x, loss_fn = wide()
    method = kind(targets="op")
    want = jpeft.observe(method, model, params, loss_fn, [x])["op"][method.observes]
    found = jpeft.observe(method, model, params, loss_fn, [x], widest=16, columns=12)["op"][method.observes]
    assert found.shape == want.shape and found.left.shape == (48, 12)
    close(found.dense(), want, 1e-4)
    peft = jpeft.LoRA(rank=3, init_weights="eva", targets="op").bind(model, params, x)
    if kind is FromInputs:
        starts = [peft.init(jax.random.key(0), params, statistics={"op": {"covariance": c}}) for c in (want, found)]
        planes = [np.linalg.qr(start["op"]["lora_a"])[0] for start in starts]
        np.testing.assert_allclose(np.linalg.svd(planes[0].T @ planes[1])[1], 1, atol=1e-4)
