"""What jpeft does with models, on NNX ones: folders, meshes, quantized bases, plans."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.core.tree import flatten
from jpeft.parallel.rules import param_shardings
from tests.contract import bound, close, differ
from tests.nnx.models import Stack, X, moved, rngs
from tests.zoo import METHODS, same

LORA = jpeft.LoRA(rank=2, targets=r".*(up|down)")


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "VeRA", "LoRA + IA3"])
def test_folders_pass_between_linen_and_nnx(name, tmp_path):
    entry = METHODS[name]
    (linen, model, params, x), (other, module, _, _) = (
        bound(entry, "dense", mode, frontend) for mode, frontend in (("scan", "linen"), ("scan over the state", "nnx"))
    )
    adapter = moved(linen, params)
    jpeft.save(tmp_path / "linen", linen, adapter, params)
    found, loaded = jpeft.load(tmp_path / "linen", module, x)
    same(loaded, adapter)
    y = linen.apply(params, adapter, x)
    close(found.apply(module, loaded, x), y)
    tuned, _ = jpeft.nnx.attach(module, found, rngs=rngs(), adapter=loaded)
    jpeft.save(tmp_path / "nnx", other, found.adapter(tuned), module)
    again, back = jpeft.load(tmp_path / "nnx", model, params, x)
    same(back, adapter)
    close(again.apply(params, back, x), y)


class Named(nnx.Module):
    """Stacked layers whose weights name their axes."""

    def __init__(self, rngs, up=("embed", "mlp"), down=("mlp", "embed")):
        def named(names):
            return {"out_sharding": names, "eager_sharding": False}

        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def make(rngs):
            return nnx.Dict(
                up=nnx.Linear(8, 16, rngs=rngs, kernel_metadata=named(up)),
                down=nnx.Linear(16, 8, rngs=rngs, kernel_metadata=named(down)),
            )

        self.embed, self.layers = nnx.Embed(32, 8, rngs=rngs), make(rngs)

    def __call__(self, ids):
        def run(x, layer):
            return x + layer.down(nnx.gelu(layer.up(x)))

        axes = {nnx.PARTITION_NAME: "layers"}
        scan = nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, transform_metadata=axes)
        return self.embed.attend(scan(self.embed(ids), self.layers))


class NamedLinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        def dense(width, names, name):
            return nn.Dense(width, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), names), name=name)

        return x + dense(8, ("mlp", "embed"), "down")(nn.gelu(dense(16, ("embed", "mlp"), "up")(x))), None


class NamedLinen(nn.Module):
    """`Named` in Linen."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(32, 8, name="embed")
        axes = {"variable_axes": {"params": 0}, "metadata_params": {nn.PARTITION_NAME: "layers"}}
        scan = nn.scan(NamedLinenLayer, length=2, split_rngs={"params": True}, **axes)
        return embed.attend(scan(name="layers")(embed(ids), None)[0])


IDS = np.arange(32).reshape(4, 8)


@pytest.mark.parametrize("names", [(("embed", "mlp"), ("mlp", "embed")), (("fsdp", "tensor"), ("tensor", "fsdp"))])
def test_axis_names_of_variables_shard_the_base_and_so_the_adapter(names):
    model, mesh = Named(rngs(), *names), jax.make_mesh((2, 2), ("fsdp", "tensor"), devices=jax.devices()[:4])
    peft = LORA.bind(model, IDS)
    for given in (model, nnx.state(model, nnx.Param)):
        placed = jpeft.shard(given, mesh)
        assert type(placed) is type(given)
        adapter = peft.init(jax.random.key(0), placed)
        assert {path[1:]: leaf.sharding.spec for path, leaf in flatten(adapter).items()} == {
            ("up", "lora_a"): P(None, "fsdp"),
            ("up", "lora_b"): P(None, None, "tensor"),
            ("down", "lora_a"): P(None, "tensor"),
            ("down", "lora_b"): P(None, None, "fsdp"),
        }
    state = nnx.state(model, nnx.Param)
    assert jax.tree.structure(param_shardings(state, mesh)) == jax.tree.structure(state)
    tuned, _ = jpeft.nnx.attach(placed if isinstance(placed, nnx.Module) else model, peft, rngs=rngs(), adapter=adapter)
    assert tuned.layers.up.lora_a.get_metadata("out_sharding") == ("layers", names[0][0], None)
    assert tuned.layers.up.lora_b.get_metadata("out_sharding") == ("layers", None, names[0][1])


def test_a_plan_of_a_step_shards_and_compares_as_on_linen():
    model = Named(rngs())
    peft, params, tx = LORA.bind(model, IDS), nnx.state(model, nnx.Param), optax.sgd(0.1)

    def functional(adapter, params, batch, rng):
        return (peft.apply(params, adapter, batch) ** 2).mean(), {}

    def by_module(adapter, params, batch, rng):
        return (peft.module(params, adapter)(batch) ** 2).mean(), {}

    state = jpeft.TrainState.create(peft, peft.init(jax.random.key(0), params), tx, jax.random.key(1))
    a, b = (
        jpeft.plan(jpeft.train_step(peft, loss_fn, tx), state, params, IDS, "cpu:4", mesh="fsdp=2,tensor=2")
        for loss_fn in (functional, by_module)
    )
    assert a.memory.arguments["adapter"] == b.memory.arguments["adapter"]
    # Every leaf is in two shards: of 2 layers, rank 2, and 8 and 16 features, twice.
    assert a.memory.arguments["adapter"] == 2 * 2 * 2 * (8 + 16) * 4 / 2
    assert a.flops == b.flops > 0
    assert a.adapter_share == b.adapter_share and 0 < a.adapter_share < 1
    # Activations keep the batch's sharding, as on Linen: XLA gathers weights, which are smaller, and not activations.
    linen = NamedLinen()
    variables = linen.init(jax.random.key(0), IDS)
    own = LORA.bind(linen, variables["params"], IDS)

    def of_linen(adapter, params, batch, rng):
        return (own.apply(params, adapter, batch) ** 2).mean(), {}

    state = jpeft.TrainState.create(own, own.init(jax.random.key(0), variables["params"]), tx, jax.random.key(1))
    step = jpeft.train_step(own, of_linen, tx)
    c = jpeft.plan(step, state, variables["params"], IDS, "cpu:4", mesh="fsdp=2,tensor=2", against_base=False)
    assert sum(x.bytes for x in a.collectives) <= 1.1 * sum(x.bytes for x in c.collectives)


def test_loftq_of_states_and_modules():
    model = Stack(rngs(), "nnx.scan")
    peft = LORA.bind(model, X)
    state, adapter = jpeft.quantization.loftq(peft, nnx.state(model, nnx.Param), jax.random.key(0), block=8)
    module, other = jpeft.quantization.loftq(peft, model, jax.random.key(0), block=8)
    assert isinstance(state, nnx.State) and type(module) is not nnx.State
    same(adapter, other)
    y, plain = peft.apply(state, adapter, X), peft.apply(state, jax.tree.map(jnp.zeros_like, adapter), X)
    close(peft.apply(module, other, X), y)
    assert np.abs(y - model(X)).mean() < np.abs(plain - model(X)).mean()


def test_generation_of_jpeft_is_for_its_decoders():
    model = Named(rngs())
    with pytest.raises(TypeError, match=r"a decoder of jpeft\.models, got Named; .*peft\.module\(params, adapter\)"):
        jpeft.generate(model, nnx.state(model, nnx.Param), [[1, 2]])


@pytest.mark.usefixtures("standard_promotion")  # for optax
def test_train_step_gives_what_nnx_optimizer_gives():
    model = Stack(rngs(), "nnx.scan, remat")
    peft, params, tx = LORA.bind(model, X), nnx.state(model, nnx.Param), optax.adam(1e-2)
    start = moved(peft, model)

    def loss_fn(adapter, params, batch, rng):
        return (peft.apply(params, adapter, batch) ** 2).mean(), {}

    step = jpeft.train_step(peft, loss_fn, tx)
    state = jpeft.TrainState.create(peft, jax.tree.map(jnp.array, start), tx, jax.random.key(0))
    tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=start)
    optimizer = nnx.Optimizer(tuned, tx, wrt=jpeft.nnx.AdapterParam)

    @nnx.jit
    def train(tuned, optimizer):
        trained = nnx.DiffState(0, jpeft.nnx.AdapterParam)
        optimizer.update(tuned, nnx.grad(lambda tuned: (tuned(X) ** 2).mean(), argnums=trained)(tuned))

    for _ in range(3):
        state, _ = step(state, params, X)
        train(tuned, optimizer)
    own, other = flatten(state.adapter), flatten(peft.adapter(tuned))
    for path, leaf in own.items():
        close(leaf, other[path])
        assert differ(leaf, flatten(start)[path])
