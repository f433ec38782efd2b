"""Sharding rules, and training steps on meshes: 8 devices give the numbers of one."""

import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft import models
from jpeft.core.placement import trimmed
from jpeft.core.tree import flatten, join
from jpeft.models.bert import Bert, BertConfig
from jpeft.models.decoder import Decoder, DecoderConfig
from jpeft.parallel.batches import batch_shardings
from jpeft.parallel.rules import param_shardings
from jpeft.recipes.tasks import chat, classification
from jpeft.text import conversations

SIZES = (1, 2, 4, 8)
MESHES = [dims for dims in itertools.product(SIZES, SIZES, SIZES) if np.prod(dims) == 8]
METHODS = {
    "lora": jpeft.LoRA(rank=4, targets="all-linear", init_weights="random"),
    "prefix": jpeft.PrefixTuning(length=3),
    "bottleneck": jpeft.Bottleneck(),
    "bottleneck, at a module": jpeft.Bottleneck(targets="Conv_0"),
}
RNG = np.random.default_rng(0)
TX = optax.sgd(0.1)


def mesh_of(dims, names=("data", "fsdp", "tensor")):
    return jax.make_mesh(dims, names, devices=jax.devices()[: np.prod(dims)])


# --- rules ------------------------------------------------------------------------------------------------------------


def specs(*args, **kwargs):
    return {join(path): leaf.spec for path, leaf in flatten(param_shardings(*args, **kwargs)).items()}


TREE = {
    "a": {"kernel": np.ones((8, 16)), "bias": np.ones(16)},
    "b": {"kernel": np.ones((3, 32, 8))},
    "scale": np.ones(()),
}


def test_without_rules_or_names_only_the_longer_side_of_matrices_is_sharded():
    assert specs(TREE, mesh_of((2, 4), ("data", "fsdp"))) == {
        "a/kernel": P(None, "fsdp"),
        "a/bias": P(),
        "b/kernel": P(None, "fsdp"),
        "scale": P(),
    }
    assert set(specs(TREE, mesh_of((8,), ("data",))).values()) == {P()}


def test_the_first_rule_that_matches_a_path_counts():
    rules = [("a/.*", P("data")), (".*/kernel", P(None, "fsdp"))]
    assert specs(TREE, mesh_of((2, 4), ("data", "fsdp")), rules) == {
        "a/kernel": P("data"),
        "a/bias": P("data"),
        "b/kernel": P(None, "fsdp"),
        "scale": P(),
    }


def test_axis_names_come_from_boxes_or_from_the_caller():
    mesh, boxed = mesh_of((2, 4), ("fsdp", "tensor")), {"w": nn.Partitioned(jnp.ones((8, 4)), ("embed", "mlp"))}
    rules = [("mlp", "tensor"), ("embed", ("fsdp",))]
    assert param_shardings(boxed, mesh, rules)["w"].value.spec == P(("fsdp",), "tensor")
    assert param_shardings(boxed, mesh)["w"].value.spec == P("fsdp", "tensor")  # LOGICAL_RULES
    placed = jpeft.shard(boxed, mesh)["w"]
    assert isinstance(placed, nn.Partitioned) and placed.value.sharding.spec == P("fsdp", "tensor")
    assert specs({"w": np.ones((8, 4))}, mesh, rules, names={"w": ("embed", "mlp")}) == {"w": P(("fsdp",), "tensor")}
    both = [("w", P(None, "fsdp")), *rules]
    assert param_shardings(boxed, mesh, both)["w"].value.spec == P(None, "fsdp")


@pytest.mark.parametrize(
    "names",
    [("embed", "mlp"), ("mlp", "embed"), ("mlp", None, "heads"), ("other", "mlp"), ((), "embed"), (("fsdp",), "embed")],
)
@pytest.mark.parametrize(
    "rules",
    [
        [("embed", "fsdp"), ("mlp", "tensor"), ("heads", "tensor")],
        [("mlp", ("fsdp", "tensor")), ("embed", "fsdp"), ("embed", "data")],
        [("embed", None), ("embed", "fsdp"), ("heads", ("data", "tensor")), ("mlp", "tensor")],
    ],
)
def test_names_give_the_spec_that_flax_gives(names, rules):
    mesh = jax.sharding.AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"))
    rules = [rule for rule in rules if rule[0] in names]
    leaf = jax.ShapeDtypeStruct((8,) * len(names), jnp.float32)
    found = specs({"w": leaf}, mesh, rules, names={"w": names})["w"]
    assert found == trimmed(nn.logical_to_mesh_axes(names, rules))


@pytest.mark.parametrize(
    "rules, message",
    [
        ([("c/.*", P("fsdp"))], "the rule 'c/.*' matches no leaf; the leaves are a/kernel, a/bias"),
        (
            [("a/kernel", P("model"))],
            r"the rule for 'a/kernel' names the axis 'model'; the mesh has \('data', 'fsdp'\)",
        ),
        ([("b/kernel", P("fsdp"))], r"b/kernel: an axis of 3 does not divide over 'fsdp', which is 4 wide"),
        ([("a/bias", P(None, "fsdp"))], r"a/bias: shape \(16,\) has fewer axes than its rule"),
        ([("embed", "fsdp")], "the rule for 'embed' matches nothing: no axis of the tree has a name"),
        ([(".*/kernel", (None, "fsdp"))], "a rule for paths needs a PartitionSpec"),
        ([("(", P())], r"the rule '\(' is not a regular expression"),
        (["a/kernel"], "a rule must be a pair"),
        ({".*": P()}, "rules must be a list of pairs"),
        ([("a/kernel", P("fsdp", "fsdp"))], "a/kernel: .* names an axis of the mesh twice"),
        ([("a/kernel", P(P.UNCONSTRAINED, "fsdp"))], "a/kernel: .* leaves an axis unconstrained"),
    ],
)
def test_invalid_rules_raise(rules, message):
    with pytest.raises(ValueError, match=message):
        jpeft.shard(TREE, mesh_of((2, 4), ("data", "fsdp")), rules)


@pytest.mark.parametrize(
    "names, message",
    [
        ({"c": {"kernel": ("embed", "mlp")}}, "names has an entry for c/kernel, which is not a leaf; .* a/kernel"),
        ({"a": {"kernel": ("embed",)}}, r"names of a/kernel: expected one per axis of shape \(8, 16\), got"),
        ({"a": {"kernel": "embed"}}, "names of a/kernel: expected one per axis"),
        ({"a": {"kernel": ("embed", "embed")}}, "a/kernel: the axis names .* name an axis twice"),
    ],
)
def test_invalid_names_raise(names, message):
    with pytest.raises(ValueError, match=message):
        jpeft.shard(TREE, mesh_of((2, 4), ("data", "fsdp")), names=names)


def test_a_mesh_axis_that_shards_no_weight_warns():
    message = "no weight is sharded over the mesh's axis 'tensor', which is 4 wide: each device along it holds them all"
    with pytest.warns(UserWarning, match=message):
        specs(TREE, mesh_of((2, 4), ("fsdp", "tensor")))
    with pytest.raises(TypeError, match="b is a float, expected an array"):
        jpeft.shard({"b": 1.0}, mesh_of((8,), ("data",)))


def test_shard_under_jit():
    mesh = mesh_of((8,), ("fsdp",))
    assert jax.jit(lambda p: jpeft.shard(p, mesh))({"w": jnp.ones((16, 8))})["w"].sharding.spec == P("fsdp")


def test_a_batch_that_does_not_divide_raises():
    with pytest.raises(ValueError, match=r"the batch's \['ids'\] of shape \(6, 4\): 6 does not divide over .* 4 wide"):
        jpeft.shard_batch({"ids": np.ones((6, 4))}, mesh_of((2, 2), ("data", "fsdp")))
    spec = batch_shardings(np.ones((8, 4)), mesh_of((2, 2, 2), ("data", "fsdp", "sequence"))).spec
    assert spec == P(("data", "fsdp"), "sequence")


def test_numpy_arrays_are_moved_shard_by_shard_and_explicit_meshes_become_automatic():
    mesh = mesh_of((8,), ("fsdp",))
    assert mesh.axis_types == (AxisType.Explicit,)
    placed = jpeft.shard({"w": np.arange(64.0, dtype=np.float32).reshape(8, 8)}, mesh)["w"]
    assert placed.sharding.mesh.axis_types == (AxisType.Auto,)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(1, 8)}
    np.testing.assert_array_equal(placed, np.arange(64).reshape(8, 8))
    abstract = jpeft.shard({"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}, mesh)["w"]
    assert isinstance(abstract, jax.ShapeDtypeStruct) and abstract.sharding == placed.sharding


# --- the step ---------------------------------------------------------------------------------------------------------


class Foreign(nn.Module):
    """A model without logical names, with a convolution over tokens and Flax's attention."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(64, 32)(ids)
        x = x + nn.Conv(32, (3,))(nn.LayerNorm()(x))
        heads = nn.DenseGeneral((4, 8))(x)
        x = x + nn.DenseGeneral(32, axis=(-2, -1))(nn.silu(heads))
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
        return nn.Dense(64)(x)


def decoder():
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
    )
    model = Decoder(config)
    ids = RNG.integers(0, 64, (8, 17)).astype(np.int32)
    inputs, places = ids[:, :-1], np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
    batch = conversations.Batch(inputs, np.ones_like(inputs), places, ids[:, 1:], np.ones((8, 16), np.float32))
    return model, chat.example_inputs(), chat.balanced(batch), chat.loss_fn, models.logical_names(model)


def bert():
    config = BertConfig(
        vocab_size=60,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        intermediate_size=128,
        max_position_embeddings=40,
    )
    encoder = Bert(config)
    batch = {"ids": RNG.integers(1, 60, (8, 16)), "mask": np.ones((8, 16), int), "labels": RNG.integers(0, 3, 8)}

    def loss_fn(peft):
        def loss(adapter, params, batch, rng):
            logits = peft.apply(params, adapter, batch["ids"], batch["mask"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean(), {}

        return loss

    names = {"encoder": models.logical_names(encoder)}
    return classification.Classifier(encoder, 3), classification.example_inputs(), batch, loss_fn, names


def foreign():
    ids = RNG.integers(0, 64, (8, 16))

    def loss_fn(peft):
        def loss(adapter, params, batch, rng):
            logits = peft.apply(params, adapter, batch)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch).mean(), {}

        return loss

    return Foreign(), (jax.ShapeDtypeStruct((2, 16), jnp.int32),), ids, loss_fn, None


def trained(kind, method, base, batch, steps=2):
    """The adapter and the losses after some steps."""
    model, inputs, _, loss_fn, _ = kind
    peft = method.bind(model, base, *inputs)
    state = jpeft.TrainState.create(peft, peft.init(jax.random.key(1), base), TX, jax.random.key(2))
    step, losses = jpeft.train_step(peft, loss_fn(peft), TX), []
    before = jax.tree.map(lambda x: x.sharding, state)
    for _ in range(steps):
        state, metrics = step(state, base, batch)
        losses.append(float(metrics["loss"]))
    assert jax.tree.map(lambda x: x.sharding, state) == before
    return jax.device_get(state.adapter), losses


CUBE = (2, 2, 2)
DEFAULT = (decoder, "lora", None, CUBE)
# Every model with every method, over full and quantized weights, on the cube; LoRA also along each axis alone.
EXHAUSTIVE = [
    (decoder, "prefix", None, CUBE),
    (decoder, "bottleneck", None, CUBE),
    (bert, "prefix", None, CUBE),
    (bert, "bottleneck", None, CUBE),
    (foreign, "prefix", None, CUBE),
    (foreign, "bottleneck, at a module", None, CUBE),
    *((kind, "lora", "nf4", CUBE) for kind in (decoder, bert, foreign)),
    *((decoder, "lora", None, dims) for dims in ((8, 1, 1), (1, 8, 1), (1, 1, 8))),
    (bert, "lora", None, (1, 1, 8)),
    (foreign, "lora", None, (1, 8, 1)),
]
CASES = [DEFAULT, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in EXHAUSTIVE)]


@functools.cache
def on_one_device(kind, method, scheme):
    """A model and its like, its parameters, and the adapter and the losses of some steps on one device."""
    kind = kind()
    model, inputs, batch, _, _ = kind
    example = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
    base = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), *example)["params"])
    if scheme is not None:
        base = jpeft.quantize(base, scheme, block=8)
    return kind, base, *trained(kind, METHODS[method], base, batch)


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.filterwarnings("ignore:no weight is sharded over the mesh's axis")  # Foreign names no axes
@pytest.mark.parametrize("kind, method, scheme, dims", CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_step_on_a_mesh_equals_that_on_one_device(kind, method, scheme, dims, request):
    kind, base, adapter, losses = on_one_device(kind, method, scheme)
    _, _, batch, _, names = kind
    meshes = MESHES if dims == CUBE and request.config.getoption("--all-meshes") else [dims]
    for mesh in map(mesh_of, meshes):
        placed = jpeft.shard(base, mesh, names=names)
        got, got_losses = trained(kind, METHODS[method], placed, jpeft.shard_batch(batch, mesh))
        np.testing.assert_allclose(got_losses, losses, rtol=1e-5, err_msg=str(mesh))
        for path, leaf in flatten(adapter).items():
            np.testing.assert_allclose(flatten(got)[path], leaf, atol=1e-5, rtol=1e-5, err_msg=f"{mesh} {join(path)}")


def abstract_base(model):
    return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"])


def test_an_abstract_state_has_the_shardings_of_a_concrete_one():
    model, inputs, _, _, names = decoder()
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_base(model))
    base = jpeft.shard(zeros, mesh_of((2, 2, 2)), names=names)
    peft = METHODS["lora"].bind(model, base, *inputs)
    shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), base)
    real, planned = (
        jpeft.TrainState.create(peft, peft.init(jax.random.key(1), params), TX, jax.random.key(2))
        for params in (base, shape)
    )

    def about(x):
        return x.shape, x.dtype, x.sharding

    assert jax.tree.map(about, real) == jax.tree.map(about, planned)


def test_chunks_of_the_loss_have_more_tokens_on_more_devices():
    """Each chunk gathers a sharded head, so their number must not grow with the mesh."""
    model, inputs, _, _, _ = decoder()
    base = abstract_base(model)
    peft = METHODS["lora"].bind(model, base, *inputs)
    adapter = jax.eval_shape(lambda: peft.init(jax.random.key(0), base))
    ids = jax.ShapeDtypeStruct((64, 64), jnp.int32)

    def chunks(mesh):
        batch = conversations.Batch(ids, ids, ids, ids, jax.ShapeDtypeStruct(ids.shape, jnp.float32))
        jaxpr = jax.make_jaxpr(chat.loss_fn(peft, mesh=mesh))(adapter, base, batch, jax.random.key(0))
        return [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"][-1]

    assert [chunks(None), chunks(mesh_of((1, 2, 4))), chunks(mesh_of((2, 2, 2)))] == [4, 2, 1]


def test_collectives_gather_weights_and_reduce_gradients_of_the_adapter_only():
    """No activation is gathered, and no other gradient is computed."""
    model, inputs, batch, loss_fn, names = decoder()
    mesh = mesh_of((1, 8, 1))
    base = jpeft.shard(abstract_base(model), mesh, names=names)
    peft = METHODS["lora"].bind(model, base, *inputs)
    state = jpeft.TrainState.create(peft, peft.init(jax.random.key(1), base), TX, jax.random.key(2))
    step = jpeft.train_step(peft, loss_fn(peft), TX)
    text = step.lower(state, base, jpeft.shard_batch(batch, mesh)).compile().as_text()
    found = re.findall(r"= (\S+|\(.*?\)) (all-gather|all-reduce|reduce-scatter)(?:-start)?\(", text)
    shapes = [
        (kind, tuple(map(int, shape.split(","))))
        for out, kind in found
        for shape in re.findall(r"f32\[([\d,]+)\]", out)
    ]
    gathered, added = (
        {shape for what, shape in shapes if (what == "all-gather") is gathering} for gathering in (True, False)
    )
    assert {(64, 64), (64, 128), (128, 64)} <= gathered and not {shape for shape in gathered if shape[:1] == (8,)}
    assert added and all(4 in shape for shape in added), added  # the rank
