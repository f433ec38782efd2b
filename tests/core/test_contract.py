"""The contract: what holds for every method on every use of a weight. The tables are in `tests.zoo`."""

import jax
import pytest

from jpeft.core import backend
from tests import contract
from tests.zoo import METHODS, MODES, USES

# Every use, in the first cell of one of these rows in turn; with --exhaustive, in its whole row: in every mode and
# in both dtypes. Over all rows, every mode has had both dtypes.
ROWS = (
    (("plain", "float32"), ("scan", "bfloat16"), ("remat", "float32")),
    (("scan", "float32"), ("remat", "float32"), ("plain", "bfloat16")),
    (("remat", "bfloat16"), ("plain", "float32"), ("scan", "float32")),
)
LAW = [
    pytest.param(use, mode, dtype, id=f"{mode}-{dtype}-{use}", marks=[pytest.mark.exhaustive] if place else [])
    for number, use in enumerate(USES)
    for place, (mode, dtype) in enumerate(ROWS[number % len(ROWS)])
]
# Every method, on the uses it names first, in one mode in turn; with --exhaustive, in every mode.
EACH = [
    pytest.param(
        use, mode, method,
        id=f"{use}-{mode}-{method}",
        marks=[] if mode == list(MODES)[number % len(MODES)] else pytest.mark.exhaustive,
    )
    for number, (method, entry) in enumerate(METHODS.items())
    for use, mode in zip(entry.uses[:3] * 3, MODES, strict=False)
]  # fmt: skip


@pytest.fixture(autouse=True)
def quick_compiles():
    """These models are tiny: XLA's optimizations cost more than they give."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize(("use", "mode", "dtype"), LAW)
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
