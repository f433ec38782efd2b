"""Rotations of convolutions, and block sizes that do not divide, against HuggingFace PEFT in torch."""

import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import BOFTConfig, HRAConfig, OFTConfig, PeftModel, get_peft_model

import jpeft
from tests.parity.moved import saved

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own
IMAGE = np.random.default_rng(0).normal(size=(2, 4, 7, 7)).astype(np.float32)


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.image = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.point = torch.nn.Conv2d(6, 10, 1)

    def forward(self, x):
        return self.point(torch.tanh(self.image(x)))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), strides=2, padding=1, name="image")(x)
        return nn.Conv(10, (1, 1), name="point")(jnp.tanh(x))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = TorchNet().eval()
    params = {
        n: {"kernel": m.weight.detach().numpy().transpose(2, 3, 1, 0), "bias": m.bias.detach().numpy()}
        for n, m in net.named_children()
    }
    return net, Net(), params, jnp.asarray(IMAGE.transpose(0, 2, 3, 1))


BOTH = ["image", "point"]
CASES = {
    "HRA": HRAConfig(r=4, target_modules=BOTH),
    "BOFT": BOFTConfig(boft_block_size=3, target_modules=BOTH),
    "OFT": OFTConfig(oft_block_size=3, use_cayley_neumann=False, target_modules=["point"]),
    "OFT, next divisor": OFTConfig(oft_block_size=4, target_modules=["point"]),  # of 6 inputs PEFT makes blocks of 3
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_from_torch_and_back(name, net, tmp_path):
    net, model, params, x = net
    want = saved(net, CASES[name], tmp_path / "torch", IMAGE)
    peft, adapter = jpeft.hf.load(tmp_path / "torch", model, params, x)
    applied, merged = jax.jit(lambda p, a: (peft.apply(p, a, x), model.apply({"params": peft.merge(p, a)}, x)))(
        params, adapter
    )
    for got in (applied, merged):
        np.testing.assert_allclose(got.transpose(0, 3, 1, 2), want, atol=1e-4)
    jpeft.hf.save(tmp_path / "ours", peft, adapter, params)
    back = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "ours")
    with torch.no_grad():
        np.testing.assert_allclose(back(torch.tensor(IMAGE)).numpy(), want, atol=1e-5)


def test_a_convolution_in_which_peft_adds_up_overlapping_windows(net, tmp_path):
    net, model, params, x = net
    fresh = get_peft_model(copy.deepcopy(net), OFTConfig(oft_block_size=3, target_modules=["image"]))
    with torch.no_grad():  # no change of a weight: even one that is zero changes the outputs
        assert np.abs(fresh(torch.tensor(IMAGE)).numpy() - net(torch.tensor(IMAGE)).numpy()).max() > 0.1
    fresh.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="OFT at 'image': PEFT's convolution with a window of 3×3 adds up"):
        jpeft.hf.load(tmp_path, model, params, x)
