"""jpeft: parameter-efficient fine-tuning for JAX and Flax, as transforms of a parameter tree."""

from typing import Any

from jpeft._moved import find as _find_moved
from jpeft.core.peft import Peft as Peft
from jpeft.core.targets import TargetError as TargetError
from jpeft.core.tree import combine as combine
from jpeft.core.tree import masked as masked
from jpeft.core.tree import partition as partition
from jpeft.io import load as load
from jpeft.io import save as save
from jpeft.linen.registry import register_geometry as register_geometry
from jpeft.methods.bitfit import BitFit as BitFit
from jpeft.methods.bottleneck import Bottleneck as Bottleneck
from jpeft.methods.chain import Chain as Chain
from jpeft.methods.ia3 import IA3 as IA3
from jpeft.methods.lora import LoRA as LoRA
from jpeft.methods.prefix import PrefixTuning as PrefixTuning
from jpeft.methods.train import Train as Train
from jpeft.parallel.batches import shard_batch as shard_batch
from jpeft.parallel.rules import shard as shard
from jpeft.quantization.loftq import loftq as loftq
from jpeft.quantization.tree import dequantize as dequantize
from jpeft.quantization.tree import quantize as quantize
from jpeft.training.step import TrainState as TrainState
from jpeft.training.step import train_step as train_step


def __getattr__(name: str) -> Any:
    """Imports `jpeft.hf`, `jpeft.models` and what runs them when they are first used: `import jpeft` stays light."""
    import importlib

    if name in ("hf", "models"):
        return importlib.import_module(f"jpeft.{name}")
    if name == "plan":
        return importlib.import_module("jpeft.planning").plan
    if name in ("generate", "stream"):
        return getattr(importlib.import_module("jpeft.serving.generation"), name)
    if (module := _find_moved(name)) is not None:
        return module
    raise AttributeError(f"module 'jpeft' has no attribute {name!r}")
