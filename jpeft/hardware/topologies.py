"""Chips, their numbers, and the ways in which they are joined: `chips.json` has the numbers and where they stand.

    topology = parse("v5p-32")  # its name: v5p:2x2x4
    devices = describe(topology)  # where libtpu is installed; no TPU is needed

All of a `Chip` is counted per device that JAX shows, but for `ici_bandwidth` and the price, which are per chip: v2, v3
and TPU7x show two devices a chip, v4 and v5p one for their two cores.
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

#: For the environment of a process that compiles for TPUs and has none: libtpu asks for no metadata and says nothing on
#: stderr (it needs to know of some accelerator and host, whichever), keeps no logs, and shares the machine with others
#: of its kind instead of failing at their lock file.
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
    """What a chip is sold with. None, or "", where it is not known.

    Fields: `device_kind`, a pattern of what JAX calls it; `peak_flops`, dense bfloat16; `hbm_bytes` (NVIDIA's gigabytes
    are taken for 2**30) and `hbm_bandwidth`; `hbm_usable`, what libtpu's compiler has for a program; `ici_bandwidth`,
    bytes a second that leave a chip by all `ici_links` together (NVLink's or PCIe's, of a GPU); `torus_dims`, 0 where
    all see all; `slices`, those that are documented; `source`, where the numbers stand.
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
    """Chips joined. `shape` counts chips, `devices` what JAX shows of them; `name` is as libtpu spells it."""

    kind: str
    chip: Chip | None
    shape: tuple[int, ...]
    devices: int
    name: str
    slices: int = 1


@functools.cache
def chips() -> Mapping[str, Chip]:
    """All chips that are known, by name.

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
    """A chip by its name, another name of it, or what JAX calls its devices.

    Raises:
      UserError: it is not a known one.

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
    raise UserError(f"{name!r} is no known chip, only {', '.join(chips())}")


def parse(name: str) -> Topology:
    """The topology of a name: a chip and a shape, an accelerator's name on Google Cloud, or a number of devices.

    The number in an accelerator's name counts chips of v5e and v6e, and cores, two a chip, of all others.

    Raises:
      UserError: there is no such topology.

    >>> parse("v5e:4x4").devices, parse("v5p-32").name, parse("v5litepod-16").name, parse("tpu7x:2x2x1").devices
    (16, 'v5p:2x2x4', 'v5e:4x4', 8)
    >>> parse("cpu:8").devices, parse("h100:8").chip.peak_flops
    (8, 989000000000000.0)
    """
    text = str(name).strip().lower()
    found = re.fullmatch(r"([a-z][\w-]*?)(?::(\d{1,5}(?:x\d{1,5})*)|-(\d{1,5}))", text)
    if found is None:
        raise _unknown(name, "it is neither CHIP:AxB, CHIP-N, cpu:N nor gpu:N")
    word, shape, count = found.groups()
    sizes: tuple[int, ...] = tuple(map(int, (shape or count).split("x")))
    if 0 in sizes:
        raise _unknown(name, "it has no devices")
    known = next((c for c in chips().values() if word in (c.name, *c.aliases)), None)
    if known is None and word not in ("cpu", "gpu"):
        raise _unknown(name, f"{word!r} is no known chip")
    if known is None or known.kind == "gpu":
        if shape is None or len(sizes) != 1:
            raise _unknown(name, f"{word} takes a number of devices, {word}:8")
        label = word if known is None else known.name
        return Topology("gpu" if known else word, known, sizes, sizes[0], f"{label}:{sizes[0]}")
    if not known.slices:
        raise _unknown(name, f"{known.name} is not offered")
    if shape is None:
        sizes = _default_shape(name, known, sizes[0])
    _check_shape(name, known, sizes)
    label = "x".join(map(str, sizes))
    return Topology("tpu", known, sizes, math.prod(sizes) * known.devices_per_chip, f"{known.name}:{label}")


def describe(topology: Topology) -> list[Any]:
    """The devices of a topology, to make a mesh of: a TPU's without one, from libtpu, in a process that has it.

    Of CPUs and GPUs they are this process's own.

    Raises:
      UserError: they are too few, or libtpu does not know the topology.

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
            more = "; JAX_NUM_CPU_DEVICES sets their number" if topology.kind == "cpu" else ""
            raise UserError(f"{topology.name}: JAX shows {len(own)} {topology.kind} devices here{more}")
        return own[: topology.devices]
    check_libtpu()
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **libtpu_options(topology)
        ).devices
    except Exception as error:  # JAX's, libtpu's and the dynamic loader's errors have no common class
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{topology.name}: libtpu gives no such topology ({said})") from error
    if len(found) != topology.devices:
        raise UserError(f"{topology.name}: libtpu shows {len(found)} devices where {topology.devices} were expected")
    return list(found)


def larger(topology: Topology) -> list[Topology]:
    """Topologies of as many devices with more memory each, the smallest first.

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
    """What `jax.experimental.topologies.get_topology_desc` has to be told beside the name.

    >>> libtpu_options(parse("v5e:1x1")), libtpu_options(parse("v4:2x2x1"))
    ({'chips_per_host_bounds': [1, 1, 1]}, {'chip_config_name': 'megacore'})
    """
    options: dict[str, Any] = {}
    if topology.chip is not None and topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # by default, libtpu shows its two cores as two devices
    if any(size % bound for size, bound in zip(topology.shape, _HOST, strict=False)):
        options["chips_per_host_bounds"] = [*topology.shape, 1][:3]  # all of it is one host's
    return options


def interconnect(topology: Topology) -> float | None:
    """Bytes a second that a device can send: over the links that a chip has within its slice, one where a side of it is
    two chips and two where it is more.

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
    """Raises a UserError where libtpu is not there, or another than the one that JAX is made for: with a newer one v5p
    and v6e end on an internal check.

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
        raise UserError(f"libtpu {have} is not the one that jax {jax_version} is made for, {wanted[1]}: {install}")


_HOST = (2, 2, 1)  # chips of a host, as libtpu supposes where it is not told


def _default_shape(name: str, chip: Chip, count: int) -> tuple[int, ...]:
    """Of an accelerator's name, which says how many chips or cores there are."""
    cores = chip.cores_per_chip
    for label in chip.slices:
        shape = tuple(map(int, label.split("x")))
        if math.prod(shape) * cores == count:
            return shape
    counted = "chips" if cores == 1 else "cores, two a chip"
    raise _unknown(name, f"no slice of {chip.name} has {count} {counted}")


def _check_shape(name: str, chip: Chip, shape: tuple[int, ...]) -> None:
    """Only what would end libtpu's process, or what it could not read: it is the judge of the rest."""
    if len(shape) != chip.torus_dims:
        raise _unknown(name, f"a slice of {chip.name} has {chip.torus_dims} dimensions")
    if chip.pod_chips is not None and math.prod(shape) > chip.pod_chips:
        raise _unknown(name, f"a pod of {chip.name} has {chip.pod_chips} chips")
    split = all(size % bound == 0 for size, bound in zip(shape, _HOST, strict=False))
    if not split and math.prod(shape) > 4:
        raise _unknown(name, "it does not split into hosts of 2x2 chips")


def _unknown(name: str, why: str) -> UserError:
    tpus = "; ".join(f"{c.name}:{{{','.join(c.slices)}}}" for c in chips().values() if c.slices)
    gpus = ", ".join(f"{c.name}:N" for c in chips().values() if c.kind == "gpu")
    return UserError(f"{name!r} is no known topology: {why}. Known: {tpus}; cpu:N, gpu:N, {gpus}; v5litepod-16, v5p-32")
