"""The numbers of torch's CPU generator, against numbers that torch 2.13 gave. See also tests/parity."""

import ml_dtypes
import numpy as np
import pytest

from jpeft.methods.families import torch_random
from jpeft.methods.families.torch_random import Generator, randperm


def test_permutations():
    np.testing.assert_array_equal(randperm(10, 10, seed=0), [4, 1, 7, 5, 3, 9, 0, 8, 6, 2])
    np.testing.assert_array_equal(randperm(4096 * 4096, 3, seed=777), [1374311, 8240085, 6766295])


@pytest.mark.parametrize("count", [1, 7, 40, 50])
def test_long_permutations_are_drawn_inside_out(count, monkeypatch):
    """torch draws 64 bits a place for them, which takes too long to run here: at a smaller limit, step by step."""
    monkeypatch.setattr(torch_random, "_FEW", 1)
    monkeypatch.setattr(torch_random, "_CHUNK", 16)
    bits = Generator(5).bits(2 * 50).astype(object)
    whole = list(range(50))
    for i in range(50):
        other = (bits[2 * i] << 32 | bits[2 * i + 1]) % (i + 1)
        whole[i], whole[other] = whole[other], i
    np.testing.assert_array_equal(randperm(50, count, seed=5), whole[:count])


def test_uniform_numbers():
    generator = Generator(0)
    np.testing.assert_allclose(generator.uniform((2,), 0, 1), [0.49625659, 0.76822180], atol=6e-8)
    np.testing.assert_allclose(generator.uniform((1,), 0, 1), [0.08847743], atol=6e-8)  # goes on from there
    narrow = Generator(0).uniform((2, 1), -0.3, 0.7, "bfloat16")
    assert narrow.dtype == ml_dtypes.bfloat16 and narrow.shape == (2, 1)
    np.testing.assert_array_equal(narrow.astype(np.float32)[:, 0], [0.1962890625, 0.46875])


def test_the_end_of_the_interval_is_its_start():
    numbers = Generator(0).uniform((5000,), 0, 1, "bfloat16").astype(np.float32)
    assert numbers.max() < 1 and (numbers == 0).any()
