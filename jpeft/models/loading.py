"""HuggingFace model folders to Linen modules with their parameter trees, and back.

A leaf's path is its torch name with `/` for `.` and Flax's leaf name: `…/query/kernel` is `….query.weight`
transposed, `…/LayerNorm/scale` is `….LayerNorm.weight`, `…/word_embeddings/embedding` is
`….word_embeddings.weight`. Which leaves there are follows from the module itself, so a new family is one file and one
line of `FAMILIES`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from jpeft import tree
from jpeft.io import write_safetensors

#: `model_type` of a `config.json` → the module that builds it (see `Family`), imported when asked for.
FAMILIES: dict[str, str] = {
    "bert": "jpeft.models.bert",
    "roberta": "jpeft.models.bert",
    "xlm-roberta": "jpeft.models.bert",
    "camembert": "jpeft.models.bert",
    "electra": "jpeft.models.bert",
    "distilbert": "jpeft.models.bert",
}

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TORCH_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_OLD_LEAF = {"gamma": "weight", "beta": "bias"}  # LayerNorm's, in checkpoints converted from TensorFlow
# What `save` does not copy from the source: it writes its own config and weights, and other weights would be stale.
_NOT_COPIED = re.compile(
    r"\..*|config\.json|.*\.(index\.json|safetensors|bin|pt|pth|ckpt|h5|msgpack|ot|onnx|gguf|tflite)"
)


class ModelError(ValueError):
    """A model folder or tree that cannot be used; the message is one line that names what is wrong."""


class Family(Protocol):
    """What a module of `FAMILIES` defines. Its Linen modules have a `config` with a `model_type`."""

    EXTRAS: re.Pattern[str]
    """Matches the tensors that may stand beside the model (heads, buffers), named without the prefix."""

    def from_config(self, config: Mapping[str, Any], *, dtype: Any, param_dtype: Any) -> nn.Module:
        """The module that a `config.json` describes; a ValueError names a field that it cannot follow."""
        ...

    def to_config(self, model: Any) -> dict[str, Any]:
        """Inverse of `from_config`."""
        ...

    def prefix(self, model: Any) -> str:
        """What stands before the model's tensor names in a checkpoint that also holds a head."""
        ...

    def example_inputs(self, model: Any) -> tuple[Any, ...]:
        """The smallest inputs that the model takes, abstract."""
        ...


def load(
    folder: str | os.PathLike[str], *, dtype: Any = None, param_dtype: Any = jnp.float32
) -> tuple[nn.Module, dict[str, Any]]:
    """Reads a HuggingFace folder: `config.json` and safetensors, sharded or not.

    Args:
        folder: the path. Nothing is downloaded, and no pickle is opened.
        dtype: what the model computes in; None follows the parameters.
        param_dtype: what the parameters are held in, whatever the file's (float32, bfloat16, float16).

    Returns:
        `(model, params)`, for `model.apply({"params": params}, input_ids, attention_mask=mask)`.

    Raises:
        FileNotFoundError: there is no such folder, or no `config.json`, weights or shard in it.
        ModelError: a model type or a config field that is not supported, a file that cannot be read, or tensors that
            are missing, unexpected or misshapen; it names them.

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
    folder = Path(folder)
    family, model = _build(folder, dtype, param_dtype)
    with _open_tensors(folder) as tensors:
        layers = getattr(getattr(model, "config", None), "num_hidden_layers", 0)
        if layers > len(tensors):  # before so many are traced
            raise ModelError(f"{folder}: config.json says {layers:,} layers, but there are {len(tensors)} tensors")
        shapes = _leaf_shapes(family, model)
        names = _match(folder, family.EXTRAS, family.prefix(model), shapes, tensors)
        leaves = {path: jnp.asarray(_read_leaf(path, tensors[name]), param_dtype) for path, name in names.items()}
    return model, tree.unflatten({tuple(path.split("/")): leaf for path, leaf in leaves.items()})


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    params: Mapping[str, Any],
    source: str | os.PathLike[str] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a HuggingFace folder that transformers loads. Inverse of `load`, bit for bit.

    Args:
        path: the folder to write; it appears whole or not at all.
        model: as `load` gave it.
        params: its whole tree (merge an adapter first), each leaf written in its own dtype.
        source: the folder the model came from. What it holds beside the model is kept: tokenizer, pooling, other
            fields of its `config.json`, the tensors of poolers and heads.
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
    leaves = _leaves(params)
    shapes = _leaf_shapes(family, model)
    _check_leaves("params", shapes, {name: np.shape(leaf) for name, leaf in leaves.items()})
    config, kept, prefix = family.to_config(model), {}, ""
    if source is not None:
        config, kept, prefix = _read_source(Path(source), family, model, shapes)
    tensors = kept | {prefix + _torch_name(name): _torch_layout(name, leaf) for name, leaf in leaves.items()}
    config["dtype" if "dtype" in config else "torch_dtype"] = _dtype_name(leaves)
    with _new_folder(path) as new:
        if source is not None:
            _copy_companions(Path(source), new)
        (new / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_safetensors(new / _WEIGHTS, tensors, {"format": "pt"})
        for name, content in (extra_files or {}).items():
            (new / name).write_bytes(content)


def _dtype_name(leaves: Mapping[str, Any]) -> str:
    names = {str(leaf.dtype) for leaf in leaves.values()}
    return names.pop() if len(names) == 1 else "float32"


# --- the config and its family ---


def _build(folder: Path, dtype: Any, param_dtype: Any) -> tuple[Family, Any]:
    config = _read_config(folder)
    family = _family(config.get("model_type"), f"{folder / _CONFIG}: ")
    try:
        return family, family.from_config(config, dtype=dtype, param_dtype=param_dtype)
    except ValueError as error:
        raise ModelError(f"{folder / _CONFIG}: {error}") from None


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: no {_CONFIG} (is this a HuggingFace model folder?)")
    return _read_json(folder / _CONFIG)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # json's and UTF-8's errors alike
        raise ModelError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value


def _family(model_type: Any, where: str = "") -> Family:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(f"{where}model_type {model_type!r} is not one of {', '.join(FAMILIES)}")
    return cast(Family, importlib.import_module(FAMILIES[model_type]))


# --- tensor files ---


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor in an open safetensors file: its shape costs nothing, its bytes are read when asked for."""

    path: Path
    name: str
    file: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    def read(self) -> np.ndarray:
        return self.file.get_tensor(self.name)


@contextlib.contextmanager
def _open_tensors(folder: Path) -> Iterator[dict[str, _Tensor]]:
    """The folder's tensors by name, readable inside the `with`."""
    import safetensors

    with contextlib.ExitStack() as stack:
        tensors = {}
        for path in _weight_files(folder):
            try:
                file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
            except (safetensors.SafetensorError, OSError) as error:
                raise ModelError(f"{path}: not a whole safetensors file ({error})") from None
            tensors |= {name: _Tensor(path, name, file) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        yield tensors


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        return _shards(folder)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder}: only {pickles[0]}, a pickle, which may run code when opened and is refused; if you trust it, "
            "convert it with transformers.AutoModel.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise FileNotFoundError(f"{folder}: no weights (neither {_WEIGHTS} nor {_INDEX})")


def _shards(folder: Path) -> list[Path]:
    weight_map = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / _INDEX}: no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:  # an index may not point out of its folder
            raise ModelError(f"{folder / _INDEX}: {name!r} is not a file name")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name}, which {_INDEX} lists")
    return [folder / name for name in names]


# --- leaves and names ---


def _torch_name(path: str) -> str:
    """`…/query/kernel` to `….query.weight`."""
    owner, _, leaf = path.replace("/", ".").rpartition(".")
    return f"{owner}.{_TORCH_LEAF.get(leaf, leaf)}"


def _bare_name(name: str, prefix: str) -> str:
    """A tensor's name without its prefix, and LayerNorm's leaves by their present names."""
    owner, dot, leaf = name.removeprefix(prefix).rpartition(".")
    return owner + dot + _OLD_LEAF.get(leaf, leaf)


def _torch_layout(path: str, leaf: Any) -> np.ndarray:
    """A leaf as torch stores it."""
    value = np.asarray(jax.device_get(leaf))
    return value.T if path.endswith("/kernel") else value


def _read_leaf(path: str, tensor: _Tensor) -> np.ndarray:
    """Inverse of `_torch_layout`."""
    value = tensor.read()
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ModelError(f"{tensor.path}: {tensor.name} is {value.dtype}; quantised weights are not read here")
    return value.T if path.endswith("/kernel") else value


def _leaf_shapes(family: Family, model: nn.Module) -> dict[str, tuple[int, ...]]:
    variables = jax.eval_shape(model.init, jax.random.key(0), *family.example_inputs(model))
    return {path: leaf.shape for path, leaf in _leaves(variables["params"]).items()}


def _leaves(params: Mapping[str, Any]) -> dict[str, Any]:
    return {tree.join(path): leaf for path, leaf in tree.flatten(meta.unbox(params)).items()}


def _used_prefix(prefix: str, names: Mapping[str, Any]) -> str:
    return prefix if any(name.startswith(prefix) for name in names) else ""


def _match(
    folder: Path,
    extras: re.Pattern[str],
    prefix: str,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, _Tensor],
) -> dict[str, str]:
    """Each leaf's path → its tensor's name; checked both ways and for shape."""
    prefix = _used_prefix(prefix, tensors)
    paths = {_torch_name(path): path for path in shapes}
    names, found = {}, {}
    for name, tensor in tensors.items():
        bare = _bare_name(name, prefix)
        if path := paths.get(bare):
            names[path] = name
            found[path] = tensor.shape[::-1] if path.endswith("/kernel") else tensor.shape
        elif name.startswith(prefix) and not extras.fullmatch(bare):  # beside a prefix, everything else is a head
            found[name] = tensor.shape
    _check_leaves(str(folder), shapes, found)
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


# --- writing ---


def _read_source(
    source: Path, family: Family, model: Any, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Any], dict[str, np.ndarray], str]:
    """The source's config, the tensors it holds beside the model, and the prefix of those inside."""
    if _build(source, model.dtype, model.param_dtype)[1].config != model.config:
        raise ModelError(f"{source}: holds another model than the one to save (their configurations differ)")
    with _open_tensors(source) as tensors:
        inside = set(_match(source, family.EXTRAS, family.prefix(model), shapes, tensors).values())
        kept = {name: tensor.read() for name, tensor in tensors.items() if name not in inside}
        return _read_config(source), kept, _used_prefix(family.prefix(model), tensors)


def _copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer and other small files, and the numbered module folders of sentence-transformers (`1_Pooling`)."""
    for path in sorted(source.iterdir()):
        if path.is_dir() and re.match(r"\d+_", path.name):
            shutil.copytree(path, folder / path.name)
        elif path.is_file() and not _NOT_COPIED.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder that is filled inside the `with` and then takes its name in one step, or is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    new.mkdir()
    try:
        yield new
        new.rename(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
