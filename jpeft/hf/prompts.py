"""Folders of virtual tokens: prompts, whose embeddings are one tensor, and prefixes, whose keys and values are.

The tensors belong to no torch module and stand under bare names. Where an attention has keys and values before its own,
``prompt_embeddings [n, layers * 2 * kv_heads * head_dim]`` has key and value of each layer in turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import meta

from jpeft.core.actions import Action, used_leaves
from jpeft.core.interchange import EMBEDDINGS, HFSpec, form
from jpeft.core.peft import Peft
from jpeft.core.tree import Path, Tree
from jpeft.errors import AdapterError
from jpeft.hf.config import CONFIG, Config
from jpeft.hf.tensors import TensorFile
from jpeft.methods import METHODS
from jpeft.methods.base import Method
from jpeft.methods.families.prefixes import in_layers, in_sites, prefix_actions, prefixes, stored_leaves

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer")  # names of their number in a model's configuration


def is_prompt(action: Action) -> bool:
    """Whether an action puts virtual tokens before a text."""
    spec = form(type(action.method))
    return isinstance(spec, HFSpec) and bool(spec.prompt)


# --- reading ----------------------------------------------------------------------------------------------------------


def method_of(config: Config, file: TensorFile) -> Method:
    """The method of a folder's configuration.

    Raises:
      AdapterError: fields that do not fit one another.
    """
    spec = config.spec
    cls: Any = METHODS[spec.read_as] if spec.read_as else config.method
    names = {field.name for field in dataclasses.fields(cls)}
    settings = {k: v for k, v in {**config.settings(), **spec.implied}.items() if k in names}
    try:
        return cls(**settings, dtype=file.dtype)
    except ValueError as error:
        raise AdapterError(f"{file.path.parent / CONFIG}: {error}") from error


def read_leaves(peft: Peft, file: TensorFile, config: Config) -> dict[Path, np.ndarray]:
    """The leaves of virtual tokens, by path.

    Raises:
      AdapterError: a tensor is missing, or has another shape.
      ValueError: the attentions have keys or values of several sizes.
    """
    spec, structure = config.spec, dict(peft.structure)
    if spec.prompt == EMBEDDINGS:
        action = next(a for a in peft.actions if is_prompt(a))
        why = f"which {spec.peft_type} has"
        own = {t.leaf: file.take_shared(t.key, structure[action.leaf_path(t.leaf)][0], why) for t in spec.tensors}
        own = dict(spec.read(action.method, action.site, own)) if spec.read else own
        return {action.leaf_path(name): x for name, x in own.items()}
    actions = prefix_actions(peft)
    layers, (heads, dim) = _layers(actions), _heads(actions)
    length = actions[0].method.length
    why = f"keys and values of {length} tokens in {layers} layers"
    flat = file.take_shared(spec.tensors[0].key, (length, layers * 2 * heads * dim), why)
    each = flat.reshape(length, layers, 2, heads, dim)
    found = in_sites(peft, [(each[:, i, 0], each[:, i, 1]) for i in range(layers)])
    return {path: np.asarray(x) for path, x in stored_leaves(peft, found).items()}


def _layers(actions: list[Action]) -> int:
    return sum(int(np.prod([n for _, n in action.site.stack])) for action in actions)


def _heads(actions: list[Action]) -> tuple[int, int]:
    """The number of heads of keys and values, and their size.

    Raises:
      ValueError: they differ.
    """
    found = sorted({action.site.heads for action in actions})
    if len(found) > 1 or found[0][1] != found[0][2]:
        raise ValueError(
            "HuggingFace PEFT has keys and values of one size in all layers; the attentions here have (heads, size of "
            f"keys, size of values) {found}"
        )
    return found[0][:2]


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Contents:
    """The tensors of a folder of virtual tokens.

    Attributes:
      tensors: by name.
      config: the fields of the configuration.
      rest: the Peft without them.
    """

    tensors: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    rest: Peft


def contents(peft: Peft, adapter: Tree, task_type: str | None) -> Contents:
    """The tensors of an adapter's virtual tokens in a folder.

    Raises:
      ValueError: the folder cannot say what the method does.
    """
    actions = [a for a in peft.actions if is_prompt(a)]
    method, site = actions[0].method, actions[0].site
    spec: Any = form(type(method))
    _check(peft, actions, spec, task_type)
    if spec.prompt == EMBEDDINGS:
        leaves = meta.unbox(peft.own(actions[0], peft.check(adapter)))
        own = used_leaves(actions[0], {}, leaves) if spec.expanded else leaves
        # What a network computes is one leaf, whatever the stored ones are called.
        tensors = {t.key: own[t.leaf if t.leaf in own else "prompt"] for t in spec.tensors}
        sizes = {"token_dim": site.outputs}
    else:
        heads, dim = _heads(actions)
        layers = in_layers(prefixes(peft, adapter))
        flat = np.stack([np.asarray(x) for pair in layers for x in pair], axis=1)
        tensors = {spec.tensors[0].key: flat.reshape(len(flat), -1)}
        sizes = {"token_dim": heads * dim, "num_attention_heads": heads, "num_layers": len(layers)}
    config = {**spec.constants, **sizes}
    for field in spec.fields:
        config[field.key] = field.of(method, site, config)
    rest = dataclasses.replace(peft, actions=tuple(a for a in peft.actions if not is_prompt(a)))
    dtype = jnp.dtype(method.dtype)  # what was computed is wider
    return Contents({k: np.asarray(x).astype(dtype) for k, x in tensors.items()}, config, rest)


def _check(peft: Peft, actions: list[Action], spec: HFSpec, task_type: str | None) -> None:
    method = actions[0].method
    if not task_type:
        raise ValueError(
            f"HuggingFace PEFT runs {spec.peft_type} by the task: give task_type, such as 'CAUSAL_LM', 'SEQ_CLS' or "
            "'FEATURE_EXTRACTION'"
        )
    for name, value in spec.implied.items():
        if getattr(method, name) != value:
            raise ValueError(
                f"in HuggingFace PEFT, {spec.peft_type} has {name}={value}, and this {method.name} was trained with "
                f"{getattr(method, name)}; train it with {name}={value}, or save it with jpeft.save"
            )
    config = getattr(peft.model, "config", None)
    layers = next((n for name in _LAYERS if isinstance(n := getattr(config, name, None), int)), None)
    if spec.prompt != EMBEDDINGS and layers is not None and _layers(actions) != layers:
        raise ValueError(
            f"HuggingFace PEFT has keys and values in each of {layers} layers, and this {method.name} in "
            f"{_layers(actions)} attentions"
        )
