"""Virtual tokens are rows of a longer table of embeddings: the oracle is the unmodified model with such a table."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jpeft
from jpeft.core.entering import continuing
from jpeft.core.tree import flatten, unflatten
from jpeft.methods import CPT, MultitaskPromptTuning, PromptTuning, PTuning
from jpeft.methods.cpt import loss_weights, projected
from jpeft.methods.multitask_prompt import from_source
from jpeft.models.bert import Bert, BertConfig
from jpeft.models.decoder import Decoder, DecoderConfig
from jpeft.models.kv_cache import init_cache
from jpeft.models.rotary import Rotary
from tests.zoo import moved, numbers, parameters

pytestmark = pytest.mark.usefixtures("quick_compiles")

N, ROWS, LENGTH = 3, 20, 5
IDS = jnp.asarray(np.random.default_rng(0).integers(1, ROWS, (2, LENGTH)), jnp.int32)
RIGHT, LEFT = jnp.array([[1] * 5, [1, 1, 1, 0, 0]]), jnp.array([[1] * 5, [0, 0, 1, 1, 1]])
DECODER = DecoderConfig(
    vocab_size=ROWS, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1,
)  # fmt: skip
TIED = dataclasses.replace(DECODER, tie_word_embeddings=True)
BERT = BertConfig(
    vocab_size=ROWS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
    max_position_embeddings=12,
)  # fmt: skip


class Net(nn.Module):
    """A user's own model, whose outputs are a mapping of a tuple and an array."""

    rows: int = ROWS
    one_hot: bool = False
    language: bool = False

    @nn.compact
    def __call__(self, tokens, mask=None, positions=None, languages=None, segment_ids=None):
        if self.one_hot:
            table = nn.Dense(8, use_bias=False, name="embed")
            x = table(jax.nn.one_hot(tokens, self.rows))
        else:
            x = nn.Embed(self.rows, 8, name="embed")(tokens)
        places = jnp.arange(tokens.shape[-1]) if positions is None else positions
        x = x + nn.Embed(12, 8, name="position_table")(places)
        if languages is not None:
            x = x + nn.Embed(2, 8, name="language_table")(languages)
        if mask is not None and mask.ndim <= 2:
            mask = mask[..., None, None, :]
        for i in range(2):
            x = x + nn.MultiHeadDotProductAttention(2, qkv_features=8, name=f"attention_{i}")(x, mask=mask)
        return {"states": (x, x.mean(-1)), "pooled": x[..., 0, :]}


def adapted(model, method, *inputs, **kwargs):
    params = nn.meta.unbox(parameters(model, *inputs, **kwargs))
    peft = method.bind(model, params, *inputs, **kwargs)
    return params, peft, moved(peft, params, 1.0)


def longer(params, prompt, *tables):
    """Parameters whose tables have the prompt's rows too, and a head as many columns, if it has its own."""
    leaves = flatten(params)
    for table in tables:
        leaves[table] = jnp.concatenate([leaves[table], prompt])
    if ("lm_head", "kernel") in leaves:
        leaves["lm_head", "kernel"] = jnp.pad(leaves["lm_head", "kernel"], ((0, 0), (0, len(prompt))))
    return unflatten(leaves)


def front(x, value):
    """``value``, a number or ``[n]``, before each row."""
    x = np.asarray(x)
    return jnp.asarray(np.concatenate([np.broadcast_to(np.asarray(value), (*x.shape[:-1], N)), x], -1), x.dtype)


def same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), found, expected)


PROMPT = PromptTuning(length=N)
VIRTUAL, PLACES = ROWS + np.arange(N), np.arange(N + LENGTH)


# --- equal to a longer table ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, RIGHT, LEFT], ids=["all", "right", "left"])
@pytest.mark.parametrize(("config", "scan"), [(DECODER, True), (DECODER, False), (TIED, True)])
def test_a_decoder_reads_the_prompt_before_the_text(config, scan, mask):
    model = Decoder(config, scan_layers=scan)
    params, peft, adapter = adapted(model, PROMPT, IDS)
    table = ("model", "embed_tokens", "embedding")
    full = longer(params, adapter["model"]["embed_tokens"]["prompt"], table)
    kwargs = {} if mask is None else {"attention_mask": mask}
    grown = {} if mask is None else {"attention_mask": front(mask, 1)}
    big = Decoder(dataclasses.replace(config, vocab_size=ROWS + N), scan_layers=scan)
    y = jax.jit(peft.apply)(params, adapter, IDS, **kwargs)
    expected = jax.jit(big.apply)({"params": full}, front(IDS, VIRTUAL), **grown)[:, N:, :ROWS]
    keep = np.asarray(jnp.ones_like(IDS) if mask is None else mask, np.float32)[..., None]
    same(y * keep, expected * keep)


def test_positions_that_are_given_grow():
    model, positions = Decoder(DECODER), jnp.array([[0, 1, 2, 3, 4], [2, 3, 7, 8, 9]])
    params, peft, adapter = adapted(model, PROMPT, IDS)
    full = longer(params, adapter["model"]["embed_tokens"]["prompt"], ("model", "embed_tokens", "embedding"))
    big = Decoder(dataclasses.replace(DECODER, vocab_size=ROWS + N))
    expected = big.apply({"params": full}, front(IDS, VIRTUAL), position_ids=front(positions + N, np.arange(N)))
    same(peft.apply(params, adapter, IDS, position_ids=positions), expected[:, N:, :ROWS])


@pytest.mark.parametrize("given", [False, True])
def test_a_cache_begins_with_the_prompt_and_goes_on_without(given):
    model, mask = Decoder(DECODER), LEFT
    params, peft, adapter = adapted(model, PROMPT, IDS)
    whole, _ = peft.apply(params, adapter, IDS, mask, cache=init_cache(model, 2, 16))
    y, cache = peft.apply(params, adapter, IDS[:, :3], mask[:, :3], cache=init_cache(model, 2, 16))
    same(y[0], whole[0, :3])
    assert int(cache["index"]) == N + 3 and peft.virtual_tokens == N
    step = jax.jit(peft.apply)
    for i in (3, 4):
        positions = {"position_ids": jnp.array([[i], [i - 2]])} if given else {}
        y, cache = step(params, adapter, IDS[:, i : i + 1], mask[:, i : i + 1], cache=cache, **positions)
        same(y[:, 0], whole[:, i])
    with continuing():  # of several tokens at once
        _, cache = peft.apply(params, adapter, IDS[:, :3], mask[:, :3], cache=init_cache(model, 2, 16))
    assert int(cache["index"]) == 3


def test_an_encoder_reads_the_prompt_with_token_types():
    model, types = Bert(BERT, pooler=True, num_labels=3, output="logits"), jnp.array([[0, 0, 1, 1, 1]] * 2)
    params, peft, adapter = adapted(model, PROMPT, IDS, RIGHT, types)
    (table,) = [(*site.path, "embedding") for site in peft.sites]
    full = longer(params, flatten(adapter)[*table[:-1], "prompt"], table)
    big = model.clone(config=dataclasses.replace(BERT, vocab_size=ROWS + N))
    expected = big.apply({"params": full}, front(IDS, VIRTUAL), front(RIGHT, 1), front(types, 0))
    same(peft.apply(params, adapter, IDS, RIGHT, types), expected)


CAUSAL = np.tril(np.ones((LENGTH, LENGTH), bool))


def by_hand(allowed):
    """What ``[..., queries, keys]`` allows, of tokens and virtual tokens: these see each other as tokens do."""
    whole = np.ones((*allowed.shape[:-2], N + LENGTH, N + LENGTH), bool)
    whole[..., N:, N:] = allowed
    causal = not allowed[..., 0, 1:].any()
    if causal:
        whole[..., :N, :] = np.tril(np.ones((N + LENGTH, N + LENGTH), bool))[:N]
    else:
        whole[..., :N, N:] = allowed[..., :1, :]
    return jnp.asarray(whole)


MASKS = {
    "a row": (jnp.asarray(RIGHT[0], bool), lambda m: front(m, True)),
    "rows": (jnp.asarray(RIGHT, bool), lambda m: front(m, True)),
    "keys": (jnp.asarray(RIGHT, bool)[:, None, None], lambda m: front(m, True)),
    "causal": (jnp.asarray(CAUSAL)[None, None], lambda m: by_hand(np.asarray(m))),
    "causal with padding": (
        jnp.asarray(CAUSAL & np.asarray(RIGHT, bool)[:, None, None]), lambda m: by_hand(np.asarray(m))
    ),
    "of pairs": (
        jnp.broadcast_to(jnp.asarray(RIGHT, bool)[:, None, None], (2, 1, 5, 5)), lambda m: by_hand(np.asarray(m))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_any_form_grow_and_outputs_are_cut_wherever_they_are(name):
    mask, grow = MASKS[name]
    ids = IDS[1] if name == "a row" else IDS
    model = Net()
    params, peft, adapter = adapted(model, PROMPT, ids, mask)
    full = longer(params, adapter["embed"]["prompt"], ("embed", "embedding"))
    expected = Net(ROWS + N).apply({"params": full}, front(ids, VIRTUAL), grow(mask))
    x, mean = expected["states"]
    cut = {"states": (x[..., N:, :], mean[..., N:]), "pooled": expected["pooled"]}
    same(peft.apply(params, adapter, ids, mask), cut)
    kept = dataclasses.replace(PROMPT, keep=True).bind(model, params, ids, mask)
    same(kept.apply(params, adapter, ids, mask=mask), expected)


class Caching(nn.Module):
    """Its keys are an output too."""

    named: bool = True

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(ROWS, 8, name="embed")(ids)
        keys = nn.DenseGeneral((2, 4))(x)
        return (x, {"cache": keys}) if self.named else (x, (keys,))


def test_a_cache_keeps_the_prompt_and_is_known_by_its_name():
    params, peft, adapter = adapted(Caching(), PROMPT, IDS)
    x, held = peft.apply(params, adapter, IDS)
    assert x.shape == (2, LENGTH, 8) and held["cache"].shape == (2, N + LENGTH, 2, 4)
    peft = PROMPT.bind(Caching(named=False), params, IDS)
    with pytest.raises(ValueError, match=r"output \(2, 8, 2, 4\) holds 3 virtual tokens.*under a name with 'cache'"):
        peft.apply(params, adapter, IDS)


def test_scaled_rotary_positions_count_as_positions():
    scaled = dataclasses.replace(DECODER, max_position_embeddings=6, rotary=Rotary(rope_type="linear", factor=2.0))
    params, peft, adapter = adapted(Decoder(scaled), PROMPT, IDS)
    assert peft.apply(params, adapter, IDS).shape == (2, LENGTH, ROWS)
    with pytest.raises(ValueError, match="are 13 positions, and the model has 12"):
        peft.apply(params, adapter, LONG)


def test_an_argument_of_ones_own_grows_as_it_is_told():
    model, languages = Net(), jnp.array([[0, 0, 1, 1, 0]] * 2)
    method = PromptTuning(length=N, pad={"languages": 1})
    params, peft, adapter = adapted(model, method, IDS, languages=languages)
    full = longer(params, adapter["embed"]["prompt"], ("embed", "embedding"))
    expected = Net(ROWS + N).apply({"params": full}, front(IDS, VIRTUAL), languages=front(languages, 1))
    same(peft.apply(params, adapter, IDS, languages=languages)["states"][0], expected["states"][0][:, N:])


def test_a_table_that_is_multiplied_by_one_hot_rows_is_named():
    model = Net(one_hot=True)
    params, peft, adapter = adapted(model, PromptTuning(length=N, targets=["embed"]), IDS)
    leaves = flatten(params)
    leaves["embed", "kernel"] = jnp.concatenate([leaves["embed", "kernel"], adapter["embed"]["prompt"]])
    expected = Net(ROWS + N, one_hot=True).apply({"params": unflatten(leaves)}, front(IDS, VIRTUAL))
    same(peft.apply(params, adapter, IDS)["states"][0], expected["states"][0][:, N:])


class EncoderDecoder(nn.Module):
    """Its table is multiplied by the one-hot rows of an encoder's ids and of a decoder's, as T5X has it."""

    rows: int = ROWS

    @nn.compact
    def __call__(self, encoder_input_tokens, decoder_input_tokens):
        table = nn.Dense(8, use_bias=False, name="embed")
        x, y = (table(jax.nn.one_hot(ids, self.rows)) for ids in (encoder_input_tokens, decoder_input_tokens))
        return nn.MultiHeadDotProductAttention(2, name="attention")(y, x)


@pytest.mark.parametrize("length", [LENGTH, LENGTH + N, 1])
def test_one_hot_rows_of_other_ids_get_no_prompt(length):
    model, others = EncoderDecoder(), jnp.ones((2, length), jnp.int32)
    params, peft, adapter = adapted(model, PromptTuning(length=N, targets=["embed"]), IDS, others)
    leaves = flatten(params)
    leaves["embed", "kernel"] = jnp.concatenate([leaves["embed", "kernel"], adapter["embed"]["prompt"]])
    expected = EncoderDecoder(ROWS + N).apply({"params": unflatten(leaves)}, front(IDS, VIRTUAL), others)
    same(jax.jit(peft.apply)(params, adapter, IDS, others), expected)


class Jitted(nn.Module):
    """Its call is jitted, as DeepMind's gemma has it."""

    rows: int = ROWS

    @nn.jit
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(self.rows, 8, name="embed")(ids)
        return x + nn.Dense(8)(x.cumsum(-2))


def test_a_model_whose_call_is_jitted_gets_a_prompt():
    params, peft, adapter = adapted(Jitted(), PROMPT, IDS)
    full = longer(params, adapter["embed"]["prompt"], ("embed", "embedding"))
    expected = Jitted(ROWS + N).apply({"params": full}, front(IDS, VIRTUAL))
    same(jax.jit(peft.apply)(params, adapter, IDS), expected[:, N:])


def test_two_prompts_and_a_method_of_weights_in_one_chain():
    model = Decoder(DECODER)
    chain = jpeft.Chain(PROMPT, jpeft.LoRA(rank=2, targets=["q_proj"]), PTuning(length=2, hidden=4))
    params, peft, adapter = adapted(model, chain, IDS)
    own = adapter["model"]["embed_tokens"]
    (second,) = [a for a in peft.actions if a.method.name == "PTuning"]
    computed = second.method.expand(second.site, {}, {n: own[n] for n in second.stored})["prompt"]
    # The second comes before what the first has put before the text.
    full = longer(params, jnp.concatenate([own["prompt"], computed]), ("model", "embed_tokens", "embedding"))
    lora = jpeft.LoRA(rank=2, targets=["q_proj"])
    big = Decoder(dataclasses.replace(DECODER, vocab_size=ROWS + N + 2))
    ids = jnp.concatenate([jnp.broadcast_to(ROWS + jnp.array([3, 4, 0, 1, 2]), (2, 5)), IDS], axis=1)
    factors = {"model": {"layers": adapter["model"]["layers"]}}
    expected = lora.bind(big, full, ids).apply(full, factors, ids)[:, 5:, :ROWS]
    same(peft.apply(params, adapter, IDS), expected)
    assert peft.virtual_tokens == 5


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(ROWS, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

    def __call__(self, tokens, mask=None):
        x = self.embed(tokens)
        return x + self.attention(x, mask=mask)


def test_an_nnx_model_reads_the_prompt():
    model = NnxNet(nnx.Rngs(0))
    peft = PROMPT.bind(model, IDS)
    adapter = peft.init(jax.random.key(0), model)
    x = jnp.concatenate([jnp.broadcast_to(adapter["embed"]["prompt"], (2, N, 8)), model.embed(IDS)], axis=1)
    mask = jnp.asarray(RIGHT, bool)[:, None, None]
    expected = x + model.attention(x, mask=front(mask, True))
    same(peft.apply(model, adapter, IDS, mask=mask), expected[:, N:])


# --- starts -----------------------------------------------------------------------------------------------------------


def test_a_prompt_starts_from_rows_of_the_table():
    model = Decoder(DECODER)
    params = nn.meta.unbox(parameters(model, IDS))
    table = np.asarray(params["model"]["embed_tokens"]["embedding"])

    def start(**fields):
        peft = PromptTuning(length=N, **fields).bind(model, params, IDS)
        return np.asarray(peft.init(jax.random.key(0), params)["model"]["embed_tokens"]["prompt"])

    np.testing.assert_array_equal(start(init_ids=[4, 7]), table[[4, 7, 4]])
    drawn = start(init_weights="vocabulary")
    assert all(any((row == other).all() for other in table) for row in drawn) and len(np.unique(drawn, axis=0)) == N
    assert abs(start(init_std=3.0).std() - 3.0) < 1.5


# --- multitask --------------------------------------------------------------------------------------------------------


def test_each_text_has_the_prompt_of_its_task():
    model = Net()
    params, peft, adapter = adapted(model, MultitaskPromptTuning(length=N, tasks=3, rank=2), IDS)
    own = adapter["embed"]
    each = own["prompt"] * (own["task_cols"] @ own["task_rows"])
    plain = PROMPT.bind(model, params, IDS)
    states = jax.jit(lambda p: plain.apply(params, {"embed": {"prompt": p}}, IDS)["states"][0])
    of_task = [states(p) for p in each]
    run = jax.jit(lambda tasks: peft.apply(params, adapter, IDS, task_ids=tasks)["states"][0])
    same(run(jnp.array([2, 0])), jnp.stack([of_task[2][0], of_task[0][1]]))
    same(peft.apply(params, adapter, IDS, task_ids=1)["states"][0], of_task[1])
    # Where it is not known beforehand, a task that does not exist gives NaN, and the other text is right.
    y = run(jnp.array([3, 0]))
    assert np.isnan(y[0]).all()
    same(y[1], of_task[0][1])
    for task_ids, message in (
        (jnp.array([0, 3]), "task_ids hold 0 to 3, and there are tasks 0 to 2"),
        (-1, "task_ids hold -1 to -1"),
        (None, "task_ids must be integers, the task of each text, got None"),
        (jnp.zeros(2), "task_ids must be integers"),
        (jnp.array([0]), r"have the shape \(1,\), expected \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            peft.apply(params, adapter, IDS, task_ids=task_ids)


def test_tasks_start_from_those_of_another_adapter():
    def leaves(tasks, seed):
        shapes = {"prompt": (N, 4), "task_cols": (tasks, N, 2), "task_rows": (tasks, 2, 4)}
        return {"embed": numbers({k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}, seed=seed)}

    fresh, source = leaves(2, 0), leaves(3, 1)
    average, exact, shared = (
        from_source(fresh, source, start, task=1)["embed"] for start in ("average", "exact", "shared")
    )
    for name in ("task_cols", "task_rows"):
        for task in range(2):
            np.testing.assert_allclose(average[name][task], source["embed"][name].mean(0), rtol=1e-6)
            np.testing.assert_array_equal(exact[name][task], source["embed"][name][1])
        np.testing.assert_array_equal(shared[name], fresh["embed"][name])
    np.testing.assert_array_equal(shared["prompt"], source["embed"]["prompt"])
    with pytest.raises(ValueError, match="task 3 is not among the source's, 0 to 2"):
        from_source(fresh, source, "exact", task=3)
    with pytest.raises(ValueError, match="the source is no adapter of MultitaskPromptTuning"):
        from_source(fresh, {"embed": {"prompt": jnp.ones(2)}})
    with pytest.raises(ValueError, match=r"the source's prompt is \(3, 5\), and the adapter's is \(3, 4\)"):
        from_source(fresh, {"embed": {**source["embed"], "prompt": jnp.ones((3, 5))}})


# --- CPT --------------------------------------------------------------------------------------------------------------


def test_changes_of_a_context_lie_in_their_balls_and_their_gradient_passes():
    model = Net()
    method = CPT(token_ids=(4, 7, 9, 3), token_types=(1, 2, 3, 4), epsilon=2.0, format_epsilon=1.0)
    params, peft, adapter = adapted(model, method, IDS)
    own = adapter["embed"]
    np.testing.assert_array_equal(own["context"], params["embed"]["embedding"][jnp.array([4, 7, 9, 3])])
    radii = np.array([1.0, 2.0, 1.0, 0.0]) * np.sqrt(8 / 2048)
    norms = np.linalg.norm(own["delta"], axis=1)
    assert (norms > radii).all()
    prompt = own["context"] + own["delta"] * (radii / norms)[:, None]
    plain = PromptTuning(length=4).bind(model, params, IDS)

    def loss(prompt):
        return jnp.sin(plain.apply(params, {"embed": {"prompt": prompt}}, IDS)["states"][0]).sum()

    def own_loss(delta):
        return jnp.sin(peft.apply(params, {"embed": {**own, "delta": delta}}, IDS)["states"][0]).sum()

    (value, gradient), (expected, gradient_there) = jax.jit(
        lambda: (jax.value_and_grad(own_loss)(own["delta"]), jax.value_and_grad(loss)(prompt))
    )()
    same((value, gradient), (expected, gradient_there.at[3].set(0.0)))
    tx = projected(method, optax.sgd(10.0))
    updates, _ = tx.update({"at": {"delta": own["delta"]}}, tx.init({}), {"at": {"delta": 0 * own["delta"]}})
    same(np.linalg.norm(updates["at"]["delta"], axis=1), radii)


def test_weights_of_labels_fall_from_the_last_example_back():
    types = jnp.array([[1, 2, 4, 5, 8, 8, 12], [0, 1, 2, 3, 4, 4, 4]])
    expected = [[0, 0, 0.25, 0, 0.5, 0.5, 1.0], [0, 0, 0, 0, 1.0, 1.0, 1.0]]
    np.testing.assert_allclose(loss_weights(types, 0.5), expected)


# --- bad input --------------------------------------------------------------------------------------------------------


class Embedded(nn.Module):
    @nn.compact
    def __call__(self, input_ids=None, inputs_embeds=None):
        table = nn.Embed(ROWS, 8, name="embed")
        return nn.Dense(2)(table(input_ids) if inputs_embeds is None else inputs_embeds)


class TwoTables(nn.Module):
    @nn.compact
    def __call__(self, ids, others):
        return nn.Embed(ROWS, 8, name="left")(ids) + nn.Embed(ROWS, 8, name="right")(others)


class Direct(nn.Module):
    """Its table is read without a call, also if it is called as the head."""

    head: bool = False

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(ROWS, 8, name="embed")
        return table.attend(table.embedding[ids]) if self.head else table.embedding[ids]


@dataclasses.dataclass
class Bad:
    model: Any
    call: Callable[[Any], Any]
    message: str


LONG = jnp.ones((1, 10), jnp.int32)
BAD = {
    "too long": Bad(Net(), lambda run: run(LONG), "10 of 'tokens' are 13 positions, and the model has 12; shorten"),
    "too long for bert": Bad(Bert(BERT), lambda run: run(LONG), "are 13 positions, and the model has 12"),
    "embeddings": Bad(
        Embedded(), lambda run: run(inputs_embeds=jnp.ones((1, 2, 8))), "has 'inputs_embeds' and no token ids"
    ),
    "an unknown argument": Bad(
        Net(),
        lambda run: run(IDS, languages=IDS * 0),
        r"'languages' is \(2, 5\), like the token ids.*pad={'languages': 0}",
    ),
    "a mask of another form": Bad(
        Net(),
        lambda run: run(IDS, jnp.ones((2, 1, 5, 5))),
        r"how 'mask' float32\[2, 1, 5, 5\] grows with 3 virtual",
    ),
    "packed texts": Bad(
        Net(), lambda run: run(IDS, segment_ids=IDS * 0), "'segment_ids' tells apart texts.*Net has no segment"
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_calls_whose_arguments_cannot_grow_are_refused(name):
    bad = BAD[name]
    params = parameters(bad.model, IDS)
    if name == "an unknown argument":
        params = parameters(bad.model, IDS, languages=IDS * 0)
    peft = PROMPT.bind(bad.model, params, IDS)
    adapter = peft.init(jax.random.key(0), params)
    with pytest.raises(ValueError, match=bad.message):
        bad.call(lambda *a, **k: peft.apply(params, adapter, *a, **k))


@pytest.mark.parametrize(("model", "inputs", "method", "message"), [
    (TwoTables(), (IDS, IDS), PROMPT, r"looks up several tables of embeddings: 'left', 'right'; say which one"),
    (nn.Dense(2), (jnp.ones((2, 3)),), PROMPT, "looks up no table of embeddings; give the model token ids"),
    (Net(), (IDS,), PromptTuning(targets=r".*attention_./query"), "has several weights that targets name"),
    (Net(), (IDS,), PromptTuning(init_ids=[ROWS]), "the ids hold 20, and 'embed' has 20 rows"),
    (Net(), (IDS,), CPT(token_ids=[ROWS]), "the ids hold 20, and 'embed' has 20 rows"),
])  # fmt: skip
def test_models_without_one_table_of_tokens_are_refused(model, inputs, method, message):
    with pytest.raises(ValueError, match=message):
        method.bind(model, parameters(model, *inputs), *inputs)


class Changing(nn.Module):
    """It changes its token ids before it looks them up."""

    change: Callable[[Any], Any]
    second: bool = False

    @nn.compact
    def __call__(self, tokens, mask=None):
        x = nn.Embed(ROWS, 8, name="embed")(self.change(tokens))
        if self.second:
            x = x + nn.Embed(ROWS, 8, name="bigrams")(jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1])
        return x + nn.Embed(12, 8, name="wpe")(jnp.cumsum(tokens != 0, -1))


LOST = "ids beyond the table 'embed', and the model changes its token ids before it looks them up"


@pytest.mark.parametrize(("model", "message"), [
    (Changing(lambda ids: jnp.clip(ids, 0, ROWS - 1)), LOST),
    (Changing(lambda ids: ids % ROWS), LOST),
    (Changing(lambda ids: jnp.where(ids < ROWS, ids, 0)), LOST),
    (Changing(lambda ids: ids + 1), LOST),
    (Changing(lambda ids: ids, second=True), "look up rows of 'bigrams/embedding' too, which has none for virtual"),
])  # fmt: skip
def test_models_whose_tables_no_virtual_id_reaches_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        PROMPT.bind(model, parameters(model, IDS), IDS)


@pytest.mark.parametrize("change", [lambda ids: jnp.where(ids == -100, 0, ids), lambda ids: ids[:, ::-1].reshape(-1)])
def test_ids_may_be_changed_in_ways_that_keep_virtual_ids(change):
    model = nn.Sequential([change, nn.Embed(ROWS, 8, name="embed")])
    params = nn.meta.unbox(parameters(model, IDS))
    assert len(PROMPT.bind(model, params, IDS).sites) == 1


def test_a_table_of_positions_is_not_taken_for_one_of_tokens():
    class OneHot(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            table = self.param("table", nn.initializers.normal(), (ROWS, 8))
            return jax.nn.one_hot(tokens, ROWS) @ table + nn.Embed(12, 8, name="wpe")(jnp.arange(tokens.shape[-1]))

    with pytest.raises(ValueError, match=r"looks up no table of embeddings.*one-hot rows is named by targets"):
        PROMPT.bind(OneHot(), parameters(OneHot(), IDS), IDS)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("targets", [None, r"embed(/embedding)?"])
def test_a_table_that_is_read_without_a_call_of_its_module_is_refused(targets, head):
    model = Direct(head)
    params = parameters(model, IDS)
    with pytest.raises(ValueError, match=r"looks up no table|lookups in .* are not seen|without calling the table's"):
        peft = PromptTuning(length=N, targets=targets).bind(model, params, IDS)
        peft.apply(params, peft.init(jax.random.key(0), params), IDS)


def test_a_lookup_outside_of_the_models_own_call_is_refused():
    params, peft, adapter = adapted(Decoder(DECODER), PROMPT, IDS)
    with pytest.raises(ValueError, match="none are among the arguments of the model's own call"):
        peft.apply(params, adapter, IDS, method=lambda model, ids: model.model.embed_tokens(ids))
    states = peft.apply(params, adapter, IDS, method="hidden_states")
    same(peft.apply(params, adapter, states, method="logits"), peft.apply(params, adapter, IDS))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: PromptTuning(length=0), "length must be a positive integer"),
    (lambda: PromptTuning(init_weights="text"), "init_weights must be one of normal, vocabulary"),
    (lambda: PromptTuning(pad=1), "pad must be a mapping"),
    (lambda: PTuning(encoder="gru"), "encoder must be one of mlp, lstm"),
    (lambda: MultitaskPromptTuning(tasks=0), "tasks must be a positive integer"),
    (lambda: CPT(token_ids=[]), "token_ids must be token ids, one or more"),
    (lambda: CPT(token_ids=[1, 2], token_types=[1]), "token_types must have one for each of 2 token_ids, got 1"),
    (lambda: CPT(token_ids=[1], epsilon=0), "epsilon must be a positive number"),
])  # fmt: skip
def test_fields_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_summary_names_the_default_target():
    model = Decoder(DECODER)
    text = PROMPT.bind(model, parameters(model, IDS), IDS).summary()
    assert "targets: the table of token embeddings (the default) 1 site" in text
