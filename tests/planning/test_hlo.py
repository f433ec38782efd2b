"""The HLO reader: FLOPs, bytes, collectives and memory, against counts by hand and XLA's own analyses."""

import functools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jpeft.planning import hlo
from jpeft.planning.hlo.parse import Leaf, read_shape

DATA = Path(__file__).parent / "data"
PACKAGE = Path(hlo.__file__).parent
LAYERS, ROWS, WIDTH = 5, 16, 32
DOT = 2 * ROWS * WIDTH * WIDTH


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


def program(function, *args):
    return hlo.read(compiled(function, *args).as_text())


def fixture(name):
    return hlo.read((DATA / name).read_text())


@functools.cache
def weights():
    return jnp.ones((LAYERS, WIDTH, WIDTH)), jnp.ones((ROWS, WIDTH))


def layer(x, w):
    return jnp.tanh(x @ w), None


def scanned(w, x):
    return jax.lax.scan(layer, x, w)[0].sum()


def unrolled(w, x):
    for i in range(LAYERS):
        x, _ = layer(x, w[i])
    return x.sum()


# -------------------------------------------------------------------------------------------------------------- FLOPs


def test_flops_of_a_scan():
    looped, flat = program(scanned, *weights()), program(unrolled, *weights())
    assert looped.flops == flat.flops == flat.flops_once == LAYERS * DOT
    assert looped.flops_once == DOT and list(looped.trips.values()) == [LAYERS] and not looped.unknown_loops


def test_flops_match_xla_where_there_are_only_dots():
    ready = compiled(lambda x, a, b: (x @ a) @ b, jnp.ones((8, 32)), jnp.ones((32, 64)), jnp.ones((64, 16)))
    assert hlo.read(ready.as_text()).flops == ready.cost_analysis()["flops"] == 2 * 8 * 64 * (32 + 16)


def test_flops_of_a_gradient_with_remat():
    def loss(w, x):
        return jax.lax.scan(jax.checkpoint(layer), x, w)[0].sum()

    assert program(jax.grad(scanned), *weights()).flops == 3 * LAYERS * DOT
    assert program(jax.grad(loss), *weights()).flops == 4 * LAYERS * DOT


def test_flops_of_nested_loops_and_batches():
    def nested(w, x):
        return jax.lax.scan(lambda x, _: (jax.lax.scan(layer, x, w)[0], None), x, None, length=3)[0]

    assert program(nested, *weights()).flops == 3 * LAYERS * DOT
    batched = program(lambda a, b: jnp.einsum("bhqd,bhkd->bhqk", a, b), jnp.ones((2, 3, 8, 4)), jnp.ones((2, 3, 6, 4)))
    assert batched.flops == 2 * 2 * 3 * 8 * 6 * 4


def test_the_most_expensive_branch_counts():
    def branching(i, x, w):
        return jax.lax.switch(i, [lambda x: x, lambda x: x @ w, lambda x: (x @ w) @ w], x)

    assert program(branching, jnp.int32(0), jnp.ones((ROWS, WIDTH)), jnp.ones((WIDTH, WIDTH))).flops == 2 * DOT


def test_a_loop_with_an_unknown_trip_count_is_listed():
    def until(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: jnp.tanh(x @ w), x)

    found = program(until, jnp.ones((ROWS, WIDTH)), jnp.ones((WIDTH, WIDTH)))
    assert len(found.unknown_loops) == 1 and found.flops == DOT


def test_trip_counts_from_conditions_alone():
    text = compiled(scanned, *weights()).as_text()
    hidden = text.replace("known_trip_count", "forgotten")
    assert "known_trip_count" in text and hlo.read(hidden).flops == LAYERS * DOT


@pytest.mark.parametrize(
    ("start", "limit", "step", "direction", "trips"),
    [(0, 8, 2, "LT", 4), (7, 0, -1, "GE", 8), (3, 9, 3, "LE", 3), (0, 6, 1, "NE", 6), (0, 100000, 1, "LT", 100000)],
)
def test_trip_counts_of_every_comparison(start, limit, step, direction, trips):
    text = f"""HloModule loop, is_scheduled=true
%body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {{
  %p = (s32[], f32[4,4]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  %x = f32[4,4]{{1,0}} get-tuple-element(%p), index=1
  %dot = f32[4,4]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %out = (s32[], f32[4,4]{{1,0}}) tuple(%next, %dot)
}}
%condition (q: (s32[], f32[4,4])) -> pred[] {{
  %q = (s32[], f32[4,4]{{1,0}}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant({limit})
  ROOT %compare = pred[] compare(%j, %limit), direction={direction}
}}
ENTRY %main (a: f32[4,4]) -> (s32[], f32[4,4]) {{
  %a = f32[4,4]{{1,0}} parameter(0)
  %start = s32[] constant({start})
  %begin = s32[] copy(%start)
  %init = (s32[], f32[4,4]{{1,0}}) tuple(%begin, %a)
  ROOT %while = (s32[], f32[4,4]{{1,0}}) while(%init), condition=%condition, body=%body
}}"""
    found = hlo.read(text)
    assert found.trips == {"while": trips} and found.flops == trips * 128


def test_convolutions_do_not_count_padding():
    args = jnp.ones((2, 16, 16, 3)), jnp.ones((3, 3, 3, 8))
    dims = ("NHWC", "HWIO", "NHWC")
    for options in (
        {"padding": "VALID"},
        {"padding": "SAME", "window_strides": (2, 2)},
        {"padding": ((1, 2), (0, 1)), "lhs_dilation": (2, 2)},
        {"padding": "SAME", "rhs_dilation": (2, 3)},
    ):
        options = {"window_strides": (1, 1), **options}
        ready = compiled(lambda x, k, o=options: jax.lax.conv_general_dilated(x, k, dimension_numbers=dims, **o), *args)
        assert hlo.read(ready.as_text()).flops == pytest.approx(ready.cost_analysis()["flops"], rel=0.01), options


def test_text_that_is_not_hlo():
    with pytest.raises(ValueError, match="not optimized HLO: expected 'HloModule"):
        hlo.read("module @jit_f {}")


# -------------------------------------------------------------------------------------------------------------- bytes


def test_bytes_of_products_and_slices():
    ready = compiled(lambda x, a, b: (x @ a) @ b, jnp.ones((8, 32)), jnp.ones((32, 64)), jnp.ones((64, 16)))
    assert hlo.read(ready.as_text()).hbm_bytes == pytest.approx(ready.cost_analysis()["bytes accessed"], rel=0.01)
    # A scan reads each layer's weights once, not all of them in every layer.
    w, x = weights()
    found = program(scanned, w, x)
    assert w.nbytes < found.hbm_bytes < 2 * w.nbytes + 12 * LAYERS * x.nbytes + 4096


# -------------------------------------------------------------------------------------------------------- collectives


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}, use", ((0, 1), (2, 3))),
        ("{}, use", ((0, 1, 2, 3),)),
        ("[2,2]<=[4], dimensions={0}", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("[1,4]<=[4]", ((0, 1, 2, 3),)),
        ("mesh['x'=4,'y'=1] {'x'}, dimensions={1}", ((0, 1, 2, 3),)),
        ("mesh['x'=2,'y'=2] {'x'}", ((0, 2), (1, 3))),
        ("mesh['x'=2,'y'=2] {'x','y'}", ((0, 1, 2, 3),)),
        ("mesh['x'=4] {'x':(1)2}", ((0, 2), (1, 3))),
        ("mesh['x'=1,'y'=2,'z'=2], device_ids=([2,2]T(1,0)) {'y'}, use", ((0, 1), (2, 3))),
        ("mesh['x'=2,'y'=2], device_ids=(3,1,2,0) {'y'}", ((3, 1), (2, 0))),
        ("mesh['x'=4] {'x':(2)2}", ((0, 1), (2, 3))),
    ],
)
def test_spellings_of_replica_groups(text, groups):
    assert hlo.replica_groups(text, 4) == groups


@functools.cache
def mesh():
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def sharded(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh(), P(*spec)))


def summary(found):
    out = Counter()
    for each in found.collectives:
        out[each.kind] += each.times * each.bytes
    return out


def test_an_all_reduce_by_hand():
    found = program(lambda x, w: x @ w, sharded((8, 16), None, "tensor"), sharded((16, 32), "tensor", None))
    (only,) = found.collectives
    assert only.kind == "all-reduce" and only.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert only.bytes == 2 * (8 * 32 * 4) * 3 // 4 and "dot_general" in only.op_name
    assert only.source.partition(":")[0].endswith("test_hlo.py")


def test_all_gathers_in_a_scan_by_hand():
    def gathered(w, x):
        body = lambda x, w: (jnp.tanh(x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh(), P()))), None)  # noqa: E731
        return jax.lax.scan(body, x, w)[0]

    given = sharded((LAYERS, 64, 64), None, "tensor"), sharded((8, 64), "data")
    assert summary(program(gathered, *given)) == {"all-gather": LAYERS * 64 * 64 * 4 * 3 // 4}


@pytest.mark.parametrize(
    ("kind", "operation", "share"),
    [
        ("collective-permute", lambda x: jax.lax.ppermute(x, "tensor", [(i, (i + 1) % 4) for i in range(4)]), 1),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "tensor", 0, 0, tiled=True), 3 / 4),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "tensor", tiled=True), 3 / 4),
        ("all-gather", lambda x: jax.lax.all_gather(x, "tensor", tiled=True), 3),
    ],
)
def test_collectives_by_hand(kind, operation, share):
    out = P("tensor")
    function = jax.shard_map(operation, mesh=mesh(), in_specs=P("tensor"), out_specs=out, check_vma=False)
    (only,) = program(function, sharded((64, 4), "tensor")).collectives
    assert only.kind == kind and only.bytes == 16 * 4 * 4 * share
    assert only.groups == ((0, 1, 2, 3), (4, 5, 6, 7))


# ------------------------------------------------------------------------------------------------------------- memory


def test_parameters_add_up():
    ready = compiled(jax.grad(scanned), *weights())
    found = hlo.read(ready.as_text()).parameters
    assert sum(size for _, size in found) == ready.memory_analysis().argument_size_in_bytes
    assert {name for name, _ in found} == {"w", "x"}


@pytest.mark.parametrize("function", [scanned, unrolled, jax.grad(scanned, 1), jax.grad(unrolled, 1)])
def test_the_peak_is_near_what_xla_allocates(function):
    big = jnp.ones((LAYERS, 256, 256)), jnp.ones((512, 256))
    ready = compiled(function, *big)
    found = hlo.read(ready.as_text())
    told = ready.memory_analysis()
    # The CPU compiler puts some temporaries into the memory of results.
    assert 0.95 * told.temp_size_in_bytes <= found.peak_bytes
    assert found.peak_bytes <= 1.05 * told.temp_size_in_bytes + told.output_size_in_bytes
    assert sum(b.bytes * b.count for b in found.live()) == found.peak_bytes


def test_the_largest_buffer_has_a_name_and_a_source():
    found = program(lambda x, w: jnp.tanh(x @ w) @ w.T, jnp.ones((2048, 64)), jnp.ones((64, 256)))
    largest = found.live(1)[0]
    assert largest.shape == "f32[2048,256]" and largest.bytes == 2048 * 256 * 4
    assert "test_hlo.py" in largest.source and largest.stack
    names = {(b.shape, b.op_name) for b in found.live(arguments=True)}
    assert names >= {("f32[2048,64]", "x"), ("f32[64,256]", "w")}


# --------------------------------------------------------------------------------------------------------------- TPUs


@pytest.mark.parametrize(
    ("text", "logical", "padded", "space"),
    [
        ("bf16[2048,4096]{1,0:T(8,128)(2,1)S(1)}", 2**24, 2**24, 1),
        ("f32[256,16]{1,0:T(8,128)}", 16384, 256 * 128 * 4, 0),
        ("f32[256,16]{0,1:T(8,128)}", 16384, 16384, 0),
        ("s32[]{:T(128)}", 4, 512, 0),
        ("bf16[100]{0:T(256)(128)(2,1)}", 200, 512, 0),
        ("bf16[3,5,7]{2,1,0:T(8,128)(2,1)}", 210, 3 * 8 * 128 * 2, 0),
        ("s4[64,128]{1,0:T(8,128)(8,1)E(4)}", 4096, 4096, 0),
        ("pred[]", 1, 1, 0),
        ("f32[8,8]{1,0:S(5)}", 256, 256, 5),
        ("f8e4m3fn[16]{0}", 16, 16, 0),
    ],
)
def test_padding_by_tiles(text, logical, padded, space):
    leaf = read_shape(text)
    assert isinstance(leaf, Leaf)
    assert (leaf.nbytes, leaf.padded, leaf.space) == (logical, padded, space)


def test_tpu_asynchronous_fusions():
    """Six layers with two weights each, sharded over four chips: one is gathered during a product, one before it."""
    found = fixture("hlo_async.txt")
    assert list(found.trips.values()) == [6] and not found.unknown_loops
    assert found.flops == 6 * found.flops_once == 6 * 2 * 2 * 2048 * 2048 * 8192
    assert len(found.collectives) == 2
    assert summary(found) == {"all-gather": 12 * 2048 * 8192 * 2 * 3 // 4}
    assert {c.groups for c in found.collectives} == {((0, 1, 2, 3),)}
    assert sum(size for _, size in found.parameters) == 109051904  # from memory_analysis


def test_tpu_windowed_einsum():
    """A 4096 x 4096 weight in sixteen pieces is passed around in both directions, for 2048 tokens."""
    found = fixture("hlo_windowed.txt")
    assert list(found.trips.values()) == [4]
    assert found.flops == 2 * 2048 * 4096 * 4096
    assert {c.kind for c in found.collectives} == {"collective-permute"}
    assert sum(c.times * c.bytes for c in found.collectives) == 16 * 256 * 4096 * 2
    source = found.collectives[0]
    assert (
        "/jpeft/models/decoder.py:" in source.source and len(source.stack) > 20 and source.groups == (tuple(range(16)),)
    )


def test_an_out_of_memory_message():
    found = hlo.read_refusal((DATA / "hlo_refused.txt").read_text())
    assert found.used == round(739.76 * 2**20) and found.available == 738 * 2**20
    first, second, third = found.buffers[:3]
    assert first.bytes == second.bytes == 128 * 2**20 and first.shape == "bf16[8192,8192]"
    assert first.op_name.endswith("rematted_computation/dot_general") and not third.op_name
    assert third == hlo.Buffer(32 * 2**20, "bf16[2048,8192]", "", "")


def test_short_and_old_out_of_memory_messages():
    early = "Ran out of memory on HBM, the total memory required for HLO temporaries (29.71G) "
    assert hlo.read_refusal(early + "exceeds available HBM (15.75G).") == (
        (),
        round(29.71 * 2**30),
        round(15.75 * 2**30),
    )
    old = """Ran out of memory in memory space hbm. Used 41.74G of 16.00G hbm. Exceeded hbm capacity by 25.74G.

  Largest program allocations in hbm:

  1. Size: 32.00G
     Operator: op_type="mod" op_name="jit(step)/mod" source_file="/home/me/model.py" source_line=26
     Shape: s32[8388608,8,4]{2,1,0:T(8,128)}
     Unpadded size: 1.00G
     Extra memory due to padding: 31.00G (32.0x expansion)
     ==========================
"""
    (buffer,) = hlo.read_refusal(old).buffers
    assert buffer[:4] == (2**35, "s32[8388608,8,4]", "jit(step)/mod", "/home/me/model.py:26")
    assert hlo.read_refusal("something else") == ((), 0, 0)


def test_the_reader_imports_no_jax():
    # `jpeft` and `jpeft.planning` import jax themselves: empty packages stand in for them.
    code = f"""
import sys, types
for name, path in (("jpeft", {str(PACKAGE.parents[1])!r}), ("jpeft.planning", {str(PACKAGE.parent)!r})):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
from jpeft.planning import hlo
assert hlo.read and "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
