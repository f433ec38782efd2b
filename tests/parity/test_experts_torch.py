"""LoRA on the stacked weights of experts against HuggingFace PEFT in torch, in each layout that torch has for them."""

import copy
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and peft's own
EXPERTS, WIDTH, HIDDEN = 3, 4, 5
X = np.random.default_rng(0).normal(size=(6, WIDTH)).astype(np.float32)


class Experts(nn.Module):
    """Every token goes through every expert; gate and up are one parameter."""

    @nn.compact
    def __call__(self, x):
        gate_up = self.param("gate_up_proj", nn.initializers.normal(0.5), (EXPERTS, WIDTH, 2 * HIDDEN))
        down = self.param("down_proj", nn.initializers.normal(0.5), (EXPERTS, HIDDEN, WIDTH))
        gate, up = jnp.split(jnp.einsum("td,edf->etf", x, gate_up), 2, -1)
        return jnp.einsum("etf,efd->etd", nn.silu(gate) * up, down)


class Mixture(nn.Module):
    @nn.compact
    def __call__(self, x):
        weights = nn.softmax(nn.Dense(EXPERTS, use_bias=False, name="router")(x))
        return x + jnp.einsum("te,etd->td", weights, Experts(name="experts")(x))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Mixture(name="1")(Mixture(name="0")(x))


class TorchExperts(torch.nn.Module):
    """In the layout of transformers 5, in the same with `is_transposed`, or in that of GPT-OSS of transformers 4."""

    def __init__(self, layout):
        super().__init__()
        self.layout = layout
        shapes = ((EXPERTS, WIDTH, 2 * HIDDEN), (EXPERTS, HIDDEN, WIDTH))
        if layout == "out first":
            shapes = [(e, o, i) for e, i, o in shapes]
        if layout == "is_transposed":
            self.is_transposed = True
        self.gate_up_proj, self.down_proj = (torch.nn.Parameter(torch.zeros(shape)) for shape in shapes)

    def forward(self, x):
        spec = ("td,efd->etf", "etf,edf->etd") if self.layout == "out first" else ("td,edf->etf", "etf,efd->etd")
        gate, up = torch.einsum(spec[0], x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum(spec[1], torch.nn.functional.silu(gate) * up, self.down_proj)


class TorchExpert(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = torch.nn.Linear(WIDTH, 2 * HIDDEN, bias=False)
        self.down_proj = torch.nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(torch.nn.functional.silu(gate) * up)


class TorchMixture(torch.nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.router = torch.nn.Linear(WIDTH, EXPERTS, bias=False)
        one_each = torch.nn.ModuleList(TorchExpert() for _ in range(EXPERTS))
        self.experts = one_each if layout == "modules" else TorchExperts(layout)

    def forward(self, x):
        out = torch.stack([e(x) for e in self.experts]) if isinstance(self.experts, torch.nn.ModuleList) else None
        out = self.experts(x) if out is None else out
        return x + torch.einsum("te,etd->td", self.router(x).softmax(-1), out)


def in_torch(params, layout):
    model = torch.nn.Sequential(TorchMixture(layout), TorchMixture(layout))
    for i, mixture in enumerate(model):
        own = params[str(i)]
        mixture.router.weight.data = torch.tensor(np.asarray(own["router"]["kernel"].T))
        for name in ("gate_up_proj", "down_proj"):
            w = np.asarray(own["experts"][name])
            if layout == "modules":
                for expert, matrix in zip(mixture.experts, w, strict=True):
                    getattr(expert, name).weight.data = torch.tensor(matrix.T.copy())
            else:
                w = w.swapaxes(1, 2).copy() if layout == "out first" else w
                getattr(mixture.experts, name).data = torch.tensor(w)
    return model.eval()


def output(model):
    with torch.no_grad():
        return model(torch.tensor(X)).numpy()


@pytest.fixture(scope="module")
def params():
    return Model().init(jax.random.key(0), jnp.asarray(X))["params"]


BOTH = ["experts.gate_up_proj", "experts.down_proj"]
PARAMETERS = {"target_parameters": BOTH, "target_modules": []}
CASES = {
    "out first": ("out first", {**PARAMETERS, "r": 2, "lora_alpha": 6}),
    "is_transposed": ("is_transposed", {**PARAMETERS, "r": 2}),
    "swapped": ("swapped", {**PARAMETERS, "r": 2, "use_rslora": True}),
    "and a linear layer": ("out first", {**PARAMETERS, "r": 3, "target_modules": ["router"]}),
    "one of them": ("out first", {"target_parameters": ["down_proj"], "target_modules": ["router"], "r": 2}),
    "patterns": (
        "is_transposed",
        {**PARAMETERS, "r": 2, "rank_pattern": {r".*\.gate_up_proj": 4}, "alpha_pattern": {r".*\.gate_up_proj": 16}},
    ),
    "weights of linear layers": ("out first", {"target_parameters": ["router.weight"], "target_modules": [], "r": 2}),
    "modules": ("modules", {"target_modules": ["gate_up_proj", "down_proj", "router"], "r": 2, "lora_alpha": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_stacked_experts_there_and_back(case, params, tmp_path):
    layout, config = CASES[case]
    base = in_torch(params, layout)
    plain = output(base)
    np.testing.assert_allclose(plain, Model().apply({"params": params}, X), atol=1e-5)
    torch.manual_seed(1)
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(**config))
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    want = output(adapted)
    assert np.abs(want - plain).max() > 0.1
    adapted.save_pretrained(tmp_path / "torch")

    peft, adapter = jpeft.hf.load(tmp_path / "torch", Model(), params, X)
    np.testing.assert_allclose(peft.apply(params, adapter, X), want, atol=1e-4)
    np.testing.assert_allclose(Model().apply({"params": peft.merge(params, adapter)}, X), want, atol=1e-4)
    experts = layout if layout in ("swapped", "modules") else "stacked"
    jpeft.hf.save(tmp_path / "back", peft, adapter, params, experts=experts)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("back", "torch"))
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x)
    back = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "back")
    np.testing.assert_allclose(output(back), want, atol=1e-6)
    again, read = jpeft.hf.load(tmp_path / "back", Model(), params, X)
    assert again.method == peft.method
    jax.tree.map(np.testing.assert_array_equal, read, adapter)


def test_folders_of_experts_that_do_not_fit(params, tmp_path):
    """The model lacks a parameter, or the file has tensors of some parameters or experts only."""
    config = LoraConfig(target_modules=["gate_up_proj", "down_proj"], r=2)
    get_peft_model(in_torch(params, "modules"), config).save_pretrained(tmp_path / "modules")
    get_peft_model(in_torch(params, "out first"), LoraConfig(**PARAMETERS, r=2)).save_pretrained(tmp_path / "stacked")

    def refused(folder, match, change=lambda tensors: None, **fields):
        there = tmp_path / "changed"
        shutil.copytree(tmp_path / folder, there, dirs_exist_ok=True)
        file, config = there / "adapter_model.safetensors", there / "adapter_config.json"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))
        with pytest.raises(AdapterError, match=match):
            jpeft.hf.load(there, Model(), params, X)

    start = "base_model.model.0.experts"
    refused("stacked", "target_parameters has 'experts.up', which this model lacks", target_parameters=["experts.up"])
    refused("stacked", "target_parameters must be a list of names", target_parameters="experts.up")
    refused("stacked", "for 2 parameters of '0.experts', but target_parameters names 1", target_parameters=BOTH[:1])
    refused("stacked", r"lora_A.weight' has shape \[5, 5\], expected \[6, 5\]", lambda t: t.update({
        f"{start}.lora_A.weight": np.ones((5, 5), "f")}))  # fmt: skip
    refused("modules", "no LoRA for '0.experts.1.down_proj', only for other experts", lambda t: [
        t.pop(f"{start}.1.down_proj.lora_{ab}.weight") for ab in "AB"])  # fmt: skip
    refused("modules", "lora_A.weight' of .* differ in their shapes", lambda t: t.update({
        f"{start}.1.down_proj.lora_A.weight": np.ones((3, 5), "f")}))  # fmt: skip
    refused("modules", "experts of one stack must be alike", rank_pattern={"experts.1.down_proj": 3})


def test_experts_that_peft_cannot_hold(params, tmp_path):
    def refused(match, experts="stacked", **fields):
        peft = jpeft.LoRA(rank=2, targets=["gate_up_proj"], **fields).bind(Model(), params, X)
        with pytest.raises(ValueError, match=match):
            jpeft.hf.save(tmp_path, peft, peft.init(jax.random.key(0), params), params, experts=experts)

    refused("experts must be 'stacked', 'swapped', 'modules' or None, got 'rows'", "rows")
    refused(r"neither one matrix nor a stack.*set overrides=\{'0/experts/gate_up_proj': \{'parts': 3\}\}")
    refused("no dropout before '0/experts/gate_up_proj'", parts=EXPERTS, dropout=0.1)
