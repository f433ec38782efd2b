"""Loads a HuggingFace folder or a GGUF file as a Linen module and its parameter tree."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jpeft.core.quantized import Quantized
from jpeft.core.stacking import stacked_at
from jpeft.errors import ModelError
from jpeft.files import read_json
from jpeft.models import bitsandbytes
from jpeft.models.families import abstract_leaves, build_model, read_model_config
from jpeft.models.layout import leaves_by_path, list_slots, tree_of
from jpeft.models.matching import check_values, match_tensors
from jpeft.models.placing import place_leaves, shardings_by_path
from jpeft.models.reading import TensorReader
from jpeft.models.sources import has_safetensors, is_gguf, open_tensors
from jpeft.quantization.tree import quantize as quantize_tree
from jpeft.storage import as_path


def load(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    shardings: Any = None,
    quantize: str | Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Loads a HuggingFace folder (`config.json` and safetensors, sharded or not) or a `.gguf` file.

    Each tensor is placed with its dtype and sharding as it is read: beside the model itself, host memory holds one or
    two tensors. Weights that bitsandbytes (4-bit NF4) or `save` quantized stay quantized, as from `jpeft.quantize`.

    Args:
        path: the folder or file, on a disk or an object store (`gs://`). Of a folder on a store, one tensor after the
            other is fetched; a `.gguf` file is copied to the cache. Nothing else is downloaded, no pickle is opened.
        dtype: the dtype of computation; None: the parameters' dtype.
        param_dtype: the dtype of the parameters, whatever the file's (float32, bfloat16, float16). Quantized weights
            are dequantized into it when they are used; those of a `.gguf` file when they are read.
        shardings: where the parameters go: a `jax.sharding.Sharding` for all, a tree of them with the parameters'
            structure, or a function from the model to one of these, such as
            `lambda m: logical_shardings(m, mesh, rules)`. None: the default device.
        quantize: a scheme, or a dict of `jpeft.quantize`'s arguments, to quantize each tensor as it is read. The result
            equals `jpeft.quantize` of the loaded parameters bit for bit.
        **options: arguments of the model's family: for decoders `scan_layers` (True) and `remat` (None), see
            `jpeft.models.decoder`; for encoders `output`, see `jpeft.models.bert.Bert`, and `pooler=False` and
            `head=False` to leave out a pooler and the head of a `…ForSequenceClassification`, which are parts of the
            model where the files have them.

    Returns:
        `(model, params)`, for `model.apply({"params": params}, input_ids, attention_mask=mask)`: hidden states
        `[batch, length, hidden]` of an encoder, logits `[batch, length, vocabulary]` of a decoder.

    Raises:
        FileNotFoundError: there is no such folder or file, or it has no `config.json`, weights or shard.
        ModelError: the model type or a config field is not supported, a file cannot be read, or tensors are missing,
            unexpected, misshapen or, if quantized, incomplete; it names them.
        ValueError: `quantize` does not fit the model, as from `jpeft.quantize`.

    Warns:
        UserWarning: the folder also holds an adapter of PEFT's, which is not loaded.

    >>> import jax, tempfile
    >>> from pathlib import Path
    >>> from jpeft.models.bert import Bert, BertConfig
    >>> from jpeft.models.saving import save
    >>> tiny = Bert(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    >>> ids = jnp.array([[101, 2023, 102]])
    >>> folder = Path(tempfile.mkdtemp()) / "tiny"
    >>> save(folder, tiny, tiny.init(jax.random.key(0), ids)["params"])
    >>> model, params = load(folder)
    >>> model.apply({"params": params}, ids, attention_mask=jnp.ones_like(ids)).shape
    (1, 3, 8)
    """
    path = as_path(path)
    config, where = read_model_config(path)
    if (path / "adapter_config.json").is_file():  # transformers would apply it
        warnings.warn(
            f"{path} holds an adapter beside the model, which is not loaded with it: give it to jpeft.hf.load, or as "
            "`adapter`",
            stacklevel=2,
        )
    build_model(config, where, dtype, param_dtype, {})  # an error in it comes before one in the weights
    with open_tensors(path) as stored:
        tensors = bitsandbytes.combine_parts(stored)
        family, model = build_model(config, where, dtype, param_dtype, options, tensors)
        layers = getattr(getattr(model, "config", None), "num_hidden_layers", 0)
        if layers > len(tensors):  # tracing so many layers would take too long
            raise ModelError(f"{path}: config.json has {layers:,} layers, but there are {len(tensors)} tensors")
        shapes = abstract_leaves(family, model)
        slots = list_slots(shapes, stacked_at(model))
        matched = match_tensors(path, family, model, slots, tensors)
        check_values(family, model, matched, tensors)
        reader = TensorReader(matched.names, tensors, param_dtype, _plan_quantization(shapes, quantize))
        leaves = place_leaves(shapes, slots, reader, shardings_by_path(shardings, model, shapes))
    return model, tree_of(leaves)


def abstract(
    config: str | os.PathLike[str] | Mapping[str, Any],
    *,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    quantize: str | Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """The result of `load` without weights: the module, and `jax.ShapeDtypeStruct`s for its parameters.

    Args:
        config: the contents of a `config.json`, the path of that file, or a folder or `.gguf` file. A folder needs no
            weights; if it has any, they tell its optional parts (a pooler).
        dtype: as for `load`.
        param_dtype: as for `load`.
        quantize: as for `load`.
        **options: as for `load`.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ModelError: as from `load`.
        ValueError: as from `load`.

    >>> model, params = abstract({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4})
    >>> params["lm_head"]["kernel"]
    ShapeDtypeStruct(shape=(64, 32000), dtype=float32)
    """
    if isinstance(config, Mapping):
        fields, where = dict(config), "config"
    elif (path := as_path(config)).is_file() and not is_gguf(path):
        fields, where = read_json(path, ModelError), path
    else:
        fields, where = read_model_config(path)
    tensors = None
    if not isinstance(config, Mapping) and has_safetensors(as_path(config)):
        with open_tensors(as_path(config)) as stored:
            tensors = bitsandbytes.combine_parts(stored)
    family, model = build_model(fields, where, dtype, param_dtype, options, tensors)
    shapes = abstract_leaves(family, model)
    return model, tree_of({**shapes, **_plan_quantization(shapes, quantize)})


def _plan_quantization(shapes: Mapping[str, Any], asked: str | Mapping[str, Any] | None) -> dict[str, Quantized]:
    """The leaves that `jpeft.quantize` would quantize, abstract. Invalid arguments raise before anything is read."""
    if asked is None:
        return {}
    options = {"scheme": asked} if isinstance(asked, str) else asked
    if not isinstance(options, Mapping):
        raise TypeError(f"quantize must be a scheme or a dict of jpeft.quantize's arguments, got {asked!r}")
    planned = quantize_tree(tree_of(shapes), **options)
    return {name: leaf for name, leaf in leaves_by_path(planned).items() if isinstance(leaf, Quantized)}
