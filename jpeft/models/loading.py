"""HuggingFace model folders to Linen modules with their parameter trees, and back.

A leaf's path is its torch name with `/` for `.` and Flax's leaf name: `…/query/kernel` is `….query.weight`
transposed, `…/LayerNorm/scale` is `….LayerNorm.weight`, `…/word_embeddings/embedding` is
`….word_embeddings.weight`. Which leaves there are follows from the module itself, so a new family is one file and one
line of `FAMILIES`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jpeft.core import fingerprint, tree
from jpeft.core.quantized import Quantized, open_boxes, origin_of_stack, quantize_part, shardings_like
from jpeft.core.stacking import DIFFER, stacked_at
from jpeft.errors import ModelError
from jpeft.files import new_folder, read_json, write_safetensors
from jpeft.models import quantized
from jpeft.models.files import CONFIG, WEIGHTS, Tensor
from jpeft.models.sources import is_gguf, open_tensors, read_config
from jpeft.parallel.rules import Rules, param_shardings
from jpeft.quantization.tree import quantize

#: `model_type` of a `config.json` → the module that builds it (see `Family`), imported when asked for.
FAMILIES: dict[str, str] = {
    "bert": "jpeft.models.bert",
    "roberta": "jpeft.models.bert",
    "xlm-roberta": "jpeft.models.bert",
    "camembert": "jpeft.models.bert",
    "electra": "jpeft.models.bert",
    "distilbert": "jpeft.models.bert",
    "llama": "jpeft.models.decoder_hf",
    "mistral": "jpeft.models.decoder_hf",
    "qwen2": "jpeft.models.decoder_hf",
    "qwen3": "jpeft.models.decoder_hf",
    "gemma2": "jpeft.models.decoder_hf",
    "gemma3": "jpeft.models.decoder_hf",
    "gemma3_text": "jpeft.models.decoder_hf",
}

_Leaf: TypeAlias = np.ndarray | jax.Array | Quantized

_TORCH_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_OLD_LEAF = {"gamma": "weight", "beta": "bias"}  # LayerNorm's, in checkpoints converted from TensorFlow
# What `save` does not copy from the source: it writes its own config and weights, and other weights would be stale.
_NOT_COPIED = re.compile(
    r"\..*|config\.json|.*\.(index\.json|safetensors|bin|pt|pth|ckpt|h5|msgpack|ot|onnx|gguf|tflite)"
)


class Family(Protocol):
    """What a module of `FAMILIES` defines. Its Linen modules have a `config` with a `model_type`."""

    OPTIONS: frozenset[str]
    """What `from_config` takes beside the config and the dtypes."""

    def from_config(self, config: Mapping[str, Any], *, dtype: Any, param_dtype: Any, **options: Any) -> nn.Module:
        """The module that a `config.json` describes; a ValueError names a field that it cannot follow."""
        ...

    def to_config(self, model: Any) -> dict[str, Any]:
        """Inverse of `from_config`."""
        ...

    def prefix(self, model: Any) -> str:
        """What stands before the model's tensor names in a checkpoint that holds more than it."""
        ...

    def extras(self, model: Any) -> re.Pattern[str]:
        """Matches the tensors that may stand beside the model (heads, buffers), named without the prefix."""
        ...

    def example_inputs(self, model: Any) -> tuple[Any, ...]:
        """The smallest inputs that the model takes, abstract."""
        ...

    def axis_names(self, path: tree.Path) -> tuple[str | None, ...]:
        """The logical names of a parameter's axes, where its box does not tell."""
        ...


def load(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    shardings: Any = None,
    quantize: str | Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Reads a HuggingFace folder (`config.json` and safetensors, sharded or not) or a `.gguf` file.

    Each tensor goes straight to its place, dtype and sharding: beside the model itself, host memory holds one tensor or
    two. Weights that bitsandbytes (4-bit NF4) or `save` quantized are read as they are, as `jpeft.quantize` gives them.

    Args:
        path: the folder or file. Nothing is downloaded, and no pickle is opened.
        dtype: what the model computes in; None follows the parameters.
        param_dtype: what the parameters are held in, whatever the file's (float32, bfloat16, float16); quantized ones
            are dequantized into it where they are used, those of a `.gguf` file as they are read.
        shardings: where the parameters go: a `jax.sharding.Sharding` for all, a tree of them like the parameters, or
            a function from the model to one of these, such as `lambda m: logical_shardings(m, mesh, rules)`. None is
            the default device.
        quantize: a scheme, or a dict of `jpeft.quantize`'s arguments: what that would make of the parameters, bit for
            bit, tensor by tensor as they are read.
        **options: the family's own: for decoders `scan_layers` (True) and `remat` (None), see `jpeft.models.decoder`.

    Returns:
        `(model, params)`, for `model.apply({"params": params}, input_ids, attention_mask=mask)`: hidden states
        `[batch, length, hidden]` of an encoder, logits `[batch, length, vocabulary]` of a decoder.

    Raises:
        FileNotFoundError: there is no such folder or file, or no `config.json`, weights or shard in it.
        ModelError: a model type or a config field that is not supported, a file that cannot be read, or tensors that
            are missing, unexpected, misshapen or, where quantized, torn; it names them.
        ValueError: `quantize` does not fit the model, as `jpeft.quantize` says.

    >>> import tempfile
    >>> from jpeft.models.bert import Bert, BertConfig
    >>> tiny = Bert(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    >>> ids = jnp.array([[101, 2023, 102]])
    >>> folder = Path(tempfile.mkdtemp()) / "tiny"
    >>> save(folder, tiny, tiny.init(jax.random.key(0), ids)["params"])
    >>> model, params = load(folder)
    >>> model.apply({"params": params}, ids, attention_mask=jnp.ones_like(ids)).shape
    (1, 3, 8)
    """
    path = Path(path)
    family, model = _build(path, dtype, param_dtype, options)
    with open_tensors(path) as found:
        tensors = quantized.gather(found)
        layers = getattr(getattr(model, "config", None), "num_hidden_layers", 0)
        if layers > len(tensors):  # before so many are traced
            raise ModelError(f"{path}: config.json says {layers:,} layers, but there are {len(tensors)} tensors")
        abstract = _abstract(family, model)
        slots = _slots(abstract, stacked_at(model))
        names = _match(path, family, model, slots, tensors)
        reader = _Reader(names, tensors, param_dtype, _planned(abstract, quantize))
        placed = _place(abstract, slots, reader, _shardings_by_path(shardings, model, abstract))
    return model, tree.unflatten({tuple(name.split("/")): leaf for name, leaf in placed.items()})


def abstract(
    config: str | os.PathLike[str] | Mapping[str, Any],
    *,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    quantize: str | Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """What `load` would give, without weights: the module, and `jax.ShapeDtypeStruct`s for its parameters.

    Args:
        config: what a `config.json` says, that file, or a folder that holds one. Weights need not be there.
        dtype, param_dtype, quantize, options: as for `load`.

    Raises:
        FileNotFoundError, ModelError, ValueError: as `load`.

    >>> model, params = abstract({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4})
    >>> params["lm_head"]["kernel"]
    ShapeDtypeStruct(shape=(64, 32000), dtype=float32)
    """
    if isinstance(config, Mapping):
        found: tuple[Any, Any, Family] = (dict(config), "config", _family(config.get("model_type")))
    elif (path := Path(config)).is_file() and not is_gguf(path):
        held = read_json(path, ModelError)
        found = (held, path, _family(held.get("model_type"), f"{path}: "))
    else:
        found = _read_family(path)
    family, model = _build_family(*found, dtype, param_dtype, options)
    shapes = _abstract(family, model)
    leaves = {**shapes, **_planned(shapes, quantize)}
    return model, tree.unflatten({tuple(name.split("/")): leaf for name, leaf in leaves.items()})


def logical_names(model: nn.Module) -> dict[str, Any]:
    """The logical names of the axes of a model's parameters, a tuple for each that has some, for `jpeft.shard`.

    They are `vocab`, `embed`, `heads`, `kv_heads`, `mlp`, `head_dim` and `layers`.

    >>> from jpeft.models.decoder import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig(hidden_size=64, num_attention_heads=4, intermediate_size=96))
    >>> logical_names(model)["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    ('layers', 'embed', 'mlp')
    """
    family = _family(cast(Any, model).config.model_type)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *family.example_inputs(model))["params"]
    boxed = tree.flatten(nn.get_partition_spec(shapes))
    names = {path: tuple(spec) or family.axis_names(path) for path, spec in boxed.items()}
    return tree.unflatten({path: entries for path, entries in names.items() if entries})


def logical_shardings(model: nn.Module, mesh: Mesh, rules: Rules | None = None) -> dict[str, Any]:
    """The shardings of a model's parameters on a mesh, from the logical names of their axes, for `load`.

    Args:
        rules: as for `jpeft.shard`.

    >>> from jpeft.models.decoder import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig(hidden_size=64, num_attention_heads=4, intermediate_size=96))
    >>> mesh = jax.make_mesh((1,), ("tensor",))
    >>> logical_shardings(model, mesh, [("mlp", "tensor")])["model"]["layers"]["mlp"]["up_proj"]["kernel"].spec
    P(None, None, 'tensor')
    """
    family = _family(cast(Any, model).config.model_type)
    shapes = {tuple(name.split("/")): leaf for name, leaf in _abstract(family, model).items()}
    return param_shardings(tree.unflatten(shapes), mesh, rules, names=logical_names(model))


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    params: Mapping[str, Any],
    source: str | os.PathLike[str] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a HuggingFace folder that transformers loads. Inverse of `load`, bit for bit.

    Quantized leaves are written as bitsandbytes does, and transformers loads them, if all are NF4 with blocks along the
    inputs of linear layers (`jpeft.quantize`'s, for inputs that 64 divides); others only jpeft reads.

    Args:
        path: the folder to write; it appears whole or not at all.
        model: as `load` gave it.
        params: its whole tree (merge an adapter first), each leaf written in its own dtype or as it is quantized.
        source: the folder or `.gguf` file the model came from. What it holds beside the model is kept: tokenizer,
            pooling, other fields of its `config.json`, the tensors of poolers and heads.
        extra_files: name → content, written beside the rest.

    Raises:
        FileExistsError: `path` is there and is not an empty folder.
        ModelError: `params` is not the model's tree, or `source` holds another model.

    >>> import tempfile
    >>> from jpeft.models.bert import Bert, BertConfig
    >>> tiny = Bert(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    >>> folder = Path(tempfile.mkdtemp()) / "tiny"
    >>> save(folder, tiny, tiny.init(jax.random.key(0), jnp.array([[101, 102]]))["params"])
    >>> sorted(file.name for file in folder.iterdir())
    ['config.json', 'model.safetensors']
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path}: exists and is not an empty folder")
    family = _family(cast(Any, model).config.model_type)
    leaves, abstract = _leaves(params), _abstract(family, model)
    _check_leaves("params", {name: leaf.shape for name, leaf in abstract.items()},
                  {name: np.shape(leaf) for name, leaf in leaves.items()})  # fmt: skip
    slots = _slots(abstract, stacked_at(model))
    config, tensors, prefix, origins = family.to_config(model), {}, "", {}
    if source is not None:
        config, tensors, prefix, origins = _read_source(Path(source), family, model, slots)
    embeddings = set()
    for slot in slots:
        name, value = prefix + _torch_name(slot.name), _torch_layout(slot, leaves)
        if isinstance(value, Quantized):
            tensors |= quantized.to_tensors(name, value, _is_kernel(slot))
            origins[name] = value.origin
        else:
            tensors[name] = value
        if slot.path.endswith("/embedding"):
            embeddings.add(name)
    if (about := quantized.config_for(tensors, embeddings, _dtype_name(leaves))) is not None:
        config["quantization_config"] = about
    config["dtype" if "dtype" in config else "torch_dtype"] = _dtype_name(leaves)
    with new_folder(path) as new:
        if source is not None:
            _copy_companions(Path(source), new)
        (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_safetensors(new / WEIGHTS, tensors, {"format": "pt", **quantized.metadata(origins)})
        for name, content in (extra_files or {}).items():
            (new / name).write_bytes(content)


def _dtype_name(leaves: Mapping[str, Any]) -> str:
    names = {str(leaf.dtype) for leaf in leaves.values()}
    return names.pop() if len(names) == 1 else "float32"


# --- the config and its family ---


def is_decoder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder or a `.gguf` file holds a language model, from its configuration alone.

    Raises:
        FileNotFoundError, ModelError: as `load`, where there is no such model or its type is not supported.

    >>> is_decoder("all-MiniLM-L6-v2")  # doctest: +SKIP
    False
    """
    return _read_family(Path(path))[2].__name__ == "jpeft.models.decoder_hf"


def _read_family(path: Path) -> tuple[dict[str, Any], Path, Any]:
    """The configuration, the file that it stands in, and the module that builds such models."""
    config = read_config(path)
    where = path if is_gguf(path) else path / CONFIG
    return config, where, _family(config.get("model_type"), f"{where}: ")


def _build(path: Path, dtype: Any, param_dtype: Any, options: Mapping[str, Any]) -> tuple[Family, Any]:
    return _build_family(*_read_family(path), dtype, param_dtype, options)


def _build_family(
    config: Any, where: Any, family: Family, dtype: Any, param_dtype: Any, options: Mapping[str, Any]
) -> tuple[Family, Any]:
    if unknown := sorted(options.keys() - family.OPTIONS):
        raise ModelError(
            f"{config['model_type']} models have no option {', '.join(unknown)}, "
            f"only {', '.join(sorted(family.OPTIONS)) or 'none'}"
        )
    try:
        config = quantized.without_quantization(config, where)
        return family, family.from_config(config, dtype=dtype, param_dtype=param_dtype, **options)
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"{where}: {error}") from None


def _family(model_type: Any, where: str = "") -> Family:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(f"{where}model_type {model_type!r} is not one of {', '.join(FAMILIES)}")
    return cast(Family, importlib.import_module(FAMILIES[model_type]))


# --- leaves and names ---


class _Slot(NamedTuple):
    """Where one tensor goes: a leaf, or one layer of a stacked leaf."""

    name: str  # the leaf's path, with the layer's number where torch has it
    path: str
    layer: int | None
    shape: tuple[int, ...]  # as the model has it


def _slots(abstract: Mapping[str, Any], stacked: str | None) -> list[_Slot]:
    slots = []
    for path, leaf in abstract.items():
        if stacked is None or not path.startswith(f"{stacked}/"):
            slots.append(_Slot(path, path, None, leaf.shape))
            continue
        rest = path.removeprefix(stacked)
        slots += [_Slot(f"{stacked}/{i}{rest}", path, i, leaf.shape[1:]) for i in range(leaf.shape[0])]
    return slots


def _torch_name(path: str) -> str:
    """`…/query/kernel` to `….query.weight`."""
    owner, _, leaf = path.replace("/", ".").rpartition(".")
    return f"{owner}.{_TORCH_LEAF.get(leaf, leaf)}"


def _bare_name(name: str, prefix: str) -> str:
    """A tensor's name without its prefix, and LayerNorm's leaves by their present names."""
    owner, dot, leaf = name.removeprefix(prefix).rpartition(".")
    return owner + dot + _OLD_LEAF.get(leaf, leaf)


def _torch_layout(slot: _Slot, leaves: Mapping[str, Any]) -> np.ndarray | Quantized:
    """A tensor as torch stores it."""
    leaf = leaves[slot.path]
    if slot.layer is not None:
        leaf = jax.tree.map(lambda x: x[slot.layer], leaf)
    return _swapped(slot, jax.tree.map(np.asarray, jax.device_get(leaf)))


def _swapped(slot: _Slot, value: Any) -> Any:
    """From the model's layout to torch's and back: kernels are transposed."""
    if not _is_kernel(slot):
        return value
    return quantized.transposed(value) if isinstance(value, Quantized) else value.T


def _is_kernel(slot: _Slot) -> bool:
    return slot.path.endswith("/kernel")


def _abstract(family: Family, model: nn.Module) -> dict[str, Any]:
    """Shapes and dtypes of the model's leaves, by path."""
    return _leaves(jax.eval_shape(model.init, jax.random.key(0), *family.example_inputs(model))["params"])


def _leaves(params: Mapping[str, Any]) -> dict[str, Any]:
    return {tree.join(path): open_boxes(leaf) for path, leaf in tree.flatten(params).items()}


def _used_prefix(prefix: str, names: Mapping[str, Any]) -> str:
    return prefix if any(name.startswith(prefix) for name in names) else ""


def _match(
    source: Path, family: Family, model: Any, slots: Sequence[_Slot], tensors: Mapping[str, Tensor]
) -> dict[_Slot, str]:
    """The name of each slot's tensor; checked both ways and for shape."""
    prefix, extras = _used_prefix(family.prefix(model), tensors), family.extras(model)
    wanted = {_torch_name(slot.name): slot for slot in slots}
    names, found = {}, {}
    for name, tensor in tensors.items():
        bare = _bare_name(name, prefix)
        if slot := wanted.get(bare):
            names[slot] = name
            found[slot.name] = tensor.shape[::-1] if slot.path.endswith("/kernel") else tensor.shape
        elif name.startswith(prefix) and not extras.fullmatch(bare):  # beside a prefix, everything else is a head
            found[name] = tensor.shape
    _check_leaves(str(source), {slot.name: slot.shape for slot in slots}, found)
    return names


def _check_leaves(where: str, wanted: Mapping[str, tuple], found: Mapping[str, tuple]) -> None:
    if missing := sorted(wanted.keys() - found.keys()):
        raise ModelError(f"{where}: missing {_some(missing)}")
    if extra := sorted(found.keys() - wanted.keys()):
        raise ModelError(f"{where}: not part of the model: {_some(extra)}")
    for path, shape in wanted.items():
        if found[path] != shape:
            raise ModelError(f"{where}: {path} has shape {found[path]}, the model needs {shape}")


def _some(names: list[str], at_most: int = 3) -> str:
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")


# --- placing ---


def _shardings_by_path(shardings: Any, model: nn.Module, abstract: Mapping[str, Any]) -> Mapping[str, Any]:
    if callable(shardings) and not isinstance(shardings, Sharding):
        shardings = shardings(model)
    if shardings is None or isinstance(shardings, Sharding):
        return dict.fromkeys(abstract, shardings)
    by_path = {tree.join(path): leaf for path, leaf in tree.flatten(shardings).items()}
    if by_path.keys() != abstract.keys():
        differ = sorted(by_path.keys() ^ abstract.keys())
        raise ModelError(f"the tree of shardings is not like the parameters: {_some(differ)} in one of them only")
    return by_path


def _planned(abstract: Mapping[str, Any], asked: str | Mapping[str, Any] | None) -> dict[str, Quantized]:
    """What `jpeft.quantize` would make of the leaves that it would quantize, abstract. Its mistakes are told here."""
    if asked is None:
        return {}
    options = {"scheme": asked} if isinstance(asked, str) else asked
    if not isinstance(options, Mapping):
        raise TypeError(f"quantize is a scheme, or a dict of jpeft.quantize's arguments, got {asked!r}")
    planned = quantize(tree.unflatten({tuple(p.split("/")): x for p, x in abstract.items()}), **options)
    return {name: leaf for name, leaf in _leaves(planned).items() if isinstance(leaf, Quantized)}


class _Reader(NamedTuple):
    """How a tensor becomes what the model has: its layout and dtype, quantized if it is or shall be."""

    names: Mapping[_Slot, str]
    tensors: Mapping[str, Tensor]
    dtype: Any
    planned: Mapping[str, Quantized]

    def read(self, slot: _Slot) -> tuple[np.ndarray | Quantized, np.ndarray | None]:
        """The tensor; and, of a quantized one, the checksum that its file tells."""
        tensor = self.tensors[self.names[slot]]
        value: Any = tensor.read()  # quantized for a QuantizedTensor
        if isinstance(value, Quantized):
            if slot.path in self.planned:
                raise ModelError(f"{tensor.path}: {tensor.name} is quantized already, as {value.scheme}")
            value = dataclasses.replace(_swapped(slot, value), dtype=np.dtype(self.dtype))
            return (value, value.origin) if value.origin is not None else (_with_origin(slot, value), None)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ModelError(f"{tensor.path}: {tensor.name} is {value.dtype}; quantized weights are not read here")
        value = _swapped(slot, value).astype(self.dtype, copy=False)
        if (like := self.planned.get(slot.path)) is None:
            return value, None
        try:
            return quantize_part(like, value, _start(slot)), None
        except ValueError as error:
            raise ModelError(f"{tensor.path}: cannot quantize {tensor.name}: it {error}") from None


def _start(slot: _Slot) -> int:
    """The place of a tensor's first element in its leaf."""
    return (slot.layer or 0) * math.prod(slot.shape)


def _with_origin(slot: _Slot, value: Quantized) -> Quantized:
    """With the checksum of what the codes stand for, in a folder that does not tell of what: these are its weights.

    Dequantized outside of jit, an operation at a time: no device may fuse a product with a sum, so all agree.
    """
    weight = np.asarray(jax.tree.map(jnp.asarray, value).unbox())
    return dataclasses.replace(value, origin=fingerprint.sums_of(weight, _start(slot)))


def _place(
    abstract: Mapping[str, Any], slots: Sequence[_Slot], reader: _Reader, shardings: Mapping[str, Any]
) -> dict[str, _Leaf]:
    """Every leaf where it belongs. The largest tensors go first, while there is room for a second copy of them."""
    placed: dict[str, Any] = {}
    told: dict[str, list[np.ndarray | None]] = {}
    sums: dict[str, list[np.ndarray]] = {}
    for slot in sorted(slots, key=lambda slot: -math.prod(slot.shape)):
        (value, origin), sharding = reader.read(slot), shardings[slot.path]
        if isinstance(value, Quantized):
            told.setdefault(slot.path, []).append(origin)
            sums.setdefault(slot.path, []).append(np.asarray(value.origin))
        if slot.layer is None:
            placed[slot.path] = _map(_put, value, _ways(value, sharding))
            continue
        layers = abstract[slot.path].shape[0]
        stacked = jax.tree.map(lambda x, n=layers: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), value)
        ways = _ways(stacked, sharding)
        if slot.path not in placed:
            placed[slot.path] = _map(lambda x, way: _empty(x.shape, x.dtype, way), stacked, ways)
        stack = placed[slot.path]
        if jax.tree.structure(stack) != jax.tree.structure(value):
            raise ModelError(f"{reader.tensors[reader.names[slot]].path}: {slot.path} is not quantized alike in all "
                             f"layers: {DIFFER}")  # fmt: skip
        layer = _map(_put, value, [_of_a_layer(way) for way in ways])
        del value  # not there any more when the next is read
        write = lambda pair, way, i=slot.layer: _into(way)(*pair, i)  # noqa: E731
        parts = zip(jax.tree.leaves(stack), jax.tree.leaves(layer), strict=True)
        written = [write(pair, way) for pair, way in zip(parts, ways, strict=True)]
        placed[slot.path] = jax.block_until_ready(jax.tree.unflatten(jax.tree.structure(stack), written))
        del layer, stack
    for path in told:
        placed[path] = _with_stacks_origin(placed[path], told[path], sums[path], shardings[path])
    return {path: placed[path] for path in abstract}


def _with_stacks_origin(
    leaf: Quantized, told: Sequence[np.ndarray | None], sums: Sequence[np.ndarray], sharding: Any
) -> Quantized:
    """With one checksum for all layers: that of the stack, which is the sum of what each adds to it where all were
    reckoned here."""
    if all(origin is None for origin in told):
        origin = np.sum(sums, axis=0, dtype=np.uint32)
    else:
        origin = origin_of_stack(sums)
    rows = np.broadcast_to(origin, leaf.origin.shape)
    return dataclasses.replace(leaf, origin=_put(rows, _ways(leaf, sharding)[-1]))


def _ways(value: Any, sharding: Any) -> list[Any]:
    """The shardings of a leaf's arrays: of a plain one it is the only one."""
    if isinstance(value, Quantized) and isinstance(sharding, NamedSharding):
        return jax.tree.leaves(shardings_like(value, sharding))
    return [sharding] * len(jax.tree.leaves(value))


def _map(fn: Any, leaf: Any, ways: Sequence[Any]) -> Any:
    """A function of a leaf's arrays and their shardings, over all of them."""
    parts, structure = jax.tree.flatten(leaf)
    return jax.tree.unflatten(structure, [fn(part, way) for part, way in zip(parts, ways, strict=True)])


def _put(value: Any, sharding: Any) -> jax.Array:
    if sharding is None:
        leaf = jax.device_put(value, may_alias=False)  # a copy: a view of the file's own memory would end with it
    else:
        value = np.asarray(value)
        leaf = jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
    return jax.block_until_ready(leaf)  # one at a time: what waits for the device would stay in host memory


def _empty(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.cache
def _into(sharding: Any) -> Any:
    """Writes a layer into a stacked leaf, in place."""
    write = lambda stack, layer, i: jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)  # noqa: E731
    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _of_a_layer(sharding: Any) -> Any:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


# --- writing ---


def _read_source(
    source: Path, family: Family, model: Any, slots: Sequence[_Slot]
) -> tuple[dict[str, Any], dict[str, np.ndarray], str, dict[str, Any]]:
    """The source's config, the tensors it holds beside the model, the prefix of those inside, and the checksums of the
    quantized ones beside."""
    if _build(source, model.dtype, model.param_dtype, {})[1].config != model.config:
        raise ModelError(f"{source}: holds another model than the one to save (their configurations differ)")
    if is_gguf(source):
        return family.to_config(model), {}, "", {}
    with open_tensors(source) as found:
        tensors = quantized.gather(found)
        inside = set(_match(source, family, model, slots, tensors).values())
        kept, origins = {}, {}
        for name, tensor in tensors.items():
            if name in inside:
                continue
            if isinstance(tensor, quantized.QuantizedTensor):
                kept |= {part: found[part].read() for part in tensor.names}
                origins[name] = tensor.origin
            else:
                kept[name] = tensor.read()
        config = quantized.without_quantization(read_config(source), source / CONFIG)
        return config, kept, _used_prefix(family.prefix(model), tensors), origins


def _copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer and other small files, and the numbered module folders of sentence-transformers (`1_Pooling`)."""
    if is_gguf(source):
        from jpeft.models import gguf

        return gguf.write_tokenizer(source, folder)
    for path in sorted(source.iterdir()):
        if path.is_dir() and re.match(r"\d+_", path.name):
            shutil.copytree(path, folder / path.name)
        elif path.is_file() and not _NOT_COPIED.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)
