"""Folders and files for production servers, read as these read them: by the global rank and alpha alone."""

import json
import re

import flax.linen as nn
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jpeft
from jpeft import conversion, methods
from jpeft.core.actions import layer_mask
from jpeft.core.stacking import unstack
from jpeft.core.tree import flatten, unflatten
from jpeft.errors import UserError
from jpeft.hf import save_for
from jpeft.hf.servers import as_lora
from jpeft.models.decoder import Decoder, DecoderConfig
from jpeft.models.gguf import open_tensors, write_adapter
from tests.folders import new_params

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compiles")
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
IDS = jnp.arange(6).reshape(1, 6)
TOLERANCE = 2e-6
MADE = {}


def model_of(kind="llama", **fields):
    """A tiny decoder and its parameters; each is made once."""
    key = (kind, *fields.items())
    if key not in MADE:
        model = Decoder(DecoderConfig(model_type=kind, **SIZES, **fields))
        rng = np.random.default_rng(1)  # fresh biases are zero and norms one
        noisy = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(x.dtype), new_params(model, (1, 4)))
        MADE[key] = model, noisy
    return MADE[key]


def bound(method, model, params):
    """A Peft, and an adapter of noise; nothing is compiled for it."""
    peft, rng = method.bind(model, params, IDS), np.random.default_rng(0)
    shapes = flatten(peft.init(jax.random.key(0), jax.eval_shape(lambda p: p, params)))
    leaves = {path: np.asarray(rng.normal(0, 0.3, x.shape), x.dtype) for path, x in shapes.items()}
    masks = {a.leaf_path(a.mask): layer_mask(a.site) for a in peft.actions if a.mask in a.stored}
    return peft, unflatten(leaves | masks)


def changes(peft, params, adapter):
    """What the adapter adds to each weight, as torch has it, by torch's name."""
    old, new = (flatten(unstack(jpeft.dequantize(tree))) for tree in (params, peft.merge(params, adapter)))
    names = {"kernel": "weight", "embedding": "weight"}
    return {
        ".".join(path[:-1]): (x.T if path[-1] == "kernel" else x).astype(np.float32)
        for path in old
        if path[-1] in names and np.any(x := np.asarray(new[path], np.float64) - np.asarray(old[path], np.float64))
    }


def read_globally(folder):
    """The changes of a folder, as a reader finds them that knows no patterns: r, lora_alpha, A and B."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    assert not any(config.get(key) for key in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
                                               "modules_to_save", "trainable_token_indices"))  # fmt: skip
    assert config["bias"] == "none" and config["peft_type"] == "LORA"
    found = {}
    for name in tensors:
        module, which = re.fullmatch(r"base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", name).groups()
        found.setdefault(module, {})[which] = tensors[name].astype(np.float32)
        assert tensors[name].shape[which == "B"] == config["r"], name
    assert set(config["target_modules"]) == found.keys()
    scale = config["lora_alpha"] / config["r"]
    return config, {module: scale * pair["B"] @ pair["A"] for module, pair in found.items()}


def same_changes(found, expected, atol=TOLERANCE):
    assert expected
    assert expected.keys() <= found.keys()
    for name, change in found.items():
        change = change.T if "embed_tokens" in name else change
        np.testing.assert_allclose(change, expected.get(name, np.zeros_like(change)), atol=atol, err_msg=name)


OVERRIDES = {".*/k_proj": {"rank": 6, "alpha": 24, "rslora": True}, ".*/q_proj": {"rank": 2, "alpha": 3}}
CASES = {
    "ranks, scales": (jpeft.LoRA(rank=4, alpha=8, overrides=OVERRIDES), 8),
    "rslora": (jpeft.LoRA(rank=9, alpha=2, rslora=True, targets=["q_proj", "down_proj"], dropout=0.1), 16),
    "a start": (jpeft.LoRA(rank=4, init_weights="pissa", overrides={".*/o_proj": {"init_weights": "olora"}}), 8),
    "parts": (jpeft.LoRA(rank=3, targets=["down_proj", "q_proj"], overrides={".*/q_proj": {"parts": 4}}), 16),
    "some layers": (jpeft.LoRA(rank=2, targets=["q_proj", "v_proj"], overrides={".*/v_proj": {"layers": [1]}}), 8),
    "head, embedding": (jpeft.LoRA(rank=4, targets=["lm_head", "embed_tokens", "v_proj"]), 8),
    "bfloat16": (jpeft.LoRA(rank=4, targets=["o_proj"], dtype="bfloat16", alpha=12), 8),
    "AdaLoRA": (jpeft.AdaLoRA(rank=4), 8),
    "VeRA": (jpeft.VeRA(rank=7, targets=["q_proj", "o_proj"]), 8),
    "rows": (methods.TrainableTokens(indices=[3, 5], targets=["embed_tokens"]), 8),
    "two": (jpeft.Chain(jpeft.LoRA(rank=4, targets=["q_proj"]), jpeft.VeRA(rank=3, targets=["v_proj"])), 8),
    "on one": (jpeft.Chain(jpeft.LoRA(rank=4, targets=["q_proj"]), methods.LoHa(rank=2, targets=["q_proj"])), 8),
    "DoRA": (jpeft.DoRA(rank=4, targets=["q_proj", "up_proj"]), 16),
    "IA3": (jpeft.IA3(targets=["k_proj", "down_proj"], feedforward=["down_proj"]), 16),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_reader_of_the_global_rank_and_scale_alone_gets_the_adapter(case, tmp_path):
    method, rank = CASES[case]
    model, params = model_of()
    peft, adapter = bound(method, model, params)
    found = save_for("vllm", tmp_path / "out", peft, adapter, params, base_model="base")
    config, got = read_globally(tmp_path / "out")
    same_changes(got, changes(peft, params, adapter))
    assert config["r"] == found.rank == rank and config["base_model_name_or_path"] == "base"
    assert max(found.errors.values(), default=0) < 1e-5


def test_what_was_converted_runs_as_the_adapter_does(tmp_path):
    model, params = model_of()
    peft, adapter = bound(jpeft.Chain(jpeft.DoRA(rank=2, targets=["q_proj"]), jpeft.LoRA(rank=3, targets=["v_proj"])),
                          model, params)  # fmt: skip
    lora = conversion.to_lora(peft, params, adapter)
    assert [s.method.rank for s in lora.peft.actions] == [16, 3, 16, 3] and set(lora.errors) == {
        "model/layers/0/self_attn/q_proj", "model/layers/1/self_attn/q_proj"
    }  # fmt: skip
    got = lora.peft.apply(unstack(params), lora.adapter, IDS)
    np.testing.assert_allclose(got, peft.apply(params, adapter, IDS), atol=1e-5)
    jpeft.save(tmp_path / "own", lora.peft, lora.adapter, unstack(params))
    again, leaves = jpeft.load(tmp_path / "own", model.unrolled(), unstack(params), IDS)
    np.testing.assert_array_equal(again.apply(unstack(params), leaves, IDS), got)


def test_an_nnx_model(tmp_path):
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.q_proj, self.o_proj = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)

        def __call__(self, x):
            return self.o_proj(self.q_proj(x))

    model, x = Block(nnx.Rngs(0)), jnp.ones((1, 6))
    peft = jpeft.AdaLoRA(rank=2, targets=["q_proj"]).bind(model, x)
    params = nnx.state(model, nnx.Param)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, peft.init(jax.random.key(0), params))
    assert save_for("vllm", tmp_path / "out", peft, adapter, params).rank == 8
    merged = peft.merge(params, adapter)
    change = np.asarray(merged["q_proj"]["kernel"][...] - params["q_proj"]["kernel"][...])
    np.testing.assert_allclose(read_globally(tmp_path / "out")[1]["q_proj"], change.T, atol=TOLERANCE)


def test_layers_of_a_scan_that_no_name_of_torch_has():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(4, name="dense")(x), None

    model, x = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(), jnp.ones((1, 4))
    params = jax.device_get(model.init(jax.random.key(0), x, None)["params"])
    peft = jpeft.LoRA(targets=["dense"]).bind(model, params, x, None)
    with pytest.raises(UserError, match="LoRA at 'dense' cannot become a LoRA: the weight is a stack of matrices"):
        as_lora("vllm", peft, peft.init(jax.random.key(0), params), params)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_over_a_quantized_base(scheme, tmp_path):
    model, params = model_of()
    params = jpeft.quantize(params, scheme, block=8)
    peft, adapter = bound(jpeft.DoRA(rank=2, targets=["q_proj"]), model, params)
    save_for("sglang", tmp_path / "out", peft, adapter, params)
    same_changes(read_globally(tmp_path / "out")[1], changes(peft, params, adapter))


def test_an_error_is_stated_and_limited(tmp_path):
    model, params = model_of()
    peft, adapter = bound(jpeft.DoRA(rank=2, targets=["q_proj"]), model, params)
    exact = changes(peft, params, adapter)
    with pytest.raises(UserError, match=r"^DoRA at '\S+': a LoRA of rank 3 misses \d+\.\d+% of its change") as error:
        save_for("vllm", tmp_path / "out", peft, adapter, params, rank=3)
    assert not (tmp_path / "out").exists()
    found = save_for("vllm", tmp_path / "out", peft, adapter, params, rank=3, max_error=1.0)
    worst = max(found.errors, key=found.errors.__getitem__)
    assert f"{worst!r}: a LoRA of rank 3 misses {found.errors[worst]:.2%}" in str(error.value)
    _, got = read_globally(tmp_path / "out")
    for name, change in exact.items():
        best = np.sqrt(np.sum(np.linalg.svd(change)[1][3:] ** 2))  # Eckart and Young
        error = np.linalg.norm(got[name] - change)
        np.testing.assert_allclose(
            [error, found.errors[name.replace(".", "/")] * np.linalg.norm(change)], best, rtol=1e-4
        )


def test_a_large_matrix_is_decomposed_by_a_projection(monkeypatch):
    rng = np.random.default_rng(0)
    low = rng.normal(size=(90, 5)) @ rng.normal(size=(5, 70))
    full = low + 1e-3 * rng.normal(size=low.shape)
    best = np.linalg.norm(np.linalg.svd(full)[1][5:]) / np.linalg.norm(full)
    monkeypatch.setattr(conversion, "_FULL", 8)
    a, _, error = conversion.decompose(low, rank=20)
    assert a.shape == (90, 5) and error < 1e-6
    np.testing.assert_allclose(conversion.decompose(full, rank=5).error, best, rtol=1e-4)


def test_nothing_becomes_a_lora_of_zeros():
    a, b, error = conversion.decompose(np.zeros((3, 4)), rank=2)
    assert (a.shape, b.shape, error) == ((3, 1), (1, 4), 0.0) and not a.any() and not b.any()


# ------------------------------------------------------------------------------------------------------------- SGLang


def test_sglang_gets_all_projections_that_it_fuses(tmp_path):
    """Its loader joins q, k and v, and gate and up, and fails or passes over what stands alone."""
    model, params = model_of("qwen2", attention_bias=True)
    method = jpeft.LoRA(rank=3, targets=["q_proj", "up_proj", "o_proj"], overrides={".*/up_proj": {"layers": [1]}})
    peft, adapter = bound(method, model, params)
    save_for("sglang", tmp_path / "out", peft, adapter, params)
    config, got = read_globally(tmp_path / "out")
    same_changes(got, changes(peft, params, adapter))
    attention = {f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qkvo"}
    assert config["r"] == 3 and got.keys() == attention | {f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up")}
    assert got["model.layers.0.self_attn.k_proj"].shape == (8, 16) and not got["model.layers.0.self_attn.k_proj"].any()
    save_for("vllm", tmp_path / "other", peft, adapter, params)
    assert read_globally(tmp_path / "other")[1].keys() == {name for name in got if got[name].any()}


# --------------------------------------------------------------------------------------------------------- what is not


def refused(method, server="vllm", kind="llama", **fields):
    model, params = model_of(kind, **fields)
    peft, adapter = bound(method, model, params)
    with pytest.raises(UserError) as error:
        as_lora(server, peft, adapter, params)
    return str(error.value)


QWEN = {"kind": "qwen2", "attention_bias": True}
LORA = jpeft.LoRA(targets=["q_proj"])
REFUSED = {
    "BitFit at 'model/layers/self_attn/k_proj/bias' cannot become a LoRA: a bias trains there": (
        jpeft.Chain(LORA, jpeft.BitFit()), QWEN),
    "Train at 'lm_head/kernel' cannot become a LoRA: a whole parameter trains there; jpeft merge": (
        jpeft.Chain(LORA, jpeft.Train(["lm_head"])), {}),
    "PrefixTuning at 'model/layers/self_attn' cannot become a LoRA: it changes the model's computation": (
        jpeft.PrefixTuning(), {}),
    "Bottleneck at 'model/layers/mlp' cannot become a LoRA: it changes the": (jpeft.Bottleneck(targets=["mlp"]), {}),
    "IA3 at 'model/layers/0/self_attn/k_proj' cannot become a LoRA: it also changes the bias": (
        jpeft.IA3(targets=["k_proj"]), QWEN),
    "vLLM cannot serve the LoRA at 'model/embed_tokens': embedding and head are tied": (
        jpeft.LoRA(targets=["embed_tokens"]), {"tie_word_embeddings": True}),
    "vLLM cannot serve the LoRA at 'lm_head': it adapts embedding and head of llama, mistral alone, and": (
        jpeft.LoRA(targets=["lm_head"]), {"kind": "qwen3", "qk_norm": True}),
    "the adapter has a LoRA of rank 600, and the largest that is served is 512": (
        jpeft.LoRA(rank=600, targets=["q_proj"]), {}),
    "llama.cpp cannot serve the LoRA at 'model/embed_tokens': embedding and head are tied": (
        jpeft.LoRA(targets=["embed_tokens"]), {"tie_word_embeddings": True, "server": "gguf"}),
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_what_no_server_computes_is_refused_by_name(said):
    method, options = REFUSED[said]
    assert said in refused(method, **options)


def test_numbers_that_no_server_can_hold_are_refused(tmp_path):
    model, params = model_of()
    peft, adapter = bound(LORA, model, params)
    bad = jax.tree.map(lambda x: x * np.float32(np.nan), adapter)
    with pytest.raises(
        UserError, match="the adapter's LoRA at 'model/layers/0/self_attn/q_proj' holds NaN or infinity"
    ):
        save_for("vllm", tmp_path / "out", peft, bad, params)
    large = jax.tree.map(lambda x: x + np.float32(1e5), adapter)
    with pytest.raises(UserError, match="`dtype` float16: the adapter at 'model/layers/0/self_attn/q_proj' is beyond"):
        save_for("vllm", tmp_path / "out", peft, large, params, dtype="float16")
    dora, adapter = bound(jpeft.DoRA(targets=["q_proj"]), model, params)
    with pytest.raises(UserError, match=r"the adapter's DoRA at .* holds NaN"):
        save_for("vllm", tmp_path / "out", dora, jax.tree.map(lambda x: x * np.float32(np.nan), adapter), params)
    assert not (tmp_path / "out").exists()


class Other(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="dense")(nn.Conv(3, (2,), name="conv")(x)).mean(1)


def test_modules_that_a_server_does_not_know():
    model, x = Other(), jnp.ones((1, 5, 2))
    params = new_params_of(model, x)
    for server, target, said in (
        ("vllm", "conv", "vLLM cannot serve the LoRA at 'conv': it is a convolution, and only linear layers"),
        ("sglang", "dense", "SGLang cannot serve the LoRA at 'dense': it knows the modules q_proj, k_proj,"),
    ):
        peft = jpeft.LoRA(rank=2, targets=target).bind(model, params, x)
        with pytest.raises(UserError, match=said):
            as_lora(server, peft, peft.init(jax.random.key(0), params), params)
    peft = jpeft.LoRA(rank=2, targets="dense").bind(model, params, x)
    assert as_lora("vllm", peft, peft.init(jax.random.key(0), params), params).rank == 8


def new_params_of(model, x):
    return jax.device_get(model.init(jax.random.key(0), x)["params"])


# ----------------------------------------------------------------------------------------------------------- llama.cpp


def gguf_changes(path, arch):
    """The changes of a file as llama.cpp computes them, by GGUF's names."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"], fields["general.architecture"]) == ("adapter", "lora", arch)
    tensors, alpha = {t.name: t.data for t in reader.tensors}, fields["adapter.lora.alpha"]
    found = {}
    for name in {name.rpartition(".")[0] for name in tensors}:
        a, b = (tensors[f"{name}.lora_{which}"].astype(np.float32) for which in "ab")
        a = a.T if name == "token_embd.weight" else a  # see llm_build_inp_embd
        found[name] = alpha / b.shape[1] * b @ a
    return found


GGUF_CASES = {
    "llama": ("llama", "llama", jpeft.LoRA(rank=4, alpha=8, overrides=OVERRIDES), {}),
    "mistral": ("mistral", "llama", jpeft.DoRA(rank=4, targets=["q_proj", "k_proj"]), {}),
    "untied": ("llama", "llama", jpeft.LoRA(rank=3, targets=["lm_head", "embed_tokens", "k_proj"]), {}),
    "qwen2": ("qwen2", "qwen2", jpeft.LoRA(rank=4, rslora=True), {"attention_bias": True}),
    "gemma3": ("gemma3_text", "gemma3", jpeft.VeRA(rank=5, targets=["k_proj", "q_proj"]), {"gemma": True}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", GGUF_CASES)
def test_llama_cpp_gets_the_adapter(case, dtype, tmp_path):
    """Names from the gguf package, the order of rows from the reader of model files."""
    kind, arch, method, fields = GGUF_CASES[case]
    model, params = model_of(kind, **fields)
    peft, adapter = bound(method, model, params)
    lora = as_lora("gguf", peft, adapter, params, dtype=dtype)
    factors = {name.replace("/", "."): (f.a, f.b) for name, (_, f) in conversion.factors_of(lora).items()}
    write_adapter(tmp_path / "adapter.gguf", model.config, factors)
    found = gguf_changes(tmp_path / "adapter.gguf", arch)
    own = {key: i for i, key in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(own, 2)
    expected = changes(peft, params, adapter)
    assert found.keys() == {f"{names.get_name(module)}.weight" for module in expected}
    file = gguf.GGUFWriter(tmp_path / "model.gguf", arch)
    file.add_head_count(4)
    file.add_head_count_kv(2)
    for name, change in found.items():
        file.add_tensor(name, np.ascontiguousarray(change.T if name == "token_embd.weight" else change))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    with open_tensors(tmp_path / "model.gguf") as tensors:
        read = {name.removesuffix(".weight"): tensor.read() for name, tensor in tensors.items()}
    atol = TOLERANCE if dtype == "float32" else 1e-2
    for module, change in expected.items():
        np.testing.assert_allclose(read[module], change, atol=atol, err_msg=module)


def test_llama_cpp_has_no_other_models(tmp_path):
    pair = np.ones((4, 1), np.float32), np.ones((1, 4), np.float32)
    with pytest.raises(UserError, match=r"^llama.cpp has no tensor for 'model.layers.0.other' of llama"):
        write_adapter(tmp_path / "x.gguf", DecoderConfig(), {"model.layers.0.other": pair})
    with pytest.raises(UserError, match="'bert' is not one of mistral, llama"):
        write_adapter(tmp_path / "x.gguf", DecoderConfig(model_type="bert"), {})
    assert not list(tmp_path.iterdir())
