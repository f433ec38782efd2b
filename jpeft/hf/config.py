"""``adapter_config.json`` of a HuggingFace PEFT LoRA: what its fields mean, and which of them are refused.

The rules for names are those of peft 0.21 (``tuners/tuners_utils.py: check_target_module_exists``,
``utils/other.py: get_pattern_key``); a name is a torch module's, such as ``encoder.layer.0.attention.self.query``.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jpeft.core.targets import ALL_LINEAR
from jpeft.errors import AdapterError
from jpeft.files import read_json
from jpeft.methods.base import positive_int

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

# HuggingFace's initializations, and ours where there is one. The adapter is read from the file, so that they matter to
# a new one only, unless they moved a part of the base weight into it.
INITS = {True: "kaiming", False: "random", "gaussian": "gaussian", "orthogonal": "orthogonal"}
_BASE_KEPT = {"eva", "mica"}
_BASE_CHANGED = ("pissa", "olora", "corda", "lora_ga", "loftq")

# What says nothing about the function that is computed: provenance, the settings of an initialization, and
# fan_in_fan_out, which HuggingFace itself sets from the module's type.
_NO_MATHS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
}  # fmt: skip
# What would change the maths, and is refused unless it is off.
_REFUSED = {
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "megatron_config", "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora",
    "use_qalora", "velora_config",
}  # fmt: skip
# Heads that HuggingFace adds to modules_to_save for a task, whether or not the model has them.
TASK_HEADS = {"SEQ_CLS": {"classifier", "score"}, "TOKEN_CLS": {"classifier", "score"}, "QUESTION_ANS": {"qa_outputs"}}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _text_or_texts(value: Any) -> bool:
    return isinstance(value, str) or _texts(value)


def _indices(value: Any) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) for v in (value if isinstance(value, list) else [value]))


def _pattern_of(ok: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(ok(v) for v in value.values())


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (positive_int, "a positive integer"),
    "lora_alpha": (_number, "a finite number"),
    "lora_dropout": (lambda v: _number(v) and 0 <= v < 1, "a rate in [0, 1)"),
    "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
    "bias": (lambda v: v in ("none", "all", "lora_only"), "one of none, all, lora_only"),
    "rank_pattern": (_pattern_of(positive_int), "an object of positive integers"),
    "alpha_pattern": (_pattern_of(_number), "an object of finite numbers"),
    "target_modules": (lambda v: bool(v) and _text_or_texts(v), "a regular expression or a list of names"),
    "exclude_modules": (_text_or_texts, "a regular expression or a list of names"),
    "layers_to_transform": (_indices, "a layer index or a list of them"),
    "layers_pattern": (_text_or_texts, "a name or a list of names"),
    "modules_to_save": (_texts, "a list of names"),
    "init_lora_weights": (lambda v: isinstance(v, bool | str), "true, false or a name"),
    "task_type": (lambda v: isinstance(v, str), "a name"),
    "ensure_weight_tying": (lambda v: isinstance(v, bool), "true or false"),
}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The fields of a HuggingFace LoRA configuration that a loaded adapter depends on, under HuggingFace's names.

    >>> config = LoraConfig(r=8, rank_pattern={"query": 16}, target_modules=["query", "value"])
    >>> config.rank("layer.0.query"), config.targets("layer.0.key")
    (16, False)
    """

    target_modules: str | Sequence[str]
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    bias: str = "none"
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    exclude_modules: str | Sequence[str] = ()
    layers_to_transform: int | Sequence[int] = ()
    layers_pattern: str | Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    init_lora_weights: bool | str = True
    task_type: str = ""
    ensure_weight_tying: bool = False

    def rank(self, name: str) -> int:
        """r at a module: the first pattern that matches counts."""
        return _first(self.rank_pattern, name, self.r)

    def alpha(self, name: str) -> float:
        """lora_alpha at a module."""
        return _first(self.alpha_pattern, name, self.lora_alpha)

    def targets(self, name: str, linear: bool = False) -> bool:
        """Whether a module has a LoRA. ``linear``: whether it is what "all-linear" means."""
        if self.saves(name) or named(self.exclude_modules, name):
            return False
        if self.all_linear:
            return linear
        if isinstance(self.target_modules, str):
            return bool(re.fullmatch(self.target_modules, name))
        return named(self.target_modules, name) and self._in_layers(name)

    @property
    def all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def saves(self, name: str) -> bool:
        """Whether a module is trained and saved whole: it or a module around it is among ``modules_to_save``."""
        return any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in self.modules_to_save)

    def optional_heads(self) -> set[str]:
        """Entries of ``modules_to_save`` that need not be in the model."""
        return TASK_HEADS.get(self.task_type, set())

    def _in_layers(self, name: str) -> bool:
        wanted = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        if not wanted:
            return True
        around = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        # The first numbered segment is the layer's; a later one may be an expert's.
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in around if p] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((m for p in patterns if (m := re.match(p, name))), None)
        return found is not None and int(found[1]) in wanted


def named(entries: str | Sequence[str], name: str) -> bool:
    """HuggingFace's target language: a regular expression for the whole name, or a list of names and suffixes."""
    if isinstance(entries, str):
        return bool(entries) and bool(re.fullmatch(entries, name))
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def _first(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A default and a pattern for the modules that differ from it. Inverse of ``rank`` and ``alpha``.

    >>> patterns({"a.query": 8, "a.value": 8, "b.query": 4})
    (8, {'b.query': 4})
    """
    values = dict(sorted(values.items()))  # of values that are equally common the first counts, whatever the order
    default = Counter(values.values()).most_common(1)[0][0]
    # Sorted, as the file will be: the first match counts. Plain names are what older versions of PEFT look up too; they
    # match as suffixes and with "." for any character, so where that goes wrong they are anchored.
    plain = {name: value for name, value in values.items() if value != default}
    if all(_first(plain, name, default) == value for name, value in values.items()):
        return default, plain
    return default, {f"^{re.escape(name)}": value for name, value in values.items() if value != default}


def read(file: Path) -> LoraConfig:
    """Reads and checks ``adapter_config.json``.

    Raises:
      AdapterError: no file, no JSON object, another method than LoRA, or a field that is unknown, malformed or one that
        jpeft does not follow, by name.
    """
    try:
        config = read_json(file, AdapterError)
    except FileNotFoundError:
        what = f"has no {CONFIG}" if file.parent.is_dir() else "is not a folder"
        raise AdapterError(f"{file.parent} {what}: expected an adapter saved by HuggingFace PEFT") from None
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{file}: peft_type is {config.get('peft_type')!r}; only 'LORA' can be read")
    fields = {f.name for f in dataclasses.fields(LoraConfig)}
    if unknown := sorted(config.keys() - fields - _NO_MATHS - _REFUSED):
        raise AdapterError(f"{file}: unknown field {unknown[0]!r}; jpeft cannot tell what it changes")
    for field in sorted(_REFUSED & config.keys()):
        if config[field] not in (None, False, [], {}, ""):
            raise AdapterError(f"{file}: {field}={config[field]!r} is not supported; merge it in PEFT instead")
    for field in ("r", "lora_alpha", "lora_dropout", "use_rslora", "bias"):
        if config.get(field, 0) is None:
            raise AdapterError(f"{file}: {field} must be {_RULES[field][1]}, got null")
    given = {k: v for k, v in config.items() if k in fields and v is not None}
    for field, value in given.items():
        ok, expected = _RULES[field]
        if not ok(value):
            raise AdapterError(f"{file}: {field} must be {expected}, got {value!r}")
    if "target_modules" not in given:
        raise AdapterError(f"{file}: target_modules is missing")
    _check_expressions(file, given)
    _check_init(file, given.get("init_lora_weights", True))
    return LoraConfig(**given)


def _check_expressions(file: Path, given: Mapping[str, Any]) -> None:
    """Every regular expression must be one; ``layers_to_transform`` needs a list of targets, as in HuggingFace."""
    texts = {f: given[f] for f in ("target_modules", "exclude_modules") if isinstance(given.get(f), str)}
    entries = [(f, entry) for f in ("rank_pattern", "alpha_pattern", "modules_to_save") for entry in given.get(f, ())]
    layers = given.get("layers_pattern", [])
    entries += [("layers_pattern", e) for e in ([layers] if isinstance(layers, str) else layers)]
    for field, pattern in [*texts.items(), *entries]:
        try:
            re.compile(pattern)
        except re.error as e:
            raise AdapterError(f"{file}: {field} {pattern!r} is not a regular expression: {e}") from None
    if isinstance(given["target_modules"], str) and given.get("layers_to_transform") not in (None, []):
        raise AdapterError(
            f"{file}: layers_to_transform needs a list of target_modules, got {given['target_modules']!r}"
        )


def _check_init(file: Path, init: bool | str) -> None:
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGED):
        raise AdapterError(
            f"{file}: init_lora_weights={init!r} took a part of the base weights into the adapter, so it does not fit "
            "the original base; save it in PEFT with path_initial_model_for_weight_conversion, as an ordinary LoRA"
        )
    if init not in INITS and init not in _BASE_KEPT:
        raise AdapterError(f"{file}: init_lora_weights={init!r} is unknown: it may have changed the base")
