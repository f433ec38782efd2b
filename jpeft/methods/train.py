"""Train: full training of chosen leaves, such as a new classifier or the layer norms.

The adapter holds copies of base leaves, which train in place of the base's. HuggingFace calls it ``modules_to_save``
beside another method and, alone, LN tuning (Zhao et al. 2023, https://arxiv.org/abs/2312.11420).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from jpeft.core.interchange import MODULES_TO_SAVE, HFSpec
from jpeft.core.targets import Targets
from jpeft.methods.base import LeafMethod


@dataclass(frozen=True)
class Train(LeafMethod):
    """Trains base leaves.

    Attributes:
      targets: paths of leaves, or of modules whose leaves are all trained; required.
      exclude, overrides: see `Method`.

    >>> import jpeft
    >>> head, norms = jpeft.Train(r"classifier"), jpeft.Train(r".*/LayerNorm/(scale|bias)")  # norms: LN tuning
    """

    family: ClassVar[str] = "selective"
    learning_rate: ClassVar[float] = 1e-4

    targets: Targets = field(default=None, kw_only=False)

    def __post_init__(self) -> None:
        if self.targets is None:
            raise ValueError('Train needs a target, e.g. Train(r"classifier") or Train(r".*/bias")')
        super().__post_init__()


Train.hf = HFSpec(peft_type="LN_TUNING", tensors=(), copies="ln_tuning_layers.", role=MODULES_TO_SAVE)
