"""jpeft: parameter-efficient fine-tuning for JAX and Flax, as transforms of a parameter tree."""

from typing import Any

from jpeft.geometry import register_geometry as register_geometry
from jpeft.io import load as load
from jpeft.io import save as save
from jpeft.loftq import loftq as loftq
from jpeft.methods import IA3 as IA3
from jpeft.methods import BitFit as BitFit
from jpeft.methods import Bottleneck as Bottleneck
from jpeft.methods import Chain as Chain
from jpeft.methods import LoRA as LoRA
from jpeft.methods import PrefixTuning as PrefixTuning
from jpeft.methods import Train as Train
from jpeft.peft import Peft as Peft
from jpeft.quantization import dequantize as dequantize
from jpeft.quantization import quantize as quantize
from jpeft.sharding import shard as shard
from jpeft.sharding import shard_batch as shard_batch
from jpeft.targets import TargetError as TargetError
from jpeft.train import TrainState as TrainState
from jpeft.train import train_step as train_step
from jpeft.tree import combine as combine
from jpeft.tree import masked as masked
from jpeft.tree import partition as partition


def __getattr__(name: str) -> Any:
    """`jpeft.hf`, `jpeft.models` and what runs them are imported when first used: `import jpeft` stays light."""
    import importlib

    if name in ("hf", "models", "losses"):
        return importlib.import_module(f"jpeft.{name}")
    if name == "plan":
        return importlib.import_module("jpeft.planning").plan
    if name in ("generate", "stream"):
        return getattr(importlib.import_module("jpeft.generation"), name)
    raise AttributeError(f"module 'jpeft' has no attribute {name!r}")
