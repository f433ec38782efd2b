"""The starts of LoRA against HuggingFace PEFT's own functions, which change the base of a torch layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import collect_eigens, crop_corda_eigens
from peft.tuners.lora.eva import SVDHook, get_eva_state_dict

import jpeft
from jpeft.methods.eva import redistribute

pytestmark = pytest.mark.filterwarnings("ignore")
IN, OUT, RANK, ALPHA = 12, 10, 2, 3
rng = np.random.default_rng(0)


def decaying(rows, columns):
    """A matrix whose singular values halve, so that randomized decompositions find its vectors too."""
    u, s, vt = np.linalg.svd(rng.normal(0, 1, (rows, columns)), full_matrices=False)
    return (u * 4 * 0.5 ** np.arange(len(s)) @ vt).astype(np.float32)


W, GRADIENT, X = decaying(IN, OUT), decaying(IN, OUT), 4 * decaying(50, IN)
COVARIANCE = X.T @ X / len(X)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear(IN, OUT, bias=False)
        self.dense.weight.data = torch.tensor(W.T.copy())

    def forward(self, x):
        return self.dense(x)


def in_torch(prepare=lambda net, config: None, **options):
    """PEFT's ``(A, B)`` as ``[in, r]`` and ``[r, out]``, and what it took from the base."""
    net = Net()
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["dense"], **options)
    prepare(net, config)
    layer = get_peft_model(net, config).base_model.model.dense
    a, b = (getattr(layer, n)["default"].weight.detach().numpy().T for n in ("lora_A", "lora_B"))
    return a, b, W - layer.base_layer.weight.detach().numpy().T


def here(statistics=None, **options):
    model, params = nn.Sequential([nn.Dense(OUT, use_bias=False)]), {"layers_0": {"kernel": jnp.asarray(W)}}
    peft = jpeft.LoRA(rank=RANK, alpha=ALPHA, targets="layers_0", **options).bind(model, params, jnp.ones((1, IN)))
    found = None if statistics is None else {"layers_0": statistics}
    adapter = peft.init(jax.random.key(0), params, statistics=found)
    x = jnp.asarray(X)
    np.testing.assert_allclose(peft.apply(params, adapter, x), x @ W, atol=1e-5)  # the base is untouched
    return {name: np.asarray(leaf) for name, leaf in adapter["layers_0"].items()}


def same_up_to_signs(got, want, atol=2e-5):
    """Singular vectors are determined up to their signs, which A and B share."""
    np.testing.assert_allclose(np.abs(got["lora_a"]), np.abs(want[0]), atol=atol)
    np.testing.assert_allclose(np.abs(got["lora_b"]), np.abs(want[1]), atol=atol)


def _corda(method):
    def prepare(net, config):
        net.dense.covariance_matrix = torch.tensor(COVARIANCE / np.diag(COVARIANCE).mean())
        net.dense.rank, net.dense.corda_method = RANK, method
        collect_eigens(net, config, verbose=False)
        crop_corda_eigens(net, config)

    return prepare


def _loraga(net, config):
    net.dense._peft_loraga_grad = torch.tensor(GRADIENT.T.copy())


CARRIED = {
    "pissa": ("pissa", None, {}, {"init_lora_weights": "pissa"}),
    "pissa, randomized": ("pissa_niter_20", None, {}, {"init_lora_weights": "pissa"}),
    "olora": ("olora", None, {}, {"init_lora_weights": "olora"}),
    **{
        f"corda {method}": (
            "corda",
            {"covariance": COVARIANCE},
            {"corda_method": method},
            {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method=method), "prepare": _corda(method)},
        )
        for method in ("ipm", "kpm")
    },
    **{
        f"lora_ga {direction} {scale}": (
            "lora_ga",
            {"gradient": GRADIENT},
            {"direction": direction, "scale": scale, "stable_gamma": 4},
            {
                "init_lora_weights": "lora_ga",
                "lora_ga_config": LoraGAConfig(direction=direction, scale=scale, stable_gamma=4),
                "prepare": _loraga,
            },
        )
        for direction, scale in [("ArB2r", "stable"), ("A2rBr", "unit"), ("ArBr", "gd_scale"), ("ArB2r", "weight_svd")]
    },
}


@pytest.mark.parametrize("name", CARRIED)
def test_a_start_that_peft_takes_from_the_base_is_carried_by_the_adapter(name):
    init, statistics, options, theirs = CARRIED[name]
    a, b, taken = in_torch(**theirs)
    got = here(statistics, init_weights=init, init_options=options)
    atol = 5e-4 if init == "corda" else 2e-5  # PEFT multiplies by an inverse in float32
    same_up_to_signs(got, (a, b), atol)
    np.testing.assert_allclose(ALPHA / RANK * got["lora_start_a"] @ got["lora_start_b"], taken, atol=atol)
    np.testing.assert_array_equal(got["lora_a"], got["lora_start_a"])
    np.testing.assert_array_equal(got["lora_b"], got["lora_start_b"])


def test_lora_ga_at_random_takes_the_same_directions_for_a_and_b():
    got = here({"gradient": GRADIENT}, init_weights="lora_ga", init_options={"direction": "random", "scale": "unit"})
    u, s, vt = np.linalg.svd(GRADIENT)
    taken = np.abs(u[:, : 2 * RANK].T @ got["lora_a"]).argmax(0)
    np.testing.assert_allclose(np.abs(got["lora_a"]), np.abs(u[:, taken]), atol=1e-4)
    np.testing.assert_allclose(np.abs(got["lora_b"]), np.abs(s[taken, None] * vt[taken]), atol=1e-4)


def test_mica_trains_a_on_the_smallest_singular_vectors():
    a, b, taken = in_torch(init_lora_weights="mica")
    got = here(init_weights="mica")
    same_up_to_signs(got, (a, b))
    assert not np.any(taken) and set(got) == {"lora_a", "lora_b"} and not got["lora_a"].any()


def test_eva_starts_from_the_main_directions_of_the_inputs():
    centered = X - X.mean(0)  # PEFT takes the mean away
    hook = SVDHook(n_components=RANK, sim_thresh=0.99, name="dense")
    hook(None, torch.tensor(centered), None)
    got = here({"covariance": centered.T @ centered / len(X)}, init_weights="eva")
    same_up_to_signs(got, (hook.svd.components_.numpy().T, np.zeros((RANK, OUT))))


def test_evas_ranks():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(IN, IN, bias=False), torch.nn.Linear(IN, OUT, bias=False)
            variances, vectors = np.linalg.eigh(np.cov(X.T))
            whitened = vectors / np.sqrt(variances) * np.linspace(1, 1.5, IN)  # so the second has no main direction
            self.first.weight.data = torch.tensor(whitened.T.astype(np.float32))

        def forward(self, x):
            return self.second(self.first(x))

    torch.manual_seed(0)
    net, x = Two(), X - X.mean(0)
    config = LoraConfig(r=3, target_modules=["first", "second"], init_lora_weights="eva")
    batches = [{"x": torch.tensor(x)}] * 2
    found = get_eva_state_dict(
        net, batches, config, forward_fn=lambda net, batch: net(batch["x"]), prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None, show_progress_bar=False,
    )  # fmt: skip
    y = x @ net.first.weight.detach().numpy().T
    seen = {name: {"covariance": z.T @ z / len(z)} for name, z in (("first", x), ("second", y))}
    want = {name: len(a) for name, a in found.items()}
    got = redistribute(jpeft.LoRA(rank=3, alpha=6), seen)
    assert {name: fields["rank"] for name, fields in got.overrides.items()} == want and len(set(want.values())) == 2
    assert all(fields["alpha"] == 2 * fields["rank"] for fields in got.overrides.values())  # the scale stays 2


@pytest.mark.parametrize("cls", ["LoRA", "DoRA"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_carried_start_is_an_ordinary_adapter_of_twice_the_rank_in_torch(cls, rslora, tmp_path):
    model = nn.Sequential([nn.Dense(OUT, use_bias=False)])
    params = {"layers_0": {"kernel": jnp.asarray(W)}}
    method = jpeft.methods.METHODS[cls](rank=RANK, alpha=ALPHA, rslora=rslora, init_weights="pissa", targets="layers_0")
    peft = method.bind(model, params, jnp.ones((1, IN)))
    own = dict(peft.init(jax.random.key(0), params)["layers_0"])
    own["lora_a"] = own["lora_a"] + rng.normal(0, 0.3, (IN, RANK)).astype(np.float32)
    want = np.asarray(peft.apply(params, {"layers_0": own}, jnp.asarray(X)))
    assert np.abs(want - X @ W).max() > 0.1
    jpeft.hf.save(tmp_path / "adapter", peft, {"layers_0": own}, params)

    net = torch.nn.Module()
    net.layers_0 = Net().dense
    net.forward = lambda x: net.layers_0(x)
    adapted = PeftModel.from_pretrained(net, tmp_path / "adapter").eval()
    config = adapted.peft_config["default"]
    assert (config.r, config.init_lora_weights) == (2 * RANK, True)
    with torch.no_grad():
        np.testing.assert_allclose(adapted(torch.tensor(X)).numpy(), want, atol=1e-4)
    again, read = jpeft.hf.load(tmp_path / "adapter", model, params, jnp.ones((1, IN)))
    np.testing.assert_allclose(again.apply(params, read, jnp.asarray(X)), want, atol=1e-5)
