"""Folders of virtual tokens: what was written comes back, and what no folder can hold is refused."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.errors import AdapterError
from jpeft.methods import CPT, Cartridge, MultitaskPromptTuning, PromptTuning, PTuning
from jpeft.models.bert import Bert, BertConfig
from jpeft.models.decoder import Decoder, DecoderConfig
from jpeft.recipes.describing import describe
from tests.zoo import moved, parameters, same

pytestmark = pytest.mark.usefixtures("quick_compiles")

N = 3
IDS = jnp.array([[3, 1, 4, 1, 5]])
CONFIG = DecoderConfig(
    vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1,
)  # fmt: skip
PREFIX = {"length": N, "shift_positions": True}
# Each method, and the one that its folder comes back as.
METHODS = {
    "PromptTuning": (PromptTuning(length=N), PromptTuning(length=N)),
    "PTuning": (PTuning(length=N, hidden=4), PromptTuning(length=N)),
    "MultitaskPromptTuning": (MultitaskPromptTuning(length=N, tasks=2, rank=2),) * 2,
    "CPT": (CPT(token_ids=(1, 2, 3), token_types=(1, 2, 3)),) * 2,
    "PrefixTuning": (jpeft.PrefixTuning(**PREFIX),) * 2,
    "PrefixTuning, MLP": (
        jpeft.PrefixTuning(**PREFIX, reparametrize=True, hidden=4, embedding=3), jpeft.PrefixTuning(**PREFIX)
    ),
    "Cartridge": (Cartridge(length=N, frozen_tokens=2),) * 2,
    "bfloat16": (PromptTuning(length=N, dtype="bfloat16"),) * 2,
}  # fmt: skip


def adapted(method, model, *inputs):
    params = nn.meta.unbox(parameters(model, *inputs))
    peft = method.bind(model, params, *inputs)
    return peft, params, moved(peft, params)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_what_was_written_comes_back(name, scan, tmp_path):
    method, back = METHODS[name]
    model = Decoder(CONFIG, scan_layers=scan)
    peft, params, adapter = adapted(method, model, IDS)
    jpeft.hf.save(tmp_path, peft, adapter, params, task_type="CAUSAL_LM")
    found, leaves = jpeft.hf.load(tmp_path, model, params, IDS)
    assert found.method == back
    if found.method == method and name != "CPT":
        same(leaves, adapter)
    given = {"task_ids": 1} if "Multitask" in name else {}
    y = jax.jit(lambda a, b: (peft.apply(params, a, IDS, **given), found.apply(params, b, IDS, **given)))(
        adapter, leaves
    )
    np.testing.assert_allclose(*y, atol=1e-5)
    assert describe(tmp_path)["method"]["num_virtual_tokens"] == N


def test_a_head_that_trains_lies_beside_the_prompt(tmp_path):
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
    )  # fmt: skip
    model = Bert(config, pooler=True, num_labels=2, output="logits")
    chain = jpeft.Chain(PromptTuning(length=N), jpeft.Train("classifier"))
    peft, params, adapter = adapted(chain, model, IDS)
    jpeft.hf.save(tmp_path, peft, adapter, params, task_type="SEQ_CLS")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(tensors) == ["base_model.classifier.bias", "base_model.classifier.weight", "prompt_embeddings"]
    found, leaves = jpeft.hf.load(tmp_path, model, params, IDS)
    same(leaves, adapter)
    assert [member.name for member in found.method.methods()] == ["PromptTuning", "Train"]


@pytest.mark.parametrize(("method", "task_type", "message"), [
    (PromptTuning(length=N), None, "runs PROMPT_TUNING by the task: give task_type"),
    (jpeft.PrefixTuning(length=N), "CAUSAL_LM", "PREFIX_TUNING has shift_positions=True, and this PrefixTuning was"),
    (jpeft.PrefixTuning(**PREFIX, targets=[r"0/self_attn"]), "CAUSAL_LM", "in each of 2 layers, .* in 1 attentions"),
    (jpeft.Chain(PromptTuning(length=N), jpeft.LoRA(rank=2)), "CAUSAL_LM", "has one method, this chain has"),
])  # fmt: skip
def test_what_no_folder_can_hold_is_refused(method, task_type, message, tmp_path):
    peft, params, adapter = adapted(method, Decoder(CONFIG, scan_layers=False), IDS)
    with pytest.raises(ValueError, match=message):
        jpeft.hf.save(tmp_path / "a", peft, adapter, params, task_type=task_type)
    assert not (tmp_path / "a").exists()


def spoiled(folder, config=None, tensors=None):
    """The folder with other fields and tensors."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **(config or {})}))
    held = {**load_file(folder / "adapter_model.safetensors"), **(tensors or {})}
    save_file({k: x for k, x in held.items() if x is not None}, folder / "adapter_model.safetensors", {"format": "pt"})


ZEROS = np.zeros((N, 8), np.float32)


@pytest.mark.parametrize(("name", "config", "tensors", "message"), [
    ("PromptTuning", {}, {"prompt_embeddings": None}, "holds no PromptTuning"),
    ("PromptTuning", {}, {"prompt_embeddings": ZEROS[:, :5]}, r"has shape \[3, 5\], expected \[3, 8\]"),
    ("PromptTuning", {}, {"prompt_embeddings": ZEROS * np.nan}, "holds NaN"),
    ("PromptTuning", {"num_virtual_tokens": 4}, {}, r"has shape \[3, 8\], expected \[4, 8\]"),
    ("PromptTuning", {"num_virtual_tokens": 0}, {}, "num_virtual_tokens must be a positive integer, got 0"),
    ("PromptTuning", {"num_virtual_tokens": None}, {}, "num_virtual_tokens must be a positive integer, got null"),
    ("PromptTuning", {"new_field": 1}, {}, "unknown field 'new_field' is 1"),
    ("PromptTuning", {"num_transformer_submodules": 3}, {}, "num_transformer_submodules must be 1 or 2, got 3"),
    ("PromptTuning", {}, {"model.norm.weight": np.ones(8, np.float32)}, "expected names that start with 'base_model.'"),
    ("PromptTuning", {}, {"base_model.model.norm.weight": 2 * np.ones(8, np.float32)}, "a base weight that differs"),
    ("PrefixTuning", {"num_transformer_submodules": 2}, {}, "num_transformer_submodules=2 is not supported, only 1"),
    ("PrefixTuning", {}, {"prompt_embeddings": np.zeros((N, 8), np.float32)}, r"expected \[3, 16\]"),
    ("MultitaskPromptTuning", {}, {"prefix_task_cols": None}, "lacks 'prefix_task_cols'"),
    ("CPT", {"cpt_tokens_type_mask": [1]}, {}, "token_types must have one for each of 3 token_ids, got 1"),
    ("Cartridge", {"num_frozen_tokens": 3}, {}, "frozen_tokens must be fewer than length, 3"),
])  # fmt: skip
def test_folders_that_do_not_fit_are_refused_with_the_file(name, config, tensors, message, tmp_path):
    model = Decoder(CONFIG)
    peft, params, adapter = adapted(METHODS[name][0], model, IDS)
    jpeft.hf.save(tmp_path, peft, adapter, params, task_type="CAUSAL_LM")
    spoiled(tmp_path, config, tensors)
    with pytest.raises(AdapterError, match=message) as caught:
        jpeft.hf.load(tmp_path, model, params, IDS)
    assert str(tmp_path) in str(caught.value)
