"""The contract: what holds for every method on every use of a weight. The tables are in `tests.zoo`."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from jpeft.core import backend
from tests import contract
from tests.zoo import METHODS, MODES, SOME, USES, WEIGHTS, Entry

pytestmark = pytest.mark.usefixtures("quick_compiles")

# Every way of use, with all methods that act on it, in the first cell of one of these rows in turn; with --products,
# in its whole row. Over all rows, every mode has had both dtypes. The ways that most methods are tried on go first, so
# that each method has the first cells of all rows.
ROWS = (
    (("plain", "float32"), ("scan", "float32"), ("remat", "bfloat16")),
    (("scan", "bfloat16"), ("remat", "float32"), ("plain", "float32")),
    (("remat", "float32"), ("plain", "bfloat16"), ("scan", "float32")),
)
ROW_OF = {use: ROWS[i % len(ROWS)] for i, use in enumerate(dict.fromkeys(("attention", *SOME, *WEIGHTS, *USES)))}
USED = [
    pytest.param(use, mode, dtype, id=f"{mode}-{dtype}-{use}", marks=[pytest.mark.product] if place else [])
    for use, row in ROW_OF.items()
    for place, (mode, dtype) in enumerate(row)
]

# Every method, with every pair of a mode, a dtype and whether the base is quantized once, on these uses in turn; with
# --products, in every cell.
DTYPES = ("float32", "bfloat16")
BASES = (None, "int8", "nf4")
PAIRS = [(*ROWS[i][0], None) for i in range(3)]
PAIRS += [("plain", "bfloat16", "int8"), ("scan", "float32", "nf4"), ("remat", "bfloat16", "int8")]
CELLS = [*PAIRS, *(cell for cell in itertools.product(MODES, DTYPES, BASES) if cell not in PAIRS)]
COMMON = (
    "dense", "fused qkv", "einsum, experts", "embed, tied by attend", "conv 2-D strided", "raw, in a loop",
)  # fmt: skip
# What learns, in one of these each, two of three with a quantized base; with --products, in all.
LEARNING = [(mode, base) for mode in MODES for base in BASES]


def in_turn(cells: Sequence[Any], default: Callable[[str, Any], bool]) -> list[Any]:
    """The methods that take a cell on the same use run in one program; ``default`` chooses by method and cell."""
    programs: dict[Any, dict[str, Entry]] = {}
    for name, entry in METHODS.items():
        own = [use for use in entry.uses if USES[use].block]
        for turn, cell in enumerate(cells):
            at = (turn + turn // 3) % len(COMMON)  # so that a base is not always on the same of three uses
            use = next((use for use in COMMON[at:] + COMMON[:at] if use in own), own[turn % len(own)])
            if cell[-1] is None or entry.quantized:
                programs.setdefault((default(name, cell), use, cell), {})[name] = entry
    return [
        pytest.param(
            entries, use, *cell, id="-".join(map(str, (*cell, use))), marks=[] if usual else pytest.mark.product
        )
        for (usual, use, cell), entries in programs.items()
    ]


def pairs(method: str, cell: tuple[str, str, str | None]) -> bool:
    """Whether a cell is of the pairs, and no use has it by default in the test above."""
    mode, dtype, base = cell
    met = {ROW_OF[use][0] for use in METHODS[method].uses}
    return cell in PAIRS and (base is not None or (mode, dtype) not in met)


def learns(method: str, cell: tuple[str, str | None]) -> bool:
    own = [cell for cell in LEARNING if cell[-1] is None or METHODS[method].quantized]
    return cell == own[list(METHODS).index(method) % len(own)]


@pytest.mark.parametrize(("use", "mode", "dtype"), USED)
def test_running_under_an_adapter_is_running_the_unmodified_model_on_the_merged_tree(use, mode, dtype, monkeypatch):
    if dtype == "bfloat16":  # in the layout of an accelerator
        monkeypatch.setattr(backend, "flatten_tokens", lambda: False)
    contract.check_law({name: entry for name, entry in METHODS.items() if use in entry.uses}, use, mode, dtype)


@pytest.mark.parametrize(("entries", "use", "mode", "dtype", "base"), in_turn(CELLS, pairs))
def test_the_law_holds_for_every_mode_dtype_and_base(entries, use, mode, dtype, base):
    contract.check_law(entries, use, mode, dtype, base)


@pytest.mark.parametrize(("entries", "use", "mode", "base"), in_turn(LEARNING, learns))
def test_a_fresh_adapter_changes_nothing_and_a_step_moves_every_leaf_that_trains(entries, use, mode, base):
    contract.check_learns(entries, use, mode, base)


@pytest.mark.parametrize("use", dict.fromkeys(entry.uses[0] for entry in METHODS.values()))
def test_stacked_adapters_give_what_each_gives_by_itself(use):
    contract.check_stacks({name: entry for name, entry in METHODS.items() if entry.uses[0] == use}, use)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_come_back_from_disk(method, tmp_path):
    contract.check_saves(METHODS[method], tmp_path / "adapter")


@pytest.mark.parametrize("method", METHODS)
def test_a_peft_is_functions_of_trees(method):
    contract.check_trees(METHODS[method])


@pytest.mark.parametrize("method", METHODS)
def test_abstract_parameters_give_abstract_adapters_of_the_same_shapes(method):
    contract.check_abstract(METHODS[method])
