"""Sparse, spectral and circulant updates, and changes of outputs, against their equations in numpy and float64."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.core import backend
from jpeft.errors import AdapterError
from jpeft.methods import BEFT, C3A, FourierFT, RoAd, SHiRA
from tests.zoo import InLoop, moved, numbers

INPUTS, OUTPUTS = 8, 12
FEW, MANY = 3, 40  # tokens for which the changes are computed one by one, and as one weight


class One(nn.Module):
    """A linear layer that is not the model's head."""

    features: int = OUTPUTS
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features, use_bias=self.bias, name=SITE)(x) * 1.0


SITE, MODEL = "layer", One()
X = jnp.asarray(np.random.default_rng(0).normal(size=(MANY, INPUTS)), jnp.float32)
COTANGENT = np.random.default_rng(1).normal(size=(MANY, OUTPUTS)).astype(np.float32)
PARAMS = numbers(jax.eval_shape(MODEL.init, jax.random.key(0), X)["params"])


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.fixture(autouse=True)
def cpu(monkeypatch, quick_compiles):
    """The forms of the CPU backend."""
    monkeypatch.setattr(backend, "flatten_tokens", lambda: True)


# --- the equations: the changed weight and bias, from the leaves ------------------------------------------------------


def circulant(method, leaves, w, b):
    kernel, change = leaves["c3a_kernel"], np.zeros_like(w)
    n = method.block_size
    for i, o in np.ndindex(w.shape):
        change[i, o] = kernel[i // n, o // n, (i % n - o % n) % n] / INPUTS
    return w + change, b


PLACES = [71, 15, 81, 77, 51, 57, 33]  # torch.randperm(96, generator=torch.Generator().manual_seed(777))[:7]


def fourier(method, leaves, w, b):
    """The inverse transform of a matrix (out, in), whose entry at (p, q) is a wave of its own."""
    spectrum = np.zeros((OUTPUTS, INPUTS))
    for place, c in zip(PLACES, leaves["fourierft_spectrum"], strict=True):
        spectrum[place // INPUTS, place % INPUTS] = c
    change = np.zeros((OUTPUTS, INPUTS))
    for o, i, p, q in np.ndindex(OUTPUTS, INPUTS, OUTPUTS, INPUTS):
        change[o, i] += spectrum[p, q] * np.cos(2 * np.pi * (o * p / OUTPUTS + i * q / INPUTS))
    return w + method.scaling * change.T / (INPUTS * OUTPUTS), b


def sparse(method, leaves, w, b):
    w = w.copy()
    for i, o, value in zip(*leaves["shira_indices"].astype(int), leaves["shira_values"], strict=True):
        w[i, o] += value
    return w, b


def added_bias(method, leaves, w, b):
    return w, b + leaves["beft_bias"]


def rotation(method, leaves, w, b):
    """[[a cos t, -a sin t], [a sin t, a cos t]] for outputs j and j + half a group, with up to four a and t."""
    size, half, turn = method.group_size, method.group_size // 2, np.zeros((OUTPUTS, OUTPUTS))
    theta, alpha = leaves["road_theta"], leaves["road_alpha"]
    for group in range(OUTPUTS // size):
        for j in range(half):
            first, second = group * size + j, group * size + j + half
            cos, sin = {
                "road_1": ((group * half + j,) * 2, (group * half + j,) * 2),
                "road_2": ((first, second), (first, second)),
                "road_4": tuple((2 * group * size + k + j, 2 * group * size + k + j + half) for k in (0, size)),
            }[method.variant]
            turn[first, first], turn[second, second] = (alpha[k] * np.cos(theta[k]) for k in cos)
            turn[first, second], turn[second, first] = (
                sign * alpha[k] * np.sin(theta[k]) for sign, k in zip((-1, 1), sin, strict=True)
            )
    return w @ turn.T, turn @ b


CASES = {
    "C3A": (C3A(block_size=4), circulant),
    "C3A, blocks of one entry": (C3A(block_size=1), circulant),
    "FourierFT": (FourierFT(n_frequency=7, scaling=30.0), fourier),
    "SHiRA": (SHiRA(rank=2), sparse),
    "BEFT": (BEFT(), added_bias),
    "RoAd 1": (RoAd(group_size=4), rotation),
    "RoAd 2": (RoAd(variant="road_2", group_size=6), rotation),
    "RoAd 4": (RoAd(variant="road_4", group_size=12), rotation),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_merged_weights_are_those_of_the_equation(name):
    method, equation = CASES[name]
    peft = method.bind(MODEL, PARAMS, X)
    adapter = moved(peft, PARAMS, scale=1.0)
    trainable, frozen = jpeft.partition(adapter, peft.labels(adapter))

    @jax.jit
    def run(trainable, params, x):
        def apply(own, x):
            return peft.apply(params, jpeft.combine(own, frozen), x)

        y, pull = jax.vjp(apply, trainable, x)
        merged = peft.merge(params, jpeft.combine(trainable, frozen))
        return apply(trainable, x[:FEW]), apply(trainable, x), y, *pull(COTANGENT), merged[SITE]

    few, many, y, gradients, dx, merged = run(trainable, PARAMS, X)
    own, (w, b), x, t = (
        wide(adapter)[SITE],
        (wide(PARAMS)[SITE][n] for n in ("kernel", "bias")),
        wide(X),
        wide(COTANGENT),
    )
    changed, bias = equation(method, own, w, b)

    def near(got, want):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())

    near(merged["kernel"], changed)
    near(merged["bias"], bias)
    for got in (many, y):
        near(got, x @ changed + bias)
    near(few, (x @ changed + bias)[:FEW])
    near(dx, t @ changed.T)
    for leaf in peft.labels(adapter)[SITE]:
        if gradients[SITE][leaf] is None:
            continue
        want = np.zeros_like(own[leaf])
        for k in np.ndindex(want.shape):  # by differences of the equation
            sides = []
            for step in (1e-4, -1e-4):
                there = own[leaf].copy()
                there[k] += step
                new_w, new_b = equation(method, {**own, leaf: there}, w, b)
                sides.append((t * (x @ new_w + new_b)).sum())
            want[k] = (sides[0] - sides[1]) / 2e-4
        near(gradients[SITE][leaf], want)


@pytest.mark.parametrize("method", [C3A(block_size=4), FourierFT(n_frequency=7)], ids=lambda m: m.name)
def test_no_gradient_of_the_size_of_the_weight_is_made(method):
    peft = method.bind(MODEL, PARAMS, X)
    adapter = moved(peft, PARAMS)
    program = str(jax.make_jaxpr(jax.grad(lambda a: (peft.apply(PARAMS, a, X) ** 2).sum()))(adapter))
    assert "dot_general" in program
    assert not re.search(rf"\[({INPUTS},{OUTPUTS}|{OUTPUTS},{INPUTS})\] = dot_general", program)


def test_the_transform_of_a_weight_with_odd_sides_is_whole():
    model, x = One(features=7), X[:, :5]
    params = numbers(jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    peft = FourierFT(n_frequency=6, scaling=2.0, seed=5).bind(model, params, x)
    adapter = moved(peft, params, scale=5.0)
    spectrum = np.zeros((7, 5))
    # torch.randperm(35, generator=torch.Generator().manual_seed(5))[:6]
    spectrum.flat[[1, 19, 24, 32, 13, 15]] = adapter[SITE]["fourierft_spectrum"]
    w, b = (wide(params[SITE][n]) for n in ("kernel", "bias"))
    want = wide(x) @ (w + 2.0 * np.fft.ifft2(spectrum).real.T) + b
    for tokens in (FEW, MANY):
        got = jax.jit(peft.apply)(params, adapter, x[:tokens])
        np.testing.assert_allclose(got, want[:tokens], rtol=1e-5, atol=1e-5)
    merged = model.apply({"params": peft.merge(params, adapter)}, x)
    np.testing.assert_allclose(merged, want, rtol=1e-5, atol=1e-5)


# --- SHiRA's positions ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(INPUTS, name="square")(x), None


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return block(name="block")(x, None)[0]


def indices(method, key=0, statistics=None):
    peft = method.bind(MODEL, PARAMS, X)
    return np.asarray(peft.init(jax.random.key(key), PARAMS, statistics)[SITE]["shira_indices"])


def as_places(positions):
    """The positions in torch's weight (out, in), counted row by row."""
    return positions[1] * INPUTS + positions[0]


def test_a_random_mask_has_different_entries_in_every_layer_and_for_every_key():
    model, x = Layers(), X
    params = numbers(jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    method = SHiRA(rank=2)
    peft = method.bind(model, params, x)
    first, second = (peft.init(jax.random.key(k), params)["block"]["square"]["shira_indices"] for k in (0, 1))
    masks = [as_places(np.asarray(layer)) for layer in (*first, *second)]
    for mask in masks:
        assert len(set(mask.tolist())) == 2 * (INPUTS + INPUTS) and mask.min() >= 0 and mask.max() < INPUTS**2
    assert len({mask.tobytes() for mask in masks}) == 4


def test_a_seed_gives_the_mask_of_torch_which_need_not_be_saved(tmp_path):
    # sorted(torch.randperm(96, generator=torch.Generator().manual_seed(42))[:20])
    want = [1, 2, 6, 10, 11, 23, 29, 33, 38, 46, 50, 51, 61, 65, 66, 72, 74, 76, 79, 95]
    method = SHiRA(rank=1, seed=42)
    assert as_places(indices(method)).tolist() == as_places(indices(method, key=1)).tolist() == want

    peft = method.bind(MODEL, PARAMS, X)
    adapter = moved(peft, PARAMS)
    jpeft.save(tmp_path, peft, adapter, PARAMS)
    assert set(load_file(tmp_path / "adapter.safetensors")) == {f"{SITE}/shira_values"}
    _, loaded = jpeft.load(tmp_path, MODEL, PARAMS, X)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)


def test_masks_from_data_are_the_entries_of_the_largest_score():
    peft = SHiRA(rank=1, mask="snip").bind(MODEL, PARAMS, X)

    def loss_fn(adapter, params, batch, rng):
        return (peft.apply(params, adapter, batch) * COTANGENT).mean(), {}

    found = jpeft.observe(peft.method, MODEL, PARAMS, loss_fn, [X])
    w, g = wide(PARAMS[SITE]["kernel"]), wide(X).T @ wide(COTANGENT)
    for mask, score in {"magnitude": w, "gradient": g, "snip": w * g}.items():
        want = np.sort(np.argsort(-np.abs(score.T.reshape(-1)))[: INPUTS + OUTPUTS])
        given = None if mask == "magnitude" else found
        assert as_places(indices(SHiRA(rank=1, mask=mask), statistics=given)).tolist() == want.tolist()
    with pytest.raises(ValueError, match="starts from data"):
        peft.init(jax.random.key(0), PARAMS)


@pytest.mark.parametrize(
    ("entry", "message"), [((0, INPUTS), "outside of the weight"), ((0, -1), "outside"), ((slice(None), 1), "twice")]
)
def test_positions_in_a_file_must_be_entries_of_the_weight_and_differ(entry, message, tmp_path):
    peft = SHiRA(rank=1).bind(MODEL, PARAMS, X)
    adapter = moved(peft, PARAMS)
    row, value = entry
    positions = np.array(adapter[SITE]["shira_indices"])
    positions[row, 0] = positions[row, 1] if isinstance(row, slice) else value
    jpeft.save(tmp_path / "own", peft, {SITE: {**adapter[SITE], "shira_indices": jnp.asarray(positions)}}, PARAMS)
    with pytest.raises(AdapterError, match=f"{SITE}.*shira_indices.*{message}"):
        jpeft.load(tmp_path / "own", MODEL, PARAMS, X)

    jpeft.hf.save(tmp_path / "hf", peft, adapter, PARAMS)
    file = tmp_path / "hf" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("shira_indices"))
    np.testing.assert_array_equal(tensors[name], np.asarray(adapter[SITE]["shira_indices"])[::-1])
    save_file({**tensors, name: np.ascontiguousarray(positions[::-1])}, file, {"format": "pt"})
    with pytest.raises(AdapterError, match=f"shira_indices.*{message}"):
        jpeft.hf.load(tmp_path / "hf", MODEL, PARAMS, X)


def test_positions_may_be_floats_as_peft_writes_them_on_windows(tmp_path):
    peft = SHiRA(rank=1).bind(MODEL, PARAMS, X)
    adapter = moved(peft, PARAMS)
    jpeft.hf.save(tmp_path, peft, adapter, PARAMS)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: x.astype(np.float32) for name, x in load_file(file).items()}, file, {"format": "pt"})
    again, read = jpeft.hf.load(tmp_path, MODEL, PARAMS, X)
    assert again.structure == peft.structure
    jax.tree.map(np.testing.assert_array_equal, read, adapter)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: C3A(block_size=0), "C3A.block_size must be a positive integer"),
        (lambda: FourierFT(n_frequency=0), "FourierFT.n_frequency must be a positive integer"),
        (lambda: FourierFT(seed=0.5), "FourierFT.seed must be an integer"),
        (lambda: FourierFT(scaling=float("nan")), "FourierFT.scaling must be a finite number"),
        (lambda: FourierFT(scaling=0), "FourierFT.scaling must be a finite number other than 0"),
        (lambda: SHiRA(mask="largest"), "SHiRA.mask must be one of random, magnitude, gradient, snip"),
        (lambda: SHiRA(mask="magnitude", seed=3), "seed 3 has no effect on mask='magnitude'"),
        (lambda: RoAd(variant="road_3"), "RoAd.variant must be one of road_1, road_2, road_4"),
        (lambda: RoAd(group_size=3), "RoAd.group_size must be a positive even integer"),
    ],
)
def test_fields_that_are_no_configuration(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (C3A(block_size=3), "block_size 3 must divide the 8 inputs and 12 outputs of 'layer'.*'block_size': 4"),
        (FourierFT(), "n_frequency 1000 is more than the 96 entries of 'layer'"),
        (SHiRA(), "rank 32 trains 640 entries of 'layer', which has 96 .* at most 4"),
        (RoAd(), "group_size 64 does not divide the 12 outputs of 'layer'"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_sizes_that_do_not_fit_a_weight(method, message):
    with pytest.raises(ValueError, match=message):
        method.bind(MODEL, PARAMS, X)


def test_a_bias_is_added_only_to_the_outputs_of_a_module():
    model = One(bias=False)
    params = {SITE: {"kernel": PARAMS[SITE]["kernel"]}}
    peft = BEFT().bind(model, params, X)
    adapter = moved(peft, params)
    want = wide(X) @ wide(params[SITE]["kernel"]) + wide(adapter[SITE]["beft_bias"])
    np.testing.assert_allclose(jax.jit(peft.apply)(params, adapter, X), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="BEFT at 'layer' cannot be merged"):
        peft.merge(params, adapter)

    table, ids = nn.Sequential([nn.Embed(OUTPUTS, INPUTS)]), jnp.zeros((2,), jnp.int32)
    params = jax.eval_shape(table.init, jax.random.key(0), ids)["params"]
    with pytest.raises(ValueError, match="'layers_0' is an embedding, whose rows have no bias"):
        BEFT(targets="layers_0").bind(table, params, ids)

    loop, x = nn.Sequential([InLoop()]), X[:, None]
    params = jax.eval_shape(loop.init, jax.random.key(0), x)["params"]
    with pytest.raises(ValueError, match="'layers_0/w' has no bias and is reached only as a weight"):
        BEFT(targets=r".*").bind(loop, params, x)
