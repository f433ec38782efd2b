"""Banks of adapters: what they hold, how rows are found in a call, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jpeft
from jpeft.core.tree import flatten
from tests.contract import close
from tests.zoo import moved, parameters

M = jpeft.methods


class Net(nn.Module):
    """Two layers with a norm, whose arguments and outputs lie in many ways."""

    @nn.compact
    def __call__(self, x, mask=None, cache=None, drop=False, how="plain"):
        y = nn.Dense(8, name="up")(x)
        y = nn.Dropout(0.5, deterministic=not drop)(nn.LayerNorm(name="norm")(nn.gelu(y)))
        if mask is not None:  # [length, length], for all rows
            y = mask @ y
        y = nn.Dense(4, name="down")(y)
        if cache is not None:  # [layers, rows, length, features], and a number
            return y, {"held": cache["held"] + y[None], "index": cache["index"] + 1}
        return {"plain": y, "loss": y.mean(), "both": (y, y.sum()), "transposed": y.swapaxes(0, 1)}[how]


NET = Net()
X = jax.random.normal(jax.random.key(0), (4, 3, 4))
PARAMS = parameters(NET, X)


def bound(method=None, model=NET, params=PARAMS):
    return (method or jpeft.LoRA(rank=2, targets="up|down")).bind(model, params, X)


def bank_of(peft, slots=4):
    own = {name: moved(peft, PARAMS, seed=seed) for seed, name in enumerate("abc"[: slots - 1])}
    return jpeft.stack(peft, own, slots=slots), own


def rows(peft, own, ids, x=X, **kwargs):
    each = [
        peft.apply(PARAMS, own[name], x[i : i + 1], **kwargs)
        if name
        else NET.apply({"params": PARAMS}, x[i : i + 1], **kwargs)
        for i, name in enumerate(ids)
    ]
    return jnp.concatenate(each)


# --- calls ------------------------------------------------------------------------------------------------------------


def test_arguments_and_outputs_that_lie_otherwise():
    peft = bound()
    bank, own = bank_of(peft)
    ids = ["a", None, "c", "a"]

    def apply(*inputs, x=X, **kwargs):
        return peft.apply(PARAMS, bank, x, *inputs, adapter_ids=ids, **kwargs)

    want = rows(peft, own, ids)
    close(apply(), want)
    close(apply(x=np.asarray(X)), want)
    close(apply(how="transposed"), want.swapaxes(0, 1))
    mask = jnp.tril(jnp.ones((3, 3))) / 3
    close(apply(mask), rows(peft, own, ids, mask=mask))
    # As many tokens as rows: the mask is still one for all of them, since one row more leaves it as it is.
    square = jnp.concatenate([X, X[:, :1]], 1)
    mask = jnp.tril(jnp.ones((4, 4))) / 4
    close(apply(mask, x=square), rows(peft, own, ids, x=square, mask=mask))
    cache = {"held": jnp.ones((2, 4, 3, 4)), "index": jnp.int32(3)}
    y, new = apply(cache=cache)
    close(y, want)
    close(new["held"], 1 + jnp.stack([want, want]))
    assert new["index"].shape == () and int(new["index"]) == 4


def test_what_has_no_rows_is_refused():
    peft = bound()
    bank, _ = bank_of(peft)
    ids = ["a", "b", None, "c"]
    with pytest.raises(ValueError, match="an output of the model is one for all rows, such as a mean"):
        peft.apply(PARAMS, bank, X, how="both", adapter_ids=ids)
    with pytest.raises(ValueError, match="an output must have them"):
        peft.apply(PARAMS, bank, X, how="loss", adapter_ids=ids)
    with pytest.raises(
        ValueError, match=r"adapter_ids has 5 entries, and no argument has as many rows: 0: float32\[4, 3, 4\]"
    ):
        peft.apply(PARAMS, bank, X, adapter_ids=[*ids, "a"])
    with pytest.raises(
        ValueError, match="adapter_ids has 3 entries, and the model does not take one row more on the first axis"
    ):
        peft.apply(PARAMS, bank, X[:, :, :4], jnp.ones((3, 3)), adapter_ids=["a", "b", "c"])


class Attends(nn.Module):
    """Each row of ``x`` attends to a memory that all rows share."""

    @nn.compact
    def __call__(self, x, memory):
        return nn.softmax(nn.Dense(5, name="up")(x) @ memory.T) @ memory


class Timed(nn.Module):
    """A model whose first input is a number, with one position for each token."""

    @nn.compact
    def __call__(self, time, ids, positions, unused=None):
        x = nn.Embed(9, 4, name="embed")(ids) + nn.Embed(16, 4, name="places")(positions)
        return nn.Dense(3, name="up")(x) * time


class Recurrent(nn.Module):
    """A model whose inputs are ``[time, rows, features]``."""

    @nn.compact
    def __call__(self, x):
        return jnp.cumsum(nn.Dense(3, name="up")(x), axis=0)


def each_alone(model, params, bank, own, ids, run):
    """``run(call, i)`` for each row, with the model's call under its adapter."""
    calls = {n: lambda *a, n=n, **k: bank.source.apply(params, own[n], *a, **k) for n in own}
    calls[None] = lambda *a, **k: model.apply({"params": params}, *a, **k)
    return [run(calls[name], i) for i, name in enumerate(ids)]


def many(model, *inputs):
    params = parameters(model, *inputs)
    peft = jpeft.LoRA(rank=2, targets="up").bind(model, params, *inputs)
    own = {n: moved(peft, params, seed=i) for i, n in enumerate("ab")}
    return peft, params, jpeft.stack(peft, own), own


NAMES = ["a", None, "b", "a"]


@pytest.mark.parametrize("length", [3, 4])
def test_inputs_that_all_rows_share_however_many_they_are(length):
    model, ids = Timed(), jnp.arange(4 * length).reshape(4, length) % 9
    inputs = jnp.float32(0.5), ids, jnp.arange(length)
    peft, params, bank, own = many(model, *inputs)
    got = peft.apply(params, bank, *inputs, unused=jnp.ones((4, 4)), adapter_ids=NAMES)
    want = each_alone(model, params, bank, own, NAMES, lambda f, i: f(inputs[0], ids[i : i + 1], inputs[2]))
    close(got, jnp.concatenate(want))


def test_what_may_be_read_in_two_ways_is_asked_for():
    model, (x, memory) = Attends(), jax.random.normal(jax.random.key(1), (2, 4, 5))
    peft, params, bank, own = many(model, x, memory)
    with pytest.raises(ValueError, match=r"input 1, float32\[4, 5\], may be read as .* which by row_axes=\{1: 0\}, or"):
        peft.apply(params, bank, x, memory, adapter_ids=NAMES)
    got = peft.apply(params, bank, x, memory, adapter_ids=NAMES, row_axes={1: None})
    want = each_alone(model, params, bank, own, NAMES, lambda f, i: f(x[i : i + 1], memory))
    close(got, jnp.concatenate(want))
    got = peft.apply(params, bank, x, memory, adapter_ids=NAMES, row_axes=(0, 0))
    want = each_alone(model, params, bank, own, NAMES, lambda f, i: f(x[i : i + 1], memory[i : i + 1]))
    close(got, jnp.concatenate(want))


def test_rows_on_another_axis_are_stated():
    model, x = Recurrent(), jax.random.normal(jax.random.key(1), (3, 4, 5))
    peft, params, bank, own = many(model, x)
    with pytest.raises(ValueError, match="say where rows are by row_axes"):
        peft.apply(params, bank, x, adapter_ids=NAMES)
    for time in (3, 4):
        x = jax.random.normal(jax.random.key(time), (time, 4, 5))
        got = peft.apply(params, bank, x, adapter_ids=NAMES, row_axes={0: 1})
        want = each_alone(model, params, bank, own, NAMES, lambda f, i, x=x: f(x[:, i : i + 1]))
        close(got, jnp.concatenate(want, 1))
    with pytest.raises(ValueError, match="row_axes names 'y', and the call's arguments are 0"):
        peft.apply(params, bank, x, adapter_ids=NAMES, row_axes={"y": 1})
    with pytest.raises(ValueError, match=r"row_axes\[0\] must be an axis of that argument, from 0 on, or None; got 3"):
        peft.apply(params, bank, x, adapter_ids=NAMES, row_axes={0: 3})


def test_batch_mates_change_nothing_where_a_model_looks_at_the_batch():
    class Centered(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(3, name="up")(x)
            return y - 0.5 * y.mean(0)

    model, x = Centered(), X[:, 0]
    peft, params, bank, own = many(model, x)
    for names in (["a", "a", "b", "b"], ["a", "b", "a", None], ["a"] * 4):
        got = peft.apply(params, bank, x, adapter_ids=names)
        want = each_alone(model, params, bank, own, names, lambda f, i: f(x[i : i + 1]))
        close(got, jnp.concatenate(want))


def test_one_adapter_for_all_and_groups():
    peft = bound()
    bank, own = bank_of(peft)
    close(peft.apply(PARAMS, bank, X, adapter_ids=["b"] * 4), peft.apply(PARAMS, own["b"], X))
    grouped = jax.jit(lambda x: peft.apply(PARAMS, bank, x, adapter_ids=["c", "c", None, None]))
    close(grouped(X), rows(peft, own, ["c", "c", None, None]))
    assert "tensor<2x4x2xf32>" in grouped.lower(X).as_text()  # two copies of A, not four


def test_rows_have_random_numbers_of_their_own():
    peft = bound()
    bank, _ = bank_of(peft)
    same = jnp.broadcast_to(X[:1], X.shape)

    def run(x, key):
        return peft.apply(PARAMS, bank, x, drop=True, rngs={"dropout": key}, adapter_ids=["a"] * 4)

    y = run(same, jax.random.key(0))
    assert all(bool(jnp.any(y[i] != y[j])) for i in range(4) for j in range(i))
    np.testing.assert_array_equal(y, run(same, jax.random.key(0)))


def test_gradients_reach_each_adapter():
    peft = bound()
    bank, own = bank_of(peft)

    def loss(bank):
        return (peft.apply(PARAMS, bank, X, adapter_ids=bank.ids([1, 0, 2, 1])) ** 2).sum()

    got = jax.grad(loss, allow_int=True)(bank).leaves
    want = jax.grad(lambda a: (peft.apply(PARAMS, a, X[jnp.array([0, 3])]) ** 2).sum())(own["a"])
    jax.tree.map(lambda g, w: close(g[1], w), got, want)
    jax.tree.map(lambda g: close(g[3], jnp.zeros_like(g[3])), got)


def test_a_quantized_base_and_leaves_of_it():
    params = jpeft.quantize(PARAMS, "nf4", NET, X, block=4)
    peft = jpeft.Chain(jpeft.LoRA(rank=2, targets="up"), jpeft.Train("norm")).bind(NET, params, X)
    own = {name: moved(peft, params, seed=i) for i, name in enumerate("ab")}
    bank = jpeft.stack(peft, own)
    got = peft.apply(params, bank, X, adapter_ids=["b", "a", None, "b"])
    plain = NET.apply({"params": jpeft.dequantize(params)}, X)
    want = [peft.apply(params, own[n], X)[i] if n else plain[i] for i, n in enumerate(["b", "a", None, "b"])]
    close(got, jnp.stack(want))
    close(peft.apply(params, bank.row(1, params), X), peft.apply(params, own["a"], X))


def test_a_mesh():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    columns, everywhere = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((None, "tensor"), ()))
    params = jax.tree.map(lambda w: jax.device_put(w, columns if w.ndim == 2 else everywhere), PARAMS)
    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))
    peft = bound(params=params)
    fresh = peft.init(jax.random.key(0), params)
    own = {n: moved(peft, PARAMS, seed=i) for i, n in enumerate("ab")}
    placed = {n: jax.tree.map(lambda like, x: jax.device_put(x, like.sharding), fresh, a) for n, a in own.items()}
    bank = jpeft.stack(peft, placed).load("b", placed["a"])
    assert bank.leaves["up"]["lora_b"].sharding.spec == PartitionSpec(None, None, "tensor")
    run = jax.jit(lambda p, b, x, ids: peft.apply(p, b, x, adapter_ids=ids))
    got = run(params, bank, x, bank.ids(["a", None, "b", "a"]))
    close(got, rows(peft, {"a": own["a"], "b": own["a"]}, ["a", None, "b", "a"]))


def test_an_nnx_model_as_it_is_now():
    net = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
    peft = jpeft.LoRA(rank=2, targets=".*").bind(net, X)
    own = {n: moved(peft, nnx.state(net, nnx.Param), seed=i) for i, n in enumerate("ab")}
    got = peft.apply(net, jpeft.stack(peft, own), X, adapter_ids=["a", None, "b", "a"])
    want = [peft.apply(net, own[n], X)[i] if n else net(X)[i] for i, n in enumerate(["a", None, "b", "a"])]
    close(got, jnp.stack(want))


# --- banks ------------------------------------------------------------------------------------------------------------


def test_adapters_of_smaller_ranks_other_scales_and_some_methods():
    members = jpeft.LoRA(rank=4, targets="up"), jpeft.IA3(targets="up"), M.DoRA(targets="down")
    peft = bound(jpeft.Chain(*members))
    parts = {
        "small": bound(jpeft.LoRA(rank=1, alpha=3, targets="up")),
        "ia3": bound(jpeft.IA3(targets="up")),
        "dora": bound(M.DoRA(rank=2, rslora=True, targets="down")),
        "all": peft,
    }
    own = {name: moved(p, PARAMS, seed=i) for i, (name, p) in enumerate(parts.items())}
    bank = jpeft.stack(peft, {name: (parts[name], a) for name, a in own.items()}, slots=6).load("late", own["all"])
    got = peft.apply(PARAMS, bank, X, adapter_ids=["small", "ia3", "dora", "late"])
    want = [parts[n].apply(PARAMS, own[n], X)[i] for i, n in enumerate(["small", "ia3", "dora", "all"])]
    close(got, jnp.stack(want))
    close(peft.apply(PARAMS, bank, X, adapter_ids=[None] * 4), NET.apply({"params": PARAMS}, X))


def test_what_the_configuration_gives_is_held_once():
    peft = bound(M.VeRA(rank=3, targets="up|down"))
    bank, own = bank_of(peft)
    held = {p for p in flatten(bank.leaves) if p[0] == "ve_ra" or p[0] == "vera"}
    assert held and all(flatten(bank.leaves)[p].shape == flatten(own["a"])[p].shape for p in held)
    other = bound(M.VeRA(rank=3, seed=7, targets="up|down"))
    with pytest.raises(ValueError, match=r"adapter 'z': .*seed is 7 in the adapter, and 0 here"):
        bank.unload("a").load("z", (other, moved(other, PARAMS)))
    changed = jax.tree.map(lambda x: x + 1, own["a"])
    with pytest.raises(
        ValueError, match=r"adapter 'a': its leaf '.*' is another than that of the bank, which holds it"
    ):
        bank.load("a", changed)
    apart = jpeft.stack(peft, {"a": own["a"], "z": changed})  # from the start, each has its own
    got = peft.apply(PARAMS, apart, X, adapter_ids=["a", "z", "z", None])
    close(got[1:3], peft.apply(PARAMS, changed, X)[1:3])


def test_a_dtype_for_decoding():
    peft = bound(M.DoRA(rank=2, targets="up"))
    bank = jpeft.stack(peft, {"a": moved(peft, PARAMS)}, dtype=jnp.bfloat16)
    assert {p[-1]: x.dtype.name for p, x in flatten(bank.leaves).items()} == {
        "lora_a": "bfloat16", "lora_b": "bfloat16", "dora_m": "float32"
    }  # fmt: skip


def test_a_bank_is_a_tree_without_names_inside_of_jit():
    peft = bound()
    bank, own = bank_of(peft)
    assert {x.shape[0] for x in jax.tree.leaves(bank)} == {4}
    again = jax.tree.map(lambda x: x, bank)
    with pytest.raises(ValueError, match=r"are not known inside of jax.jit: take slots = bank.ids\(\[...\]\) outside"):
        peft.apply(PARAMS, again, X, adapter_ids=["a"] * 4)
    close(peft.apply(PARAMS, again, X, adapter_ids=[1] * 4), peft.apply(PARAMS, own["a"], X))


BAD = {
    "an unknown name": (lambda bank, own: bank.ids(["aa"]), "the bank has no adapter 'aa'; nearest: a"),
    "an unknown name to unload": (lambda bank, own: bank.unload("x"), "no adapter 'x'; it holds 'a', 'b', 'c'"),
    "a name that is none": (lambda bank, own: bank.load("", own["a"]), "must be a string that is not empty, got ''"),
    "a string of ids": (lambda bank, own: bank.ids("abc"), "must have the name of an adapter or None for each row"),
    "a number that is none": (lambda bank, own: bank.ids([1.5]), "must be names of adapters, None or slots, got 1.5"),
    "a free slot": (lambda bank, own: bank.unload("b").ids([2]), "the bank has no adapter in slot 2, of 4"),
    "a slot beyond": (lambda bank, own: bank.ids([9]), "the bank has no adapter in slot 9, of 4"),
    "a full bank": (lambda bank, own: bank.load("d", own["a"]), "the bank is full: its 3 slots .* hold 'a', 'b', 'c'"),
    "NaN": (
        lambda bank, own: bank.load("a", jax.tree.map(lambda x: x * jnp.nan, own["a"])),
        "adapter 'a': its leaf 'down/lora_a' holds NaN",
    ),
    "another tree": (lambda bank, own: bank.load("a", PARAMS), "adapter 'a': the adapter lacks"),
    "a rank above": (
        lambda bank, own: bank.load("a", (big := bound(jpeft.LoRA(rank=4, targets="up")), moved(big, PARAMS))),
        r"adapter 'a': the adapter's leaf 'up/lora_a' has shape \(4, 4\), above the \(4, 2\) that fit",
    ),
    "a rank above without its Peft": (
        lambda bank, own: bank.load("a", moved(bound(jpeft.LoRA(rank=4, targets="up|down")), PARAMS)),
        r"has shape \(8, 4\), expected \(8, 2\)",
    ),
    "too few slots": (lambda bank, own: jpeft.stack(bank.source, own, slots=3), "slots must be at least 4, for 3"),
    "another Peft": (
        lambda bank, own: bound(jpeft.LoRA(rank=3, targets="up")).apply(PARAMS, bank, X, adapter_ids=["a"] * 4),
        "the bank is of another Peft than this one of LoRA",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name):
    bank, own = bank_of(bound())
    with pytest.raises(ValueError, match=BAD[name][1]):
        BAD[name][0](bank, own)
    with pytest.raises(TypeError, match="say which adapter each row runs under"):
        bank.source.apply(PARAMS, bank, X)


def test_rows_of_the_base_beside_prompts_are_refused():
    class Reader(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Dense(3, name="out")(nn.Embed(9, 4, name="embed")(ids).mean(1))

    ids, model = jnp.ones((2, 5), int), Reader()
    params = parameters(model, ids)
    peft = jpeft.Chain(M.PromptTuning(length=2), jpeft.LoRA(rank=1, targets="out")).bind(model, params, ids)
    bank = jpeft.stack(peft, {"a": moved(peft, params)}, slots=3)
    with pytest.raises(
        ValueError, match="PromptTuning puts virtual tokens before every text, and has no neutral adapter"
    ):
        peft.apply(params, bank, ids, adapter_ids=["a", None])
    lora = jpeft.LoRA(rank=1, targets="out").bind(model, params, ids)
    with pytest.raises(ValueError, match="adapter 'b': it has no PromptTuning, whose virtual tokens come before"):
        bank.load("b", (lora, moved(lora, params)))


def test_training_moves_the_rows_adapters_alone():
    peft = bound()
    bank, _ = bank_of(peft)
    tx = optax.sgd(0.1)

    @jax.jit
    def step(leaves, slots):
        def loss(leaves):
            y = peft.apply(PARAMS, bank_with(leaves), X, adapter_ids=slots)
            return (y**2).sum()

        updates, _ = tx.update(jax.grad(loss)(leaves), tx.init(leaves))
        return optax.apply_updates(leaves, updates)

    def bank_with(leaves):
        return jax.tree.unflatten(jax.tree.structure(bank), [*jax.tree.leaves(leaves), bank.on])

    new = step(bank.leaves, bank.ids(["a", None, "a", "b"]))
    for path, x in flatten(new).items():
        moves = jnp.abs(x - flatten(bank.leaves)[path]).max(axis=tuple(range(1, x.ndim)))
        assert moves[1] > 0 and moves[2] > 0 and moves[3] == 0


def test_traced_slots_that_are_not_there_give_nan():
    peft = bound()
    bank, own = bank_of(peft)
    got = jax.jit(lambda slots: peft.apply(PARAMS, bank, X, adapter_ids=slots))(jnp.array([-1, 4, 2, 0]))
    assert jnp.isnan(got[:2]).all()
    close(got[2:3], peft.apply(PARAMS, own["b"], X[2:3]))
    close(got[3:], NET.apply({"params": PARAMS}, X[3:]))


def test_an_argument_and_a_collection_of_one_name():
    class Keeps(nn.Module):
        @nn.compact
        def __call__(self, x, cache=None):
            held = self.variable("cache", "held", lambda: jnp.zeros(x.shape[:1]))
            return nn.Dense(3, name="up")(x) + held.value[:, None] + cache

    model, x, held = Keeps(), X[:, 0], jnp.arange(4.0)
    params = parameters(model, x, cache=jnp.ones(()))
    peft = jpeft.LoRA(rank=2, targets="up").bind(model, {"params": params, "cache": {"held": held}}, x, cache=1.0)
    own = {n: moved(peft, params, seed=i) for i, n in enumerate("ab")}

    def call(adapter, rows, **kwargs):
        variables = {"params": params, "cache": {"held": held[rows]}}
        return peft.apply(variables, adapter, x[rows], cache=jnp.float32(5), **kwargs)

    got = call(jpeft.stack(peft, own), slice(0, 4), adapter_ids=["a", "b", "b", "a"])
    close(got, jnp.concatenate([call(own[n], slice(i, i + 1)) for i, n in enumerate("abba")]))
