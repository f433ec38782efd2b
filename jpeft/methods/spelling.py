"""Names of fields as others spell them, for the error about a field that a method does not have."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

# HuggingFace PEFT's names that a method need not declare in its `hf`, and those of other libraries.
_NAMES: Mapping[str, str] = {
    "encoder_hidden_size": "hidden",
    "exclude_modules": "exclude",
    "factorized_phm_W": "factorized_phm_w",
    "init_lora_weights": "init_weights",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "non_linearity": "activation",
    "num_virtual_tokens": "length",
    "prefix_projection": "reparametrize",
    "r": "rank",
    "reduction_factor": "reduction",
    "scaling": "scale",
    "shared_W_phm": "shared_w_phm",
    "target_modules": "targets",
    "token_indices": "indices",
    "use_gating": "gating",
    "use_rslora": "rslora",
}
_NOT_NEEDED = (
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "peft_type", "revision", "task_type",
)  # fmt: skip
_LAYERS = "name the layers in targets, as in targets=r'.*/layer/(0|1)/.*'"
_OVERRIDES = "give overrides by target pattern, as in overrides={{r'.*/query': {{{field!r}: 16}}}}"
_SUBLAYERS = "sublayers is 'attention', 'feed_forward' or 'both', or name the modules in targets"
_ORIGINAL_LN = "original_ln_before=True at norms is both, see jpeft.Bottleneck; False is neither"
# What takes the place of fields that have no counterpart.
_INSTEAD: Mapping[str, str] = {
    "alpha_pattern": _OVERRIDES.format(field="alpha"),
    "rank_pattern": _OVERRIDES.format(field="rank"),
    "bias": "BitFit trains biases, as in Chain(LoRA(...), BitFit())",
    **dict.fromkeys(("mh_adapter", "output_adapter", "cross_adapter"), _SUBLAYERS),
    **dict.fromkeys(("original_ln_after", "residual_before_ln"), _ORIGINAL_LN),
    "is_parallel": "jpeft.methods.ParallelAdapter is a method of its own",
    "phm_layer": "jpeft.methods.Compacter is a method of its own",
    "leave_out": "name the layers in exclude, as in exclude=r'.*/layer/(0|1)/.*'",
    "layers_pattern": _LAYERS,
    "layers_to_transform": _LAYERS,
    "modules_to_save": "Train trains them, as in Chain(LoRA(...), Train(r'classifier'))",
    "trainable_token_indices": "TrainableTokens trains them, as in Chain(LoRA(...), TrainableTokens(indices=[7]))",
    "use_dora": "each method is a class of its own, listed by jpeft.methods.METHODS",
    **dict.fromkeys(_NOT_NEEDED, "leave it out, nothing here depends on it"),
}


def accepted_fields(cls: type) -> list[str]:
    """The names that a class takes by keyword, in order.

    >>> from jpeft.methods.train import Train
    >>> accepted_fields(Train)
    ['targets', 'exclude', 'overrides']
    """
    parameters = inspect.signature(cls.__init__).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in kinds and p.name != "self"]


def no_field(cls: type, name: str, accepted: Collection[str]) -> str:
    """The error for a field that a method does not have: the field's name here, or what takes its place.

    Args:
      cls: the method's class. Names that its ``hf`` declares are known.
      name: the name that was given.
      accepted: the names that it takes.

    >>> from jpeft.methods.lora import LoRA
    >>> no_field(LoRA, "r", ["rank", "alpha"])
    "LoRA has no field 'r'; it is called 'rank'"
    >>> no_field(LoRA, "ranks", ["rank", "alpha"])
    "LoRA has no field 'ranks'; nearest: rank"
    """
    own = _declared(cls)
    called = own.get(name) or _NAMES.get(name)
    if called in accepted:
        hint = f"it is called {called!r}"
    elif name in _INSTEAD:
        hint = _INSTEAD[name]
    elif name in own:
        hint = "HuggingFace PEFT's field has no counterpart here"
    elif near := difflib.get_close_matches(name.lower(), accepted, 3, 0.6):
        hint = f"nearest: {', '.join(near)}"
    else:
        hint = f"its fields are {', '.join(sorted(accepted))}" if accepted else "it takes none by name"
    return f"{cls.__name__} has no field {name!r}; {hint}"


def _declared(cls: type) -> dict[str, str]:
    """HuggingFace PEFT's names of fields that a class or those that it extends declare, and the fields' names here.

    The name is empty for a field that has no counterpart.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        spec: Any = vars(base).get("hf")
        found |= dict.fromkeys(getattr(spec, "constants", ()), "")
        found |= {field.key: field.name for field in getattr(spec, "fields", ())}
    return found


def check_names(cls: type, given: Collection[str]) -> None:
    """Checks the names of the fields that a method's class is called with.

    Raises:
      TypeError: it has no such field. The message names the right one, or the nearest.
    """
    parameters = inspect.signature(cls.__init__).parameters.values()
    if any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters):
        return
    accepted = accepted_fields(cls)
    for name in given:
        if name not in accepted:
            raise TypeError(no_field(cls, name, accepted))


# What a subclass may define no longer, and functions whose parameters have changed.
_RENAMED = {
    "fixed": "is called non_trainable now; rename it",  # ignored, these leaves would train
    "merge_bias": "is a part of merge now: merge(leaves, w, b) returns (w, b)",
    "changes_bias": "is known from merge now: merge(leaves, w, b) returns (w, b)",
}
_PARAMETERS = {"merge": ("leaves", "w", "b"), "expand": ("site", "shared", "leaves")}


def check_protocol(cls: type, parameters: Mapping[str, Sequence[str] | None]) -> None:
    """Checks the names and parameters of what a method's class defines, so that nothing is ignored or called wrongly.

    Args:
      cls: the class.
      parameters: the parameters of functions that its base class has a form of its own for; None for one without use.

    Raises:
      TypeError: a name or form of an earlier version.
    """
    own = vars(cls)
    for name, hint in _RENAMED.items():
        if name in own:
            raise TypeError(f"{cls.__name__}.{name} {hint}")
    if isinstance(own.get("mergeable"), bool):
        raise TypeError(f"{cls.__name__}.mergeable is a function of a site now: def mergeable(self, site) -> bool")
    for name, expected in {**_PARAMETERS, **parameters}.items():
        if inspect.isfunction(function := own.get(name)):
            if expected is None:
                raise TypeError(f"{cls.__name__}.{name} would never be called: methods of its kind have no {name}")
            given = [p for p in inspect.signature(function).parameters.values() if p.kind != p.KEYWORD_ONLY]
            if len(given) != len(expected) + 1 and not any(p.kind == p.VAR_POSITIONAL for p in given):
                found = ", ".join(p.name for p in given[1:])
                raise TypeError(f"{cls.__name__}.{name} takes ({', '.join(expected)}), got ({found})")


class InitSignature:
    """The signature of a class's ``__init__``, for a class whose ``__new__`` takes any arguments."""

    def __get__(self, instance: Any, cls: type) -> inspect.Signature:
        signature = inspect.signature(cls.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])
