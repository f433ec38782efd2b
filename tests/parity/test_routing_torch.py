"""Poly, X-LoRA and LLaMA-Adapter against HuggingFace PEFT: the same tensors give the same logits."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from peft import AdaptionPromptConfig, LoraConfig, PeftModel, PolyConfig, XLoraConfig, get_peft_model
from safetensors.numpy import load_file

import jpeft
from jpeft.errors import AdapterError
from jpeft.methods import LlamaAdapter

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # torch's, transformers' and peft's own
    pytest.mark.usefixtures("quick_compiles"),
]
IDS = np.random.default_rng(0).integers(3, 61, (3, 9))
TASKS = np.array([2, 0, 2])
SIZES = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.2, "use_cache": False,
}  # fmt: skip


@pytest.fixture(scope="module", params=["Llama", pytest.param("Mistral", marks=pytest.mark.exhaustive)])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    kind = request.param
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES)).eval()
    model.save_pretrained(folder)
    return model, folder


def adapted(base, config, marks, scale=0.5):
    """A copy of the model with an adapter whose parameters of these names are drawn anew."""
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if any(mark in name for mark in marks):
                x.normal_(0, scale)
    return model


def logits(model, **kwargs):
    with torch.no_grad():
        return model(torch.tensor(IDS), **kwargs).logits.numpy()


def run(peft, params, adapter, **kwargs):
    return np.asarray(jax.jit(lambda p, a: peft.apply(p, a, jnp.asarray(IDS), **kwargs))(params, adapter))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_poly_folders(scan_layers, base, tmp_path):
    torch_model, folder = base
    config = PolyConfig(r=2, n_tasks=3, n_skills=4, n_splits=2, target_modules=["q_proj", "down_proj"])
    theirs = adapted(torch_model, config, ["poly_"])
    theirs.save_pretrained(tmp_path / "theirs")
    want = logits(theirs.base_model, task_ids=torch.tensor(TASKS))
    assert np.abs(want - logits(torch_model)).max() > 0.1
    model, params = jpeft.models.load(folder, scan_layers=scan_layers)
    peft, adapter = jpeft.hf.load(tmp_path / "theirs", model, params, jnp.asarray(IDS))
    np.testing.assert_allclose(run(peft, params, adapter, task_ids=jnp.asarray(TASKS)), want, atol=1e-4)
    jpeft.hf.save(tmp_path / "back", peft, adapter, params)
    back = PeftModel.from_pretrained(copy.deepcopy(torch_model), tmp_path / "back").eval()
    np.testing.assert_allclose(logits(back.base_model, task_ids=torch.tensor(TASKS)), want, atol=1e-5)


X_LORAS = {
    "one head": {},
    "top 1": {"top_k_lora": 1, "xlora_depth": 2, "softmax_temperature": 0.5},
    "layerwise": {"layerwise_scalings": True, "xlora_depth": 2, "global_scaling_weight": 2.0},
    "softmax of the top": {
        "layerwise_scalings": True, "xlora_depth": 3, "enable_softmax": False, "top_k_lora": 2,
        "enable_softmax_topk": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", X_LORAS)
def test_x_lora(name, base, tmp_path):
    torch_model, folder = base
    targets = [["q_proj", "down_proj"], ["q_proj"], ["down_proj"]]
    for i, own in enumerate(targets):
        lora = LoraConfig(task_type="CAUSAL_LM", r=i + 1, lora_alpha=3, target_modules=own)
        adapted(torch_model, lora, ["lora_"]).save_pretrained(tmp_path / str(i))
    fields = X_LORAS[name]
    config = XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=16, adapters={str(i): str(tmp_path / str(i)) for i in range(3)},
        xlora_size=5, xlora_dropout_p=0.0, **fields,
    )  # fmt: skip
    theirs = adapted(torch_model, config, ["internal_xlora_classifier"])
    want = logits(theirs)
    assert np.abs(want - logits(torch_model)).max() > 0.1
    scan_layers = name != "layerwise"
    model, params = jpeft.models.load(folder, scan_layers=scan_layers)
    loras = [jpeft.hf.load(tmp_path / str(i), model, params, jnp.asarray(IDS)) for i in range(3)]
    method = jpeft.methods.XLoRA(
        n_experts=3, hidden_size=16, rank=3, size=5, targets=["q_proj", "down_proj"],
        layerwise=config.layerwise_scalings, depth=config.xlora_depth, softmax=config.enable_softmax,
        softmax_top_k=config.enable_softmax_topk, top_k=config.top_k_lora, temperature=config.softmax_temperature,
        scale=config.global_scaling_weight,
    )  # fmt: skip
    peft = method.bind(model, params, jnp.asarray(IDS))
    adapter = jpeft.methods.with_experts(peft, peft.init(jax.random.key(0), params), loras)
    classifier = {k: x.numpy() for k, x in theirs.base_model.internal_xlora_classifier.state_dict().items()}
    order = ["q_proj", "down_proj"] if config.layerwise_scalings else ()
    ours = jpeft.methods.with_classifier(peft, adapter, classifier, order)
    np.testing.assert_allclose(run(peft, params, ours), want, atol=1e-4)
    theirs.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="PEFT drops some as it saves; take them from"):
        jpeft.methods.with_classifier(peft, adapter, saved, order)
    if order:
        with pytest.raises(ValueError, match=r"q_proj' is none of order=\['down_proj'\]"):
            jpeft.methods.with_classifier(peft, adapter, classifier, ["down_proj"])
        with pytest.raises(ValueError, match=r"classifier has 18 outputs, and the weights of order=.* take 18"):
            jpeft.methods.with_classifier(peft, adapter, classifier, [*order, "up_proj"])


@pytest.mark.parametrize("scan_layers", [True, False])
def test_llama_adapter_folders(scan_layers, base, tmp_path):
    torch_model, folder = base
    theirs = adapted(torch_model, AdaptionPromptConfig(adapter_len=4, adapter_layers=2), ["adaption_"])
    theirs.save_pretrained(tmp_path / "theirs")
    want = logits(theirs)
    assert np.abs(want - logits(torch_model)).max() > 0.1
    model, params = jpeft.models.load(folder, scan_layers=scan_layers)
    peft, adapter = jpeft.hf.load(tmp_path / "theirs", model, params, jnp.asarray(IDS))
    assert peft.method.last_layers == 2
    np.testing.assert_allclose(run(peft, params, adapter), want, atol=1e-4)
    jpeft.hf.save(tmp_path / "back", peft, adapter, params)
    back = PeftModel.from_pretrained(copy.deepcopy(torch_model), tmp_path / "back").eval()
    np.testing.assert_allclose(logits(back), want, atol=1e-5)
    tensors, config = tmp_path / "back" / "adapter_model.safetensors", tmp_path / "back" / "adapter_config.json"
    assert tensors.is_file()
    config.write_text(config.read_text().replace('"adapter_layers": 2', '"adapter_layers": 3'))
    with pytest.raises(AdapterError, match=r"has a LlamaAdapter for .*1.self_attn', 'model.layers.2.self_attn', and"):
        jpeft.hf.load(tmp_path / "back", model, params, jnp.asarray(IDS))
    for fields in ({"overrides": {".*": {"layers": [1, 2]}}},) if scan_layers else ({"targets": ["1/self_attn"]},):
        chosen = LlamaAdapter(length=4, **fields).bind(model, params, jnp.asarray(IDS))
        with pytest.raises(
            ValueError, match="choose them by last_layers, and not by targets, exclude or layers in over"
        ):
            jpeft.hf.save(tmp_path / "no", chosen, chosen.init(jax.random.key(0), params), params)
