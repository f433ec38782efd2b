"""A field that a method does not have is refused with the right name or the nearest, whoever's name it is."""

import copy
import inspect
import pickle
from dataclasses import dataclass, fields

import numpy as np
import pytest

import jpeft
from jpeft.core.interchange import Field, HFSpec, form
from jpeft.methods import METHODS, Chain, WeightMethod

LORA, TRAIN = jpeft.LoRA, jpeft.Train


@pytest.mark.parametrize(("make", "hint"), [
    (lambda: LORA(r=2), "LoRA has no field 'r'; it is called 'rank'"),
    (lambda: LORA(lora_alpha=16), "LoRA has no field 'lora_alpha'; it is called 'alpha'"),
    (lambda: LORA(lora_dropout=0.1), "it is called 'dropout'"),
    (lambda: LORA(use_rslora=True), "it is called 'rslora'"),
    (lambda: LORA(init_lora_weights=True), "it is called 'init_weights'"),
    (lambda: LORA(use_dora=True), "listed by jpeft.methods.METHODS"),
    (lambda: LORA(use_qalora=True), "HuggingFace PEFT's field has no counterpart here"),
    (lambda: LORA(modules_to_save=["classifier"]), r"Chain\(LoRA\(...\), Train\(r'classifier'\)\)"),
    (lambda: LORA(bias="all"), r"Chain\(LoRA\(...\), BitFit\(\)\)"),
    (lambda: LORA(rank_pattern={"q": 4}), r"overrides=\{r'.*/query': \{'rank': 16\}\}"),
    (lambda: LORA(alpha_pattern={"q": 4}), r"overrides=\{r'.*/query': \{'alpha': 16\}\}"),
    (lambda: LORA(layers_to_transform=[0]), "name the layers in targets"),
    (lambda: LORA(trainable_token_indices=[0]), "TrainableTokens"),
    (lambda: LORA(task_type="CAUSAL_LM"), "leave it out"),
    (lambda: LORA(ranks=2), "LoRA has no field 'ranks'; nearest: rank"),
    (lambda: LORA(Alpha=2), "nearest: alpha"),
    (lambda: LORA(xyz=2), "its fields are alpha, dropout, dtype"),
    (lambda: jpeft.IA3(r=2), "IA3 has no field 'r'; its fields are dtype"),
    (lambda: jpeft.PrefixTuning(num_virtual_tokens=8), "it is called 'length'"),
    (lambda: jpeft.Bottleneck(reduction_factor=8), "it is called 'reduction'"),
    (lambda: jpeft.Bottleneck(scaling="learned"), "it is called 'scale'"),
    (lambda: jpeft.Bottleneck(mh_adapter=True), "sublayers is 'attention', 'feed_forward' or 'both'"),
    (lambda: jpeft.Bottleneck(residual_before_ln=False), "original_ln_before=True at norms is both"),
    (lambda: jpeft.Bottleneck(is_parallel=True), "jpeft.methods.ParallelAdapter is a method of its own"),
    (lambda: jpeft.methods.Compacter(shared_W_phm=True), "it is called 'shared_w_phm'"),
    (lambda: jpeft.methods.LoReFT(r=4), "it is called 'rank'"),
    (lambda: TRAIN(target_modules="x"), "Train has no field 'target_modules'; it is called 'targets'"),
    (lambda: Chain(LORA(), targets="x"), "Chain has no field 'targets'; it takes none by name"),
    (lambda: LORA(overrides={"q": {"r": 16}}), r"overrides\['q'\]: LoRA has no field 'r'; it is called 'rank'"),
    (lambda: LORA(overrides={"q": {"rnk": 16}}), "nearest: rank"),
])  # fmt: skip
def test_a_foreign_or_misspelt_field_is_named(make, hint):
    with pytest.raises(TypeError, match=hint) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_knows_huggingface_names_of_targets_and_of_its_own_fields(name):
    cls = METHODS[name]
    known = {"target_modules": "targets", "exclude_modules": "exclude"}
    known |= {field.key: field.name for field in getattr(form(cls), "fields", ()) if field.name not in ("", field.key)}
    for theirs, ours in known.items():
        with pytest.raises(TypeError, match=f"{name} has no field {theirs!r}; it is called {ours!r}"):
            cls(**{theirs: 1})


@dataclass(frozen=True, kw_only=True)
class Foreign(WeightMethod):
    """A method from outside, which was never registered."""

    width: int = 2


Foreign.hf = HFSpec("FOREIGN", (), fields=(Field("d_model", "width"),))


def test_a_method_from_outside_has_the_same_errors_by_its_own_declaration():
    with pytest.raises(TypeError, match="Foreign has no field 'd_model'; it is called 'width'"):
        Foreign(d_model=3)
    with pytest.raises(TypeError, match="Foreign has no field 'witdh'; nearest: width"):
        Foreign(witdh=3)


@dataclass(frozen=True, init=False)
class Free(WeightMethod):
    width: int = 2

    def __init__(self, **kwargs):
        object.__setattr__(self, "width", kwargs.pop("d", 2))
        object.__setattr__(self, "overrides", {})


VALUES = [
    None, True, 0, -1, 3.5, float("nan"), 10**400, 1j, "", "query", b"x", [], [1], [None], [{}], (1, 1), {}, {"a": 1},
    {"a": [1]}, {"default": [True]}, {1, 2}, range(3), object(), int, np.arange(3), np.ones((2, 2)), np.float32(2),
]  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_rule_answers_for_a_value_of_any_type(name):
    spec = form(METHODS[name])
    of_huggingface = {f"hf.{f.key}": f.rule for f in getattr(spec, "fields", ()) if f.rule}
    rules = {key: rule for cls in METHODS[name].__mro__ for key, rule in getattr(cls, "rules", {}).items()}
    for field, (accepts, _) in (rules | of_huggingface).items():
        for value in VALUES:
            assert accepts(value) in (True, False), (field, value)


def test_a_class_that_takes_any_name_keeps_to_itself_what_it_accepts():
    assert Free(d=5, r=1).width == 5


@pytest.mark.parametrize("name", METHODS)
def test_signatures_copies_and_pickles_are_those_of_any_dataclass(name):
    cls = METHODS[name]
    assert list(inspect.signature(cls).parameters) == [
        field.name for field in sorted(fields(cls), key=lambda f: f.kw_only)
    ]
    required = {
        **{name: {"members": {"a": LORA()}} for name in ("AdapterFusion", "Average", "Stack")},
        "CPT": {"token_ids": (1,)},
        "Train": {"targets": "x"},
        "TrainableTokens": {"indices": (1,)},
        "ALoRA": {"invocation_tokens": (1,)},
        "XLoRA": {"n_experts": 2, "hidden_size": 8},
    }
    method = cls(**required.get(name, {}))
    assert copy.deepcopy(method) == method == pickle.loads(pickle.dumps(method))
