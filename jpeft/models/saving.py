"""Saves a model as a HuggingFace folder that transformers loads."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jpeft.core.quantized import Quantized
from jpeft.core.stacking import stacked_at
from jpeft.errors import ModelError
from jpeft.files import new_folder, write_json, write_safetensors
from jpeft.models import bitsandbytes
from jpeft.models.dtypes import SOURCE, cast, stored_dtypes
from jpeft.models.families import abstract_leaves, build_model, family_of, read_model_config
from jpeft.models.family import Family
from jpeft.models.folder import CONFIG, WEIGHTS
from jpeft.models.gguf.tokenizer import write_tokenizer
from jpeft.models.layout import (
    check_shapes,
    leaves_by_path,
    list_slots,
    torch_value,
)
from jpeft.models.matching import match_tensors
from jpeft.models.naming import Naming
from jpeft.models.reshaped import as_in_source, grow_head, update_config
from jpeft.models.sources import is_gguf, open_tensors, read_config
from jpeft.storage import as_path, download, file_sizes

# `save` does not copy these from the source: it writes its own config and weights, and other weights would be stale.
_NOT_COPIED = re.compile(
    r"\..*|config\.json|.*\.(index\.json|safetensors|bin|pt|pth|ckpt|h5|msgpack|ot|onnx|gguf|tflite)"
)


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    params: Mapping[str, Any],
    source: str | os.PathLike[str] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    dtype: Any = None,
    safe: bool = True,
) -> None:
    """Writes a HuggingFace folder that transformers loads. Inverse of `load`, bit for bit.

    Quantized leaves are written in bitsandbytes' form, which transformers loads, if all are NF4 with blocks along the
    inputs of linear layers (as from `jpeft.quantize`, for inputs that 64 divides). Other forms only jpeft reads.

    Args:
        path: the folder to write, on a disk or an object store. After a failure there is no folder.
        model: a model that `load` returned.
        params: its whole tree (merge an adapter first). Each leaf keeps its quantization.
        source: the folder or `.gguf` file that the model was loaded from. Everything else in it is kept: tokenizer,
            pooling, other fields of its `config.json`, the tensors of poolers and heads.
        extra_files: more files to write, name → content.
        dtype: the dtype of weights that are not quantized: None is that of the leaf, and "source" that of the same
            tensor in `source` (float32 for one that a `.gguf` file holds quantized).
        safe: False writes infinities for numbers beyond the range of `dtype`.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
        ModelError: `params` is not the model's tree, `source` holds another model, or a number is beyond the range of
            `dtype`.

    >>> import tempfile
    >>> import jax, jax.numpy as jnp
    >>> from jpeft.models.bert import Bert, BertConfig
    >>> tiny = Bert(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    >>> folder = Path(tempfile.mkdtemp()) / "tiny"
    >>> save(folder, tiny, tiny.init(jax.random.key(0), jnp.array([[101, 102]]))["params"])
    >>> sorted(file.name for file in folder.iterdir())
    ['config.json', 'model.safetensors']
    """
    path, dtype = as_path(path), dtype if dtype in (None, SOURCE) else jnp.dtype(dtype).name
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path}: exists and is not an empty folder")
    family = family_of(model)
    leaves, shapes = leaves_by_path(params), abstract_leaves(family, model)
    check_shapes(
        "params",
        {name: leaf.shape for name, leaf in shapes.items()},
        {name: np.shape(leaf) for name, leaf in leaves.items()},
    )
    slots = list_slots(shapes, stacked_at(model))
    base = _bare(family, model) if source is None else _read_source(as_path(source), family, model)
    config, tensors, origins = dict(base.config), dict(base.tensors), dict(base.origins)
    wanted = _wanted_dtypes(dtype, source)
    embeddings, written = set(), set()
    for slot in slots:
        name, value = base.naming.in_file(slot.tensor_name), torch_value(slot, leaves)
        if isinstance(value, Quantized):
            tensors |= bitsandbytes.to_tensors(name, value, slot.is_kernel)
            origins[name] = value.origin
        else:
            value = tensors[name] = cast(name, value, wanted(name), safe)
        written.add(jnp.dtype(value.dtype).name)
        if slot.path.endswith("/embedding"):
            embeddings.add(name)
    fields = {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}
    named = written.pop() if len(written) == 1 else config.get(min(fields)) if dtype == SOURCE else "float32"
    if (quantization := bitsandbytes.quantization_config(tensors, embeddings, named or "float32")) is not None:
        config["quantization_config"] = quantization
    config |= dict.fromkeys(fields, named or "float32")
    with new_folder(path) as new:
        if source is not None:
            _copy_companions(as_path(source), new)
        write_json(new / CONFIG, config, sort_keys=True)
        write_safetensors(new / WEIGHTS, tensors, {"format": "pt", **bitsandbytes.metadata(origins)})
        for name, content in (extra_files or {}).items():
            (new / name).write_bytes(content)


def _wanted_dtypes(dtype: Any, source: str | os.PathLike[str] | None) -> Callable[[str], Any]:
    """The dtype to write a tensor in, by its name; None is the one that it has. See `save`."""
    if dtype != SOURCE:
        return lambda name: dtype
    stored = {} if source is None else stored_dtypes(source)
    usual = Counter(stored.values()).most_common(1)[0][0] if stored else None
    return lambda name: stored.get(name, usual)


class _Source(NamedTuple):
    """The parts of a source that the saved folder keeps.

    Attributes:
        config: its `config.json`, without quantization.
        naming: the form of its tensor names.
        tensors: its tensors beside the model.
        origins: the checksums of the quantized ones among `tensors`, by name.
    """

    config: Mapping[str, Any]
    naming: Naming
    tensors: Mapping[str, np.ndarray] = {}
    origins: Mapping[str, Any] = {}


def _bare(family: Family, model: Any) -> _Source:
    """No source: the family's own configuration and names."""
    return _Source(family.to_config(model), family.namings(model)[0])


def _read_source(source: Path, family: Family, model: Any) -> _Source:
    stored_config = build_model(*read_model_config(source), model.dtype, model.param_dtype, {})[1].config
    before = as_in_source(model, stored_config)
    if before.config != stored_config:
        raise ModelError(f"{source}: holds another model than the one to save (their configurations differ)")
    if is_gguf(source):
        return _bare(family, model)
    slots = list_slots(abstract_leaves(family, before), stacked_at(before))
    with open_tensors(source) as stored:
        tensors = bitsandbytes.combine_parts(stored)
        matched = match_tensors(source, family, before, slots, tensors)
        of_model = {*matched.names.values(), *(copy for copy, _ in matched.copies)}
        kept, origins = {}, {}
        for name, tensor in tensors.items():
            if name in of_model:
                continue
            if isinstance(tensor, bitsandbytes.QuantizedTensor):
                kept |= {part: stored[part].read() for part in tensor.part_names}
                origins[name] = tensor.origin
            else:
                kept[name] = grow_head(name, tensor.read(), before, model)
        config = bitsandbytes.without_quantization(read_config(source), source / CONFIG)
        return _Source(update_config(config, before, model), matched.naming, kept, origins)


def _copy_companions(source: Path, folder: Path) -> None:
    """Copies the tokenizer, other small files, and numbered module folders of sentence-transformers (`1_Pooling`)."""
    if is_gguf(source):
        return write_tokenizer(source, folder)
    for name in file_sizes(source):
        if re.match(r"\d+_[^/]*/", name) if "/" in name else not _NOT_COPIED.fullmatch(name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            download(source / name, folder / name)
