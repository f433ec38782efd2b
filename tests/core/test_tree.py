"""Parameter trees: operations and their inverses, which neither copy nor change arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict, freeze
from hypothesis import given, settings
from hypothesis import strategies as st

import jpeft
from jpeft.core.tree import all_finite, count, flatten, join, map_with_path, nearest, size_bytes, unflatten

KEYS = st.text(alphabet="abc", min_size=1, max_size=2)
LEAVES = st.integers(0, 99).map(np.int64)  # a leaf of its own each time: identity tells a copy from the original
TREES = st.recursive(
    st.dictionaries(KEYS, LEAVES, min_size=1, max_size=3),
    lambda inner: st.dictionaries(KEYS, LEAVES | inner, min_size=1, max_size=3),
    max_leaves=12,
)
LABELS = st.sampled_from(["trainable", "frozen"])


def holes(tree):
    return {k: holes(v) if isinstance(v, dict) else None for k, v in tree.items()}


@given(TREES)
def test_flatten_and_unflatten_are_inverses(tree):
    assert unflatten(flatten(tree)) == tree
    assert flatten(freeze(tree)) == flatten(tree)


@given(TREES, st.data())
def test_partition_and_combine_are_inverses(tree, data):
    labels = map_with_path(lambda p, x: data.draw(LABELS), tree)
    trainable, frozen = jpeft.partition(tree, labels)
    for half, label in ((trainable, "trainable"), (frozen, "frozen")):
        assert holes(half) == holes(tree)
        assert set(flatten(half)) == {p for p, v in flatten(labels).items() if v == label}
    for whole in (jpeft.combine(trainable, frozen), jpeft.combine(frozen, trainable)):
        assert whole == tree
        assert all(a is b for a, b in zip(flatten(whole).values(), flatten(tree).values(), strict=True))
    assert isinstance(jpeft.partition(freeze(tree), labels)[0], FrozenDict)


@given(TREES, TREES)
def test_combine_lays_one_tree_over_another_and_changes_neither(base, overlay):
    copies = map_with_path(lambda p, x: x, base), map_with_path(lambda p, x: x, overlay)
    a, b = flatten(base), flatten(overlay)
    clash = any(p != q and (p[: len(q)] == q or q[: len(p)] == p) for p in a for q in b)
    if clash:
        with pytest.raises(ValueError, match="one tree has a leaf where the other has a subtree"):
            jpeft.combine(base, overlay)
    else:
        assert flatten(jpeft.combine(base, overlay)) == {**a, **b}
        assert jpeft.combine(jpeft.combine(base, overlay), overlay) == jpeft.combine(base, overlay)
        assert isinstance(jpeft.combine(freeze(base), overlay), FrozenDict)
    assert (base, overlay) == copies


@given(TREES)
def test_holes_and_empty_trees_give_way(tree):
    assert jpeft.combine(tree, holes(tree)) == tree == jpeft.combine(holes(tree), tree)
    assert jpeft.combine(tree, {}) == tree == jpeft.combine({}, tree)


@given(TREES, st.data())
@settings(deadline=None, max_examples=25)
def test_masked_updates_the_trainable_leaves_alone_and_keeps_no_state_for_the_rest(tree, data):
    labels = map_with_path(lambda p, x: data.draw(LABELS), tree)
    params = jax.tree.map(lambda x: np.full((2,), x, np.float32), tree)
    tx = jpeft.masked(optax.sgd(0.5, momentum=0.9), labels)
    state = tx.init(params)
    updates, _ = tx.update(jax.tree.map(np.ones_like, params), state, params)
    which = flatten(labels)
    for path, update in flatten(updates).items():
        np.testing.assert_array_equal(update, -0.5 if which[path] == "trainable" else 0.0)
    assert len(jax.tree.leaves(state)) == list(which.values()).count("trainable")


def test_masked_takes_the_adapter_by_itself_and_frozen_containers():
    labels = {"w": "frozen", "lora_a": "trainable"}
    tx = jpeft.masked(optax.sgd(1.0, momentum=0.5), labels)
    for tree in ({"lora_a": jnp.ones(2)}, freeze({"w": jnp.ones(3), "lora_a": jnp.ones(2)})):
        state = jax.jit(tx.init)(tree)
        updates, _ = jax.jit(tx.update)(tree, state, tree)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        np.testing.assert_allclose(updates["lora_a"], -1, rtol=1e-5)


@pytest.mark.parametrize(("labels", "message"), [
    ({"a": {"kernel": "frozen", "bia": "frozen"}}, "no label for 'a/bias'; nearest: a/bia"),
    ({"a": {"kernel": "frozen", "bias": "thawed"}}, "label at 'a/bias' is 'thawed'; expected 'trainable' or 'frozen'"),
])  # fmt: skip
def test_labels_that_do_not_fit_are_errors(labels, message):
    tree = {"a": {"kernel": 1, "bias": 2}}
    with pytest.raises(ValueError, match=message):
        jpeft.partition(tree, labels)
    with pytest.raises(ValueError, match=message):
        jpeft.masked(optax.sgd(1.0), labels).init(tree)


def test_sizes_and_names():
    tree = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": {"c": jax.ShapeDtypeStruct((4,), jnp.float32)}}
    assert (count(tree), size_bytes(tree)) == (10, 28)
    assert (join(("a", "b")), join(())) == ("a/b", ".")
    assert nearest("quary", ["encoder/query", "encoder/key", "x"]).startswith("; nearest: encoder/query")
    assert nearest("q", []) == ""


@pytest.mark.parametrize(("value", "finite"), [(1.0, True), (jnp.nan, False), (jnp.inf, False)])
def test_all_finite_looks_at_floating_leaves(value, finite):
    assert bool(all_finite({"a": jnp.array([1.0, value]), "n": jnp.array(3)})) is finite
    assert bool(all_finite({"n": jnp.array(3)})) is True
