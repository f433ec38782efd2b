"""Rows of one batch under adapters of a bank, on Flax models of transformers, with as many tokens as rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from tests.contract import close
from tests.zoo import moved, numbers

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.usefixtures("quick_compiles", "standard_promotion"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
NAMES = ["a", None, "b", "a"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
BERT = transformers.BertConfig(vocab_size=40, max_position_embeddings=16, **SIZES)
GPT2 = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
METHODS = {
    "LoRA": jpeft.LoRA(rank=2),
    "chain": jpeft.Chain(jpeft.IA3(), jpeft.BitFit()),
    "prefix": jpeft.PrefixTuning(length=2),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["FlaxBertModel", "FlaxGPT2LMHeadModel"])
def test_each_row_is_what_it_is_alone(name, method):
    whole = getattr(transformers, name)(BERT if "Bert" in name else GPT2, _do_init=False)
    module, ids = whole.module, jnp.asarray(np.random.default_rng(0).integers(0, 40, (4, 4)))
    positions, mask = jnp.arange(4)[None], jnp.ones((4, 4), int).at[2, 3].set(0)

    def inputs(rows):
        both = ids[rows], mask[rows]
        where = jnp.broadcast_to(positions, both[0].shape)
        return (*both, jnp.zeros_like(both[0]), where, None) if "Bert" in name else (*both, where)

    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs(slice(0, 4))))["params"]
    params = numbers(shapes)
    peft = METHODS[method].bind(module, params, *inputs(slice(0, 4)))
    own = {n: moved(peft, params, seed=i) for i, n in enumerate("ab")}
    bank = jpeft.stack(peft, own, slots=4)
    got = jax.jit(lambda bank, slots: peft.apply(params, bank, *inputs(slice(0, 4)), adapter_ids=slots)[0])(
        bank, bank.ids(NAMES)
    )

    @jax.jit
    def alone(adapters):
        under = {n: lambda *x, n=n: peft.apply(params, adapters[n], *x) for n in adapters}
        under[None] = lambda *x: module.apply({"params": params}, *x)
        return [under[n](*inputs(slice(i, i + 1)))[0] for i, n in enumerate(NAMES)]

    close(got, jnp.concatenate(alone(own)))
