"""jpeft: parameter-efficient fine-tuning for JAX and Flax, as transforms of a parameter tree."""

from typing import TYPE_CHECKING, Any

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

# Imported when first used, so that `import jpeft` stays light: the module, and the name in it; None is the module.
_LAZY = {
    "generate": ("jpeft.serving.generation", "generate"),
    "hf": ("jpeft.hf", None),
    "models": ("jpeft.models", None),
    "plan": ("jpeft.planning", "plan"),
    "stream": ("jpeft.serving.generation", "stream"),
}

if TYPE_CHECKING:  # the same names for editors and type checkers, and the folders that are attributes at run time
    from jpeft import core as core
    from jpeft import hf as hf
    from jpeft import methods as methods
    from jpeft import models as models
    from jpeft import parallel as parallel
    from jpeft import quantization as quantization
    from jpeft import training as training
    from jpeft.planning import plan as plan
    from jpeft.serving.generation import generate as generate
    from jpeft.serving.generation import stream as stream
else:

    def __getattr__(name: str) -> Any:
        import importlib

        if name in _LAZY:
            module, member = _LAZY[name]
            found = importlib.import_module(module)
            return found if member is None else getattr(found, member)
        if (module := _find_moved(name)) is not None:
            return module
        raise AttributeError(f"module 'jpeft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
