"""The methods, by name. To add one: a file here, and a line in the table."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jpeft.methods.base import AttentionMethod as AttentionMethod
from jpeft.methods.base import LeafMethod as LeafMethod
from jpeft.methods.base import Method
from jpeft.methods.base import OutputMethod as OutputMethod
from jpeft.methods.base import WeightMethod as WeightMethod
from jpeft.methods.bitfit import BitFit
from jpeft.methods.bottleneck import Bottleneck
from jpeft.methods.chain import Chain
from jpeft.methods.ia3 import IA3
from jpeft.methods.lora import LoRA
from jpeft.methods.prefix import PrefixTuning
from jpeft.methods.train import Train

METHODS: dict[str, type[Method]] = {
    cls.__name__: cls
    for cls in (
        LoRA,
        IA3,
        PrefixTuning,
        Bottleneck,
        BitFit,
        Train,
    )
}


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
    if name == "Chain":
        unknown = sorted(set(config) - {"method", "methods"})
        if unknown or not isinstance(config.get("methods"), list):
            raise ValueError(f"Chain takes 'methods', a list; got {sorted(config)}")
        return Chain(*(from_dict(m) for m in config["methods"]))
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; there are {', '.join([*METHODS, 'Chain'])}")
    fields = {f.name for f in dataclasses.fields(METHODS[name])}
    unknown = sorted(set(config) - fields - {"method"})
    if unknown:
        raise ValueError(f"{name} has no field {unknown[0]!r}; there are {', '.join(sorted(fields))}")
    return METHODS[name](**{k: v for k, v in config.items() if k != "method"})
