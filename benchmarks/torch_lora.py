"""HuggingFace PEFT's LoRA steps in torch, at the shape of a Llama with random weights; `benchmarks/gpu.py` runs it.

Layers are checkpointed if asked, attention is SDPA, the base is bfloat16 or bitsandbytes' NF4, the adapter float32,
the optimizer fused AdamW. torch runs eagerly.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
from importlib import metadata
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def missing(quantized: bool, device: str) -> str | None:
    """Why the steps cannot run here; None if they can."""
    for name in PACKAGES if quantized else PACKAGES[:3]:
        if importlib.util.find_spec(name) is None:
            return f"no {name}"
    import torch

    return "torch has no CUDA" if device == "cuda" and not torch.cuda.is_available() else None


def adapted_model(config: dict[str, Any], device: str, rank: int, alpha: float, quantized: bool, remat: bool) -> Any:
    """The model with LoRA on all linear layers but the head."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaConfig.from_dict({**config, "use_cache": False})
    theirs._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(theirs)
    torch.set_default_dtype(torch.float32)
    if quantized:
        quantize_linear_layers(model, device)
    if remat:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


def quantize_linear_layers(model: Any, device: str) -> None:
    """Quantizes all linear layers but the head to bitsandbytes' NF4, as `from_pretrained` does for weights it reads."""
    import bitsandbytes as bnb
    import torch

    options: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and not name.endswith("lm_head"):
            sizes = layer.in_features, layer.out_features
            new = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, device="meta", **options)
            weight = layer.weight.data.cpu()
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=new, **options)
            owner, own = name.rsplit(".", 1)
            setattr(model.get_submodule(owner), own, new.to(device))
    model.is_loaded_in_4bit = True  # the attribute that PEFT checks


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step, and the peak of torch's allocator while steps run."""
    device = "cuda" if case["backend"] == "gpu" else "cpu"
    if (why := missing(case["quantized"], device)) is not None:
        return {"missing": why}
    import torch

    cuda, shape = device == "cuda", (case["rows"], case["length"])
    model = adapted_model(
        case["config"], device, case["rank"], case["alpha"], case["quantized"], case["remat"] != "none"
    )
    ids = torch.randint(0, case["config"]["vocab_size"], shape, device=device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()  # waits for the device
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    first, *_ = [step() for _ in range(3)]
    seconds = statistics.median(step() for _ in range(case["rounds"]))
    versions = {name: metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    return {
        "seconds": seconds,
        "first_seconds": first,
        "tokens": ids.numel(),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "trained": sum(p.numel() for p in trained),
        "versions": versions,
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
