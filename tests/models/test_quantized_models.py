"""Model folders with quantized weights: saving, loading, quantizing while loading, and errors in such folders."""

import functools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft import models
from jpeft.cli import main
from jpeft.core import tree
from jpeft.core.fingerprint import difference, fingerprint
from jpeft.core.quantized import Quantized, dequantize_leaf
from jpeft.models import ModelError
from jpeft.models.bert import Bert, BertConfig
from jpeft.models.decoder import Decoder, DecoderConfig
from jpeft.quantization.tree import is_quantized
from tests.folders import write_tokenizer

# Kernels are square, so that there is one shape to compile for.
SIZES = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128,
         "eos_token_id": 256}  # fmt: skip
IDS = jnp.array([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
UP = "model.layers.1.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"


def exhaustive(value):
    return pytest.param(value, marks=pytest.mark.exhaustive)


def tiny(**fields):
    model = Decoder(DecoderConfig(**{**SIZES, **fields}))
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), IDS)["params"])
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), shapes)


@pytest.fixture(scope="module")
def llama():
    return tiny()


@pytest.fixture(scope="module")
def plain(llama, tmp_path_factory):
    """A folder with the unquantized model and a tokenizer."""
    folder = tmp_path_factory.mktemp("home") / "plain"
    models.save(folder, *llama)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def nf4(llama, plain):
    """A folder with the quantized model."""
    folder = plain.with_name("nf4")
    models.save(folder, llama[0], jpeft.quantize(llama[1]), source=plain)
    return folder


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def about(folder):
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


def rewrite(folder, out, change, **config):
    """A copy of a folder with other tensors."""
    with safe_open(folder / "model.safetensors", "numpy") as file:
        metadata = file.metadata()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    out.mkdir(parents=True)
    fields = json.loads((folder / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    save_file(tensors, out / "model.safetensors", metadata)
    return out


# --- there and back -------------------------------------------------------------------------------------------------

CASES = {  # arguments of `jpeft.quantize`, and whether bitsandbytes has a form for the result
    "nf4": ({}, True),
    "nf4-some": ({"double": False, "block": 32, "targets": ["q_proj", "down_proj"]}, True),
    "int4": ({"scheme": "int4", "block": 16}, False),
    "fp8": ({"scheme": "fp8", "double": False, "targets": ["up_proj"]}, False),
}


@pytest.mark.parametrize("case", ["nf4", exhaustive("nf4-some"), exhaustive("int4"), "fp8"])
def test_save_and_load_round_trip_and_equal_quantizing_while_loading(llama, plain, tmp_path, case):
    model, params = llama
    options, is_bitsandbytes = CASES[case]
    want = jpeft.quantize(params, **options)
    models.save(tmp_path / "out", model, want, source=plain)
    read, got = models.load(tmp_path / "out")
    assert read == model
    same(got, want)
    assert fingerprint(got) == fingerprint(params)
    same(models.load(plain, quantize=options)[1], want)
    same(models.load(tmp_path / "out", scan_layers=False)[1], models.unstack(want))
    assert about(tmp_path / "out")["quant_method"] == ("bitsandbytes" if is_bitsandbytes else "jpeft")


def test_other_kinds_of_leaves_round_trip(tmp_path):
    """Embeddings and blocks along the outputs, for which bitsandbytes has no form; layers one by one; bfloat16."""
    model, params = tiny(intermediate_size=96, num_hidden_layers=1, tie_word_embeddings=True)
    embeddings = jpeft.quantize(params, "nf4", targets=["model/embed_tokens/embedding"], block=20)
    along_outputs = jpeft.quantize(params, targets="all-linear")
    assert along_outputs["model"]["layers"]["mlp"]["down_proj"]["kernel"].axis == -1
    assert embeddings["model"]["embed_tokens"]["embedding"].axis == -2
    half = jpeft.quantize(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), targets=["up_proj"])
    one_by_one = jpeft.quantize(models.unstack(params))
    for name, want in {"e": embeddings, "o": along_outputs, "h": half, "1": one_by_one}.items():
        options = {"param_dtype": jnp.bfloat16} if name == "h" else {"scan_layers": False} if name == "1" else {}
        written = model.clone(scan_layers=name != "1")
        models.save(tmp_path / name, written, want)
        same(models.load(tmp_path / name, **options)[1], want)
    assert about(tmp_path / "o") == {"quant_method": "jpeft"}
    config = json.loads((tmp_path / "h" / "config.json").read_text())
    assert config["torch_dtype"] == config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    assert "model.layers.0.mlp.down_proj" in config["quantization_config"]["llm_int8_skip_modules"]
    _, wide = models.load(tmp_path / "h")
    assert wide["model"]["layers"]["mlp"]["up_proj"]["kernel"].dtype == jnp.float32
    assert wide["model"]["norm"]["scale"].dtype == jnp.float32


def test_the_files_have_the_form_of_bitsandbytes(nf4, llama):
    tensors = load_file(nf4 / "model.safetensors")
    weight = jpeft.quantize(llama[1])["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert {name.removeprefix(UP) for name in tensors if name.startswith(UP)} == {
        "", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4",
    }  # fmt: skip
    np.testing.assert_array_equal(tensors[UP], np.asarray(weight.codes[1]).T.reshape(-1, 1))
    state = json.loads(tensors[STATE].tobytes())
    assert state == {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 64],
                     "nested_blocksize": 256, "nested_dtype": "float32",
                     "nested_offset": float(weight.offset[1])}  # fmt: skip
    assert about(nf4) == {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["classifier", "head", "lm_head", "logits_dense", "pooler", "score"],
    }  # fmt: skip
    assert (nf4 / "tokenizer.json").is_file()


def test_save_with_a_quantized_source(nf4, llama, tmp_path):
    model, params = llama
    models.save(tmp_path / "plain", model, params, source=nf4)
    assert about(tmp_path / "plain") is None
    same(models.load(tmp_path / "plain")[1], params)
    mixed = jpeft.quantize(params, targets=["q_proj"])
    models.save(tmp_path / "mixed", model, mixed, source=nf4)
    same(models.load(tmp_path / "mixed")[1], mixed)


def test_an_encoder_has_a_quantized_pooler(tmp_path):
    """It is a part of the model, or stays in the file as it is."""
    model = Bert(BertConfig(vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
                            intermediate_size=64, max_position_embeddings=24), pooler=True)  # fmt: skip
    params = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
    base = jpeft.quantize(params)
    models.save(tmp_path / "source", model, base)
    again, read = models.load(tmp_path / "source")
    assert again == model
    same(read, base)
    bare, encoder = models.load(tmp_path / "source", pooler=False)
    same(encoder, {name: part for name, part in base.items() if name != "pooler"})
    models.save(tmp_path / "out", bare, encoder, source=tmp_path / "source")
    same(models.load(tmp_path / "out")[1], base)
    plain = {name: part for name, part in params.items() if name != "pooler"}
    models.save(tmp_path / "plain", bare, plain, source=tmp_path / "source")  # the pooler stays quantized
    assert "encoder.layer.0.output.dense" in about(tmp_path / "plain")["llm_int8_skip_modules"]
    same(models.load(tmp_path / "plain")[1], {**plain, "pooler": base["pooler"]})


def test_quantized_weights_are_sharded(nf4, llama):
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    rules = [("mlp", "tensor"), ("heads", "tensor")]
    want = jpeft.quantize(llama[1])
    for folder, options in ((nf4, {}), (nf4.with_name("plain"), {"quantize": "nf4"})):
        model, got = models.load(folder, shardings=lambda m: models.logical_shardings(m, mesh, rules), **options)
        same(got, want)
        up = got["model"]["layers"]["mlp"]["up_proj"]["kernel"]
        assert up.codes.sharding.spec == up.scales.sharding.spec == PartitionSpec(None, None, "tensor")
        assert up.groups.sharding == NamedSharding(mesh, PartitionSpec())
    assert jax.jit(model.apply)({"params": got}, IDS).shape == (2, 5, 260)


def test_an_adapter_of_the_plain_model_fits_its_quantized_folder(nf4, llama):
    assert difference(fingerprint(llama[1]), models.load(nf4)[1]) is None


@pytest.mark.parametrize("scan_layers", [True, exhaustive(False)])
def test_without_checksums_the_fingerprint_is_that_of_the_dequantized_weights(nf4, tmp_path, scan_layers):
    folder = rewrite(nf4, tmp_path / "bnb", lambda t: None)
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})
    _, params = models.load(folder, scan_layers=scan_layers)
    for path, leaf in tree.flatten(params).items():
        if isinstance(leaf, Quantized):
            weight = {path[-1]: leaf.unbox()}  # not jitted: fusing a product and a sum rounds differently
            assert fingerprint(weight)[path[-1]] == fingerprint({path[-1]: leaf})[path[-1]]


def test_codes_stored_as_another_dtype_are_loaded(nf4, tmp_path):
    def change(tensors):
        tensors[UP] = tensors[UP].reshape(-1).view(np.float32)

    same(models.load(rewrite(nf4, tmp_path / "odd", change))[1], models.load(nf4)[1])


# --- layers one by one ----------------------------------------------------------------------------------------------


def test_stack_and_unstack_keep_quantized_leaves(llama):
    base = jpeft.quantize(llama[1])
    one_by_one = models.unstack(base)
    layer = one_by_one["model"]["layers"]["1"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(layer, Quantized) and layer.shape == (64, 64)
    whole = base["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(dequantize_leaf(layer), dequantize_leaf(whole)[1])
    np.testing.assert_array_equal(layer.origin, whole.origin[0])  # that of the stack
    same(models.stack(one_by_one), base)
    abstract = jax.eval_shape(lambda p: p, base)
    assert jax.tree.structure(models.stack(models.unstack(abstract))) == jax.tree.structure(abstract)
    boxed = jpeft.quantize(jax.eval_shape(llama[0].init, jax.random.key(0), IDS)["params"])
    opened = models.unstack(boxed)["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    assert opened.codes.shape == (32, 64)


def test_layers_that_were_quantized_one_by_one_are_stacked(llama, tmp_path):
    alone = jpeft.quantize(models.unstack(llama[1]))
    stacked = models.stack(alone)
    models.save(tmp_path / "alone", llama[0].clone(scan_layers=False), alone)
    same(models.load(tmp_path / "alone", scan_layers=False)[1], alone)
    same(models.load(tmp_path / "alone")[1], stacked)


def test_layers_that_are_quantized_differently_cannot_be_stacked(llama, tmp_path):
    mixed = models.unstack(llama[1])
    mixed["model"]["layers"]["0"] = jpeft.quantize(mixed["model"]["layers"]["0"])
    with pytest.raises(ValueError, match=r"kernel has different quantization .*\(nf4 in blocks of 64 along -2"):
        models.stack(mixed)
    models.save(tmp_path / "mixed", llama[0].clone(scan_layers=False), mixed)
    with pytest.raises(ModelError, match=r"kernel is not quantized alike in all layers: .*scan_layers=False"):
        models.load(tmp_path / "mixed")
    same(models.load(tmp_path / "mixed", scan_layers=False)[1], mixed)


@pytest.mark.exhaustive  # `generate` at the command below also unrolls the layers
def test_generation_is_the_same_with_layers_one_by_one(llama):
    model, params = llama
    base = jpeft.quantize(params)
    flat, unrolled, _, _ = models.unroll(model, base)
    assert not flat.scan_layers and is_quantized(unrolled)
    ids = [[5, 6, 7]]
    assert jpeft.generate(flat, unrolled, ids, max_new_tokens=4) == jpeft.generate(model, base, ids, max_new_tokens=4)


# --- errors ---------------------------------------------------------------------------------------------------------


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: np.asarray(value)})


def state(**fields):
    def change(tensors):
        found = json.loads(tensors[STATE].tobytes()) | fields
        found = {name: value for name, value in found.items() if value is not None}
        tensors[STATE] = np.frombuffer(json.dumps(found).encode(), np.uint8)

    return change


def renamed(suffix):
    return lambda tensors: tensors.update({f"{UP}.quant_state.{suffix}": tensors.pop(STATE)})


u8 = functools.partial(np.zeros, dtype=np.uint8)
DAMAGE = {
    "no absmax": (drop(f"{UP}.absmax"), f"{UP}.absmax is missing"),
    "no codes": (drop(UP), f"{UP} is missing"),
    "no quant_map": (drop(f"{UP}.quant_map"), f"{UP}.quant_map is missing"),
    "no nested_quant_map": (drop(f"{UP}.nested_quant_map"), f"{UP}.nested_quant_map is missing"),
    "no state": (drop(STATE), f"{UP}: it is quantized, but has no quant_state"),
    "two states": (put(f"{UP}.quant_state.jpeft__int8", u8(3)), f"{UP}: it is quantized, but has 2 quant_state"),
    "fp4": (
        renamed("bitsandbytes__fp4"),
        f"{UP}: it is quantized as bitsandbytes fp4, which is not supported",
    ),
    "another scheme": (renamed("jpeft__int2"), f"{UP}: it is quantized as jpeft int2"),
    "name and state": (renamed("jpeft__int8"), "has quant_type 'nf4', but its name has 'int8'"),
    "no JSON": (put(STATE, np.frombuffer(b'{"quant_type', np.uint8)), f"{UP}: its quant_state is not JSON"),
    "no text": (put(STATE, np.full(9, 255, np.uint8)), f"{UP}: its quant_state is not JSON"),
    "no object": (put(STATE, np.frombuffer(b"[1]", np.uint8)), f"{UP}: its quant_state is not a JSON object"),
    "shape": (state(shape=[64, 128]), f"{UP}: its absmax has 64 numbers, a weight of shape .* needs 128"),
    "shape no list": (state(shape=4096), "has shape 4096"),
    "shape negative": (state(shape=[-64, 64]), "has shape"),
    "other shape": (state(shape=[32, 128]), "has shape"),
    "blocksize": (state(blocksize=0), "has blocksize 0"),
    "blocks across rows": (state(blocksize=128), "has blocks of 128 that do not divide its rows of 64"),
    "axis": (state(axis=-2), "has axis -2"),
    "dtype": (state(dtype="int8"), "has dtype 'int8'"),
    "no offset": (state(nested_offset=None), "has no nested_offset, but nested_absmax is present"),
    "offset": (state(nested_offset="big"), "has nested_offset 'big'"),
    "nested blocksize": (state(nested_blocksize=128), "has nested_blocksize 128"),
    "short absmax": (put(f"{UP}.absmax", u8(63)), "its absmax has 63 numbers"),
    "float absmax": (put(f"{UP}.absmax", np.zeros(64, np.float32)), "its absmax is float32, expected uint8"),
    "short nested": (put(f"{UP}.nested_absmax", np.zeros(2, np.float32)), "its nested_absmax has 2 numbers"),
    "short codes": (put(UP, u8((2047, 1))), "it has 2,047 bytes of codes, expected 2,048"),
    "another map": (
        put(f"{UP}.quant_map", np.linspace(-1, 1, 16, dtype=np.float32)),
        "its quant_map is not NF4's",
    ),
    "int8 of bitsandbytes": (put("model.layers.0.mlp.up_proj.SCB", np.ones(64, np.float32)), "LLM.int8()"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_tensor_is_named(nf4, tmp_path, case):
    change, message = DAMAGE[case]
    folder = rewrite(nf4, tmp_path / "damaged", change)
    with pytest.raises(ModelError) as error:
        models.load(folder)
    text = str(error.value)
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), text), text
    assert "\n" not in text and str(folder) in text and ("up_proj" in text)


@pytest.mark.parametrize("origins", ['{"x": "12"}', "[]", "{", '{"x": 5}'])
def test_damaged_checksums_are_an_error(nf4, tmp_path, origins):
    folder = rewrite(nf4, tmp_path / "damaged", lambda t: None)
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"jpeft.origin": origins})
    with pytest.raises(ModelError, match=r"model\.safetensors: the metadata entry jpeft\.origin is damaged"):
        models.load(folder)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantization_config: gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"bitsandbytes LLM\.int8\(\)"),
        ({"load_in_8bit": True}, r"bitsandbytes LLM\.int8\(\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes fp4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes fp4"),
        ({"bits": 4}, "quantization_config: None"),
        ("nf4", "quantization_config is not an object"),
    ],
)
def test_unsupported_forms_of_quantization_are_an_error(nf4, tmp_path, found, message):
    folder = rewrite(nf4, tmp_path / "other", lambda t: None, quantization_config=found)
    with pytest.raises(ModelError, match=message) as error:
        models.load(folder)
    assert str(folder / "config.json") in str(error.value) and "\n" not in str(error.value)


def test_errors_of_quantizing_while_loading(plain, nf4, tmp_path):
    with pytest.raises(ModelError, match=r"model\.safetensors: .*proj\.weight is quantized already, as nf4"):
        models.load(nf4, quantize="int8")
    with pytest.raises(ValueError, match="unknown scheme 'int3'"):
        models.load(plain, quantize="int3")
    with pytest.raises(ValueError, match="'q_prj' matches nothing"):
        models.load(plain, quantize={"targets": ["q_prj"]})
    weight = np.ones((64, 64), np.float32)
    weight[3, 5] = np.nan
    nan = rewrite(plain, tmp_path / "nan", put(UP, weight))
    with pytest.raises(ModelError, match=rf"cannot quantize {UP}: it holds NaN"):
        models.load(nan, quantize="nf4")


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def lenient():
    """jax's default promotion, as for users."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_the_command_quantizes_a_folder_that_generate_loads(plain, nf4, tmp_path, capsys, monkeypatch, lenient):
    out = tmp_path / "out"
    assert main(["quantize", str(plain), str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    kernels = 2 * 7 * 64 * 64
    whole = sum(leaf.size for leaf in jax.tree.leaves(models.load(plain)[1]))
    assert report["quantized"] == kernels and report["bytes_before"] == 4 * whole and report["folder"] == str(out)
    assert (
        report["bits"] == pytest.approx(4 + 8 / 64 + 64 / 4096) and report["bytes_after"] < 0.6 * report["bytes_before"]
    )
    assert report["left"] == ["lm_head/kernel", "model/embed_tokens/embedding"]
    same(models.load(out)[1], models.load(nf4)[1])
    assert main(["generate", "--model", str(out), "--max-new-tokens", "4", "--json", "ab"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] > 0
    more = ["--scheme", "int8", "--block", "32", "--no-double", "--targets", "q_proj,v_proj", "--dtype", "bfloat16"]
    assert main(["quantize", str(plain), str(tmp_path / "int8"), *more]) == 0
    line, left, _ = capsys.readouterr().out.split("\n")
    assert re.fullmatch(rf"int8, 9\.000 bits per quantized weight: .* in bfloat16 -> .*, {tmp_path}/int8", line), line
    assert left.startswith("left in bfloat16: ") and "/k_proj/kernel" in left and "/q_proj/" not in left


def test_errors_of_the_command_are_one_line_and_leave_no_folder(plain, nf4, tmp_path, capsys, lenient):
    out = str(tmp_path / "out")
    for arguments, message in (
        ([str(plain), str(nf4)], "exists; choose another folder"),
        ([str(plain), out, "--targets", "q_prj"], "'q_prj' matches nothing"),
        ([str(plain), out, "--block", "63"], "block must be an even number"),
        ([str(plain), out, "--block", "128"], "a block of 128 divides neither"),
        ([str(nf4), out], "is quantized already, as nf4"),
        (["no-such-model", out], "no such folder"),
    ):
        assert main(["quantize", *arguments]) == 1
        captured = capsys.readouterr()
        assert not captured.out and captured.err.count("\n") == 1 and message in captured.err
        assert captured.err.startswith("jpeft: error: ") and "unexpected" not in captured.err
        assert not list(tmp_path.iterdir())
