"""Methods that rotate a weight's inputs."""

from peft import BOFTConfig, HRAConfig, OFTConfig

from tests.parity.cases import Case

CASES = {
    "OFT": Case("OFT", lambda targets: OFTConfig(target_modules=targets)),
    "OFT exact": Case(
        "OFT",
        lambda targets: OFTConfig(
            r=4, oft_block_size=0, use_cayley_neumann=False, bias="oft_only", target_modules=targets
        ),
        bases=("bert",),
    ),
    "OFT shared": Case(
        "OFT",
        lambda targets: OFTConfig(
            oft_block_size=8, block_share=True, coft=True, eps=0.3, num_cayley_neumann_terms=3, target_modules=targets
        ),
        bases=("llama",),
    ),
    "OFT on an embedding": Case(
        "OFT",
        lambda targets: OFTConfig(oft_block_size=16, target_modules=targets),
        targets={"bert": ["word_embeddings"]},
        bases=("bert",),
    ),
    "BOFT": Case("BOFT", lambda targets: BOFTConfig(target_modules=targets)),
    "BOFT by the number of blocks": Case(
        "BOFT",
        lambda targets: BOFTConfig(boft_block_size=0, boft_block_num=2, target_modules=targets),
        bases=("llama",),
    ),
    "HRA": Case("HRA", lambda targets: HRAConfig(target_modules=targets)),
    "HRA orthogonal": Case(
        "HRA",
        # Started from different vectors: of PEFT's equal pairs, Gram-Schmidt makes noise.
        lambda targets: HRAConfig(r=5, apply_GS=True, init_weights=False, target_modules=targets),
        bases=("bert",),
    ),
}
