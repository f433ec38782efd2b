"""A merge refuses weights that are not finite, and says which and why."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.errors import MergeError

LORA = jpeft.LoRA(rank=2, targets=["a"])
BOTH = jpeft.Chain(LORA, jpeft.Train("b"))


class Two(nn.Module):
    param_dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, param_dtype=self.param_dtype, name="b")(
            nn.Dense(64, param_dtype=self.param_dtype, name="a")(x)
        )


def bound(method, dtype=jnp.float32):
    """A Peft, its base and a fresh adapter."""
    model, x = Two(dtype), jnp.ones((2, 64), dtype)
    params = model.init(jax.random.key(0), x)["params"]
    peft = method.bind(model, params, x)
    return peft, params, peft.init(jax.random.key(1), params)


def filled(adapter, owner, leaf, value):
    """The adapter with one leaf full of a value, and the other half of its LoRA full of ones."""
    leaves = {name: jnp.ones_like(x) if "lora" in name else x for name, x in adapter[owner].items()}
    return {**adapter, owner: {**leaves, leaf: jnp.full_like(leaves[leaf], value)}}


@pytest.mark.parametrize(
    ("dtype", "owner", "leaf", "value", "said"),
    [
        ("float32", "a", "lora_b", np.nan, "'a/kernel' cannot be merged: the adapter's 'a/lora_b' holds NaN"),
        ("float32", "a", "lora_a", np.inf, "'a/kernel' cannot be merged: the adapter's 'a/lora_a' holds NaN"),
        ("float16", "a", "lora_b", 1e5, "'a/kernel' cannot be merged: the result is beyond the range of float16"),
        ("float16", "b", "kernel", 1e5, "'b/kernel' cannot be merged: the result is beyond the range of float16"),
        ("float32", "b", "bias", -np.inf, "'b/bias' cannot be merged: the adapter's 'b/bias' holds NaN or infinity"),
    ],
)
def test_what_is_not_finite_is_refused_by_name(dtype, owner, leaf, value, said):
    peft, params, adapter = bound(BOTH, dtype)
    adapter = jax.tree.map(lambda x: x.astype(jnp.float32), adapter)
    broken = filled(adapter, owner, leaf, value)
    with pytest.raises(MergeError) as caught:
        peft.merge(params, broken)
    assert str(caught.value).startswith(said) and "safe=False" in str(caught.value)
    merged, alone = peft.merge(params, broken, safe=False), filled(adapter, "a", "lora_b", 0.0)
    assert not np.isfinite(np.asarray(merged[owner]["kernel" if owner == "a" else leaf], np.float32)).all()
    assert jax.tree.map(lambda x: x.dtype, peft.merge(params, alone)) == jax.tree.map(lambda x: x.dtype, params)


def test_only_weights_that_change_are_looked_at():
    peft, params, adapter = bound(LORA)
    peft.merge({**params, "b": jax.tree.map(lambda x: x * jnp.inf, params["b"])}, adapter)
    with pytest.raises(MergeError, match="the base's 'a/kernel' holds NaN or infinity"):
        peft.merge({**params, "a": jax.tree.map(lambda x: x * jnp.inf, params["a"])}, adapter)


def test_codes_hide_no_overflow():
    peft, params, adapter = bound(LORA)
    quantized = jpeft.quantize(params, "int8", targets=["a"])
    for requantize in (True, False):
        with pytest.raises(MergeError, match="'a/kernel' cannot be merged"):
            peft.merge(quantized, filled(adapter, "a", "lora_b", np.nan), requantize=requantize)


def test_a_traced_merge_is_left_alone():
    peft, params, adapter = bound(LORA)
    broken = filled(adapter, "a", "lora_b", np.nan)
    assert np.isnan(jax.jit(peft.merge)(params, broken)["a"]["kernel"]).all()
    gradient = jax.grad(lambda adapter: peft.merge(params, adapter)["a"]["kernel"].sum())(broken)
    assert jax.tree.structure(gradient) == jax.tree.structure(adapter)
