"""The torch side of `benchmarks/gpu.py` trains what its jpeft side trains."""

from pathlib import Path

import jax
import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("quantized", [False, True])
def test_both_sides_train_the_same_adapter(quantized, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu
    import gpu_cases
    import torch_lora

    args = gpu.parsed(["--shapes", "1B", "--only", "torch", "--rounds", "1", "--tiny"])
    case = next(case for _, _, case in gpu.cases(args, "cpu") if case["quantized"] == quantized)
    theirs = torch_lora.measure(case)
    model, shapes = gpu_cases.abstract_model(case)
    _, state = gpu_cases.step_of(case, model, gpu_cases.random_params(shapes))
    assert theirs["trained"] == sum(leaf.size for leaf in jax.tree.leaves(state.adapter))
    assert theirs["tokens"] == np.size(gpu_cases.full_rows(case).input_ids)
    assert theirs["seconds"] > 0 and set(torch_lora.PACKAGES) == set(theirs["versions"])
