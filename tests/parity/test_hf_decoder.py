"""HuggingFace PEFT in torch as the oracle of `jpeft.hf` on jpeft's own decoders, with layers stacked and one by one."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.errors import AdapterError
from jpeft.methods import METHODS
from tests.hf.outside import DoRA, VeRA
from tests.zoo import same

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, transformers' and peft's own
TOLERANCE = 1e-4

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
         "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
GEMMA = {**SIZES, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama-tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=8),
    "gemma2": transformers.Gemma2Config(**GEMMA, attn_logit_softcapping=4.0, final_logit_softcapping=6.0),
    "gemma3": transformers.Gemma3TextConfig(**GEMMA, sliding_window_pattern=2),
}  # fmt: skip
IDS = np.random.default_rng(0).integers(3, 61, (2, 9))
SCANS = (True, False)
FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folders of tiny torch models by name, each made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
            with torch.no_grad():
                for p in model.parameters():  # fresh biases are zero and norms one
                    p.add_(0.1 * torch.randn_like(p))
            model.save_pretrained(made[name])
        return made[name]

    return get


@pytest.fixture(scope="module")
def linen(base):
    """jpeft's models and their parameters, each loaded once."""
    made = {}

    def get(name, scan):
        if (name, scan) not in made:
            made[name, scan] = jpeft.models.load(base(name), scan_layers=scan)
        return made[name, scan]

    return get


def in_torch(folder):
    # "eager": sdpa ignores gemma 2's soft-cap
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


def logits(peft, params, adapter):
    # Not jitted: the operations of one model are compiled once for all cases.
    return np.asarray(peft.apply(params, adapter, jnp.asarray(IDS)))


def close(got, want):
    print(f"max difference {np.abs(got - want).max():.1e} of {np.abs(want).max():.1f}")
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


def tensor_names(folder):
    with safe_open(folder / "adapter_model.safetensors", framework="numpy") as file:
        return set(file.keys())


def made_in_torch(base_folder, folder, config, kind=LoraConfig):
    """The logits of an adapter that is made and perturbed in PEFT and saved to a folder."""
    torch.manual_seed(1)
    adapted = get_peft_model(in_torch(base_folder), kind(**config))
    with torch.no_grad():
        # Parameters of tied adapters share their storage, which must not be perturbed twice.
        for p in {p.data_ptr(): p for p in adapted.parameters() if p.requires_grad}.values():
            p.add_(0.1 * torch.randn_like(p))
    adapted.save_pretrained(folder)
    return torch_logits(adapted)


def bound(method, model, params):
    """A Peft and an adapter that changes the outputs."""
    peft, rng = method.bind(model, params, jnp.asarray(IDS)), np.random.default_rng(1)
    abstract = peft.init(jax.random.key(0), jax.eval_shape(lambda p: p, params))
    return peft, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), abstract)


QV = {"target_modules": ["q_proj", "v_proj"]}
TIED = {"ensure_weight_tying": True}
CASES = {
    "llama q, v": ("llama", {**QV, "r": 4, "lora_alpha": 6}),
    "llama all-linear": ("llama", {"target_modules": "all-linear", "use_rslora": True, "lora_dropout": 0.1, "r": 4}),
    "llama mlp": ("llama", {"target_modules": ["gate_proj", "up_proj", "down_proj"], "init_lora_weights": "gaussian"}),
    "llama expression": ("llama", {"target_modules": r".*\.(k_proj|o_proj|up_proj)", "exclude_modules": ["o_proj"]}),
    "llama patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "r": 4,
            "rank_pattern": {"self_attn.q_proj": 2, r"layers\.\d\.mlp\.up_proj": 6},
            "alpha_pattern": {"down_proj": 11, "q_proj": 5.5},
        },
    ),
    "llama embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "k_proj"], "lora_dropout": 0.1}),
    "llama saved": ("llama", {**QV, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "llama norms": ("llama", {**QV, "modules_to_save": ["input_layernorm", "norm", "o_proj"]}),
    "llama some layers": ("llama", {**QV, "layers_to_transform": [0, 2]}),
    "llama all but one": ("llama", {**QV, "exclude_modules": ["layers.2.self_attn.q_proj"], "r": 2}),
    "llama all layers": ("llama", {**QV, "layers_to_transform": [0, 1, 2], "layers_pattern": "layers"}),
    "qwen2 all biases": ("qwen2", {"target_modules": "all-linear", "bias": "all"}),
    "qwen2 own biases": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only", "use_rslora": True}),
    "qwen3": ("qwen3", {"target_modules": "all-linear", "modules_to_save": ["q_norm", "lm_head"], "lora_alpha": 3}),
    "gemma2": ("gemma2", {"target_modules": "all-linear", "r": 4}),
    "gemma2 tied": ("gemma2", {"target_modules": ["embed_tokens", "q_proj"], "r": 4, **TIED}),
    "gemma2 tied, saved": ("gemma2", {**QV, "modules_to_save": ["embed_tokens"], **TIED}),
    "gemma3 tied by its head": (
        "gemma3",
        {"target_modules": ["lm_head", "q_proj"], "alpha_pattern": {"lm_head|embed_tokens": 3}, **TIED},
    ),
    "llama not tied, though asked": ("llama", {"target_modules": ["embed_tokens"], **TIED}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_torch_adapter_gives_the_same_outputs_here_and_back(case, base, linen, tmp_path):
    name, config = CASES[case]
    want = made_in_torch(base(name), tmp_path / "torch", config)
    assert np.abs(want - torch_logits(in_torch(base(name)))).max() > 1e-2
    for scan in SCANS:
        model, params = linen(name, scan)
        peft, adapter = jpeft.hf.load(tmp_path / "torch", model, params, jnp.asarray(IDS))
        close(logits(peft, params, adapter), want)
        jpeft.hf.save(tmp_path / f"back {scan}", peft, adapter, params)
    for file in FILES:
        assert (tmp_path / "back True" / file).read_bytes() == (tmp_path / "back False" / file).read_bytes()
    close(torch_logits(PeftModel.from_pretrained(in_torch(base(name)), tmp_path / "back True")), want)


def test_adapter_loaded_onto_stacked_layers_saves_and_merges(base, linen, tmp_path):
    """It is saved and loaded in jpeft's own format, and merges."""
    config = {**CASES["llama patterns"][1], "bias": "all", "modules_to_save": ["norm", "post_attention_layernorm"]}
    want = made_in_torch(base("qwen2"), tmp_path / "torch", config)
    model, params = linen("qwen2", True)
    peft, adapter = jpeft.hf.load(tmp_path / "torch", model, params, jnp.asarray(IDS))
    assert "model/layers/self_attn/q_proj" in peft.method.methods()[0].targets
    assert peft.method.methods()[0].overrides["model/layers/self_attn/q_proj"] == {"rank": 2, "alpha": 5.5}
    jpeft.save(tmp_path / "own", peft, adapter, params)
    again, read = jpeft.load(tmp_path / "own", model, params, jnp.asarray(IDS))
    assert again == peft
    same(read, adapter)
    close(np.asarray(model.apply({"params": peft.merge(params, adapter)}, jnp.asarray(IDS))), want)


DIFFER = {
    "rank 2, 'model.layers.2.self_attn.q_proj' has 8": {**QV, "rank_pattern": {"layers.[01].self_attn.q_proj": 2}},
    "alpha 8, 'model.layers.1.self_attn.v_proj' has 3": {**QV, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}},
    "trains 'model.layers.1.input_layernorm.weight' and not 'model.layers.0.input": {
        **QV,
        "modules_to_save": ["layers.1.input_layernorm"],
    },
}


@pytest.mark.parametrize("match", DIFFER)
def test_layers_that_differ_need_a_model_without_scan(match, base, linen, tmp_path):
    want = made_in_torch(base("llama"), tmp_path / "torch", DIFFER[match])
    model, params = linen("llama", True)
    with pytest.raises(AdapterError, match=rf"{match.replace('[', '.')}.*; load the model with scan_layers=False"):
        jpeft.hf.load(tmp_path / "torch", model, params, jnp.asarray(IDS))
    model, params = linen("llama", False)
    peft, adapter = jpeft.hf.load(tmp_path / "torch", model, params, jnp.asarray(IDS))
    close(logits(peft, params, adapter), want)
    jpeft.hf.save(tmp_path / "back", peft, adapter, params)
    close(torch_logits(PeftModel.from_pretrained(in_torch(base("llama")), tmp_path / "back")), want)


EXPORTS = {
    "llama": ("llama", jpeft.LoRA(rank=4, alpha=6)),
    "llama embeddings": ("llama", jpeft.LoRA(rank=4, targets=["embed_tokens", "lm_head", "mlp/down_proj"])),
    "llama two and saved": (
        "llama",
        jpeft.Chain(
            jpeft.LoRA(rank=4, targets=["q_proj"], rslora=True, overrides={"q_proj": {"alpha": 9}}),
            jpeft.LoRA(rank=2, targets=["gate_proj", "o_proj"], rslora=True, overrides={"o_proj": {"rank": 3}}),
            jpeft.Train(["lm_head", "norm", "post_attention_layernorm"]),
        ),
    ),
    "llama bfloat16": ("llama", jpeft.LoRA(rank=4, targets=["q_proj", "down_proj"], dtype="bfloat16", dropout=0.2)),
    "qwen2 all biases": ("qwen2", jpeft.Chain(jpeft.LoRA(targets=["v_proj"]), jpeft.BitFit())),
    "qwen2 own biases": (
        "qwen2",
        jpeft.Chain(jpeft.LoRA(targets=["v_proj", "o_proj"]), jpeft.BitFit(targets=r".*v_proj/bias")),
    ),
    "qwen3": ("qwen3", jpeft.Chain(jpeft.LoRA(rank=2), jpeft.Train(["k_norm", "embed_tokens"]))),
    "gemma2": ("gemma2", jpeft.LoRA(rank=4, targets=["gate_proj", "k_proj"])),
    "gemma2 tied": (
        "gemma2",
        jpeft.LoRA(rank=4, alpha=3, targets=["embed_tokens", "k_proj"], overrides={"embed_tokens": {"rank": 2}}),
    ),
    "gemma2 tied, saved": ("gemma2", jpeft.Chain(jpeft.LoRA(targets=["q_proj"]), jpeft.Train(["embed_tokens"]))),
    "gemma3 tied": ("gemma3", jpeft.LoRA(rank=4, alpha=3, targets=["embed_tokens", "k_proj"])),
}  # fmt: skip


@pytest.mark.parametrize("case", EXPORTS)
def test_adapter_gives_the_same_outputs_in_torch(case, base, linen, tmp_path):
    name, method = EXPORTS[case]
    for scan in SCANS:
        model, params = linen(name, scan)
        peft, adapter = bound(method, model, params)
        folder = tmp_path / f"out {scan}"
        # Of the base, only paths and shapes matter.
        jpeft.hf.save(folder, peft, adapter, jax.eval_shape(lambda p: p, params))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = PeftModel.from_pretrained(in_torch(base(name)), folder)
        assert not [str(w.message) for w in caught if "missing" in str(w.message).lower()]
        close(torch_logits(loaded), logits(peft, params, adapter))
        loaded.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
        assert tensor_names(folder) == tensor_names(tmp_path / "theirs")
        again, read = jpeft.hf.load(folder, model, params, jnp.asarray(IDS))
        same(read, adapter)
        jpeft.hf.save(tmp_path / "again", again, read, params)
        for file in FILES:
            assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()


ALONE = {
    "'model.embed_tokens' alone": {"target_modules": ["embed_tokens", "q_proj"]},
    "'lm_head' alone": {"target_modules": ["lm_head", "q_proj"]},
    "'model.embed_tokens' alone.": {**QV, "modules_to_save": ["embed_tokens"]},
    "'lm_head' alone.": {**QV, "modules_to_save": ["lm_head"]},
    "'lm_head' has 5": {"target_modules": ["embed_tokens"], **TIED, "alpha_pattern": {"lm_head": 5}},
}


@pytest.mark.parametrize("match", ALONE)
@pytest.mark.parametrize("name", ["llama-tied", "gemma2"])
def test_change_of_only_one_tied_module_is_refused(match, name, base, linen, tmp_path):
    """PEFT leaves the other unchanged, so its function differs from ours."""
    made_in_torch(base(name), tmp_path, ALONE[match])
    for scan in SCANS:
        model, params = linen(name, scan)
        with pytest.raises(AdapterError, match=match):
            jpeft.hf.load(tmp_path, model, params, jnp.asarray(IDS))


def test_tied_modules_in_a_file(base, linen, tmp_path):
    """The base's own weights may be in the file too; other tensors may not."""
    torch.manual_seed(1)
    adapted = get_peft_model(in_torch(base("gemma2")), LoraConfig(**QV, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "resized", save_embedding_layers=True)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "resized" / "adapter_model.safetensors")
    model, params = linen("gemma2", True)
    peft, adapter = jpeft.hf.load(tmp_path / "resized", model, params, jnp.asarray(IDS))
    close(logits(peft, params, adapter), torch_logits(adapted))
    made_in_torch(base("gemma2"), tmp_path / "tied", CASES["gemma2 tied"][1])
    file = tmp_path / "tied" / "adapter_model.safetensors"
    tensors = load_file(file)
    head = "base_model.model.lm_head.lora_A.weight"
    for changed, match in (
        (
            {**tensors, head: tensors[head] + 1},
            r"lm_head\.lora_A\.weight' differs from the tensor of 'model\.embed_tokens'",
        ),
        ({**tensors, head.replace("A.weight", "A.bias"): tensors[head][0]}, r"lora_A\.bias', which no tied head has"),
    ):
        save_file(changed, file)
        with pytest.raises(AdapterError, match=match):
            jpeft.hf.load(tmp_path / "tied", model, params, jnp.asarray(IDS))


def test_tied_head_of_another_library_is_refused(base, tmp_path):
    """Here a LoRA of its embedding changes the head too, in PEFT it does not."""
    config = transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    inputs = (jnp.asarray(IDS), jnp.ones((2, 9), int), jnp.arange(9)[None])
    with jax.numpy_dtype_promotion("standard"):
        gpt2 = transformers.FlaxGPT2LMHeadModel(config)
        peft = jpeft.LoRA(targets=["wte"]).bind(gpt2.module, gpt2.params, *inputs)
        with pytest.raises(ValueError, match=r"'transformer/wte' has no counterpart.*as a tied head"):
            jpeft.hf.save(tmp_path / "a", peft, peft.init(jax.random.key(0), gpt2.params), gpt2.params)
        made_in_torch(base("llama-tied"), tmp_path / "b", {"target_modules": ["embed_tokens"], **TIED})
        with pytest.raises(AdapterError, match=r"ensure_weight_tying=True is not supported for FlaxGPT2LMHeadModule"):
            jpeft.hf.load(tmp_path / "b", gpt2.module, gpt2.params, *inputs)


def test_folders_that_do_not_fit_are_refused(base, linen, tmp_path):
    made_in_torch(base("llama"), tmp_path, QV)
    config, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    fields, tensors = json.loads(config.read_text()), load_file(file)
    start = "base_model.model.model.layers"

    def refused(match, fields=fields, tensors=tensors, name="llama", **more):
        config.write_text(json.dumps({**fields, **more}))
        save_file(tensors, file)
        for scan in SCANS:
            model, params = linen(name, scan)
            with pytest.raises(AdapterError, match=match):
                jpeft.hf.load(tmp_path, model, params, jnp.asarray(IDS))

    refused("unknown field 'lora_magnitude'", lora_magnitude=1)
    refused("use_qalora=True is not supported", use_qalora=True)
    a = f"{start}.1.self_attn.q_proj.lora_A.weight"
    refused("lacks '.*1.self_attn.q_proj.lora_A.weight'", tensors={k: v for k, v in tensors.items() if k != a})
    refused(r"1.self_attn.q_proj.lora_A.weight' has shape \[7, 32\]", tensors={**tensors, a: tensors[a][:7]})
    refused(
        "no LoRA for 'model.layers.1.self_attn.q_proj', which target_modules names",
        tensors={k: v for k, v in tensors.items() if "1.self_attn.q_proj" not in k},
    )
    more = {k.replace("layers.1", "layers.3"): v for k, v in tensors.items() if "layers.1" in k}
    refused("'model.layers.3.self_attn.q_proj', which this model lacks", tensors={**tensors, **more})
    refused(
        "'base_model.model.model.layers.1.mlp.up_proj.weight', a base weight that differs",
        tensors={**tensors, f"{start}.1.mlp.up_proj.weight": np.ones((48, 32), np.float32)},
    )
    refused(r"q_proj.lora_B.weight' has shape \[32, 8\], expected \[64, 8\]", name="gemma3")
    # A base weight that equals the model's own may be in the file, in each layer.
    model, params = linen("llama", True)
    kernel = np.asarray(params["model"]["layers"]["mlp"]["up_proj"]["kernel"][1]).T.copy()
    config.write_text(json.dumps(fields))
    save_file({**tensors, f"{start}.1.mlp.up_proj.weight": kernel}, file)
    jpeft.hf.load(tmp_path, model, params, jnp.asarray(IDS))


def test_abstract_parameters(base, linen, tmp_path):
    want = made_in_torch(base("llama"), tmp_path, QV)
    model, params = linen("llama", True)
    peft, adapter = jpeft.hf.load(tmp_path, model, jax.eval_shape(lambda p: p, params), jnp.asarray(IDS))
    close(logits(peft, params, adapter), want)


def test_half_precision(base, tmp_path):
    """The whole model in bfloat16: the same bits of the adapter, and outputs within bfloat16's precision."""
    adapted = get_peft_model(in_torch(base("llama")), LoraConfig(**QV, init_lora_weights=False)).to(torch.bfloat16)
    adapted.save_pretrained(tmp_path)
    model, params = jpeft.models.load(base("llama"), param_dtype=jnp.bfloat16)
    peft, adapter = jpeft.hf.load(tmp_path, model, params, jnp.asarray(IDS))
    ours = adapter["model"]["layers"]["self_attn"]["q_proj"]["lora_a"]
    theirs = adapted.base_model.model.model.layers[2].self_attn.q_proj.lora_A["default"].weight.detach().float().numpy()
    assert peft.method.dtype == ours.dtype.name == "bfloat16"
    np.testing.assert_array_equal(np.asarray(ours[2].astype(jnp.float32)).T, theirs)
    got, want = logits(peft, params, adapter), torch_logits(adapted.float())
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


# Methods from outside of jpeft, which declare their forms in tests/hf/outside.py.
OUTSIDE = {
    "VeRA": (VeRA, {"r": 8, "d_initial": 0.5, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "VeRA, biases": (VeRA, {"r": 8, "target_modules": ["q_proj"], "bias": "vera_only", "modules_to_save": ["norm"]}),
    "VeRA, regenerated": (
        VeRA,
        {"r": 8, "target_modules": ["k_proj", "up_proj"], "projection_prng_key": 5, "save_projection": False},
    ),
    "DoRA": (DoRA, {"use_dora": True, "r": 4, "lora_alpha": 6, "target_modules": ["v_proj", "down_proj"]}),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_method_from_outside(case, base, linen, tmp_path, monkeypatch):
    method, config = OUTSIDE[case]
    monkeypatch.setitem(METHODS, method.__name__, method)
    want = made_in_torch(base("qwen2"), tmp_path / "torch", config, VeraConfig if method is VeRA else LoraConfig)
    assert np.abs(want - torch_logits(in_torch(base("qwen2")))).max() > 1e-2
    for scan in SCANS:
        model, params = linen("qwen2", scan)
        peft, adapter = jpeft.hf.load(tmp_path / "torch", model, params, jnp.asarray(IDS))
        assert type(peft.method.methods()[0]) is method
        close(logits(peft, params, adapter), want)
        jpeft.hf.save(tmp_path / f"back {scan}", peft, adapter, params)
    for file in FILES:
        assert (tmp_path / "back True" / file).read_bytes() == (tmp_path / "back False" / file).read_bytes()
    if "regenerated" not in case:
        assert tensor_names(tmp_path / "torch") == tensor_names(tmp_path / "back True")
    close(torch_logits(PeftModel.from_pretrained(in_torch(base("qwen2")), tmp_path / "back True")), want)
