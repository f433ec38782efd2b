"""Multitask prompt tuning: one prompt, changed for each task (Wang et al. 2023, https://arxiv.org/abs/2303.02861).

model([P ∘ (U_t V_t); E(x)])             P: [length, features], U_t: [length, rank], V_t: [rank, features], t: the task
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from jpeft.checks import POSITIVE_INT, Rule, is_int, one_of, shown
from jpeft.core.interchange import EMBEDDINGS, Field, HFSpec, Tensor
from jpeft.core.method import Inputs, Leaves
from jpeft.core.sites import Site
from jpeft.core.tree import Path, Tree, flatten, is_array, like, unflatten
from jpeft.methods.base import normal
from jpeft.methods.families.prompt_method import HF_STARTS, NORMAL, START_RULES, PromptMethod, start

TASK_IDS = "task_ids"
_OF_TASKS = ("task_cols", "task_rows")
AVERAGE, EXACT, SHARED = "average", "exact", "shared"


@dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuning(PromptMethod):
    """Learned embeddings of virtual tokens before each text, shared by tasks and changed for each by a low rank.

    The model's call takes ``task_ids`` beside its own arguments: the task of each text, ``[batch]``, or one for all.
    They are not needed where there is one task. A task that does not exist is refused; under `jax.jit`, where it is not
    known, its texts get NaN. What grows with the virtual tokens, and what does not, is as for `PromptTuning`.

    Attributes:
      length: number of virtual tokens.
      tasks: number of tasks.
      rank: rank of what changes the prompt for a task.
      init_weights, init_ids, init_std: as for `PromptTuning`; see `from_source` for a start from other tasks.
      task_std: standard deviation of the tasks' factors at first.
      pad, keep, dtype, targets, exclude, overrides: see `PromptMethod`.

    Leaves at the table: ``prompt [length, features]``, ``task_cols [tasks, length, rank]``, ``task_rows [tasks, rank,
    features]``.

    >>> import jpeft
    >>> method = jpeft.methods.MultitaskPromptTuning(length=20, tasks=3)
    """

    length: int = 20
    tasks: int = 1
    rank: int = 1
    init_weights: str = NORMAL
    init_ids: Sequence[int] | None = None
    init_std: float = 1.0
    task_std: float = 0.02

    paper: ClassVar[str] = "https://arxiv.org/abs/2303.02861"
    arguments: ClassVar[tuple[str, ...]] = (TASK_IDS,)
    rules: ClassVar[Mapping[str, Rule]] = {
        "length": POSITIVE_INT, "tasks": POSITIVE_INT, "rank": POSITIVE_INT, **START_RULES,
        "task_std": START_RULES["init_std"],
    }  # fmt: skip
    hf: ClassVar[HFSpec] = HFSpec(
        "MULTITASK_PROMPT_TUNING",
        (
            Tensor("prompt_embeddings", "prompt"),
            Tensor("prefix_task_cols", "task_cols"),
            Tensor("prefix_task_rows", "task_rows"),
        ),
        (
            Field("num_virtual_tokens", "length", rule=POSITIVE_INT),
            Field("num_tasks", "tasks", default=1, rule=POSITIVE_INT),
            Field("num_ranks", "rank", default=1, rule=POSITIVE_INT),
        ),
        constants={"num_transformer_submodules": 1},
        ignored=HF_STARTS | {"prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"},
        prompt=EMBEDDINGS,
        expanded=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_ids is not None:
            object.__setattr__(self, "init_ids", tuple(self.init_ids))

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        key_p, key_u, key_v = jax.random.split(key, 3)
        return {
            "prompt": start(self, self.length, key_p, site, w),
            "task_cols": normal(key_u, (self.tasks, self.length, self.rank), self.task_std, self.dtype),
            "task_rows": normal(key_v, (self.tasks, self.rank, site.outputs), self.task_std, self.dtype),
        }

    def rows(self) -> int:
        return self.tasks * self.length + 1

    def prompt(self, site: Site, leaves: Leaves) -> Float[Array, "rows features"]:
        each = leaves["prompt"] * (leaves["task_cols"] @ leaves["task_rows"])  # P ∘ (U_t V_t)
        rows = each.reshape(-1, each.shape[-1])
        # The last row stands for tasks that do not exist.
        return jnp.concatenate([rows, jnp.full((1, rows.shape[-1]), jnp.nan, rows.dtype)])

    def tokens(self, inputs: Inputs, ids: Int[Array, "*batch length"]) -> Int[Array, "*batch virtual"]:
        task = self._task(inputs, jnp.shape(ids)[:-1])[..., None]
        exists = (task >= 0) & (task < self.tasks)
        return jnp.where(exists, task * self.length + jnp.arange(self.length), self.tasks * self.length)

    def _task(self, inputs: Inputs, batch: tuple[int, ...]) -> Int[Array, "*batch"]:
        """The task of each text.

        Raises:
          ValueError: there are none, not one for each, or one that does not exist.
        """
        given: Any = inputs.context.get(TASK_IDS, 0 if self.tasks == 1 else None)
        name = f"{self.name}: {TASK_IDS}"
        if not (is_int(given) or (is_array(given) and jnp.issubdtype(given.dtype, jnp.integer))):
            raise ValueError(
                f"{name} must be integers, the task of each text, got {shown(given)}; give task_ids=[0, …]"
            )
        if jnp.shape(given) not in ((), batch):
            raise ValueError(f"{name} have the shape {jnp.shape(given)}, expected {batch}: a task for each text")
        if not isinstance(given, Tracer):
            known = np.asarray(given)
            if known.size and not 0 <= known.min() <= known.max() < self.tasks:
                raise ValueError(
                    f"{name} hold {known.min()} to {known.max()}, and there are tasks 0 to {self.tasks - 1}"
                )
        return jnp.broadcast_to(jnp.asarray(given), batch)


_START: Rule = one_of((AVERAGE, EXACT, SHARED))


def from_source(adapter: Tree, source: Tree, start: str = AVERAGE, task: int = 0) -> Any:
    """An adapter of `MultitaskPromptTuning` that starts from one that was trained on other tasks.

    Args:
      adapter: a fresh adapter.
      source: the other, as from `jpeft.load` or `jpeft.hf.load`.
      start: "average": each task starts from the mean of the other's factors; "exact": from those of one of its
        tasks; "shared": only the prompt that its tasks share is taken.
      task: for "exact", which one.

    Raises:
      ValueError: an adapter of another method, or of another size; or a task that the source does not have.

    >>> import jpeft
    >>> from jpeft.methods.multitask_prompt import from_source
    >>> def leaves(tasks, value):
    ...     shapes = {"prompt": (2, 4), "task_cols": (tasks, 2, 1), "task_rows": (tasks, 1, 4)}
    ...     return {"embed": {name: jnp.full(shape, value) for name, shape in shapes.items()}}
    >>> from_source(leaves(1, 0.0), leaves(3, 1.0))["embed"]["task_cols"].tolist()
    [[[1.0], [1.0]]]
    """
    if not _START[0](start):
        raise ValueError(f"start must be {_START[1]}, got {shown(start)}")
    own, other = flatten(adapter), flatten(source)
    place, there = _place(own, "adapter"), _place(other, "source")
    taken = {"prompt": other[*there, "prompt"]}
    tasks = other[*there, _OF_TASKS[0]].shape[0]
    if start == EXACT and not 0 <= task < tasks:
        raise ValueError(f"task {task} is not among the source's, 0 to {tasks - 1}")
    if start != SHARED:
        for name in _OF_TASKS:
            factors = other[*there, name]
            one = factors.mean(0) if start == AVERAGE else factors[task]
            taken[name] = jnp.broadcast_to(one, (own[*place, name].shape[0], *one.shape))
    for name, value in taken.items():
        if value.shape != (expected := own[*place, name].shape):
            raise ValueError(f"the source's {name} is {value.shape}, and the adapter's is {expected}")
        own[*place, name] = jnp.asarray(value, own[*place, name].dtype)
    return like(unflatten(own), adapter)


def _place(leaves: Mapping[Path, Any], which: str) -> Path:
    """The path of the table at which an adapter has its leaves."""
    found = [path[:-1] for path in leaves if path[-1] == _OF_TASKS[0]]
    if len(found) != 1 or not all((*found[0], name) in leaves for name in ("prompt", *_OF_TASKS)):
        raise ValueError(
            f"the {which} is no adapter of MultitaskPromptTuning: it has no prompt, task_cols and task_rows"
        )
    return found[0]
