"""Geometries that are registered from outside."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jpeft
from jpeft.core import geometry
from tests import contract
from tests.contract import close, differ
from tests.linen.pairs import pairwise
from tests.zoo import METHODS, USES, Model, moved, parameters


def bound(use: str, mode: str, method: str):
    return contract.bound(METHODS[method], use, mode)


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


OWNERS = {"class": Flipped, "name": "Flipped"}
FORMS = {
    "einsum": "...i,oi->...o",
    "geometry": geometry.Contraction(leaf="w", spec="...i,oi->...o", shape=(6, 4), stored=(6, 4)),
    "function": _of_call,
}


@pytest.mark.parametrize(("owner", "how", "method"), pairwise(OWNERS, FORMS, ("LoRA", "IA3", "IA3 feedforward")))
def test_register_geometry_gives_a_foreign_weight_the_name_of_its_module(owner, how, method, registries):
    owner, how = OWNERS[owner], FORMS[how]
    model, x = Model(lambda x: Flipped(6, name="op")(x), "scan"), jnp.arange(24.0).reshape(2, 3, 4) / 24
    params = parameters(model, x)
    make = METHODS[method].make
    raw = make(USES["raw"]).bind(model, params, x)
    assert [(s.name, s.via) for s in raw.sites] == [("block/op/w", "fused")]

    jpeft.register_geometry(owner, how)
    peft = make(USES["dense"]).bind(model, params, x)
    (site,) = peft.sites
    assert (site.name, site.via, site.inputs, site.outputs) == ("block/op", "fused", 4, 6)
    adapter = moved(peft, params)

    @jax.jit
    def run(params, adapter):
        merged = peft.merge(params, adapter)
        return peft.apply(params, adapter, x), *(model.apply({"params": p}, x) for p in (merged, params))

    y, want, base = run(params, adapter)
    close(y, want)
    assert differ(y, base)


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
