"""The training step: what it changes, what it keeps, and that a sharded step equals an unsharded one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jpeft
from jpeft.core.peft import adapter_shardings
from jpeft.core.tree import flatten, join, map_with_path, size_bytes
from jpeft.training.optimizers.lora_plus import lora_plus

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        heads = nn.DenseGeneral((4, 4), name="query")(x)
        x = x + nn.DenseGeneral(16, axis=(-2, -1), name="out")(heads)
        return x + nn.relu(nn.Dense(16, name="up")(x)), None


class Model(nn.Module):
    layers: int = 2

    @nn.compact
    def __call__(self, x):
        block = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
        x, _ = block(name="layers")(x, None)
        return nn.Dense(5, name="head")(x)


METHOD = jpeft.Chain(
    jpeft.LoRA(rank=2, targets="all-linear", init_weights="random"),
    jpeft.IA3(targets=["query"]),
    jpeft.BitFit(targets=r".*/up/.*"),
    jpeft.Train("head"),
)


@pytest.fixture(scope="module")
def setup():
    model = Model()
    batch = {
        # 16 examples, so that each of 4 shards has more than one of a micro-batch of two. With one, XLA's CPU
        # partitioner computes wrong numbers for a plain row-parallel matmul (jax 0.10.2 and 0.12.0, without jpeft).
        "x": jax.random.normal(jax.random.key(0), (16, 6, 16)),
        "y": jax.random.randint(jax.random.key(1), (16, 6), 0, 5),
    }
    params = jax.jit(model.init)(jax.random.key(2), batch["x"])["params"]
    peft = METHOD.bind(model, params, batch["x"])

    def loss_fn(adapter, params, batch, rng):
        logits = peft.apply(params, adapter, batch["x"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
        return loss, {"accuracy": (logits.argmax(-1) == batch["y"]).mean()}

    return peft, params, batch, loss_fn


def run(setup, tx, steps=3, params=None, batch=None, **options):
    peft, base, data, loss_fn = setup
    params, batch = base if params is None else params, data if batch is None else batch
    adapter = peft.init(jax.random.key(3), params)
    state = jpeft.TrainState.create(peft, adapter, tx, jax.random.key(4))
    step = jpeft.train_step(peft, loss_fn, tx, **options)
    for _ in range(steps):
        state, metrics = step(state, params, batch)
    return state, metrics, adapter, step


@pytest.fixture(scope="module")
def gradient(setup):
    """The gradient of the loss for an adapter, compiled once."""
    _, params, batch, loss_fn = setup
    return jax.jit(jax.grad(lambda adapter: loss_fn(adapter, params, batch, None)[0]))


@pytest.fixture(scope="module")
def base_before(setup):
    """A copy of the base, made before any training step of `with_adam`."""
    _, params, _, _ = setup
    return jax.tree.map(np.array, params)


@pytest.fixture(scope="module")
def with_adam(setup, base_before):
    return run(setup, optax.adam(1e-2))


@pytest.fixture(scope="module")
def with_sgd(setup):
    return run(setup, optax.sgd(0.1))


def assert_close(a, b, tolerance=1e-5):
    for (path, x), y in zip(flatten(a).items(), flatten(b).values(), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance, err_msg=join(path))


def test_every_adapter_leaf_trains_and_the_base_stays_bit_identical(setup, base_before, with_adam):
    _, params, _, _ = setup
    state, metrics, adapter, step = with_adam
    for path, leaf in flatten(state.adapter).items():
        assert not np.array_equal(leaf, flatten(adapter)[path]), join(path)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (base_before, params)), strict=True))
    assert int(state.step) == 3 and set(metrics) == {"loss", "grad_norm", "skipped", "accuracy"}
    assert step.compiled == 1  # no recompilation across steps


def test_the_step_is_the_optimizer_on_the_gradient_of_the_adapter(setup, gradient):
    peft, params, _, _ = setup
    tx = optax.adamw(1e-2)
    adapter = peft.init(jax.random.key(3), params)
    opt_state, update = tx.init(adapter), jax.jit(tx.update)
    for _ in range(3):
        updates, opt_state = update(gradient(adapter), opt_state, adapter)
        adapter = optax.apply_updates(adapter, updates)
    assert_close(run(setup, tx)[0].adapter, adapter)


def test_a_masked_optimizer_for_the_full_tree_also_takes_the_adapter_alone(setup, with_adam):
    peft, params, _, _ = setup
    full = jpeft.combine(params, peft.init(jax.random.key(3), params))
    masked = jpeft.masked(optax.adam(1e-2), peft.labels(full))
    assert_close(run(setup, masked)[0].adapter, with_adam[0].adapter, 0)
    held = sum(x.size for x in jax.tree.leaves(jax.eval_shape(masked.init, full)))
    trainable = sum(np.prod(shape, dtype=int) for _, (shape, _) in peft.structure)
    assert held == 2 * trainable + 1  # mu, nu and a count; nothing for the base


def test_accumulated_micro_batches_equal_the_whole_batch(setup, with_sgd):
    whole, m, _, _ = with_sgd
    parts, n, _, _ = run(setup, optax.sgd(0.1), accumulate=4)
    assert_close(parts.adapter, whole.adapter)
    assert n["loss"] == pytest.approx(float(m["loss"]), rel=1e-5) and n["accuracy"] == pytest.approx(
        float(m["accuracy"])
    )
    with pytest.raises(ValueError, match="accumulate=3 does not divide"):
        run(setup, optax.sgd(0.1), accumulate=3)


def test_clipping_is_by_the_norm_of_the_trainable_leaves(setup, gradient):
    peft, params, _, _ = setup
    norm = optax.tree.norm(gradient(peft.init(jax.random.key(3), params)))
    state, metrics, before, _ = run(setup, optax.sgd(1.0), steps=1, clip=0.5)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, state.adapter, before))
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5) and norm > 0.5
    assert moved == pytest.approx(0.5, rel=1e-3)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(setup):
    peft, params, batch, loss_fn = setup
    tx = optax.adam(1e-2)
    state = jpeft.TrainState.create(peft, peft.init(jax.random.key(3), params), tx, jax.random.key(4))
    step = jpeft.train_step(peft, loss_fn, tx, donate=False)
    bad = {**batch, "x": batch["x"].at[0, 0, 0].set(jnp.nan)}
    after, metrics = step(state, params, bad)
    assert int(metrics["skipped"]) == int(after.skipped) == 1 and int(after.step) == 1
    assert_close(after.adapter, state.adapter, 0)
    assert all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (after.opt_state, state.opt_state)), strict=True)
    )
    good, metrics = step(after, params, batch)
    assert np.isfinite(metrics["loss"]) and int(good.skipped) == 1


def test_donation_deletes_the_state_but_not_the_adapter_the_base_or_the_key_it_was_made_from(setup):
    peft, params, batch, loss_fn = setup
    adapter, key, tx = peft.init(jax.random.key(3), params), jax.random.key(4), optax.adam(1e-2)
    state = jpeft.TrainState.create(peft, adapter, tx, key)
    jpeft.train_step(peft, loss_fn, tx)(state, params, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.adapter))
    for kept in (adapter, params, key):
        assert not any(x.is_deleted() for x in jax.tree.leaves(kept))


def test_mixed_precision_computes_in_bfloat16_and_keeps_the_adapter_in_float32(setup, with_sgd):
    peft, params, batch, _ = setup
    seen = {}

    def loss_fn(adapter, params, batch, rng):
        seen["dtype"] = jax.tree.leaves(params)[0].dtype
        logits = peft.apply(params, adapter, batch["x"].astype(jnp.bfloat16))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), {}

    low, m, _, _ = run((peft, params, batch, loss_fn), optax.sgd(0.1), compute_dtype=jnp.bfloat16)
    _, n, _, _ = with_sgd
    assert seen["dtype"] == jnp.bfloat16
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(low.adapter))
    assert float(m["loss"]) == pytest.approx(float(n["loss"]), rel=0.03) and m["loss"].dtype == jnp.float32


def test_the_rng_differs_by_step_and_is_reproducible(setup):
    peft, params, batch, _ = setup

    def loss_fn(adapter, params, batch, rng):
        return sum(x.sum() for x in jax.tree.leaves(adapter)) * 0.0, {"draw": jax.random.uniform(rng)}

    tx = optax.sgd(0.1)
    step = jpeft.train_step(peft, loss_fn, tx)

    def draws():
        state = jpeft.TrainState.create(peft, peft.init(jax.random.key(3), params), tx, jax.random.key(4))
        state, first = step(state, params, batch)
        return first["draw"], step(state, params, batch)[1]["draw"]

    runs = draws(), draws()
    assert runs[0] == runs[1] and runs[0][0] != runs[0][1]


def test_lora_plus_is_a_higher_learning_rate_for_b(setup):
    tx = optax.chain(optax.adamw(1e-3), lora_plus(8.0))
    fast = optax.multi_transform(
        {"a": optax.adamw(1e-3), "b": optax.adamw(8e-3)},
        lambda tree: map_with_path(lambda p, _: "b" if p[-1] == "lora_b" else "a", tree),
    )
    assert_close(run(setup, tx)[0].adapter, run(setup, fast)[0].adapter, 1e-6)


def test_a_loss_must_be_a_scalar_in_a_pair(setup):
    peft, params, batch, _ = setup
    for fn, message in [(lambda *_: jnp.ones(3), "must return"), (lambda *_: (jnp.ones(3), {}), "must be a scalar")]:
        with pytest.raises((TypeError, ValueError), match=message):
            run((peft, params, batch, fn), optax.sgd(0.1))


class Scanned(nn.Module):
    """Two dense layers in a scan, whose gradient is a stack of zeros where nothing depends on a leaf."""

    @nn.compact
    def __call__(self, x):
        body = nn.scan(ScannedDense, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return body(name="layers")(x, None)[0]


class ScannedDense(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(4, name="up")(x)), None


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("model", [nn.Sequential([nn.Dense(4), nn.Dense(4)]), Scanned()], ids=["plain", "scanned"])
def test_a_loss_that_does_not_depend_on_the_adapter_raises(model, accumulate):
    x = jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)["params"]
    peft = jpeft.LoRA(rank=2, targets="all-linear").bind(model, params, x)
    state = jpeft.TrainState.create(peft, peft.init(jax.random.key(1), params), optax.sgd(1.0), jax.random.key(2))

    def without(adapter, params, batch, rng):
        y = model.apply({"params": jpeft.combine(params, adapter)}, batch)
        return y.mean(), {"norm": optax.tree.norm(adapter)}  # a metric alone trains nothing

    def intercepted(adapter, params, batch, rng):
        with peft.intercept():
            return without(adapter, params, batch, rng)

    def merged(adapter, params, batch, rng):
        return model.apply({"params": peft.merge(params, adapter)}, batch).mean(), {}

    step = jpeft.train_step(peft, without, optax.sgd(1.0), accumulate=accumulate, donate=False)
    with pytest.raises(ValueError, match=r"loss_fn does not depend on the adapter.*call peft\.apply.*peft\.intercept"):
        step(state, params, x)
    for loss_fn in (intercepted, merged):
        jpeft.train_step(peft, loss_fn, optax.sgd(1.0), accumulate=accumulate).lower(state, params, x)


def test_leaves_that_the_loss_does_not_depend_on_are_told(setup):
    peft, params, batch, loss_fn = setup
    adapter = jax.eval_shape(lambda: peft.init(jax.random.key(1), params))

    def without_head(adapter, params, batch, rng):
        return loss_fn(jpeft.combine(adapter, {"head": params["head"]}), params, batch, rng)

    state = jpeft.TrainState.create(peft, adapter, optax.sgd(1.0), jax.random.key(2))
    with pytest.warns(UserWarning, match=r"does not depend on 2 of the \d+ leaves that train.*: first 'head/bias'"):
        jpeft.train_step(peft, without_head, optax.sgd(1.0)).lower(state, params, batch)


def test_invalid_options_raise(setup):
    peft, params, batch, loss = setup
    for clip in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="clip must be a positive number"):
            jpeft.train_step(peft, loss, optax.sgd(0.1), clip=clip)
    with pytest.raises(ValueError, match="accumulate must be at least 1"):
        jpeft.train_step(peft, loss, optax.sgd(0.1), accumulate=0)
    with pytest.raises(ValueError, match="metric called 'grad_norm', which is the step's own"):
        run((peft, params, batch, lambda *args: (loss(*args)[0], {"grad_norm": 0.0})), optax.sgd(0.1))
    with pytest.raises(ValueError, match="splits every leaf of the batch along its leading axis, and one is a scalar"):
        run((peft, params, {**batch, "temperature": jnp.float32(1)}, loss), optax.sgd(0.1), accumulate=2)
    with pytest.raises(TypeError, match="rng must be a PRNG key"):
        jpeft.TrainState.create(peft, peft.init(jax.random.key(0), params), optax.sgd(0.1), 1)


SPECS = {
    "query/kernel": (None, "fsdp", "tensor"),
    "query/bias": (None, "tensor"),
    "out/kernel": (None, "tensor", None, "fsdp"),
    "up/kernel": (None, "fsdp", "tensor"),
    "up/bias": (None, "tensor"),
    "head/kernel": ("fsdp", "tensor"),
}


def test_sharded_step_equals_single_device_and_shards_adapter_and_optimizer(setup):
    peft, params, batch, _ = setup
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))

    def place(x, spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    # 5 classes do not divide by 2: the head is sharded by its inputs alone.
    specs = SPECS | {"head/kernel": ("fsdp",)}
    sharded = map_with_path(lambda p, x: place(x, specs.get("/".join(p[-2:]), ())), params)
    data = jax.tree.map(lambda x: place(x, (("data", "fsdp"),)), batch)

    tx = optax.adam(1e-2, eps=1e-2)  # a tiny eps would make the sign of rounding errors count
    alone, m, _, _ = run(setup, tx, accumulate=2)
    peft, _, _, loss_fn = setup
    traces = []

    def counted(*args):
        traces.append(len(traces))
        return loss_fn(*args)

    state, n, adapter, _ = run((peft, params, batch, counted), tx, params=sharded, batch=data, accumulate=2)
    assert_close(state.adapter, alone.adapter)
    assert float(n["loss"]) == pytest.approx(float(m["loss"]), rel=1e-5)
    assert float(n["grad_norm"]) == pytest.approx(float(m["grad_norm"]), rel=1e-4)
    assert len(traces) == 2  # shapes and the scan over micro-batches, both in the first step

    expected = {
        "layers/query/lora_a": (None, "fsdp"),
        "layers/query/lora_b": (None, None, "tensor"),
        "layers/query/ia3_out": (None, "tensor"),
        "layers/out/lora_a": (None, "tensor"),
        "layers/out/lora_b": (None, None, "fsdp"),
        "layers/up/bias": (None, "tensor"),
        "head/kernel": ("fsdp",),
    }
    planned = flatten(adapter_shardings(peft, sharded))
    for tree in (adapter, state.adapter, state.opt_state[0].mu, state.opt_state[0].nu):
        for path, leaf in flatten(tree).items():
            spec = NamedSharding(mesh, PartitionSpec(*expected.get(join(path), ())))
            if join(path) in expected:
                assert leaf.sharding.is_equivalent_to(spec, leaf.ndim), (join(path), leaf.sharding)
            assert leaf.sharding.is_equivalent_to(planned[path], leaf.ndim), join(path)


def test_abstract_params_give_an_abstract_state_that_lowers(setup):
    peft, params, batch, loss_fn = setup
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    tx = optax.adam(1e-2)
    state = jpeft.TrainState.create(peft, peft.init(jax.random.key(0), shapes), tx, jax.random.key(1))
    lowered = jpeft.train_step(peft, loss_fn, tx).lower(state, shapes, batch)
    assert lowered.compile().memory_analysis() is not None


def test_gradient_and_optimizer_bytes_scale_with_the_adapter(setup):
    _, params, batch, _ = setup
    shapes = jax.eval_shape(lambda: params)
    for rank in (1, 4):
        peft = jpeft.LoRA(rank=rank).bind(Model(), shapes, batch["x"])
        adapter = peft.init(jax.random.key(0), shapes)
        state = jpeft.TrainState.create(peft, adapter, optax.adam(1e-2), jax.random.key(1))
        assert size_bytes(state.opt_state) == 2 * size_bytes(adapter) + 4
