"""Every method on NNX models gives what it gives on Linen models with the same parameters and the same adapter."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jpeft
from jpeft.binding import bind_survey
from jpeft.frontends import front_end
from tests.contract import TOLERANCE, bound_together, close
from tests.nnx.twins import MODES, TWINS, twin
from tests.zoo import METHODS, USES, moved

pytestmark = pytest.mark.usefixtures("quick_compiles")
DTYPES = ("float32", "bfloat16")
# Each use in one cell of modes and dtypes in turn; the exhaustive rest is the others.
CELLS = [(mode, dtype, scheme) for mode in MODES for dtype in DTYPES for scheme in (None, "nf4")]
ROWS = [
    pytest.param(use, *cell, marks=[] if (i - j) % len(CELLS) == 0 else pytest.mark.exhaustive)
    for i, use in enumerate(TWINS)
    for j, cell in enumerate(CELLS)
    if cell[2] is None or USES[use].block
]


@pytest.mark.parametrize(("use", "mode", "dtype", "scheme"), ROWS)
def test_outputs_and_gradients_are_those_of_the_linen_twin(use, mode, dtype, scheme, request):
    entries = {n: e for n, e in METHODS.items() if use in e.uses and (scheme is None or e.quantized)}
    kind = "scan" if "scan" in mode else mode
    if use == "attention":  # nnx.MultiHeadAttention masks in float32
        request.getfixturevalue("standard_promotion")
    theirs, _, params, x = bound_together(entries, use, kind, dtype, scheme)
    plain = jpeft.dequantize(params)
    model = twin(use, mode, jnp.dtype(dtype), plain)
    frontend = front_end(model)
    survey = frontend.survey(model, model, (x,), {})
    ours = {name: bind_survey(entry.make(USES[use]), model, model, survey, frontend) for name, entry in entries.items()}
    adapters = {name: moved(peft, params) for name, peft in theirs.items()}
    for name, peft in ours.items():
        assert dict(peft.structure) == dict(theirs[name].structure), name
        assert {s.via for s in peft.sites if s.kind == "weight"} <= {USES[use].via}, name

    @functools.partial(jax.jit, static_argnums=0)
    def run(linen, params, adapters):
        def loss(adapter, peft):
            y = peft.apply(params, adapter, x)
            return jnp.sin(y).astype(jnp.float32).sum(), y

        pefts = theirs if linen else ours
        grad = jax.grad(loss, has_aux=True, allow_int=True)
        return {name: grad(own, pefts[name]) for name, own in adapters.items()}

    found, expected = run(False, params, adapters), run(True, params, adapters)
    for name in entries:
        (grads, y), (want, z) = found[name], expected[name]
        assert y.dtype == z.dtype
        close(y, z, TOLERANCE[dtype], name)
        if dtype == "float32":
            pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True)
            for a, b in pairs:
                if a.dtype != jax.dtypes.float0:
                    close(a, b, 1e-4, name)
