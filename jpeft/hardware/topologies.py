"""Chips and topologies. The numbers of the chips and their sources are in `chips.json`.

    topology = parse("v5p-32")  # its name: v5p:2x2x4
    devices = describe(topology)  # needs libtpu, but no TPU

The numbers of a `Chip` are per JAX device, except `ici_bandwidth` and the price, which are per chip: v2, v3 and TPU7x
have two devices per chip, v4 and v5p have one device for their two cores.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import sys
from collections.abc import Mapping
from importlib import metadata, resources
from typing import Any

from jpeft.errors import UserError

#: The environment of a process that compiles for TPUs without having one. libtpu then does not query the metadata
#: server (it needs the name of some accelerator and host instead), writes nothing to stderr or to log files, and runs
#: beside other processes with libtpu instead of failing at their lock file.
QUIET: Mapping[str, str] = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """The data sheet of a chip. Unknown numbers are None, unknown texts are empty.

    Attributes:
      name: such as `v5e`.
      aliases: other names.
      kind: `tpu` or `gpu`.
      device_kind: a pattern for JAX's `device_kind`.
      devices_per_chip: JAX devices per chip.
      cores_per_chip: TensorCores per chip.
      peak_flops: dense bfloat16 FLOP/s.
      hbm_bytes: memory size; NVIDIA's gigabytes are taken as 2**30.
      hbm_usable: the memory that libtpu's compiler gives to a program.
      hbm_bandwidth: bytes per second.
      ici_links: links to other chips of the slice.
      ici_bandwidth: bytes per second that leave a chip over all links together; for GPUs, over NVLink or PCIe.
      torus_dims: dimensions of the torus that chips form; 0 if every chip reaches every other.
      pod_chips: chips in the largest slice.
      slices: the documented slices.
      usd_per_chip_hour: list price.
      price_as_of: date of the price.
      note: remarks on the numbers.
      source: URLs of the numbers.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    device_kind: str
    devices_per_chip: int
    cores_per_chip: int
    peak_flops: float
    hbm_bytes: int
    hbm_usable: int | None
    hbm_bandwidth: float
    ici_links: int | None
    ici_bandwidth: float | None
    torus_dims: int
    pod_chips: int | None
    slices: tuple[str, ...]
    usd_per_chip_hour: float | None
    price_as_of: str
    note: str
    source: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Topology:
    """Connected chips.

    Attributes:
      kind: `tpu`, `gpu` or `cpu`.
      chip: None for `cpu:N` and `gpu:N`.
      shape: chips along each dimension.
      devices: the number of JAX devices.
      name: in libtpu's spelling.
    """

    kind: str
    chip: Chip | None
    shape: tuple[int, ...]
    devices: int
    name: str


@functools.cache
def chips() -> Mapping[str, Chip]:
    """All known chips, by name.

    >>> list(chips())[:3]
    ['v2', 'v3', 'v4i']
    """
    entries: list[dict[str, Any]] = json.loads(
        (resources.files("jpeft") / "hardware" / "chips.json").read_text(encoding="utf-8")
    )
    for entry in entries:
        entry |= {key: tuple(entry[key]) for key in ("aliases", "slices", "source")}
    return {entry["name"]: Chip(**entry) for entry in entries}


def chip(name: str) -> Chip:
    """The chip with a name, an alias or a JAX `device_kind`.

    Raises:
      UserError: the chip is unknown.

    >>> chip("v5e").hbm_bytes // 2**30, chip("v5litepod").name, chip("TPU v5 lite").name, chip("NVIDIA H200").name
    (16, 'v5e', 'v5e', 'h200')
    """
    wanted = name.strip().lower()
    for known in chips().values():
        if wanted in (known.name, *known.aliases):
            return known
    for known in chips().values():
        if re.search(known.device_kind, name):
            return known
    raise UserError(f"unknown chip {name!r}; known chips: {', '.join(chips())}")


def parse(name: str) -> Topology:
    """Parses a topology: a chip and a shape, Google Cloud's name of an accelerator, or a number of devices.

    The number in an accelerator's name counts chips for v5e and v6e, and cores (two per chip) for all others.

    Raises:
      UserError: the topology is unknown.

    >>> parse("v5e:4x4").devices, parse("v5p-32").name, parse("v5litepod-16").name, parse("tpu7x:2x2x1").devices
    (16, 'v5p:2x2x4', 'v5e:4x4', 8)
    >>> parse("cpu:8").devices, parse("h100:8").chip.peak_flops
    (8, 989000000000000.0)
    """
    text = str(name).strip().lower()
    found = re.fullmatch(r"([a-z][\w-]*?)(?::(\d{1,5}(?:x\d{1,5})*)|-(\d{1,5}))", text)
    if found is None:
        raise _unknown(name, "expected CHIP:AxB, CHIP-N, cpu:N or gpu:N")
    word, shape, count = found.groups()
    sizes: tuple[int, ...] = tuple(map(int, (shape or count).split("x")))
    if 0 in sizes:
        raise _unknown(name, "it has no devices")
    known = next((c for c in chips().values() if word in (c.name, *c.aliases)), None)
    if known is None and word not in ("cpu", "gpu"):
        raise _unknown(name, f"unknown chip {word!r}")
    if known is None or known.kind == "gpu":
        if shape is None or len(sizes) != 1:
            raise _unknown(name, f"{word} takes a number of devices, such as {word}:8")
        label = word if known is None else known.name
        return Topology("gpu" if known else word, known, sizes, sizes[0], f"{label}:{sizes[0]}")
    if not known.slices:
        raise _unknown(name, f"{known.name} is not available")
    if shape is None:
        sizes = _default_shape(name, known, sizes[0])
    _check_shape(name, known, sizes)
    label = "x".join(map(str, sizes))
    return Topology("tpu", known, sizes, math.prod(sizes) * known.devices_per_chip, f"{known.name}:{label}")


def describe(topology: Topology) -> list[Any]:
    """The devices of a topology: TPUs from libtpu, without hardware; CPUs and GPUs are this process's own.

    Raises:
      UserError: this process has too few devices, or libtpu is missing or does not know the topology.

    >>> [device.platform for device in describe(parse("cpu:1"))]
    ['cpu']
    """
    import jax

    if topology.kind != "tpu":
        try:
            own = jax.devices(topology.kind)
        except RuntimeError:  # JAX has no such backend
            own = []
        if len(own) < topology.devices:
            hint = "; set JAX_NUM_CPU_DEVICES" if topology.kind == "cpu" else ""
            raise UserError(f"{topology.name}: JAX has only {len(own)} {topology.kind} devices here{hint}")
        return own[: topology.devices]
    check_libtpu()
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **libtpu_options(topology)
        ).devices
    except Exception as error:  # JAX's, libtpu's and the dynamic loader's errors have no common class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{topology.name}: libtpu does not provide this topology ({reason})") from error
    if len(found) != topology.devices:
        raise UserError(f"{topology.name}: libtpu has {len(found)} devices, expected {topology.devices}")
    return list(found)


def larger(topology: Topology) -> list[Topology]:
    """Topologies with as many devices and more memory per device, in order of memory.

    >>> [other.name for other in larger(parse("v5e:4x4"))]
    ['v6e:4x4', 'v5p:2x2x4']
    """
    if topology.chip is None or topology.kind != "tpu":
        return []
    found = []
    for other in sorted(chips().values(), key=lambda chip: chip.hbm_usable or 0):
        if (other.hbm_usable or 0) <= (topology.chip.hbm_usable or 0) or other.devices_per_chip > 1:
            continue
        shapes = [tuple(map(int, label.split("x"))) for label in other.slices]
        same = next((shape for shape in shapes if math.prod(shape) == topology.devices), None)
        if other.torus_dims == len(topology.shape):
            same = topology.shape
        if same is not None and other.name != "v4":  # its compiler is another generation's
            found.append(parse(f"{other.name}:{'x'.join(map(str, same))}"))
    return found


def libtpu_options(topology: Topology) -> dict[str, Any]:
    """The keyword arguments of `jax.experimental.topologies.get_topology_desc` besides the name.

    >>> libtpu_options(parse("v5e:1x1")), libtpu_options(parse("v4:2x2x1"))
    ({'chips_per_host_bounds': [1, 1, 1]}, {'chip_config_name': 'megacore'})
    """
    options: dict[str, Any] = {}
    if topology.chip is not None and topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # by default libtpu makes two devices of its two cores
    if any(size % bound for size, bound in zip(topology.shape, _HOST, strict=False)):
        options["chips_per_host_bounds"] = [*topology.shape, 1][:3]  # one host for the whole slice
    return options


def interconnect(topology: Topology) -> float | None:
    """Bytes per second that a device can send to the rest of its slice; None if unknown or alone.

    Along a side of two chips a chip has one link, along a longer side two.

    >>> interconnect(parse("v5e:2x2")), interconnect(parse("v5e:4x4")), interconnect(parse("v5e:1x1"))
    (100000000000.0, 200000000000.0, None)
    """
    chip = topology.chip
    if chip is None or chip.ici_bandwidth is None or topology.devices == 1:
        return None
    if not chip.torus_dims or not chip.ici_links:
        return chip.ici_bandwidth
    links = sum(min(size - 1, 2) for size in topology.shape)
    return chip.ici_bandwidth * min(links, chip.ici_links) / chip.ici_links / chip.devices_per_chip or None


def check_libtpu() -> None:
    """Checks that libtpu is installed in the version that belongs to this jax.

    With a newer one, compiling for v5p and v6e fails on an internal check.

    Raises:
      UserError: it is missing or has another version.

    >>> check_libtpu()  # doctest: +SKIP
    """
    needed = next((line for line in metadata.requires("jax") or () if line.startswith("libtpu")), "libtpu")
    wanted = re.match(r"libtpu\s*==\s*([\d.]*\d)(\.\*)?", needed)
    jax_version = metadata.version("jax")
    install = f'pip install "jax[tpu]=={jax_version}"'
    try:
        have = metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        raise UserError(f"libtpu is not installed for {sys.executable}: {install}") from None
    if wanted is not None and have != wanted[1] and not have.startswith(f"{wanted[1]}."):
        raise UserError(f"libtpu {have} does not belong to jax {jax_version}, which needs {wanted[1]}: {install}")


_HOST = (2, 2, 1)  # chips per host, by libtpu's default


def _default_shape(name: str, chip: Chip, count: int) -> tuple[int, ...]:
    """The documented slice with a number of cores (or chips, where a chip has one core)."""
    cores = chip.cores_per_chip
    for label in chip.slices:
        shape = tuple(map(int, label.split("x")))
        if math.prod(shape) * cores == count:
            return shape
    unit = "chips" if cores == 1 else "cores (two per chip)"
    raise _unknown(name, f"no slice of {chip.name} has {count} {unit}")


def _check_shape(name: str, chip: Chip, shape: tuple[int, ...]) -> None:
    """Rejects shapes that libtpu cannot parse or that abort its process; libtpu itself rejects the others."""
    if len(shape) != chip.torus_dims:
        raise _unknown(name, f"a slice of {chip.name} has {chip.torus_dims} dimensions")
    if chip.pod_chips is not None and math.prod(shape) > chip.pod_chips:
        raise _unknown(name, f"a pod of {chip.name} has only {chip.pod_chips} chips")
    split = all(size % bound == 0 for size, bound in zip(shape, _HOST, strict=False))
    if not split and math.prod(shape) > 4:
        raise _unknown(name, "it does not divide into hosts of 2x2 chips")


def _unknown(name: str, why: str) -> UserError:
    tpus = "; ".join(f"{c.name}:{{{','.join(c.slices)}}}" for c in chips().values() if c.slices)
    gpus = ", ".join(f"{c.name}:N" for c in chips().values() if c.kind == "gpu")
    return UserError(f"unknown topology {name!r}: {why}. Known: {tpus}; cpu:N, gpu:N, {gpus}; v5litepod-16, v5p-32")
