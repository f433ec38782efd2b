"""The pooler of an encoder and the head of a sequence classifier, without torch."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import models
from jpeft.core.tree import flatten
from tests.models.test_models import IDS, SIZES, jitted, tensors_of, write
from tests.zoo import same

RNG = np.random.default_rng(3)
POOLER = {"pooler.dense.weight": RNG.normal(size=(16, 16)), "pooler.dense.bias": RNG.normal(size=16)}
HEAD = {"classifier.weight": RNG.normal(size=(3, 16)), "classifier.bias": RNG.normal(size=3)}
CLASSIFIER = {"architectures": ["BertForSequenceClassification"], "id2label": {str(i): f"L{i}" for i in range(3)}}


def pooled(folder, tensors=POOLER, **fields):
    extra = {name: value.astype(np.float32) for name, value in tensors.items()}
    return write(folder, tensors=tensors_of() | extra, **fields)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return pooled(tmp_path_factory.mktemp("classifier") / "m", POOLER | HEAD, **CLASSIFIER)


def run(model, params):
    return np.asarray(jitted(model)({"params": params}, IDS))


def test_outputs_are_those_of_the_formula(classifier):
    """All outputs have one tree. The states are those of the encoder without the parts."""
    model, params = models.load(classifier)
    states = run(model, params)
    pooled = np.tanh(states[:, 0] @ POOLER["pooler.dense.weight"].T + POOLER["pooler.dense.bias"])
    logits = pooled @ HEAD["classifier.weight"].T + HEAD["classifier.bias"]
    np.testing.assert_allclose(run(model.clone(output="pooler_output"), params), pooled, atol=1e-5)
    np.testing.assert_allclose(run(model.clone(output="logits"), params), logits, atol=1e-5)
    bare, encoder = models.load(classifier, pooler=False, head=False)
    np.testing.assert_array_equal(run(bare, encoder), states)
    assert encoder.keys() == params.keys() - {"pooler", "classifier"}
    same(models.load(classifier, output="logits")[1], params)


def test_an_adapter_beside_the_model_is_told(classifier, tmp_path):
    shutil.copytree(classifier, tmp_path / "m")
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    with pytest.warns(UserWarning, match="m holds an adapter beside the model, which is not loaded with it"):
        models.load(tmp_path / "m")


def test_all_linear_takes_a_pooler_that_the_output_depends_on(classifier):
    model, params = models.load(classifier)

    def sites(model, targets="all-linear"):
        return {site.name for site in jpeft.LoRA(rank=2, targets=targets).bind(model, params, IDS).sites}

    bare, encoder = models.load(classifier, pooler=False, head=False)
    assert sites(model) == {site.name for site in jpeft.LoRA(rank=2).bind(bare, encoder, IDS).sites}
    assert sites(model.clone(output="logits")) - sites(model) == {"pooler/dense"}
    assert sites(model, ["pooler/dense", "classifier"]) == {"pooler/dense", "classifier"}


@pytest.mark.parametrize("method", [jpeft.LoRA(rank=2, targets=["query", "dense"]), jpeft.BitFit()], ids=repr)
def test_an_adapter_made_without_the_parts_loads(classifier, tmp_path, method):
    """Earlier versions read the encoder alone."""
    bare, encoder = models.load(classifier, pooler=False, head=False)
    peft = method.bind(bare, encoder, IDS)
    adapter = jax.tree.map(lambda x: x + 0.1, peft.init(jax.random.key(0), encoder))
    jpeft.save(tmp_path / "old", peft, adapter, encoder)
    model, params = models.load(classifier)
    again, read = jpeft.load(tmp_path / "old", model, params, IDS)
    same(read, adapter)
    np.testing.assert_allclose(again.apply(params, read, IDS), peft.apply(encoder, adapter, IDS), atol=1e-6)
    jpeft.save(tmp_path / "new", again, read, params)
    assert jpeft.load(tmp_path / "new", model, params, IDS)[0] == again


def test_the_law_holds_for_a_pooler_and_a_head(classifier):
    model, params = models.load(classifier, output="logits")
    method = jpeft.Chain(jpeft.LoRA(rank=2, targets=["query", "pooler/dense"]), jpeft.Train("classifier"))
    peft = method.bind(model, params, IDS)
    adapter = jax.tree.map(lambda x: x + 0.1, peft.init(jax.random.key(0), params))
    program = jax.jit(lambda a: (peft.apply(params, a, IDS), jax.grad(lambda a: peft.apply(params, a, IDS).std())(a)))
    got, gradient = program(adapter)
    np.testing.assert_allclose(got, run(model, peft.merge(params, adapter)), atol=1e-5)
    assert np.abs(got - run(model, params)).max() > 1e-2
    assert all(np.abs(leaf).max() > 0 for path, leaf in flatten(gradient).items() if path[-1] != "lora_b")


BAD = {
    "no pooler.dense.bias beside pooler.dense.weight; load it without a pooler: pooler=False":
        ({"tensors": {"pooler.dense.weight": POOLER["pooler.dense.weight"]}}, {}),
    r"pooler/dense/bias has shape \(8,\), the model needs \(16,\)":
        ({"tensors": POOLER | {"pooler.dense.bias": np.ones(8)}}, {}),
    r"classifier/bias has shape \(3,\), the model needs \(5,\)":
        (dict(tensors=POOLER | HEAD, **CLASSIFIER | {"id2label": {str(i): "x" for i in range(5)}}), {}),
    "missing classifier/bias":
        (dict(tensors=POOLER | {"classifier.weight": HEAD["classifier.weight"]}, **CLASSIFIER), {}),
    "output='logits': this checkpoint has last_hidden_state, pooler_output": ({}, {"output": "logits"}),
    "needs the pooler; give head=False too": (dict(tensors=POOLER | HEAD, **CLASSIFIER), {"pooler": False}),
    "num_labels='two' is not a positive integer":
        ({"tensors": POOLER | HEAD, "architectures": CLASSIFIER["architectures"], "num_labels": "two"}, {}),
    r"the buffer embeddings.position_ids has 1 at \[0, 0\], but config.json gives 0":
        ({"tensors": {"embeddings.position_ids": np.arange(1, 25)[None]}}, {}),
    r"bert.pooler.dense.(bias|beta) and bert.pooler.dense.(bias|beta) are the same tensor, pooler.dense.bias":
        ({"tensors": {f"bert.{k}": v for k, v in (tensors_of() | POOLER).items()}
                      | {"bert.pooler.dense.beta": np.ones(16)}}, {}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_named(tmp_path, message):
    folder, options = BAD[message]
    with pytest.raises(models.ModelError, match=message) as error:
        models.load(pooled(tmp_path / "m", **folder), **options)
    assert "\n" not in str(error.value)


def test_buffers_of_old_checkpoints(tmp_path):
    buffers = {"embeddings.position_ids": np.arange(24)[None], "embeddings.token_type_ids": np.zeros((1, 24))}
    model, params = models.load(pooled(tmp_path / "m", POOLER | buffers))
    same(params, models.load(pooled(tmp_path / "plain"))[1])
    models.save(tmp_path / "out", model, params, source=tmp_path / "m")
    same(models.load(tmp_path / "out")[1], params)


def test_types_without_a_pooler(tmp_path):
    with pytest.raises(models.ModelError, match="pooler=True: electra models have no pooler"):
        models.abstract({"model_type": "electra", **SIZES}, pooler=True)
    model, params = models.abstract({"model_type": "roberta", **SIZES, "architectures": ["RobertaForMaskedLM"]})
    assert not model.pooler and not model.num_labels and "pooler" not in params
    model, params = models.abstract({"model_type": "bert", **SIZES, **CLASSIFIER})
    assert params["classifier"]["kernel"].shape == (16, 3) and jnp.issubdtype(
        params["pooler"]["dense"]["bias"].dtype, jnp.floating
    )
