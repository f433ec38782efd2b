"""Stacked layers and layers one by one: trees, and every method on a decoder before and after `unroll`."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.core import stacking
from jpeft.core.tree import flatten, join
from jpeft.errors import AdapterError
from jpeft.models import stack, unroll, unstack
from jpeft.models.decoder import Decoder
from jpeft.models.decoder_hf import from_config

TINY = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4}  # fmt: skip
IDS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
MASK = jnp.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])


pytestmark = pytest.mark.usefixtures("quick_compiles_of_module")


def tiny(model_type="qwen2", **fields):
    """A decoder and its parameters, none of which is 0 or 1."""
    model = from_config({"model_type": model_type, **TINY, **fields})
    return model, filled(nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]))


def filled(abstract, seed=0):
    """A tree of random numbers with these shapes, which is faster than compiling an `init`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), abstract)


def bound(method, model, params, **kwargs):
    """A Peft and an adapter that changes the outputs."""
    peft = method.bind(model, params, IDS, **kwargs)
    return peft, filled(peft.init(jax.random.key(0), jax.eval_shape(lambda p: p, params)), 1)


@pytest.fixture(scope="module")
def qwen():
    """A decoder with biases."""
    return tiny()


@pytest.fixture(scope="module")
def gemma():
    """A decoder with layers of two kinds, more norms and a tied head."""
    return tiny("gemma2", query_pre_attn_scalar=4.0, sliding_window=3)


def same(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert (a[path].dtype, type(a[path])) == (b[path].dtype, type(b[path]))
        np.testing.assert_array_equal(a[path], b[path])


# --- trees ------------------------------------------------------------------------------------------------------------


def test_stack_is_the_inverse_of_unstack(qwen):
    model, params = qwen
    one_by_one = unstack(params)
    assert sorted(one_by_one["model"]["layers"]) == ["0", "1"]
    np.testing.assert_array_equal(
        one_by_one["model"]["layers"]["1"]["mlp"]["up_proj"]["kernel"],
        params["model"]["layers"]["mlp"]["up_proj"]["kernel"][1],
    )
    assert one_by_one["lm_head"]["kernel"] is params["lm_head"]["kernel"]
    same(stack(one_by_one), params)
    same(unstack(stack(one_by_one)), one_by_one)
    init = jax.eval_shape(model.clone(scan_layers=False).init, jax.random.key(0), IDS)["params"]
    assert {p: x.shape for p, x in flatten(one_by_one).items()} == {
        p: x.shape for p, x in flatten(nn.meta.unbox(init)).items()
    }


def test_stack_and_unstack_keep_containers_and_kinds_of_leaves(qwen):
    _, params = qwen
    assert isinstance(unstack(freeze(params)), FrozenDict) and isinstance(stack(unstack(freeze(params))), FrozenDict)
    on_host = jax.tree.map(np.asarray, params)
    same(stack(unstack(on_host)), on_host)
    half = {"a": {"w": np.arange(6, dtype=jnp.bfloat16).reshape(3, 2)}, "b": jnp.arange(3, dtype=jnp.int8)}
    same(stack(unstack(half, "a"), "a"), half)
    boxed = {"a": {"w": nn.Partitioned(jnp.ones((3, 2)), ("layers", "embed"))}}
    assert unstack(boxed, "a")["a"]["1"]["w"].shape == (2,)
    abstract = jax.eval_shape(lambda p: p, params)
    assert stack(unstack(abstract)) == abstract
    assert unstack({"b": 1.0}, "a") == stack({"b": 1.0}, "a") == {"b": 1.0}


ROW = np.zeros(2, np.float32)
UNSTACKABLE = {
    r"first axes \[\(2,\), \(3,\)\]": {"v": np.zeros((3, 2)), "w": np.zeros((2, 2))},
    r"first axes \[\(\), \(3,\)\]": {"v": np.zeros(3), "w": np.float32(1)},
    r"one by one already: there is a/layers/0": {"0": {"v": np.zeros(3)}, "1": {"v": np.zeros(3)}},
    r"a/layers is a leaf": np.zeros(3),
}
UNLIKE = {
    r"not numbered 0 to 1: 0, 2": {"0": {"w": ROW}, "2": {"w": ROW}},
    r"not numbered 0 to 1: mlp, norm": {"mlp": {"w": ROW}, "norm": {"w": ROW}},
    r"x/w is missing in layer 1 below a/layers": {"0": {"x": {"w": ROW}, "y": ROW}, "1": {"y": ROW}},
    r"w has different shapes in the layers below a/layers \(\(2,\), \(3,\)\)": {
        "0": {"w": ROW},
        "1": {"w": np.ones(3, np.float32)},
    },
    r"w has different dtypes in the layers below a/layers \(float16, float32\)": {
        "0": {"w": ROW},
        "1": {"w": ROW.astype(np.float16)},
    },
    r"a/layers is a leaf": np.zeros(3),
}  # fmt: skip


@pytest.mark.parametrize(("fn", "match"), [(unstack, m) for m in UNSTACKABLE] + [(stack, m) for m in UNLIKE])
def test_stack_and_unstack_reject_layers_that_differ(fn, match):
    layers = (UNSTACKABLE if fn is unstack else UNLIKE)[match]
    with pytest.raises(ValueError, match=match):
        fn({"a": {"layers": layers}}, "a/layers")


# --- methods ----------------------------------------------------------------------------------------------------------

METHODS = {
    "LoRA": jpeft.LoRA(rank=2, alpha=3, overrides={"q_proj": {"rank": 3, "rslora": True}}),
    "LoRA, embedding and parts": jpeft.LoRA(
        rank=2, targets=["gate_proj", "embed_tokens", "lm_head"], overrides={"gate_proj": {"parts": 2}}
    ),
    "IA3": jpeft.IA3(targets=["k_proj", "v_proj", "down_proj"], feedforward=["down_proj"]),
    "BitFit": jpeft.BitFit(),
    "Train": jpeft.Train(r".*norm|.*/q_proj/kernel|lm_head"),
    "PrefixTuning": jpeft.PrefixTuning(length=3),
    "PrefixTuning, reparametrized": jpeft.PrefixTuning(length=3, reparametrize=True, hidden=8, embedding=6),
    "Bottleneck": jpeft.Bottleneck(size=3, targets=["o_proj", "mlp", "input_layernorm", "embed_tokens", "model/norm"]),
    "Chain": jpeft.Chain(
        jpeft.LoRA(rank=2, targets=["q_proj", "up_proj"]),
        jpeft.LoRA(rank=2, targets=["o_proj", "lm_head"]),
        jpeft.IA3(targets=["q_proj", "v_proj"]),
        jpeft.Bottleneck(size=2, targets=["mlp"]),
        jpeft.PrefixTuning(length=2, reparametrize=True, hidden=4, embedding=4),
        jpeft.BitFit(),
        jpeft.Train(["input_layernorm"]),
    ),
}  # fmt: skip


def check_unrolled(model, params, method):
    """Unrolling changes no output, no merged weight, and gives the leaves that `bind` would."""
    peft, adapter = bound(method, model, params, attention_mask=MASK)
    want = jax.jit(peft.apply)(params, adapter, IDS, attention_mask=MASK)
    model1, params1, peft1, adapter1 = unroll(model, params, peft, adapter)
    assert model1 == peft1.model == model.clone(scan_layers=False)
    got = jax.jit(peft1.apply)(params1, adapter1, IDS, attention_mask=MASK)
    np.testing.assert_allclose(got[MASK == 1], want[MASK == 1], atol=2e-5)
    same(stack(adapter1), adapter)
    assert {join(p): s for p, s in peft1.structure} == {
        join(p): (tuple(x.shape), x.dtype.name) for p, x in flatten(adapter1).items()
    }
    assert peft1.summary()
    if peft.mergeable:
        merged, merged1 = jax.jit(peft.merge)(params, adapter), stack(jax.jit(peft1.merge)(params1, adapter1))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged1, merged)


# `Chain` contains these.
IN_CHAIN = ("BitFit", "Train", "PrefixTuning", "Bottleneck")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive) if name in IN_CHAIN else name for name in METHODS]
)
def test_every_method_is_the_same_on_layers_one_by_one(name, qwen):
    check_unrolled(*qwen, METHODS[name])


def test_layers_of_two_kinds_and_a_tied_head(gemma):
    model, params = gemma
    method = jpeft.Chain(jpeft.LoRA(rank=2, targets=["embed_tokens", "k_proj"]), jpeft.PrefixTuning(length=2))
    peft, adapter = bound(method, model, params)
    _, params1, peft1, adapter1 = unroll(model, params, peft, adapter)
    want = jax.jit(peft.apply)(params, adapter, IDS)
    np.testing.assert_allclose(jax.jit(peft1.apply)(params1, adapter1, IDS), want, atol=2e-5)


def test_unrolled_sites_are_those_that_bind_finds(qwen):
    model, params = qwen
    model1, params1, *_ = unroll(model, params)
    for method in (METHODS["LoRA"], METHODS["Bottleneck"], METHODS["PrefixTuning"], METHODS["BitFit"]):
        peft1 = stacking.unroll_peft(method.bind(model, params, IDS))
        there = method.bind(model1, params1, IDS)
        assert {s.name: s for s in peft1.sites} == {s.name: s for s in there.sites}
        assert peft1.structure == there.structure


def test_unroll_accepts_variables_and_abstract_trees(qwen):
    model, params = qwen
    peft, adapter = bound(METHODS["LoRA"], model, params)
    _, variables, _, _ = unroll(model, freeze({"params": params, "cache": {"x": jnp.ones(2)}}))
    assert isinstance(variables, FrozenDict) and sorted(variables) == ["cache", "params"]
    same(variables["params"], unstack(params))
    model1, abstract, peft1, nothing = unroll(model, jax.eval_shape(lambda p: p, params), peft)
    assert nothing is None and flatten(abstract)["model", "layers", "1", "mlp", "up_proj", "kernel"].shape == (16, 24)
    again = unroll(model1, abstract, peft1, unstack(adapter))
    assert again[0] is model1 and again[1] is abstract and again[2] is peft1
    dense = nn.Dense(3)
    assert unroll(dense, params)[:2] == (dense, params)
    for bad, match in (
        ((model.clone(remat="full"), params, peft, adapter), "bound to another model"),
        ((model, params, peft, unstack(adapter)), "the adapter lacks 'model/layers/"),
        ((model, unstack(params)), "one by one already"),
    ):
        with pytest.raises(ValueError, match=match):
            unroll(*bad)


# --- HuggingFace folders; tests/parity/test_hf_decoder.py compares them with PEFT -------------------------------------

FILES = ("adapter_config.json", "adapter_model.safetensors")
FOLDERS = {
    "uniform": jpeft.LoRA(rank=2, alpha=3, overrides={"q_proj": {"rank": 4}, "down_proj": {"alpha": 5}}),
    "some": jpeft.LoRA(rank=2, targets=["k_proj", "embed_tokens", "lm_head"], rslora=True, dropout=0.25),
    "half": jpeft.LoRA(rank=2, targets=["up_proj"], dtype="bfloat16"),
    "biases and modules": jpeft.Chain(
        jpeft.LoRA(rank=2, targets=["q_proj"]), jpeft.BitFit(), jpeft.Train(["input_layernorm", "lm_head"])
    ),
    "own biases": jpeft.Chain(jpeft.LoRA(targets=["q_proj", "o_proj"]), jpeft.BitFit(targets=r".*/q_proj/bias")),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_of_stacked_layers(name, qwen, tmp_path):
    """A folder round-trips, and is the same as from layers one by one."""
    model, params = qwen
    peft, adapter = bound(FOLDERS[name], model, params)
    jpeft.hf.save(tmp_path / "stacked", peft, adapter, params)
    _, params1, peft1, adapter1 = unroll(model, params, peft, adapter)
    jpeft.hf.save(tmp_path / "one", peft1, adapter1, params1)
    for file in FILES:
        assert (tmp_path / "stacked" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    again, read = jpeft.hf.load(tmp_path / "stacked", model, params, IDS)
    same(read, adapter)
    jpeft.hf.save(tmp_path / "again", again, read, params)
    for file in FILES:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    jpeft.save(tmp_path / "own", again, read, params)
    assert jpeft.load(tmp_path / "own", model, params, IDS)[0] == again
    targets = json.loads((tmp_path / "own" / "config.json").read_text())["method"]
    assert not any(part.isdecimal() for part in json.dumps(targets).replace('"', "/").split("/"))


def test_folder_of_a_tied_decoder(gemma, tmp_path):
    model, params = gemma
    method = jpeft.LoRA(rank=2, targets=["embed_tokens", "q_proj", "k_proj"], overrides={"embed_tokens": {"alpha": 5}})
    peft, adapter = bound(method, model, params)
    jpeft.hf.save(tmp_path, peft, adapter, params)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    start = "base_model.model."
    assert config["ensure_weight_tying"] and config["alpha_pattern"] == {"lm_head": 5, "model.embed_tokens": 5}
    np.testing.assert_array_equal(
        tensors[start + "lm_head.lora_A.weight"], tensors[start + "model.embed_tokens.lora_embedding_B"].T
    )
    _, read = jpeft.hf.load(tmp_path, model, params, IDS)
    same(read, adapter)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "ensure_weight_tying": False}))
    with pytest.raises(AdapterError, match=r"changes 'model.embed_tokens' alone.*ignore=\['model.embed_tokens'\]"):
        jpeft.hf.load(tmp_path, model, params, IDS)
    _, read = jpeft.hf.load(tmp_path, model, params, IDS, ignore=["embed_tokens", "lm_head"])
    assert sorted(read["model"]) == ["layers"]


def test_a_folder_of_some_layers_and_one_whose_layers_differ(qwen, tmp_path):
    model, params = qwen
    jpeft.hf.save(tmp_path, *bound(jpeft.LoRA(rank=2, targets=["q_proj", "v_proj"]), model, params), params)
    config, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    fields, tensors = json.loads(config.read_text()), load_file(file)
    some = {**fields, "target_modules": [m for m in fields["target_modules"] if "layers.1.self_attn.v" not in m]}
    config.write_text(json.dumps(some))
    save_file({k: v for k, v in tensors.items() if "layers.1.self_attn.v" not in k}, file)
    peft, _ = jpeft.hf.load(tmp_path, model, params, IDS)
    assert {site.name.split("/")[-1]: site.layers for site in peft.sites} == {"q_proj": None, "v_proj": (0,)}
    config.write_text(json.dumps({**some, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}}))
    with pytest.raises(AdapterError, match=r"'model\.layers\.1\.self_attn\.q_proj' has 3; .*scan_layers=False"):
        jpeft.hf.load(tmp_path, model, params, IDS)
    model1, params1, *_ = unroll(model, params)
    assert len(jpeft.hf.load(tmp_path, model1, params1, IDS)[0].sites) == 3


def test_decoder_inside_another_model_is_not_unrolled(tmp_path):
    """The path of its stacked layers is not known, so that saving raises an error that names the site."""

    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return Decoder(from_config({"model_type": "llama", **TINY}).config, name="inner")(ids)

    params = filled(nn.meta.unbox(jax.eval_shape(Wrapped().init, jax.random.key(0), IDS)["params"]))
    peft, adapter = bound(jpeft.LoRA(rank=2, targets=["q_proj"]), Wrapped(), params)
    with pytest.raises(ValueError, match="stacked over 2 layers"):
        jpeft.hf.save(tmp_path / "hf", peft, adapter, params)
