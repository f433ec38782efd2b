"""Encoders, loading and saving without torch, on folders that this file writes with safetensors."""

import functools
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from jpeft import models
from jpeft.core import tree
from jpeft.models import bert, bert_hf, ops
from tests.zoo import save_tensors

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
         "intermediate_size": 32, "max_position_embeddings": 24}  # fmt: skip
DISTIL = {"vocab_size": 50, "dim": 16, "n_layers": 1, "n_heads": 4, "hidden_dim": 32, "max_position_embeddings": 24}
CONFIGS = {
    "bert": SIZES,
    "roberta": {**SIZES, "type_vocab_size": 1, "pad_token_id": 1},
    "xlm-roberta": {**SIZES, "type_vocab_size": 1},
    "camembert": {**SIZES, "type_vocab_size": 1, "hidden_act": "gelu_new"},
    "electra": {**SIZES, "embedding_size": 8},
    "distilbert": {**DISTIL, "activation": "relu"},
}
QUERY = "encoder.layer.0.attention.self.query.weight"
NORM = "encoder.layer.0.output.LayerNorm"
IDS = jnp.array([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


def tensors_of(model_type="bert", prefix="", seed=0):
    """Random tensors under HuggingFace's names, which this file derives itself."""
    rng = np.random.default_rng(seed)
    model = bert_hf.from_config({"model_type": model_type, **CONFIGS[model_type]})
    params = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    out = {}
    for path, leaf in tree.flatten(params).items():
        value = (rng.normal(size=leaf.shape) * 0.3).astype(np.float32)
        if path[-1] == "kernel":
            value = np.ascontiguousarray(value.T)
        out[prefix + ".".join((*path[:-1], "bias" if path[-1] == "bias" else "weight"))] = value
    return out


def write(folder, model_type="bert", tensors=None, shards=1, **fields):
    """Writes a HuggingFace folder; `fields` are further fields of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **CONFIGS[model_type], **fields}))
    tensors = tensors_of(model_type) if tensors is None else tensors
    save_tensors(folder, tensors, shards)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "bert")


@functools.cache
def jitted(model):
    """One compiled program for all tests of equal models."""
    return jax.jit(model.apply)


def states(folder, *inputs, **kwargs):
    model, params = models.load(folder)
    return jitted(model)({"params": params}, *inputs, **kwargs)


@pytest.fixture
def lenient():
    """Flax's LayerNorm promotes its half-precision input."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def assert_same(a, b):
    a, b = tree.flatten(a), tree.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=tree.join(path))


# --- load ---


def test_load_names_and_transposes_leaves(folder):
    _, params = models.load(folder)
    tensors = load_file(folder / "model.safetensors")
    query = params["encoder"]["layer"]["0"]["attention"]["self"]["query"]["kernel"]
    np.testing.assert_array_equal(query, tensors[QUERY].T)
    np.testing.assert_array_equal(
        params["embeddings"]["word_embeddings"]["embedding"], tensors["embeddings.word_embeddings.weight"]
    )
    np.testing.assert_array_equal(
        params["encoder"]["layer"]["0"]["output"]["LayerNorm"]["scale"], tensors[f"{NORM}.weight"]
    )
    assert len(tree.flatten(params)) == len(tensors)


def test_load_accepts_a_prefix_heads_and_tensorflow_names(tmp_path):
    want = states(write(tmp_path / "plain"), IDS)
    tensors = tensors_of(prefix="bert.")
    for new, old in (("weight", "gamma"), ("bias", "beta")):
        tensors[f"bert.{NORM}.{old}"] = tensors.pop(f"bert.{NORM}.{new}")
    extras = ("cls.predictions.bias", "classifier.weight", "my.own.head")
    tensors |= {name: np.ones((2, 2), np.float32) for name in extras}
    np.testing.assert_array_equal(states(write(tmp_path / "headed", tensors=tensors), IDS), want)


def test_load_reads_shards(tmp_path):
    want = states(write(tmp_path / "whole"), IDS)
    np.testing.assert_array_equal(states(write(tmp_path / "shards", shards=3), IDS), want)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_load_reads_half_precision_files(tmp_path, dtype, lenient):
    half = {name: value.astype(dtype) for name, value in tensors_of().items()}
    folder = write(tmp_path / "half", tensors=half)
    _, params = models.load(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    model, params = models.load(folder, param_dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
    out = jitted(model)({"params": params}, IDS)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype(jnp.float32), states(folder, IDS), atol=0.15)


def test_dtype_of_computation(folder, lenient):
    model, params = models.load(folder, dtype=jnp.bfloat16)
    assert params["encoder"]["layer"]["0"]["output"]["dense"]["kernel"].dtype == jnp.float32
    grads = jax.jit(jax.grad(lambda p: model.apply({"params": p}, IDS).astype(jnp.float32).std()))(params)
    assert jax.eval_shape(model.apply, {"params": params}, IDS).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {np.dtype(np.float32)}
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def config(**fields):
    return lambda f: write(f, **fields)


def unknown_type(folder):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt9"}')


def drop(name):
    return lambda f: write(f, tensors={k: v for k, v in tensors_of().items() if k != name})


def add(name, value):
    return lambda f: write(f, tensors=tensors_of() | {name: value})


def truncated(folder):
    write(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickle_only(folder):
    write(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_shard(folder):
    write(folder, shards=2)
    (folder / "model-00001.safetensors").unlink()


def escaping_index(folder):
    write(folder, shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))


def not_json(folder):
    write(folder)
    (folder / "config.json").write_bytes(b"\xff{")


BAD = {
    "unknown type": (unknown_type, "model_type 'gpt9' is not one of bert, roberta"),
    "decoder": (config(is_decoder=True), "is_decoder=True is not supported"),
    "relative": (config(position_embedding_type="relative_key"), "position_embedding_type='relative_key'"),
    "activation": (config(hidden_act="mish"), "hidden_act='mish' is not supported"),
    "heads": (config(num_attention_heads=3), "hidden_size=16 does not split into 3"),
    "not a number": (config(hidden_size="big"), "hidden_size='big' is not a non-negative integer"),
    "more layers than tensors": (config(num_hidden_layers=10**9),
                                 "config.json has 1,000,000,000 layers, but there are"),
    "not json": (not_json, "config.json: not JSON"),
    "truncated": (truncated, "not a whole safetensors file"),
    "pickle": (pickle_only, "only pytorch_model.bin, a pickle"),
    "index": (escaping_index, "'../elsewhere.safetensors' is not a file name"),
    "missing": (drop(QUERY), "missing encoder/layer/0/attention/self/query/kernel"),
    "extra": (add("encoder.layer.7.x", np.ones(3, np.float32)), "not part of the model: encoder.layer.7.x"),
    "shape": (add(QUERY, np.ones((16, 8), np.float32)),
              r"query/kernel has shape \(8, 16\), the model needs \(16, 16\)"),
    "quantized": (add(QUERY, np.ones((16, 16), np.int8)),
                  "query.weight is int8; quantized weights of this form are not supported"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_load_errors_name_the_problem(tmp_path, case):
    make, message = BAD[case]
    make(tmp_path / "m")
    with pytest.raises(models.ModelError, match=message) as error:
        models.load(tmp_path / "m")
    assert "\n" not in str(error.value)


def test_load_of_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        models.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        models.load(tmp_path)
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        models.load(tmp_path)
    no_shard(tmp_path / "shards")
    with pytest.raises(FileNotFoundError, match=r"no model-00001\.safetensors"):
        models.load(tmp_path / "shards")


# --- save ---


@pytest.mark.parametrize("model_type", CONFIGS)
def test_save_is_the_inverse_of_load(tmp_path, model_type):
    model, params = models.load(write(tmp_path / "a", model_type))
    models.save(tmp_path / "b", model, params)
    again, params_again = models.load(tmp_path / "b")
    assert again == model
    assert_same(params_again, params)


def test_save_keeps_the_rest_of_the_source(tmp_path):
    head = {"cls.predictions.bias": np.full((2, 2), 3, np.float32), "classifier.bias": np.ones(2, np.float32)}
    source = write(tmp_path / "a", tensors=tensors_of(prefix="bert.") | head, shards=2, architectures=["Mine"])
    (source / "vocab.txt").write_text("[PAD]")
    (source / "pytorch_model.bin").write_text("stale")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    model, params = models.load(source)
    changed = jax.tree.map(lambda x: x + 1, params)
    models.save(tmp_path / "b", model, changed, source=source, extra_files={"note.md": b"hello"})

    assert_same(models.load(tmp_path / "b")[1], changed)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "1_Pooling", "config.json", "model.safetensors", "note.md", "vocab.txt"]  # fmt: skip
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert written.keys() == (tensors_of(prefix="bert.") | head).keys()
    for name, value in head.items():
        np.testing.assert_array_equal(written[name], value)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["architectures"] == ["Mine"]


def test_save_bfloat16(tmp_path, folder, lenient):
    model, params = models.load(folder, param_dtype=jnp.bfloat16)
    models.save(tmp_path / "half", model, params, source=folder)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_same(models.load(tmp_path / "half", param_dtype=jnp.bfloat16)[1], params)


def test_save_rejects_invalid_arguments(tmp_path, folder):
    model, params = models.load(folder)
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        models.save(folder, model, params)
    with pytest.raises(models.ModelError, match="params: missing embeddings/LayerNorm/bias"):
        models.save(tmp_path / "b", model, {"encoder": params["encoder"]})
    with pytest.raises(models.ModelError, match="not part of the model: lora_a"):
        models.save(tmp_path / "b", model, {**params, "lora_a": jnp.ones(2)})
    other = write(tmp_path / "other", layer_norm_eps=1e-3)
    with pytest.raises(models.ModelError, match="another model"):
        models.save(tmp_path / "b", model, params, source=other)
    assert not (tmp_path / "b").exists()


def test_a_failed_save_leaves_nothing(tmp_path, folder, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    model, params = models.load(folder)
    monkeypatch.setattr("jpeft.models.saving.write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        models.save(tmp_path / "out" / "b", model, params)
    assert not list((tmp_path / "out").iterdir())


# --- the encoder ---


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=pytest.mark.exhaustive) if name in ("xlm-roberta", "camembert") else name
        for name in CONFIGS  # these two have roberta's positions
    ],
)
def test_every_family_ignores_padding(tmp_path, model_type):
    folder = write(tmp_path / "m", model_type)
    pad = CONFIGS[model_type].get("pad_token_id", 1 if "roberta" in model_type or model_type == "camembert" else 0)
    padded = jnp.concatenate([IDS, jnp.full((2, 3), pad, IDS.dtype)], axis=1)
    mask = (jnp.arange(8) < 5).astype(jnp.int32)[None].repeat(2, axis=0)
    model, params = models.load(folder)

    @jax.jit
    def run(params, mask):
        apply = functools.partial(model.apply, {"params": params})
        return apply(IDS), [apply(padded, attention_mask=m) for m in (mask, mask.astype(bool))]

    want, outputs = run(params, mask)
    assert want.shape == (2, 5, 16) and want.dtype == jnp.float32 and jnp.isfinite(want).all()
    for out in outputs:
        np.testing.assert_allclose(out[:, :5], want, atol=2e-6)


def test_positions_types_and_length(folder):
    plain = states(folder, IDS)
    np.testing.assert_array_equal(plain, states(folder, IDS, position_ids=jnp.arange(5)[None]))
    np.testing.assert_array_equal(plain, states(folder, IDS, token_type_ids=jnp.zeros_like(IDS)))
    assert not np.allclose(plain, states(folder, IDS, token_type_ids=jnp.ones_like(IDS)))
    assert not np.allclose(plain, states(folder, IDS, position_ids=jnp.arange(1, 6)[None]))
    with pytest.raises(ValueError, match="25 tokens, but the model has positions for 24"):
        states(folder, jnp.ones((1, 25), jnp.int32))


def test_gradients_with_a_row_of_padding_only_are_finite(folder):
    model, params = models.load(folder)
    mask = jnp.array([[1] * 5, [0] * 5])
    grads = jax.jit(jax.grad(lambda p: model.apply({"params": p}, IDS, attention_mask=mask).std()))(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_dropout_follows_the_caller(folder):
    model, params = models.load(folder)
    drop = jax.jit(functools.partial(model.apply, deterministic=False))

    def run(seed):
        return drop({"params": params}, IDS, rngs={"dropout": jax.random.key(seed)})

    np.testing.assert_array_equal(run(0), run(0))
    assert not np.allclose(run(0), run(1))
    assert not np.allclose(run(0), states(folder, IDS))


@pytest.mark.parametrize("masked", [False, True])
def test_attend_with_more_keys_than_queries(masked):
    """Value and gradient are those of `nn.dot_product_attention`, also with keys before the queries' own."""
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(2, n, 4, 4)), jnp.float32) for n in (5, 8, 8))
    mask = jnp.asarray(rng.random((2, 1, 1, 8)) < 0.7) if masked else None
    module = bert.SelfAttention(bert.BertConfig(hidden_size=16, num_attention_heads=4))

    def ours(*qkv):
        return module.apply({}, *qkv, mask, True, method="attend")

    def flax(*qkv):
        return nn.dot_product_attention(*qkv, mask=mask)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradient(attend):
        out, pull = jax.vjp(attend, query, key, value)
        return out, *pull(out)

    assert value_and_gradient(ours)[0].shape == (2, 5, 4, 4)
    for a, b in zip(value_and_gradient(ours), value_and_gradient(flax), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_gelu_and_softmax_equal_those_of_flax():
    x = jnp.linspace(-12, 12, 1001)

    @jax.jit
    def values_and_slopes(x):
        functions = (ops.gelu, functools.partial(nn.gelu, approximate=False))
        return [(f(x), jax.grad(lambda x, f=f: f(x).sum())(x)) for f in functions]

    for got, want in zip(*values_and_slopes(x), strict=True):
        assert jnp.abs(got - want).max() < 2e-6
    scores = jax.random.normal(jax.random.key(0), (3, 7))
    mask = jnp.arange(7)[None] < jnp.array([[7], [3], [1]])

    @jax.jit
    def derivatives(s):
        softmaxes = (lambda s: ops.masked_softmax(s, mask), lambda s: nn.softmax(s, where=mask))
        orders = (jax.jacfwd, jax.jacrev, lambda f: jax.jacfwd(jax.jacrev(f)))
        return [[order(f)(s) for f in softmaxes] for order in orders]

    for got, want in derivatives(scores):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_jit_vmap_and_remat(folder):
    model, params = models.load(folder)
    want = model.apply({"params": params}, IDS)
    np.testing.assert_allclose(jitted(model)({"params": params}, IDS), want, atol=2e-6)
    by_row = jax.jit(jax.vmap(lambda row: model.apply({"params": params}, row[None])[0]))
    np.testing.assert_allclose(by_row(IDS), want, atol=2e-6)
    remat = jax.jit(nn.remat(bert.Bert)(model.config).apply)
    np.testing.assert_allclose(remat({"params": params}, IDS), want, atol=2e-6)


def test_sharding_changes_no_state_or_gradient(folder):
    """The batch is sharded over data, the weights over fsdp and tensor."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    model, params = models.load(folder)
    ids = jnp.tile(IDS, (2, 1))
    mask = jnp.ones_like(ids).at[0, 3:].set(0)

    def place(path, leaf):
        spec = P("fsdp", "tensor") if path[-1] == "kernel" else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    @jax.jit
    def loss_and_grads(params, ids, mask):
        return jax.value_and_grad(lambda p: model.apply({"params": p}, ids, attention_mask=mask).std())(params)

    want, want_grads = loss_and_grads(params, ids, mask)
    batch = NamedSharding(mesh, P("data"))
    got, grads = loss_and_grads(tree.map_with_path(place, params), *jax.device_put((ids, mask), batch))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_save_does_not_change_the_source(tmp_path, folder):
    before = shutil.copytree(folder, tmp_path / "copy")
    model, params = models.load(folder)
    models.save(tmp_path / "b", model, params, source=folder)
    assert (folder / "model.safetensors").read_bytes() == (before / "model.safetensors").read_bytes()
    assert (tmp_path / "b" / "model.safetensors").stat().st_mode & 0o044  # readable by others, like the config
