"""The table of a bound method: repeated sites are folded, and no fold says more or less than is there."""

import re
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jpeft
from jpeft.core.folding import fold, listed, unfold
from jpeft.core.targets import TargetError

WORD = st.sampled_from(["layer", "h_", "expert", "", "q", "conv2d", "a{0..1}", "}", "{", "²"])
NUMBER = st.sampled_from(["0", "1", "2", "3", "7", "10", "00", "01", ""])
NAME = st.lists(st.tuples(WORD, NUMBER), min_size=1, max_size=3).map(lambda ps: "/".join(a + b for a, b in ps))


@given(st.lists(st.tuples(NAME, st.sampled_from("xy")), max_size=40))
@settings(max_examples=300, deadline=None)
def test_expanding_folds_gives_exactly_the_names(entries):
    names, keys = [name for name, _ in entries], [key for _, key in entries]
    folds = fold(names, keys)
    assert sorted(i for found in folds for i in found.members) == list(range(len(names)))
    for found in folds:
        assert len({keys[i] for i in found.members}) == 1
        if len(found.members) > 1:
            assert Counter(unfold(found.name)) == Counter(names[i] for i in found.members)
            assert str(found) == f"{found.name} ×{len(found.members)}"
        else:
            assert str(found) == names[found.members[0]]


@pytest.mark.parametrize(("names", "folded"), [
    ([f"l/{i}/q" for i in range(12)], ["l/{0..11}/q ×12"]),
    ([f"l/{i}/q" for i in (0, 2, 4)], ["l/{0,2,4}/q ×3"]),
    ([f"l/{i}/q" for i in (0, 1, 2, 3, 7)], ["l/{0..3,7}/q ×5"]),
    (["l/4/q", "l/5/q"], ["l/{4,5}/q ×2"]),
    ([f"l/{i}/e/{j}" for i in range(3) for j in range(2)], ["l/{0..2}/e/{0,1} ×6"]),
    (["l/0/e/0", "l/1/e/1"], ["l/0/e/0", "l/1/e/1"]),  # {0,1} twice would be four
    (["l/0/e/0", "l/0/e/1", "l/1/e/0"], ["l/{0,1}/e/0 ×2", "l/0/e/1"]),
    (["Dense_0", "Dense_1", "Conv_0"], ["Dense_{0,1} ×2", "Conv_0"]),
    (["l/00", "l/01"], ["l/00", "l/01"]),
    (["l/{0..5}", "l/{0..6}"], ["l/{0..5}", "l/{0..6}"]),  # such are their names
])  # fmt: skip
def test_folds(names, folded):
    assert [str(found) for found in fold(names)] == folded


def test_names_that_are_listed_are_counted_where_the_list_ends():
    assert listed([f"h/{i}/{x}" for i in range(3) for x in "ab"] + ["c"], limit=1) == "h/{0..2}/a ×3 and 4 more"
    assert listed(["a", "b"], limit=2) == "a, b"


# --- the table ------------------------------------------------------------------------------------------------------


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(6):
            for name in ("query", "value"):
                x = x + nn.Dense(8, name=f"layer_{i}_{name}")(x)
            x = nn.Dense(16 if i == 5 else 8, name=f"layer_{i}_out")(x)
        return nn.Dense(3, name="head")(x)


@pytest.fixture(scope="module")
def bound():
    model, x = Stacked(), jnp.ones((1, 8))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    return lambda method: method.bind(model, params, x)


def cells(line):
    return re.split(r"  +", line)


def test_every_site_is_in_one_row_and_the_rows_add_up_to_the_totals(bound):
    chain = jpeft.Chain(
        jpeft.LoRA(rank=2, targets=r"layer_.*", overrides={"layer_[05]_query": {"rank": 4}}),
        jpeft.BitFit(exclude=r"head.*"),
        jpeft.LoRA(rank=3, targets=["head"]),
    )
    peft = bound(chain)
    table, rest = peft.summary().split("\n\n")
    rows = [cells(line) for line in table.splitlines()[2:]]
    found: Counter = Counter()
    parameters = size = 0
    for name, *others in rows:
        path, _, times = name.partition(" ×")
        names = unfold(path) if times else [path]
        assert len(names) == int(times or 1)
        found.update((n, others[-2]) for n in names)
        products = [[int(x.replace(",", "")) for x in cell.split(" × ")] for cell in others[-4:-2]]
        assert all(len(p) == 1 or p[0] == int(times) for p in products)
        parameters += products[0][0] * products[0][-1] if times else products[0][0]
        size += products[1][0] * products[1][-1] if times else products[1][0]
    labels = ["LoRA (1)", "BitFit", "LoRA (2)"]
    assert found == Counter((a.site.name, labels[a.member]) for a in peft.actions)
    assert f"{len(peft.actions)} sites; {parameters:,} trainable" in rest and f"adapter {size:,} bytes" in rest
    assert {"layer_{0,5}_query ×2", "layer_{1..4}_query ×4", "layer_{0..4}_out ×5", "layer_5_out"} <= {
        row[0] for row in rows
    }


def test_expanded_it_has_each_site_and_each_weight_left_alone(bound):
    peft = bound(jpeft.LoRA(rank=2, targets=r"layer_.*_query"))
    table = peft.summary(expand=True)
    assert [cells(line)[0] for line in table.splitlines()[2:8]] == [site.name for site in peft.sites]
    assert "×2" not in table and table.endswith(", ".join(peft.left_alone))
    assert peft.summary().endswith("head/kernel, layer_{0..5}_out/kernel ×6, layer_{0..5}_value/kernel ×6")


def chosen(path, site):
    return path.endswith("_out")


@pytest.mark.parametrize(("method", "lines"), [
    (jpeft.LoRA(targets=r".*_(query|value)"), ["targets: '.*_(query|value)' 12 sites"]),
    (jpeft.LoRA(targets=["head", "layer_0_out"]), ["targets: 'head' 1 site, 'layer_0_out' 1 site"]),
    (jpeft.LoRA(targets=chosen), ["targets: chosen 6 sites"]),
    (jpeft.LoRA(), ["targets: 'all-linear' (the default) 18 sites"]),
    (
        jpeft.LoRA(exclude=["head"], targets=".*", overrides={"layer_0.*": {"rank": 2}, ".*[05]_out": {"rank": 3}}),
        ["targets: '.*' 19 sites", "exclude: 'head' 1 site",
         "overrides: 'layer_0.*' 3 sites, '.*[05]_out' 1 site"],  # the first that matches applies
    ),
    (
        jpeft.Chain(jpeft.LoRA(targets="head"), jpeft.Train("layer_0_out")),
        ["LoRA targets: 'head' 1 site", "Train targets: 'layer_0_out' 2 sites"],
    ),
])  # fmt: skip
def test_it_says_how_many_sites_each_entry_matched(bound, method, lines):
    rest = bound(method).summary().split("\n\n")[1].splitlines()
    assert rest[: len(lines)] == lines and " trainable of " in rest[len(lines)]


def test_a_callable_that_matches_nothing_is_named(bound):
    with pytest.raises(TargetError, match="function nothing"):
        bound(jpeft.LoRA(targets=nothing))


def nothing(path, site):
    return False


class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nn.Dense(8, name=f"layer_{i}", dtype=jnp.float32, param_dtype=jnp.float32 if i else jnp.bfloat16)(x)
        return x


def test_weights_of_two_dtypes_do_not_fold_and_say_theirs():
    model, x = Mixed(), jnp.ones((1, 8))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    rows = jpeft.LoRA(targets=".*").bind(model, params, x).summary().splitlines()[2:4]
    assert [cells(row)[::2][:2] for row in rows] == [["layer_0", "8×8 bfloat16"], ["layer_1", "8×8 float32"]]
