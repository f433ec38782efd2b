"""AdapterHub's `adapters` (torch): the same tensors give the same outputs."""

import functools
import warnings

import adapters
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from adapters import (
    BnConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    DiReftConfig,
    DoubleSeqBnConfig,
    LoReftConfig,
    NoReftConfig,
    ParBnConfig,
    SeqBnConfig,
    StaticAdapterFusionConfig,
)
from adapters.composition import Average, Fuse, Stack

import jpeft
from jpeft import models
from jpeft.core.tree import flatten, unflatten

pytestmark = pytest.mark.usefixtures("quick_compiles")

SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24, "initializer_range": 0.3}  # fmt: skip
BERT = transformers.BertConfig(**SIZES, max_position_embeddings=20)
LLAMA = transformers.LlamaConfig(**SIZES, num_key_value_heads=1)
IDS = np.random.default_rng(0).integers(5, 60, (3, 7))
MASK = np.array([[1] * 7, [1] * 4 + [0] * 3, [0] * 2 + [1] * 5])


# --- the same base, in torch and in JAX -------------------------------------------------------------------------------


def torch_model(config):
    torch.manual_seed(0)
    kind = transformers.AutoModel if config is BERT else transformers.AutoModelForCausalLM
    return kind.from_config(config, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """``base(config)`` is ``(model, params)`` of jpeft."""

    @functools.cache
    def base(kind):
        folder = tmp_path_factory.mktemp(kind)
        torch_model({"bert": BERT, "llama": LLAMA}[kind]).save_pretrained(folder)
        return models.load(folder)

    return base


def oracle(config, setup=None, fusion=None, **own):
    """The torch model with adapters by name, whose parameters are all away from their start.

    Args:
      config: of the model.
      setup: a composition; by default, the first adapter is active.
      fusion: the configuration of a fusion.
      **own: the adapters' configurations.
    """
    model = torch_model(config)
    adapters.init(model)
    for name, adapter in own.items():
        model.add_adapter(name, config=adapter)
    if fusion is not None:
        model.add_adapter_fusion(setup, fusion)
    move(model)
    model.set_active_adapters(setup or next(iter(own)))
    return model


def move(model):
    """Moves the parameters of adapters from their start."""
    torch.manual_seed(1)
    added = ("adapters.", "refts.", "shared_parameters.", "adapter_fusion_layer.")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # An orthogonal matrix is stored as reflections, and starts at random.
            if any(part in key for part in added) and "parametri" not in key:
                parameter.add_(0.3 * torch.randn_like(parameter))


def torch_outputs(model, ids=IDS, mask=MASK):
    with torch.no_grad():
        out = model.eval()(torch.tensor(ids), attention_mask=torch.tensor(mask))
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


# --- the same tensors -------------------------------------------------------------------------------------------------

LEAVES = {
    "adapter_norm_before.weight": "ln_before_scale", "adapter_norm_before.bias": "ln_before_bias",
    "adapter_norm_after.weight": "ln_after_scale", "adapter_norm_after.bias": "ln_after_bias",
    "adapter_up.weight": "up", "adapter_up.bias": "up_bias", "scaling": "scale",
    "gate.weight": "gate", "gate.bias": "gate_bias",
}  # fmt: skip


def bottleneck_leaves(adapter, prefix="bottleneck"):
    """The leaves of one of AdapterHub's bottlenecks."""
    out = {}
    for key, value in adapter.named_parameters():
        kind, _, leaf = key.partition(".")
        name = LEAVES[key] if kind != "adapter_down" else {"weight": "down", "bias": "down_bias"}[leaf.split(".")[-1]]
        out[f"{prefix}_{name}"] = value.detach().numpy().T
    return out


def compacter_leaves(adapter):
    """The leaves of one of AdapterHub's Compacters: hypercomplex layers are stored as ours are."""
    out = {}
    for key, value in adapter.named_parameters():
        kind, *_, leaf = key.split(".")
        layer = {"adapter_down": "down", "adapter_up": "up"}[kind]
        name = {"W_left": "left", "W_right": "right", "W": "w", "b": "bias"}.get(leaf, leaf.removeprefix("phm_"))
        out[f"compacter_{layer}_{name}"] = value.detach().numpy()
    return out


def compacter_shared(model, name="a"):
    """The leaves that all sites share."""
    named = {"phm_rule": "rule", "phm_rule_left": "rule_left", "phm_rule_right": "rule_right"}
    held = model.shared_parameters[name].items() if name in model.shared_parameters else ()
    return {named.get(key) or key.removeprefix("W_"): value.detach().numpy() for key, value in held}


def bert_places(model, name="a"):
    """AdapterHub's modules of one adapter by the path of the sublayer's last module."""
    places = {}
    for i, layer in enumerate(model.encoder.layer):
        for path, module in ((f"encoder/layer/{i}/attention/output", layer.attention.output),
                             (f"encoder/layer/{i}/output", layer.output)):  # fmt: skip
            if name in module.adapters:
                places[path] = module.adapters[name]
    return places


def check(method, base, leaves, expected, mask=MASK, ids=IDS):
    """The outputs under a method with some leaves by path, which are all of its leaves."""
    model, params = base
    peft = method.bind(model, params, ids)
    adapter = unflatten({path: jnp.asarray(x, jnp.float32) for path, x in leaves.items()})
    assert {path: shape for path, (shape, _) in peft.structure} == {p: x.shape for p, x in flatten(adapter).items()}
    got = jax.jit(lambda p, a: peft.apply(p, a, ids, attention_mask=mask))(params, adapter)
    keep = mask.astype(bool)
    np.testing.assert_allclose(got[keep], expected[keep], atol=1e-5)
    plain = jax.jit(lambda p: model.apply({"params": p}, ids, attention_mask=mask))(params)
    assert np.abs(got - plain)[keep].max() > 1e-2
    return peft, adapter


# --- bottlenecks ------------------------------------------------------------------------------------------------------

PFEIFFER = {"size": 4, "original_ln_before": True}
BOTTLENECKS = {
    "seq_bn": (SeqBnConfig(reduction_factor=4), jpeft.Bottleneck(**PFEIFFER)),
    "seq_bn, both": (
        SeqBnConfig(reduction_factor=4, mh_adapter=True, non_linearity="gelu", scaling=0.5),
        jpeft.Bottleneck(**PFEIFFER, sublayers="both", activation="gelu", scale=0.5),
    ),
    "seq_bn, norms, gate": (
        SeqBnConfig(reduction_factor=4, ln_before=True, ln_after=True, use_gating=True, scaling="channel"),
        jpeft.Bottleneck(**PFEIFFER, ln_before=True, ln_after=True, gating=True, scale="channel"),
    ),
    "double_seq_bn": (DoubleSeqBnConfig(reduction_factor=4), jpeft.methods.Houlsby(reduction=4)),
    "double_seq_bn, norms": (
        DoubleSeqBnConfig(reduction_factor=4, ln_after=True, adapter_residual_before_ln=True, scaling="learned"),
        jpeft.methods.Houlsby(size=4, ln_after=True, adapter_residual_before_ln=True, scale="learned"),
    ),
    "after the norm": (  # AdapterPlus
        BnConfig(True, True, 4, "gelu", original_ln_before=True, original_ln_after=False, residual_before_ln=False,
                 scaling="channel"),
        jpeft.Bottleneck(targets=r".*/output/LayerNorm", size=4, activation="gelu", scale="channel"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_bottlenecks_of_bert(name, bases):
    config, method = BOTTLENECKS[name]
    model = oracle(BERT, a=config)
    at = "LayerNorm" if config.original_ln_before else "dense"
    leaves = {
        (*path.split("/"), at, leaf): x
        for path, adapter in bert_places(model).items()
        for leaf, x in bottleneck_leaves(adapter).items()
    }
    check(method, bases("bert"), leaves, torch_outputs(model))


@pytest.mark.parametrize(("scaling", "both"), [(4.0, False), ("learned", True)])
def test_parallel_adapters_of_bert(scaling, both, bases):
    model = oracle(BERT, a=ParBnConfig(reduction_factor=2, scaling=scaling, mh_adapter=both))
    leaves = {
        (*path.split("/"), leaf): x
        for path, adapter in bert_places(model).items()
        for leaf, x in bottleneck_leaves(adapter, "parallel").items()
    }
    fields = {"scale": scaling, "sublayers": "both" if both else "feed_forward"}
    check(jpeft.methods.ParallelAdapter(residual=True, **fields), bases("bert"), leaves, torch_outputs(model))


COMPACTERS = {
    "compacter": (CompacterConfig(reduction_factor=4), {}),
    "compacter, all of a site": (
        CompacterConfig(
            reduction_factor=4, shared_phm_rule=False, factorized_phm_rule=True, phm_rank=2, phm_bias=False
        ),
        {"shared_phm_rule": False, "factorized_phm_rule": True, "phm_rank": 2, "phm_bias": False},
    ),
    "compacter, whole factors": (
        CompacterConfig(reduction_factor=2, phm_dim=2, shared_phm_rule=False, factorized_phm_W=False),
        {"size": 8, "phm_dim": 2, "shared_phm_rule": False, "factorized_phm_w": False},
    ),
    "compacter, all shared": (
        CompacterConfig(reduction_factor=4, shared_W_phm=True, factorized_phm_rule=True, phm_c_init="uniform"),
        {"shared_w_phm": True, "factorized_phm_rule": True},
    ),
    "compacter++": (
        CompacterPlusPlusConfig(reduction_factor=4), {"sublayers": "feed_forward", "original_ln_before": True}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPACTERS)
def test_compacters_of_bert(name, bases):
    config, fields = COMPACTERS[name]
    model = oracle(BERT, a=config)
    at = "LayerNorm" if config.original_ln_before else "dense"
    leaves = {
        (*path.split("/"), at, leaf): x
        for path, adapter in bert_places(model).items()
        for leaf, x in compacter_leaves(adapter).items()
    } | {("compacter", leaf): x for leaf, x in compacter_shared(model).items()}
    check(jpeft.methods.Compacter(**{"size": 4, **fields}), bases("bert"), leaves, torch_outputs(model))


def llama_leaves(model, places, prefix="bottleneck", name="a"):
    """The leaves of an adapter, stacked over layers, by the paths of sites."""
    out = {}
    for attribute, path in places.items():
        layers = [bottleneck_leaves(getattr(layer, attribute).adapters[name], prefix) for layer in model.model.layers]
        out |= {(*path.split("/"), leaf): np.stack([own[leaf] for own in layers]) for leaf in layers[0]}
    return out


BLOCK = {"output_adapters": "model/layers"}
SUBLAYERS = {"attention_adapters": "model/layers/self_attn", "output_adapters": "model/layers/mlp"}
OF_LLAMA = {
    # Without a norm after the residual connection, AdapterHub's network sees the sum: the block's output.
    "seq_bn": (SeqBnConfig(reduction_factor=4), jpeft.Bottleneck(targets="model/layers", size=4), BLOCK),
    "double_seq_bn": (
        DoubleSeqBnConfig(reduction_factor=4, use_gating=True),
        jpeft.methods.Houlsby(size=4, gating=True),
        SUBLAYERS,
    ),
}


@pytest.mark.parametrize("name", OF_LLAMA)
def test_bottlenecks_of_llama(name, bases):
    config, method, places = OF_LLAMA[name]
    model = oracle(LLAMA, a=config)
    check(method, bases("llama"), llama_leaves(model, places), torch_outputs(model))


# --- representation fine-tuning ---------------------------------------------------------------------------------------

ENDS = {"r": 2, "prefix_positions": 2, "suffix_positions": 3}
OURS = {"rank": 2, "prefix_positions": 2, "suffix_positions": 3}
REFTS = {
    "loreft": (LoReftConfig(**ENDS), jpeft.methods.LoReFT(**OURS)),
    "loreft, one direction": (LoReftConfig(r=1), jpeft.methods.LoReFT()),
    "noreft, tied": (
        NoReftConfig(**ENDS, tied_weights=True, non_linearity="gelu"),
        jpeft.methods.NoReFT(**OURS, tied_weights=True, activation="gelu"),
    ),
    "direft, last": (
        DiReftConfig(r=2, prefix_positions=0, suffix_positions=2),
        jpeft.methods.DiReFT(rank=2, prefix_positions=0, suffix_positions=2),
    ),
}


def reft_leaves(module):
    """The leaves of one of AdapterHub's modules, which has a unit for no position too."""
    units = ("both",) if len(module.units) == 1 else ("prefix", "suffix")
    out = {}
    for unit, torch_unit in zip(units, module.units, strict=True):
        if unit == "both" or getattr(module, f"{unit}_positions"):
            out[f"reft_{unit}_source"] = torch_unit.learned_source.weight.detach().numpy().T
            out[f"reft_{unit}_bias"] = torch_unit.learned_source.bias.detach().numpy()
            out[f"reft_{unit}_rotation"] = torch_unit.projection.weight.detach().numpy().T
    return out


@pytest.mark.parametrize("name", REFTS)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_representation_fine_tuning(kind, name, bases):
    config, method = REFTS[name]
    model = oracle({"bert": BERT, "llama": LLAMA}[kind], a=config)
    layers = [
        reft_leaves(layer.reft_layer.refts["a"])
        for layer in (model.encoder.layer if kind == "bert" else model.model.layers)
    ]
    if kind == "bert":
        leaves = {("encoder", "layer", str(i), name): x for i, own in enumerate(layers) for name, x in own.items()}
    else:
        leaves = {("model", "layers", name): np.stack([own[name] for own in layers]) for name in layers[0]}
    check(method, bases(kind), leaves, torch_outputs(model))


# --- compositions -----------------------------------------------------------------------------------------------------

NORMED = {"a": SeqBnConfig(reduction_factor=4), "b": SeqBnConfig(reduction_factor=2, non_linearity="gelu")}
PLAIN = {"a": DoubleSeqBnConfig(reduction_factor=4), "b": DoubleSeqBnConfig(reduction_factor=2)}
MEMBERS = {
    "norms": (
        NORMED,
        {"a": jpeft.Bottleneck(**PFEIFFER), "b": jpeft.Bottleneck(**PFEIFFER | {"size": 8}, activation="gelu")},
        "LayerNorm",
    ),
    "outputs": (PLAIN, {name: jpeft.methods.Houlsby(size=n) for name, n in (("a", 4), ("b", 8))}, "dense"),
}
FUSIONS = {
    "dynamic": ("dynamic", {}),
    "static": (StaticAdapterFusionConfig(), {"value": False}),
    "value after, no key": (
        StaticAdapterFusionConfig(key=False, value=True, value_before_softmax=False),
        {"key": False, "value_initialized": False},
    ),
}


def trained(model, method, base, at):
    """Each member's adapter by itself."""
    out = {}
    for name in method.named:
        places = bert_places(model, name).items()
        own = {(*path.split("/"), at, leaf): x for path, a in places for leaf, x in bottleneck_leaves(a).items()}
        out[name] = unflatten({path: jnp.asarray(x) for path, x in own.items()})
    peft = method.bind(*base, IDS)
    return peft, jpeft.methods.with_members(peft, peft.init(jax.random.key(0), base[1]), out)


def compared(peft, params, adapter, expected):
    got = jax.jit(lambda p, a: peft.apply(p, a, IDS, attention_mask=MASK))(params, adapter)
    np.testing.assert_allclose(got[MASK == 1], expected[MASK == 1], atol=1e-5)


@pytest.mark.parametrize("kind", MEMBERS)
def test_stacks(kind, bases):
    configs, members, at = MEMBERS[kind]
    model = oracle(BERT, Stack("a", "b"), **configs)
    peft, adapter = trained(model, jpeft.methods.Stack(members=members), bases("bert"), at)
    compared(peft, bases("bert")[1], adapter, torch_outputs(model))


@pytest.mark.parametrize("kind", MEMBERS)
def test_averages(kind, bases):
    configs, members, at = MEMBERS[kind]
    # AdapterHub's library takes the mean of the weighted outputs, and so divides by their number once more.
    model = oracle(BERT, Average("a", "b", weights=[1.4, 0.6], normalize_weights=False), **configs)
    method = jpeft.methods.Average(members=members, weights=[7, 3])
    peft, adapter = trained(model, method, bases("bert"), at)
    compared(peft, bases("bert")[1], adapter, torch_outputs(model))


@pytest.mark.parametrize(("kind", "fusion"), [("norms", f) for f in FUSIONS] + [("outputs", "dynamic")])
def test_fusions(kind, fusion, bases):
    (configs, members, at), (config, fields) = MEMBERS[kind], FUSIONS[fusion]
    setup = Fuse("a", "b")
    model = oracle(BERT, setup, config, **configs)
    peft, adapter = trained(model, jpeft.methods.AdapterFusion(members=members, **fields), bases("bert"), at)
    leaves = flatten(adapter)
    for i, layer in enumerate(model.encoder.layer):
        for path, module in ((("attention", "output"), layer.attention.output), (("output",), layer.output)):
            if setup.name in module.adapter_fusion_layer:
                for key, value in module.adapter_fusion_layer[setup.name].named_parameters():
                    if key == "key.bias":  # it shifts all scores alike
                        continue
                    name = key.replace(".weight", "").replace(".", "_")
                    leaf = ("encoder", "layer", str(i), *path, at, f"fusion_{name}")
                    assert leaves[leaf].shape == value.shape
                    leaves[leaf] = jnp.asarray(value.detach().numpy().T)
    adapter = unflatten(leaves)
    compared(peft, bases("bert")[1], adapter, torch_outputs(model))
    if fusion == "dynamic":
        model.train_adapter_fusion(setup)
        expected = model.get_fusion_regularization_loss().item()
        np.testing.assert_allclose(peft.penalty(adapter), expected, rtol=1e-5)


# --- transformers' Flax T5 --------------------------------------------------------------------------------------------

T5 = transformers.T5Config(
    vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
)
FEED_FORWARD = r"encoder/block/\d/layer/1|decoder/block/\d/layer/2"
# T5's layers normalize inside and add their residual connection: their input and output are the residual stream.
OF_T5 = {
    "seq_bn": (SeqBnConfig(reduction_factor=4), jpeft.Bottleneck(size=4, targets=FEED_FORWARD), ""),
    "seq_bn, before": (
        SeqBnConfig(reduction_factor=4, original_ln_before=False),
        jpeft.Bottleneck(size=4),
        "DenseReluDense",
    ),
    "par_bn": (
        ParBnConfig(reduction_factor=4),
        jpeft.methods.ParallelAdapter(size=4, targets=FEED_FORWARD),
        "",
    ),
}


@pytest.fixture(scope="module")
def flax_t5(tmp_path_factory):
    from tests.foreign import test_transformers  # transformers' T5 needs a name that newer jax has not

    del test_transformers
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    transformers.T5Model(T5).save_pretrained(folder)
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")
        model = transformers.FlaxT5Model.from_pretrained(folder, from_pt=True)
    return folder, model.module, model.params


@pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated:FutureWarning")  # adapters' own call of T5
@pytest.mark.parametrize("name", OF_T5)
def test_adapters_of_flax_t5(name, flax_t5):
    (config, method, below), (folder, module, params) = OF_T5[name], flax_t5
    model = transformers.T5Model.from_pretrained(folder).eval()
    adapters.init(model)
    model.add_adapter("a", config=config)
    model.set_active_adapters("a")
    move(model)
    prefix = "parallel" if config.is_parallel else "bottleneck"
    leaves = {}
    for stack in ("encoder", "decoder"):
        for i, block in enumerate(getattr(model, stack).block):
            place = (stack, "block", str(i), "layer", str(len(block.layer) - 1), *([below] if below else []))
            own = bottleneck_leaves(block.layer[-1].adapters["a"], prefix)
            leaves |= {(*place, leaf): jnp.asarray(x) for leaf, x in own.items()}
    ids = {"input_ids": IDS, "decoder_input_ids": IDS[:, ::-1], "attention_mask": np.ones_like(IDS),
           "decoder_attention_mask": np.ones_like(IDS)}  # fmt: skip
    with jax.numpy_dtype_promotion("standard"):
        peft = method.bind(module, params, **ids)
        assert {path for path, _ in peft.structure} == leaves.keys()
        got = jax.jit(lambda p, a: peft.apply(p, a, **ids).last_hidden_state)(params, unflatten(leaves))
    with torch.no_grad():
        expected = model(**{name: torch.tensor(np.ascontiguousarray(x)) for name, x in ids.items()})
    np.testing.assert_allclose(got, expected.last_hidden_state.numpy(), atol=1e-5)
