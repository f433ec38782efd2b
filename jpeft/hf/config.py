"""``adapter_config.json`` of a HuggingFace PEFT folder.

The rules for names are those of peft 0.21 (``tuners/tuners_utils.py: check_target_module_exists``,
``utils/other.py: get_pattern_key``). A name is a torch module's, such as ``encoder.layer.0.attention.self.query``.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jpeft.checks import Rule, is_int, one_of, shown
from jpeft.core.interchange import Field, HFSpec, form
from jpeft.core.sites import Site
from jpeft.core.targets import ALL_LINEAR
from jpeft.errors import AdapterError
from jpeft.files import read_json

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

# Fields of every type that say nothing about the function.
PROVENANCE = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"
})  # fmt: skip
# Fields of other tools and versions that say nothing about the function either: how to train, and how to run.
HARMLESS = frozenset({
    "library_name", "lora_dtype", "lorap_emb_lr", "lorap_lr_ratio", "merge_weights", "runtime_config", "tags",
    "torch_dtype", "transformers_version",
})  # fmt: skip
# Sizes of the model in folders of virtual tokens.
SIZES = frozenset({"num_attention_heads", "num_layers", "token_dim"})
# Heads that PEFT adds to modules_to_save for a task, whether or not the model has them.
TASK_HEADS = {"SEQ_CLS": {"classifier", "score"}, "TOKEN_CLS": {"classifier", "score"}, "QUESTION_ANS": {"qa_outputs"}}


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _is_text_or_list(value: Any) -> bool:
    return isinstance(value, str) or _is_text_list(value)


def _is_index_or_list(value: Any) -> bool:
    return all(is_int(v) for v in (value if isinstance(value, list) else [value]))


_MODULES: Rule = (_is_text_or_list, "a regular expression or a list of names")
_RULES: dict[str, Rule] = {
    "target_modules": (lambda v: bool(v) and _is_text_or_list(v), _MODULES[1]),
    "exclude_modules": _MODULES,
    "layers_to_transform": (_is_index_or_list, "a layer index or a list of them"),
    "layers_pattern": (_is_text_or_list, "a name or a list of names"),
    "modules_to_save": (_is_text_list, "a list of names"),
    "task_type": (lambda v: isinstance(v, str), "a name"),
    "ensure_weight_tying": (lambda v: isinstance(v, bool), "true or false"),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A PEFT configuration: the fields that all types have, under PEFT's names, and those of one method.

    Attributes:
      method: the method class, whose `HFSpec` says what ``own`` holds.
      own: the method's fields and patterns as they stand in the file.
      parameters: the names of parameters to adapt, by `HFSpec.parameters`.
      beside: the methods that the folder holds too, by `HFSpec.beside`, and what that field says.

    >>> from jpeft.methods.lora import LoRA
    >>> config = Config(method=LoRA, target_modules=["query", "value"], own={"r": 8, "rank_pattern": {"query": 16}})
    >>> config.value(config.spec.fields[0], "layer.0.query"), config.targets("layer.0.key")
    (16, False)
    """

    method: type
    target_modules: str | Sequence[str]
    bias: str = "none"
    exclude_modules: str | Sequence[str] = ()
    layers_to_transform: int | Sequence[int] = ()
    layers_pattern: str | Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    task_type: str = ""
    parameters: Sequence[str] = ()
    ensure_weight_tying: bool = False
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    beside: Mapping[type, Any] = dataclasses.field(default_factory=dict)

    @property
    def spec(self) -> HFSpec:
        """The method's form."""
        spec = form(self.method)
        assert isinstance(spec, HFSpec)
        return spec

    def value(self, field: Field, module: str | None = None) -> Any:
        """A field's value in the file, for all modules or at one: the first pattern that matches it counts."""
        default = self.own.get(field.key, field.default)
        if field.chooses:
            return module is not None and _chosen(default or (), module)
        if module is None or not field.pattern:
            return default
        return _first(self.own.get(field.pattern) or {}, module, default)

    def settings(self, module: str | None = None, site: Site | None = None) -> dict[str, Any]:
        """The method's fields, for all modules or at one."""
        fields = [f for f in self.spec.fields if f.name and not f.chooses]
        return {f.name: f.read(self.value(f, module), site) for f in fields}

    def difference(self, module: str, other: str) -> str:
        """The first setting in which two modules differ, in words; empty if they agree."""
        for field in self.spec.fields:
            here, there = self.value(field, module), self.value(field, other)
            if here != there:
                return f"{module!r} has {field.name} {here}, {other!r} has {there}"
        return ""

    def targets(self, name: str, linear: bool = False) -> bool:
        """Whether a module is adapted. ``linear``: whether "all-linear" means it."""
        if self.saves(name) or named(self.exclude_modules, name):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == ALL_LINEAR:
                return linear
            return bool(re.fullmatch(self.target_modules, name))
        return named(self.target_modules, name) and self._in_layers(name)

    def targets_parameter(self, name: str) -> bool:
        """Whether a parameter is adapted by its own name."""
        return named(self.parameters, name)

    def saves(self, name: str) -> bool:
        """Whether a module is trained and saved whole: it or a module around it is among ``modules_to_save``."""
        return any(within(entry, name) for entry in self.modules_to_save)

    def optional_heads(self) -> set[str]:
        """Entries of ``modules_to_save`` that the model need not have."""
        return TASK_HEADS.get(self.task_type, set())

    def _in_layers(self, name: str) -> bool:
        wanted = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        if not wanted:
            return True
        around = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        # The first numbered segment is the layer's; a later one may be an expert's.
        patterns = [_layer_pattern(p) for p in around if p] or [r".*?\.[^.]*\.(?P<layer>\d+)\."]
        found = next((m for p in patterns if (m := re.match(p, name))), None)
        return found is not None and int(found["layer"]) in wanted


def named(entries: str | Sequence[str], name: str) -> bool:
    """Whether PEFT's target language names a module: a regular expression for all of it, or a list of suffixes."""
    if isinstance(entries, str):
        return bool(entries) and bool(re.fullmatch(entries, name))
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def _chosen(entries: str | Sequence[str], name: str) -> bool:
    """Whether a field that chooses among the adapted modules chooses one: its names need not end at a "."."""
    return bool(re.fullmatch(entries, name)) if isinstance(entries, str) else name.endswith(tuple(entries))


def within(entry: str, name: str) -> bool:
    """Whether an entry of ``modules_to_save`` names a module or one around it."""
    return bool(re.match(_around_pattern(entry), name))


# PEFT puts what the user wrote into larger expressions.


def _around_pattern(entry: str) -> str:
    return rf"(^|.*\.){entry}($|\..*)"


def _layer_pattern(around: str) -> str:
    return rf"(?:^|.*?\.){around}\.(?P<layer>\d+)\."


def _module_pattern(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _first(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(_module_pattern(key), name)), default)


def patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A default and a pattern for the modules that differ from it. Inverse of `Config.value`.

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


# --- reading ----------------------------------------------------------------------------------------------------------


def read_config(file: Path, methods: Iterable[type]) -> Config:
    """Reads and checks ``adapter_config.json``.

    Args:
      file: its path.
      methods: the method classes that a folder may hold.

    Raises:
      AdapterError: no file, no JSON object, a ``peft_type`` that no method has, or a field that is unknown, malformed
        or not supported, by name.
    """
    try:
        config = read_json(file, AdapterError)
    except FileNotFoundError:
        problem = f"has no {CONFIG}" if file.parent.is_dir() else "is not a folder"
        raise AdapterError(f"{file.parent} {problem}: expected an adapter saved by HuggingFace PEFT") from None
    method, spec = _find_method(file, config, methods := list(methods))
    _check_known(file, config, spec)
    rules = _rules(spec)
    if config.get(spec.parameters):
        rules["target_modules"] = _MODULES  # it may name none
    for key in ("bias", *(f.key for f in spec.fields if f.default is not False)):  # a switch that is null is off
        if config.get(key, 0) is None and key in rules and not rules[key][0](None):
            raise AdapterError(f"{file}: {key} must be {rules[key][1]}, got null")
    given = {k: v for k, v in config.items() if k in rules and v is not None}
    for key, value in given.items():
        accepts, expected = rules[key]
        if not accepts(value):
            raise AdapterError(f"{file}: {key} must be {expected}, got {shown(value)}")
    if parameters := given.pop(spec.parameters, ()):
        given.setdefault("target_modules", [])
    if spec.prompt:
        given["target_modules"] = []
    if "target_modules" not in given:
        raise AdapterError(f"{file}: target_modules is missing")
    common = {k: v for k, v in given.items() if k in _RULES or k == "bias"}
    own = {k: v for k, v in given.items() if k not in common}
    _check_expressions(file, given, spec)
    out = Config(method=method, own=own, parameters=parameters, beside=_beside(file, config, spec, methods), **common)
    try:
        out.settings()
    except ValueError as error:
        raise AdapterError(f"{file}: {error}") from error
    return out


def _beside(file: Path, config: Mapping[str, Any], spec: HFSpec, methods: Iterable[type]) -> dict[type, Any]:
    """The methods that stand beside the folder's own, and what the configuration says of them."""
    out = {}
    for method in methods:
        other = form(method)
        if not isinstance(other, HFSpec) or other.beside not in spec.holds or _is_off(config.get(other.beside)):
            continue
        value, (accepts, expected) = config[other.beside], other.fields[0].rule or (lambda _: True, "")
        each = value.values() if isinstance(value, dict) else [value]
        if not all(isinstance(v, list) and accepts(v) for v in each):
            raise AdapterError(f"{file}: {other.beside} must be {expected}, or such by module, got {shown(value)}")
        out[method] = value
    return out


def _find_method(file: Path, config: Mapping[str, Any], methods: Iterable[type]) -> tuple[type, HFSpec]:
    """The method of a configuration: of its type, and with most fields as the method requires them."""
    specs = [(method, spec) for method in methods if isinstance(spec := form(method), HFSpec)]
    found = [
        (method, spec)
        for method, spec in specs
        if spec.peft_type == config.get("peft_type")
        and all(config.get(k) == v for k, v in spec.when.items())
        and not any(_is_off(config.get(k)) for k in spec.given)
    ]
    if not found:
        types = ", ".join(sorted({repr(spec.peft_type) for _, spec in specs}))
        raise AdapterError(f"{file}: peft_type is {shown(config.get('peft_type'))}; jpeft reads {types}")
    return max(found, key=lambda entry: len(entry[1].when) + len(entry[1].given))


def _check_known(file: Path, config: Mapping[str, Any], spec: HFSpec) -> None:
    """Raises on the first field that is unknown, or that has a value which the method does not compute."""
    known = spec.known | _RULES.keys() | PROVENANCE | HARMLESS | {"bias"} | (SIZES if spec.prompt else set())
    # A field that is off says nothing: other tools and versions write theirs so, and PEFT drops what it does not know.
    if unknown := sorted(key for key in config.keys() - known if not _is_off(config[key])):
        raise AdapterError(
            f"{file}: unknown field {unknown[0]!r} is {shown(config[unknown[0]])}; jpeft cannot tell what it changes: "
            "merge the adapter in the tool that wrote it or, if the field changes nothing, delete it"
        )
    constants = dict(spec.constants)
    if not spec.tied:
        constants["ensure_weight_tying"] = None
    if not spec.bias:
        constants["bias"] = "none"
    for key in sorted(constants.keys() & config.keys()):
        value, constant = config[key], constants[key]
        if value != constant and (value or constant):
            only = f", only {constant!r}" if constant else ""
            raise AdapterError(f"{file}: {key}={shown(value)} is not supported{only}; merge it in PEFT instead")


def _is_off(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _rules(spec: HFSpec) -> dict[str, Rule]:
    """The rules of a configuration's fields: those of all types and the method's own."""
    rules = dict(_RULES)
    if spec.parameters:
        rules[spec.parameters] = _is_text_list, "a list of names"
    if spec.bias:
        rules["bias"] = one_of(("none", "all", spec.bias))
    for field in spec.fields:
        rules[field.key] = accepts, expected = _MODULES if field.chooses else field.rule or (lambda _: True, "")
        if field.pattern:
            rules[field.pattern] = (_each(accepts), f"an object whose values are each {expected}")
    return rules


def _each(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(accepts(v) for v in value.values())


def _check_expressions(file: Path, given: Mapping[str, Any], spec: HFSpec) -> None:
    """Raises unless every regular expression is one, and ``layers_to_transform`` stands beside a list of targets."""
    layers = given.get("layers_pattern", [])
    whole_names = ("target_modules", "exclude_modules", *(f.key for f in spec.fields if f.chooses))
    texts = [(f, given[f], str) for f in whole_names if isinstance(given.get(f), str)]
    texts += [(f.pattern, key, _module_pattern) for f in spec.fields for key in given.get(f.pattern, ())]
    texts += [("modules_to_save", entry, _around_pattern) for entry in given.get("modules_to_save", ())]
    texts += [("layers_pattern", e, _layer_pattern) for e in ([layers] if isinstance(layers, str) else layers)]
    for field, text, whole in texts:
        try:
            re.compile(whole(text))
        except (re.error, OverflowError, RecursionError) as e:
            raise AdapterError(f"{file}: {field} {shown(text)} is not a regular expression: {e}") from None
    if isinstance(given["target_modules"], str) and given.get("layers_to_transform") not in (None, []):
        raise AdapterError(
            f"{file}: layers_to_transform needs a list of target_modules, got {shown(given['target_modules'])}"
        )
