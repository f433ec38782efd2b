"""Modules of jpeft 0.1.0 by their old names: `jpeft.tree` is `jpeft.core.tree`.

Old names keep working as attributes of the package. A module whose content went to several places is refused with the
new ones in the message.
"""

from __future__ import annotations

import importlib
from types import ModuleType

MOVED = {
    "attention": "jpeft.core.attention",
    "backend": "jpeft.core.backend",
    "checkpoint": "jpeft.training.checkpoint",
    "fingerprint": "jpeft.core.fingerprint",
    "generation": "jpeft.serving.generation",
    "geometry": "jpeft.core.geometry",
    "hosts": "jpeft.parallel.hosts",
    "inject": "jpeft.linen.inject",
    "losses": "jpeft.training.losses",
    "sites": "jpeft.core.sites",
    "survey": "jpeft.linen.survey",
    "targets": "jpeft.core.targets",
    "tree": "jpeft.core.tree",
    "utilisation": "jpeft.hardware.utilization",
}
SPLIT = {
    "assets": "jpeft.recipes.assets and jpeft.errors",
    "chat": "jpeft.text.chat_template",
    "classify": "jpeft.recipes.tasks.classification and jpeft.models.classifier",
    "config": "jpeft.recipes.config",
    "data": "jpeft.text.labeled, jpeft.text.reading and jpeft.text.batching",
    "distributed": "jpeft.parallel.distributed and jpeft.parallel.mesh",
    "finetune": "jpeft.recipes.finetune",
    "instruct": "jpeft.recipes.tasks.chat",
    "jobs": "jpeft.recipes.prepare and jpeft.recipes.tasks",
    "peft": "jpeft.core.peft and jpeft.binding",
    "runs": "jpeft.recipes.run_folder",
    "sharding": "jpeft.parallel and jpeft.core.placement",
    "summary": "jpeft.core.summary",
    "talk": "jpeft.serving.text_generator and jpeft.recipes",
    "train": "jpeft.training.step and jpeft.training.optimizers.lora_plus",
}


def find(name: str) -> ModuleType | None:
    """The module that had this name, or None if there was none.

    Raises:
      ImportError: its content went to several modules; the message names them.
    """
    if name in MOVED:
        return importlib.import_module(MOVED[name])
    if name in SPLIT:
        raise ImportError(f"jpeft.{name} has moved: see {SPLIT[name]}")
    return None
