"""``adapter_model.safetensors`` of a HuggingFace PEFT folder, sorted by torch module."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.interchange import HFSpec, form
from jpeft.core.tree import nearest
from jpeft.errors import AdapterError
from jpeft.files import read_safetensors
from jpeft.hf.config import PICKLE, TENSORS, Config, named
from jpeft.hf.names import PLAIN_ROOT, ROOT

Modules = dict[str, dict[str, np.ndarray]]  # tensors by torch module, then by name within it


@dataclass(frozen=True)
class TensorFile:
    """The tensors of a folder.

    Attributes:
      path: of the file.
      adapted: the method's tensors, e.g. ``{"….query": {"lora_A.weight": …}}``.
      others: all others, e.g. ``{"classifier": {"weight": …}, "….query": {"base_layer.bias": …}}``.
      shared: the method's tensors that all modules share, by whole name.
      beside: those of the methods that stand beside it, e.g. ``{"….embed_tokens": {"token_adapter.….delta": …}}``.
    """

    path: Path
    adapted: Modules
    others: Modules
    shared: dict[str, np.ndarray]
    beside: Modules = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, config: Config, ignore: Sequence[str] = ()) -> TensorFile:
        """Reads and sorts the tensors, without those of modules to ``ignore``.

        Raises:
          AdapterError: no file, a pickle, a truncated file, a name that PEFT does not write, an entry of ``ignore``
            that names nothing, or no tensor of the method.
        """
        path, spec = folder / TENSORS, config.spec
        if not path.is_file() and (folder / PICKLE).is_file():
            raise AdapterError(
                f"{folder} has only {PICKLE}, a pickle, which may run code when opened and is refused; save it in "
                "PEFT with save_pretrained(folder, safe_serialization=True)"
            )
        tensors = _without_adapter_name(path, read_safetensors(path), spec)
        if spec.prompt:
            own = {tensor.key: tensors.pop(tensor.key) for tensor in spec.tensors if tensor.key in tensors}
            tensors = {ROOT + key.removeprefix(PLAIN_ROOT): x for key, x in _with_root(path, tensors, PLAIN_ROOT)}
        if spec.unpack:
            try:
                tensors = dict(spec.unpack(tensors, config.own))
            except ValueError as error:
                raise AdapterError(f"{path}: {error}") from error
        adapted, others, beside = defaultdict(dict), defaultdict(dict), defaultdict(dict)
        shared = own if spec.prompt else {t.key: tensors.pop(t.key) for t in spec.shared if t.key in tensors}
        copies = {t.key.rpartition(".")[2]: t.key for t in spec.shared if t.copied}
        suffixes, ignored = set(spec.keys), set()
        for key, x in _with_root(path, tensors, ROOT):
            # With bias="all", PEFT writes the biases of modules_to_save three times.
            plain = key.replace(".original_module.", ".").replace(".modules_to_save.", ".")
            if plain != key and plain in tensors:
                continue
            if original := copies.get(key.rpartition(".")[2]):
                if original in shared and not np.array_equal(x, shared[original]):
                    raise AdapterError(f"{path}: {key!r} differs from {original!r}, of which it must be a copy")
                continue
            name = key.removeprefix(ROOT)
            module, suffix = _split_beside(name, config) or _split(name, spec.keys, _prefixes(spec))
            if named(ignore, module):
                ignored.add(module)
            else:
                kind = adapted if suffix in suffixes else beside if _split_beside(key, config) else others
                kind[module][suffix] = x
        file = cls(path, dict(adapted), dict(others), shared, dict(beside))
        for entry in ignore:
            if not any(named([entry], module) for module in ignored):
                raise AdapterError(f"{path} has no module {entry!r} to ignore{nearest(entry, file.modules)}")
        if not file.adapted and not (spec.prompt and shared):
            name = config.method.__name__
            raise AdapterError(
                f"{path} holds no {name}: none of its {len(tensors)} tensors is a {' or '.join(sorted(suffixes))}"
            )
        return file

    @property
    def modules(self) -> set[str]:
        """The torch modules that have tensors."""
        return {*self.adapted, *self.others, *self.beside}

    @property
    def dtype(self) -> str:
        """The dtype of the method's leaves: the file's, if it has one and that is a usual one."""
        return _common_dtype(x for own in (self.adapted or {"": self.shared}).values() for x in own.values())

    @property
    def dtype_beside(self) -> str:
        """The same of the methods that stand beside it."""
        return _common_dtype(x for own in self.beside.values() for x in own.values())

    def take(self, module: str, suffix: str, shape: tuple[int, ...], why: str, *, floating: bool = True) -> np.ndarray:
        """A tensor that must be there, in this shape. ``why`` says what needs it."""
        name = f"{ROOT}{module}.{suffix}"
        kinds = (self.beside, self.adapted, self.others)
        x = next((kind[module][suffix] for kind in kinds if suffix in kind.get(module, {})), None)
        return self._checked(name, x, shape, why, floating)

    def take_shared(self, key: str, shape: tuple[int, ...], why: str) -> np.ndarray:
        """A shared tensor that must be there, in this shape."""
        return self._checked(key, self.shared.get(key), shape, why, True)

    def _checked(self, name: str, x: np.ndarray | None, shape: tuple[int, ...], why: str, floating: bool) -> np.ndarray:
        if x is None:
            raise AdapterError(f"{self.path} lacks {name!r}, {why}")
        if not floating and x.dtype == np.float32 and (x == x.round()).all():
            x = x.astype(np.int32)  # on Windows, PEFT writes integers as floats
        if jnp.issubdtype(x.dtype, jnp.floating) != floating:
            expected = "floating numbers" if floating else "integers"
            raise AdapterError(f"{self.path}: {name!r} is {x.dtype.name}, expected {expected}")
        if x.shape != shape:
            raise AdapterError(f"{self.path}: {name!r} has shape {list(x.shape)}, expected {list(shape)}")
        return x


def _common_dtype(every: Iterable[np.ndarray]) -> str:
    found = {x.dtype.name for x in every if jnp.issubdtype(x.dtype, jnp.floating)}
    usual = {"float32", "bfloat16", "float16", jax.dtypes.canonicalize_dtype("float64").name}
    return found.pop() if len(found) == 1 and found <= usual else "float32"


def _with_root(path: Path, tensors: Mapping[str, np.ndarray], root: str) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors with their names, which must begin with the root."""
    for key, x in tensors.items():
        if not key.startswith(root):
            raise AdapterError(f"{path} has {key!r}; expected names that start with {root!r}")
        yield key, x


def _without_adapter_name(path: Path, tensors: dict[str, np.ndarray], spec: HFSpec) -> dict[str, np.ndarray]:
    """The tensors under the names that PEFT writes: without the adapter's, which torch has in a model's state.

    ``lora_A.default.weight`` is ``lora_A.weight`` of the adapter "default".

    Raises:
      AdapterError: tensors of several adapters.
    """
    names: dict[str, str] = {}  # and the first tensor of each
    for key in tensors:
        if (own := _adapter_name(key, spec)) is not None:
            names.setdefault(own, key)
    if len(names) > 1:
        first, second = sorted(names.values())[:2]
        raise AdapterError(f"{path} holds several adapters: it has {first!r} and {second!r}; save each in its own file")
    name = next(iter(names), "")
    if not name:
        return tensors
    heads = "|".join(re.escape(prefix) + "[^.]*" for prefix in _prefixes(spec))
    own = re.escape(name)
    pattern = re.compile(rf"(\.(?:{heads}))\.{own}(?=\.|$)|\.modules_to_save\.{own}(?=\.)")
    plain = {pattern.sub(r"\1", key, count=1): x for key, x in tensors.items()}
    if len(plain) < len(tensors):
        raise AdapterError(f"{path} holds tensors both with and without the name of its adapter, {name!r}")
    return plain


def _adapter_name(key: str, spec: HFSpec) -> str | None:
    """The adapter's name in a tensor's; empty if there is none, None if the tensor is not one of the method's."""
    if any(key.endswith(f".{name}") for name in spec.keys):
        return ""
    for name in spec.keys:
        head, dot, rest = name.partition(".")
        if found := re.search(rf"\.{re.escape(head)}\.([^.]+){re.escape(dot + rest)}$", key):
            return None if found[1] in ("weight", "bias") else found[1]
    return None


def _prefixes(spec: HFSpec) -> tuple[str, ...]:
    """The beginnings of a method's tensor names, e.g. ``("lora_",)``: also those of tensors it does not know."""
    copies = {spec.copies.rstrip(".")} - {""}  # in full, since a norm may be called "ln_1"
    return tuple(sorted({tensor.key.partition("_")[0] + "_" for tensor in spec.tensors} | copies))


def _split_beside(name: str, config: Config) -> tuple[str, str] | None:
    """A name as module and tensor, if it is a tensor of a method that stands beside the folder's own."""
    for method in config.beside:
        other = form(method)
        assert isinstance(other, HFSpec)
        for key in (other.wrapper + tensor.key for tensor in other.tensors):
            if name.endswith(f".{key}"):
                return name.removesuffix(f".{key}"), key
    return None


def _split(name: str, keys: Sequence[str], prefixes: tuple[str, ...]) -> tuple[str, str]:
    """A name as module and tensor: split before one of the method's, ``base_layer`` or the last part.

    >>> _split("a.lora_b.lora_A.weight", ("lora_A.weight",), ("lora_",))
    ('a.lora_b', 'lora_A.weight')
    >>> _split("experts.base_layer.lora_A.weight", ("lora_A.weight",), ("lora_",))
    ('experts', 'base_layer.lora_A.weight')
    """
    for key in keys:
        if name.endswith(f".{key}"):
            module = name.removesuffix(f".{key}")
            while module.endswith(".base_layer"):  # PEFT wraps a module once for each of its parameters
                module = module.removesuffix(".base_layer")
            return module, name.removeprefix(f"{module}.")
    parts = name.split(".")
    starts = (i for i, p in enumerate(parts) if i and (p == "base_layer" or p.startswith(prefixes)))
    inner = next(starts, len(parts) - 1)
    return ".".join(parts[:inner]), ".".join(parts[inner:])
