"""Adapters of small ranks and other scales in the leaves of larger ones: they do the same."""

import jax
import numpy as np
import pytest

import jpeft
from jpeft.core.fitting import crop, leaf_factors, pad, scaled
from jpeft.core.tree import flatten, unflatten
from tests.contract import base, close
from tests.zoo import USES, moved

M = jpeft.methods
# A small configuration, and one that takes its adapters.
FITS = {
    "LoRA": (jpeft.LoRA(rank=2, alpha=3), jpeft.LoRA(rank=5, alpha=1, dropout=0.5)),
    "LoRA rslora": (jpeft.LoRA(rank=2, rslora=True, alpha=3, freeze_a=True), jpeft.LoRA(rank=3)),
    "LoRA pissa": (
        jpeft.LoRA(rank=1, alpha=3, init_weights="pissa"), jpeft.LoRA(rank=3, init_weights="olora", dtype="bfloat16")
    ),
    "DoRA": (M.DoRA(rank=2, alpha=3), M.DoRA(rank=4)),
    "AdaLoRA": (M.AdaLoRA(rank=2, alpha=3), M.AdaLoRA(rank=4)),
    "HiRA": (M.HiRA(rank=2), M.HiRA(rank=4)),
    "LoHa": (M.LoHa(rank=2, alpha=3), M.LoHa(rank=3)),
    "MoLE": (M.MoLE(rank=2, alpha=3, n_experts=3), M.MoLE(rank=2, n_experts=3)),
    "Poly": (M.Poly(rank=2, n_skills=3), M.Poly(rank=4, n_skills=3)),
    "Bottleneck": tuple(jpeft.Bottleneck(size=n, activation="gelu", targets=r".*/op") for n in (2, 5)),
    "ParallelAdapter": tuple(M.ParallelAdapter(size=n, activation="sigmoid", targets=r".*/op") for n in (2, 3)),
    "a member of a chain": (jpeft.IA3(), jpeft.Chain(jpeft.IA3())),
}  # fmt: skip


def bound(method, use="dense", mode="scan"):
    model, params, x, _ = base(use, mode, "float32")
    return method.bind(model, params, x), params, x


@pytest.mark.parametrize("name", FITS)
def test_a_larger_configuration_does_the_same_with_padded_and_scaled_leaves(name):
    small, large = FITS[name]
    (peft, params, x), (other, _, _) = bound(small), bound(large)
    adapter = moved(peft, params)
    inside = pad(other, peft, adapter)
    assert {p: v.shape for p, v in flatten(inside).items()} == {p: shape for p, (shape, _) in other.structure}
    fitted = unflatten(scaled(flatten(inside), leaf_factors(other, peft)))
    close(other.apply(params, fitted, x), peft.apply(params, adapter, x))
    jax.tree.map(np.testing.assert_array_equal, crop(other, peft, inside), adapter)


@pytest.mark.parametrize("use", ["einsum, experts", "conv 2-D strided", "fused qkv", "embed, tied by attend"])
def test_every_way_in_which_a_weight_is_stored(use):
    parts = {"targets": USES[use].targets, "parts": USES[use].parts}
    peft, params, x = bound(jpeft.LoRA(rank=2, alpha=3, **parts), use)
    other, _, _ = bound(jpeft.LoRA(rank=3, **parts), use)
    adapter = moved(peft, params)
    fitted = unflatten(scaled(flatten(pad(other, peft, adapter)), leaf_factors(other, peft)))
    close(other.apply(params, fitted, x), peft.apply(params, adapter, x))


BAD = {
    "above": (jpeft.LoRA(rank=4), jpeft.LoRA(rank=2), r"'block/op/lora_a' has shape \(2, 4, 4\), above the .2, 4, 2."),
    "another method": (jpeft.IA3(), jpeft.LoRA(), "the adapter is of IA3, and this Peft is of LoRA"),
    "another site": (jpeft.LoRA(), jpeft.LoRA(targets=r".*/key"), "acts on 'block/op/.*', where this Peft has no LoRA"),
    "another start": (jpeft.LoRA(init_weights="pissa", rank=2), jpeft.LoRA(rank=2), "no leaf 'lora_start_a' here"),
    "another activation": (
        jpeft.Bottleneck(size=2, targets=".*/op", activation="gelu"), jpeft.Bottleneck(size=2, targets=".*/op"),
        "Bottleneck at 'block/op': activation is 'gelu' in the adapter, and 'relu' here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name):
    small, large, message = BAD[name]
    use = "attention" if name == "another site" else "dense"
    (peft, params, _), (other, _, _) = bound(small, use), bound(large, use)
    with pytest.raises(ValueError, match=message):
        pad(other, peft, moved(peft, params))


def test_sites_that_the_adapter_lacks_are_told():
    peft, params, _ = bound(jpeft.LoRA(rank=2, targets=r".*/key"), "attention")
    other, _, _ = bound(jpeft.LoRA(rank=2, targets=r".*/(key|value)"), "attention")
    with pytest.raises(ValueError, match="has no leaf 'block/op/value/lora_a', which this Peft has"):
        pad(other, peft, moved(peft, params))
