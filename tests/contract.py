"""Checks that every method must pass, for every way in which a module uses a weight. They take an entry of `tests.zoo`.

`tests/core/test_contract.py` runs them for the methods that jpeft has; a method from outside can be held to them too.
A front end is "linen" or "nnx".
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jpeft
from jpeft.binding import bind_survey, survey_model
from jpeft.core.tree import flatten, unflatten
from tests.nnx import twins
from tests.zoo import USES, Entry, Model, moved, parameters

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.04}


def close(got: Any, want: Any, tolerance: float = 1e-5, name: str = "") -> None:
    """Equal within a tolerance on the scale of the whole array."""
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()), err_msg=name)


def differ(a: Any, b: Any) -> bool:
    """Whether two outputs are visibly different; those of a method that puts virtual tokens first are longer."""
    return np.shape(a) != np.shape(b) or bool(
        np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max() > 1e-3
    )


@functools.cache
def base(
    use: str, mode: str, dtype: str, scheme: str | None = None, frontend: str = "linen"
) -> tuple[Any, Any, Any, Any]:
    """``(model, params, x, survey)`` of a use, whose weights are quantized if a scheme is given."""
    case = USES[use]
    x = case.input(jnp.dtype(dtype))
    model: Any = Model(case.op(jnp.dtype(dtype)), "scan" if "scan" in mode else mode)
    params = parameters(model, x)
    if frontend == "nnx":
        model = twins.twin(use, mode, jnp.dtype(dtype), params)
    if scheme is not None:
        params = jpeft.quantize(params, scheme, model, x, block=case.block, targets=case.targets)
        assert jpeft.quantization.is_quantized(params)
    return model, params, x, survey_model(model, params, (x,), {})


def unmodified(model: Any, params: Any, x: Any) -> Any:
    """The output of a model without jpeft. Only Linen's layers read quantized weights, which are boxes to them."""
    return (
        model.apply({"params": params}, x)
        if isinstance(model, Model)
        else twins.run(model, jpeft.dequantize(params), x)
    )


def arguments(model: Any, params: Any, x: Any) -> tuple[Any, ...]:
    """What `jpeft.load` and ``method.bind`` take after the model."""
    return (params, x) if isinstance(model, Model) else (x,)


def bound_together(
    entries: Mapping[str, Entry],
    use: str,
    mode: str,
    dtype: str,
    scheme: str | None = None,
    frontend: str = "linen",
) -> tuple[dict[str, Any], Any, Any, Any]:
    """``(pefts, model, params, x)`` of many methods on a use."""
    model, params, x, survey = base(use, mode, dtype, scheme, frontend)
    pefts = {name: bind_survey(entry.make(USES[use]), model, params, survey) for name, entry in entries.items()}
    return pefts, model, params, x


def bound(entry: Entry, use: str, mode: str = "plain", frontend: str = "linen") -> tuple[Any, Any, Any, Any]:
    """``(peft, model, params, x)`` of a method on a use."""
    pefts, *rest = bound_together({"": entry}, use, mode, "float32", None, frontend)
    return pefts[""], *rest


def check_law(
    entries: Mapping[str, Entry],
    use: str,
    mode: str,
    dtype: str,
    scheme: str | None = None,
    frontend: str = "linen",
) -> None:
    """Running under an adapter equals running the unmodified model on the merged tree of the dequantized base.

    What cannot be merged equals itself over the dequantized base. One program for all methods: compiling is what takes
    the time.
    """
    pefts, model, params, x = bound_together(entries, use, mode, dtype, scheme, frontend)
    for peft in pefts.values():
        assert {s.via for s in peft.sites if s.kind == "weight"} <= {USES[use].via}

    @jax.jit
    def run(params: Any, adapters: Any) -> Any:
        plain = jpeft.dequantize(params)
        applied = {name: pefts[name].apply(params, own, x) for name, own in adapters.items()}
        merged = {n: pefts[n].merge(plain, own) for n, own in adapters.items() if pefts[n].mergeable}
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), plain, *merged.values())
        base, *outputs = jax.vmap(lambda p: unmodified(model, p, x))(stacked)
        others = {n: pefts[n].apply(plain, own, x) for n, own in adapters.items() if not pefts[n].mergeable}
        return base, applied, {**dict(zip(merged, outputs, strict=True)), **others}

    base, applied, expected = run(params, {name: moved(peft, params) for name, peft in pefts.items()})
    assert applied.keys() == expected.keys() == entries.keys()
    for name, got in applied.items():
        assert got.dtype == expected[name].dtype == jnp.dtype(dtype), name
        # A few codes for a tiny weight give small norms, by which DoRA divides what bfloat16 has rounded.
        wider = 2.5 if scheme is not None and dtype == "bfloat16" else 1
        close(got, expected[name], wider * TOLERANCE[dtype], name)
        assert differ(got, base), name


def check_learns(
    entries: Mapping[str, Entry], use: str, mode: str, scheme: str | None = None, frontend: str = "linen"
) -> None:
    """A fresh adapter changes nothing unless it says so; one step of SGD moves every leaf that trains, and no other.

    What a step returns is taken by the next one as it is: nothing is traced twice.
    """
    pefts, model, params, x = bound_together(entries, use, mode, "float32", scheme, frontend)
    before = jax.tree.map(np.array, params)
    tx, traces = optax.sgd(1.0), []

    def learned(peft: jpeft.Peft, params: Any, adapter: Any) -> Any:
        def loss_fn(adapter: Any, params: Any, *_: Any) -> Any:
            y = peft.apply(params, adapter, x)
            return jnp.sin(y).sum(), {"y": y}

        state = jpeft.TrainState.create(peft, adapter, tx, jax.random.key(0))
        state, metrics = jpeft.train_step(peft, loss_fn, tx)(state, params, None)
        return state.adapter, metrics["y"]

    @jax.jit
    def run(params: Any, adapters: Any) -> Any:
        traces.append(None)
        fresh = {name: pefts[name].apply(params, own, x) for name, (own, _) in adapters.items()}
        return unmodified(model, params, x), fresh, {
            name: learned(pefts[name], params, own) for name, (_, own) in adapters.items()
        }  # fmt: skip

    adapters = {name: (peft.init(jax.random.key(0), params), moved(peft, params)) for name, peft in pefts.items()}
    base, fresh, learned_all = run(params, adapters)
    run(params, {name: (start, learned_all[name][0]) for name, (start, _) in adapters.items()})
    assert len(traces) == 1
    for name, peft in pefts.items():
        (start, old), (new, y) = adapters[name], learned_all[name]
        if all(m.identity_at_init for m in peft.method.methods()):
            close(fresh[name], base, 1e-6, name)  # not to the bit: XLA fuses the two programs differently
        else:
            assert differ(fresh[name], base), name
        assert differ(y, base), name
        assert {p: (x.shape, x.dtype.name) for p, x in flatten(start).items()} == dict(peft.structure)
        _check_moved(name, peft, flatten(old), flatten(new))
    jax.tree.map(np.testing.assert_array_equal, params, before)


def _check_moved(name: str, peft: jpeft.Peft, old: Mapping[Any, Any], new: Mapping[Any, Any]) -> None:
    """Every leaf that trains differs after a step; the others are the same to the bit."""
    assert old.keys() == new.keys()
    prefix = any(action.site.kind == "attention" for action in peft.actions)
    for path, leaf in old.items():
        if path in peft.non_trainable_paths:
            np.testing.assert_array_equal(new[path], leaf, err_msg=f"{name} {path}")
            continue
        # A key's bias, or a prefix's, shifts every score of a query alike, which softmax does not see.
        no_gradient = path[-2:] == ("key", "bias") or (path[-1] in ("prefix_key_bias", "bias") and prefix)
        assert np.abs(np.asarray(new[path]) - np.asarray(leaf)).max() > 1e-7 or no_gradient, (name, path)


def check_stacks(entries: Mapping[str, Entry], use: str, frontend: str = "linen") -> None:
    """Stacked adapters under vmap give what each gives by itself, in a loop."""
    pefts, _, params, x = bound_together(entries, use, "scan", "float32", None, frontend)
    stacked, axes = {}, {}
    for name, peft in pefts.items():
        adapters = [flatten(moved(peft, params, seed=seed)) for seed in range(3)]
        per_adapter = set(flatten(peft.axes(unflatten(adapters[0]))))  # the others are None, which is no leaf
        assert set(adapters[0]) - per_adapter == peft.non_trainable_paths | set(peft.shared_paths), name
        # What does not train is held once; what trains is each one's own, even where all sites share it.
        once = peft.non_trainable_paths
        stacked[name] = {p: x if p in once else jnp.stack([a[p] for a in adapters]) for p, x in adapters[0].items()}
        axes[name] = peft.axes(unflatten(stacked[name]))
        assert set(stacked[name]) - set(flatten(axes[name])) == once, name

    def in_a_loop(peft: jpeft.Peft, params: Any, adapters: Any) -> Any:
        once = peft.non_trainable_paths
        held = {path: leaf for path, leaf in adapters.items() if path in once}
        each = {path: leaf for path, leaf in adapters.items() if path not in once}
        return jax.lax.map(lambda own: peft.apply(params, unflatten(held | own), x), each)

    @jax.jit
    def run(params: Any, stacked: Any) -> Any:
        return {
            name: (
                jax.vmap(peft.apply, in_axes=(None, axes[name], None))(params, unflatten(stacked[name]), x),
                in_a_loop(peft, params, stacked[name]),
            )
            for name, peft in pefts.items()
        }

    for name, (together, one_by_one) in run(params, stacked).items():
        close(together, one_by_one, name=name)


def check_banks(entries: Mapping[str, Entry], use: str, frontend: str = "linen") -> None:
    """In one batch, each row runs under its own adapter of a bank, or none: as it does by itself.

    Of adapters that are loaded and unloaded nothing is left, and nothing is traced again.
    """
    pefts, model, params, x = bound_together(entries, use, "scan", "float32", None, frontend)
    x = jnp.concatenate([x, x[:2]])[:4] if USES[use].vocabulary else jnp.concatenate([x, -x])[:4]
    adapters = {n: [moved(peft, params, seed=seed) for seed in range(3)] for n, peft in pefts.items()}
    has_base = {n: not any(m.virtual_tokens() for m in peft.method.methods()) for n, peft in pefts.items()}
    banks = {n: jpeft.stack(peft, dict(zip("ab", adapters[n], strict=False)), slots=4) for n, peft in pefts.items()}
    changed = {n: bank.unload("a").load("c", adapters[n][2]).load("b", adapters[n][0]) for n, bank in banks.items()}
    traces: list[None] = []
    slots: dict[str, Any] = {}

    @jax.jit
    def run(params: Any, banks: Any, slots: Any) -> Any:
        traces.append(None)
        return {n: pefts[n].apply(params, bank, x, adapter_ids=slots[n]) for n, bank in banks.items()}

    @jax.jit
    def one_by_one(params: Any, adapters: Any) -> Any:
        together = {
            n: jax.lax.map(lambda own, n=n: pefts[n].apply(params, own[0], own[1][None]), (stacked, jnp.tile(x, tile)))
            for n, stacked in adapters.items()
        }
        return together, [unmodified(model, params, row[None]) for row in x]

    tile = (2, *(1 for _ in x.shape[1:]))
    rows = {False: [*"abba", *"cbbb"], True: [*"ab a", *"cb b"]}  # of both banks, with the base or without
    which = {"a": 0, "b": 1, "c": 2, " ": 0}
    own = {
        n: [adapters[n][which[c] if i < 4 or c != "b" else 0] for i, c in enumerate(rows[has_base[n]])] for n in pefts
    }
    stacked = {n: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for n, trees in own.items()}
    each, base = one_by_one(params, stacked)
    for n in pefts:
        names = [c.strip() or None for c in rows[has_base[n]]]
        slots[n] = [banks[n].ids(names[:4]), changed[n].ids(names[4:])]
    for i, held in enumerate((banks, changed)):
        got = run(params, held, {n: own[i] for n, own in slots.items()})
        for n in pefts:
            names = rows[has_base[n]][4 * i : 4 * i + 4]
            want = [base[r] if c == " " else each[n][4 * i + r] for r, c in enumerate(names)]
            close(got[n], jnp.concatenate(want, 1), name=n)
    assert len(traces) == 1


def check_saves(entry: Entry, folder: Path, frontend: str = "linen") -> None:
    """An adapter comes back from disk bit for bit."""
    peft, model, params, x = bound(entry, entry.uses[0], "scan", frontend)
    adapter = moved(peft, params)
    jpeft.save(folder, peft, adapter, params)
    again, loaded = jpeft.load(folder, model, *arguments(model, params, x))
    assert again == peft and hash(again) == hash(peft)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)


def check_trees(entry: Entry, frontend: str = "linen") -> None:
    """Labels, partition and split agree about which leaves train, and the configuration is its own JSON."""
    peft, _, params, _ = bound(entry, entry.uses[0], "scan", frontend)
    adapter = moved(peft, params)
    full = jpeft.combine(params, adapter)

    labels = peft.labels(full)
    assert jax.tree.structure(labels) == jax.tree.structure(full)
    trainable_paths = set(flatten(adapter)) - peft.non_trainable_paths
    assert {p for p, v in flatten(labels).items() if v == "trainable"} == trainable_paths
    assert {p for p, v in flatten(peft.labels(adapter)).items() if v == "trainable"} == trainable_paths

    trainable, frozen = jpeft.partition(full, labels)
    assert set(flatten(trainable)) == trainable_paths
    jax.tree.map(np.testing.assert_array_equal, jpeft.combine(trainable, frozen), full)

    base, own = peft.split(full)
    assert set(flatten(base)) == set(flatten(params))
    jax.tree.map(np.testing.assert_array_equal, own, adapter)

    restored = jpeft.methods.from_dict(peft.method.to_dict())
    assert restored == peft.method
    assert all(site.name in peft.summary(expand=True) for site in peft.sites)


def check_abstract(entry: Entry, frontend: str = "linen") -> None:
    """Abstract parameters give an equal Peft, and an abstract adapter of the same shapes."""
    peft, model, params, x = bound(entry, entry.uses[0], "scan", frontend)
    shapes = jax.eval_shape(lambda: params)
    model = model if isinstance(model, Model) else twins.abstract(model)
    abstract = entry.make(USES[entry.uses[0]]).bind(model, *arguments(model, shapes, jax.eval_shape(lambda: x)))
    assert abstract == peft
    adapter = abstract.init(jax.random.key(0), shapes)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(adapter))
    assert {p: (leaf.shape, leaf.dtype.name) for p, leaf in flatten(adapter).items()} == dict(peft.structure)
