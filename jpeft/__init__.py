"""jpeft: parameter-efficient fine-tuning for JAX and Flax, as transforms of a parameter tree."""

from jpeft.geometry import register_geometry as register_geometry
from jpeft.methods import IA3 as IA3
from jpeft.methods import BitFit as BitFit
from jpeft.methods import Bottleneck as Bottleneck
from jpeft.methods import Chain as Chain
from jpeft.methods import LoRA as LoRA
from jpeft.methods import PrefixTuning as PrefixTuning
from jpeft.methods import Train as Train
from jpeft.peft import Peft as Peft
from jpeft.targets import TargetError as TargetError
from jpeft.tree import combine as combine
from jpeft.tree import masked as masked
from jpeft.tree import partition as partition
