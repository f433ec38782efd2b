"""The contract: what holds for every method on every use of a weight, on Linen and on NNX.

The tables are in `tests.zoo`, and those of NNX models with the same parameters in `tests.nnx.twins`.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from jpeft.core import backend
from tests import contract
from tests.nnx import twins
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
# On NNX, one cell of each use in turn.
TURNS = tuple(itertools.product(twins.MODES, ("float32", "bfloat16")))
TURN_OF = {use: TURNS[i % len(TURNS)] for i, use in enumerate(use for use in ROW_OF if use in twins.TWINS)}


def _used(use: str, mode: str, dtype: str, frontend: str, usual: bool) -> Any:
    name = f"{frontend}-{mode}-{dtype}-{use}"
    return pytest.param(use, mode, dtype, frontend, id=name, marks=[] if usual else [pytest.mark.product])


USED = [
    _used(use, mode, dtype, "linen", not place)
    for use, row in ROW_OF.items()
    for place, (mode, dtype) in enumerate(row)
] + [_used(use, *cell, "nnx", cell == own) for use, own in TURN_OF.items() for cell in TURNS]

# Every method, with every pair of a mode, a dtype and whether the base is quantized once, on these uses in turn; with
# --products, in every cell.
DTYPES = ("float32", "bfloat16")
BASES = (None, "int8", "nf4")
LINEN_PAIRS = [(*ROWS[i][0], None) for i in range(3)]
LINEN_PAIRS += [("plain", "bfloat16", "int8"), ("scan", "float32", "nf4"), ("remat", "bfloat16", "int8")]
NNX_PAIRS = [("scan", "bfloat16", "int8"), ("scan over the state", "float32", "nf4")]
PAIRS = {"linen": LINEN_PAIRS, "nnx": NNX_PAIRS}
MODES_OF = {"linen": MODES, "nnx": twins.MODES}


def cells_of(frontend: str) -> list[Any]:
    whole = itertools.product(MODES_OF[frontend], DTYPES, BASES)
    return [*PAIRS[frontend], *(cell for cell in whole if cell not in PAIRS[frontend])]


COMMON = (
    "dense", "fused qkv", "einsum, experts", "embed, tied by attend", "conv 2-D strided", "raw, in a loop",
)  # fmt: skip


def learning_cells(frontend: str) -> list[Any]:
    """What learns, in one of these each, two of three with a quantized base; with --products, in all."""
    return [(mode, base) for mode in MODES_OF[frontend] for base in BASES]


def in_turn(cells_of: Callable[[str], Sequence[Any]], default: Callable[[str, Any, str], bool]) -> list[Any]:
    """The methods that take a cell on the same use run in one program; ``default`` chooses by method and cell."""
    return [param for frontend in MODES_OF for param in _in_turn(cells_of(frontend), default, frontend)]


def _in_turn(cells: Sequence[Any], default: Callable[[str, Any, str], bool], frontend: str) -> list[Any]:
    programs: dict[Any, dict[str, Entry]] = {}
    for name, entry in METHODS.items():
        own = [use for use in entry.uses if USES[use].block and (frontend == "linen" or use in twins.TWINS)]
        for turn, cell in enumerate(cells):
            at = (turn + turn // 3) % len(COMMON)  # so that a base is not always on the same of three uses
            use = next((use for use in COMMON[at:] + COMMON[:at] if use in own), own[turn % len(own)])
            if cell[-1] is None or entry.quantized:
                programs.setdefault((default(name, cell, frontend), use, cell), {})[name] = entry
    return [
        pytest.param(
            entries,
            use,
            *cell,
            frontend,
            id="-".join(map(str, (frontend, *cell, use))),
            marks=[] if usual else pytest.mark.product,
        )
        for (usual, use, cell), entries in programs.items()
    ]


def pairs(method: str, cell: tuple[str, str, str | None], frontend: str) -> bool:
    """Whether a cell is of the pairs, and no use has it by default in the test above."""
    mode, dtype, base = cell
    met = {ROW_OF[use][0] for use in METHODS[method].uses} if frontend == "linen" else set()
    return cell in PAIRS[frontend] and (base is not None or (mode, dtype) not in met)


def learns(method: str, cell: tuple[str, str | None], frontend: str) -> bool:
    own = [cell for cell in learning_cells(frontend) if cell[-1] is None or METHODS[method].quantized]
    return cell == own[list(METHODS).index(method) % len(own)]


each_front_end = pytest.mark.parametrize("frontend", MODES_OF)


@pytest.mark.parametrize(("use", "mode", "dtype", "frontend"), USED)
def test_running_under_an_adapter_is_running_the_unmodified_model_on_the_merged_tree(
    use, mode, dtype, frontend, monkeypatch, request
):
    if dtype == "bfloat16":  # in the layout of an accelerator
        monkeypatch.setattr(backend, "flatten_tokens", lambda: False)
    _promotion(use, frontend, request)
    entries = {name: entry for name, entry in METHODS.items() if use in entry.uses}
    contract.check_law(entries, use, mode, dtype, frontend=frontend)


@pytest.mark.parametrize(("entries", "use", "mode", "dtype", "base", "frontend"), in_turn(cells_of, pairs))
def test_the_law_holds_for_every_mode_dtype_and_base(entries, use, mode, dtype, base, frontend, request):
    _promotion(use, frontend, request)
    contract.check_law(entries, use, mode, dtype, base, frontend)


@pytest.mark.parametrize(("entries", "use", "mode", "base", "frontend"), in_turn(learning_cells, learns))
def test_a_fresh_adapter_changes_nothing_and_a_step_moves_every_leaf_that_trains(
    entries, use, mode, base, frontend, request
):
    _promotion(use, frontend, request)
    contract.check_learns(entries, use, mode, base, frontend)


@each_front_end
@pytest.mark.parametrize("use", dict.fromkeys(entry.uses[0] for entry in METHODS.values()))
def test_rows_of_a_batch_run_each_under_its_own_adapter(use, frontend):
    entries = {name: entry for name, entry in METHODS.items() if entry.uses[0] == use}
    contract.check_banks(entries, use, frontend)


@each_front_end
@pytest.mark.parametrize("use", sorted({entry.uses[0] for entry in METHODS.values()}))
def test_stacked_adapters_give_what_each_gives_by_itself(use, frontend):
    entries = {name: entry for name, entry in METHODS.items() if entry.uses[0] == use}
    contract.check_stacks(entries, use, frontend)


@each_front_end
@pytest.mark.parametrize("method", METHODS)
def test_adapters_come_back_from_disk(method, frontend, tmp_path):
    contract.check_saves(METHODS[method], tmp_path / "adapter", frontend)


@each_front_end
@pytest.mark.parametrize("method", METHODS)
def test_a_peft_is_functions_of_trees(method, frontend):
    contract.check_trees(METHODS[method], frontend)


@each_front_end
@pytest.mark.parametrize("method", METHODS)
def test_abstract_parameters_give_abstract_adapters_of_the_same_shapes(method, frontend):
    contract.check_abstract(METHODS[method], frontend)


def _promotion(use: str, frontend: str, request: pytest.FixtureRequest) -> None:
    """nnx.MultiHeadAttention masks in float32 whatever its dtype."""
    if use == "attention" and frontend == "nnx":
        request.getfixturevalue("standard_promotion")
