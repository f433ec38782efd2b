"""Names of topologies, and the data sheets of chips."""

import math
import re

import pytest

from jpeft.errors import UserError
from jpeft.hardware import topologies
from jpeft.hardware.topologies import chip, chips, describe, libtpu_options, parse
from jpeft.hardware.utilization import peak_flops


@pytest.mark.parametrize(
    ("name", "canonical", "devices"),
    [
        ("v5e:4x4", "v5e:4x4", 16),
        ("V5E:4x4", "v5e:4x4", 16),
        ("v5litepod-16", "v5e:4x4", 16),
        ("v5e-1", "v5e:1x1", 1),
        ("v5e:1x2", "v5e:1x2", 2),
        ("v5e:2x6", "v5e:2x6", 12),  # not for rent, but libtpu supports it
        ("v6e-16", "v6e:4x4", 16),
        ("v6e-256", "v6e:16x16", 256),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-32", "v5p:2x2x4", 16),
        ("v5p:2x2x4", "v5p:2x2x4", 16),
        ("v5p-12288", "v5p:16x16x24", 6144),
        ("v4-32", "v4:2x2x4", 16),
        ("v2-8", "v2:2x2", 8),
        ("v3-32", "v3:4x4", 32),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 8),
        ("tpu7x-8", "tpu7x:2x2x1", 8),
        ("ironwood:1x1x1", "tpu7x:1x1x1", 2),
        ("cpu:8", "cpu:8", 8),
        ("gpu:8", "gpu:8", 8),
        ("h100:8", "h100:8", 8),
        ("h100-sxm:8", "h100:8", 8),
    ],
)
def test_names(name, canonical, devices):
    topology = parse(name)
    assert (topology.name, topology.devices) == (canonical, devices)
    assert parse(topology.name) == topology
    assert topology.kind == {"cpu": "cpu", "gpu": "gpu", "h100": "gpu"}.get(canonical.split(":")[0], "tpu")
    per_chip = topology.chip.devices_per_chip if topology.chip else 1
    assert math.prod(topology.shape) * per_chip == devices


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("v9:2x2", "unknown chip 'v9'"),
        ("v5e", "expected CHIP:AxB"),
        ("", "expected CHIP:AxB"),
        ("v5e:4x", "expected CHIP:AxB"),
        ("v5e:0x4", "no devices"),
        ("cpu:0", "no devices"),
        ("v5e:2x2x1", "2 dimensions"),
        ("v5p:4x4", "3 dimensions"),
        ("v5e:32x32", "only 256 chips"),  # libtpu aborts
        ("v5e:3x3", "hosts of 2x2"),
        ("v5p-24", "has 24 cores (two per chip)"),
        ("v6e-7", "has 7 chips"),
        ("v4i:2x2", "v4i is not available"),
        ("cpu:2x2", "number of devices"),
        ("cpu-8", "number of devices"),
    ],
)
def test_errors_state_the_reason_and_the_known_topologies(name, why):
    with pytest.raises(UserError, match=re.escape(why)) as error:
        parse(name)
    assert "\n" not in str(error.value) and "v5e:{1x1,2x2," in str(error.value) and "cpu:N" in str(error.value)


def test_documented_slices_are_parsed_and_found_by_their_size():
    for known in (c for c in chips().values() if c.slices):
        for label in known.slices:
            topology = parse(f"{known.name}:{label}")
            assert parse(f"{known.name}-{math.prod(topology.shape) * known.cores_per_chip}") == topology


def test_numbers_are_plausible_and_have_a_source():
    for known in chips().values():
        assert known.source and all(url.startswith("https://") for url in known.source)
        assert known.devices_per_chip <= known.cores_per_chip and known.torus_dims in (0, 2, 3)
        assert 1e13 < known.peak_flops < 3e15 and 8e9 < known.hbm_bytes < 2e11 and 2e11 < known.hbm_bandwidth < 1e13
        assert known.hbm_usable is None or 0.9 * known.hbm_bytes < known.hbm_usable < known.hbm_bytes
        assert known.usd_per_chip_hour is None or known.price_as_of
        if known.ici_links:
            assert known.ici_links in (2 * known.torus_dims, 2)


def test_chips_are_found_by_name_and_by_device_kind():
    kinds = {"NVIDIA A100-SXM4-40GB": "a100-40gb", "NVIDIA A100-SXM4-80GB": "a100-80gb", "NVIDIA L4": "l4",
             "NVIDIA GH200 480GB": "gh200", "NVIDIA H100 PCIe": "h100-pcie", "Tesla T4": "t4", "TPU v5": "v5p",
             "TPU7x": "tpu7x", "TPU v2": "v2", "trillium": "v6e"}  # fmt: skip
    assert {kind: chip(kind).name for kind in kinds} == kinds
    assert peak_flops("TPU7x") == chip("tpu7x").peak_flops == 2307e12 / 2  # a device is half a chip
    with pytest.raises(UserError, match="unknown chip 'cpu'"):
        chip("cpu")


def test_libtpu_gets_host_bounds_only_if_its_defaults_do_not_fit():
    assert libtpu_options(parse("v5e:1x2")) == {"chips_per_host_bounds": [1, 2, 1]}
    assert libtpu_options(parse("v5e:4x4")) == libtpu_options(parse("v5p:2x2x1")) == {}
    assert libtpu_options(parse("v4:1x1x1")) == {
        "chip_config_name": "megacore",
        "chips_per_host_bounds": [1, 1, 1],
    }


def test_devices_of_this_process():
    import jax

    assert describe(parse("cpu:1")) == jax.devices("cpu")[:1]
    with pytest.raises(UserError, match=r"cpu:9999: JAX has only .* cpu devices here; set JAX_NUM_CPU_DEVICES"):
        describe(parse("cpu:9999"))


def test_the_quiet_environment_holds_strings():
    assert all(isinstance(value, str) for value in topologies.QUIET.values())
