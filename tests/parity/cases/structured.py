"""Low-rank updates with structure: products entry by entry and of Kronecker, shared and separate blocks."""

from peft import DeloraConfig, GraloraConfig, HiraConfig, LoHaConfig, LoKrConfig, MissConfig

from tests.parity.cases import Case

CASES = {
    "LoHa": Case("LoHa", lambda targets: LoHaConfig(r=4, alpha=6, target_modules=targets)),
    "LoHa patterns": Case(
        "LoHa",
        lambda targets: LoHaConfig(
            r=2, target_modules=targets, rank_pattern={targets[0]: 3}, alpha_pattern={targets[1]: 5}
        ),
        scale=0.3,
        bases=("bert",),
    ),
    "LoKr": Case("LoKr", lambda targets: LoKrConfig(r=2, alpha=6, target_modules=targets)),
    "LoKr whole": Case(
        "LoKr", lambda targets: LoKrConfig(r=8, target_modules=targets, rank_pattern={targets[0]: 5}), bases=("bert",)
    ),
    "LoKr both products": Case(
        "LoKr",
        lambda targets: LoKrConfig(r=1, alpha=2, decompose_both=True, target_modules=targets),
        scale=0.4,
        bases=("llama",),
    ),
    "LoKr by 4": Case(
        "LoKr", lambda targets: LoKrConfig(r=2, decompose_factor=4, target_modules=targets), bases=("bert",)
    ),
    "LoKr by 5": Case(  # divides no size
        "LoKr", lambda targets: LoKrConfig(r=3, decompose_factor=5, target_modules=targets), bases=("llama",)
    ),
    "MiSS": Case("MiSS", lambda targets: MissConfig(r=8, target_modules=targets)),
    "MiSS padded": Case("MiSS", lambda targets: MissConfig(r=12, target_modules=targets), bases=("llama",)),
    "MiSS bat": Case(
        "MiSS", lambda targets: MissConfig(r=8, init_weights="bat", target_modules=targets), bases=("llama",)
    ),
    "MiSS mini": Case(
        "MiSS", lambda targets: MissConfig(r=6, init_weights="mini", mini_r=4, target_modules=targets), bases=("bert",)
    ),
    "GraLoRA": Case("GraLoRA", lambda targets: GraloraConfig(r=8, target_modules=targets), scale=0.05),
    "GraLoRA hybrid": Case(
        "GraLoRA",
        lambda targets: GraloraConfig(r=8, gralora_k=4, hybrid_r=3, alpha=9, target_modules=targets, bias="all"),
        bases=("bert",),
    ),
    "HiRA": Case("HiRA", lambda targets: HiraConfig(r=4, target_modules=targets), scale=0.3),
    "HiRA table": Case(
        "HiRA",
        # PEFT does not follow its rank_pattern.
        lambda targets: HiraConfig(r=3, target_modules=targets, rank_pattern={targets[1]: 2}),
        targets={"bert": ["word_embeddings", "value"], "llama": ["embed_tokens", "v_proj"]},
        scale=0.3,
    ),
    "DeLoRA": Case("DeLoRA", lambda targets: DeloraConfig(r=4, delora_lambda=2, target_modules=targets)),
    "DeLoRA patterns": Case(
        "DeLoRA",
        lambda targets: DeloraConfig(
            r=2, target_modules=targets, rank_pattern={targets[0]: 3}, lambda_pattern={targets[1]: 5}
        ),
        scale=0.05,
        bases=("llama",),
    ),
}
