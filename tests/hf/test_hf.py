"""HuggingFace PEFT folders without torch: writing, reading, and every mistake in a folder.

tests/parity/test_hf_peft.py compares the same code with PEFT itself.
"""

import functools
import json
import re
import shutil
import warnings
from dataclasses import fields as fields_of
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.errors import AdapterError, MergeError
from jpeft.hf.config import Config, patterns
from jpeft.hf.names import Names
from tests.zoo import same


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Dense(6, name="query")(x) + nn.Dense(6, use_bias=False, name="value")(x)
        return nn.LayerNorm(name="norm")(x + nn.Dense(6, name="out")(jnp.tanh(y)))


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Layer(name=str(i))(x)
        return x


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(9, 6, name="words")(ids)
        x = nn.Conv(6, (3,), name="mix")(x)
        return Layers(name="layer")(x)


class Classifier(nn.Module):
    """An encoder within another model, as in jpeft's own classifier."""

    @nn.compact
    def __call__(self, ids):
        x = Encoder(name="encoder")(ids)
        return nn.Dense(3, name="classifier")(x.mean(axis=1))


IDS = jnp.asarray([[1, 2, 3, 4], [8, 7, 6, 5]])


def filled(abstract, seed):
    """Random numbers in the shapes and dtypes of a tree: made by numpy, so that nothing is compiled."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape).astype(x.dtype)), abstract)


@functools.cache
def parameters(model):
    return filled(jax.eval_shape(model.init, jax.random.key(0), IDS)["params"], 0)


def made(model, method):
    """The model's parameters, the bound method, and an adapter that changes the outputs."""
    params = parameters(model)
    peft = method.bind(model, params, IDS)
    return params, peft, filled(peft.init(jax.random.key(1), jax.eval_shape(lambda: params)), 1)


@pytest.fixture
def saved(tmp_path):
    """A folder with a LoRA on queries, and the base and adapter that it was saved from."""
    params, peft, adapter = made(Encoder(), jpeft.LoRA(rank=2, alpha=3, targets=["query"]))
    jpeft.hf.save(tmp_path / "hf", peft, adapter, params)
    return tmp_path / "hf", params, adapter


def edit(folder: Path, **fields):
    config = json.loads((folder / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


# --- both ways --------------------------------------------------------------------------------------------------------

METHODS = {
    "linear": jpeft.LoRA(rank=2, targets=r".*/(query|value|out)"),
    "embedding and convolution": jpeft.LoRA(rank=3, alpha=5, targets=["words", "mix"], rslora=True),
    "per site": jpeft.LoRA(
        rank=2, alpha=3, targets=["query", "value"], overrides={"layer/1/query": {"rank": 4}, "value": {"alpha": 7}}
    ),
    "all biases": jpeft.Chain(jpeft.LoRA(targets=["query"]), jpeft.BitFit()),
    "own biases": jpeft.Chain(jpeft.LoRA(targets=["query", "value"]), jpeft.BitFit(targets=r".*/query/bias")),
    "modules": jpeft.Chain(jpeft.LoRA(targets=["query"]), jpeft.Train(["mix", "words", "norm", "value"])),
    "modules and biases": jpeft.Chain(
        jpeft.LoRA(targets=["query"]), jpeft.BitFit(exclude=["norm"]), jpeft.Train(r".*/norm/scale|.*/norm/bias")
    ),
    "half precision": jpeft.LoRA(rank=2, targets=["query"], dtype="bfloat16"),
    "two LoRAs": jpeft.Chain(jpeft.LoRA(rank=2, targets=["query"]), jpeft.LoRA(rank=3, alpha=1, targets=["out"])),
    "scales": jpeft.IA3(targets=["query", "value", "out"], feedforward=["layer/1/query", "out"]),
    "scales and modules": jpeft.Chain(jpeft.IA3(targets=["query"]), jpeft.Train(["mix", "norm"])),
    "norms": jpeft.Train(["norm"]),
    "norms and modules": jpeft.Chain(jpeft.Train(["norm"]), jpeft.Train(["mix", "value"])),
    "dropout and a start": jpeft.LoRA(dropout=0.25, init_weights="orthogonal", targets=["query"]),
}


@pytest.mark.parametrize("name", METHODS)
def test_load_is_the_inverse_of_save(name, tmp_path):
    model = Encoder()
    params, peft, adapter = made(model, METHODS[name])
    jpeft.hf.save(tmp_path / "hf", peft, adapter, params)
    again, read = jpeft.hf.load(tmp_path / "hf", model, params, IDS)
    same(read, adapter)
    np.testing.assert_allclose(again.apply(params, read, IDS), peft.apply(params, adapter, IDS), atol=1e-6)
    first, second = peft.method.methods()[0], again.method.methods()[0]
    for field in ("dropout", "init_weights", "dtype"):
        assert getattr(first, field, None) == getattr(second, field, None)
    # Saved again, the loaded adapter gives the same files.
    jpeft.hf.save(tmp_path / "again", again, read, params)
    for file in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (tmp_path / "hf" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_config_and_tensors_on_disk(tmp_path):
    method = jpeft.Chain(
        jpeft.LoRA(rank=2, alpha=3, targets=["query", "words", "mix"], overrides={"words": {"rank": 4}}),
        jpeft.BitFit(targets=r".*/(query|mix)/bias"),
        jpeft.Train(["classifier"]),
    )
    params, peft, adapter = made(Classifier(), method)
    jpeft.hf.save(tmp_path, peft, adapter, params, prefix={"encoder/": "bert"}, task_type="SEQ_CLS", base_model="b/c")
    text = (tmp_path / "adapter_config.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    assert config == {
        "alpha_pattern": {},
        "base_model_name_or_path": "b/c",
        "bias": "lora_only",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 3,
        "lora_dropout": 0.0,
        "modules_to_save": ["classifier"],
        "peft_type": "LORA",
        "r": 2,
        "rank_pattern": {"bert.words": 4},
        "target_modules": ["bert.layer.0.query", "bert.layer.1.query", "bert.mix", "bert.words"],
        "task_type": "SEQ_CLS",
        "use_rslora": False,
    }
    with safe_open(tmp_path / "adapter_model.safetensors", "numpy") as f:
        assert f.metadata() == {"format": "pt"}
        shapes = {k: f.get_slice(k).get_shape() for k in f.keys()}  # noqa: SIM118
    query = {"lora_A.weight": [2, 6], "lora_B.weight": [6, 2], "base_layer.bias": [6]}
    expected = {f"bert.layer.{i}.query.{k}": v for i in range(2) for k, v in query.items()} | {
        "bert.mix.lora_A.weight": [2, 6, 3],
        "bert.mix.lora_B.weight": [6, 2, 1],
        "bert.mix.base_layer.bias": [6],
        "bert.words.lora_embedding_A": [4, 9],
        "bert.words.lora_embedding_B": [6, 4],
        "classifier.weight": [3, 6],
        "classifier.bias": [3],
    }
    assert shapes == {f"base_model.model.{k}": v for k, v in expected.items()}
    assert 'base_model: "b/c"' in (tmp_path / "README.md").read_text()
    same(jpeft.hf.load(tmp_path, Classifier(), params, IDS)[1], adapter)  # the prefix is found


def test_minimal_folder(tmp_path):
    model = Encoder()
    params = parameters(model)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(8, 6)).astype("f"), rng.normal(size=(6, 8)).astype("f")
    names = [f"base_model.model.layer.{i}.query.lora_{x}.weight" for i in range(2) for x in "AB"]
    save_file(dict(zip(names, [a, b, 2 * a, b], strict=True)), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["query"]}')
    peft, adapter = jpeft.hf.load(tmp_path, model, params, IDS)
    merged = peft.merge(params, adapter)
    for i in range(2):
        kernel = params["layer"][str(i)]["query"]["kernel"] + (i + 1) * (b @ a).T  # r = lora_alpha = 8
        np.testing.assert_allclose(merged["layer"][str(i)]["query"]["kernel"], kernel, rtol=1e-5, atol=1e-5)


def test_parts_of_a_fused_weight_become_one_matrix(tmp_path):
    method = jpeft.LoRA(rank=2, alpha=5, rslora=True, targets=["query"], overrides={"query": {"parts": 3}})
    params, peft, adapter = made(Encoder(), method)
    jpeft.hf.save(tmp_path, peft, adapter, params)
    again, read = jpeft.hf.load(tmp_path, Encoder(), params, IDS)
    assert again.method.rank == 6
    np.testing.assert_allclose(again.apply(params, read, IDS), peft.apply(params, adapter, IDS), atol=1e-5)


def test_abstract_and_frozen_params(saved):
    from flax.core import FrozenDict, freeze

    folder, params, adapter = saved
    shapes = jax.eval_shape(lambda: params)
    same(jpeft.hf.load(folder, Encoder(), shapes, IDS)[1], adapter)
    assert isinstance(jpeft.hf.load(folder, Encoder(), freeze(params), IDS)[1], FrozenDict)


# --- prefixes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "bert.", "model.bert"])
@pytest.mark.parametrize("model", [Encoder(), Classifier()], ids=["encoder", "classifier"])
def test_prefix_is_found(model, prefix, saved, tmp_path):
    """An adapter of the encoder, saved under any wrapper, loads onto the encoder and onto a model that contains it."""
    _, _, adapter = saved
    params, peft, _ = made(Encoder(), jpeft.LoRA(rank=2, alpha=3, targets=["query"]))
    jpeft.hf.save(tmp_path / "other", peft, adapter, params, prefix=prefix)
    _, read = jpeft.hf.load(tmp_path / "other", model, parameters(model), IDS)
    same(read["encoder"] if isinstance(model, Classifier) else read, adapter)


def test_ambiguous_prefix_must_be_given(saved):
    folder, _, adapter = saved

    class Towers(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return Encoder(name="left")(ids) + Encoder(name="right")(ids)

    params = parameters(Towers())
    with pytest.raises(AdapterError, match=r"several places.*prefix=\{'left/': ''\} or prefix=\{'right/': ''\}"):
        jpeft.hf.load(folder, Towers(), params, IDS)
    _, read = jpeft.hf.load(folder, Towers(), params, IDS, prefix={"right/": ""})
    same(read["right"], adapter)


def test_layer_numbers_are_never_rewritten(saved):
    folder, params, _ = saved
    edit_tensors(folder, lambda t: [t.pop(k) for k in list(t) if ".layer.0." in k])
    edit_tensors(folder, lambda t: [t.update({k.replace("layer.1", "layer.5"): t.pop(k)}) for k in list(t)])
    with pytest.raises(AdapterError, match=r"'layer\.5\.query', which this model lacks; nearest: layer/"):
        jpeft.hf.load(folder, Encoder(), params, IDS)


def test_names_and_paths_are_inverse():
    owners = {("encoder", "layer", "0"), ("classifier",)}
    for rules in ("", "bert.", {"encoder/": "bert."}, {"encoder": ""}, {"encoder/": "a", "classifier/": "b"}):
        names = Names.of(rules)
        assert all(names.tree(names.torch(path), owners) == path for path in owners)


# --- rules of the configuration ---------------------------------------------------------------------------------------

LAYERS = "model.layers.1.mlp.experts.0.up"


@pytest.mark.parametrize(
    ("fields", "name", "expected"),
    [
        ({"target_modules": ["up"]}, LAYERS, True),
        ({"target_modules": ["p"]}, LAYERS, False),
        ({"target_modules": r".*\.up"}, LAYERS, True),
        ({"target_modules": r"up"}, LAYERS, False),
        ({"target_modules": ["up"], "exclude_modules": ["experts.0.up"]}, LAYERS, False),
        ({"target_modules": ["up"], "exclude_modules": r"model\.layers\.2.*"}, LAYERS, True),
        ({"target_modules": ["up"], "modules_to_save": ["mlp"]}, LAYERS, False),
        ({"target_modules": ["up"], "layers_to_transform": [1]}, LAYERS, True),
        ({"target_modules": ["up"], "layers_to_transform": 0}, LAYERS, False),
        ({"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": "experts"}, LAYERS, True),
        ({"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]}, LAYERS, False),
        ({"target_modules": ["head"], "layers_to_transform": [0]}, "head", False),
    ],
)
def test_targets_follow_peft(fields, name, expected):
    assert Config(method=jpeft.LoRA, **fields).targets(name) is expected


def lora_config(**own):
    return Config(method=jpeft.LoRA, target_modules=["q"], own=own)


def test_patterns_follow_peft():
    config = lora_config(rank_pattern={"q": 2, "a.q": 3, r"layers\.[01]\.k": 4, "v|w": 5})
    ranks = {"a.q": 2, "q": 2, "aq": 8, "x.layers.1.k": 4, "layers.2.k": 8, "b.w": 5}
    assert {name: config.settings(name)["rank"] for name in ranks} == ranks


@pytest.mark.parametrize(
    "values", [{"q": 1, "a.q": 2, "b.q": 1}, {"a.q": 1, "a.b.q": 2, "q": 3}, {"a.b": 1, "aXb": 2, "c": 1}, {"a": 1.5}]
)
def test_patterns_name_modules_exactly(values):
    default, pattern = patterns(values)
    config = lora_config(r=default, rank_pattern=json.loads(json.dumps(pattern, sort_keys=True)))
    assert {name: config.settings(name)["rank"] for name in values} == values


# --- mistakes in a folder ---------------------------------------------------------------------------------------------

FIELDS = {
    "use_bdlora": True,
    "layer_replication": [[0, 1]],
    "trainable_token_indices": [3],
    "target_parameters": ["experts.w"],  # which the model lacks
    "lora_bias": True,
    "megatron_config": {"a": 1},
    "use_qalora": True,
    "ensure_weight_tying": True,
    "from_the_future": 0,
    "enable_lora": [True, False, True],
    "init_lora_weights": "pissa_niter_16",
    "peft_type": "XLORA",
    "r": 0,
    "lora_alpha": None,
    "lora_dropout": 1.0,
    "use_rslora": 1,
    "bias": "some",
    "rank_pattern": {"query": "4"},
    "alpha_pattern": {"(": 4},
    "target_modules": [],
    "exclude_modules": 3,
    "layers_to_transform": ["0"],
    "modules_to_save": "classifier",
}


@pytest.mark.parametrize("value", ["8", True, float("inf")])
def test_alpha_that_is_not_a_number_is_refused(value, saved):
    folder, params, _ = saved
    edit(folder, lora_alpha=value)
    with pytest.raises(AdapterError, match="lora_alpha must be a finite number"):
        jpeft.hf.load(folder, Encoder(), params, IDS)


@pytest.mark.parametrize("field", FIELDS)
def test_field_that_is_refused_is_named(field, saved):
    folder, params, _ = saved
    edit(folder, **{field: FIELDS[field]})
    with pytest.raises(AdapterError, match=field):
        jpeft.hf.load(folder, Encoder(), params, IDS)


@pytest.mark.parametrize("init", ["olora", "corda", "loftq", "lora_ga", "something"])
def test_initialization_that_changed_the_base_is_refused(init, saved):
    folder, params, _ = saved
    edit(folder, init_lora_weights=init)
    with pytest.raises(AdapterError, match=f"init_lora_weights='{init}'"):
        jpeft.hf.load(folder, Encoder(), params, IDS)


def test_defaults_and_provenance_are_accepted(saved):
    folder, params, adapter = saved
    edit(
        folder, use_dora=False, layer_replication=None, loftq_config={}, megatron_core="megatron.core", lora_bias=False
    )
    edit(folder, auto_mapping={"a": "b"}, qalora_group_size=16, revision=None, target_parameters=None, peft_version="1")
    edit(folder, eva_config={"rho": 2.0}, init_lora_weights="eva", task_type="SEQ_CLS", modules_to_save=["classifier"])
    same(jpeft.hf.load(folder, Encoder(), params, IDS)[1], adapter)


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_lora": None, "merge_weights": False, "runtime_config": None, "from_the_future": {}, "another": ""},
        {"merge_weights": True, "runtime_config": {"ephemeral_gpu_offload": True}, "use_rslora": None},
    ],
)
def test_unknown_fields_that_are_off_and_harmless_ones_are_accepted(fields, saved):
    folder, params, adapter = saved
    edit(folder, **fields)
    same(jpeft.hf.load(folder, Encoder(), params, IDS)[1], adapter)


@pytest.mark.parametrize("adapter_name", ["default", "lora_2", "base_layer", "modules_to_save", "x-y z"])
def test_names_with_the_adapters_own_are_accepted(adapter_name, tmp_path):
    """As torch has them in a model's state: PEFT reads such a file if its adapter is called so."""
    model = Classifier()
    params, peft, adapter = made(
        model, jpeft.Chain(jpeft.LoRA(rank=2, targets=["query", "words", "mix"]), jpeft.Train(["classifier"]))
    )
    jpeft.hf.save(tmp_path, peft, adapter, params)

    between = {"lora_A": "", "lora_B": "", "classifier": "modules_to_save."}

    def rename(tensors):
        for key in list(tensors):
            new = f"{key}.{adapter_name}" if "_embedding_" in key else key
            new = re.sub(r"(lora_[AB]|classifier)\.", lambda m: f"{m[0]}{between[m[1]]}{adapter_name}.", new)
            tensors[new] = tensors.pop(key)

    edit_tensors(tmp_path, rename)
    same(jpeft.hf.load(tmp_path, model, params, IDS)[1], adapter)


def test_a_file_of_several_adapters_is_refused(saved):
    folder, params, _ = saved
    first = "base_model.model.layer.0.query.lora_A.weight"
    edit_tensors(folder, lambda t: t.update({first.replace("A.", "A.other."): t.pop(first)}))
    with pytest.raises(AdapterError, match=r"several adapters: it has '.*lora_A\.other\.weight' and '.*_B\.weight'"):
        jpeft.hf.load(folder, Encoder(), params, IDS)


# --- mutated folders --------------------------------------------------------------------------------------------------

# fmt: off
VALUES = [
    None, True, False, 0, 1, -1, 3.5, float("nan"), float("-inf"), 1e308, 10**30, 10**400, "", "query", "query|value",
    "(", "(?i)query", "a{9999999999}", "*", "all-linear", "none", "all", "x" * 3000, [], [1], ["query"], [["query"]],
    [None], ["("], ["(?i)q"], [{}], [0, 1], [10**30], [True], {}, {"query": 4}, {"query": None}, {"query": [1]},
    {"query": 10**30}, {"(": 3}, {"(?i)query": 3}, {"": 2}, {"query": {"a": 1}}, {"layer.0.query": 7}, "\x00",
]
# fmt: on


def expected_change(config, tensors):
    """The update of each query's kernel, from the files alone, by the formula of LoRA."""
    out = {}
    for i in range(2):
        name = f"layer.{i}.query"
        alpha, r = config.get("lora_alpha", 8), config.get("r", 8)
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            alpha = value if re.match(rf"(.*\.)?({pattern})$", name) else alpha
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        out[str(i)] = alpha / (r**0.5 if config.get("use_rslora") else r) * (b @ a).T
    return out


def outcome(folder, params):
    """An error of jpeft's own in one line, or an adapter that changes the queries as the files say, and only them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft, adapter = jpeft.hf.load(folder, Encoder(), params, IDS)
    except AdapterError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
        return "refused"
    config = json.loads((folder / "adapter_config.json").read_text())
    change = expected_change(config, load_file(folder / "adapter_model.safetensors"))
    if isinstance(peft.method, jpeft.methods.ALoRA):  # LoRA from the invocation on, which no weight holds
        own = {f.name: getattr(peft.method, f.name) for f in fields_of(jpeft.LoRA)}
        peft = jpeft.LoRA(**own).bind(Encoder(), params, IDS)
    try:
        merged = peft.merge(params, adapter)
    except MergeError:  # a scale beyond the range of float32
        return "refused"
    for i, delta in change.items():
        kernel = np.asarray(params["layer"][i]["query"]["kernel"], np.float64)
        np.testing.assert_allclose(merged["layer"][i]["query"]["kernel"], kernel + delta, rtol=1e-4, atol=1e-4)
        merged["layer"][i]["query"]["kernel"] = params["layer"][i]["query"]["kernel"]
    same(merged, params)
    return "read"


def mutated_fields():
    own = {*jpeft.LoRA.hf.known, "enable_lora", "from_the_future"}
    return sorted(own | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "peft_type"} | {
        "modules_to_save", "task_type", "ensure_weight_tying", "bias", "inference_mode", "auto_mapping", "peft_version",
    })  # fmt: skip


@pytest.mark.parametrize("field", ["r", "bias", "alpha_pattern", "peft_type", "layers_to_transform", "task_type"])
def test_a_field_of_any_type_is_read_right_or_refused(field, saved):
    folder, params, _ = saved
    for value in VALUES[::3]:
        edit(folder, **{field: value})
        outcome(folder, params)


@pytest.mark.exhaustive
@pytest.mark.parametrize("field", mutated_fields())
def test_every_field_of_any_type_is_read_right_or_refused(field, saved):
    folder, params, _ = saved
    for value in VALUES:
        edit(folder, **{field: value})
        outcome(folder, params)


@pytest.mark.exhaustive
@pytest.mark.parametrize("field", mutated_fields())
def test_two_mutated_fields_are_read_right_or_refused(field, saved):
    folder, params, _ = saved
    rng, original = np.random.default_rng(0), (folder / "adapter_config.json").read_text()
    fields = mutated_fields()
    for _ in range(40):
        (folder / "adapter_config.json").write_text(original)
        other = fields[rng.integers(len(fields))]
        edit(folder, **{field: VALUES[rng.integers(len(VALUES))], other: VALUES[rng.integers(len(VALUES))]})
        outcome(folder, params)


LORA_A = "base_model.model.layer.0.query.lora_A.weight"
CHANGED = {
    **{f"shape {shape}": lambda x, shape=shape: np.zeros(shape, "f") for shape in [(), (0,), (2,), (1, 2, 6), (6, 2)]},
    **{f"dtype {d}": lambda x, d=d: x.astype(d) for d in ["int8", "bool", "float16", "float64", "uint32"]},
    "nan": lambda x: x * np.nan,
    "inf": lambda x: x * np.inf,
}
RENAMED = [
    "", "a", ".", "base_model.model.", "base_model.model", "base_model.model..", "base_model.model.lora_A.weight",
    LORA_A.removesuffix(".weight"), LORA_A.replace("weight", ""), LORA_A + ".", LORA_A + ".default",
    *(LORA_A.replace("lora_A", name) for name in (
        "lora_A.weight", "lora_A.a.b", "lora_A.default", "lora_C", "lora_a", "base_layer", "lora_magnitude_vector"
    )),
    *(LORA_A.replace(old, new) for old, new in (
        ("base_model.", ""), (".weight", ".bias"), ("query", "key"), ("0", "7"), ("0", "-1")
    )),
]  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_a_tensor_of_any_kind_is_read_right_or_refused(name, saved):
    folder, params, _ = saved
    edit_tensors(folder, lambda t: t.update({LORA_A: CHANGED[name](t[LORA_A])}))
    refused = name not in ("dtype float16", "dtype float64")
    assert outcome(folder, params) == ("refused" if refused else "read")


def test_an_adapter_that_changes_nothing_is_told(saved):
    folder, params, _ = saved
    edit_tensors(folder, lambda t: [x.fill(0) for key, x in t.items() if "lora_B" in key])
    with pytest.warns(UserWarning, match=r"adapter_model\.safetensors: this LoRA changes nothing"):
        jpeft.hf.load(folder, Encoder(), params, IDS)


def test_a_tensor_of_any_other_name_is_refused(saved):
    folder, params, _ = saved
    blob = (folder / "adapter_model.safetensors").read_bytes()
    for name in RENAMED:
        for keep in (False, True):
            (folder / "adapter_model.safetensors").write_bytes(blob)
            edit_tensors(folder, lambda t, n=name, k=keep: t.update({n: np.copy(t[LORA_A] if k else t.pop(LORA_A))}))
            assert outcome(folder, params) == "refused", (name, keep)


def _pop(tensors, end):
    tensors.pop(next(k for k in tensors if k.endswith(end)))


TENSORS = {
    "lacks 'base_model.model.layer.0.query.lora_B.weight'": lambda t: _pop(t, "layer.0.query.lora_B.weight"),
    "layer.0.query.lora_B.bias'.*not account": lambda t: t.update(
        {"base_model.model.layer.0.query.lora_B.bias": np.ones(6, "f")}
    ),
    "lora_magnitude_vector'": lambda t: t.update(
        {"base_model.model.layer.0.query.lora_magnitude_vector": np.ones(6, "f")}
    ),
    "lora_embedding_A' beside": lambda t: t.update(
        {"base_model.model.layer.0.query.lora_embedding_A": np.ones((2, 6), "f")}
    ),
    r"shape \[3, 6\], expected \[2, 6\]": lambda t: t.update(
        {"base_model.model.layer.1.query.lora_A.weight": np.ones((3, 6), "f")}
    ),
    "'pooler', which this model lacks": lambda t: t.update({"base_model.model.pooler.weight": np.ones((2, 6), "f")}),
    "'nothing', which this model lacks": lambda t: t.update(
        {f"base_model.model.nothing.lora_{x}.weight": np.ones((2, 2), "f") for x in "AB"}
    ),
    "'layer.0.norm', which is not a weight": lambda t: t.update(
        {f"base_model.model.layer.0.norm.lora_{x}.weight": np.ones((2, 2), "f") for x in "AB"}
    ),
    "'layer.0.value', which adapter_config.json does not target": lambda t: t.update(
        {f"base_model.model.layer.0.value.lora_{x}.weight": np.ones((2, 2), "f") for x in "AB"}
    ),
    "no LoRA for 'layer.0.query', which target_modules names": lambda t: [t.pop(k) for k in list(t) if "layer.0" in k],
    "int32, expected floating": lambda t: t.update({k: v.astype("i") for k, v in t.items()}),
    "start with 'base_model.model.'": lambda t: t.update({k.removeprefix("base_model."): t.pop(k) for k in list(t)}),
    "holds no LoRA": lambda t: t.clear(),
}


@pytest.mark.parametrize("message", TENSORS)
def test_tensor_that_is_missing_extra_or_misshapen_is_named(message, saved):
    folder, params, _ = saved
    edit_tensors(folder, TENSORS[message])
    with pytest.raises(AdapterError, match=message):
        jpeft.hf.load(folder, Encoder(), params, IDS)


def test_files_that_are_not_an_adapter(saved, tmp_path):
    folder, params, _ = saved

    def refused(match):
        with pytest.raises(AdapterError, match=match):
            jpeft.hf.load(folder, Encoder(), params, IDS)

    file = folder / "adapter_model.safetensors"
    blob = file.read_bytes()
    for broken in (blob[:-1], blob[:20], b"", b"\xff" * 64):
        file.write_bytes(broken)
        refused("is not a complete safetensors file")
    file.write_bytes(b"PK\x03\x04")
    refused("is a pickle")
    file.rename(folder / "adapter_model.bin")
    refused("only adapter_model.bin, a pickle.*safe_serialization=True")
    (folder / "adapter_model.bin").unlink()
    refused("adapter_model.safetensors does not exist")
    for text, match in (
        ("[1]", "expected a JSON object"),
        ("{", "adapter_config.json: not JSON"),
        ("\udcff", ": not JSON"),
    ):
        (folder / "adapter_config.json").write_text(text, "utf-8", "surrogateescape")
        refused(match)
    (folder / "adapter_config.json").unlink()
    refused("has no adapter_config.json")
    shutil.rmtree(folder)
    refused("is not a folder")


def test_modules_to_save_and_biases_must_be_whole(tmp_path):
    method = jpeft.Chain(jpeft.LoRA(rank=2, targets=["query"]), jpeft.BitFit(exclude=["mix"]), jpeft.Train(["mix"]))
    params, peft, adapter = made(Encoder(), method)
    for gone, why in (
        ("mix.weight", "modules_to_save asks"),
        ("norm.bias", "bias=all asks"),
        ("base_layer.bias", "bias=all"),
    ):
        folder = tmp_path / gone
        jpeft.hf.save(folder, peft, adapter, params)
        edit_tensors(folder, lambda t, gone=gone: _pop(t, gone))
        with pytest.raises(AdapterError, match=f"{gone}', which {why}"):
            jpeft.hf.load(folder, Encoder(), params, IDS)
    edit(folder, modules_to_save=["mix", "cls"])
    with pytest.raises(AdapterError, match="modules_to_save has 'cls', which this model lacks"):
        jpeft.hf.load(folder, Encoder(), params, IDS)


def test_base_weights_in_the_file_must_be_the_base(saved):
    """PEFT adds the table of an embedding that it targets, or that was resized."""
    folder, params, adapter = saved
    table = np.asarray(params["words"]["embedding"])
    edit_tensors(folder, lambda t: t.update({"base_model.model.words.base_layer.weight": table}))
    same(jpeft.hf.load(folder, Encoder(), params, IDS)[1], adapter)
    kernel = np.asarray(params["layer"]["0"]["value"]["kernel"]).T.copy()
    edit_tensors(folder, lambda t: t.update({"base_model.model.layer.0.value.weight": kernel}))
    same(jpeft.hf.load(folder, Encoder(), params, IDS)[1], adapter)
    for other in (table + 1, np.concatenate([table, table])):
        edit_tensors(folder, lambda t, other=other: t.update({"base_model.model.words.base_layer.weight": other}))
        with pytest.raises(AdapterError, match=r"words\.base_layer\.weight', a base weight that differs"):
            jpeft.hf.load(folder, Encoder(), params, IDS)


def test_modules_to_ignore(saved):
    folder, params, adapter = saved
    edit_tensors(folder, lambda t: t.update({"base_model.model.pooler.dense.weight": np.ones((2, 2), "f")}))
    same(jpeft.hf.load(folder, Encoder(), params, IDS, ignore=["dense"])[1], adapter)
    peft, _ = jpeft.hf.load(folder, Encoder(), params, IDS, ignore=["dense", "layer.0.query"])
    assert [site.name for site in peft.sites] == ["layer/1/query"]
    with pytest.raises(AdapterError, match="no module 'polar' to ignore"):
        jpeft.hf.load(folder, Encoder(), params, IDS, ignore=["dense", "polar"])


# --- adapters that PEFT cannot hold -----------------------------------------------------------------------------------


class Odd(nn.Module):
    """Weights without a torch module."""

    @nn.compact
    def __call__(self, x):
        twice = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
        x, _ = nn.scan(lambda layer, x, _: (layer(x), None), **twice)(Layer(name="layers"), x, None)
        x = x @ self.param("raw", nn.initializers.normal(), (6, 6))
        return nn.Conv(6, (2,), feature_group_count=2, name="grouped")(x)


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("layers/query", "'layers/query' has no counterpart.*stacked over 2 layers"),
        ("raw", "'raw' has no counterpart.*a parameter of the model itself"),
        ("grouped", "'grouped' has no counterpart.*grouped"),
    ],
)
def test_weight_without_a_torch_module(target, match, tmp_path):
    model, x = Odd(), jnp.ones((2, 4, 6))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    peft = jpeft.LoRA(rank=2, targets=[target]).bind(model, shapes, x)
    adapter = filled(peft.init(jax.random.key(0), shapes), 1)
    with pytest.raises(ValueError, match=match):
        jpeft.hf.save(tmp_path / "hf", peft, adapter, shapes)
    assert not (tmp_path / "hf").exists()


class Norms(nn.Module):
    """Modules whose names begin as PEFT's tensors do: GPT-2's norms are ``ln_1`` and ``ln_f``."""

    @nn.compact
    def __call__(self, ids):
        x = nn.LayerNorm(name="ln_1")(nn.Embed(9, 6, name="words")(ids))
        return nn.LayerNorm(name="ln_f")(nn.Dense(6, name="lora_out")(x))


@pytest.mark.parametrize("method", [jpeft.Train(["ln_1", "ln_f"]), jpeft.LoRA(rank=2, targets=["lora_out"])])
def test_modules_named_like_tensors(method, tmp_path):
    params, peft, adapter = made(Norms(), method)
    jpeft.hf.save(tmp_path / "hf", peft, adapter, params)
    again, read = jpeft.hf.load(tmp_path / "hf", Norms(), params, IDS)
    assert [site.name for site in again.sites] == [site.name for site in peft.sites]
    same(read, adapter)


QUERY = jpeft.LoRA(rank=2, targets=["query"])
NOT_HELD = {
    "one method, this chain has LoRA and IA3": jpeft.Chain(QUERY, jpeft.IA3(targets=["value"])),
    "no modules beside TRAINABLE_TOKENS; leave 'mix' out": jpeft.Chain(
        jpeft.methods.TrainableTokens(indices=[1, 2]), jpeft.Train(["mix"])
    ),
    "no biases beside IA3": jpeft.Chain(jpeft.IA3(targets=["value"]), jpeft.BitFit()),
    "Bottleneck has no form": jpeft.Bottleneck(targets=r"layer/\d"),
    "needs one of .*LoRA.* in the chain": jpeft.BitFit(),
    "all biases or those of the modules with a LoRA, this chain neither: see 'layer/0/query/bias'": jpeft.Chain(
        QUERY, jpeft.BitFit(targets=r"mix/bias")
    ),
    "modules of LN_TUNING are.*'layer/0/norm/scale' without 'layer/0/norm/bias'": jpeft.Train(r".*/norm/scale"),
    "'mix/kernel' without 'mix/bias'": jpeft.Chain(QUERY, jpeft.Train(r"mix/kernel")),
    "'layer/0/query/bias' without": jpeft.Chain(QUERY, jpeft.Train(r".*/query/bias")),
    "one lora_dropout": jpeft.LoRA(dropout=0.1, targets=["query"], overrides={"layer/0/query": {"dropout": 0.0}}),
}


def test_float64_stays_where_it_is_enabled(tmp_path):
    with jax.enable_x64(True):
        params, peft, adapter = made(Encoder(), jpeft.LoRA(rank=2, targets=["query"], dtype="float64"))
        jpeft.hf.save(tmp_path / "hf", peft, adapter, params)
        same(jpeft.hf.load(tmp_path / "hf", Encoder(), params, IDS)[1], adapter)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        words = nn.Embed(9, 6, name="words")
        x = nn.Dense(6, name="query")(words(ids))
        return x @ words.variables["params"]["embedding"].T


def test_tokens_of_a_table_that_a_head_shares(tmp_path):
    tokens = jpeft.methods.TrainableTokens(indices=[1, 3], targets=["words"])
    params, peft, adapter = made(Tied(), jpeft.Chain(QUERY, tokens))  # PEFT ties the head, too
    jpeft.hf.save(tmp_path / "hf", peft, adapter, params)
    same(jpeft.hf.load(tmp_path / "hf", Tied(), params, IDS)[1], adapter)


def test_a_size_in_the_configuration_that_does_not_divide(tmp_path):
    params, peft, adapter = made(Encoder(), jpeft.methods.C3A(block_size=2, targets=["query"]))
    jpeft.hf.save(tmp_path / "hf", peft, adapter, params)
    edit(tmp_path / "hf", block_size=4)
    with pytest.raises(AdapterError, match=r"/hf: C3A.*'layer/0/query'.*6"):
        jpeft.hf.load(tmp_path / "hf", Encoder(), params, IDS)


class Dotted(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return nn.Dense(6, name="to.out")(nn.Embed(9, 6)(ids))


def test_a_name_that_torch_cannot_have(tmp_path):
    params, peft, adapter = made(Dotted(), jpeft.LoRA(rank=2, targets=["to.out"]))
    with pytest.raises(ValueError, match=r"'to\.out' has no counterpart .*: it has a '\.' or '/' within the name"):
        jpeft.hf.save(tmp_path / "hf", peft, adapter, params)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("match", NOT_HELD)
def test_method_that_peft_cannot_hold(match, tmp_path):
    params, peft, adapter = made(Encoder(), NOT_HELD[match])
    with pytest.raises(ValueError, match=match):
        jpeft.hf.save(tmp_path / "hf", peft, adapter, params)
    assert not list(tmp_path.iterdir())


def test_task_whose_head_was_not_trained(tmp_path):
    params, peft, adapter = made(Encoder(), QUERY)
    with pytest.raises(ValueError, match=r"task_type='SEQ_CLS'.*classifier or score"):
        jpeft.hf.save(tmp_path / "hf", peft, adapter, params, task_type="SEQ_CLS")


# --- writing ----------------------------------------------------------------------------------------------------------


def test_killed_save_leaves_the_old_one(saved, monkeypatch):
    folder, params, adapter = saved
    _, peft, other = made(Encoder(), jpeft.LoRA(rank=4, targets=["value"]))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("jpeft.hf.exporting.write_atomically", full)
        with pytest.raises(OSError, match="No space"):
            jpeft.hf.save(folder, peft, other, params)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    same(jpeft.hf.load(folder, Encoder(), params, IDS)[1], adapter)
    jpeft.hf.save(folder, peft, other, params)
    same(jpeft.hf.load(folder, Encoder(), params, IDS)[1], other)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_folder_of_something_else_is_left_alone(saved):
    folder, params, _ = saved
    _, peft, adapter = made(Encoder(), QUERY)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds 'notes.txt'"):
        jpeft.hf.save(folder, peft, adapter, params)
    file = folder.parent / "file"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="choose another"):
        jpeft.hf.save(file, peft, adapter, params)
    assert file.read_text() == "mine"
