"""Checks that every method must pass, for every way in which a module uses a weight. They take an entry of `tests.zoo`.

`tests/core/test_contract.py` runs them for the methods that jpeft has; a method from outside can be held to them too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft.binding import bind_survey, survey_model
from jpeft.core.tree import flatten, like, unflatten
from tests.zoo import USES, Entry, Model, moved, parameters


def close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Equal within a tolerance on the scale of the whole array."""
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))


def differ(a: Any, b: Any) -> bool:
    """Whether two outputs are visibly different."""
    return bool(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max() > 1e-3)


def bound(entry: Entry, use: str, mode: str = "plain", dtype: str = "float32") -> tuple[Any, Any, Any, Any]:
    """``(peft, model, params, x)`` of a method on a use."""
    case = USES[use]
    model, x = Model(case.op(jnp.dtype(dtype)), mode), case.input(jnp.dtype(dtype))
    params = parameters(model, x)
    return entry.make(case).bind(model, params, x), model, params, x


def check_law(entries: Mapping[str, Entry], use: str, mode: str, dtype: str) -> None:
    """Running under an adapter equals running the unmodified model on the merged tree.

    One program for all methods: compiling is what takes the time. Entries that cannot be merged, or are not tried on
    this use, are left out.
    """
    case = USES[use]
    model, x = Model(case.op(jnp.dtype(dtype)), mode), case.input(jnp.dtype(dtype))
    params = parameters(model, x)
    survey = survey_model(model, params, (x,), {})
    pefts = {n: bind_survey(e.make(case), model, params, survey) for n, e in entries.items() if use in e.uses}
    pefts = {name: peft for name, peft in pefts.items() if peft.mergeable}
    assert pefts
    for peft in pefts.values():
        assert {s.via for s in peft.sites if s.kind == "weight"} <= {case.via}

    @jax.jit
    def run(params: Any, adapters: Any) -> Any:
        applied = [pefts[name].apply(params, own, x) for name, own in adapters.items()]
        trees = [params, *(pefts[name].merge(params, own) for name, own in adapters.items())]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        return applied, jax.vmap(lambda p: model.apply({"params": p}, x))(stacked)

    applied, (base, *merged) = run(params, {name: moved(peft, params) for name, peft in pefts.items()})
    for name, got, want in zip(pefts, applied, merged, strict=True):
        assert got.dtype == want.dtype == jnp.dtype(dtype), name
        close(got, want, 1e-5 if dtype == "float32" else 0.04)
        assert differ(got, base), name


def check_learns(entry: Entry, use: str, mode: str) -> None:
    """A fresh adapter changes nothing unless it says so, every leaf of a moved one has a gradient, the base stays."""
    peft, model, params, x = bound(entry, use, mode)
    before = jax.tree.map(np.array, params)

    @jax.jit
    def run(params: Any, fresh: Any, adapter: Any) -> Any:
        def loss(adapter: Any) -> Any:
            y = peft.apply(params, adapter, x)
            return jnp.sin(y).sum(), y

        out = {"base": model.apply({"params": params}, x), "fresh": peft.apply(params, fresh, x)}
        trainable, frozen = jpeft.partition(adapter, peft.labels(adapter))
        grads, out["moved"] = jax.grad(lambda own: loss(jpeft.combine(own, frozen)), has_aux=True)(trainable)
        return out, grads

    fresh = peft.init(jax.random.key(0), params)
    y, grads = run(params, fresh, moved(peft, params))
    if all(m.identity_at_init for m in peft.method.methods()):
        close(y["fresh"], y["base"], 1e-6)  # not to the bit: XLA fuses the two programs differently
    else:
        assert differ(y["fresh"], y["base"])
    assert differ(y["moved"], y["base"])
    prefix = any(a.site.kind == "attention" for a in peft.actions)
    grads = {path: grad for path, grad in flatten(grads).items() if grad is not None}
    for path, grad in grads.items():
        # A key's bias, or a prefix's, shifts every score of a query alike, which softmax does not see.
        no_gradient = path[-2:] == ("key", "bias") or (path[-1] in ("prefix_key_bias", "bias") and prefix)
        assert np.abs(grad).max() > 1e-7 or no_gradient, path
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert flatten(fresh).keys() == grads.keys() | peft.non_trainable_paths
    assert {p: (x.shape, x.dtype.name) for p, x in flatten(fresh).items()} == dict(peft.structure)


def check_stacks_and_saves(entry: Entry, folder: Path) -> None:
    """Adapters stack under vmap, a step compiles once, and an adapter comes back from disk bit for bit."""
    peft, model, params, x = bound(entry, entry.uses[0], "scan")
    adapters = [moved(peft, params, seed=s) for s in range(3)]
    traces = []

    @jax.jit
    def step(params: Any, adapter: Any) -> Any:
        traces.append(None)
        trainable, frozen = jpeft.partition(adapter, peft.labels(adapter))
        loss = lambda own: (peft.apply(params, jpeft.combine(own, frozen), x) ** 2).mean()  # noqa: E731
        return jpeft.combine(jax.tree.map(lambda a, g: a - 0.1 * g, trainable, jax.grad(loss)(trainable)), frozen)

    jax.block_until_ready(step(params, step(params, adapters[0])))
    assert len(traces) == 1

    one = jax.jit(peft.apply)
    per_adapter = set(flatten(peft.axes(adapters[0])))  # the others are None, which is no leaf
    assert set(flatten(adapters[0])) - per_adapter == peft.non_trainable_paths | set(peft.shared_paths)
    # What does not train is held once; what trains is each one's own, even where all sites share it.
    once = peft.non_trainable_paths
    stacked = {
        p: x if p in once else jnp.stack([flatten(a)[p] for a in adapters]) for p, x in flatten(adapters[0]).items()
    }
    stacked = like(unflatten(stacked), adapters[0])
    axes = peft.axes(stacked)
    assert set(flatten(adapters[0])) - set(flatten(axes)) == once
    many = jax.jit(jax.vmap(peft.apply, in_axes=(None, axes, None)))(params, stacked, x)
    close(many, jnp.stack([one(params, a, x) for a in adapters]))

    jpeft.save(folder, peft, adapters[1], params)
    again, loaded = jpeft.load(folder, model, params, x)
    assert again == peft and hash(again) == hash(peft)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters[1])


def check_trees(entry: Entry) -> None:
    """Labels, partition and split agree about which leaves train, and the configuration is its own JSON."""
    peft, _, params, _ = bound(entry, entry.uses[0], "scan")
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


def check_abstract(entry: Entry) -> None:
    """Abstract parameters give an equal Peft, and an abstract adapter of the same shapes."""
    peft, model, params, x = bound(entry, entry.uses[0], "scan")
    shapes = jax.eval_shape(lambda: params)
    abstract = entry.make(USES[entry.uses[0]]).bind(model, shapes, jax.eval_shape(lambda: x))
    assert abstract == peft
    adapter = abstract.init(jax.random.key(0), shapes)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(adapter))
    assert {p: (leaf.shape, leaf.dtype.name) for p, leaf in flatten(adapter).items()} == dict(peft.structure)
