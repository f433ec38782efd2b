"""Methods that act on convolutions, against HuggingFace PEFT in torch, both ways."""

import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, HiraConfig, LoHaConfig, LoKrConfig, PeftModel, get_peft_model

import jpeft
from tests.parity.moved import saved

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own
IMAGE = np.random.default_rng(0).normal(size=(2, 4, 5, 5)).astype(np.float32)


class TorchNet(torch.nn.Module):
    """Kernels with a window of two axes, of one position, and of one axis."""

    def __init__(self):
        super().__init__()
        self.image = torch.nn.Conv2d(4, 6, (3, 2), stride=(2, 1))
        self.point = torch.nn.Conv2d(6, 8, 1)
        self.line = torch.nn.Conv1d(8, 10, 3)

    def forward(self, x):
        return self.line(torch.tanh(self.point(self.image(x))).flatten(2))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 2), strides=(2, 1), padding="VALID", name="image")(x)
        x = jnp.tanh(nn.Conv(8, (1, 1), name="point")(x))
        return nn.Conv(10, (3,), padding="VALID", name="line")(x.reshape(x.shape[0], -1, 8))


@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)
    net = TorchNet().eval()

    def kernel(module):
        return np.moveaxis(module.weight.detach().numpy(), (0, 1), (-1, -2))

    params = {n: {"kernel": kernel(m), "bias": m.bias.detach().numpy()} for n, m in net.named_children()}
    return net, Net(), params


LINE = {"rank_pattern": {"line": 1}}  # where PEFT's Kronecker product has its factors in order
CASES = {
    "LoHa": LoHaConfig(r=2, alpha=3),
    "LoHa split": LoHaConfig(r=2, use_effective_conv2d=True),
    "LoKr": LoKrConfig(r=1, alpha=2, **LINE),
    "LoKr whole": LoKrConfig(r=8, alpha=2, decompose_factor=2, **LINE),
    # PEFT's own forward pass fails for a split 1-D kernel, in torch.kron.
    "LoKr split": LoKrConfig(
        r=1, use_effective_conv2d=True, decompose_both=True, decompose_factor=2, target_modules=["image", "point"]
    ),
    "HiRA": HiraConfig(r=3),
    "AdaLoRA": AdaLoraConfig(init_r=3, lora_alpha=4, total_step=5, target_modules=["image", "point"]),  # no 1-D kernels
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_from_torch_and_back(name, nets, tmp_path):
    net, model, params = nets
    config = copy.deepcopy(CASES[name])
    config.target_modules = config.target_modules or {"image", "point", "line"}
    want = saved(net, config, tmp_path / "torch", IMAGE)

    x = jnp.asarray(IMAGE.transpose(0, 2, 3, 1))
    peft, adapter = jpeft.hf.load(tmp_path / "torch", model, params, x)
    applied, merged = jax.jit(lambda p, a: (peft.apply(p, a, x), model.apply({"params": peft.merge(p, a)}, x)))(
        params, adapter
    )
    for got in (applied, merged):
        np.testing.assert_allclose(got.transpose(0, 2, 1), want, atol=1e-4)

    jpeft.hf.save(tmp_path / "ours", peft, adapter, params)
    back = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "ours")
    with torch.no_grad():
        np.testing.assert_allclose(back(torch.tensor(IMAGE)).numpy(), want, atol=1e-5)


def test_a_kronecker_product_in_the_other_order(nets, tmp_path):
    net, model, params = nets
    get_peft_model(copy.deepcopy(net), LoKrConfig(r=8, target_modules=["line"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'line' is a 1-D convolution with a whole W2, for which PEFT computes"):
        jpeft.hf.load(tmp_path, model, params, jnp.asarray(IMAGE.transpose(0, 2, 3, 1)))
