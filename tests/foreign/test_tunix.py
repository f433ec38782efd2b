"""Third-party NNX models, unchanged: those of tunix, from its wheel on PyPI. Run by .ci/run.

The wheel is not installed: its trainers need libraries that its models do not. MaxText is not on PyPI, and bonsai's
wheel there is empty; layers that are stacked as MaxText stacks them are in tests/nnx/models.py.
"""

import functools
import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

import jpeft
from jpeft import qwix as exchange
from jpeft.core.tree import flatten
from jpeft.recipes import assets
from tests.contract import close, differ
from tests.zoo import numbers, same

# tunix promotes dtypes; it and qwix use what flax deprecates, as `value` and `sharding` of Variables.
pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore:'sharding' is deprecated:DeprecationWarning"),
    *(pytest.mark.filterwarnings(f"ignore::DeprecationWarning:{name}") for name in ("tunix", "qwix")),
]
WHEEL = assets.Asset(
    package="google-tunix",
    version="0.1.7",
    sha256="857b893b8ba71a61cce8cb9de2301218d311f72044de94aa2b826275968033b4",
    megabytes=1,
    inside="tunix",
)


@pytest.fixture(scope="module")
def tunix():
    """Imports a module of tunix by its name, without what the package imports."""
    package = types.ModuleType("tunix")
    package.__path__ = [str(assets.fetch("tunix", WHEEL))]
    sys.modules["tunix"] = package
    yield lambda name: importlib.import_module(f"tunix.{name}")
    for name in [name for name in sys.modules if name.split(".")[0] == "tunix"]:
        del sys.modules[name]


@dataclass(frozen=True)
class Foreign:
    """A model of tunix.

    Attributes:
      family: the module that has it.
      model: its class.
      fields: a tiny configuration, from the module.
      remat: what is computed again.
      boxed: the weights that it reads in ways that no fused product has.
    """

    family: str
    model: str
    fields: Callable[[Any], dict[str, Any]]
    remat: str = "NONE"
    boxed: tuple[str, ...] = ()

    def make(self, tunix):
        module = tunix(f"models.{self.family}.model")
        sizes = {"num_layers": 1, "embed_dim": 16, "hidden_dim": 32, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
        fields = {**sizes, "remat_config": module.RematConfig[self.remat], **self.fields(module)}
        config = module.ModelConfig(**fields)
        # Abstract, and numbers from numpy: compiling their initializers takes longer than the model.
        model = nnx.eval_shape(lambda: getattr(module, self.model)(config, rngs=nnx.Rngs(0)))
        state, rest = nnx.split(model, nnx.Param, ...)[1:]
        assert not jax.tree.leaves(rest)
        nnx.update(model, drawn(state, 0.3))
        return model


def drawn(shapes, scale, seed=0):
    """Normal numbers; those in vectors, which scale, are about one."""
    return jax.tree.map(lambda x: x + 1 if x.ndim == 1 else x, numbers(shapes, scale, seed))


def rope(**more):
    return lambda module: {"vocab_size": 24, "rope_theta": 10000, "norm_eps": 1e-6, **more}


def gemma(**more):
    """A Gemma with layers of the kinds ``types``: L(ocal) and G(lobal)."""

    def fields(module):
        own, kinds = dict(more), module.AttentionType
        names = [{"L": kinds.LOCAL_SLIDING, "G": kinds.GLOBAL}[kind] for kind in own.pop("types", "")]
        if names:
            own |= {"num_layers": len(names), own.pop("name", "attention_types"): tuple(names)}
        return {"num_embed": 24, "sliding_window_size": 4, **own}

    return fields


NORMS = {"use_post_attn_norm": True, "use_post_ffw_norm": True, "final_logit_softcap": 30.0}
PLAIN = {"use_post_attn_norm": False, "use_post_ffw_norm": False, "final_logit_softcap": None}
FOUR = {"name": "attention_pattern", "global_key_size": 8}
MOE = {"enable_moe": True, "num_experts": 4, "num_experts_per_tok": 2, "expert_dim": 12, "moe_dense_hidden_dim": 20}
MODELS = {
    "Qwen3": Foreign("qwen3", "Qwen3", rope(use_tied_embedding=True), "BLOCK"),
    "Qwen3, own head": Foreign("qwen3", "Qwen3", rope()),
    "Qwen3, experts": Foreign("qwen3", "Qwen3", rope(num_experts=4, num_experts_per_tok=2), "DECODER"),
    "Qwen2": Foreign("qwen2", "Qwen2", rope(), "BLOCK"),
    "Llama3": Foreign("llama3", "Llama3", rope(weight_tying=True)),
    "Gemma": Foreign("gemma", "Gemma", gemma(types="G", num_kv_heads=4, **PLAIN), "DECODER"),
    "Gemma2": Foreign("gemma", "Gemma", gemma(types="LG", attn_logits_soft_cap=50.0, **NORMS), "BLOCK"),
    "Gemma3": Foreign("gemma3", "Gemma3", gemma(param_dtype=jnp.float32), "BLOCK"),
    "Gemma4": Foreign(
        "gemma4", "Gemma4", gemma(types="LGLG", per_layer_input_dim=4, frac_shared_layers=0.5, **FOUR),
        boxed=("embedder/per_layer_input_embedding", "embedder/per_layer_model_projection"),
    ),
    "Gemma4, experts": Foreign(
        "gemma4", "Gemma4", gemma(types="G", **FOUR, **MOE),
        boxed=("layers/0/moe/gating_einsum", "layers/0/moe/linear"),
    ),
}  # fmt: skip
NAMES = ["Qwen3", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in MODELS if name != "Qwen3")]

IDS = np.random.default_rng(0).integers(1, 24, (2, 6)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(6, dtype=np.int32), IDS.shape)
MASK = np.broadcast_to(np.tril(np.ones((6, 6), bool)), (2, 6, 6))
INPUTS = IDS, POSITIONS, None, MASK  # tokens, positions, cache, mask
METHODS = {
    "Chain": jpeft.Chain(
        jpeft.LoRA(rank=2, targets=r".*"), jpeft.IA3(targets=r".*proj|.*einsum"), jpeft.Train(r".*final_norm.*")
    ),
    "Bottleneck": jpeft.Bottleneck(targets=r".*/(attn|mlp)", reduction=4),
}


def moved(peft, model):
    """An adapter away from its start."""
    return drawn(jax.eval_shape(lambda: peft.init(jax.random.key(0), model)), 0.2, 1)


def loss_of(y):
    return jnp.sin(y).sum()


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("name", NAMES)
def test_a_model_runs_unchanged_under_every_form_of_a_method(name, tunix):
    case = MODELS[name]
    model = case.make(tunix)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    params, pefts = nnx.state(model, nnx.Param), {name: m.bind(model, *INPUTS) for name, m in METHODS.items()}
    for peft in pefts.values():
        found = {site.name: site.via for site in peft.sites if site.kind != "leaf"}
        assert found == {name: "box" if name in case.boxed else "fused" for name in found}
    assert "embedder/input_embedding" in {site.name for site in pefts["Chain"].sites}
    adapters = {name: moved(peft, model) for name, peft in pefts.items()}

    @jax.jit
    def functional(params, adapters):
        def loss(peft, adapter):
            y = peft.apply(params, adapter, *INPUTS)[0]
            return loss_of(y), y

        return {n: jax.grad(lambda a, n=n: loss(pefts[n], a), has_aux=True)(own) for n, own in adapters.items()}

    @nnx.jit
    def stateful(tuned):
        def loss(model):
            y = model(*INPUTS)[0]
            return loss_of(y), y

        trained = nnx.DiffState(0, nnx.LoRAParam)
        return {name: nnx.grad(loss, argnums=trained, has_aux=True)(own) for name, own in tuned.items()}

    plain = nnx.jit(lambda model: model(*INPUTS)[0])
    tuned = {n: jpeft.nnx.attach(model, p, rngs=nnx.Rngs(0), adapter=adapters[n])[0] for n, p in pefts.items()}
    of_functions, of_modules, without = functional(params, adapters), stateful(tuned), plain(model)
    for name, peft in pefts.items():
        (grads, y), (found, z) = of_functions[name], of_modules[name]
        assert differ(y, without)
        if peft.mergeable:
            close(y, plain(peft.merge(model, adapters[name])), 3e-6, name)
        np.testing.assert_array_equal(z, y)
        found = {tuple(map(str, path)): v.get_raw_value() for path, v in nnx.to_flat_state(found)}
        assert found.keys() == flatten(grads).keys()
        for path, grad in flatten(grads).items():
            np.testing.assert_array_equal(found[path], grad)
            assert np.abs(grad).max() > 0, (name, path)
        same(peft.adapter(tuned[name]), adapters[name])
        assert type(tuned[name]).__name__ == type(model).__name__ and isinstance(tuned[name], type(model))
    np.testing.assert_array_equal(plain(pefts["Bottleneck"].detach(tuned["Bottleneck"])), without)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def cache_of(model, length):
    """tunix's cache: of the model itself, or as tunix's sampler makes it for models that have none."""
    if hasattr(model, "init_cache"):
        return model.init_cache(len(IDS), length, jnp.float32)
    config = model.config
    shape = len(IDS), length, config.num_kv_heads, config.head_dim
    return {
        f"layer_{i}": {"k": jnp.zeros(shape), "v": jnp.zeros(shape), "end_index": jnp.zeros(len(IDS), jnp.int32)}
        for i in range(config.num_layers)
    }


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("name", NAMES)
def test_decoding_under_an_adapter_equals_one_call(name, tunix):
    model = MODELS[name].make(tunix)
    peft = METHODS["Chain"].bind(model, *INPUTS)
    adapter, params = moved(peft, model), nnx.state(model, nnx.Param)
    tuned, _ = jpeft.nnx.attach(model, peft, rngs=nnx.Rngs(0), adapter=adapter)
    whole, _ = nnx.jit(lambda model: model(*INPUTS))(tuned)
    steps = [functools.partial(nnx.jit(lambda model, *step: model(*step)), tuned)]
    if name == "Qwen3":
        steps.append(functools.partial(jax.jit(peft.apply), params, adapter))
    for step in steps:
        cache, outputs = cache_of(model, IDS.shape[1]), []
        for i in range(IDS.shape[1]):
            y, cache = step(IDS[:, i : i + 1], POSITIONS[:, i : i + 1], cache, MASK[:, i : i + 1])
            outputs.append(y)
        close(jnp.concatenate(outputs, 1), whole)


def of_qwix(model, provider):
    """A copy of the model with the LoRA of qwix, as tunix makes it, away from its start."""
    theirs = qwix.apply_lora_to_model(model, provider, **model.get_model_input(), rngs=nnx.Rngs(3))
    state = nnx.state(theirs, nnx.LoRAParam)
    nnx.update(theirs, numbers(state, 0.2, 1))
    return theirs


@pytest.mark.usefixtures("quick_compiles")
def test_an_adapter_of_qwix_is_the_same_here_and_back(tunix):
    case = MODELS["Qwen3"]
    model = case.make(tunix)
    provider = qwix.LoraProvider(module_path=r".*(q_proj|v_proj|o_proj|gate_proj|down_proj)", rank=2, alpha=6.0)
    theirs = of_qwix(model, provider)
    state = nnx.state(theirs, nnx.LoRAParam)
    peft, adapter = exchange.adopt(state, model, *INPUTS, alpha=6.0)
    assert len(peft.sites) == 5 and all(site.via == "fused" for site in peft.sites)

    @nnx.jit
    def of_theirs(model):
        def loss(model):
            y = model(*INPUTS)[0]
            return loss_of(y), y

        return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam), has_aux=True)(model)

    def loss(adapter):
        y = peft.apply(model, adapter, *INPUTS)[0]
        return loss_of(y), y

    grads, y = jax.jit(jax.grad(loss, has_aux=True))(adapter)
    wanted, z = of_theirs(theirs)
    close(y, z, 5e-6)
    assert differ(y, nnx.jit(lambda model: model(*INPUTS)[0])(model))

    for own, like, tolerance in ((adapter, state, 0.0), (grads, wanted, 5e-6)):
        back = flatten(exchange.export(peft, own, like))
        found = {path: v.get_raw_value() for path, v in nnx.to_flat_state(like)}
        assert back.keys() == found.keys()
        for path, leaf in found.items():
            assert back[path].shape == leaf.shape
            close(back[path], leaf, tolerance)
    nnx.update(theirs, exchange.export(peft, adapter, state))
    same(nnx.to_pure_dict(nnx.state(theirs, nnx.LoRAParam)), nnx.to_pure_dict(state))


def test_a_step_costs_no_more_than_that_of_qwix(tunix):
    fields = rope(num_layers=2, embed_dim=64, hidden_dim=128, use_tied_embedding=True)
    model = Foreign("qwen3", "Qwen3", fields, "BLOCK").make(tunix)
    rows, length = 8, 64
    ids, mask = np.ones((rows, length), np.int32), np.ones((rows, length, length), bool)
    inputs = ids, np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape), None, mask
    targets = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    theirs = of_qwix(model, qwix.LoraProvider(module_path=targets, rank=4, alpha=4.0))
    peft = jpeft.LoRA(rank=4, targets=targets).bind(model, *inputs)
    adapter = jax.eval_shape(lambda: peft.init(jax.random.key(0), model))
    graphdef, trained, rest = nnx.split(theirs, nnx.LoRAParam, ...)
    assert {x.size for x in jax.tree.leaves(adapter)} == {x.size for x in jax.tree.leaves(trained)}

    def of_ours(adapter, params):
        return loss_of(peft.apply(params, adapter, *inputs)[0])

    def of_theirs(trained, rest):
        return loss_of(nnx.merge(graphdef, trained, nnx.clone(rest))(*inputs)[0])

    programs = [
        jax.jit(jax.grad(loss)).lower(*arguments).compile()
        for loss, arguments in ((of_ours, (adapter, nnx.state(model, nnx.Param))), (of_theirs, (trained, rest)))
    ]
    flops, other_flops = (program.cost_analysis()["flops"] for program in programs)
    temporaries, others = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert flops <= other_flops
    assert temporaries <= others  # by how much depends on XLA's version and on sizes; see benchmarks/nnx.py


def test_a_checkpoint_of_tunix_holds_the_adapter_alone(tunix, tmp_path):
    manager = tunix("sft.checkpoint_manager").CheckpointManager(str(tmp_path))
    model = MODELS["Qwen3"].make(tunix)
    tuned, peft = jpeft.nnx.attach(model, METHODS["Chain"], *INPUTS, rngs=nnx.Rngs(0))
    assert tunix("sft.utils").is_lora_enabled(tuned) and not tunix("sft.utils").is_lora_enabled(model)
    wanted = moved(peft, model)
    other, _ = jpeft.nnx.attach(model, peft, rngs=nnx.Rngs(0), adapter=wanted)
    assert manager.save(1, other, save_only_lora_params=True)
    manager.close()
    again = tunix("sft.checkpoint_manager").CheckpointManager(str(tmp_path))
    step, _ = again.maybe_restore(tuned, restore_only_lora_params=True)
    again.close()
    assert step == 1
    same(peft.adapter(tuned), wanted)
