"""Third-party models, unchanged: the Flax classes of transformers 4.57.6. Run by .ci/run, which installs them."""

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.core.tree import flatten, unflatten
from tests.zoo import moved, numbers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of transformers' own imports
    import transformers

# transformers 4.57 warns that its Flax classes are deprecated, and about the defaults of its own generation.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
]
transformers.logging.set_verbosity_error()


class _OldNumpy:
    """``jax.numpy`` as transformers' T5 expects it: newer jax renamed ``a_max`` of ``clip`` to ``max``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    def clip(self, x, a_min=None, a_max=None):
        return jnp.clip(x, a_min, a_max)


transformers.models.t5.modeling_flax_t5.jnp = _OldNumpy()

IDS = np.random.default_rng(0).integers(3, 60, (2, 6)).astype("int32")
MASK = np.ones_like(IDS)
POSITIONS = np.broadcast_to(np.arange(6, dtype="int32"), IDS.shape)


@dataclass(frozen=True)
class Foreign:
    """A transformers model.

    Attributes:
      model: its Flax class.
      config: its configuration class.
      fields: a tiny configuration.
      inputs: the inputs of its Linen module.
      query_value: the targets of its query and value projections.
      table: the path of its embedding.
      tied: whether its head is the embedding.
      generates: the prompt for generation; None: it does not generate.
    """

    model: str
    config: str
    fields: dict[str, Any]
    inputs: dict[str, Any]
    query_value: str
    table: str = ""
    tied: bool = False
    generates: Any = None

    def load(self, **options):
        config = getattr(transformers, self.config)(**self.fields)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = getattr(transformers, self.model)(config, seed=0, **options)
        # Their initial weights, of deviation 0.02, are nearly linear and nearly zero; norms keep theirs.
        drawn = flatten(numbers(model.params, 0.3))
        kept = {p: x for p, x in flatten(model.params).items() if "norm" in "/".join(p).lower() or "ln_" in "/".join(p)}
        model.params = unflatten({**drawn, **kept})
        return model


IMAGES = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype("float32")
SOUND = np.random.default_rng(2).normal(size=(2, 8, 16)).astype("float32")
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_DECODER = {"decoder_input_ids": IDS[:, :4], "decoder_attention_mask": MASK[:, :4]}

MODELS = {
    "BERT": Foreign(
        "FlaxBertForSequenceClassification",
        "BertConfig",
        {**_SMALL, "vocab_size": 64, "max_position_embeddings": 16, "num_labels": 3},
        {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": 0 * IDS, "position_ids": POSITIONS,
         "head_mask": None},
        r".*/(query|value)",
    ),
    "GPT-2": Foreign(
        "FlaxGPT2LMHeadModel",
        "GPT2Config",
        {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 64, "n_positions": 16, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 2},
        {"input_ids": IDS, "attention_mask": MASK, "position_ids": POSITIONS},
        r".*/c_attn",
        "transformer/wte",
        True,
        IDS,
    ),
    "Llama": Foreign(
        "FlaxLlamaForCausalLM",
        "LlamaConfig",
        {**_SMALL, "vocab_size": 64, "max_position_embeddings": 16, "num_key_value_heads": 1},
        {"input_ids": IDS, "attention_mask": MASK, "position_ids": POSITIONS},
        r".*/(q_proj|v_proj)",
        "model/embed_tokens",
    ),
    "T5": Foreign(
        "FlaxT5ForConditionalGeneration",
        "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 64,
         "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"},
        {"input_ids": IDS, "attention_mask": MASK, **_DECODER},
        r".*/(q|v)",
        "shared",
        True,
        IDS,
    ),
    "ViT": Foreign(
        "FlaxViTForImageClassification",
        "ViTConfig",
        {**_SMALL, "image_size": 8, "patch_size": 4, "num_labels": 3},
        {"pixel_values": IMAGES},
        r".*/(query|value)",
    ),
    "Whisper": Foreign(
        "FlaxWhisperForConditionalGeneration",
        "WhisperConfig",
        {"vocab_size": 64, "num_mel_bins": 8, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
         "max_source_positions": 8, "max_target_positions": 8, "pad_token_id": 2, "bos_token_id": 1,
         "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
        {"input_features": SOUND, **_DECODER, "decoder_position_ids": POSITIONS[:, :4]},
        r".*/(q_proj|v_proj)",
        "model/decoder/embed_tokens",
        True,
    ),
}  # fmt: skip

METHODS = {
    "query, value": lambda f: jpeft.LoRA(rank=2, targets=f.query_value),
    "all-linear": lambda f: jpeft.LoRA(rank=2),
    "IA3": lambda f: jpeft.IA3(),
    "BitFit": lambda f: jpeft.BitFit(),
    "Bottleneck": lambda f: jpeft.Bottleneck(size=2, activation="tanh"),
    "embedding": lambda f: jpeft.LoRA(rank=2, targets=[f.table]),
}


@pytest.fixture(autouse=True)
def _as_transformers_runs(quick_compiles):
    """Standard promotion, because transformers adds integers to booleans."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def loaded():
    """A model by name, and its logits as a function of parameters; each compiled once."""

    @functools.cache
    def get(name: str):
        hf = MODELS[name].load()
        return hf, jax.jit(lambda params: hf.module.apply({"params": params}, **MODELS[name].inputs).logits)

    return get


CASES = [
    (name, method)
    for name, foreign in MODELS.items()
    for method in METHODS
    if not (method == "embedding" and not foreign.table) and not (method == "BitFit" and name in ("T5", "Llama"))
]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_three_steps_change_every_adapter_leaf_and_no_base_weight(name, method, loaded):
    foreign, (hf, run) = MODELS[name], loaded(name)
    module, params = hf.module, hf.params
    before = jax.tree.map(np.array, params)
    peft = METHODS[method](foreign).bind(module, params, **foreign.inputs)
    assert {s.via for s in peft.sites} == {
        "replace" if method == "BitFit" else "merge" if method == "embedding" and foreign.tied else "fused"
    }
    adapter = jax.jit(peft.init)(jax.random.key(0), params)
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, adapter, state):
        # A loss without symmetries, so that all gradients differ from 0.
        def loss(a):
            logits = peft.apply(params, a, **foreign.inputs).logits
            return (logits * jnp.cos(jnp.arange(logits.size, dtype=logits.dtype)).reshape(logits.shape)).sum(), logits

        grads, logits = jax.grad(loss, has_aux=True)(adapter)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, logits

    trained, state = adapter, jax.jit(tx.init)(adapter)
    for _ in range(3):
        trained, state, _ = step(params, trained, state)
    start = flatten(adapter)
    for path, leaf in flatten(trained).items():
        assert (np.asarray(leaf) != np.asarray(start[path])).any(), path
    jax.tree.map(np.testing.assert_array_equal, params, before)

    _, _, y = step(params, trained, state)
    assert np.abs(y - run(params)).max() > 1e-3
    if method != "Bottleneck":
        merged = run(jax.jit(peft.merge)(params, trained))
        np.testing.assert_allclose(y, merged, atol=1e-5 * max(1, np.abs(merged).max()))


@pytest.mark.parametrize("name", [n for n, f in MODELS.items() if f.generates is not None])
@pytest.mark.parametrize("method", ["all-linear", "embedding"])
def test_generate_inside_intercept_equals_generate_of_the_merged_model(name, method, loaded):
    foreign, (hf, _) = MODELS[name], loaded(name)
    peft = METHODS[method](foreign).bind(hf.module, hf.params, **foreign.inputs)
    adapter = moved(peft, hf.params, 0.5)

    def generate(params):
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        return np.asarray(hf.generate(foreign.generates, params=params, **options).sequences)

    with peft.intercept():
        got = generate(peft.overlay(hf.params, adapter))
    want = generate(peft.merge(hf.params, adapter))
    np.testing.assert_array_equal(got, want)
    assert (want != generate(hf.params)).any()
