"""`jpeft.shard`, and a training step over what it gives: on 8 devices as on one, for every mesh."""

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
from jpeft.core.tree import flatten, join
from jpeft.models.bert import Bert, BertConfig
from jpeft.models.decoder import Decoder, DecoderConfig
from jpeft.parallel.batches import batch_shardings
from jpeft.parallel.rules import param_shardings
from jpeft.recipes.tasks import chat, classification
from jpeft.text import conversations

MESHES = [(data, fsdp, tensor) for data in (1, 2, 4, 8) for fsdp in (1, 2, 4, 8) for tensor in (1, 2, 4, 8)
          if data * fsdp * tensor == 8]  # fmt: skip
METHODS = {
    "lora": jpeft.LoRA(rank=4, targets="all-linear", init_weights="random"),
    "prefix": jpeft.PrefixTuning(length=3),
    "bottleneck": jpeft.Bottleneck(),
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


def test_without_rules_or_names_the_longer_side_of_matrices_is_spread_and_nothing_else():
    assert specs(TREE, mesh_of((2, 4), ("data", "fsdp"))) == {
        "a/kernel": P(None, "fsdp"), "a/bias": P(), "b/kernel": P(None, "fsdp"), "scale": P()
    }  # fmt: skip
    assert set(specs(TREE, mesh_of((8,), ("data",))).values()) == {P()}


def test_of_rules_for_paths_the_first_that_matches_counts():
    rules = [("a/.*", P("data")), (".*/kernel", P(None, "fsdp"))]
    assert specs(TREE, mesh_of((2, 4), ("data", "fsdp")), rules) == {
        "a/kernel": P("data"), "a/bias": P("data"), "b/kernel": P(None, "fsdp"), "scale": P()
    }  # fmt: skip


def test_names_of_axes_come_from_boxes_or_from_the_caller():
    mesh, boxed = mesh_of((2, 4), ("fsdp", "tensor")), {"w": nn.Partitioned(jnp.ones((8, 4)), ("embed", "mlp"))}
    rules = [("mlp", "tensor"), ("embed", ("fsdp",))]
    assert param_shardings(boxed, mesh, rules)["w"].value.spec == P(("fsdp",), "tensor")
    assert param_shardings(boxed, mesh)["w"].value.spec == P("fsdp", "tensor")  # LOGICAL_RULES
    placed = jpeft.shard(boxed, mesh)["w"]
    assert isinstance(placed, nn.Partitioned) and placed.value.sharding.spec == P("fsdp", "tensor")
    assert specs({"w": np.ones((8, 4))}, mesh, rules, names={"w": ("embed", "mlp")}) == {"w": P(("fsdp",), "tensor")}
    both = [("w", P(None, "fsdp")), *rules]
    assert param_shardings(boxed, mesh, both)["w"].value.spec == P(None, "fsdp")


@pytest.mark.parametrize("rules, said", [
    ([("c/.*", P("fsdp"))], "the rule 'c/.*' matches no leaf; there are a/kernel, a/bias"),
    ([("a/kernel", P("model"))], r"the rule for 'a/kernel' names the axis 'model'; the mesh has \('data', 'fsdp'\)"),
    ([("b/kernel", P("fsdp"))], r"b/kernel: an axis of 3 does not divide over 'fsdp', which is 4 wide"),
    ([("a/bias", P(None, "fsdp"))], r"a/bias: shape \(16,\) has fewer axes than its rule"),
    ([("embed", "fsdp")], "the rule for 'embed' matches nothing: no axis of the tree has a name"),
    ([(".*/kernel", (None, "fsdp"))], "a rule for paths gives a PartitionSpec"),
    ([("(", P())], "the rule '\\(' is no regular expression"),
    (["a/kernel"], "a rule is a pair"),
    ({".*": P()}, "rules are a list of pairs"),
    ([("a/kernel", P("fsdp", "fsdp"))], "a/kernel: .* names an axis of the mesh twice"),
    ([("a/kernel", P(P.UNCONSTRAINED, "fsdp"))], "a/kernel: .* leaves an axis open"),
])  # fmt: skip
def test_a_rule_that_does_not_fit_is_told(rules, said):
    with pytest.raises(ValueError, match=said):
        jpeft.shard(TREE, mesh_of((2, 4), ("data", "fsdp")), rules)


@pytest.mark.parametrize("names, said", [
    ({"c": {"kernel": ("embed", "mlp")}}, "names are given for c/kernel, which is no leaf; there are a/kernel"),
    ({"a": {"kernel": ("embed",)}}, r"names of a/kernel: expected one for each axis of shape \(8, 16\), got"),
    ({"a": {"kernel": "embed"}}, "names of a/kernel: expected one for each axis"),
])  # fmt: skip
def test_names_that_do_not_fit_are_told(names, said):
    with pytest.raises(ValueError, match=said):
        jpeft.shard(TREE, mesh_of((2, 4), ("data", "fsdp")), names=names)


def test_an_axis_of_the_mesh_that_no_weight_is_spread_over_is_told():
    with pytest.warns(UserWarning, match=r"the mesh's axis 'tensor', which is 4 wide: each device along it holds all"):
        specs(TREE, mesh_of((2, 4), ("fsdp", "tensor")))
    with pytest.raises(TypeError, match="b is a float, expected an array"):
        jpeft.shard({"b": 1.0}, mesh_of((8,), ("data",)))


def test_shard_under_jit():
    mesh = mesh_of((8,), ("fsdp",))
    assert jax.jit(lambda p: jpeft.shard(p, mesh))({"w": jnp.ones((16, 8))})["w"].sharding.spec == P("fsdp")


def test_a_batch_that_does_not_divide_is_told():
    with pytest.raises(ValueError, match=r"the batch's \['ids'\] of shape \(6, 4\): 6 does not divide over .* 4 wide"):
        jpeft.shard_batch({"ids": np.ones((6, 4))}, mesh_of((2, 2), ("data", "fsdp")))
    spec = batch_shardings(np.ones((8, 4)), mesh_of((2, 2, 2), ("data", "fsdp", "sequence"))).spec
    assert spec == P(("data", "fsdp"), "sequence")


def test_numpy_arrays_go_to_devices_in_pieces_and_explicit_meshes_become_automatic():
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
    """A model that somebody else wrote: no names, an einsum, a convolution over tokens."""

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
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=64,
    )  # fmt: skip
    model = Decoder(config)
    ids = RNG.integers(0, 64, (8, 17)).astype(np.int32)
    inputs, places = ids[:, :-1], np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
    batch = conversations.Batch(inputs, np.ones_like(inputs), places, ids[:, 1:], np.ones((8, 16), np.float32))
    return model, chat.example_inputs(), chat.balanced(batch), chat.loss_fn, models.logical_names(model)


def bert():
    encoder = Bert(BertConfig(vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=8,
                              intermediate_size=128, max_position_embeddings=40))  # fmt: skip
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
    """The adapter and the losses after some steps, and the compiled step."""
    model, inputs, _, loss_fn, _ = kind
    peft = method.bind(model, base, *inputs)
    state = jpeft.TrainState.create(peft, peft.init(jax.random.key(1), base), TX, jax.random.key(2))
    step, losses = jpeft.train_step(peft, loss_fn(peft), TX), []
    text = step.lower(state, base, batch).compile().as_text()
    before = jax.tree.map(lambda x: x.sharding, state)
    for _ in range(steps):
        state, metrics = step(state, base, batch)
        losses.append(float(metrics["loss"]))
    assert jax.tree.map(lambda x: x.sharding, state) == before
    return jax.device_get(state.adapter), losses, text


CASES = [(kind, method, None) for kind in (decoder, bert, foreign) for method in METHODS]
CASES += [(kind, "lora", "nf4") for kind in (decoder, bert, foreign)]


@pytest.mark.filterwarnings("ignore:no weight is spread over the mesh's axis 'tensor'")  # Foreign names no axes
@pytest.mark.parametrize("kind, method, scheme", CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_step_on_any_mesh_is_that_on_one_device(kind, method, scheme, request):
    kind, method = kind(), METHODS[method]
    model, inputs, batch, _, names = kind
    example = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
    base = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), *example)["params"])
    if scheme is not None:
        base = jpeft.quantize(base, scheme, block=8)
    adapter, losses, _ = trained(kind, method, base, batch)
    meshes = MESHES if request.config.getoption("--all-meshes") else [(2, 2, 2)]
    for dims in meshes:
        mesh = mesh_of(dims)
        placed = jpeft.shard(base, mesh, names=names)
        got, got_losses, _ = trained(kind, method, placed, jpeft.shard_batch(batch, mesh))
        np.testing.assert_allclose(got_losses, losses, rtol=1e-5, err_msg=str(dims))
        for path, leaf in flatten(adapter).items():
            np.testing.assert_allclose(flatten(got)[path], leaf, atol=1e-5, rtol=1e-5, err_msg=f"{dims} {join(path)}")


def test_an_abstract_state_is_laid_out_as_a_real_one():
    model, inputs, _, _, names = decoder()
    base = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"])
    base = jpeft.shard(base, mesh_of((2, 2, 2)), names=names)
    peft = METHODS["lora"].bind(model, base, *inputs)
    shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), base)
    real, planned = (
        jpeft.TrainState.create(peft, peft.init(jax.random.key(1), params), TX, jax.random.key(2))
        for params in (base, shape)
    )
    about = lambda x: (x.shape, x.dtype, x.sharding)  # noqa: E731
    assert jax.tree.map(about, real) == jax.tree.map(about, planned)


def test_the_more_devices_share_a_chunk_of_the_loss_the_more_tokens_it_has():
    """For each chunk, a sharded head is gathered."""
    model, inputs, _, _, _ = decoder()
    base = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"])
    peft = METHODS["lora"].bind(model, base, *inputs)
    adapter = jax.eval_shape(lambda: peft.init(jax.random.key(0), base))
    ids = jax.ShapeDtypeStruct((64, 64), jnp.int32)

    def chunks(mesh):
        batch = conversations.Batch(ids, ids, ids, ids, jax.ShapeDtypeStruct(ids.shape, jnp.float32))
        jaxpr = jax.make_jaxpr(chat.loss_fn(peft, mesh=mesh))(adapter, base, batch, jax.random.key(0))
        return [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"][-1]

    assert [chunks(None), chunks(mesh_of((1, 2, 4))), chunks(mesh_of((2, 2, 2)))] == [4, 2, 1]


def test_what_devices_send_each_other():
    """Weights are gathered and gradients of adapters added up: no activation is gathered, no other gradient made."""
    kind = decoder()
    model, _, batch, _, names = kind
    base = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"])
    mesh = mesh_of((1, 8, 1))
    _, _, text = trained(kind, METHODS["lora"], jpeft.shard(base, mesh, names=names), jpeft.shard_batch(batch, mesh))
    found = re.findall(r"= (\S+|\(.*?\)) (all-gather|all-reduce|reduce-scatter)(?:-start)?\(", text)
    shapes = [(kind, tuple(map(int, shape.split(",")))) for out, kind in found
              for shape in re.findall(r"f32\[([\d,]+)\]", out)]  # fmt: skip
    gathered, added = (
        {shape for what, shape in shapes if (what == "all-gather") is gathering} for gathering in (True, False)
    )
    assert {(64, 64), (64, 128), (128, 64)} <= gathered and not {shape for shape in gathered if shape[:1] == (8,)}
    assert added and all(4 in shape for shape in added), added  # the rank
