"""`jpeft.hf.save`."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np
from flax.core import meta

from jpeft.core import stacking
from jpeft.core.actions import Action
from jpeft.core.peft import Peft, split_variables
from jpeft.core.sites import FUSED, Site
from jpeft.core.tree import Path, Tree, flatten, join, peek, unflatten
from jpeft.files import new_folder, write_atomically, write_safetensors
from jpeft.hf import config as hf
from jpeft.hf import layout, tied
from jpeft.hf.names import ROOT, Names, Prefix
from jpeft.methods import BitFit, LoRA, Train

_README = "README.md"


def save(
    path: str | PathLike[str],
    peft: Peft,
    adapter: Tree,
    params: Tree,
    *,
    prefix: Prefix = "",
    task_type: str | None = None,
    base_model: str | None = None,
) -> None:
    """Writes an adapter as a folder that ``peft.PeftModel.from_pretrained`` loads. Inverse of `jpeft.hf.load`.

    It takes a `LoRA`, alone or in a `Chain` with `BitFit` (of all biases, or of those where the LoRA is) and `Train`
    (of whole modules). A part of a model, say a classifier's encoder, is saved alone with its own peft and trees.
    Layers that a decoder of `jpeft.models` stacks are written one by one, as torch has them.

    Args:
      path: the folder; it appears whole or not at all. An adapter that is there is replaced.
      peft: the bound method. adapter: its leaves. params: the base, of which nothing is written.
      prefix: what stands before the names of torch's modules, e.g. ``"bert."`` for a BertForSequenceClassification; or
        that by where modules lie in the tree, e.g. ``{"encoder/": "bert."}``.
      task_type: HuggingFace's, e.g. "SEQ_CLS". base_model: the base's name or folder, for who reads the configuration.

    Raises:
      ValueError: what a LoRA of HuggingFace cannot say, by method or site. FileExistsError: ``path`` holds other files.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jpeft, tempfile
    >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]), jnp.ones((1, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> peft = jpeft.LoRA(rank=2, targets=["layers_0"]).bind(model, params, x)
    >>> folder = tempfile.mkdtemp()
    >>> jpeft.hf.save(folder, peft, peft.init(jax.random.key(1), params), params)
    >>> peft, adapter = jpeft.hf.load(folder, model, params, x)
    >>> peft.method.targets
    ('layers_0',)
    """
    for method in peft.method.methods():
        if type(method) not in (LoRA, BitFit, Train):
            raise ValueError(f"{method.name} has no form in a HuggingFace LoRA folder; save it with jpeft.save")
    if not any(a.site.kind == "weight" for a in peft.actions):
        raise ValueError("a HuggingFace LoRA folder needs a LoRA in the chain; save this adapter with jpeft.save")
    leaves = {p: np.asarray(jax.device_get(meta.unbox(x))) for p, x in peft.check(adapter).items()}
    peft, leaves, base = _one_by_one(peft, leaves, flatten(split_variables(params)[0]))
    names = Names.of(prefix)
    lora = {names.torch(a.site.path): a for a in peft.actions if a.site.kind == "weight"}
    for action in lora.values():
        layout.check_site(action.site)
    tensors = _tensors(peft, leaves, names, lora)
    head, embedding = tied.head(peft.model, names, tensors), tied.embedding_name(names)
    settings = lora | {tied.head_name(names): lora[embedding]} if head and embedding in lora else lora
    config = _lora_fields(settings) | {
        "base_model_name_or_path": base_model,
        "bias": _bias(peft, base),
        "inference_mode": True,
        "modules_to_save": _modules_to_save(peft, base, names, task_type) or None,
        "peft_type": "LORA",
        "target_modules": sorted(lora),
        "task_type": task_type,
    }
    if head:
        config["ensure_weight_tying"] = True
    _check_free(FilePath(path))
    with new_folder(FilePath(path), replace=True) as folder:
        write_safetensors(folder / hf.TENSORS, tensors | head, {"format": "pt"})
        write_atomically(folder / hf.CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        write_atomically(folder / _README, _card(config).encode())


def _one_by_one(
    peft: Peft, leaves: dict[Path, np.ndarray], base: Mapping[Path, Any]
) -> tuple[Peft, dict[Path, np.ndarray], list[Path]]:
    """The Peft, its leaves and the paths of the base, with the layers one by one where the model stacks them."""
    at = stacking.stacked_at(peft.model)
    if at is None:
        return peft, leaves, list(base)
    leaves = flatten(stacking.unstack(unflatten(leaves), at))
    paths = [own for p, x in base.items() for own in stacking.numbered(p, at, (*np.shape(peek(x)), 0)[0])]
    return stacking.unroll_peft(peft), leaves, paths


def _tensors(
    peft: Peft, leaves: Mapping[Path, np.ndarray], names: Names, lora: Mapping[str, Action]
) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for action in peft.actions:
        module, site = names.torch(action.site.path), action.site
        if site.kind == "leaf":
            own = {leaf_suffix(names, site, lora): layout.leaf_to_torch(site, leaves[site.path])}
            module = names.torch(site.path[:-1])
        else:
            a, b = (leaves[action.leaf_path(name)] for name in ("lora_a", "lora_b"))
            own = layout.lora_to_torch(site, a, b)
        named = {f"{ROOT}{module}.{suffix}": x for suffix, x in own.items()}
        if not module or named.keys() & out.keys():
            raise ValueError(f"prefix gives {site.name!r} the name {module!r}, which is empty or another module's")
        out |= named
    return out


def leaf_suffix(names: Names, site: Site, lora: Mapping[str, Any]) -> str:
    """A trained leaf's name within its module: PEFT moves a module that has a LoRA one level down."""
    moved = "base_layer." if names.torch(site.path[:-1]) in lora else ""
    return moved + layout.leaf_name(site.path[-1])


# --- the configuration ------------------------------------------------------------------------------------------------


def _lora_fields(lora: Mapping[str, Action]) -> dict[str, Any]:
    """The fields of the configuration that hold the LoRAs' settings.

    Modules are named whole, not by suffix or "all-linear": the torch model may have more than this one, such as a
    pooler, and would be given new LoRAs there.
    """
    methods = {name: action.method for name, action in lora.items()}
    # PEFT, too, drops nothing before an embedding; a weight that no call explains cannot have dropout.
    dropouts = {a.method.dropout for a in lora.values() if a.site.via == FUSED and not a.site.lookup} or {0.0}
    if len(dropouts) > 1:
        raise ValueError(f"HuggingFace has one lora_dropout for all modules; this LoRA has {sorted(dropouts)}")
    ranks = {name: a.method.rank * layout.parts(a.site) for name, a in lora.items()}
    rslora = all(method.rslora for method in methods.values())
    alphas = {name: _alpha(method, ranks[name], rslora) for name, method in methods.items()}
    inits = {method.init_weights for method in methods.values()}
    rank, rank_pattern = hf.patterns(ranks)
    alpha, alpha_pattern = hf.patterns(alphas)
    return {
        "r": rank,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "use_rslora": rslora,
        "lora_dropout": dropouts.pop(),
        "init_lora_weights": {v: k for k, v in hf.INITS.items()}[inits.pop()] if len(inits) == 1 else True,
        "fan_in_fan_out": any(a.site.owner == "FlaxConv1D" for a in lora.values()),
    }


def _alpha(method: LoRA, rank: int, rslora: bool) -> float:
    """The lora_alpha under which a module of this rank has the method's scale."""
    if (method.rank, method.rslora) == (rank, rslora):
        alpha = rank if method.alpha is None else method.alpha
    else:
        alpha = method.scale * (math.sqrt(rank) if rslora else rank)
    return int(alpha) if alpha == int(alpha) else alpha


def _bias(peft: Peft, base: Collection[Path]) -> str:
    """What `BitFit` trains, in HuggingFace's words."""
    trained = {a.site.path for a in peft.actions if a.site.kind == "leaf"}
    chosen = {a.site.path for a in peft.actions if isinstance(a.method, BitFit)}
    if not chosen:
        return "none"
    if {p for p in base if p[-1] == "bias"} <= trained:
        return "all"
    beside = {p for a in peft.actions if a.site.kind == "weight" and (p := a.site.bias_path) is not None}
    if chosen == beside:
        return "lora_only"
    odd = join(min(chosen ^ beside))
    raise ValueError(
        f"HuggingFace trains all biases or those of the LoRA's modules; this BitFit does neither: see {odd!r}"
    )


def _modules_to_save(peft: Peft, base: Collection[Path], names: Names, task_type: str | None) -> list[str]:
    """What `Train` trains, as torch modules: the outermost of which all leaves are trained.

    Raises:
      ValueError: `Train` has a part of a module, or one with a LoRA; or PEFT would look for another module too.
    """
    trained = {a.site.path for a in peft.actions if a.site.kind == "leaf"}
    wholes = {_whole(a.site.path, base, trained) for a in peft.actions if isinstance(a.method, Train)}
    saved = {names.torch(path): path for path in wholes}
    for leaf in base:
        for n in range(1, len(leaf)):
            name = names.torch(leaf[:n])
            if leaf not in trained and any(name.endswith(module) for module in saved):
                raise ValueError(
                    f"PEFT takes {name!r} for one of modules_to_save={sorted(saved)}, as it ends alike; train it too"
                )
    heads = hf.TASK_HEADS.get(task_type or "", set())
    if heads and not any(heads & set(module.split(".")) for module in saved):
        raise ValueError(
            f"with task_type={task_type!r} PEFT looks for a saved {' or '.join(sorted(heads))}, which this adapter has "
            "not; leave task_type out, or train the head with Train"
        )
    return sorted(saved)


def _whole(leaf: Path, base: Collection[Path], trained: Collection[Path]) -> Path:
    """The outermost module around a leaf that is trained as a whole."""
    for n in range(1, len(leaf)):
        if all(p in trained for p in base if p[:n] == leaf[:n]):
            return leaf[:n]
    missing = min(p for p in base if p[:-1] == leaf[:-1] and p not in trained)
    raise ValueError(
        f"HuggingFace's modules_to_save are whole modules without a LoRA; this Train has {join(leaf)!r} without "
        f"{join(missing)!r}"
    )


# --- the folder -------------------------------------------------------------------------------------------------------


def _check_free(path: FilePath) -> None:
    """Raises if there is anything but an adapter of HuggingFace's layout under this name."""
    if not path.exists():
        return
    held = {p.name for p in path.iterdir()} if path.is_dir() else {path.name}
    others = held - {hf.CONFIG, hf.TENSORS, _README} if hf.CONFIG in held else held
    if others:
        raise FileExistsError(f"{path} holds {min(others)!r}, which is no adapter's; choose another folder")


def _card(config: Mapping[str, Any]) -> str:
    base = config["base_model_name_or_path"]
    header = ["library_name: peft", *([f"base_model: {json.dumps(base)}"] if base else []), "tags: [lora, jpeft]"]
    return "\n".join(
        [
            "---",
            *header,
            "---",
            "# A LoRA adapter",
            "",
            f"Rank {config['r']}, alpha {config['lora_alpha']}, on {len(config['target_modules'])} modules"
            + (f" of {base}" if base else "")
            + "; trained in JAX with jpeft.",
            "",
            "```python",
            "from peft import PeftModel",
            "",
            'model = PeftModel.from_pretrained(base_model, "this folder")',
            "```",
            "",
        ]
    )
