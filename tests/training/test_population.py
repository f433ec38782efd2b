"""A population: each member is trained as its own run would train it, in one program over one base."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

import jpeft
from jpeft.core.tree import flatten, join, size_bytes
from jpeft.training import checkpoint
from jpeft.training.optimizers import allocate_ranks, lora_fa, riemannian

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compiles_of_module")

TARGETS = "up|down"


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = x + nn.Dense(16, name="down")(nn.relu(nn.Dense(24, name="up")(x)))
        return nn.Dense(5, name="head")(x)


MODEL, X = Model(), jax.random.normal(jax.random.key(0), (16, 12, 16))
BATCH = {"x": X[0], "y": jax.random.randint(jax.random.key(1), (12,), 0, 5)}


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(2), X[0])["params"]


def member(rank=2, learning_rate=0.1, seed=0, method=jpeft.LoRA, **fields):
    return jpeft.Member(method(rank=rank, targets=TARGETS, **fields), learning_rate=learning_rate, seed=seed)


DIFFERENT = (
    member(2, 0.1, 0, alpha=4),
    member(4, 0.05, 1),
    member(4, 0.02, 0, alpha=16, rslora=True),
    member(1, 0.2, 3, alpha=1),
)


def population_of(params, members=DIFFERENT, **options):
    return jpeft.Population(MODEL, params, X[0], members, **options)


def loss_with(peft):
    def loss_fn(adapter, params, batch, rng):
        logits = peft.apply(params, adapter, batch["x"], rngs={"dropout": rng}, train=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
        return loss, {"accuracy": (logits.argmax(-1) == batch["y"]).mean()}

    return loss_fn


def batches(n, first=0):
    """A batch for each member, of its own data."""
    return {"x": X[first : first + n], "y": jnp.stack([jnp.roll(BATCH["y"], i + first) for i in range(n)])}


def of(batches, i):
    return jax.tree.map(lambda x: x[i], batches)


def one(member, peft, params, tx, batch, steps, state=None, **options):
    """A member's own run, without a population."""
    key, rng = member.keys()
    if state is None:
        state = jpeft.TrainState.create(peft, peft.init(key, params), tx, rng)
    step = jpeft.train_step(peft, loss_with(peft), tx, **options)
    for _ in range(steps):
        state, metrics = step(state, params, batch)
    return state, metrics


def trained(population, params, tx, own, steps, state=None, step=None, **options):
    state = population.init(tx, params) if state is None else state
    losses = [loss_with(peft) for peft in population.pefts]
    step = step or jpeft.population_step(population, losses, tx, **options)
    for _ in range(steps):
        state, metrics = step(state, params, own)
    return state, metrics, step


def close(got, want, tolerance=1e-5):
    got, want = flatten(got), flatten(want)
    assert got.keys() == want.keys()
    for path, leaf in want.items():
        np.testing.assert_allclose(got[path], leaf, rtol=0, atol=tolerance, err_msg=join(path))


def same(a, b):
    """Bit for bit, NaN included."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = (jax.random.key_data(z) if jnp.issubdtype(z.dtype, jax.dtypes.prng_key) else z for z in (x, y))
        np.testing.assert_array_equal(x, y)


def bits(population, state, i):
    program, place = state.place(i)
    group = state.groups[program]
    return jax.tree.map(lambda x: x[place], (group.train, group.active))


# --- a member's run is its own ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_sgd(params):
    population, own = population_of(params), batches(4)
    return population, own, *trained(population, params, optax.sgd, own, 50, clip=1.0)


def test_members_of_all_ranks_scales_rates_and_seeds_equal_their_own_runs_after_50_steps(params, with_sgd):
    population, own, state, metrics, step = with_sgd
    assert step.compiled == 1 and set(metrics) == {"loss", "accuracy", "grad_norm", "skipped"}
    for i, each in enumerate(DIFFERENT):
        alone, m = one(each, population.own[i], params, optax.sgd(each.learning_rate), of(own, i), 50, clip=1.0)
        peft, adapter = population.member(state, i)
        assert peft.method == each.method
        close(adapter, alone.adapter)
        for name, values in metrics.items():
            assert values.shape == (4,) and values[i] == pytest.approx(float(m[name]), rel=1e-4, abs=1e-6), name


def test_other_rates_seeds_and_scales_compile_nothing(params, with_sgd):
    *_, step = with_sgd
    others = [member(4, 0.3, 9), member(3, 0.1, 8, alpha=32), member(1, 0.0, 7), member(2, 0.01, 6)]
    population = population_of(params, others)
    state, metrics, _ = trained(population, params, optax.sgd, batches(4), 1, step=step)
    assert step.compiled == 1 and np.isfinite(metrics["loss"]).all()
    key, _ = others[2].keys()
    same(population.member(state, 2)[1], population.own[2].init(key, params))  # a rate of 0.0


def test_adamw_with_decay_and_clipping_equals_own_runs_and_leaves_the_padding_zero(params):
    tx, own = lambda rate: optax.adamw(rate, weight_decay=0.1), batches(4)
    population = population_of(params)
    state, metrics, _ = trained(population, params, tx, own, 50, clip=0.5)
    for i in (0, 3):
        each = DIFFERENT[i]
        _, m = one(each, population.own[i], params, tx(each.learning_rate), of(own, i), 50, clip=0.5)
        assert metrics["loss"][i] == pytest.approx(float(m["loss"]), rel=1e-2, abs=1e-5)
    for path, leaf in flatten(state.groups[0].train.adapter).items():
        beyond = leaf[3, :, 1:] if path[-1] == "lora_a" else leaf[3, 1:]  # of the member of rank 1
        assert not beyond.any() and leaf[1].any(), join(path)


def test_each_member_has_its_own_dropout(params):
    members = [member(2, 0.1, seed, dropout=0.5) for seed in (0, 0, 1)]
    population, own = population_of(params, members), jax.tree.map(lambda x: jnp.stack([x] * 3), BATCH)
    state, metrics, _ = trained(population, params, optax.sgd, own, 3)
    a, b, c = (population.member(state, i)[1] for i in range(3))
    same(a, b)  # the same seed
    assert metrics["loss"][0] != metrics["loss"][2]
    alone, _ = one(members[2], population.own[2], params, optax.sgd(0.1), BATCH, 3)
    close(c, alone.adapter)


def test_methods_that_differ_have_programs_of_their_own(params):
    members = [
        member(2, 0.1),
        jpeft.Member(jpeft.IA3(targets=TARGETS), learning_rate=0.1),
        member(4, 0.1, alpha=2),
        member(2, 0.1, dropout=0.1),
        jpeft.Member(jpeft.LoRA(rank=2, targets="up"), learning_rate=0.1),
        member(2, 0.1, method=jpeft.AdaLoRA),
        member(2, 0.1, method=jpeft.AdaLoRA, seed=1),
    ]
    population, own = population_of(params, members), batches(7)
    assert population.programs == (0, 1, 0, 2, 3, 4, 4)
    state, metrics, step = trained(population, params, optax.sgd, own, 5)
    assert step.compiled == 5
    assert np.isnan(metrics["penalty"]).tolist() == [True] * 5 + [False] * 2  # only AdaLoRA has one
    for i in (1, 2, 3, 6):
        alone, m = one(members[i], population.own[i], params, optax.sgd(0.1), of(own, i), 5)
        close(population.member(state, i)[1], alone.adapter)
        assert metrics["loss"][i] == pytest.approx(float(m["loss"]), rel=1e-5)
    with pytest.raises(ValueError, match=r"5 programs \(LoRA, IA3, .* make one loss function for each"):
        _ = population.peft
    with pytest.raises(ValueError, match=r"5 programs .* give a list"):
        jpeft.population_step(population, loss_with(population.pefts[0]), optax.sgd)
    with pytest.raises(ValueError, match="loss_fn has 1 entries, and the population 5 programs"):
        jpeft.population_step(population, [loss_with(population.pefts[0])], optax.sgd)
    state, left = population.keep(state, best=2, by=[3, 1, 0, 9, 9, 9, 9])  # the others' programs have no member left
    assert left.origins == (2, 1)
    _, metrics, _ = trained(left, params, optax.sgd, batches(2), 1, state, step)
    assert metrics["loss"].shape == (2,)


def test_a_bottleneck_of_a_smaller_size_trains_as_alone_where_its_activation_of_0_is_not_0(params):
    bottleneck = jpeft.Bottleneck
    members = [
        jpeft.Member(bottleneck(size=size, activation="sigmoid", targets=["up", "down"]), learning_rate=0.3, seed=size)
        for size in (3, 8)
    ]
    population, own = population_of(params, members), batches(2)
    assert population.programs == (0, 0)
    state, _, _ = trained(population, params, optax.sgd, own, 20)
    alone, _ = one(members[0], population.own[0], params, optax.sgd(0.3), of(own, 0), 20)
    close(population.member(state, 0)[1], alone.adapter)


def test_one_shared_batch_is_as_many_equal_ones(params):
    population = population_of(params)
    repeated = jax.tree.map(lambda x: jnp.stack([x] * 4), BATCH)
    shared, m, _ = trained(population, params, optax.sgd, BATCH, 3, shared=True)
    own, n, _ = trained(population, params, optax.sgd, repeated, 3)
    for i in range(4):
        close(population.member(shared, i)[1], population.member(own, i)[1], 1e-6)
    np.testing.assert_allclose(m["loss"], n["loss"], rtol=1e-6)
    with pytest.raises(ValueError, match=r"\['x'\] has shape \(12, 16\): expected a first axis of 4"):
        trained(population, params, optax.sgd, BATCH, 1)


def test_micro_batches_are_of_each_members_own_batch(params):
    population, own = population_of(params), batches(4)
    parts, _, _ = trained(population, params, optax.sgd, own, 3, accumulate=3)
    whole, _, _ = trained(population, params, optax.sgd, own, 3)
    close(population.member(parts, 0)[1], population.member(whole, 0)[1])


@pytest.mark.parametrize("tx", ["injected", "chained", "riemannian"])
def test_learning_rates_may_be_injected(params, tx):
    population, own = population_of(params), batches(4)
    inject = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
    made = {
        "injected": (inject, optax.sgd),
        "chained": (optax.chain(optax.clip(0.01), inject), lambda rate: optax.chain(optax.clip(0.01), optax.sgd(rate))),
        "riemannian": (
            lambda rate: optax.chain(riemannian(population.peft, 1.0), optax.sgd(rate)),
            lambda rate: optax.chain(riemannian(population.own[0], 1.0), optax.sgd(rate)),
        ),
    }
    whole, alone = made[tx]
    state, _, _ = trained(population, params, whole, own, 5)
    wanted, _ = one(DIFFERENT[0], population.own[0], params, alone(0.1), of(own, 0), 5)
    close(population.member(state, 0)[1], wanted.adapter)


def test_a_schedule_is_a_function_of_the_rate(params):
    def tx(rate):
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, 2, 6)
        return optax.adam(lambda count: rate * schedule(count))

    population, own = population_of(params), batches(4)
    _, m, _ = trained(population, params, tx, own, 6)
    _, n = one(DIFFERENT[1], population.own[1], params, tx(0.05), of(own, 1), 6)
    assert m["loss"][1] == pytest.approx(float(n["loss"]), rel=1e-4)
    with pytest.raises(ValueError, match=r"looks at the value of its learning rate, .* rate \* schedule"):
        population.init(lambda rate: optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, 2, 6)), params)


def test_adalora_allocates_the_ranks_of_each_member(params):
    members = [member(4, 0.1, seed, method=jpeft.AdaLoRA) for seed in (0, 1)]
    population, own = population_of(params, members), batches(2)

    def tx(rate):
        return allocate_ranks(population.peft, optax.adam(rate), total_steps=6, target_rank=2)

    state, _, _ = trained(population, params, tx, own, 6)
    alone, _ = one(members[1], population.own[1], params, tx(0.1), of(own, 1), 6)
    got, want = flatten(population.member(state, 1)[1]), flatten(alone.adapter)
    for path in (path for path in want if path[-1] == "adalora_e"):
        np.testing.assert_array_equal(got[path] == 0, want[path] == 0)
    assert population_of(params, [member(4, method=jpeft.AdaLoRA), member(2, method=jpeft.AdaLoRA)]).programs == (0, 1)


def test_nnx_models_and_plain_functions_have_populations_too(params):
    class Mlp(nnx.Module):
        def __init__(self):
            self.up, self.down = nnx.Linear(16, 24, rngs=nnx.Rngs(0)), nnx.Linear(24, 5, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.down(nnx.relu(self.up(x)))

    def function(params, x):
        return jax.nn.relu(x @ params["up"]) @ params["down"]

    model, members = Mlp(), [member(2, 0.1, 0), member(4, 0.2, 1)]
    weights = {"up": model.up.kernel[...], "down": model.down.kernel[...]}
    for bound, held in ((model, nnx.state(model, nnx.Param)), (function, weights)):
        population = jpeft.Population(bound, held, X[0], members)

        def loss_fn(adapter, params, batch, rng, population=population):
            return (population.peft.apply(params, adapter, batch) ** 2).mean(), {}

        step = jpeft.population_step(population, loss_fn, optax.sgd, shared=True)
        state, first = step(population.init(optax.sgd, held), held, X[0])
        state, metrics = step(state, held, X[0])
        assert step.compiled == 1 and (metrics["loss"] < first["loss"]).all()
        assert population.member(state, 0)[0].method.rank == 2


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_base_is_in_memory_once(params):
    population = population_of(params)
    state = population.init(optax.adamw, params)
    (lowered,) = jpeft.population_step(population, loss_with(population.peft), optax.adamw).lower(
        state, params, batches(4)
    )
    taken = lowered.compile().memory_analysis().argument_size_in_bytes
    unkeyed = [x for x in jax.tree.leaves(state) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    wanted = size_bytes(params) + size_bytes(unkeyed) + size_bytes(batches(4)) + 4 * 8
    assert abs(taken - wanted) < size_bytes(params) / 4


def test_what_the_configuration_gives_all_members_alike_is_held_once(params):
    vera = [member(2, 0.1, seed, method=jpeft.VeRA) for seed in range(3)]
    population, own = population_of(params, vera), batches(3)
    state, _, _ = trained(population, params, optax.sgd, own, 5)
    shapes = {path[-1]: leaf.shape for path, leaf in flatten(state.groups[0].train.adapter).items()}
    assert len(shapes["vera_a"]) == 2 and len(shapes["vera_lambda_d"]) == 2 and shapes["vera_lambda_d"][0] == 3
    for i in (0, 2):
        alone, _ = one(vera[i], population.own[i], params, optax.sgd(0.1), of(own, i), 5)
        close(population.member(state, i)[1], alone.adapter)
    frozen = population_of(params, [member(2, 0.1, seed, freeze_a=True) for seed in range(3)])
    adapter = frozen.init(optax.sgd, params).groups[0].train.adapter
    assert adapter["up"]["lora_a"].shape == (3, 16, 2)  # each seed its own
    assert not np.array_equal(adapter["up"]["lora_a"][0], adapter["up"]["lora_a"][1])


# --- members that diverge, leave and join ----------------------------------------------------------------------------


def test_a_member_that_diverges_skips_alone(params, with_sgd):
    population, own, _, _, step = with_sgd
    bad = {**own, "x": own["x"].at[2, 0, 0].set(jnp.nan)}
    healthy, _, _ = trained(population, params, optax.sgd, own, 5, step=step)
    absent, _, _ = trained(
        population, params, optax.sgd, own, 5, population.leave(population.init(optax.sgd, params), 2), step
    )
    diverged, metrics, _ = trained(population, params, optax.sgd, bad, 5, step=step)
    assert metrics["skipped"].tolist() == [0, 0, 5, 0] and diverged.skipped.tolist() == [0, 0, 5, 0]
    for i in (0, 1, 3):
        for other in (healthy, absent):
            same(bits(population, diverged, i), bits(population, other, i))
    key, _ = DIFFERENT[2].keys()
    same(population.member(diverged, 2)[1], population.own[2].init(key, params))
    assert step.compiled == 1


def test_halving_keeps_the_best_which_go_on_as_their_own_runs(params):
    population, own = population_of(params), batches(4)
    state, metrics, step = trained(population, params, optax.sgd, own, 10)
    scores = [3.0, 1.0, np.nan, 2.0]
    half, better = population.keep(state, best=2, by=scores)
    assert better.origins == (1, 3) and len(better) == 2 and better.peft is population.peft
    same(better.member(half, 0)[1], population.member(state, 1)[1])
    rest = jax.tree.map(lambda x: x[np.array([1, 3])], own)
    half, metrics, _ = trained(better, params, optax.sgd, rest, 10, half, step)
    assert step.compiled == 2 and metrics["loss"].shape == (2,) and half.step.tolist() == [20, 20]
    for i, origin in enumerate(better.origins):
        each = DIFFERENT[origin]
        alone, _ = one(each, population.own[origin], params, optax.sgd(each.learning_rate), of(own, origin), 20)
        close(better.member(half, i)[1], alone.adapter)
    assert population.select([1, 3]).members == better.members
    for bad, message in ((4, "expected 1 to 3"), (0, "expected 1 to 3"), (True, "best=True")):
        with pytest.raises(ValueError, match=message):
            population.keep(state, best=bad, by=scores)
    with pytest.raises(ValueError, match=r"one number for each of the 4 members, got shape \(2,\)"):
        population.keep(state, best=1, by=[1.0, 2.0])
    with pytest.raises(IndexError, match="no member 4: this population has 4"):
        population.member(state, 4)
    with pytest.raises(ValueError, match="each member once"):
        population.select([1, 1])


def test_members_leave_and_join_without_compiling(params, with_sgd):
    population, own, _, _, step = with_sgd
    state, _, _ = trained(population, params, optax.sgd, own, 3, step=step)
    kept = bits(population, state, 2)
    state = population.leave(state, 2)
    assert state.active.tolist() == [True, True, False, True]
    state, metrics, _ = trained(population, params, optax.sgd, own, 3, state, step)
    assert np.isnan(metrics["loss"]).tolist() == [False, False, True, False]
    same(bits(population, state, 2)[0], kept[0])
    with pytest.raises(ValueError, match="best=4: expected 1 to 3"):
        population.keep(state, best=4, by=[1, 2, 3, 4])

    new = member(3, 0.1, 5, alpha=12)
    joined, larger = population.join(state, 2, new, optax.sgd, params)
    assert larger.members[2] == new and larger.origins == (0, 1, 4, 3)
    same(bits(larger, joined, 0), bits(population, state, 0))
    joined, metrics, _ = trained(larger, params, optax.sgd, own, 5, joined, step)
    alone, _ = one(new, larger.own[2], params, optax.sgd(0.1), of(own, 2), 5, clip=1.0)
    close(larger.member(joined, 2)[1], alone.adapter)
    assert step.compiled == 1 and joined.step.tolist() == [11, 11, 5, 11]

    given, _ = population.join(population.leave(state, 1), 1, new, optax.sgd, params, adapter=alone.adapter)
    same(larger.pefts[0].structure and given.groups[0].train.adapter["up"]["lora_a"][1, :, :3],
         alone.adapter["up"]["lora_a"])  # fmt: skip


def test_a_member_that_does_not_fit_cannot_join(params, with_sgd):
    population = with_sgd[0]
    state = population.init(optax.sgd, params)
    with pytest.raises(ValueError, match=r"member 1 takes part; let it leave first"):
        population.join(state, 1, member(), optax.sgd, params)
    state = population.leave(state, 1)
    refused = {
        r"is float32\[24, 8\], and the population's float32\[24, 4\]": member(8),
        "its dropout is 0.1, and the population's 0.0": member(2, dropout=0.1),
        "the adapter is of IA3": jpeft.Member(jpeft.IA3(targets=TARGETS), learning_rate=0.1),
        "acts on 1 sites, and the population's on 2": jpeft.Member(jpeft.LoRA(rank=2, targets="up"), learning_rate=0.1),
        "its freeze_a is True, and the population's False": member(2, freeze_a=True),
        "it trains other leaves": member(2, init_weights="mica"),
    }
    for message, each in refused.items():
        with pytest.raises(ValueError, match=f"member 1 cannot join the program of LoRA: .*{message}"):
            population.join(state, 1, each, optax.sgd, params)


# --- files and meshes ------------------------------------------------------------------------------------------------


def test_a_checkpoint_goes_on_bit_for_bit_after_halving_too(params, tmp_path):
    population, own = population_of(params), batches(4)
    state, _, step = trained(population, params, optax.adam, own, 2)
    state, better = population.keep(state, best=2, by=[4, 1, 3, 2])
    rest = batches(2)
    state, _, _ = trained(better, params, optax.adam, rest, 1, state, step)
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, 3, state, {"origins": list(better.origins)}, wait=True)
    whole, _, _ = trained(better, params, optax.adam, rest, 2, state, step)
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        again = population_of(params).select([1, 3])
        restored, notes = checkpoint.restore(checkpoints, like=again.init(optax.adam, params))
    assert notes == {"origins": [1, 3]}
    resumed, _, _ = trained(again, params, optax.adam, rest, 2, restored, step)
    same(resumed, whole)


def test_a_member_is_saved_as_any_adapter(params, with_sgd, tmp_path):
    population, _, state, _, _ = with_sgd
    peft, adapter = population.member(state, 3)
    jpeft.save(tmp_path / "member", peft, adapter, params)
    again, loaded = jpeft.load(tmp_path / "member", MODEL, params, X[0])
    assert again.method == DIFFERENT[3].method
    same(loaded, adapter)
    np.testing.assert_allclose(again.apply(params, loaded, X[0]), peft.apply(params, adapter, X[0]))


def test_members_and_rows_are_sharded_over_a_mesh(params):
    devices = np.array(jax.devices()[:8]).reshape(2, 2, 2)
    mesh = Mesh(devices, ("population", "data", "fsdp"))
    placed = jpeft.shard(params, mesh)
    assert not placed["up"]["kernel"].sharding.is_fully_replicated
    plain, own = population_of(params), batches(4)
    population = population_of(placed, axis="population")
    state = population.init(optax.adam, placed)
    specs = {
        path[-1]: tuple(leaf.sharding.spec) for path, leaf in flatten(state.groups[0].train.adapter["down"]).items()
    }
    assert specs == {"lora_a": ("population", "fsdp"), "lora_b": ("population",)}
    moments = state.groups[0].train.opt_state.inner[0].mu["down"]["lora_a"]
    assert tuple(moments.sharding.spec) == ("population", "fsdp")
    own_placed = population.shard_batches(own, mesh)
    assert tuple(own_placed["x"].sharding.spec) == ("population", ("data", "fsdp"))
    traces, loss_fn = [], loss_with(population.peft)

    def counted(*args):
        traces.append(args)
        return loss_fn(*args)

    step = jpeft.population_step(population, counted, optax.adam)
    state, metrics, _ = trained(population, placed, optax.adam, own_placed, 3, state, step)
    wanted, m, _ = trained(plain, params, optax.adam, own, 3)
    assert len(traces) == 1  # step.compiled counts entries of jit's cache, of which equal shardings may make two
    np.testing.assert_allclose(metrics["loss"], m["loss"], rtol=1e-5)
    for i in range(4):
        close(population.member(state, i)[1], plain.member(wanted, i)[1], 1e-4)
    half, better = population.keep(state, best=2, by=metrics["loss"])
    assert tuple(half.groups[0].train.adapter["down"]["lora_a"].sharding.spec) == ("population", "fsdp")
    rest = better.shard_batches(batches(2), mesh)
    half, _, _ = trained(better, placed, optax.adam, rest, 2, half, step)
    assert len(traces) == 2
    joined, _ = better.join(better.leave(half, 1), 1, member(2, 0.1, 7), optax.adam, placed)
    trained(better, placed, optax.adam, rest, 1, joined, step)
    assert len(traces) == 2
    with pytest.raises(ValueError, match="3 members of a program do not divide over the mesh's axis 'population'"):
        population_of(placed, DIFFERENT[:3], axis="population").init(optax.adam, placed)
    with pytest.raises(ValueError, match="axis='row', but the mesh has population, data, fsdp"):
        population_of(placed, axis="row").init(optax.adam, placed)
    with pytest.raises(ValueError, match="no leaf of params is on a mesh"):
        population_of(params, axis="population").init(optax.adam, params)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_optimizers_that_would_not_train_each_member_as_alone_are_refused(params):
    population = population_of(params)
    scheduled = optax.inject_hyperparams(optax.sgd)(learning_rate=optax.linear_schedule(0.0, 1.0, 5))
    adapter = population.peft.init(jax.random.key(0), params)
    frozen = [member(2, seed=seed, freeze_a=True) for seed in (0, 1)]
    fa = population_of(params, frozen)
    made_for_one = lora_fa(fa.peft, fa.peft.init(jax.random.key(0), params))
    refused = {
        "learning rate as a constant": (population, optax.sgd(0.1)),
        "learning rate by a schedule": (population, scheduled),
        "lora_fa, which is made from the leaves of one adapter": (
            fa, lambda rate: optax.chain(made_for_one, optax.sgd(rate))
        ),
        "member 1 .* has none": (
            population_of(params, [member(), member(2, None)]), optax.sgd
        ),
        "depend on the size of a leaf": (population, lambda rate: optax.adafactor(rate, min_dim_size_to_factor=2)),
        "tx has 3 entries": (population, [optax.sgd] * 3),
    }  # fmt: skip
    assert adapter
    for message, (each, tx) in refused.items():
        with pytest.raises(ValueError, match=message):
            each.init(tx, params)
    equal = population_of(params, [member(2, seed=seed) for seed in (0, 1)])
    equal.init(lambda rate: optax.adafactor(rate, min_dim_size_to_factor=2), params)  # of one rank, nothing is padded
    without = population_of(params, [member(2, None, seed) for seed in (0, 1)])
    without.init(optax.sgd(0.1), params)  # no member has a rate of its own
    injected = population_of(params, [member(2, None), member(2, 0.5)]).init(
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.25), params
    )
    assert injected.groups[0].train.opt_state.hyperparams["learning_rate"].tolist() == [0.25, 0.5]


def test_members_that_are_none_are_refused(params):
    with pytest.raises(ValueError, match="at least one member"):
        population_of(params, [])
    with pytest.raises(TypeError, match=r"members must be jpeft.Members, got LoRA"):
        population_of(params, [jpeft.LoRA()])
    for wrong in ({"learning_rate": -1}, {"learning_rate": "high"}, {"learning_rate": float("nan")}, {"seed": -1}):
        with pytest.raises(ValueError, match=f"Member.{next(iter(wrong))} must be"):
            jpeft.Member(jpeft.LoRA(), **wrong)
    with pytest.raises(TypeError, match=r"Member.method must be a method, such as jpeft.LoRA\(rank=8\), got 8"):
        jpeft.Member(8)
    assert jpeft.Member(jpeft.LoRA(), learning_rate=jnp.float32(0.5)).learning_rate == 0.5
    with pytest.raises(ValueError, match="clip must be a positive number"):
        jpeft.population_step(population_of(params), loss_with(None), optax.sgd, clip=0)
