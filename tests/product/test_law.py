"""The law over the whole product: every method that merges, on every use of a weight, in every mode, in both dtypes.

`tests/test_contract.py` runs a part of it with each test run; `.ci/run` runs all.
"""

import jax
import jax.numpy as jnp
import pytest

from tests.test_contract import bound, close, differ, mergeable, quick_compiles  # noqa: F401
from tests.zoo import METHODS, MODES, USES, moved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use", USES)
def test_running_under_an_adapter_is_running_the_unmodified_model_on_the_merged_tree(use, mode, dtype):
    cells = {name: bound(use, mode, name, dtype) for name, entry in METHODS.items() if use in entry.uses}
    cells = {name: cell for name, cell in cells.items() if mergeable(cell[0])}
    assert {"LoRA", "IA3", "IA3 feedforward", "LoRA + IA3"} <= set(cells)
    _, model, params, x = cells["LoRA"]

    @jax.jit  # one program for all methods: compiling is what takes the time
    def run(params, adapters):
        plain = lambda params: model.apply({"params": params}, x)  # noqa: E731
        pairs = {
            name: (cells[name][0].apply(params, own, x), plain(cells[name][0].merge(params, own)))
            for name, own in adapters.items()
        }
        return plain(params), pairs

    base, pairs = run(params, {name: moved(cell[0], params) for name, cell in cells.items()})
    for name, (applied, merged) in pairs.items():
        assert applied.dtype == merged.dtype == base.dtype == jnp.dtype(dtype), name
        close(applied, merged, 1e-5 if dtype == "float32" else 0.04)
        assert differ(applied, base), name
