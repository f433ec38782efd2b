"""Folders of virtual tokens as HuggingFace PEFT writes and reads them: equal logits, and equal greedy generation."""

import copy
import functools
import json
import tempfile
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from peft.tuners.cpt.model import CPTEmbedding
from safetensors.numpy import load_file

import jpeft
from jpeft.core.tree import flatten
from jpeft.methods import CPT, MultitaskPromptTuning, PTuning
from jpeft.methods.cpt import loss_weights
from jpeft.methods.multitask_prompt import from_source
from jpeft.methods.prefix_start import from_keys_values, from_text

pytestmark = [
    pytest.mark.usefixtures("quick_compiles"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"),
]
transformers.logging.set_verbosity_error()

N, ROWS = 3, 40
SMALL = {"vocab_size": ROWS, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 20}
IDS = np.random.default_rng(0).integers(3, ROWS, (2, 6))
MASK = np.array([[1] * 6, [1, 1, 1, 1, 0, 0]])
CAUSAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": N}


def drawn(model, scale=0.4):
    """A model whose weights are far from those of its start, so that attention is not nearly uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "norm" not in name.lower() and "ln_" not in name:
                x.copy_(scale * torch.randn(x.shape, generator=generator))
    return model.eval()


@functools.cache
def base(kind):
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2)
        return drawn(transformers.LlamaForCausalLM(config))
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=ROWS, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
        )
        return drawn(transformers.GPT2LMHeadModel(config))
    config = transformers.BertConfig(**SMALL, num_attention_heads=2, max_position_embeddings=32)
    return drawn(transformers.BertForSequenceClassification(config))


CONFIGS = {
    "prompt": lambda: peft.PromptTuningConfig(**CAUSAL),
    "p-tuning": lambda: peft.PromptEncoderConfig(**CAUSAL, encoder_hidden_size=5),
    "multitask": lambda: peft.MultitaskPromptTuningConfig(**CAUSAL, num_tasks=2, num_ranks=2),
    "cpt": lambda: peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7], cpt_tokens_type_mask=[1, 2, 3]),
    "prefix": lambda: peft.PrefixTuningConfig(**CAUSAL),
    "prefix, projected": lambda: peft.PrefixTuningConfig(**CAUSAL, prefix_projection=True, encoder_hidden_size=5),
    "cartridge": lambda: peft.CartridgeConfig(**CAUSAL, num_frozen_tokens=1),
}


def tuned(kind, config):
    """A model with virtual tokens away from their start."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base(kind)), config)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "prompt_encoder" in name or "modules_to_save" in name:
                x.copy_(x + 0.5 * torch.randn(x.shape))
    return model.eval()


def logits(model, tasks):
    given = {"task_ids": torch.tensor([1, 0])} if tasks else {}
    with torch.no_grad():
        y = model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK), **given)
    y = y.logits.numpy()
    return y if y.ndim == 2 else y[:, -IDS.shape[1] :]


def greedy(model, tasks):
    """What follows one text."""
    given = {"task_ids": torch.tensor([1])} if tasks else {}
    ids = torch.tensor(IDS[:1])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False,
            eos_token_id=None, pad_token_id=0, **given,
        )  # fmt: skip
    return out[0, -5:].tolist()


@functools.cache
def ours(kind, scan):
    """The same model here, and its parameters."""
    if kind == "gpt2":
        with tempfile.TemporaryDirectory() as folder:
            base(kind).save_pretrained(folder)
            model = transformers.FlaxGPT2LMHeadModel.from_pretrained(folder, from_pt=True)
        return model.module, model.params
    with tempfile.TemporaryDirectory() as folder:
        base(kind).save_pretrained(folder)
        model, params = jpeft.models.load(folder, **({} if kind == "bert" else {"scan_layers": scan}))
    return (model.clone(output="logits") if kind == "bert" else model), params


def run(pair, params, kind, tasks):
    own, adapter = pair
    given = {"task_ids": jnp.array([1, 0])} if tasks else {}
    positions = (np.broadcast_to(np.arange(IDS.shape[1]), IDS.shape),) if kind == "gpt2" else ()
    y = jax.jit(lambda p, a: own.apply(p, a, IDS, MASK, *positions, **given))(params, adapter)
    return y.logits if kind == "gpt2" else y


def continued(pair, model, params, kind, tasks):
    """Greedy tokens, from whole calls without a cache."""
    own, adapter = pair
    given = {"task_ids": jnp.array([1])} if tasks else {}

    @jax.jit
    def step(ids, i):
        positions = (jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape),) if kind == "gpt2" else ()
        y = own.apply(params, adapter, ids, (jnp.arange(ids.shape[1]) < i)[None].astype(jnp.int32), *positions, **given)
        chosen = (y.logits if kind == "gpt2" else y)[0, i - 1].argmax()
        return ids.at[0, i].set(chosen.astype(ids.dtype)), chosen

    ids, out = jnp.pad(jnp.asarray(IDS[:1]), ((0, 0), (0, 5))), []
    for i in range(IDS.shape[1], IDS.shape[1] + 5):
        ids, token = step(ids, i)
        out.append(int(token))
    return out


@pytest.fixture
def promotion(request):
    """transformers' Flax models add integers to booleans."""
    with jax.numpy_dtype_promotion("standard" if request.node.callspec.params["kind"] == "gpt2" else "strict"):
        yield


def close(got, want, real=MASK):
    keep = np.ones(1) if np.ndim(want) == 2 else real[..., None]
    np.testing.assert_allclose(np.asarray(got) * keep, want * keep, atol=1e-4)


@pytest.mark.parametrize(("kind", "scan"), [("llama", True), ("llama", False), ("gpt2", False)])
@pytest.mark.parametrize("name", CONFIGS)
def test_folders_of_decoders_compute_the_same_here_and_there(name, kind, scan, tmp_path, promotion):
    config, tasks = CONFIGS[name](), name == "multitask"
    there = tuned(kind, config)
    there.save_pretrained(tmp_path / "theirs")
    expected = logits(there, tasks)
    model, params = ours(kind, scan)
    inputs = (IDS, MASK, np.broadcast_to(np.arange(6), IDS.shape)) if kind == "gpt2" else (IDS, MASK)
    pair = jpeft.hf.load(tmp_path / "theirs", model, params, *inputs)
    close(run(pair, params, kind, tasks), expected)
    plain = logits(base(kind), False)
    assert np.abs((expected - plain) * MASK[..., None]).max() > 0.1
    if scan or kind == "gpt2":
        assert continued(pair, model, params, kind, tasks) == greedy(there, tasks)
    own, adapter = pair
    assert own.virtual_tokens == N
    jpeft.hf.save(tmp_path / "ours", own, adapter, params, task_type="CAUSAL_LM")
    theirs, written = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours"))
    assert theirs.keys() == written.keys()
    for key, x in theirs.items():
        np.testing.assert_allclose(written[key], x, atol=1e-6)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base(kind)), tmp_path / "ours").eval()
    close(logits(back, tasks), expected)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_folders_of_a_classifier_train_its_head_too(name, tmp_path):
    kinds = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
    there = tuned("bert", kinds[name](task_type="SEQ_CLS", num_virtual_tokens=N))
    there.save_pretrained(tmp_path / "theirs")
    model, params = ours("bert", False)
    own, adapter = jpeft.hf.load(tmp_path / "theirs", model, params, IDS, MASK)
    assert [member.name for member in own.method.methods()][1] == "Train"
    close(run((own, adapter), params, "bert", False), logits(there, False))
    jpeft.hf.save(tmp_path / "ours", own, adapter, params, task_type="SEQ_CLS")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base("bert")), tmp_path / "ours").eval()
    close(logits(back, False), logits(there, False))


# --- the networks, starts and losses of PEFT --------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tunings_network_is_pefts(encoder, tmp_path):
    config = peft.PromptEncoderConfig(**CAUSAL, encoder_hidden_size=5, encoder_reparameterization_type=encoder.upper())
    there = tuned("llama", config)
    network = there.prompt_encoder["default"]
    model, params = ours("llama", True)
    own = PTuning(length=N, encoder=encoder, hidden=5).bind(model, params, IDS)
    state = {name: x.detach().numpy() for name, x in network.state_dict().items()}
    leaves = {"prompt_input": state["embedding.weight"]}
    for i, place in enumerate((0, 2, 4) if encoder == "mlp" else (0, 2)):
        leaves[f"prompt_kernel_{i}"] = state[f"mlp_head.{place}.weight"].T
        leaves[f"prompt_bias_{i}"] = state[f"mlp_head.{place}.bias"]
    for i in range(2 if encoder == "lstm" else 0):
        for direction, suffix in (("forward", ""), ("backward", "_reverse")):
            at = f"l{i}{suffix}"
            leaves[f"lstm_{i}_{direction}_input"] = state[f"lstm_head.weight_ih_{at}"].T
            leaves[f"lstm_{i}_{direction}_recurrent"] = state[f"lstm_head.weight_hh_{at}"].T
            leaves[f"lstm_{i}_{direction}_bias"] = state[f"lstm_head.bias_ih_{at}"] + state[f"lstm_head.bias_hh_{at}"]
    adapter = {"model": {"embed_tokens": {name: jnp.asarray(x) for name, x in leaves.items()}}}
    fresh = own.init(jax.random.key(0), params)
    assert {p: x.shape for p, x in flatten(fresh).items()} == {p: x.shape for p, x in flatten(adapter).items()}
    close(run((own, adapter), params, "llama", False), logits(there, False))
    jpeft.hf.save(tmp_path / "ours", own, adapter, params, task_type="CAUSAL_LM")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base("llama")), tmp_path / "ours").eval()
    assert type(back.prompt_encoder["default"]).__name__ == "PromptEncoder"
    close(logits(back, False), logits(there, False))


@pytest.mark.parametrize(("start", "theirs"), [
    ("average", "AVERAGE_SOURCE_TASKS"), ("exact", "EXACT_SOURCE_TASK"), ("shared", "ONLY_SOURCE_SHARED")
])  # fmt: skip
def test_tasks_start_from_others_as_in_peft(start, theirs, tmp_path):
    tuned("llama", CONFIGS["multitask"]()).save_pretrained(tmp_path / "source")
    file = str(tmp_path / "source/adapter_model.safetensors")
    config = peft.MultitaskPromptTuningConfig(
        **CAUSAL, num_tasks=1, num_ranks=2, prompt_tuning_init=theirs, prompt_tuning_init_state_dict_path=file,
        prompt_tuning_init_task=1,
    )  # fmt: skip
    there = peft.get_peft_model(copy.deepcopy(base("llama")), config).prompt_encoder["default"]
    model, params = ours("llama", True)
    _, source = jpeft.hf.load(tmp_path / "source", model, params, IDS, MASK)
    own = MultitaskPromptTuning(length=N, tasks=1, rank=2).bind(model, params, IDS)
    found = from_source(own.init(jax.random.key(0), params), source, start, task=1)["model"]["embed_tokens"]
    np.testing.assert_allclose(found["prompt"], there.embedding.weight.detach(), atol=1e-6)
    if start != "shared":
        np.testing.assert_allclose(found["task_cols"], there.prefix_task_cols.detach(), atol=1e-6)
        np.testing.assert_allclose(found["task_rows"], there.prefix_task_rows.detach(), atol=1e-6)


def test_cpt_has_pefts_gradient_and_loss():
    types = [1, 2, 3, 4, 5, 6, 7, 8]
    config = peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=list(range(5, 13)), cpt_tokens_type_mask=types,
        opt_weighted_loss_type="decay", opt_loss_decay_factor=0.7, opt_projection_epsilon=4.0,
        opt_projection_format_epsilon=2.0,
    )  # fmt: skip
    there = peft.get_peft_model(copy.deepcopy(base("llama")), config)
    delta = there.prompt_encoder["default"].delta_embedding.weight
    torch.manual_seed(2)
    with torch.no_grad():
        delta.copy_(torch.randn(delta.shape))
    moved = delta.detach().numpy().copy()
    kinds = np.array([[1, 1, 2, 2, 3, 4]] * 2)
    loss = there(
        input_ids=torch.tensor(IDS), attention_mask=torch.ones_like(torch.tensor(IDS)), labels=torch.tensor(IDS),
        input_type_mask=torch.tensor(kinds),
    ).loss  # fmt: skip
    loss.backward()

    model, params = ours("llama", True)
    method = CPT(token_ids=tuple(range(5, 13)), token_types=types, epsilon=4.0, format_epsilon=2.0, keep=True)
    own = method.bind(model, params, IDS)
    adapter = own.init(jax.random.key(0), params)
    whole = jnp.concatenate([jnp.broadcast_to(jnp.arange(5, 13), (2, 8)), jnp.asarray(IDS)], axis=1)
    weights = loss_weights(jnp.concatenate([jnp.broadcast_to(jnp.array(types), (2, 8)), kinds + 8], axis=1), 0.7)

    @jax.jit
    @jax.value_and_grad
    def our_loss(delta):
        leaves = {**adapter["model"]["embed_tokens"], "delta": delta}
        y = own.apply(params, {"model": {"embed_tokens": leaves}}, IDS)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(y[:, :-1]), whole[:, 1:, None], axis=-1)[..., 0]
        counted = (weights[:, 1:] > 0).astype(jnp.float32)
        return (losses * weights[:, 1:]).sum() / counted.sum()

    value, gradient = our_loss(jnp.asarray(moved))
    np.testing.assert_allclose(value, loss.detach(), rtol=1e-5)
    np.testing.assert_allclose(gradient, delta.grad, atol=1e-5)
    assert isinstance(there.prompt_encoder["default"], CPTEmbedding)


def test_a_prefix_starts_from_a_texts_keys_and_values_as_in_peft():
    there = peft.get_peft_model(copy.deepcopy(base("llama")), CONFIGS["cartridge"]())
    with torch.no_grad():
        found = base("llama")(input_ids=torch.tensor(IDS[:1]), use_cache=True).past_key_values
    flat = peft.tuners.cartridge.utils.initialize_kv_prefix_from_past_key_values(there, past_key_values=found)
    model, params = ours("llama", True)
    own = jpeft.methods.Cartridge(length=N).bind(model, params, IDS)
    fresh = own.init(jax.random.key(0), params)
    layers = [(key.numpy(), value.numpy()) for key, value in (found[i] for i in range(2))]
    for adapter in (from_text(own, params, fresh, IDS[:1]), from_keys_values(own, fresh, layers)):
        leaves = adapter["model"]["layers"]["self_attn"]
        both = [
            np.concatenate([leaves[f"frozen_{n}"], leaves[f"prefix_{n}"]], axis=1).swapaxes(0, 1)
            for n in ("key", "value")
        ]
        np.testing.assert_allclose(np.stack(both, 2).reshape(N, -1), flat, atol=1e-5)
