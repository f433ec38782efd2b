"""HuggingFace PEFT in torch as the oracle of folders for servers: without patterns, they compute what jpeft does."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from peft import PeftModel

import jpeft
from jpeft.hf import save_for
from tests.parity.test_hf_decoder import IDS, QV, bound, close, in_torch, logits, made_in_torch, torch_logits
from tests.parity.test_hf_decoder import base as base
from tests.parity.test_hf_decoder import linen as linen

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, transformers' and peft's own

CASES = {
    "ranks, scales": (
        "llama",
        jpeft.LoRA(rank=4, alpha=8, overrides={
            ".*/k_proj": {"rank": 6, "alpha": 24, "rslora": True}, ".*/q_proj": {"rank": 2, "alpha": 3},
        }),
    ),
    "a start": ("qwen2", jpeft.LoRA(rank=4, alpha=2, init_weights="pissa", targets=["down_proj", "q_proj"])),
    "head": ("llama", jpeft.LoRA(rank=4, rslora=True, targets=["lm_head", "embed_tokens", "v_proj"])),
    "tied": ("llama-tied", jpeft.LoRA(rank=5, targets=["q_proj", "o_proj"])),
    "gemma2": ("gemma2", jpeft.LoRA(rank=4, targets=["gate_proj", "k_proj"], overrides={".*/k_proj": {"alpha": 9}})),
    "parts": ("qwen3", jpeft.LoRA(rank=2, parts=2, targets=["q_proj", "down_proj"])),
    "DoRA": ("llama", jpeft.DoRA(rank=4, targets=["q_proj", "o_proj"])),
    "VeRA": ("gemma3", jpeft.VeRA(rank=9, targets=["q_proj"])),
}  # fmt: skip


@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize("case", CASES)
def test_a_folder_for_a_server_computes_the_adapter(case, server, base, linen, tmp_path):
    name, method = CASES[case]
    model, params = linen(name, True)
    peft, adapter = bound(method, model, params)
    save_for(server, tmp_path / "out", peft, adapter, params)
    file = tmp_path / "out" / "adapter_config.json"
    config = json.loads(file.read_text())
    assert not (config["rank_pattern"] or config["alpha_pattern"] or config["use_rslora"])
    file.write_text(json.dumps({k: v for k, v in config.items() if not k.endswith("_pattern")}))
    close(
        torch_logits(PeftModel.from_pretrained(in_torch(base(name)), tmp_path / "out")), logits(peft, params, adapter)
    )


def test_an_adapter_of_peft_with_patterns(base, linen, tmp_path):
    patterns = {**QV, "r": 4, "rank_pattern": {"layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"v_proj": 11}}
    want = made_in_torch(base("llama"), tmp_path / "torch", patterns)
    model, params = linen("llama", False)
    peft, adapter = jpeft.hf.load(tmp_path / "torch", model, params, jnp.asarray(IDS))
    assert np.ptp([action.method.rank for action in peft.actions]) == 2
    save_for("vllm", tmp_path / "out", peft, adapter, params)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    close(torch_logits(PeftModel.from_pretrained(in_torch(base("llama")), tmp_path / "out")), want)
