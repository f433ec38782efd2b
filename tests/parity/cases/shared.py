"""Methods with leaves that all modules share, and AdaLoRA."""

from peft import AdaLoraConfig, RandLoraConfig, VBLoRAConfig, VeraConfig

from tests.parity.cases import Case

BANK = (".vblora_vector_bank.default",)
TOTAL_STEP = ("total_step",)  # says nothing about the function; PEFT only wants one

CASES = {
    "VeRA": Case("VeRA", lambda targets: VeraConfig(target_modules=targets)),
    "VeRA seed": Case(
        "VeRA",
        lambda targets: VeraConfig(
            r=6, projection_prng_key=7, d_initial=0.3, vera_dropout=0.1, bias="vera_only", target_modules=targets
        ),
        bases=("bert",),
    ),
    "VeRA from its seed": Case(
        "VeRA", lambda targets: VeraConfig(r=6, projection_prng_key=1, save_projection=False, target_modules=targets)
    ),
    "VeRA on one layer": Case(
        "VeRA", lambda targets: VeraConfig(r=6, layers_to_transform=[1], target_modules=targets), bases=("llama",)
    ),
    "VB-LoRA": Case(
        "VBLoRA",
        lambda targets: VBLoRAConfig(num_vectors=20, vector_length=16, target_modules=targets),
        missing_keys=BANK,
    ),
    "VB-LoRA other sizes": Case(
        "VBLoRA",
        lambda targets: VBLoRAConfig(
            r=3, topk=4, num_vectors=12, vector_length=4, vblora_dropout=0.1, target_modules=targets
        ),
        bases=("llama",),
        missing_keys=BANK,
    ),
    "RandLoRA": Case("RandLoRA", lambda targets: RandLoraConfig(target_modules=targets), scale=0.01),
    "RandLoRA other rank": Case(
        "RandLoRA",
        lambda targets: RandLoraConfig(r=5, randlora_alpha=4, projection_prng_key=-3, target_modules=targets),
    ),
    "RandLoRA from its seed": Case(
        "RandLoRA",
        lambda targets: RandLoraConfig(
            r=5, randlora_alpha=4, projection_prng_key=2, save_projection=False, target_modules=targets
        ),
    ),
    "RandLoRA sparse": Case(
        "RandLoRA",
        lambda targets: RandLoraConfig(r=4, randlora_alpha=2, sparse=True, target_modules=targets),
        bases=("bert",),
    ),
    "RandLoRA very sparse": Case(
        "RandLoRA",
        lambda targets: RandLoraConfig(
            r=8, randlora_alpha=2, very_sparse=True, randlora_dropout=0.1, target_modules=targets
        ),
        bases=("llama",),
    ),
    "AdaLoRA": Case("AdaLoRA", lambda targets: AdaLoraConfig(total_step=10, target_modules=targets), differ=TOTAL_STEP),
    "AdaLoRA other rank": Case(
        "AdaLoRA",
        lambda targets: AdaLoraConfig(
            init_r=5, lora_alpha=3, lora_dropout=0.1, orth_reg_weight=0.1, total_step=9, target_modules=targets
        ),
        differ=TOTAL_STEP,
    ),
    "AdaLoRA on one layer": Case(
        "AdaLoRA",
        lambda targets: AdaLoraConfig(init_r=3, layers_to_transform=[0], total_step=9, target_modules=targets),
        bases=("llama",),
        differ=TOTAL_STEP,
    ),
}
