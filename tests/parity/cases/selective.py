"""Methods that train rows, biases or tokens."""

from peft import LoraConfig, TrainableTokensConfig

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
}
