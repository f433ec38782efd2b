"""Prefixes on attentions that nobody registered equal keys and values prepended by hand, in modules of every form."""

import functools
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.core.dataflow.walk import primitives
from jpeft.core.tree import flatten
from tests.linen.foreign_attentions import (
    BATCH,
    CASES,
    COLLECTION,
    DEPTH,
    DIM,
    KV_HEADS,
    LENGTH,
    MASK,
    POSITIONS,
    SLOTS,
    STATES,
    STREAMS,
    TOKENS,
)
from tests.zoo import moved, parameters

pytestmark = pytest.mark.usefixtures("quick_compiles", "standard_promotion")
PREFIX = 3


@functools.cache
def bound(name):
    """A model by name, with its parameters, a prefix on all of its attentions, and an adapter."""
    case = CASES[name]
    params = parameters(case.model, *case.inputs)
    peft = jpeft.PrefixTuning(length=PREFIX).bind(case.model, params, *case.inputs)
    return case, params, peft, moved(peft, params, 0.7)


def by_hand(model, params, adapter, *inputs, **kwargs):
    """The outputs of a model that prepends the keys and values of an adapter itself."""
    return model.apply({"params": params, COLLECTION: adapter}, *inputs, **kwargs)


def close(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            np.asarray(a, np.float32),
            np.asarray(b, np.float32),
            rtol=0,
            atol=tolerance * max(1, float(jnp.abs(b).max())),
        )


@pytest.mark.parametrize("name", CASES)
def test_a_prefix_equals_keys_and_values_prepended_by_hand(name):
    case, params, peft, adapter = bound(name)
    assert {site.heads for site in peft.sites} == {case.heads} and len(peft.sites) == case.sites

    def loss(run, adapter):
        y = run(adapter)
        return sum(jnp.sin(x).sum() for x in jax.tree.leaves(y) if x.ndim == 3), y

    runs = [
        lambda a: peft.apply(params, a, *case.inputs),
        lambda a: by_hand(case.model, params, a, *case.inputs),
    ]
    (got, found), (want, wanted) = (
        jax.jit(jax.grad(functools.partial(loss, run), has_aux=True))(adapter) for run in runs
    )
    close(found, wanted)
    close(got, want, 1e-4)  # through large logits, gradients round more
    assert all(np.abs(g).max() > 0 for path, g in flatten(got).items())
    plain = case.model.apply({"params": params}, *case.inputs)
    assert max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True)) > 0.1


def test_targets_and_exclude_choose_among_found_attentions():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            q, k, v = (nn.DenseGeneral((2, 4), name=name)(x) for name in "qkv")
            weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
            return nn.Dense(x.shape[-1])(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], -1))

    model, x = nn.Sequential([Plain(), Plain()]), jnp.ones((1, 3, 4))
    params = model.init(jax.random.key(0), x)["params"]

    def chosen(**fields):
        return [site.name for site in jpeft.PrefixTuning(length=2, **fields).bind(model, params, x).sites]

    assert chosen() == ["layers_0", "layers_1"]
    assert chosen(exclude=["layers_0"]) == chosen(exclude=r".*_0") == chosen(targets="layers_1") == ["layers_1"]
    with pytest.raises(jpeft.core.targets.TargetError, match="exclude 'layers_2' matches nothing"):
        chosen(exclude=["layers_2"])


# --- caches -----------------------------------------------------------------------------------------------------------

NEXT = TOKENS[:, :1]


def seen(queries, keys):
    """A causal mask ``[batch, queries, SLOTS]`` of the last of so many keys."""
    rows = np.arange(keys - queries, keys)[:, None]
    return np.broadcast_to(np.arange(SLOTS) <= rows, (BATCH, queries, SLOTS))


def in_collection(run, first, *steps, **kwargs):
    """The outputs of calls that share a cache in a collection, without the first, which makes it."""
    variables, outputs = {}, []
    for inputs in (first, *steps):
        y, new = run(variables, *inputs, mutable=["cache"], **kwargs)
        variables = {"cache": new["cache"]}
        outputs.append(y)
    return outputs[1:]


def of_vision(run):
    after = np.full_like(NEXT, LENGTH)
    prefill = TOKENS, POSITIONS, seen(LENGTH, LENGTH)[:, None]
    return in_collection(run, prefill, (NEXT, after, seen(1, LENGTH + 1)[:, None]), decode=True)


def of_experts(run):
    first, second = STREAMS
    _, cache = run({}, [first, None], POSITIONS[:, :1], MASK[:, None, :1, :1])
    return run({}, [None, second], POSITIONS[:, 1:2], np.ones((BATCH, 1, 1, 2), bool), cache)


def of_encoder_decoder(run):
    whole = np.zeros((BATCH, SLOTS), TOKENS.dtype)
    steps = [(TOKENS[:, i : i + 1], STATES) for i in range(2)]
    y, new = run({}, whole, STATES, decode=True, slots=SLOTS, mutable=["cache"])
    variables, outputs = {"cache": jax.tree.map(jnp.zeros_like, new["cache"])}, []
    for inputs in steps:
        y, variables = run(variables, *inputs, decode=True, slots=SLOTS, mutable=["cache"])
        outputs.append(y)
    return outputs


def of_complex(run):
    mask, more = np.ones((BATCH, SLOTS), int), np.arange(SLOTS)[None].repeat(BATCH, 0)
    whole = np.zeros((BATCH, SLOTS), TOKENS.dtype)
    after = np.full_like(NEXT, LENGTH)
    return in_collection(run, (whole, mask, more), (TOKENS[:, :1], mask, POSITIONS[:, :1]), (NEXT, mask, after))


def of_sliding(run):
    slots = {"k": np.zeros((BATCH, SLOTS, KV_HEADS, DIM), np.float32), "positions": np.full((BATCH, SLOTS), -9)}
    slots |= {"v": slots["k"], "end_index": np.zeros(BATCH, int)}
    y, cache = run({}, TOKENS, POSITIONS, seen(LENGTH, LENGTH), {f"layer_{i}": slots for i in range(DEPTH)})
    z, _ = run({}, NEXT, np.full_like(NEXT, LENGTH), seen(1, LENGTH + 1), cache)
    return y, z


DECODED = {
    "big_vision": of_vision, "openpi": of_experts, "t5x": of_encoder_decoder, "easylm": of_complex, "gemma": of_sliding,
}  # fmt: skip


@pytest.mark.parametrize("name", DECODED)
def test_steps_with_a_cache_equal_those_by_hand(name):
    case, params, peft, adapter = bound(name)

    def under_adapter(variables, *inputs, **kwargs):
        return peft.apply({"params": params, **variables}, adapter, *inputs, **kwargs)

    def prepending(variables, *inputs, **kwargs):
        return case.model.apply({"params": params, COLLECTION: adapter, **variables}, *inputs, **kwargs)

    def plain(variables, *inputs, **kwargs):
        return case.model.apply({"params": params, **variables}, *inputs, **kwargs)

    got, want, without = (
        jax.jit(functools.partial(DECODED[name], run))() for run in (under_adapter, prepending, plain)
    )
    close(got, want)
    assert max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(without), strict=True)) > 0.1


# --- dtypes, quantized weights, many adapters -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["big_vision", "t5x", "gemma"])
def test_in_half_precision(name):
    case, params, _, adapter = bound(name)
    half = case.model.clone(dtype=jnp.bfloat16)
    peft = jpeft.PrefixTuning(length=PREFIX).bind(half, params, *case.inputs)
    got = jax.jit(lambda a: peft.apply(params, a, *case.inputs))(adapter)
    close(got, jax.jit(lambda a: by_hand(half, params, a, *case.inputs))(adapter), 3e-2)


@pytest.mark.parametrize("name", ["big_vision", "t5x"])
def test_over_quantized_weights(name):
    case, params, _, adapter = bound(name)
    frozen = jpeft.quantize(params, "nf4", case.model, *case.inputs, block=16)
    peft = jpeft.PrefixTuning(length=PREFIX).bind(case.model, frozen, *case.inputs)
    got = jax.jit(lambda a: peft.apply(frozen, a, *case.inputs))(adapter)
    close(got, jax.jit(lambda a: by_hand(case.model, jpeft.dequantize(frozen), a, *case.inputs))(adapter))


@pytest.mark.parametrize("name", ["big_vision", "openpi", "t5x"])
def test_vmapped_over_prefixes_and_rows(name):
    case, params, peft, adapter = bound(name)
    adapters = adapter, moved(peft, params, 0.7, 5)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *adapters)
    rows = jax.tree.map(lambda x: x[:, None], case.inputs)
    got = jax.jit(jax.vmap(lambda a, inputs: peft.apply(params, a, *inputs)))(stacked, rows)
    run = jax.jit(lambda a, inputs: by_hand(case.model, params, a, *inputs))
    for row, own in enumerate(adapters):
        close(jax.tree.map(lambda x, i=row: x[i], got), run(own, jax.tree.map(lambda x, i=row: x[i], rows)))


# --- costs ------------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """A step of a decoder with a cache of 512 places, as an argument."""

    @nn.compact
    def __call__(self, x, keys, values, index):
        q, k, v = (nn.DenseGeneral((8, 32), use_bias=False, name=name)(x) for name in "qkv")
        k = jax.lax.dynamic_update_slice(keys, k, (0, index, 0, 0))
        v = jax.lax.dynamic_update_slice(values, v, (0, index, 0, 0))
        seen = jnp.arange(keys.shape[1]) <= index
        p = jax.nn.softmax(jnp.where(seen, jnp.einsum("bqhd,bkhd->bhqk", q, k) * 32**-0.5, -1e30))
        y = nn.DenseGeneral(256, axis=(-2, -1), name="o")(jnp.einsum("bhqk,bkhd->bqhd", p, v))
        return nn.Dense(256, name="down")(nn.gelu(nn.Dense(1024, name="up")(y))), k, v


def wide():
    """The model, its abstract parameters, a bound prefix, and the arguments of a step of base and adapter."""
    cache = jax.ShapeDtypeStruct((4, 512, 8, 32), jnp.float32)
    inputs = jax.ShapeDtypeStruct((4, 1, 256), jnp.float32), cache, cache, jax.ShapeDtypeStruct((), jnp.int32)
    model = Wide()
    params = jax.eval_shape(lambda *xs: model.init(jax.random.key(0), *xs)["params"], *inputs)
    peft = jpeft.PrefixTuning(length=16).bind(model, params, *inputs)
    adapter = jax.eval_shape(lambda p: peft.init(jax.random.key(0), p), params)
    return model, peft, (params, adapter, *inputs)


def test_a_step_costs_little_more_than_without_a_prefix():
    model, peft, inputs = wide()

    def base(params, adapter, *inputs):
        return model.apply({"params": params}, *inputs)

    jax.config.update("jax_disable_most_optimizations", False)  # what is compared is what XLA makes of it
    plain, adapted = (jax.jit(f, donate_argnums=(3, 4)).lower(*inputs).compile() for f in (base, peft.apply))
    for name in ("flops", "bytes accessed"):
        assert adapted.cost_analysis()[name] <= 1.1 * plain.cost_analysis()[name], name
    assert adapted.memory_analysis().temp_size_in_bytes <= 1.1 * plain.memory_analysis().temp_size_in_bytes + 1e5


def test_a_prefix_adds_two_products_and_copies_no_keys():
    model, peft, inputs = wide()
    plain = Counter(primitives(jax.make_jaxpr(lambda p, a, *xs: model.apply({"params": p}, *xs))(*inputs).jaxpr))
    adapted = Counter(primitives(jax.make_jaxpr(peft.apply)(*inputs).jaxpr))
    added = adapted - plain
    assert not plain - adapted - Counter({"jit": 9, "pjit": 9, "custom_jvp_call": 9})  # calls that stand in place
    assert added["dot_general"] == 2 and added["concatenate"] == 0 and added["dynamic_update_slice"] == 0
    assert added.total() < 60
