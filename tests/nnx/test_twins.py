"""Every method on NNX models gives what it gives on Linen models with the same parameters and the same adapter."""

import functools

import jax
import jax.numpy as jnp
import pytest

from tests.contract import TOLERANCE, bound_together, close
from tests.nnx.twins import MODES, TWINS
from tests.zoo import METHODS, USES, moved

pytestmark = pytest.mark.usefixtures("quick_compiles")
# That the law holds on every use is in `tests/core/test_contract.py`. These have one cell each; with --products, all.
USUAL = (
    "dense", "embed, tied by attend", "fused qkv", "einsum, experts", "conv 2-D strided", "raw, in a loop", "attention",
)  # fmt: skip
CELLS = [(mode, dtype, scheme) for scheme in (None, "nf4") for dtype in ("float32", "bfloat16") for mode in MODES]


def _mark(use, turn):
    is_own = use in USUAL and turn == USUAL.index(use) % len(MODES)
    return pytest.mark.exhaustive if is_own else pytest.mark.product


ROWS = [
    pytest.param(use, *cell, marks=_mark(use, turn))
    for use in TWINS
    for turn, cell in enumerate(CELLS)
    if cell[2] is None or USES[use].block
]


@pytest.mark.parametrize(("use", "mode", "dtype", "scheme"), ROWS)
def test_outputs_and_gradients_are_those_of_the_linen_twin(use, mode, dtype, scheme, request):
    entries = {n: e for n, e in METHODS.items() if use in e.uses and (scheme is None or e.quantized)}
    kind = "scan" if "scan" in mode else mode
    if use == "attention":  # nnx.MultiHeadAttention masks in float32
        request.getfixturevalue("standard_promotion")
    theirs, _, params, x = bound_together(entries, use, kind, dtype, scheme)
    ours, *_ = bound_together(entries, use, mode, dtype, scheme, "nnx")
    adapters = {name: moved(peft, params) for name, peft in theirs.items()}
    for name, peft in ours.items():
        assert dict(peft.structure) == dict(theirs[name].structure), name

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
