"""Model families: what each `model_type` of a `config.json` is built by."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from jpeft.errors import ModelError
from jpeft.models import bert_hf, bitsandbytes, decoder_hf
from jpeft.models.family import Family
from jpeft.models.folder import CONFIG
from jpeft.models.layout import leaves_by_path
from jpeft.models.sources import is_gguf, read_config
from jpeft.storage import as_path

#: `model_type` of a `config.json` → the module that builds it. A new family is one module and its lines here.
FAMILIES: dict[str, Family] = {
    "bert": bert_hf,
    "roberta": bert_hf,
    "xlm-roberta": bert_hf,
    "camembert": bert_hf,
    "electra": bert_hf,
    "distilbert": bert_hf,
    "llama": decoder_hf,
    "mistral": decoder_hf,
    "qwen2": decoder_hf,
    "qwen3": decoder_hf,
    "gemma2": decoder_hf,
    "gemma3": decoder_hf,
    "gemma3_text": decoder_hf,
}


def find_family(model_type: Any, where: Path | str = "config") -> Family:
    """The family of a `model_type`.

    Raises:
        ModelError: the type is not supported; it starts with ``where``.

    >>> find_family("qwen2").IS_DECODER
    True
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(f"{where}: model_type {model_type!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def family_of(model: Any) -> Family:
    """The family of a model that `load` or `abstract` returned."""
    return find_family(model.config.model_type)


def is_decoder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder or a GGUF file holds a causal language model, from its configuration.

    Raises:
        FileNotFoundError: there is no such model.
        ModelError: its `model_type` is not supported.

    >>> is_decoder("all-MiniLM-L6-v2")  # doctest: +SKIP
    False
    """
    config, where = read_model_config(as_path(path))
    return find_family(config.get("model_type"), where).IS_DECODER


def read_model_config(path: Path) -> tuple[dict[str, Any], Path]:
    """The configuration of a folder or a GGUF file, and the file that holds it."""
    return read_config(path), path if is_gguf(path) else path / CONFIG


def abstract_leaves(family: Family, model: nn.Module) -> dict[str, Any]:
    """Shapes and dtypes of a model's leaves by `/`-separated path."""
    return leaves_by_path(jax.eval_shape(model.init, jax.random.key(0), *family.example_inputs(model))["params"])


def build_model(
    config: Mapping[str, Any],
    where: Path | str,
    dtype: Any,
    param_dtype: Any,
    options: Mapping[str, Any],
    tensors: Mapping[str, Any] | None = None,
) -> tuple[Family, Any]:
    """The family and the model of a configuration. Optional parts are those that the checkpoint's ``tensors`` show.

    Raises:
        ModelError: a model type, a field or an option is not supported; it starts with ``where``.
    """
    family = find_family(config.get("model_type"), where)
    if unknown := sorted(options.keys() - family.OPTIONS):
        raise ModelError(
            f"{config['model_type']} models have no option {', '.join(unknown)}, "
            f"only {', '.join(sorted(family.OPTIONS)) or 'none'}"
        )
    try:
        plain = bitsandbytes.without_quantization(config, where)
        if tensors is not None:
            options = {**family.parts(plain, {name: tensor.shape for name, tensor in tensors.items()}), **options}
        return family, family.from_config(plain, dtype=dtype, param_dtype=param_dtype, **options)
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"{where}: {error}") from None
