"""The target language: every form of a target, and the error for every mistake."""

import dataclasses
import re

import flax.linen as nn
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jpeft
from jpeft.core.targets import TargetError, matches_entry, select
from tests.zoo import parameters


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, ids):
        class Attention(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Dense(4, name="query")(x) * nn.Dense(4, name="value")(x)

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = x + Attention(name="attention")(x)
                x = x + nn.Dense(4, name="output")(nn.gelu(nn.Dense(8, name="up")(x)))
                return nn.LayerNorm(name="norm")(x)

        x = nn.Embed(7, 4, name="table")(ids)
        for i in range(2):
            x = Layer(name=f"layer_{i}")(x)
        x = x @ self.param("projection", nn.initializers.normal(), (4, 4))
        return nn.Dense(3, name="classifier")(x)


MODEL, IDS = Encoder(), jnp.zeros((1, 2), int)
PARAMS = parameters(MODEL, IDS)
LAYERS = [f"layer_{i}/{n}" for i in range(2) for n in ("attention/query", "attention/value", "output", "up")]
ALL = [*LAYERS, "projection"]


def names(targets, exclude=None, method=jpeft.LoRA, **fields) -> list[str]:
    return sorted(s.name for s in method(targets=targets, exclude=exclude, **fields).bind(MODEL, PARAMS, IDS).sites)


@pytest.mark.parametrize(("targets", "exclude", "expected"), [
    (r".*/(query|value)", None, [n for n in ALL if "attention" in n]),
    (r"layer_1/.*", None, [n for n in ALL if n.startswith("layer_1")]),
    (r".*/query/kernel", None, ["layer_0/attention/query", "layer_1/attention/query"]),
    (["query"], None, ["layer_0/attention/query", "layer_1/attention/query"]),
    (["attention/query", "layer_0/up"], None, ["layer_0/attention/query", "layer_0/up", "layer_1/attention/query"]),
    (("classifier",), None, ["classifier"]),
    ("table", None, ["table"]),
    ("projection", None, ["projection"]),
    ("all-linear", None, ALL),
    (None, None, ALL),
    (lambda path, site: path.endswith("up") and site.outputs == 8, None, ["layer_0/up", "layer_1/up"]),
    ("all-linear", r".*/attention/.*", [n for n in ALL if "attention" not in n]),
    ("all-linear", ["layer_0/up", "value"], [n for n in ALL if n != "layer_0/up" and "value" not in n]),
    ("all-linear", lambda path, site: site.outputs == 4, ["layer_0/up", "layer_1/up"]),
    (r".*", "all-linear", ["classifier", "table"]),
], ids=lambda v: getattr(v, "__name__", str(v)))  # fmt: skip
def test_every_form(targets, exclude, expected):
    assert names(targets, exclude) == sorted(expected)


@pytest.mark.parametrize(("targets", "exclude", "message"), [
    (r".*/qury", None, r"'\.\*/qury' matches nothing; nearest: .*attention/query"),
    (["query", "valeu"], None, r"'valeu' matches nothing; nearest: .*attention/value"),
    (["uery"], None, "'uery' matches nothing; nearest: .*query"),
    ("layer_0", None, "cannot act on 'layer_0', which target 'layer_0' names"),
    (["norm"], None, "cannot act on 'layer_0/norm', which target 'norm' names; candidates: "),
    (r".*/norm/scale", None, "cannot act on 'layer_0/norm/scale'"),
    ("((", None, r"'\(\(' is not a regular expression"),
    (lambda path, site: False, None, "matches nothing"),
    ("query", None, r"'query' matches nothing; a string is a regular .*: for names, give \['query'\]; nearest"),
    ([], None, "LoRA has no targets"),
    ("", None, "LoRA has no targets"),
    (["query", 3], None, "a target must be a regular expression, a list of paths"),
    (3, None, "a target must be a regular expression, a list of paths"),
    ("all-linear", ["qeury"], r"exclude 'qeury' matches nothing; nearest: .*query"),
    (["query"], r".*/query", "leaves nothing of targets"),
], ids=lambda v: getattr(v, "__name__", str(v)))  # fmt: skip
def test_every_mistake_is_an_error_that_helps(targets, exclude, message):
    with pytest.raises(TargetError, match=message):
        names(targets, exclude)


def test_selective_methods_match_owners_and_leaves():
    train = lambda t, **kw: names(t, method=jpeft.Train, **kw)  # noqa: E731
    assert train("classifier") == ["classifier/bias", "classifier/kernel"]
    assert train(r".*/norm/(scale|bias)") == [f"layer_{i}/norm/{n}" for i in range(2) for n in ("bias", "scale")]
    assert train(["norm"], exclude=["scale"]) == [f"layer_{i}/norm/bias" for i in range(2)]
    assert train("layer_0") == train(r"layer_0/.*")
    assert train("projection") == ["projection"]
    assert len(names(None, method=jpeft.BitFit)) == 11
    assert names(["classifier"], method=jpeft.BitFit) == ["classifier/bias"]
    with pytest.raises(TargetError, match="nearest: classifier"):
        train("clasifier")
    with pytest.raises(ValueError, match="Train needs a target"):
        jpeft.Train()


def test_outputs_and_attentions_are_named_by_their_module():
    assert names(["attention"], method=jpeft.Bottleneck) == ["layer_0/attention", "layer_1/attention"]
    with pytest.raises(TargetError, match="no module has a name that tells that it is the output of a feed-forward"):
        names(None, method=jpeft.Bottleneck)
    with pytest.raises(TargetError, match="cannot act on 2 of 2 attentions"):
        names(None, method=jpeft.PrefixTuning)


def test_overrides_hold_for_the_first_pattern_that_matches():
    method = jpeft.LoRA(rank=2, alpha=4, overrides={r"layer_0/.*": {"rank": 3}, "query": {"rank": 5, "alpha": 1}})
    ranks = {a.site.name: a.method.rank for a in method.bind(MODEL, PARAMS, IDS).actions}
    assert ranks == {n: 3 if n.startswith("layer_0") else 5 if n.endswith("query") else 2 for n in ALL}
    with pytest.raises(TargetError, match="overrides pattern 'nope' matches none of its sites"):
        jpeft.LoRA(overrides={"nope": {"rank": 3}}).bind(MODEL, PARAMS, IDS)
    with pytest.raises(ValueError, match="sets 'targets', which cannot differ per site; per-site fields: rank"):
        jpeft.LoRA(overrides={"up": {"targets": "x"}})
    with pytest.raises(ValueError, match=r"overrides\['up'\]: LoRA.rank must be a positive integer, got 0"):
        jpeft.LoRA(overrides={"up": {"rank": 0}})


@pytest.mark.parametrize(("make", "message"), [
    (lambda: jpeft.LoRA(rank=0), "LoRA.rank must be a positive integer, got 0"),
    (lambda: jpeft.LoRA(rank=True), "LoRA.rank must be a positive integer, got True"),
    (lambda: jpeft.LoRA(rank="8"), "LoRA.rank must be a positive integer, got '8'"),
    (lambda: jpeft.LoRA(alpha=float("nan")), "LoRA.alpha must be a finite number"),
    (lambda: jpeft.LoRA(alpha="16"), "LoRA.alpha must be a finite number or None, got '16'"),
    (lambda: jpeft.LoRA(alpha=0), "LoRA.alpha is 0: the update would always be 0"),
    (lambda: jpeft.LoRA(dtype="float33"), "dtype 'float33' is unknown; give a floating dtype"),
    (lambda: jpeft.LoRA(dropout=1.0), r"LoRA.dropout must be a rate in \[0, 1\), got 1.0"),
    (lambda: jpeft.LoRA(init_weights="zeros"), "LoRA.init_weights must be one of kaiming"),
    (lambda: jpeft.LoRA(rank=3, init_weights="orthogonal"), "needs an even rank, got 3"),
    (lambda: jpeft.LoRA(dtype="int8"), "adapter leaves must be floating, got dtype 'int8'"),
    (lambda: jpeft.PrefixTuning(length=0), "PrefixTuning.length must be a positive integer"),
    (lambda: jpeft.Bottleneck(activation="sine"), "Bottleneck.activation must be one of gelu, "),
    (lambda: jpeft.Chain(), "Chain takes one method or more"),
    (lambda: jpeft.Chain(jpeft.LoRA), "Chain takes one method or more"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_a_field_that_cannot_be_is_refused_when_it_is_given(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("config", "message"), [
    ({"method": "LoRAA"}, "unknown method 'LoRAA'; expected one of .*LoRA"),
    ({"method": "LoRA", "ranks": 3}, "LoRA has no field 'ranks'; nearest: rank"),
    ({"rank": 3}, "an object with a name under 'method'"),
    ([], "an object with a name under 'method'"),
    ({"method": "Chain", "methods": 3}, "Chain takes 'methods', a list"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_a_configuration_that_cannot_be_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        jpeft.methods.from_dict(config)


def test_a_function_has_no_json_form_and_says_so():
    with pytest.raises(ValueError, match=r"LoRA\.targets is a function, which has no JSON form"):
        jpeft.LoRA(targets=lambda path, site: True).to_dict()


# --- laws -------------------------------------------------------------------------------------------------------------

_key = st.text(alphabet="ab", min_size=1, max_size=2)
_path = st.lists(_key, min_size=1, max_size=3).map("/".join)


@dataclasses.dataclass(frozen=True)
class Candidate:
    name: str
    linear: bool = True


@given(_path, _path)
def test_a_list_entry_is_a_path_or_a_suffix_at_a_boundary(entry, name):
    parts, given_parts = name.split("/"), entry.split("/")
    assert matches_entry(entry, name) == (parts[-len(given_parts) :] == given_parts)


@given(st.lists(_path, unique=True, min_size=1), st.lists(_path, min_size=1), st.lists(_path))
def test_selecting_keeps_order_takes_each_once_and_lets_exclude_win(paths, targets, exclude):
    candidates = [Candidate(p) for p in paths]
    named = lambda entries, p: any(matches_entry(e, p) for e in entries)  # noqa: E731
    expected = [p for p in paths if named(targets, p) and not named(exclude, p)]
    every_entry_hits = all(any(matches_entry(e, p) for p in paths) for e in [*targets, *exclude])
    if every_entry_hits and expected:
        assert [c.name for c in select(candidates, targets, exclude or None, what="M")] == expected
    else:
        with pytest.raises(TargetError):
            select(candidates, targets, exclude or None, what="M")


@given(st.lists(_path, unique=True, min_size=1), _path)
def test_a_regular_expression_matches_the_whole_path(paths, pattern):
    expected = [p for p in paths if re.fullmatch(pattern, p)]
    try:
        assert [c.name for c in select([Candidate(p) for p in paths], pattern, what="M")] == expected != []
    except TargetError:
        assert not expected
