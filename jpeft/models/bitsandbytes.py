"""Quantized tensors in a model's files, in the form of bitsandbytes and transformers or in jpeft's own.

A linear layer's NF4 weight is `X.weight`, two codes per byte in torch's order `[out, in]`; `X.weight.absmax`, its
scales; `X.weight.quant_map`, the codebook; and `X.weight.quant_state.bitsandbytes__nf4`, everything else as the bytes
of a JSON object. Double quantization adds `X.weight.nested_absmax` and `X.weight.nested_quant_map`. Where bitsandbytes
has no form (other schemes, embeddings, blocks along the outputs) codes and scales keep their axes, and the state is
named `X.weight.quant_state.jpeft__<scheme>`.

The checksums of the original weights are in the file's metadata, because bitsandbytes rejects a state with a key that
it does not know.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import jax.numpy as jnp
import numpy as np

from jpeft.core import fingerprint
from jpeft.core.quantized import Quantized
from jpeft.core.schemes import GROUP, NF4, SCALE_CODES, SCHEMES
from jpeft.core.sites import HEAD_NAMES
from jpeft.errors import ModelError
from jpeft.models.folder import Tensor

_METADATA = "jpeft.origin"  # key of a safetensors file's metadata: JSON, tensor name → checksum in hexadecimal
_SUPPORTED = "bitsandbytes' 4-bit NF4 and jpeft's own"
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # the block sizes of bitsandbytes
_DTYPES = ("float32", "bfloat16", "float16")
_PART = re.compile(r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)")
_STATE = re.compile(r"quant_state\.(\w+?)__(\w+)")
_INT8 = ".SCB"  # the scales of LLM.int8()
# Linear layers that transformers' model may have beside those in the file. transformers would take them for quantized.
_HEADS = HEAD_NAMES | {"pooler"}


def transposed(weight: Quantized) -> Quantized:
    """A quantized matrix with its axes swapped, from a kernel's `[in, out]` to torch's `[out, in]` or back.

    The scales are grouped in the same order in both.

    >>> from jpeft.quantization import quantize_array
    >>> q = quantize_array(np.ones((64, 2), np.float32))
    >>> transposed(q).shape, transposed(q).axis, transposed(transposed(q)).codes.shape
    ((2, 64), -1, (32, 2))
    """
    return dataclasses.replace(weight, codes=weight.codes.T, scales=weight.scales.T, axis=-3 - weight.axis)


# --- the configuration ----------------------------------------------------------------------------------------------


def without_quantization(config: Mapping[str, Any], where: Path | str) -> dict[str, Any]:
    """A `config.json` without its `quantization_config`.

    Raises:
        ModelError: the form of quantization is not supported.
    """
    text = config.get("text_config")
    for fields in (config, text if isinstance(text, Mapping) else {}):
        if quantization := fields.get("quantization_config"):
            _check_config(quantization, where)
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    if isinstance(text, Mapping):
        plain["text_config"] = {name: value for name, value in text.items() if name != "quantization_config"}
    return plain


def _check_config(config: Any, where: Path | str) -> None:
    if not isinstance(config, Mapping):
        raise ModelError(f"{where}: quantization_config is not an object")
    is_8bit = bool(config.get("load_in_8bit", config.get("_load_in_8bit")))
    is_4bit = bool(config.get("load_in_4bit", config.get("_load_in_4bit")))
    method = config.get("quant_method", "bitsandbytes" if is_8bit or is_4bit else None)  # older files lack it
    if method == "jpeft":
        return
    kind = config.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default
    if method == "bitsandbytes" and is_4bit and kind == "nf4":
        return
    if method == "bitsandbytes":
        method = "bitsandbytes LLM.int8()" if is_8bit else f"bitsandbytes {kind}"
    raise ModelError(
        f"{where}: its weights are quantized (quantization_config: {method}), which is not supported, only "
        f"{_SUPPORTED}; load the original"
    )


def quantization_config(
    tensors: Mapping[str, np.ndarray], embeddings: Collection[str], dtype: str
) -> dict[str, Any] | None:
    """The `quantization_config` of transformers for the tensors of a file; None if none is quantized.

    Args:
        tensors: the tensors to write.
        embeddings: the names of those that do not belong to a linear layer.
        dtype: the dtype of computation.
    """
    states = {parts[1]: parts[2] for parts in map(_PART.fullmatch, tensors) if parts and _STATE.fullmatch(parts[2])}
    if not states:
        return None
    nested = {f"{name}.nested_absmax" in tensors for name in states}
    if set(states.values()) != {"quant_state.bitsandbytes__nf4"} or len(nested) > 1:  # one form for a whole folder
        return {"quant_method": "jpeft"}
    matrices = {name for name, value in tensors.items() if name.endswith(".weight") and value.ndim == 2}
    plain = {name.removesuffix(".weight") for name in matrices - states.keys() - set(embeddings)}
    quantized = {name.removesuffix(".weight") for name in states}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested.pop(),
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted((plain | _HEADS) - quantized),
    }


# --- writing --------------------------------------------------------------------------------------------------------


def to_tensors(name: str, weight: Quantized, is_linear: bool) -> dict[str, np.ndarray]:
    """The tensors of a file for a quantized matrix in torch's layout. Inverse of `QuantizedTensor.read`.

    The checksum is not among them; it goes into the `metadata`.
    """
    codes, scales = np.asarray(weight.codes), np.asarray(weight.scales)
    state: dict[str, Any] = {
        "quant_type": weight.scheme,
        "blocksize": weight.block,
        "dtype": str(weight.dtype),
        "shape": list(weight.shape),
    }
    out = {}
    if weight.groups is not None:
        assert weight.offset is not None
        out = {f"{name}.nested_absmax": np.asarray(weight.groups), f"{name}.nested_quant_map": SCALE_CODES}
        offset = float(np.asarray(weight.offset))
        state |= {"nested_blocksize": GROUP, "nested_dtype": "float32", "nested_offset": offset}
    if weight.scheme == "nf4" and is_linear and weight.axis == -1 and weight.block in _BLOCKS:
        form, codes, scales = "bitsandbytes", codes.reshape(-1, 1), scales.reshape(-1)
        out[f"{name}.quant_map"] = np.asarray(NF4, np.float32)
    else:
        form, state["axis"] = "jpeft", weight.axis
    packed = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return out | {name: codes, f"{name}.absmax": scales, f"{name}.quant_state.{form}__{weight.scheme}": packed}


def metadata(origins: Mapping[str, Any]) -> dict[str, str]:
    """The file metadata with the checksums of quantized tensors. Inverse of `read_metadata`."""
    lines = {name: fingerprint.in_hex(origin) for name, origin in origins.items() if origin is not None}
    return {_METADATA: json.dumps(lines)} if lines else {}


# --- reading --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A quantized matrix in a file: a `Tensor` whose `read` returns a `Quantized` in torch's layout, on the host.

    Attributes:
        path: the file that holds the codes.
        name: the weight's name.
        shape: the weight's shape in torch's order.
        parts: the tensors that it consists of, by the rest of their name; "" is the codes.
        scheme: a key of `SCHEMES`.
        state: the checked `quant_state`.
        origin: the checksum of the original weight; None if the file does not hold it.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
    scheme: str
    state: Mapping[str, Any]
    origin: np.ndarray | None

    @property
    def part_names(self) -> Iterable[str]:
        """The names of the tensors that it consists of."""
        return [part.name for part in self.parts.values()]

    @property
    def dtype(self) -> str:
        return self.state["dtype"]

    @property
    def axis(self) -> int:
        return self.state.get("axis", -1)

    @property
    def block(self) -> int:
        return self.state["blocksize"]

    def read(self) -> Quantized:
        scales_shape = _divided(self.shape, self.axis, self.block)
        nested = "nested_absmax" in self.parts
        scales = self._read("absmax", np.uint8 if nested else np.float32).reshape(scales_shape)
        groups = self._read("nested_absmax", np.float32).reshape(-1) if nested else None
        if not np.isfinite(scales if groups is None else groups).all():
            raise self._error(f"its {'absmax' if groups is None else 'nested_absmax'} holds NaN or infinity")
        for part, table in (("quant_map", NF4), ("nested_quant_map", SCALE_CODES)):
            if part in self.parts and not np.allclose(self._read(part, np.float32), table, rtol=1e-5, atol=1e-8):
                raise self._error(f"its {part} is not {'NF4' if table is NF4 else 'bitsandbytes'}'s")
        return Quantized(
            codes=self._codes(),
            scales=scales,
            groups=groups,
            offset=np.float32(self.state["nested_offset"]) if nested else None,
            origin=self.origin,
            scheme=self.scheme,
            block=self.block,
            axis=self.axis,
            dtype=jnp.dtype(self.state["dtype"]),
        )

    def _codes(self) -> np.ndarray:
        bits = SCHEMES[self.scheme].bits
        shape = _divided(self.shape, self.axis, 8 // bits)
        raw = self.parts[""].read()
        # bitsandbytes can store its bytes as any dtype (`bnb_4bit_quant_storage`).
        codes = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
        if codes.size != math.prod(shape):
            raise self._error(f"it has {codes.size:,} bytes of codes, expected {math.prod(shape):,}")
        return codes.view(np.int8 if self.scheme == "int8" else np.uint8).reshape(shape)

    def _read(self, part: str, dtype: Any) -> np.ndarray:
        value = self.parts[part].read()
        if value.dtype != dtype:
            raise self._error(f"its {part} is {value.dtype}, expected {np.dtype(dtype)}")
        return value

    def _error(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: {self.name}: {what}")


def combine_parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model's files, with the parts of each quantized one combined. Codes are not read yet.

    Raises:
        ModelError: parts are missing or inconsistent, or the form is not supported; it names the tensor.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    out = {}
    for name, tensor in tensors.items():
        if found := _PART.fullmatch(name):
            parts.setdefault(found[1], {})[found[2]] = tensor
        elif name.endswith(_INT8):
            raise ModelError(
                f"{tensor.path}: {name} is of bitsandbytes LLM.int8(), which is not supported, only {_SUPPORTED}"
            )
        else:
            out[name] = tensor
    origins: dict[Path, dict[str, np.ndarray]] = {}
    for name, own in parts.items():
        if name in out:
            own[""] = codes = out[name]
            if codes.path not in origins:
                origins[codes.path] = read_metadata(getattr(codes, "metadata", {}), codes.path)
        tensor = _combine(name, own)
        out[name] = dataclasses.replace(tensor, origin=origins[tensor.path].get(name))
    return out


def _combine(name: str, parts: dict[str, Tensor]) -> QuantizedTensor:
    where = f"{next(iter(parts.values())).path}: {name}"
    states = {part: found for part in parts if (found := _STATE.fullmatch(part))}
    if len(states) != 1:
        raise ModelError(f"{where}: it is quantized, but has {len(states) or 'no'} quant_state")
    ((key, found),) = states.items()
    form, scheme = found[1], found[2]
    if form not in ("bitsandbytes", "jpeft") or scheme not in SCHEMES or (form == "bitsandbytes" and scheme != "nf4"):
        raise ModelError(f"{where}: it is quantized as {form} {scheme}, which is not supported, only {_SUPPORTED}")
    maps = {"quant_map"} if form == "bitsandbytes" else set()
    nested = {"nested_absmax", "nested_quant_map"}
    needed = {"", "absmax"} | maps | (nested if nested & parts.keys() else set())
    if missing := sorted(needed - parts.keys()):
        raise ModelError(f"{where}: it is quantized, but {f'{name}.{missing[0]}'.rstrip('.')} is missing")
    state = _read_state(parts[key], where)
    if problem := _state_problem(state, form, scheme, bool(nested & parts.keys())):
        raise ModelError(f"{where}: its quant_state {problem}")
    shape = tuple(state["shape"])
    scales = math.prod(_divided(shape, state.get("axis", -1), state["blocksize"]))
    sizes = {
        "absmax": scales,
        "nested_absmax": -(-scales // GROUP),
        "quant_map": len(NF4),
        "nested_quant_map": len(SCALE_CODES),
    }
    for part, size in sizes.items():
        if part in parts and (got := math.prod(parts[part].shape)) != size:
            raise ModelError(f"{where}: its {part} has {got:,} numbers, a weight of shape {shape} needs {size:,}")
    return QuantizedTensor(parts[""].path, name, shape, parts, scheme, state, None)


def _read_state(tensor: Tensor, where: str) -> dict[str, Any]:
    try:
        state = json.loads(tensor.read().tobytes())
    except (ValueError, RecursionError) as error:  # malformed JSON or UTF-8, or nested too deeply
        raise ModelError(f"{where}: its quant_state is not JSON ({error})") from None
    if not isinstance(state, dict):
        raise ModelError(f"{where}: its quant_state is not a JSON object")
    return state


def _state_problem(state: Mapping[str, Any], form: str, scheme: str, nested: bool) -> str | None:
    """The first invalid entry of a state, as the end of an error message; None if it is valid."""

    def is_count(value: Any) -> TypeGuard[int]:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    shape, block, axis = state.get("shape"), state.get("blocksize"), state.get("axis", -1)
    offset = state.get("nested_offset")
    if state.get("quant_type") != scheme:
        return f"has quant_type {state.get('quant_type')!r}, but its name has {scheme!r}"
    if not isinstance(shape, list) or len(shape) != 2 or not all(map(is_count, shape)):
        return f"has shape {shape!r}, expected two sizes"
    if not is_count(block) or block % 2:
        return f"has blocksize {block!r}"
    if axis not in ((-1, -2) if form == "jpeft" else (-1,)) or isinstance(axis, bool):
        return f"has axis {axis!r}"
    if state.get("dtype") not in _DTYPES:
        return f"has dtype {state.get('dtype')!r}, expected {', '.join(_DTYPES)}"
    if shape[-1 if axis == -1 else -2] % block:
        return f"has blocks of {block} that do not divide its rows of {shape[axis]}"
    if nested != (offset is not None):
        return f"has {'no' if nested else 'a'} nested_offset, but nested_absmax is {'present' if nested else 'missing'}"
    if nested and (isinstance(offset, bool) or not isinstance(offset, (int, float)) or not math.isfinite(offset)):
        return f"has nested_offset {offset!r}"
    if nested and state.get("nested_blocksize") != GROUP:
        return f"has nested_blocksize {state.get('nested_blocksize')!r}, only {GROUP} is supported"
    return None


def _divided(shape: tuple[int, ...], axis: int, by: int) -> tuple[int, ...]:
    """The shape with one axis divided by a number."""
    divided = list(shape)
    divided[axis] //= by
    return tuple(divided)


def read_metadata(metadata: Mapping[str, str], path: Path) -> dict[str, np.ndarray]:
    """The checksums in a file's metadata, by tensor name. Inverse of `metadata`."""
    try:
        lines = json.loads(metadata.get(_METADATA, "{}"))
        return {name: fingerprint.from_hex(digits) for name, digits in lines.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{path}: the metadata entry {_METADATA} is damaged ({error})") from None
