"""Generation under the adapters of a bank: each prompt's tokens are those that it gets alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.models.decoder import Decoder, DecoderConfig
from jpeft.serving.generation import GenerationError
from tests.zoo import moved, parameters

pytestmark = pytest.mark.usefixtures("quick_compiles")
CONFIG = DecoderConfig(
    vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
)  # fmt: skip
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7], [9, 3, 2]]
M = jpeft.methods
METHODS = {
    "LoRA": (jpeft.LoRA(rank=4, targets="all-linear"), True),
    "chain": (jpeft.Chain(jpeft.LoRA(rank=2), jpeft.Bottleneck(size=3), jpeft.Train(r".*norm/scale")), False),
    "DoRA": (M.DoRA(rank=2), True),
    "prefix": (jpeft.PrefixTuning(length=4), False),
    "prompt": (M.PromptTuning(length=3), True),
    "XLoRA": (M.XLoRA(rank=2, n_experts=2, hidden_size=24, train_experts=True), False),
    "LoReFT": (M.LoReFT(rank=2, targets=r".*/layers(/.)?"), True),
}


@pytest.fixture(scope="module")
def models():
    made = {}
    for scan in (False, True):
        model = Decoder(CONFIG, scan_layers=scan)
        params = jax.tree.map(lambda x: x * 2, parameters(model, jnp.zeros((1, 4), int)))
        made[scan] = (
            model,
            jax.tree.map(lambda x: getattr(x, "value", x), params, is_leaf=lambda x: hasattr(x, "names")),
        )
    return made


def adapters_of(peft, params):
    return {name: moved(peft, params, seed=seed) for seed, name in enumerate(("fr", "de", "it"))}


@pytest.mark.parametrize("name", METHODS)
def test_each_prompt_gets_the_tokens_that_it_gets_alone(name, models):
    method, scan = METHODS[name]
    model, params = models[scan]
    peft = method.bind(model, params, jnp.zeros((1, 4), int))
    own = adapters_of(peft, params)
    bank = jpeft.stack(peft, own, slots=6)
    ids = ["de", "it" if name == "prompt" else None, "fr", "de"]
    got = jpeft.generate(model, params, PROMPTS, peft=peft, adapter=bank, adapter_ids=ids, max_new_tokens=6)
    for prompt, who, tokens in zip(PROMPTS, ids, got, strict=True):
        given = {} if who is None else {"peft": peft, "adapter": own[who]}
        assert jpeft.generate(model, params, [prompt], max_new_tokens=6, **given)[0] == tokens
    assert len({tuple(tokens) for tokens in got}) > 1


def test_groups_of_one_size_share_an_adapter_and_keep_their_order(models):
    model, params = models[False]
    peft = jpeft.LoRA(rank=2).bind(model, params, jnp.zeros((1, 4), int))
    bank = jpeft.stack(peft, adapters_of(peft, params))
    ids, settings = ["it", "fr", "fr", "it"], {"temperature": 1.0, "key": jax.random.key(3), "max_new_tokens": 5}
    grouped = jpeft.generate(model, params, PROMPTS, peft=peft, adapter=bank, adapter_ids=ids, **settings)
    more = jpeft.generate(model, params, [*PROMPTS, [7]], adapter=bank, adapter_ids=[*ids, None], **settings)
    assert more[:4] == grouped
    streamed = jpeft.stream(model, params, PROMPTS, peft=peft, adapter=bank, adapter_ids=ids, **settings)
    assert [list(row) for row in zip(*streamed, strict=True)] == grouped


def test_what_is_wrong_is_told(models):
    model, params = models[False]
    peft = jpeft.LoRA(rank=2).bind(model, params, jnp.zeros((1, 4), int))
    own = adapters_of(peft, params)
    bank = jpeft.stack(peft, own)

    def fails(message, adapter=bank, ids=("fr",)):
        with pytest.raises(GenerationError, match=message):
            jpeft.generate(model, params, [[1]], peft=peft, adapter=adapter, adapter_ids=ids)

    fails("the bank has no adapter 'fx'; nearest: fr", ids=["fx"])
    fails("adapter_ids has 2 entries for 1 prompts", ids=["fr", "de"])
    fails("adapter_ids must have the name of an adapter or None for each row, got None", ids=None)
    fails("adapter_ids choose from a bank of adapters", adapter=own["fr"])
    other = jpeft.LoRA(rank=3).bind(model, params, jnp.zeros((1, 4), int))
    fails("another Peft", adapter=jpeft.stack(other, adapters_of(other, params)))


def test_the_program_has_one_product_for_each_weight_of_the_base(models):
    """Decoding under 8 adapters: FLOPs and temporaries of one adapter's; each base product is one for all rows."""
    model, params = models[False]
    peft = jpeft.LoRA(rank=2, targets="all-linear").bind(model, params, jnp.zeros((1, 4), int))
    own = {str(i): moved(peft, params, seed=i) for i in range(8)}
    bank, x = jpeft.stack(peft, own), jnp.zeros((8, 1), int)
    many = jax.jit(lambda b, s, x: peft.apply(params, b, x, adapter_ids=s))
    one = jax.jit(lambda a, x: peft.apply(params, a, x))
    program = many.lower(bank, jnp.arange(1, 9), x)
    dots = [line for line in program.as_text().splitlines() if "dot_general" in line]
    shapes = [line.split(" : ")[-1] for line in dots]
    base = [s for s in shapes if "tensor<24x" in s or "tensor<40x24" in s]
    weights = [w for w in peft.weights if len(w.stored) == 2]
    assert len(base) == len([w for w in weights if not w.lookup]) + 1  # and the head, which is the table
    flops = [f.compile().cost_analysis()["flops"] for f in (program, one.lower(own["0"], x))]
    picked = 8 * sum(x.size for x in jax.tree.leaves(own["0"]))  # an operation for each leaf of each row's adapter
    assert flops[0] <= 1.02 * flops[1] + 2 * picked
    np.testing.assert_allclose(many(bank, jnp.full(8, 3), x)[:1], one(own["2"], x[:1]), atol=1e-5)


@pytest.mark.parametrize("name", ["LoRA", "chain", "DoRA", "prefix"])
def test_logits_of_scanned_rematerialized_and_quantized_layers(name, models):
    model, params = models[True]
    model, ids = model.clone(remat="full"), jnp.asarray(np.random.default_rng(0).integers(0, 60, (4, 4)))
    params = jpeft.quantize(params, "nf4", model, ids, block=4, targets=r".*/(self_attn|mlp)/.*")
    peft = METHODS[name][0].bind(model, params, ids)
    own, names = adapters_of(peft, params), ["de", None, "it", "de"]

    @jax.jit
    def run(params, bank, own, slots):
        each = [own[n] if n else None for n in names]
        alone = [
            peft.apply(params, a, ids[i : i + 1]) if a else model.apply({"params": params}, ids[i : i + 1])
            for i, a in enumerate(each)
        ]
        return peft.apply(params, bank, ids, adapter_ids=slots), jnp.concatenate(alone)

    bank = jpeft.stack(peft, own)
    got, want = run(params, bank, own, bank.ids(names))
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))
