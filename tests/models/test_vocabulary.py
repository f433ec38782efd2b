"""More tokens and heads of their own: what the new rows are, what stays, and the folders that come of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec

import jpeft
from jpeft import models
from jpeft.core.tree import flatten
from jpeft.methods import TrainableTokens
from jpeft.models.bert import Bert, BertConfig
from jpeft.models.decoder import Decoder, DecoderConfig

ROWS, NEW = 20, 23


def decoder(tied):
    """A tiny decoder, and weights of numpy."""
    config = DecoderConfig(
        vocab_size=ROWS, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return filled(Decoder(config), jnp.zeros((1, 4), jnp.int32))


def filled(model, ids):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    return model, jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.5, s.shape), s.dtype), meta.unbox(shapes))


def by_path(params):
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten(params).items()}


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_the_old_ones_which_stay_as_all_else(tied):
    model, params = decoder(tied)
    before = by_path(params)
    resized, larger = models.resize_embeddings(model, params, NEW)
    after = by_path(larger)
    assert resized.config.vocab_size == NEW
    assert after.keys() == before.keys()
    tables = {"model/embed_tokens/embedding": 0} | ({} if tied else {"lm_head/kernel": 1})
    for path, leaf in after.items():
        if path not in tables:
            np.testing.assert_array_equal(leaf, before[path])
            continue
        old, new = np.split(leaf, [ROWS], tables[path])
        np.testing.assert_array_equal(old, before[path])
        mean = before[path].astype(np.float64).mean(tables[path], keepdims=True)
        np.testing.assert_allclose(new, np.broadcast_to(mean, new.shape), atol=1e-7)
    # The old tokens' logits do not change.
    ids = jnp.array([[1, 5, 19, 0]])
    logits = resized.apply({"params": larger}, ids)
    np.testing.assert_allclose(logits[..., :ROWS], model.apply({"params": params}, ids), atol=1e-6)
    assert logits.shape[-1] == NEW


def test_an_encoder_grows_and_rows_are_rounded_up_to_a_multiple():
    model = Bert(BertConfig(vocab_size=ROWS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                            intermediate_size=16, max_position_embeddings=ROWS))  # fmt: skip
    model, params = filled(model, jnp.ones((1, 4), jnp.int32))
    resized, larger = models.resize_embeddings(model, params, NEW, multiple=8)
    assert larger["embeddings"]["word_embeddings"]["embedding"].shape == (24, 8)
    # Positions are as many as tokens were, and stay.
    assert larger["embeddings"]["position_embeddings"]["embedding"].shape == (ROWS, 8)
    assert resized.apply({"params": larger}, jnp.full((1, 4), 23)).shape == (1, 4, 8)
    with pytest.raises(ValueError, match="Bert has no head"):
        models.untie_head(model, params)


def test_abstract_parameters_and_dtypes_stay():
    model, params = decoder(False)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    _, concrete = models.resize_embeddings(model, low, NEW)
    _, abstract = models.resize_embeddings(model, jax.eval_shape(lambda: low), NEW)
    assert jax.eval_shape(lambda: concrete) == abstract


def test_sharded_rows_stay_where_they_were_or_do_not_fit():
    mesh = jax.make_mesh((1, 2), ("fsdp", "tensor"), devices=jax.devices()[:2])
    model, params = decoder(True)
    sharding = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    table = jax.device_put(params["model"]["embed_tokens"]["embedding"], sharding)
    sharded = {**params, "model": {**params["model"], "embed_tokens": {"embedding": table}}}
    with pytest.raises(ValueError, match=r"model/embed_tokens/embedding.*23 rows do not divide over.*multiple="):
        models.resize_embeddings(model, sharded, NEW)
    resized, larger = models.resize_embeddings(model, sharded, NEW, multiple=2)
    grown = larger["model"]["embed_tokens"]["embedding"]
    assert grown.sharding == sharding
    np.testing.assert_array_equal(
        grown, models.resize_embeddings(model, params, NEW, multiple=2)[1]["model"]["embed_tokens"]["embedding"]
    )
    _, untied = models.untie_head(resized, larger)
    assert untied["lm_head"]["kernel"].sharding.spec == PartitionSpec("fsdp", "tensor")


def test_what_cannot_grow_or_be_untied_is_refused():
    model, params = decoder(False)
    with pytest.raises(ValueError, match="has 20 rows, and 19 would be fewer"):
        models.resize_embeddings(model, params, 19)
    with pytest.raises(ValueError, match=r"positive integers, got 23\.0 and 1"):
        models.resize_embeddings(model, params, 23.0)
    with pytest.raises(ValueError, match="positive integers, got 23 and 0"):
        models.resize_embeddings(model, params, NEW, multiple=0)
    with pytest.raises(ValueError, match="own already"):
        models.untie_head(model, params)
    quantized = jpeft.quantize(params, "int8", block=4, double=False, targets=["lm_head"])
    with pytest.raises(ValueError, match=r"lm_head/kernel' is quantized"):
        models.resize_embeddings(model, quantized, NEW)
    assert models.resize_embeddings(model, params, ROWS)[1] is params


def test_only_new_rows_train_and_head_and_embedding_apart():
    """The law for a resized, untied model: rows of both train, the old ones have no leaf and no gradient."""
    model, params = models.resize_embeddings(*models.untie_head(*decoder(True)), NEW)
    ids = jnp.array([[1, 21, 19, 22]])
    method = jpeft.Chain(
        jpeft.LoRA(rank=2, targets="all-linear"),
        TrainableTokens(indices=range(ROWS, NEW), targets=["embed_tokens", "lm_head"]),
    )
    peft = method.bind(model, params, ids)
    adapter = peft.init(jax.random.key(0), params)
    rows = {path: leaf.shape for path, leaf in flatten(adapter).items() if path[-1].startswith("tokens")}
    assert rows == {("model", "embed_tokens", "tokens_in"): (3, 8), ("lm_head", "tokens_out"): (3, 8)}
    moved = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), adapter)
    merged = peft.merge(params, moved)
    got, want = peft.apply(params, moved, ids), model.apply({"params": merged}, ids)
    np.testing.assert_allclose(got, want, atol=2e-5)
    for path, axis in ((("model", "embed_tokens", "embedding"), 0), (("lm_head", "kernel"), 1)):
        old, new = (np.take(flatten(merged)[path], rows, axis) for rows in (range(ROWS), range(ROWS, NEW)))
        np.testing.assert_array_equal(old, np.take(flatten(params)[path], range(ROWS), axis))
        assert np.abs(new - np.take(flatten(params)[path], range(ROWS, NEW), axis)).max() > 0.01


def test_negative_ids_count_from_the_end_as_in_the_unadapted_model():
    model, params = decoder(True)
    ids = jnp.array([[1, -1, -3, -2]])
    peft = TrainableTokens(indices=[ROWS - 1, ROWS - 3]).bind(model, params, ids)
    moved = jax.tree.map(lambda x: x + 1, peft.init(jax.random.key(0), params))
    want = model.apply({"params": peft.merge(params, moved)}, ids)
    np.testing.assert_allclose(peft.apply(params, moved, ids), want, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"indices": []}, "one or more"),
        ({"indices": [1, 1]}, "different"),
        ({"indices": [-1]}, "token ids"),
        ({"indices": 3}, "token ids"),
        ({"indices": [1.5]}, "token ids"),
        ({"indices": [ROWS]}, "has 20 tokens, but indices has 20"),
        ({"indices": [0], "targets": ["nothing"]}, "matches nothing"),
    ],
)
def test_wrong_indices_are_refused(fields, error):
    model, params = decoder(True)
    with pytest.raises((ValueError, TypeError), match=error):
        TrainableTokens(**fields).bind(model, params, jnp.zeros((1, 2), jnp.int32))


def test_a_model_of_several_tables_must_be_told_which():
    model = Bert(BertConfig(vocab_size=ROWS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                            intermediate_size=16))  # fmt: skip
    model, params = filled(model, jnp.ones((1, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"needs targets.*3 embedding tables.*word_embeddings"):
        TrainableTokens(indices=[1]).bind(model, params, jnp.ones((1, 4), jnp.int32))
