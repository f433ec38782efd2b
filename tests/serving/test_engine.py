"""The engine: every request as `generate` gives it alone, whatever runs beside it; loads, failures, programs."""

import dataclasses
import functools
import threading
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jpeft
from jpeft.models.decoder import Decoder, DecoderConfig
from jpeft.serving import rows as programs
from jpeft.serving.engine import Engine
from jpeft.serving.generation import generate
from jpeft.serving.request import ClosedError, QueueFullError
from jpeft.serving.sampling import GenerationError
from tests.serving.test_generation import CONFIG, IDS, KEY, METHODS, filled, tiny

pytestmark = pytest.mark.usefixtures("quick_compiles_of_module")

CHAIN = jpeft.Chain(
    jpeft.LoRA(rank=3, targets=r".*_proj"), jpeft.IA3(targets=r".*k_proj"), jpeft.Train(targets=r".*norm/scale")
)
SIZES = {"rows": 4, "capacity": 56, "chunk": 8, "steps": 3}


def adapter_of(peft, params, seed):
    return filled(jax.eval_shape(peft.init, KEY, params), seed)


@functools.cache
def setup(name="chain"):
    """`(model, params, adapters)`: for each name a Peft and an adapter of its own, and a bank of all."""
    model, params = tiny()
    peft = {"chain": CHAIN, **METHODS}[name].bind(model, params, IDS)
    adapters = {f"a{i}": (peft, adapter_of(peft, params, i + 1)) for i in range(2)}
    if name == "chain":  # one of a lower rank and another scale, at some of the sites
        small = jpeft.LoRA(rank=2, alpha=3.0, targets=r".*v_proj").bind(model, params, IDS)
        adapters["small"] = small, adapter_of(small, params, 9)
    return model, params, adapters, jpeft.stack(peft, adapters, slots=5)


def make(name="chain", **more):
    model, params, _, bank = setup(name)
    return Engine(model, params, bank=bank, **{**SIZES, **more})


def drawn(rng, names, **more):
    """A request at random: a prompt, an adapter and settings."""
    settings = {
        "max_new_tokens": int(rng.integers(1, 20)),
        "temperature": float(rng.choice([0.0, 0.7, 2.0])),
        "top_k": [None, 7][int(rng.integers(2))],
        "top_p": [None, None, 0.8][int(rng.integers(3))],
        "stop_ids": rng.integers(0, 60, int(rng.integers(0, 12))).tolist(),
        "seed": int(rng.integers(1 << 40)),
    }
    adapter = [*names, None][int(rng.integers(len(names) + 1))]
    return rng.integers(0, 60, int(rng.integers(1, 36))).tolist(), adapter, {**settings, **more}


def alone(prompt, adapter, settings, name="chain", adapters=None):
    """The tokens of `generate`."""
    model, params, known, _ = setup(name)
    peft, tree = (None, None) if adapter is None else (adapters or known)[adapter]
    key = jax.random.key(settings["seed"])
    rest = {k: v for k, v in settings.items() if k != "seed"}
    more = {"peft": peft, "adapter": tree, "min_prompt_length": 64}
    return generate(model, params, [prompt], key=key, **more, **rest)[0]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("chain", 40),
        pytest.param("chain", 200, marks=pytest.mark.exhaustive),
        ("prompt", 12),
        pytest.param("prefix", 40, marks=pytest.mark.exhaustive),
        pytest.param("all", 40, marks=pytest.mark.exhaustive),
    ],
)
def test_every_request_has_the_tokens_of_generate_alone(name, count):
    rng, engine = np.random.default_rng(count), make(name)
    before = programs.prefill._cache_size(), programs.decode._cache_size()
    names = [*setup(name)[2]]
    asked = [drawn(rng, names) for _ in range(count)]
    if name in ("prompt", "all"):  # virtual tokens come before every text
        asked = [(prompt[:20], adapter or names[0], settings) for prompt, adapter, settings in asked]
    requests = [engine.submit(prompt, adapter, **settings) for prompt, adapter, settings in asked]
    cancelled = {i for i in range(count) if i % 7 == 3}
    for i in cancelled:
        engine.step()
        requests[i].cancel()
    engine.run()
    reasons = set()
    for i, (request, (prompt, adapter, settings)) in enumerate(zip(requests, asked, strict=True)):
        if i in cancelled:
            assert request.done
            if request.finish_reason == "cancelled":
                assert request.tokens == alone(prompt, adapter, settings, name)[: len(request.tokens)]
            continue
        want = alone(prompt, adapter, settings, name)
        assert request.result() == want, (i, adapter, settings)
        reasons.add(request.finish_reason)
        assert request.finish_reason == ("stop" if want[-1] in settings["stop_ids"] else "length")
    assert reasons == {"stop", "length"}
    more = 2 if name in ("prompt", "all") else 1  # the chunk that a prompt with virtual tokens begins with
    assert programs.prefill._cache_size() - before[0] <= more and programs.decode._cache_size() - before[1] <= 1


def test_iterating_runs_an_engine_that_was_not_started_and_other_requests_beside():
    engine = make()
    first, second = (engine.submit([3, 1, 4], "a0", max_new_tokens=n) for n in (9, 4))
    seen = []
    for token in first:
        seen.append(token)
        assert len(first.tokens) >= len(seen)
    assert seen == first.tokens == list(first) and second.done and second.tokens == seen[:4]
    assert not engine.step() and engine.running == engine.queued == 0
    assert engine.stats.submitted == 2 and engine.stats.finished == {"length": 2}
    assert (engine.stats.prompt_tokens, engine.stats.new_tokens) == (6, 13)


def test_by_default_the_stop_ids_and_limits_are_those_of_generate():
    engine = make()
    request = engine.submit([5] * 36, "a1")
    assert len(request.result()) == 20 and request.finish_reason == "length"  # up to the capacity
    _, params, _, _ = setup()
    ends = Decoder(dataclasses.replace(CONFIG, eos_token_id=request.tokens[2]))
    base = Engine(ends, params, rows=1, capacity=56, chunk=8)
    for prompt in ([5] * 36, [7]):
        want = generate(ends, params, [prompt], max_new_tokens=20, min_prompt_length=64)[0]
        assert base.submit(prompt, max_new_tokens=20).result() == want


def test_requests_from_many_threads_while_the_engine_runs_in_its_own():
    rng, found = np.random.default_rng(5), []
    asked = [drawn(rng, [*setup()[2]]) for _ in range(12)]

    def ask(engine, one):
        prompt, adapter, settings = one
        found.append((one, list(engine.submit(prompt, adapter, **settings))))

    with make() as engine:
        threads = [threading.Thread(target=ask, args=(engine, one)) for one in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 12 and all(tokens == alone(*one) for one, tokens in found)
    with pytest.raises(ClosedError, match="was closed"):
        engine.submit([1])


# --- adapters that come and go ---


def test_a_request_keeps_the_adapter_that_had_the_name_when_it_was_submitted():
    _, params, adapters, _ = setup()
    peft = adapters["a0"][0]
    engine, settings = make(), {"max_new_tokens": 12, "temperature": 0.0, "seed": 0}
    engine.submit([1], max_new_tokens=2).result()
    before = programs.prefill._cache_size(), programs.decode._cache_size()
    versions = [adapters["a0"], *((peft, adapter_of(peft, params, seed)) for seed in (20, 21))]
    requests = []
    for version in versions:
        engine.load("a0", version)
        requests += [engine.submit([7, 7, 7], "a0", **settings) for _ in range(6)]  # of which two wait
        engine.step()
    engine.unload("a0")
    with pytest.raises(ValueError, match="'a0'"):
        engine.submit([7], "a0")
    engine.load("other", adapters["a1"])  # in the place that is free
    requests.append(engine.submit([7, 7, 7], "other", **settings))
    engine.run()
    wants = [alone([7, 7, 7], "v", settings, adapters={"v": v}) for v in [*versions, adapters["a1"]]]
    assert [request.result() for request in requests] == [wants[i // 6] for i in range(19)]
    assert len(set(map(tuple, wants))) == 4
    assert (programs.prefill._cache_size(), programs.decode._cache_size()) == before


def test_adapters_that_cannot_be_loaded_leave_the_others():
    model, params, adapters, _ = setup()
    engine = make()
    _, tree = adapters["a0"]
    with pytest.raises(ValueError, match="NaN"):
        engine.load("a0", jax.tree.map(lambda x: x * jnp.nan, tree))
    large = jpeft.LoRA(rank=5, targets=r".*v_proj").bind(model, params, IDS)
    with pytest.raises(ValueError, match="above"):
        engine.load("large", (large, adapter_of(large, params, 1)))
    engine.load("last", tree)
    with pytest.raises(ValueError, match="full"):
        engine.load("more", tree)
    with pytest.raises(ValueError, match="nobody"):
        engine.unload("nobody")
    settings = {"max_new_tokens": 5, "temperature": 0.0, "seed": 0}
    assert engine.submit([2, 2], "a0", **settings).result() == alone([2, 2], "a0", settings)


WORDS = 512


@functools.cache
def telltale():
    """A model whose adapters each give one token, again and again: `(model, params, peft, adapter of a token)`."""
    config = DecoderConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, mlp_bias=True,
    )  # fmt: skip
    model = Decoder(config, scan_layers=False)
    params = filled(nn.meta.unbox(jax.eval_shape(model.init, KEY, IDS)["params"]))
    head = params["lm_head"]["kernel"]
    params["lm_head"]["kernel"] = head = head / jnp.linalg.norm(head, axis=0)
    params["model"]["norm"]["scale"] = jnp.ones_like(params["model"]["norm"]["scale"])
    peft = jpeft.Train(targets="model/layers/0/mlp/down_proj/bias").bind(model, params, IDS)
    head = np.asarray(head)

    def adapter(token):  # a bias that outweighs the rest, along the token's row of the head
        return {"model": {"layers": {"0": {"mlp": {"down_proj": {"bias": 1e4 * head[:, token]}}}}}}

    return model, params, peft, adapter


def serve_many(count, rows=16, names=16, every=40, seed=0):
    """How many of some requests were served by another's adapter, while adapters are reloaded and unloaded.

    Every adapter gives a token of its own, and no two versions under a name the same one.
    """
    model, params, peft, adapter = telltale()
    rng, current = np.random.default_rng(seed), {}
    bank = jpeft.stack(peft, {}, slots=names + 1)
    wrong = served = 0
    pending = []

    def collect(keep):
        nonlocal wrong, served
        while len(pending) > keep:
            request, token, new = pending.pop(0)
            served += 1
            wrong += request.result() != [token] * new

    with Engine(model, params, bank=bank, rows=rows, capacity=32, chunk=16, steps=4) as engine:
        for i in range(count):
            if i % every == 0 or not current:
                name = f"n{rng.integers(names)}"
                if name in current and rng.random() < 0.3:
                    engine.unload(name)
                    del current[name]
                free = sorted(set(range(WORDS)) - set(current.values()))
                current[name] = int(rng.choice(free))
                engine.load(name, adapter(current[name]))
            name = str(rng.choice([*current]))
            new = int(rng.integers(1, 6))
            prompt = rng.integers(0, WORDS, int(rng.integers(1, 24))).tolist()
            warmth = float(rng.choice([0.0, 0.05]))
            request = engine.submit(prompt, name, max_new_tokens=new, temperature=warmth, seed=i)
            pending.append((request, current[name], new))
            collect(256)
        collect(0)
    assert served == count
    return wrong


def test_no_request_is_served_by_the_adapter_of_another():
    model, params, peft, adapter = telltale()
    for token in (3, 400):
        rows = generate(model, params, [[5, 9]], peft=peft, adapter=adapter(token), max_new_tokens=4)
        assert rows == [[token] * 4]
    assert serve_many(300, every=10) == 0


# --- one row must not disturb another ---


def test_logits_that_are_not_finite_fail_their_request_alone():
    _, tree = setup()[2]["a0"]
    engine = make()
    engine.load("wild", jax.tree.map(lambda x: jnp.full_like(x, 1e30), tree))
    settings = {"max_new_tokens": 9, "temperature": 0.0, "seed": 0}
    good = [engine.submit([4, n], "a1", **settings) for n in range(3)]
    bad = engine.submit([4, 4], "wild", **settings)
    after = [engine.submit([6, n], None, **settings) for n in range(4)]  # in the row that held what is not finite
    engine.run()
    with pytest.raises(GenerationError, match=r"not finite .* under the adapter 'wild'"):
        bad.result()
    assert bad.finish_reason == "error" and engine.stats.finished["error"] == 1
    assert [r.result() for r in good] == [alone([4, n], "a1", settings) for n in range(3)]
    assert [r.result() for r in after] == [alone([6, n], None, settings) for n in range(4)]


def test_a_long_prompt_does_not_stall_the_others():
    engine = make()
    short = engine.submit([1, 2], "a0", max_new_tokens=30)
    engine.step()
    long = engine.submit([3] * 48, "a1", max_new_tokens=2)
    while not long.tokens:
        before = len(short.tokens)
        engine.step()
        assert len(short.tokens) > before or short.done
    assert len(short.tokens) >= 15  # six chunks, and tokens after each


def test_a_step_that_fails_ends_what_ran_and_nothing_else(monkeypatch):
    engine = make()
    running = [engine.submit([1, n], "a0", max_new_tokens=9) for n in range(4)]
    waiting = engine.submit([1, 2], "a0", max_new_tokens=3)
    with monkeypatch.context() as patch:

        def broken(*args, **kwargs):
            raise RuntimeError("out of memory")

        patch.setattr(programs, "decode", broken)
        engine.step()
    for request in running:
        with pytest.raises(RuntimeError, match="out of memory"):
            request.result()
    assert waiting.result() == alone([1, 2], "a0", {"max_new_tokens": 3, "seed": 0})


def test_a_listener_that_fails_ends_its_own_request():
    engine, heard = make(), []

    def fails(request):
        raise RuntimeError("gone")

    bad = engine.submit([1], max_new_tokens=9, listener=fails)
    good = engine.submit([1], max_new_tokens=9, listener=lambda request: heard.append(len(request.tokens)))
    engine.run()
    assert bad.finish_reason == "cancelled" and len(good.tokens) == 9
    assert heard[-1] == 9 and heard == sorted(heard)


# --- what methods need ---


def test_a_method_that_acts_at_places_of_a_prompt_reads_it_at_once():
    model, params = tiny()
    method = jpeft.methods.LoReFT(rank=2, prefix_positions=2, suffix_positions=2, targets=r"model/layers")
    peft = method.bind(model, params, IDS)
    tree = adapter_of(peft, params, 3)
    engine = Engine(model, params, bank=jpeft.stack(peft, {"a": tree}, slots=3), **SIZES)
    for length in (1, 8, 20):
        prompt = np.random.default_rng(length).integers(0, 60, length).tolist()
        want = generate(model, params, [prompt], peft=peft, adapter=tree, max_new_tokens=6)
        assert engine.submit(prompt, "a", max_new_tokens=6).result() == want[0]


OTHERS = {
    "xlora": jpeft.methods.XLoRA(n_experts=2, rank=2, hidden_size=32, targets=r".*_proj"),
    "bottleneck": jpeft.Bottleneck(size=4, targets=r".*/mlp"),
    "vera": jpeft.VeRA(rank=4, targets=r".*q_proj"),
    "dora": jpeft.DoRA(rank=2, targets=r".*_proj"),
    "oft": jpeft.OFT(targets=r".*q_proj"),
    "shifted": jpeft.PrefixTuning(length=3, shift_positions=True),
    "network": jpeft.PrefixTuning(length=3, reparametrize=True, hidden=8, embedding=4),
    "llama_adapter": jpeft.methods.LlamaAdapter(length=3),
    "p_tuning": jpeft.methods.PTuning(length=3),
    "head": jpeft.Train(targets="lm_head"),
}


def check_adapters(model, params, peft):
    """Two adapters in turn, each request as `generate` has it."""
    trees = {f"a{i}": adapter_of(peft, jax.eval_shape(lambda: params), i + 1) for i in range(2)}
    engine, rng = Engine(model, params, bank=jpeft.stack(peft, trees, slots=4), **SIZES), np.random.default_rng(0)
    asked = [(rng.integers(0, 60, int(rng.integers(1, 30))).tolist(), f"a{i % 2}") for i in range(6)]
    requests = [engine.submit(prompt, name, max_new_tokens=8) for prompt, name in asked]
    engine.run()
    more = {"max_new_tokens": 8, "min_prompt_length": 64}
    for request, (prompt, name) in zip(requests, asked, strict=True):
        assert request.result() == generate(model, params, [prompt], peft=peft, adapter=trees[name], **more)[0]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "xlora" else pytest.mark.exhaustive) for name in OTHERS]
)
def test_other_methods(name):
    model, params = tiny()
    check_adapters(model, params, OTHERS[name].bind(model, params, IDS))


@pytest.mark.exhaustive
@pytest.mark.parametrize("where", ["nf4", "mesh"])
def test_parameters_that_are_quantized_or_on_a_mesh(where):
    model, params = tiny()
    if where == "nf4":
        params = jpeft.quantize(params, scheme="nf4", block=16)
    else:
        mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tensor"))
        rules = [("heads", "tensor"), ("kv_heads", "tensor"), ("mlp", "tensor"), ("embed", "fsdp")]
        params = jax.device_put(params, jpeft.models.logical_shardings(model, mesh, rules))
    check_adapters(model, params, jpeft.LoRA(rank=2, targets=r".*_proj").bind(model, params, IDS))


def test_adapters_are_held_in_the_dtype_of_the_computation():
    model, params = tiny()
    model, params = model.clone(dtype=jnp.bfloat16), jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    method = jpeft.Chain(jpeft.DoRA(rank=2, targets=r".*v_proj"), jpeft.LoRA(rank=2, targets=r".*q_proj"))
    peft = method.bind(model, params, IDS)
    tree = adapter_of(peft, params, 3)
    engine = Engine(model, params, bank=jpeft.stack(peft, {"a": tree}, slots=3), **SIZES)
    dtypes = {str(x.dtype) for x in engine._state.adapter if jnp.issubdtype(x.dtype, jnp.floating)}
    assert dtypes == {"bfloat16", "float32"}  # DoRA's magnitude stays
    for n in range(4):
        want = generate(model, params, [[n, 3]], peft=peft, adapter=tree, max_new_tokens=8)[0]
        assert engine.submit([n, 3], "a", max_new_tokens=8).result() == want


def test_methods_that_cannot_be_served_are_told():
    model, params = tiny()
    tasks = jpeft.methods.MultitaskPromptTuning(length=2, tasks=2).bind(model, params, IDS)
    with pytest.raises(ValueError, match="reads task_ids of each call"):
        Engine(model, params, bank=jpeft.stack(tasks, {}, slots=2), **SIZES)
    invoked = jpeft.methods.ALoRA(rank=2, invocation_tokens=(1, 2), targets=r".*v_proj").bind(model, params, IDS)
    with pytest.raises(ValueError, match="continues a cache"):
        Engine(model, params, bank=jpeft.stack(invoked, {}, slots=2), **SIZES)


# --- bad input ---


def test_requests_that_cannot_be_are_refused():
    engine = make()
    for prompt, settings, error in (
        ([], {}, "the prompt is empty"),
        ([60], {}, "token id 60"),
        (["a"], {}, "expected integer"),
        ([1] * 50, {"max_new_tokens": 7}, r"50 tokens; with 7 new ones it exceeds the engine's capacity of 56"),
        ([1] * 56, {}, "capacity"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens must be a positive integer"),
        ([1], {"temperature": -1}, "temperature must be"),
        ([1], {"temperature": "hot"}, "temperature must be"),
        ([1], {"top_p": 2}, "top_p must be"),
        ([1], {"seed": -1}, "seed must be an integer"),
        ([1], {"stop_ids": "a"}, "stop_ids must be"),
        ([1], {"adapter": "a9"}, "no adapter 'a9'"),
    ):
        with pytest.raises(ValueError, match=error):
            engine.submit(prompt, **settings)
    assert engine.queued == 0
    base = Engine(*setup()[:2], **SIZES)
    with pytest.raises(ValueError, match="has no bank"):
        base.load("a", {})
    with pytest.raises(ValueError, match="there is no adapter 'a'"):
        base.submit([1], "a")


def test_a_queue_that_is_full_refuses_requests():
    engine = make(queue=2)
    for _ in range(4):
        engine.submit([1], max_new_tokens=9)
    engine.step()
    requests = [engine.submit([1], max_new_tokens=3) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait already, and the queue holds 2"):
        engine.submit([1])
    requests[1].cancel()
    requests.append(engine.submit([1], max_new_tokens=3))
    engine.run()
    assert [r.finish_reason for r in requests] == ["length", "cancelled", "length"]
    assert engine.stats.refused == 1


def test_many_requests_are_queued_together_or_not_at_all():
    engine = make(queue=2)
    calls = [{"prompt": [1, n], "max_new_tokens": 3} for n in range(1, engine.rows + 3)]
    with pytest.raises(GenerationError, match="vocabulary"):
        engine.submit_many([*calls[:-1], {"prompt": [-1]}])
    with pytest.raises(ValueError, match=f"requests at once; {engine.rows} rows and a queue of 2 hold {engine.most}"):
        engine.submit_many([*calls, calls[0]])
    assert engine.queued == engine.stats.submitted == 0
    requests = engine.submit_many(calls)
    with pytest.raises(QueueFullError, match="2 requests wait already, and the queue holds 2"):
        engine.submit([1])
    engine.run()
    engine.submit([1])
    with pytest.raises(QueueFullError, match=f"no room for {len(calls)}"):
        engine.submit_many(calls)
    engine.run()
    alone = make()
    assert [r.tokens for r in requests] == [alone.submit(**call).result() for call in calls]


def test_arguments_that_do_not_fit_are_told():
    model, params, adapters, bank = setup()
    peft = adapters["a0"][0]
    for error, given in (
        ("rows must be a positive integer", {"rows": 0}),
        ("queue must be", {"queue": -1}),
        ("without a bank", {"peft": peft}),
        ("another Peft", {"bank": bank, "peft": adapters["small"][0]}),
    ):
        with pytest.raises(ValueError, match=error):
            Engine(model, params, **given)
    with pytest.raises(ValueError, match="bound to another model"):
        Engine(model.clone(dtype=jnp.bfloat16), params, bank=bank)
    with pytest.raises(TypeError, match="decoder of jpeft"):
        Engine(nn.Dense(3), params)


def test_closing_cancels_what_is_not_done_or_waits_for_it():
    for drain, reasons in ((False, {"cancelled"}), (True, {"length"})):
        engine = make().start()
        requests = [engine.submit([1], max_new_tokens=40) for _ in range(9)]
        engine.close(drain=drain)
        assert {r.finish_reason for r in requests} <= reasons | {"length"}
        assert requests[-1].finish_reason in reasons and engine.closed
    engine = make()
    request = engine.submit([1], max_new_tokens=4)
    engine.close(drain=True)
    assert len(request.result()) == 4
    for call in (engine.start, lambda: engine.load("a0", {}), lambda: engine.unload("a0")):
        with pytest.raises(ClosedError):
            call()


def test_an_idle_thread_waits():
    with make() as engine:
        time.sleep(0.01)
        assert engine.stats.steps == 0 and len(engine.submit([1], max_new_tokens=2).result()) == 2
