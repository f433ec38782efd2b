"""The contract: what holds for every method on every use of a weight. The tables are in `tests.zoo`."""

import jax
import pytest

from jpeft.core import backend
from tests import contract
from tests.zoo import METHODS, MODES, USES

# Every pair of a use with a mode or a dtype; with --exhaustive, every triple.
CELLS = (("plain", "float32"), ("scan", "float32"), ("remat", "bfloat16"))
REST = tuple((mode, dtype) for mode in MODES for dtype in ("float32", "bfloat16") if (mode, dtype) not in CELLS)
# Every method, in every mode, on the uses it names first.
EACH = [
    pytest.param(use, mode, method, id=f"{use}-{mode}-{method}")
    for method, entry in METHODS.items()
    for use, mode in zip(entry.uses[:3] * 3, MODES, strict=False)
]


@pytest.fixture(autouse=True)
def quick_compiles():
    """These models are tiny: XLA's optimizations cost more than they give."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("mode", "dtype"), [*CELLS, *(pytest.param(*cell, marks=pytest.mark.exhaustive) for cell in REST)]
)
def test_running_under_an_adapter_is_running_the_unmodified_model_on_the_merged_tree(use, mode, dtype, monkeypatch):
    if dtype == "bfloat16":  # in the layout of an accelerator
        monkeypatch.setattr(backend, "flatten_tokens", lambda: False)
    contract.check_law(METHODS, use, mode, dtype)


@pytest.mark.parametrize(("use", "mode", "method"), EACH)
def test_a_fresh_adapter_changes_nothing_and_every_leaf_of_a_moved_one_learns(use, mode, method):
    contract.check_learns(METHODS[method], use, mode)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_stack_compile_once_and_come_back_from_disk(method, tmp_path):
    contract.check_stacks_and_saves(METHODS[method], tmp_path / "adapter")


@pytest.mark.parametrize("method", METHODS)
def test_a_peft_is_functions_of_trees(method):
    contract.check_trees(METHODS[method])


@pytest.mark.parametrize("method", METHODS)
def test_abstract_parameters_give_abstract_adapters_of_the_same_shapes(method):
    contract.check_abstract(METHODS[method])
