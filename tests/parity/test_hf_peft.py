"""HuggingFace PEFT in torch as the oracle of `jpeft.hf`: an adapter of one side gives the same outputs on the other.

Every model is tiny and random, in float32. Its Flax twin is transformers' own, with the torch weights.
"""

import json
import re
import warnings
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.numpy import load_file, save_file
from transformers.models.t5 import modeling_flax_t5

import jpeft
from jpeft.core.interchange import HFSpec, form
from jpeft.core.tree import flatten
from jpeft.hf.config import PROVENANCE, SIZES, Config, read_config
from jpeft.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, transformers' and peft's own
TOLERANCE = 1e-5

BERT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 16}  # fmt: skip
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
LLAMA = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
         "max_position_embeddings": 16}  # fmt: skip
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0,
      "decoder_start_token_id": 0}  # fmt: skip
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8,
       "patch_size": 4}  # fmt: skip


@dataclass
class Twins:
    """A torch model and a Linen one with the same weights, and the same inputs for both."""

    torch: Any
    model: Any
    params: Any
    torch_inputs: dict[str, Any]
    inputs: tuple[Any, ...]
    folder: Any

    def fresh_torch(self) -> Any:
        return type(self.torch).from_pretrained(self.folder).eval()

    def torch_output(self, model: Any) -> np.ndarray:
        with torch.no_grad():
            return model.eval()(**self.torch_inputs)[0].numpy()

    def output(self, peft: Any, adapter: Any) -> np.ndarray:
        # Not jitted: the operations of one model are compiled once for all cases.
        out = peft.apply(self.params, adapter, *self.inputs)
        return np.asarray(out if isinstance(out, jax.Array) else out[0])


def _ids(vocabulary: int = 50, shape: tuple[int, int] = (2, 7), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, vocabulary, shape)


def _twins(torch_class: Any, flax_class: Any, config: Any, torch_inputs: dict[str, np.ndarray], inputs: Any, tmp: Any):
    torch.manual_seed(0)
    model = torch_class(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # fresh biases are zero and norms one
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp)
    flax = flax_class.from_pretrained(tmp, from_pt=True)
    return Twins(model, flax.module, flax.params, {k: torch.tensor(v) for k, v in torch_inputs.items()}, inputs, tmp)


def _bert(tmp: Any) -> Twins:
    ids, mask = _ids(), np.array([[1] * 7, [1] * 5 + [0] * 2])
    positions, types = np.broadcast_to(np.arange(7), (2, 7)), np.zeros((2, 7), int)
    inputs = tuple(map(jnp.asarray, (ids, mask, types, positions)))
    return _twins(hf.BertForSequenceClassification, hf.FlaxBertForSequenceClassification,
                  hf.BertConfig(num_labels=3, **BERT), {"input_ids": ids, "attention_mask": mask},
                  (*inputs, None), tmp)  # fmt: skip


def _gpt2(tmp: Any) -> Twins:
    ids, positions = _ids(), np.broadcast_to(np.arange(7), (2, 7))
    inputs = (jnp.asarray(ids), jnp.ones((2, 7), int), jnp.asarray(positions))
    return _twins(hf.GPT2LMHeadModel, hf.FlaxGPT2LMHeadModel, hf.GPT2Config(**GPT2), {"input_ids": ids}, inputs, tmp)


def _llama(tmp: Any) -> Twins:
    ids, positions = _ids(), np.broadcast_to(np.arange(7), (2, 7))
    inputs = (jnp.asarray(ids), jnp.ones((2, 7), int), jnp.asarray(positions))
    return _twins(
        hf.LlamaForCausalLM, hf.FlaxLlamaForCausalLM, hf.LlamaConfig(**LLAMA), {"input_ids": ids}, inputs, tmp
    )


def _t5(tmp: Any) -> Twins:
    ids, out = _ids(), _ids(shape=(2, 4), seed=1)
    inputs = (jnp.asarray(ids), jnp.ones((2, 7), int), jnp.asarray(out), jnp.ones((2, 4), int))
    return _twins(hf.T5ForConditionalGeneration, hf.FlaxT5ForConditionalGeneration, hf.T5Config(**T5),
                  {"input_ids": ids, "decoder_input_ids": out}, inputs, tmp)  # fmt: skip


def _vit(tmp: Any) -> Twins:
    image = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    return _twins(hf.ViTForImageClassification, hf.FlaxViTForImageClassification, hf.ViTConfig(num_labels=3, **VIT),
                  {"pixel_values": image}, (jnp.asarray(image.transpose(0, 2, 3, 1)),), tmp)  # fmt: skip


def _minibert(tmp: Any) -> Twins:
    ids, mask = _ids(), np.array([[1] * 7, [1] * 5 + [0] * 2])
    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(**BERT), add_pooling_layer=False).eval()
    model.save_pretrained(tmp)
    linen, params = jpeft.models.load(tmp)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    return Twins(model, linen, params, inputs, (jnp.asarray(ids), jnp.asarray(mask)), tmp)


MODELS = {"bert": _bert, "gpt2": _gpt2, "llama": _llama, "t5": _t5, "vit": _vit, "jpeft-bert": _minibert}


class _OldNumpy:
    """jax.numpy with the arguments of ``clip`` that FlaxT5 gives."""

    clip = staticmethod(lambda x, a_min=None, a_max=None: jnp.clip(x, a_min, a_max))

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)


@pytest.fixture(autouse=True)
def transformers_environment(monkeypatch):
    """Its Flax models rely on standard promotion and, T5, on a name that jax has dropped."""
    monkeypatch.setattr(modeling_flax_t5, "jnp", _OldNumpy())
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Twins by name, each made once."""
    made: dict[str, Twins] = {}

    def get(name: str) -> Twins:
        if name not in made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made[name] = MODELS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return get


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    print(f"max difference {np.abs(a - b).max():.2e} of {np.abs(b).max():.2f}")
    return float(np.abs(a - b).max())


FULL = r".*layers\.[02]\.self_attn\.(q|v)_proj"
CASES = {
    "bert query,value": ("bert", {"target_modules": ["query", "value"], "r": 4, "lora_alpha": 8}),
    "bert all-linear, head saved": (
        "bert",
        {"target_modules": "all-linear", "task_type": "SEQ_CLS", "r": 4, "lora_dropout": 0.1},
    ),
    "bert biases": ("bert", {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "bert own biases": ("bert", {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "bert embeddings": (
        "bert",
        {"target_modules": ["word_embeddings", "token_type_embeddings", "key"], "lora_dropout": 0.1},
    ),
    "bert norms saved": (
        "bert",
        {"target_modules": ["key"], "modules_to_save": ["LayerNorm", "pooler", "word_embeddings"]},
    ),
    "bert excluded": (
        "bert",
        {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"], "init_lora_weights": "gaussian"},
    ),
    "bert layers": ("bert", {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"}),
    "bert one layer": ("bert", {"target_modules": ["query"], "layers_to_transform": 0}),
    "bert head": ("bert", {"target_modules": ["query", "classifier"], "init_lora_weights": "orthogonal"}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "r": 4}),
    "gpt2 not said": ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": False}),
    "gpt2 saved": (
        "gpt2",
        {"target_modules": ["c_attn"], "modules_to_save": ["c_fc", "ln_f", "wpe"], "bias": "lora_only"},
    ),
    "llama all-linear, rslora": (
        "llama",
        {"target_modules": "all-linear", "use_rslora": True, "r": 4, "lora_alpha": 3},
    ),
    "llama patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "r": 4,
            "lora_alpha": 3,
            "use_rslora": True,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, r"layers.\d.mlp.up_proj": 6, "up_proj": 3},
            "alpha_pattern": {"^model.layers.2.mlp.down_proj": 11, "q_proj": 5.5},
        },
    ),
    "llama expression": ("llama", {"target_modules": FULL, "exclude_modules": r".*layers\.2.*k_proj"}),
    "llama embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "llama eva": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "eva"}),
    "t5": ("t5", {"target_modules": ["q", "v", "wi"], "r": 4, "modules_to_save": ["layer_norm"]}),
    "t5 relative bias": ("t5", {"target_modules": ["relative_attention_bias", "o"]}),
    "vit conv": ("vit", {"target_modules": ["projection", "query"], "r": 4, "lora_alpha": 9}),
    "vit conv saved": (
        "vit",
        {"target_modules": ["value"], "modules_to_save": ["projection", "classifier"], "bias": "all"},
    ),
    "jpeft's BERT": ("jpeft-bert", {"target_modules": "all-linear", "r": 4, "bias": "all"}),
    "jpeft's BERT embeddings": ("jpeft-bert", {"target_modules": ["word_embeddings", "query"], "use_rslora": True}),
}


def _made_in_torch(twin: Twins, config: dict[str, Any], folder: Any) -> np.ndarray:
    """The output of a LoRA that is made and perturbed in PEFT and saved to a folder."""
    torch.manual_seed(1)
    adapted = get_peft_model(twin.fresh_torch(), LoraConfig(**config))
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    adapted.save_pretrained(folder)
    return twin.torch_output(adapted)


def _perturbed(adapter: Any) -> Any:
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(x.dtype), adapter)


@pytest.mark.parametrize("case", CASES)
def test_torch_adapter_gives_the_same_outputs_here_and_back(case, twins, tmp_path):
    name, config = CASES[case]
    twin = twins(name)
    expected = _made_in_torch(twin, config, tmp_path / "torch")
    assert _difference(expected, twin.torch_output(twin.torch)) > 1e-3
    pooler = ["pooler.dense"] if name == "jpeft-bert" and "query" not in config["target_modules"] else []
    peft, adapter = jpeft.hf.load(tmp_path / "torch", twin.model, twin.params, *twin.inputs, ignore=pooler)
    assert _difference(twin.output(peft, adapter), expected) < TOLERANCE
    jpeft.hf.save(tmp_path / "back", peft, adapter, twin.params, task_type=config.get("task_type"))
    back = PeftModel.from_pretrained(twin.fresh_torch(), tmp_path / "back")
    assert _difference(twin.torch_output(back), expected) < TOLERANCE


EXPORTS = {
    "bert": ("bert", jpeft.Chain(jpeft.LoRA(rank=4, alpha=6, targets=["query", "value"]), jpeft.Train("classifier"))),
    "bert biases": (
        "bert",
        jpeft.Chain(jpeft.LoRA(rank=3, rslora=True), jpeft.BitFit(exclude=["classifier"]), jpeft.Train("classifier")),
    ),
    "gpt2": ("gpt2", jpeft.LoRA(rank=4, alpha=2, overrides={"c_proj": {"rank": 2}, r".*/0/.*/c_attn": {"alpha": 7}})),
    "gpt2 fused attention": (
        "gpt2",
        jpeft.LoRA(rank=2, alpha=3, rslora=True, targets=["c_attn", "c_fc"], overrides={"c_attn": {"parts": 3}}),
    ),
    "llama": ("llama", jpeft.LoRA(rank=4, overrides={"q_proj": {"rslora": True, "alpha": 3}})),
    "llama two": (
        "llama",
        jpeft.Chain(
            jpeft.LoRA(rank=4, targets=["q_proj"]),
            jpeft.LoRA(rank=2, targets=["embed_tokens"]),
            jpeft.Train("model/norm"),
        ),
    ),
    "t5": ("t5", jpeft.LoRA(rank=2, targets=["q", "wo"])),
    "vit": ("vit", jpeft.Chain(jpeft.LoRA(rank=4, targets=["projection", "dense"]), jpeft.Train(["classifier"]))),
    "jpeft's BERT": ("jpeft-bert", jpeft.LoRA(rank=4, alpha=8)),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_adapter_gives_the_same_outputs_in_torch(case, twins, tmp_path):
    name, method = EXPORTS[case]
    twin = twins(name)
    peft = method.bind(twin.model, twin.params, *twin.inputs)
    adapter = _perturbed(peft.init(jax.random.key(0), twin.params))
    expected = twin.output(peft, adapter)
    jpeft.hf.save(tmp_path / "out", peft, adapter, twin.params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(twin.fresh_torch(), tmp_path / "out")
    assert not [str(w.message) for w in caught if "missing" in str(w.message).lower()]
    assert _difference(twin.torch_output(loaded), expected) < TOLERANCE
    again, same = jpeft.hf.load(tmp_path / "out", twin.model, twin.params, *twin.inputs)
    assert _difference(twin.output(again, same), expected) < TOLERANCE
    if "fused" not in case:  # its parts are one matrix in a file
        assert flatten(jax.tree.map(lambda a, b: bool((a == b).all()), same, adapter)) == dict.fromkeys(
            flatten(adapter), True
        )


def test_encoder_alone_and_wrapped(twins, tmp_path):
    """jpeft's encoder and a torch model with a head: `save` is given the prefix, `load` finds it."""
    twin = twins("jpeft-bert")
    config = hf.BertConfig(num_labels=3, **BERT)
    torch.manual_seed(3)
    base = hf.BertForSequenceClassification(config).eval()
    base.bert.load_state_dict(twin.torch.state_dict(), strict=False)
    peft = jpeft.LoRA(rank=4).bind(twin.model, twin.params, *twin.inputs)
    adapter = _perturbed(peft.init(jax.random.key(0), twin.params))
    jpeft.hf.save(tmp_path / "a", peft, adapter, twin.params, prefix="bert.")
    keys = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert all(key.startswith("bert.encoder.layer.") for key in keys)
    loaded = PeftModel.from_pretrained(base, tmp_path / "a")
    with torch.no_grad():
        states = loaded.base_model.model.bert(**twin.torch_inputs)[0].numpy()
    assert _difference(states, twin.output(peft, adapter)) < TOLERANCE
    _, same = jpeft.hf.load(tmp_path / "a", twin.model, twin.params, *twin.inputs)
    assert all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(adapter), strict=True))


def test_folders_of_other_tools_load_here_as_in_peft(twins, tmp_path):
    """Keys with the adapter's name, and fields that PEFT does not know."""
    twin = twins("llama")
    expected = _made_in_torch(twin, {"target_modules": ["q_proj", "embed_tokens"], "r": 4}, tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = load_file(file)
    named = {re.sub(r"(lora_\w+)(\.weight)?$", r"\1.french\2", key): x for key, x in tensors.items()}
    assert len(named.keys() - tensors.keys()) > 4
    save_file(named, file)
    fields = {"enable_lora": None, "merge_weights": False, "runtime_config": None, "from_the_future": []}
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
        theirs = PeftModel.from_pretrained(twin.fresh_torch(), tmp_path, adapter_name="french")
    assert _difference(twin.torch_output(theirs), expected) < TOLERANCE
    peft, adapter = jpeft.hf.load(tmp_path, twin.model, twin.params, *twin.inputs)
    assert _difference(twin.output(peft, adapter), expected) < TOLERANCE


def test_head_that_the_encoder_lacks_must_be_ignored_by_name(twins, tmp_path):
    twin = twins("jpeft-bert")
    wrapped = hf.BertForSequenceClassification(hf.BertConfig(num_labels=3, **BERT))
    get_peft_model(wrapped, LoraConfig(target_modules=["query"], task_type="SEQ_CLS")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'classifier', which this model lacks.*ignore=\['classifier'\]"):
        jpeft.hf.load(tmp_path, twin.model, twin.params, *twin.inputs)
    peft, _ = jpeft.hf.load(tmp_path, twin.model, twin.params, *twin.inputs, ignore=["classifier"])
    assert [site.name for site in peft.sites] == [f"encoder/layer/{i}/attention/self/query" for i in range(2)]


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq"])
def test_changed_base_is_refused_and_its_conversion_loads(init, twins, tmp_path):
    twin = twins("llama")
    config = {"target_modules": ["q_proj", "v_proj"], "r": 4, "init_lora_weights": init}
    if init == "loftq":
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
        with pytest.raises(ValueError, match="init_lora_weights='loftq'"):
            jpeft.hf.load(tmp_path / "torch", twin.model, twin.params, *twin.inputs)
        return
    adapted = get_peft_model(twin.fresh_torch(), LoraConfig(**config))
    adapted.peft_config[
        "default"
    ].init_lora_weights = True  # as in PEFT's own guide: the initial adapter is saved as it is
    adapted.save_pretrained(tmp_path / "start")
    adapted.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    adapted.save_pretrained(tmp_path / "torch")
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}'"):
        jpeft.hf.load(tmp_path / "torch", twin.model, twin.params, *twin.inputs)
    expected = twin.torch_output(adapted)
    adapted.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    peft, adapter = jpeft.hf.load(tmp_path / "converted", twin.model, twin.params, *twin.inputs)
    assert peft.method.rank == 8
    assert _difference(twin.output(peft, adapter), expected) < TOLERANCE


OF_PEFT = {name: spec for name, method in METHODS.items() if isinstance(spec := form(method), HFSpec)}
REQUIRED = {  # fields without a default of use
    "ADALORA": {"total_step": 10}, "IA3": {"feedforward_modules": []}, "TRAINABLE_TOKENS": {"token_indices": [1]},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "CPT": {"cpt_token_ids": [1], "cpt_mask": [1], "cpt_tokens_type_mask": [1], "task_type": "CAUSAL_LM"},
}  # fmt: skip


@pytest.mark.parametrize("name", OF_PEFT)
def test_every_field_of_peft_is_known(name, tmp_path):
    """A field of a new version of PEFT must be classified before it is accepted, and its defaults are."""
    spec = OF_PEFT[name]
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[spec.peft_type]
    own = {**spec.when, **{key: [1] for key in spec.given}, **REQUIRED.get(spec.peft_type, {})}
    if spec.prompt == "":
        own["target_modules"] = ["query"]
    elif spec.peft_type != "ADAPTION_PROMPT":  # as get_peft_model fills in
        own |= {"num_virtual_tokens": 1, "num_transformer_submodules": 1}
    kind(**own).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    common = {f.name for f in fields(Config)} - {"method", "own", "parameters"} | PROVENANCE
    common |= SIZES if spec.prompt else set()
    assert not json.loads(file.read_text()).keys() - common - spec.known
    assert read_config(file, METHODS.values()).method is METHODS[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tensors_keep_their_bits(dtype, twins, tmp_path):
    twin = twins("llama")
    adapted = get_peft_model(twin.fresh_torch(), LoraConfig(target_modules=["q_proj"], r=4))
    for p in adapted.parameters():
        if p.requires_grad:
            p.data = torch.randn_like(p).to(dtype)
    adapted.save_pretrained(tmp_path)
    peft, adapter = jpeft.hf.load(tmp_path, twin.model, twin.params, *twin.inputs)
    a = adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.detach().float().numpy()
    ours = adapter["model"]["layers"]["0"]["self_attn"]["q_proj"]["lora_a"]
    assert peft.method.dtype == str(dtype).removeprefix("torch.") == ours.dtype.name
    np.testing.assert_array_equal(np.asarray(ours.astype(jnp.float32)).T, a)
