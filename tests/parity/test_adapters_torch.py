"""AdapterHub's `adapters` (torch): the same tensors give the same outputs."""

import functools

import adapters
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from adapters import BnConfig, DoubleSeqBnConfig, SeqBnConfig

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


def oracle(config, **own):
    """The torch model with adapters by name, whose parameters are all away from their start."""
    model = torch_model(config)
    adapters.init(model)
    for name, adapter in own.items():
        model.add_adapter(name, config=adapter)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in ("adapters.", "refts.", "shared_parameters.")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.set_active_adapters(next(iter(own)))
    return model


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
