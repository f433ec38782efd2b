"""LoRA, alone and beside trained biases, modules and tokens."""

from peft import LoraConfig

from tests.parity.cases import Case

CASES = {
    "LoRA": Case("LoRA", lambda targets: LoraConfig(r=4, lora_alpha=6, target_modules=targets)),
    "LoRA rsLoRA": Case("LoRA", lambda targets: LoraConfig(r=4, use_rslora=True, target_modules=targets)),
    "LoRA biases": Case("LoRA", lambda targets: LoraConfig(r=2, bias="all", target_modules=targets), bases=("bert",)),
    "LoRA modules": Case(
        "LoRA",
        lambda targets: LoraConfig(r=2, target_modules=targets, modules_to_save=["norm", "post_attention_layernorm"]),
        bases=("llama",),
    ),
    "LoRA MiCA": Case("LoRA", lambda targets: LoraConfig(r=4, init_lora_weights="mica", target_modules=targets)),
    "DoRA": Case("DoRA", lambda targets: LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=targets)),
    "DoRA rsLoRA": Case(
        "DoRA",
        lambda targets: LoraConfig(
            r=4, lora_alpha=6, use_rslora=True, use_dora=True, rank_pattern={targets[0]: 2}, target_modules=targets
        ),
        bases=("llama",),
    ),
    "DoRA embeddings": Case(
        "DoRA",
        lambda targets: LoraConfig(r=4, use_dora=True, target_modules=targets),
        targets={"bert": ["word_embeddings", "query"]},
        bases=("bert",),
    ),
    # The third and fourth of the first row's tokens in the test; the second row has no such pair.
    "aLoRA": Case(
        "ALoRA",
        lambda targets: LoraConfig(
            r=4, lora_alpha=6, alora_invocation_tokens=[32, 18], task_type="CAUSAL_LM", target_modules=targets
        ),
        bases=("llama",),
        merges=False,
    ),
}
