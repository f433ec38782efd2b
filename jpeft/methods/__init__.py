"""The methods. To add one: a file in this folder, and its line among the imports below.

`METHODS` collects every method class imported here. Saving, HuggingFace interchange, `jpeft finetune --method` and the
contract suite read it. `register` adds a method from outside of jpeft.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Mapping
from typing import Any, TypeVar

from jpeft.methods.adalora import AdaLoRA as AdaLoRA
from jpeft.methods.adapter_fusion import AdapterFusion as AdapterFusion
from jpeft.methods.alora import ALoRA as ALoRA
from jpeft.methods.average import Average as Average
from jpeft.methods.base import AttentionMethod as AttentionMethod
from jpeft.methods.base import LeafMethod as LeafMethod
from jpeft.methods.base import Method as Method
from jpeft.methods.base import OutputMethod as OutputMethod
from jpeft.methods.base import WeightMethod as WeightMethod
from jpeft.methods.beft import BEFT as BEFT
from jpeft.methods.bitfit import BitFit as BitFit
from jpeft.methods.boft import BOFT as BOFT
from jpeft.methods.bottleneck import Bottleneck as Bottleneck
from jpeft.methods.c3a import C3A as C3A
from jpeft.methods.cartridge import Cartridge as Cartridge
from jpeft.methods.chain import Chain as Chain
from jpeft.methods.compacter import Compacter as Compacter
from jpeft.methods.cpt import CPT as CPT
from jpeft.methods.delora import DeLoRA as DeLoRA
from jpeft.methods.dora import DoRA as DoRA
from jpeft.methods.eva import redistribute as redistribute
from jpeft.methods.experts import with_classifier as with_classifier
from jpeft.methods.experts import with_experts as with_experts
from jpeft.methods.families.members import with_members as with_members
from jpeft.methods.fourierft import FourierFT as FourierFT
from jpeft.methods.gralora import GraLoRA as GraLoRA
from jpeft.methods.hira import HiRA as HiRA
from jpeft.methods.houlsby import Houlsby as Houlsby
from jpeft.methods.hra import HRA as HRA
from jpeft.methods.ia3 import IA3 as IA3
from jpeft.methods.llama_adapter import LlamaAdapter as LlamaAdapter
from jpeft.methods.loha import LoHa as LoHa
from jpeft.methods.lokr import LoKr as LoKr
from jpeft.methods.lora import LoRA as LoRA
from jpeft.methods.miss import MiSS as MiSS
from jpeft.methods.mole import MoLE as MoLE
from jpeft.methods.multitask_prompt import MultitaskPromptTuning as MultitaskPromptTuning
from jpeft.methods.oft import OFT as OFT
from jpeft.methods.p_tuning import PTuning as PTuning
from jpeft.methods.parallel_adapter import ParallelAdapter as ParallelAdapter
from jpeft.methods.poly import Poly as Poly
from jpeft.methods.prefix import PrefixTuning as PrefixTuning
from jpeft.methods.prompt_tuning import PromptTuning as PromptTuning
from jpeft.methods.randlora import RandLoRA as RandLoRA
from jpeft.methods.reft import DiReFT as DiReFT
from jpeft.methods.reft import LoReFT as LoReFT
from jpeft.methods.reft import NoReFT as NoReFT
from jpeft.methods.road import RoAd as RoAd
from jpeft.methods.shira import SHiRA as SHiRA
from jpeft.methods.spelling import no_field
from jpeft.methods.stack import Stack as Stack
from jpeft.methods.table import Table
from jpeft.methods.table import table as _table
from jpeft.methods.train import Train as Train
from jpeft.methods.trainable_tokens import TrainableTokens as TrainableTokens
from jpeft.methods.vblora import VBLoRA as VBLoRA
from jpeft.methods.vera import VeRA as VeRA
from jpeft.methods.xlora import XLoRA as XLoRA

_BASES = (Method, WeightMethod, OutputMethod, AttentionMethod, LeafMethod, Chain)
METHODS: dict[str, type[Method]] = {
    name: value
    for name, value in dict(globals()).items()
    if isinstance(value, type) and issubclass(value, Method) and value not in _BASES
}

M = TypeVar("M", bound=type[Method])


def table(model: Any = None, params: Any = None, *inputs: Any, **kwargs: Any) -> Table:
    """All methods, `register`ed ones too, with what each does. ``jpeft.methods(...)`` is the same.

    Args:
      model: a model, on which the parameters are counted that each method trains by default.
      params: its parameters; may be abstract.
      *inputs: as for ``model.apply``.
      **kwargs: as for ``model.apply``.

    >>> import jpeft
    >>> [row.name for row in jpeft.methods() if row.family == "scaling"]
    ['IA3']
    """
    return _table(METHODS, model, params, inputs, kwargs)


def register(cls: M) -> M:
    """Adds a method to `METHODS` under its class's name, so that adapters trained with it load by configuration.

    Usable as a decorator. A method that is only bound and trained needs no registration.

    Raises:
      TypeError: not a subclass of a method's base class.
      ValueError: the name belongs to another class.

    >>> from dataclasses import dataclass
    >>> import jax.numpy as jnp
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Shift(WeightMethod):
    ...     def init(self, key, site, w):
    ...         return {"shift": jnp.zeros((site.outputs,))}
    ...
    ...     def merge(self, leaves, w, b):
    ...         return w + leaves["shift"], b
    >>> METHODS[register(Shift).__name__] is Shift
    True
    >>> del METHODS["Shift"]
    """
    if not (isinstance(cls, type) and issubclass(cls, Method)) or cls in _BASES:
        raise TypeError(
            f"expected a subclass of WeightMethod, OutputMethod, AttentionMethod or LeafMethod, got {cls!r}"
        )
    if METHODS.get(cls.__name__, cls) is not cls or cls.__name__ == Chain.__name__:
        raise ValueError(f"there is another method called {cls.__name__}; rename the class")
    METHODS[cls.__name__] = cls
    return cls


def from_dict(config: Mapping[str, Any]) -> Method:
    """A method from its JSON form. Inverse of ``method.to_dict()``.

    Raises:
      ValueError: an unknown method or field, by name.

    >>> from_dict({"method": "LoRA", "rank": 4}).rank
    4
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("method"), str):
        raise ValueError(f"a method's configuration must be an object with a name under 'method', got {config!r}")
    name = config["method"]
    if name == Chain.__name__:
        unknown = sorted(set(config) - {"method", "methods"})
        if unknown or not isinstance(config.get("methods"), list):
            raise ValueError(f"Chain takes 'methods', a list; got {sorted(config)}")
        return Chain(*(from_dict(m) for m in config["methods"]))
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; expected one of {', '.join([*METHODS, Chain.__name__])}")
    fields = [field.name for field in dataclasses.fields(METHODS[name])]
    unknown = sorted(set(config) - {*fields, "method"})
    if unknown:
        raise ValueError(no_field(METHODS[name], unknown[0], fields))
    return METHODS[name](**{k: _members(v) if k == "members" else v for k, v in config.items() if k != "method"})


def _members(given: Any) -> Any:
    """The members of a composition from pairs of a name and a configuration; anything else as it is."""
    if not isinstance(given, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in given):
        return given
    return [(name, from_dict(member)) for name, member in given]


class _Callable(types.ModuleType):
    """A module that lists its methods when it is called."""

    def __call__(self, model: Any = None, params: Any = None, *inputs: Any, **kwargs: Any) -> Table:
        return table(model, params, *inputs, **kwargs)


sys.modules[__name__].__class__ = _Callable
