"""X-LoRA and LLaMA-Adapter on a Flax model of transformers, unchanged."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.core.tree import flatten
from jpeft.methods import LlamaAdapter, XLoRA
from tests.contract import close, differ
from tests.zoo import moved, numbers

transformers = pytest.importorskip("transformers")
gpt2 = pytest.importorskip("transformers.models.gpt2.modeling_flax_gpt2")  # gone from transformers 5
pytestmark = pytest.mark.usefixtures("quick_compiles", "standard_promotion")
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 37, (2, 7)))


def positions(length):
    return jnp.ones((2, length), jnp.int32), jnp.broadcast_to(jnp.arange(length), (2, length))


@pytest.fixture(scope="module")
def models():
    """GPT-2 with its head and without, the parameters, and the arguments of a call."""
    config = transformers.GPT2Config(
        vocab_size=37, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    head, body = gpt2.FlaxGPT2LMHeadModule(config), gpt2.FlaxGPT2Module(config)
    mask, places = positions(7)
    shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), IDS, mask, places, return_dict=False))
    return head, body, numbers(shapes["params"], 0.3), (IDS, mask, places)


def test_the_classifier_reads_a_modules_output(models):
    head, body, params, inputs = models
    method = XLoRA(n_experts=3, hidden_size=16, rank=2, states="transformer/ln_f", targets=["c_attn", "c_fc"])
    peft = method.bind(head, params, *inputs, return_dict=False)
    adapter = moved(peft, params, 0.5)
    (logits,) = jax.jit(lambda p, a: peft.apply(p, a, *inputs, return_dict=False))(params, adapter)
    assert differ(logits, head.apply({"params": params}, *inputs, return_dict=False)[0])
    # The model without its head gives the states as its own output.
    alone = dataclasses.replace(method, states="").bind(body, params["transformer"], *inputs, return_dict=False)
    own = {**adapter["transformer"], "xlora": adapter["xlora"]}
    states = alone.apply(params["transformer"], own, *inputs, return_dict=False)[0]
    close(logits, states @ params["transformer"]["wte"]["embedding"].T)
    ids, mask, places = jnp.ones((2, 8), jnp.int32), *positions(8)
    cache = head.init(jax.random.key(0), ids, mask, places, init_cache=True, return_dict=False)["cache"]
    with pytest.raises(ValueError, match="where the first pass has none of its own; run the model on all tokens"):
        peft.apply(
            {"params": params, "cache": cache}, adapter, IDS[:, :3], mask, places[:, :3], mutable=["cache"],
            return_dict=False,
        )  # fmt: skip


def test_a_prompt_is_projected_by_the_fused_weight(models, tmp_path):
    head, _, params, inputs = models
    peft = LlamaAdapter(length=3, last_layers=1).bind(head, params, *inputs, return_dict=False)
    assert [site.name for site in peft.sites] == ["transformer/h/1/attn"]
    adapter = moved(peft, params, 0.8)
    own, attention = adapter["transformer"]["h"]["1"]["attn"], params["transformer"]["h"]["1"]["attn"]

    def seen(run, *path):
        """The output of a module of the last layer."""
        place = ("transformer", "h", "1", *path)
        _, state = run(
            *inputs, return_dict=False, mutable=["intermediates"],
            capture_intermediates=lambda module, name: module.path == place,
        )  # fmt: skip
        return flatten(state["intermediates"])[(*place, "__call__")][0]

    base = functools.partial(head.apply, {"params": params})

    def projected(x):
        y = x @ attention["c_attn"]["kernel"].T + attention["c_attn"]["bias"]
        return [part.reshape(*x.shape[:-1], 2, 8) for part in jnp.split(y, 3, -1)]

    query, (_, key, value) = projected(seen(base, "ln_1"))[0], projected(own["adaption_prompt"])
    shares = jax.nn.softmax(jnp.einsum("bqhd,nhd->bhqn", query, key) / 8**0.5)
    extra = own["adaption_gate"] * jnp.einsum("bhqn,nhd->bqhd", shares, value).reshape(2, 7, 16)
    change = seen(functools.partial(peft.apply, params, adapter), "attn", "c_proj") - seen(base, "attn", "c_proj")
    assert differ(change, 0 * change)
    close(change, extra @ attention["c_proj"]["kernel"].T)
    with pytest.raises(ValueError, match="PEFT adds what GPT-2 finds in the prompt after the output projection"):
        jpeft.hf.save(tmp_path / "adapter", peft, adapter, params)
