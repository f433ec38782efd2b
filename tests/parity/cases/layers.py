"""Adapters on some of the layers that a model stacks: the others stay as they are."""

from peft import HRAConfig, IA3Config, LoHaConfig, LoraConfig, OFTConfig, ShiraConfig

from tests.parity.cases import Case


def _case(method, make, **fields):
    return Case(method, make, bases=("llama",), **fields)


SECOND = {"layers_to_transform": [1], "layers_pattern": "layers"}
CASES = {
    "LoRA on one layer": _case("LoRA", lambda targets: LoraConfig(r=2, target_modules=targets, **SECOND)),
    "LoRA, each on its own layers": _case(
        "LoRA",
        lambda targets: LoraConfig(
            r=2,
            target_modules=targets,
            exclude_modules=["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"],
            rank_pattern={"v_proj": 3},
        ),
    ),
    "IA3 on one layer": _case(
        "IA3",
        lambda targets: IA3Config(
            target_modules=r".*layers\.0\..*(q_proj|down_proj)", feedforward_modules=r".*down_proj"
        ),
    ),
    "HRA on one layer": _case("HRA", lambda targets: HRAConfig(r=4, target_modules=targets, **SECOND)),
    "LoHa on one layer": _case("LoHa", lambda targets: LoHaConfig(r=4, target_modules=targets, **SECOND)),
    "OFT on one layer": _case(
        "OFT", lambda targets: OFTConfig(oft_block_size=8, r=0, target_modules=targets, **SECOND)
    ),
    "SHiRA on one layer": _case(
        "SHiRA", lambda targets: ShiraConfig(r=2, target_modules=["layers.1.self_attn.v_proj"]), scale=0.3
    ),
}
