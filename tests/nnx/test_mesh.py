"""NNX models on meshes: an adapter lies as its weights do, trains as on one device, and moves to other meshes."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.core.tree import flatten, join
from jpeft.training import checkpoint
from tests.contract import close
from tests.nnx.models import rngs
from tests.zoo import numbers, same

pytestmark = pytest.mark.usefixtures("standard_promotion")  # for optax
RANK = 3  # no other axis has this length
UNNAMED = {nnx.PARTITION_NAME: None}  # the axis of the stacked layers


def named(*names):
    return {"out_sharding": names, "eager_sharding": False}


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(16, 32, rngs=rngs, kernel_metadata=named("fsdp", "tensor"))
        self.down = nnx.Param(jax.random.normal(rngs.params(), (32, 16)) * 0.1, **named("tensor", "fsdp"))

    def __call__(self, x):
        return x + jnp.tanh(self.up(x)) @ self.down[...]


class Net(nnx.Module):
    """Weights of more than two axes, and stacked layers with a raw weight that a scan runs."""

    def __init__(self, rngs):
        self.q = nnx.LinearGeneral(16, (4, 4), rngs=rngs, kernel_metadata=named("fsdp", "tensor", None))
        self.o = nnx.LinearGeneral((4, 4), 16, axis=(-2, -1), rngs=rngs, kernel_metadata=named("tensor", None, "fsdp"))
        make = nnx.vmap(Layer, in_axes=0, out_axes=0, transform_metadata=UNNAMED)
        self.layers = nnx.split_rngs(splits=2)(make)(rngs)

    def __call__(self, x):
        x = x + self.o(jnp.tanh(self.q(x)))
        run = nnx.remat(lambda x, layer: layer(x))
        return nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, transform_metadata=UNNAMED)(x, self.layers)


def by_hand(adapter, params, x):
    """`Net` with LoRA as one would write it into the model."""

    def change(x, own, prefix=""):
        return (x @ own[f"{prefix}lora_a"]) @ own[f"{prefix}lora_b"]

    heads = jnp.einsum("btd,dnh->btnh", x, params["q"]["kernel"]) + params["q"]["bias"]
    heads = jnp.tanh(heads + change(x, adapter["q"]).reshape(heads.shape))
    out = jnp.einsum("btnh,nhd->btd", heads, params["o"]["kernel"]) + params["o"]["bias"]
    x = x + out + change(heads.reshape(x.shape), adapter["o"])

    def run(x, layer):
        params, own = layer
        hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"] + change(x, own["up"]))
        return x + hidden @ params["down"] + change(hidden, own, "down_"), None

    return jax.lax.scan(jax.checkpoint(run), x, (params["layers"], adapter["layers"]))[0]


X = np.random.default_rng(0).normal(size=(4, 6, 16)).astype(np.float32)
LORA, DORA = (method(rank=RANK, alpha=RANK, targets=r".*") for method in (jpeft.LoRA, jpeft.DoRA))
TX = optax.adam(1e-2)


def mesh_of(*dims):
    return jax.make_mesh(dims, ("fsdp", "tensor"), devices=jax.devices()[: np.prod(dims)])


@functools.cache
def on_one_device():
    """``(model, peft, adapter)``."""
    model = Net(rngs())
    peft = LORA.bind(model, X)
    return model, peft, numbers(jax.eval_shape(lambda: peft.init(jax.random.key(0), model)), 0.1, 1)


# --- where leaves lie -------------------------------------------------------------------------------------------------

SPECS = {
    "q/lora_a": ("fsdp", None),
    "q/lora_b": (None, "tensor"),
    "o/lora_a": ("tensor", None),
    "o/lora_b": (None, "fsdp"),
    "layers/up/lora_a": (None, "fsdp", None),
    "layers/up/lora_b": (None, None, "tensor"),
    "layers/down_lora_a": (None, "tensor", None),
    "layers/down_lora_b": (None, None, "fsdp"),
}
VECTORS = {
    "q/dora_m": ("tensor",),
    "o/dora_m": ("fsdp",),
    "layers/up/dora_m": (None, "tensor"),
    "layers/down_dora_m": (None, "fsdp"),
}


def trimmed(entries):
    return P(*(entries[:-1] if entries[-1] is None else entries))


@pytest.mark.parametrize("method, specs", [(LORA, SPECS), (DORA, SPECS | VECTORS)], ids=["LoRA", "DoRA"])
def test_leaves_and_their_metadata_lie_as_the_weights_do(method, specs):
    model = Net(rngs())
    peft = method.bind(model, X)
    base = jpeft.shard(model, mesh_of(2, 2))
    assert base.layers.down.get_raw_value().sharding.spec == P(None, "tensor", "fsdp")
    tuned, _ = jpeft.nnx.attach(base, peft, rngs=rngs())
    for adapter in (peft.init(jax.random.key(0), nnx.state(base, nnx.Param)), peft.adapter(tuned)):
        found = {join(path): leaf.sharding.spec for path, leaf in flatten(adapter).items()}
        assert found == {name: trimmed(spec) for name, spec in specs.items()}
    state = nnx.to_flat_state(nnx.state(tuned, nnx.LoRAParam))
    assert {"/".join(map(str, path)): v.get_metadata("out_sharding") for path, v in state} == specs
    # What flax makes of the metadata is where they lie.
    shardings = nnx.get_partition_spec(nnx.state(tuned, nnx.LoRAParam))
    assert {"/".join(map(str, path)): v.get_raw_value() for path, v in nnx.to_flat_state(shardings)} == {
        name: P(*spec) for name, spec in specs.items()
    }


# --- what devices exchange --------------------------------------------------------------------------------------------


def exchanged(loss, *args):
    """How often a gradient's program has each collective."""
    text = jax.jit(jax.grad(loss)).lower(*args).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (\S+|\(.*?\)) ({kinds})(?:-start)?\(", text)
    return Counter(kind for out, kind in found for _ in re.findall(r"f32\[[\d,]*\]", out))


@pytest.mark.parametrize("split", [False, True], ids=["whole batch", "split batch"])
def test_an_adapter_adds_no_exchange_of_weights_or_activations(split):
    model, peft, adapter = on_one_device()
    mesh = mesh_of(2, 2)
    base, x = jpeft.shard(model, mesh), jpeft.shard_batch(X, mesh) if split else X
    params = nnx.state(base, nnx.Param)
    fresh = peft.init(jax.random.key(0), params)
    adapter = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), adapter, fresh)
    tuned, _ = jpeft.nnx.attach(base, peft, rngs=rngs(), adapter=adapter)
    graphdef, (definition, trained, rest) = nnx.graphdef(model), nnx.split(tuned, nnx.LoRAParam, ...)

    def plain(x, params):
        return jnp.sin(nnx.merge(graphdef, nnx.clone(params))(x)).sum()

    def functional(adapter, params, x):
        return jnp.sin(peft.apply(params, adapter, x)).sum()

    def stateful(trained, rest, x):
        return jnp.sin(nnx.merge(definition, trained, nnx.clone(rest))(x)).sum()

    def written(adapter, params, x):
        return jnp.sin(by_hand(adapter, params, x)).sum()

    ours = exchanged(functional, adapter, params, x)
    assert exchanged(stateful, trained, rest, x) == ours
    close(jax.jit(functional)(adapter, params, x), jax.jit(written)(adapter, nnx.to_pure_dict(params), x))
    own = exchanged(written, adapter, nnx.to_pure_dict(params), x)
    assert ours <= own, (ours, own)  # of no kind more
    if not split:
        assert set(ours) == set(exchanged(plain, X, params)) == {"all-reduce"}


# --- training, and other meshes ---------------------------------------------------------------------------------------


def state_on(mesh):
    """The parameters on a mesh, and a fresh training state beside them."""
    model, peft, _ = on_one_device()
    params = nnx.state(model, nnx.Param)
    params = params if mesh is None else jpeft.shard(params, mesh)
    return params, jpeft.TrainState.create(peft, peft.init(jax.random.key(2), params), TX, jax.random.key(3))


def loss_fn(adapter, params, batch, rng):
    _, peft, _ = on_one_device()
    return ((peft.apply(params, adapter, batch) - 1.0) ** 2).mean(), {}


@functools.cache
def trained(dims):
    """A training state after two steps on a mesh, or on one device."""
    _, peft, _ = on_one_device()
    mesh = None if dims is None else mesh_of(*dims)
    params, state = state_on(mesh)
    batch, step = X if mesh is None else jpeft.shard_batch(X, mesh), jpeft.train_step(peft, loss_fn, TX)
    before = jax.tree.map(lambda x: x.sharding, state)
    for _ in range(2):
        state, _ = step(state, params, batch)
    assert jax.tree.map(lambda x: x.sharding, state) == before
    return state


@pytest.mark.usefixtures("quick_compiles")
def test_steps_on_a_mesh_are_those_of_one_device():
    model, peft, _ = on_one_device()
    want = flatten(trained(None).adapter)
    for path, leaf in flatten(trained((2, 2)).adapter).items():
        close(leaf, want[path])

    base = jpeft.shard(model, mesh_of(2, 2))
    start = peft.init(jax.random.key(2), base)
    tuned, _ = jpeft.nnx.attach(base, peft, rngs=rngs(), adapter=start)
    optimizer = nnx.Optimizer(tuned, TX, wrt=jpeft.nnx.AdapterParam)

    @nnx.jit
    def step(tuned, optimizer, x):
        grads = nnx.grad(lambda m: ((m(x) - 1.0) ** 2).mean(), argnums=nnx.DiffState(0, jpeft.nnx.AdapterParam))(tuned)
        optimizer.update(tuned, grads)

    for _ in range(2):
        step(tuned, optimizer, jpeft.shard_batch(X, mesh_of(2, 2)))
    for path, leaf in flatten(peft.adapter(tuned)).items():
        close(leaf, want[path])
        assert leaf.sharding == flatten(start)[path].sharding
    moments = [v.get_raw_value() for _, v in nnx.to_flat_state(nnx.state(optimizer, nnx.optimizer.OptState))]
    assert {P(None, "fsdp"), P(None, None, "tensor")} <= {x.sharding.spec for x in moments if x.ndim}


ELSEWHERE = {"4 x 1": (4, 1), "one device": None}


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("dims", ELSEWHERE.values(), ids=ELSEWHERE)
@pytest.mark.filterwarnings("ignore:no weight is sharded over the mesh's axis")
def test_adapters_and_checkpoints_come_back_on_another_mesh(dims, tmp_path):
    model, peft, _ = on_one_device()
    state = trained((2, 2))
    jpeft.save(tmp_path / "adapter", peft, state.adapter, jpeft.shard(model, mesh_of(2, 2)))
    with checkpoint.open_checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoint.save(checkpoints, 2, state, {})

    mesh = None if dims is None else mesh_of(*dims)
    other = model if mesh is None else jpeft.shard(model, mesh)
    again, loaded = jpeft.load(tmp_path / "adapter", other, X)
    params, like = state_on(mesh)
    with checkpoint.open_checkpoints(tmp_path / "checkpoints") as checkpoints:
        restored, _ = checkpoint.restore(checkpoints, like)
    assert again == peft
    for adapter in (loaded, restored.adapter):
        same(adapter, state.adapter)
        assert jax.tree.map(lambda x: x.sharding, adapter) == jax.tree.map(lambda x: x.sharding, like.adapter)
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, state.opt_state)
    tuned, _ = jpeft.nnx.attach(other, peft, rngs=rngs(), adapter=loaded)
    close(nnx.jit(lambda m, x: m(x))(tuned, X), peft.apply(params, restored.adapter, X))
