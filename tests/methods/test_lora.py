"""DoRA and the starts of LoRA against their equations; mistakes in their fields."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.core import backend
from jpeft.core.quantized import dequantize_leaf
from jpeft.core.statistics import LowRank
from jpeft.methods import DoRA
from jpeft.methods.eva import redistribute
from tests.zoo import moved

IN, OUT, RANK, ALPHA = 12, 10, 4, 6
S = ALPHA / RANK
FEW, MANY = 4, 96  # tokens for which LoRA multiplies by the factors, and by the sum of weights


def numbers(shape, seed):
    return np.random.default_rng(seed).normal(0, 0.5, shape).astype(np.float32)


def bound(method, tokens=FEW, bias=True, **dense):
    model, x = nn.Sequential([nn.Dense(OUT, use_bias=bias, **dense)]), jnp.asarray(numbers((tokens, IN), 0))
    params = {"kernel": jnp.asarray(numbers((IN, OUT), 1))}
    params = {"layers_0": params | ({"bias": jnp.asarray(numbers((OUT,), 2))} if bias else {})}
    return method.bind(model, params, x), params, x


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(("tokens", "bias"), [(FEW, True), (MANY, True), (MANY, False)])
def test_dora_is_its_equation_with_norms_that_are_constants_for_the_gradient(tokens, bias, flat, monkeypatch):
    monkeypatch.setattr(backend, "flatten_tokens", lambda: flat)
    peft, params, x = bound(DoRA(rank=RANK, alpha=ALPHA, targets="layers_0"), tokens, bias)
    adapter, t = moved(peft, params), numbers((tokens, OUT), 3)
    direction = jax.tree.map(np.ones_like, adapter)

    @jax.jit
    def run(adapter, x):
        y, pull = jax.vjp(lambda adapter, x: peft.apply(params, adapter, x), adapter, x)
        forward = jax.jvp(lambda adapter: peft.apply(params, adapter, x), (adapter,), (direction,))[1]
        return y, pull(t), forward, peft.merge(params, adapter)

    y, (grads, dx), forward, merged = run(adapter, x)

    own = {n: np.asarray(v, np.float64) for n, v in (adapter["layers_0"] | params["layers_0"]).items()}
    x, w, a, b, m = (np.float64(v) for v in (x, *(own[n] for n in ("kernel", "lora_a", "lora_b", "dora_m"))))
    v = w + S * a @ b
    f = m / np.sqrt((v**2).sum(0))
    dv = x.T @ (t * f)  # the gradient of V

    def near(got, want):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)

    near(y, x @ v * f + own.get("bias", 0))
    near(merged["layers_0"]["kernel"], v * f)
    near(dx, (t * f) @ v.T)
    near(grads["layers_0"]["lora_a"], S * dv @ b.T)
    near(grads["layers_0"]["lora_b"], S * a.T @ dv)
    near(grads["layers_0"]["dora_m"], (t * (x @ v)).sum(0) * f / m)
    near(np.vdot(forward, t), sum(g.sum() for g in jax.tree.leaves(grads)))


def test_a_fresh_dora_has_the_norms_of_the_columns_which_bfloat16_does_not_round():
    peft, params, x = bound(DoRA(rank=RANK, targets="layers_0"), MANY, dtype=jnp.bfloat16)
    adapter, w = peft.init(jax.random.key(0), params), params["layers_0"]["kernel"]
    np.testing.assert_allclose(adapter["layers_0"]["dora_m"], np.linalg.norm(w, axis=0), rtol=1e-6)
    base = peft.model.apply({"params": params}, x)
    fresh = peft.apply(params, adapter, x)
    assert np.abs(np.float32(fresh) - np.float32(base)).max() <= 2**-7  # a bit of the largest at most

    # A change of m below what bfloat16 resolves reaches the product.
    m = adapter["layers_0"]["dora_m"].astype(jnp.bfloat16).astype(jnp.float32)
    own = [{**adapter["layers_0"], "dora_m": m * scale} for scale in (1.0, 1 + 2**-10)]
    before, after = (peft.apply(params, {"layers_0": leaves}, x) for leaves in own)
    assert (before != after).any()


def test_dora_of_a_float64_model_is_float64():
    with jax.enable_x64(True):
        for dtype, rtol in (("float64", 1e-14), ("float32", 1e-6)):
            peft, params, x = bound(DoRA(rank=RANK, targets="layers_0", dtype=dtype))
            params, x = jax.tree.map(lambda v: v.astype(jnp.float64), (params, x))
            start = peft.init(jax.random.key(0), params)
            norms = np.linalg.norm(params["layers_0"]["kernel"], axis=0)
            np.testing.assert_allclose(start["layers_0"]["dora_m"], norms, rtol=rtol)
        adapter = start | {"layers_0": start["layers_0"] | {"lora_b": jnp.full((RANK, OUT), 0.1, jnp.float32)}}
        y, merged = jax.jit(lambda a: (peft.apply(params, a, x), peft.merge(params, a)))(adapter)
        np.testing.assert_allclose(y, x @ merged["layers_0"]["kernel"] + params["layers_0"]["bias"], rtol=1e-12)


def test_a_column_of_zeros_stays_finite():
    peft, params, x = bound(DoRA(rank=RANK, targets="layers_0"), bias=False)
    params = {"layers_0": {"kernel": params["layers_0"]["kernel"].at[:, 0].set(0)}}
    adapter = peft.init(jax.random.key(0), params)
    y, pull = jax.vjp(lambda adapter: peft.apply(params, adapter, x), adapter)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, pull(jnp.ones_like(y)))))


@pytest.mark.parametrize("cls", [jpeft.LoRA, DoRA])
def test_a_start_that_the_adapter_carries_is_subtracted(cls):
    peft, params, x = bound(cls(rank=RANK, alpha=ALPHA, init_weights="pissa", targets="layers_0"))
    fresh = peft.init(jax.random.key(0), params)
    own = dict(fresh["layers_0"])
    assert peft.non_trainable_paths == {("layers_0", "lora_start_a"), ("layers_0", "lora_start_b")}
    own["lora_a"], own["lora_b"] = (own[n] + numbers(own[n].shape, 5) for n in ("lora_a", "lora_b"))
    a, b, a0, b0 = (np.float64(own[n]) for n in ("lora_a", "lora_b", "lora_start_a", "lora_start_b"))
    w, bias = (np.float64(params["layers_0"][n]) for n in ("kernel", "bias"))
    u, s, vt = np.linalg.svd(w)
    np.testing.assert_allclose(S * a0 @ b0, (u[:, :RANK] * s[:RANK]) @ vt[:RANK], atol=1e-5)
    v = w + S * (a @ b - a0 @ b0)
    v = v if cls is jpeft.LoRA else v * np.linalg.norm(w, axis=0) / np.linalg.norm(v, axis=0)
    np.testing.assert_allclose(peft.apply(params, {"layers_0": own}, x), x @ v + bias, atol=1e-4)
    np.testing.assert_allclose(peft.merge(params, {"layers_0": own})["layers_0"]["kernel"], v, atol=1e-4)


def test_small_steps_from_a_start_are_seen_in_bfloat16():
    method = jpeft.LoRA(rank=RANK, init_weights="olora", targets="layers_0")
    peft, params, x = bound(method, bias=False, dtype=jnp.bfloat16)
    params = {"layers_0": {"kernel": jnp.zeros((IN, OUT))}}
    own = bound(method)[0].init(jax.random.key(0), bound(method)[1])["layers_0"]
    step = 1e-4 * numbers((IN, RANK), 7)  # far below what bfloat16 resolves beside A
    got = peft.apply(params, {"layers_0": {**own, "lora_a": own["lora_a"] + step}}, x)
    want = np.float64(x) @ step @ np.float64(own["lora_b"])
    assert np.abs(np.float32(got) - want).max() < 0.02 * np.abs(want).max()


def test_a_frozen_a_and_a_frozen_b():
    frozen = {"freeze_a": {"freeze_a": True}, "mica": {"init_weights": "mica"}}
    paths = {k: bound(jpeft.LoRA(rank=2, targets="layers_0", **f))[0].non_trainable_paths for k, f in frozen.items()}
    assert paths == {"freeze_a": {("layers_0", "lora_a")}, "mica": {("layers_0", "lora_b")}}


def test_loftq_fits_doras_norms_to_the_quantized_weight():
    peft, params, _ = bound(DoRA(rank=RANK, targets="layers_0"))
    base, adapter = jpeft.loftq(peft, params, jax.random.key(0), "int8", block=2, targets=".*")
    own, q = adapter["layers_0"], np.float64(dequantize_leaf(base["layers_0"]["kernel"]))
    v = q + np.float64(own["lora_a"]) @ np.float64(own["lora_b"])
    np.testing.assert_allclose(own["dora_m"], np.linalg.norm(v, axis=0), rtol=1e-5)
    peft, params, _ = bound(jpeft.LoRA(rank=RANK, targets="layers_0", init_weights="pissa"))
    with pytest.raises(
        ValueError, match="LoftQ computes A and B itself, but LoRA at 'layers_0' has init_weights='pissa'"
    ):
        jpeft.loftq(peft, params, jax.random.key(0))


FIELDS = [
    ({"init_weights": "pizza"}, r"LoRA.init_weights must be one of kaiming, .*, pissa_niter_<n>, got 'pizza'"),
    ({"init_weights": "pissa_niter_0"}, "LoRA.init_weights must be one of"),
    (
        {"init_weights": "corda", "init_options": {"corda_method": "x"}},
        r"init_options\['corda_method'\] must be one of ipm",
    ),
    (
        {"init_weights": "corda", "init_options": {"direction": "ArBr"}},
        "init_options of 'corda' must be one of corda_method",
    ),
    ({"init_options": {"scale": "unit"}}, "init_options of 'kaiming' must be one of none, got 'scale'"),
    ({"init_weights": "lora_ga", "init_options": {"stable_gamma": 0}}, "must be a positive number, got 0"),
    ({"init_weights": "mica", "freeze_a": True}, "nothing would train"),
    ({"freeze_a": 1}, "LoRA.freeze_a must be true or false, got 1"),
]


@pytest.mark.parametrize(("fields", "message"), FIELDS)
def test_fields_that_make_no_sense_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        jpeft.LoRA(**fields)


@pytest.mark.parametrize(
    ("init", "rank", "needed"),
    [("pissa", 11, 11), ("mica", 11, 11), ("corda", 11, 11), ("lora_ga", 6, 12), ("eva", 13, 13)],
)
def test_a_start_of_more_directions_than_the_weight_has_raises(init, rank, needed):
    there = IN if init == "eva" else OUT
    with pytest.raises(ValueError, match=f"takes {needed} directions, but 'layers_0' has {there} \\({IN}×{OUT}\\)"):
        bound(jpeft.LoRA(rank=rank, init_weights=init, targets="layers_0"))


@pytest.mark.parametrize("fields", [{"init_weights": "eva"}, {"freeze_a": True}])
def test_an_embedding_has_no_start_from_data_and_no_frozen_a(fields):
    model, ids = nn.Sequential([nn.Embed(7, 6)]), jnp.zeros((1, 2), jnp.int32)
    params = model.init(jax.random.key(0), ids)["params"]
    with pytest.raises(ValueError, match="has no meaning for the embedding 'layers_0'; set overrides"):
        jpeft.LoRA(rank=2, targets="layers_0", **fields).bind(model, params, ids)


def test_a_start_from_data_needs_the_data():
    peft, params, _ = bound(jpeft.LoRA(rank=2, init_weights="eva", targets="layers_0"))
    with pytest.raises(ValueError, match=r"jpeft\.observe"):
        peft.init(jax.random.key(0), params)


def test_ranks_of_stacked_layers_cost_all_of_them_and_a_site_without_rank_is_left_out():
    spread, flat = np.diag([8.0, 1, 0.5, 0.5]), np.eye(4)
    seen = {
        "layers/query": {"covariance": np.stack([spread, spread])},  # two layers
        "value": {"covariance": flat},
        "other/value": {"covariance": np.diag([1.0, 1e-9, 0, 0])},
    }
    method = jpeft.LoRA(rank=1, alpha=2, overrides={"layers/query": {"dropout": 0.1}}, exclude=["head"])
    got = redistribute(method, seen, rho=3)
    # other/value explains all by 1 direction, query .8 in each of its 2 layers, and then the budget of 4 has one left.
    assert {k: dict(f) for k, f in got.overrides.items()} == {
        "layers/query": {"dropout": 0.1, "rank": 1, "alpha": 2.0},
        "^value": {"rank": 1, "alpha": 2.0},
        "other/value": {"rank": 1, "alpha": 2.0},
    }
    assert got.exclude == ("head",)
    without = redistribute(
        jpeft.LoRA(rank=1, exclude=["head"]), {"a": seen["other/value"], "b": {"covariance": flat / 1e9}}, 2
    )
    assert without.exclude == ("head",) and set(without.overrides) == {"a", "b"}
    none = redistribute(
        jpeft.LoRA(rank=1, exclude=["head"]), {"a": {"covariance": flat[:2, :2]}, "b": {"covariance": np.eye(50)}}, 2
    )
    assert none.exclude == "(?:.*/)?head|b" and dict(none.overrides["a"]) == {"rank": 2}
    only = jpeft.LoRA(rank=1, overrides={"query": {"layers": [1]}, "b": {"dropout": 0.1}})
    stack = LowRank(np.sqrt(np.stack([flat, spread])), np.sqrt(np.stack([flat, spread])))  # sketched, and of two layers
    seen = {"layers/query": {"covariance": stack}, "b": {"covariance": np.eye(50)}}
    layer = redistribute(only, seen)  # the first of the two does not count
    assert {k: dict(f) for k, f in layer.overrides.items()} == {
        "layers/query": {"rank": 2, "layers": (1,)}, "query": {"layers": (1,)}
    }  # fmt: skip
    assert layer.exclude == "b"
    with pytest.raises(ValueError, match=r"rho must be a number of at least 1, got 0\.5"):
        redistribute(method, seen, 0.5)
    with pytest.raises(ValueError, match="hold gradient, ranks depend on the covariance"):
        redistribute(method, {"a": {"gradient": flat}})
