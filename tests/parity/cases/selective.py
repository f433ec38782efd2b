"""Methods that train rows, tokens or scales."""

from peft import IA3Config, LNTuningConfig, LoraConfig, TrainableTokensConfig

from tests.parity.cases import Case

TABLES = {"bert": ["word_embeddings"], "llama": ["embed_tokens"]}
CASES = {
    "TrainableTokens": Case(
        "TrainableTokens",
        lambda targets: TrainableTokensConfig(token_indices=[3, 17, 5], target_modules=targets),
        targets=TABLES,
    ),
    "TrainableTokens beside LoRA": Case(
        "LoRA",
        lambda targets: LoraConfig(r=2, target_modules=targets, trainable_token_indices={"embed_tokens": [3, 17]}),
        bases=("llama",),
    ),
    "IA3": Case("IA3", lambda targets: IA3Config(target_modules=targets, feedforward_modules=targets[2:])),
    "IA3 everything scales outputs": Case(
        "IA3", lambda targets: IA3Config(target_modules=targets, feedforward_modules=[])
    ),
    "IA3 expression": Case(
        "IA3",
        lambda targets: IA3Config(
            target_modules=r".*\.(query|q_proj|down_proj)", feedforward_modules=r".*_proj", modules_to_save=["norm"]
        ),
        bases=("llama",),
    ),
    "LN tuning": Case(
        "Train",
        lambda targets: LNTuningConfig(target_modules=targets),
        targets={"bert": ["LayerNorm"], "llama": ["input_layernorm", "norm"]},
    ),
    "LN tuning and modules": Case(
        "Train",
        lambda targets: LNTuningConfig(target_modules=["attention.output.LayerNorm"], modules_to_save=["value"]),
        bases=("bert",),
    ),
}
