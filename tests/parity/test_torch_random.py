"""The numbers of torch's CPU generator, against torch."""

import math

import numpy as np
import pytest

from jpeft.methods.families.torch_random import Generator, randperm

torch = pytest.importorskip("torch")


def of_torch(seed):
    return torch.Generator("cpu").manual_seed(seed)


@pytest.mark.parametrize("seed", [0, 777, 2**32 + 3, -5])
@pytest.mark.parametrize(
    ("n", "count"), [(1, 1), (2, 2), (100, 100), (100, 99), (100, 7), (24, 1000), (768 * 768, 5000)]
)
def test_the_head_of_a_permutation_is_that_of_torch(n, count, seed):
    np.testing.assert_array_equal(randperm(n, count, seed), torch.randperm(n, generator=of_torch(seed))[:count])


@pytest.mark.exhaustive
@pytest.mark.parametrize("n", [4096 * 4096, 214_748_363, 214_748_364, 4096 * 53_248])  # torch draws the last two apart
def test_the_head_of_a_long_permutation_is_that_of_torch(n):
    whole = torch.randperm(n, generator=of_torch(3), dtype=torch.int32)
    np.testing.assert_array_equal(randperm(n, 300_000, 3), whole[:300_000])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.3, 0.7), (-1 / math.sqrt(7), 1 / math.sqrt(7))])
def test_uniform_numbers_are_those_of_torch_call_after_call(low, high, dtype):
    generator, theirs = Generator(5), of_torch(5)
    for shape in [(8, 64), (3, 1, 17), (1000, 257)]:  # enough to meet the ends of the interval
        wanted = torch.empty(shape, dtype=getattr(torch, dtype)).uniform_(low, high, generator=theirs).float().numpy()
        ours = generator.uniform(shape, low, high, dtype)
        # A processor without fused multiply-add rounds once more.
        ends = np.abs(ours.astype(np.float32) - wanted) > (high - low) / 2
        atol = {"float32": 6e-8, "bfloat16": 4e-3, "float16": 5e-4}[dtype]
        np.testing.assert_allclose(ours.astype(np.float32)[~ends], wanted[~ends], rtol=0, atol=atol)
        assert ours.dtype.name == dtype and ends.sum() <= 1 and (ours.astype(np.float32) != wanted).mean() < 0.3


@pytest.mark.parametrize(("shape", "a"), [((8, 64), 0.0), ((64, 8), 0.0), ((8, 1, 64), math.sqrt(5))])
def test_kaiming_uniform_numbers_are_those_of_torch(shape, a):
    wanted = torch.nn.init.kaiming_uniform_(torch.empty(shape), a=a, generator=of_torch(3)).numpy()
    ours = Generator(3).kaiming_uniform(shape, gain=math.sqrt(2 / (1 + a * a)))
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=6e-8)
