"""Methods with few entries, frequencies or kernels for a weight, and those that act on its outputs.

Most of PEFT's starts are moved by more than the usual step: divided by the number of inputs, it would not be seen.
"""

from peft import BeftConfig, C3AConfig, FourierFTConfig, RoadConfig, ShiraConfig

from tests.parity.cases import Case

CASES = {
    "C3A": Case("C3A", lambda targets: C3AConfig(block_size=16, target_modules=targets), scale=3.0),
    "C3A pattern": Case(
        "C3A",
        lambda targets: C3AConfig(block_size=8, block_size_pattern={"q_proj": 4}, target_modules=targets),
        bases=("llama",),
        scale=3.0,
    ),
    "C3A biases": Case(
        "C3A",
        lambda targets: C3AConfig(block_size=32, init_weights=True, target_modules=targets, bias="c3a_only"),
        bases=("bert",),
        scale=3.0,
    ),
    "FourierFT": Case("FourierFT", lambda targets: FourierFTConfig(n_frequency=200, target_modules=targets), scale=0.5),
    "FourierFT pattern and biases": Case(
        "FourierFT",
        lambda targets: FourierFTConfig(
            n_frequency=500,
            n_frequency_pattern={"value": 1024},
            scaling=300.0,
            random_loc_seed=3,
            init_weights=True,
            target_modules=targets,
            bias="fourier_only",
        ),
        bases=("bert",),
    ),
    "SHiRA": Case("SHiRA", lambda targets: ShiraConfig(r=4, target_modules=targets), scale=0.5),
    "SHiRA seed": Case(
        "SHiRA", lambda targets: ShiraConfig(r=2, random_seed=42, target_modules=targets), bases=("llama",), scale=0.5
    ),
    "BEFT": Case("BEFT", lambda targets: BeftConfig(target_modules=targets), bases=("bert",)),
    "BEFT without biases": Case(
        "BEFT", lambda targets: BeftConfig(target_modules=targets), bases=("llama",), merges=False
    ),
    "RoAd": Case("RoAd", lambda targets: RoadConfig(group_size=16, target_modules=targets)),
    "RoAd 2": Case(
        "RoAd", lambda targets: RoadConfig(variant="road_2", group_size=8, target_modules=targets), bases=("llama",)
    ),
    "RoAd 4": Case(
        "RoAd",
        lambda targets: RoadConfig(variant="road_4", group_size=4, init_weights=False, target_modules=targets),
        bases=("bert",),
    ),
}
