"""What is given to a method on NNX models is right, or refused by name; nothing of the user's model is changed."""

import copy
import dataclasses
import functools
import pickle
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.core.tree import flatten
from jpeft.errors import MergeError
from tests.contract import close, differ
from tests.nnx.models import One, Shared, Tied, moved, rngs
from tests.zoo import same

LORA = jpeft.LoRA(rank=2, targets=r".*")
X = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
pytestmark = pytest.mark.usefixtures("quick_compiles_of_module")


class MLP(nnx.Module):
    def __init__(self, rngs, width=16):
        self.a, self.b = nnx.Linear(8, width, rngs=rngs), nnx.Linear(width, 8, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.b(jnp.tanh(self.a(x))))

    def raw(self, x):
        """The same, but for what it knows of its layers."""
        h = jnp.tanh(x @ self.a.kernel[...] + self.a.bias[...])
        return jnp.tanh(h @ self.b.kernel[...] + self.b.bias[...])


class Longer(MLP):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.c = nnx.Linear(8, 8, rngs=rngs)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(16, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.b(self.drop(self.norm(nnx.relu(self.a(x))))))


def other_state(model):
    return nnx.state(model, nnx.Not(nnx.Param))


@functools.cache
def bound(kind=MLP):
    """A model, a method that is bound to it, and an adapter."""
    model = kind(rngs())
    peft = LORA.bind(model, X)
    return model, peft, moved(peft, model)


# --- abstract and missing values ---


def test_an_abstract_model_is_bound_and_its_values_come_with_the_call():
    model, peft, adapter = bound(Net)
    shapes = nnx.eval_shape(lambda: Net(rngs()))
    abstract = LORA.bind(shapes, X)
    assert [site.name for site in abstract.sites] == [site.name for site in peft.sites]
    params, want = nnx.state(model, nnx.Param), peft.apply(model, adapter, X)
    close(abstract.apply(params, adapter, X, rest=other_state(model)), want)
    close(abstract.apply(model, adapter, X), want)
    with pytest.raises(ValueError, match=r"'drop/rngs/count' is an abstract array.*rest="):
        abstract.apply(params, adapter, X)
    out = jax.eval_shape(abstract.apply, nnx.state(shapes, nnx.Param), adapter, X, rest=other_state(shapes))
    assert out.shape == X.shape
    for given in (shapes, nnx.state(shapes, nnx.Param)):
        assert jax.tree.map(jnp.shape, abstract.init(jax.random.key(0), given)) == jax.tree.map(jnp.shape, adapter)
        for call in (lambda given: peft.apply(given, adapter, X), lambda given: peft.merge(given, adapter)):
            with pytest.raises(ValueError, match=r"params have an abstract array at 'a/bias'"):
                call(given)
    with pytest.raises(ValueError, match=r"adapter have an abstract array at 'a/lora_a'"):
        peft.apply(model, peft.init(jax.random.key(0), shapes), X)


def test_an_abstract_model_with_an_adapter_gets_its_arrays_by_update():
    model, peft, adapter = bound(Net)
    tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=adapter)
    empty, _ = jpeft.nnx.attach(nnx.eval_shape(lambda: Net(rngs())), LORA, X, rngs=rngs(1))
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(peft.adapter(empty)))
    nnx.update(empty, nnx.state(tuned))
    tuned.eval(), empty.eval()
    close(empty(X), tuned(X))


def test_a_parameter_without_a_value_is_none_and_one_that_is_no_array_is_refused():
    model = MLP(rngs())
    model.later, model.nothing = nnx.Param(None), None
    peft = LORA.bind(model, X)
    adapter = moved(peft, model)
    tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=adapter)
    close(tuned(X), peft.merge(model, adapter)(X))
    assert peft.detach(tuned).later.get_raw_value() is None
    for value in (1.5, "text", [jnp.ones(2)], {"x": jnp.ones(2)}):
        model.later = nnx.Param(value)
        with pytest.raises(ValueError, match=r"'later' holds .*; a nnx.Param must hold one array"):
            LORA.bind(model, X)


# --- another model's ---


def test_parameters_of_another_model_are_refused_by_path():
    model, peft, adapter = bound()
    linen = nn.Sequential([nn.Dense(8)])
    variables = linen.init(jax.random.key(0), X)
    plain = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    less = {**plain, "b": {"kernel": plain["b"]["kernel"]}}
    cases = [
        (variables, r"lack 'a/\w+', "),
        ({"params": plain}, r"lack 'a/\w+', "),
        (less, "lack 'b/bias', which the model has"),
        (MLP(rngs(), 12), r"have 'a/bias' of shape \(12,\), and the model that was bound \(16,\)"),
        (nnx.state(Longer(rngs()), nnx.Param), "have 'c/bias', which the model that was bound has not"),
        (Longer(rngs()), r"another model.*: '\.' is .*Longer, and was .*MLP; bind the method again"),
    ]
    for params, match in cases:
        with pytest.raises(ValueError, match=match):
            peft.apply(params, adapter, X)
    with pytest.raises(ValueError, match=r"variables of Linen: give the tree in 'params'"):
        peft.apply({"params": plain}, adapter, X)
    other = MLP(rngs(), 12)
    for call in (lambda: peft.init(jax.random.key(0), other), lambda: peft.merge(other, adapter)):
        with pytest.raises(ValueError, match=r"'a/kernel' of shape \(8, 12\), and this Peft was bound to \(8, 16\)"):
            call()
    for call in (lambda: peft.init(jax.random.key(0), variables), lambda: peft.merge(variables, adapter)):
        with pytest.raises(ValueError, match=r"params lack 'a/kernel'"):
            call()


def test_models_of_the_other_kind_are_refused(tmp_path):
    model, peft, adapter = bound()
    linen = nn.Sequential([nn.Dense(8), jnp.tanh])
    params = linen.init(jax.random.key(0), X)["params"]
    theirs = LORA.bind(linen, params, X)
    for call in (
        lambda: LORA.bind(linen, model, X),
        lambda: theirs.apply(model, theirs.init(jax.random.key(0), params), X),
        lambda: theirs.init(jax.random.key(0), model),
    ):
        with pytest.raises(TypeError, match=r"params must be a tree of mappings, got MLP"):
            call()
    with pytest.raises(TypeError, match=r"attach takes a nnx.Module"):
        jpeft.nnx.attach(linen, LORA, X, rngs=rngs())
    with pytest.raises(TypeError, match=r"attach takes a nnx.Module"):
        jpeft.nnx.attach(model, LORA, X, rngs=jax.random.key(0))
    with pytest.raises(TypeError, match=r"bound to a Sequential"):
        jpeft.nnx.attach(model, theirs, rngs=rngs())
    for first in (model, nnx.state(model, nnx.Param), nnx.to_pure_dict(nnx.state(model)), {"params": params}):
        with pytest.raises(TypeError, match=r"has its parameters"):
            LORA.bind(model, first, X)
    with pytest.raises(ValueError, match=r"params are not those"):
        jpeft.save(tmp_path / "adapter", peft, adapter, params)
    assert not list(tmp_path.iterdir())


# --- the model changes between bind and the call ---


def test_a_module_runs_in_its_own_mode_with_its_own_state():
    model, peft, adapter = Net(rngs()), *bound(Net)[1:]
    params, fresh = nnx.state(model, nnx.Param), jax.tree.map(jnp.copy, other_state(model))
    model.norm.mean[...] = jnp.ones(16)
    moving = [peft.apply(given, adapter, X, mutable=True)[1] for given in (model, nnx.state(model), params)]
    assert [bool(rest["norm"]["mean"].get_value().min() > 0.9) for rest in moving] == [True, True, False]
    model.eval()
    want = peft.merge(model, adapter)(X)
    close(peft.apply(model, adapter, X), want)
    close(jax.jit(peft.apply)(model, adapter, X), want)
    assert differ(peft.apply(model, adapter, X, rest=fresh), want)
    assert differ(peft.apply(nnx.state(model), adapter, X), want)  # a state has no mode: that which was bound
    tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=adapter)
    close(tuned(X), want)


def test_a_module_that_was_changed_is_refused_where_it_differs():
    _, peft, adapter = bound()

    def changed(change):
        model = MLP(rngs())
        change(model)
        return model

    class Other(nnx.Linear):
        pass

    cases = [
        (lambda m: setattr(m, "c", nnx.Linear(8, 8, rngs=rngs())), "'c' is .*Linear, and was no module"),
        (lambda m: delattr(m, "b"), "'b' is no module, and was .*Linear"),
        (lambda m: setattr(m, "b", Other(16, 8, rngs=rngs())), "'b' is .*Other, and was .*Linear"),
        (lambda m: setattr(m.a, "bias", nnx.Param(jnp.ones(3))), r"'a/bias' of shape \(3,\)"),
        (lambda m: setattr(m.a, "bias", None), "lack 'a/bias'"),
        (lambda m: setattr(m.a, "more", nnx.Param(jnp.ones(3))), "have 'a/more', which"),
    ]
    for change, match in cases:
        model = changed(change)
        with pytest.raises(ValueError, match=match):
            peft.apply(model, adapter, X)
        with pytest.raises(ValueError, match=match):
            jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=adapter)


def test_a_method_that_was_not_bound_computes_with_the_changed_weights():
    for method in (LORA, jpeft.methods.VeRA(rank=4, targets=r".*"), jpeft.DoRA(rank=2, targets=r".*")):
        model = MLP(rngs())
        peft = method.bind(model, X)
        assert {site.via for site in peft.sites} == {"fused"}
        adapter = moved(peft, model)
        want = peft.merge(model, adapter)(X)
        close(jax.jit(functools.partial(peft.apply, method="raw"))(model, adapter, X), want)
        tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=adapter)
        close(nnx.jit(lambda m, x: m.raw(x))(tuned, X), want)
        close(tuned(X), want)
        assert tuned.a.kernel is vars(tuned.a)["kernel"]  # outside of a call, it is the base's


def test_other_methods_and_modes_are_named():
    model, peft, adapter = bound(Net)
    params, rest = nnx.state(model, nnx.Param), other_state(model)
    close(peft.apply(params, adapter, X, method=Net.__call__), peft.apply(params, adapter, X))
    with pytest.raises(ValueError, match=r"Net has no method 'decode'"):
        peft.apply(params, adapter, X, method="decode")
    with pytest.raises(TypeError, match=r"mutable must be True, .* got 'batch_stats'"):
        peft.apply(params, adapter, X, mutable="batch_stats")
    bad = [
        ({}, ValueError, "rest lacks 'drop/rngs/count'"),
        (nnx.state(model, nnx.BatchStat), ValueError, "rest lacks 'drop/rngs/count'"),
        (nnx.state(model), ValueError, "rest has 'a/bias', which the model has not as other state"),
        (3, TypeError, "rest must be other state"),
    ]
    for given, error, match in bad:
        with pytest.raises(error, match=match):
            peft.apply(params, adapter, X, rest=given)
    for given in (rest, nnx.to_pure_dict(rest), model, peft.apply(params, adapter, X, rest=rest, mutable=True)[1]):
        assert peft.apply(params, adapter, X, rest=given).shape == X.shape


def test_keys_of_dropout():
    model = MLP(rngs())
    peft = jpeft.LoRA(rank=2, targets=r".*", dropout=0.5).bind(model, X)
    adapter = moved(peft, model)
    still, key = peft.apply(model, adapter, X), jax.random.key(0)
    for given in (key, {"dropout": key}, jax.random.PRNGKey(0), nnx.Rngs(0), nnx.Rngs(dropout=0)):
        assert differ(peft.apply(model, adapter, X, rngs=given), still)
    for given in (0, {"dropout": 0}, "key", np.zeros(3), nnx.Rngs(0).dropout):
        with pytest.raises(TypeError, match=r"rngs must be a nnx.Rngs, a PRNG key or {'dropout': key}, got"):
            peft.apply(model, adapter, X, rngs=given)


class Noisy(MLP):
    def __call__(self, x, *, rngs):
        return super().__call__(x) + jax.random.normal(rngs.noise(), x.shape)


def test_a_model_gets_rngs_if_it_has_such_an_argument():
    model = Noisy(rngs())
    peft = LORA.bind(model, X, rngs=nnx.Rngs(noise=0))
    adapter = moved(peft, model)
    merged = peft.merge(model, adapter)
    close(peft.apply(model, adapter, X, rngs=nnx.Rngs(noise=1)), merged(X, rngs=nnx.Rngs(noise=1)))


# --- arrays that are gone ---


def test_donated_arrays_are_named():
    model, (_, peft, adapter) = MLP(rngs()), bound()
    tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs())
    for x in jax.tree.leaves(nnx.state(tuned, jpeft.nnx.AdapterParam)):
        x.delete()  # as donating them does: the adapter is the copy's own
    assert model(X).shape == X.shape
    for x in jax.tree.leaves(nnx.state(tuned)):
        if not x.is_deleted():
            x.delete()
    calls = [
        lambda: peft.apply(model, adapter, X),
        lambda: peft.merge(model, adapter),
        lambda: peft.init(jax.random.key(0), nnx.state(model, nnx.Param)),
        lambda: jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=adapter),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"array of 'a/bias' was deleted, such as by donating .*attach"):
            call()


# --- twice, and over LoRA of others ---


def test_an_adapter_goes_into_a_plain_model_alone():
    model, peft, adapter = bound()
    tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=adapter)
    for call in (
        lambda: jpeft.nnx.attach(tuned, peft, rngs=rngs()),
        lambda: LORA.bind(tuned, X),
        lambda: peft.apply(tuned, adapter, X),
        lambda: peft.merge(tuned, adapter),  # would apply it twice
        lambda: jpeft.quantize(tuned, "nf4", model, X, block=8),
    ):
        with pytest.raises(ValueError, match=r"MLP holds an adapter already; take it out with peft.detach"):
            call()
    again, _ = jpeft.nnx.attach(peft.detach(tuned), peft, rngs=rngs(), adapter=adapter)
    np.testing.assert_array_equal(again(X), tuned(X))
    for other in (jpeft.DoRA(rank=2, targets=r".*"), jpeft.LoRA(rank=3, targets=r".*")):
        for take in (other.bind(model, X).adapter, other.bind(model, X).detach):
            with pytest.raises(ValueError, match=r"MLP has no leaf 'a/"):
                take(tuned)
    with pytest.raises(ValueError, match=r"no leaf 'a/lora_a'"):
        peft.detach(peft.detach(tuned))


def test_lora_layers_of_nnx_are_parameters_of_the_base():
    model = One(nnx.LoRALinear(8, 8, lora_rank=2, rngs=rngs()))
    model.layer.lora.lora_b[...] = jnp.ones((2, 8))
    peft = jpeft.LoRA(rank=2, targets=r"layer/kernel").bind(model, X)
    adapter = moved(peft, model)
    tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=adapter)
    close(tuned(X), peft.merge(model, adapter)(X))
    assert differ(tuned(X), model(X))
    assert len(jax.tree.leaves(nnx.state(tuned, jpeft.nnx.AdapterParam))) == 2
    plain = peft.detach(tuned)
    assert type(plain.layer.lora.lora_a) is nnx.LoRAParam
    np.testing.assert_array_equal(plain(X), model(X))


# --- classes ---


class Slotted:
    __slots__ = ("unused",)


class WithSlots(MLP, Slotted):
    pass


class Meta(type(nnx.Module)):
    made: typing.ClassVar = []

    def __new__(mcs, name, bases, body, *, tag, **kwargs):
        cls = super().__new__(mcs, name, bases, body, **kwargs)
        mcs.made.append(cls)
        cls.tag = tag
        return cls

    def __init__(cls, name, bases, body, *, tag, **kwargs):
        super().__init__(name, bases, body, **kwargs)


class WithMeta(MLP, metaclass=Meta, tag="mine"):
    def __call__(self, x):
        assert type(self).tag == "mine"
        return super().__call__(x)


class Registered(MLP):
    registry: typing.ClassVar = {}

    def __init_subclass__(cls, *, key, **kwargs):
        super().__init_subclass__(**kwargs)
        if key in cls.registry:
            raise ValueError("registered twice")
        cls.registry[key] = cls


class Entry(Registered, key="entry"):
    pass


class Forbidding(MLP):
    def __setattr__(self, name, value):
        if name not in ("a", "b"):
            raise AttributeError(f"{name} is no field")
        super().__setattr__(name, value)

    def __getattr__(self, name):
        return getattr(vars(self)["a"], name)


@dataclasses.dataclass
class Fields(nnx.Module):
    width: int
    rngs: dataclasses.InitVar[nnx.Rngs]

    def __post_init__(self, rngs):
        self.a = nnx.Linear(8, self.width, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.a(x))


@dataclasses.dataclass(frozen=True)
class Frozen(nnx.Module):
    inner: nnx.Linear

    def __call__(self, x):
        return jnp.tanh(self.inner(x))


T = typing.TypeVar("T")


class Generic(MLP, typing.Generic[T]):
    pass


class NoPytree(MLP, pytree=False):
    pass


class Various(nnx.Module):
    def __init__(self, rngs):
        self._a, self.jpeft = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.lora_a, self.config = nnx.Linear(8, 8, rngs=rngs), {"scale": 2.0}

    @property
    def a(self):
        return self._a

    @staticmethod
    def act(x):
        return jnp.tanh(x)

    @classmethod
    def name(cls):
        return cls.__name__

    @jax.named_scope("layers")
    def layers(self, x, /, *more, scale, **kwargs):
        assert not more and kwargs == {"deep": True} and self.name() == "Various"
        return self.lora_a(self.act(self.jpeft(self.act(self.a(x) * scale))))

    run = nnx.remat(lambda self, x: self.layers(x, scale=self.config["scale"], deep=True))
    __call__ = functools.partialmethod(lambda self, x, *, act: act(self.run(x)), act=jnp.tanh)


class Jitted(nnx.Linear):
    @nnx.jit
    def __call__(self, x):
        return super().__call__(x)


class Rematted(nnx.Linear):
    @nnx.remat
    def __call__(self, x):
        return x @ self.kernel[...]


class Cycle(MLP):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.me = self.a.parent = self


CLASSES = {
    **{cls.__name__: cls for cls in (WithSlots, WithMeta, Entry, Forbidding, Generic, NoPytree, Various, Cycle)},
    "Fields": lambda rngs: Fields(8, rngs),
    "Frozen": lambda rngs: Frozen(nnx.Linear(8, 8, rngs=rngs)),
    "Generic[int]": lambda rngs: Generic[int](rngs),
    "jit": lambda rngs: One(Jitted(8, 8, rngs=rngs)),
    "remat": lambda rngs: One(Rematted(8, 8, rngs=rngs)),
    "ToNNX": lambda rngs: One(nnx.bridge.ToNNX(nn.Dense(8), rngs=rngs).lazy_init(X)),
    "ToNNX alone": lambda rngs: nnx.bridge.ToNNX(nn.Sequential([nn.Dense(8), jnp.tanh]), rngs=rngs).lazy_init(X),
}


def snapshot(model):
    """What is of a model: classes, attributes, and the identity of its arrays and Variables."""
    flat = nnx.to_flat_state(nnx.state(model))
    modules = [(path, id(m), type(m), sorted(vars(m))) for path, m in nnx.iter_modules(model)]
    return nnx.graphdef(model), modules, [(path, id(v), id(v.get_raw_value())) for path, v in flat]


@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_every_kind(name):
    model = CLASSES[name](rngs())
    y = nnx.clone(model)(X)  # a call may move what the model draws from
    before, made, known = snapshot(model), list(Meta.made), dict(Registered.registry)
    peft = LORA.bind(model, X)
    adapter = moved(peft, model)
    merged = peft.merge(model, adapter)
    close(peft.apply(model, adapter, X), merged(X))
    assert differ(merged(X), y) and type(merged) is type(model)
    if name.startswith("ToNNX"):
        with pytest.raises(ValueError, match=r"as an attribute of its module"):
            jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=adapter)
    else:
        tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=adapter)
        close(nnx.jit(lambda m, x: m(x))(tuned, X), merged(X))
        assert isinstance(tuned, type(model)) and type(tuned).__name__ == type(model).__name__
        plain = peft.detach(tuned)
        assert type(plain) is type(model) and not differ(plain(X), y)
        for other in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
            np.testing.assert_array_equal(other(X), tuned(X))
    assert snapshot(model) == before and Meta.made == made and Registered.registry == known


def test_what_sites_share_is_merged_into_a_linen_module():
    model = nnx.bridge.ToNNX(nn.Sequential([nn.Dense(8), jnp.tanh]), rngs=rngs()).lazy_init(X)
    peft = jpeft.methods.VeRA(rank=4, targets=r".*").bind(model, X)
    adapter = moved(peft, model)
    close(peft.apply(model, adapter, X), peft.merge(model, adapter)(X))


def test_slots_and_local_classes_are_as_without_an_adapter():
    model = WithSlots(rngs())
    object.__setattr__(model, "unused", 1)
    assert not hasattr(jpeft.nnx.attach(model, LORA, X, rngs=rngs())[0], "unused")
    assert not hasattr(nnx.clone(model), "unused")

    class Local(MLP):
        pass

    tuned, peft = jpeft.nnx.attach(Local(rngs()), LORA, X, rngs=rngs())
    for given in (Local(rngs()), tuned, peft):
        with pytest.raises(AttributeError, match=r"local object"):
            pickle.dumps(given)


def test_copies():
    model, peft, adapter = bound()
    tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=adapter)
    for other in (copy.deepcopy(peft), pickle.loads(pickle.dumps(peft))):
        assert other == peft and hash(other) == hash(peft)
        np.testing.assert_array_equal(other.apply(model, adapter, X), peft.apply(model, adapter, X))
        same(other.adapter(tuned), adapter)
    np.testing.assert_array_equal(nnx.merge(*pickle.loads(pickle.dumps(nnx.split(tuned))))(X), tuned(X))
    assert copy.copy(tuned).a is tuned.a and type(copy.copy(tuned.a)) is type(tuned.a)
    state = nnx.state(nnx.clone(tuned))
    nnx.replace_by_pure_dict(state, jax.tree.map(lambda x: x * 2, nnx.to_pure_dict(state)))
    twice = nnx.clone(tuned)
    nnx.update(twice, state)
    same(peft.adapter(twice), jax.tree.map(lambda x: x * 2, adapter))
    close(nnx.cached_partial(nnx.jit(lambda m, x: m(x)), tuned)(X), tuned(X))
    assert "lora_a=AdapterParam(" in repr(tuned) and "jpeft_changes=<LoRA>" in repr(tuned)
    for plain, state in ((nnx.graphdef(model), nnx.state(tuned)), (nnx.graphdef(tuned), nnx.state(model))):
        with pytest.raises(ValueError, match=r"Incorrect number of leaves"):
            nnx.merge(plain, state)


@pytest.mark.filterwarnings("ignore")  # of orbax
def test_checkpoints(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    model, peft, adapter = bound()
    tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=adapter)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(tuned))
        checkpointer.wait_until_finished()
        other, _ = jpeft.nnx.attach(MLP(rngs(5)), peft, rngs=rngs(6))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.state(other))
        nnx.update(other, checkpointer.restore(tmp_path / "state", abstract))
    np.testing.assert_array_equal(other(X), tuned(X))


# --- what is shared, and how things are called ---


@pytest.mark.parametrize(
    ("make", "x"), [(lambda: Shared(rngs()), X), (lambda: Tied(rngs()), np.arange(6).reshape(2, 3))]
)
@pytest.mark.parametrize("method", [jpeft.LoRA(rank=2, targets="a"), jpeft.Train("a/kernel")])
def test_what_has_two_paths_changes_under_both(make, x, method):
    model = make()
    peft = method.bind(model, x)
    adapter = moved(peft, model)
    merged = peft.merge(model, adapter)
    tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=adapter)
    close(peft.apply(model, adapter, x), merged(x))
    close(tuned(x), merged(x))
    assert differ(merged(x), model(x)) and vars(merged.b)["kernel"] is vars(merged.a)["kernel"]
    assert vars(tuned.b)["kernel"] is vars(tuned.a)["kernel"]
    with pytest.raises(jpeft.TargetError, match=r"'b.*a"):  # it has the first of its paths
        dataclasses.replace(method, targets=method.targets.replace("a", "b", 1)).bind(model, x)


class Keyed(nnx.Module):
    def __init__(self, rngs, *keys):
        self.keys = keys
        self.layers = nnx.data({key: nnx.Linear(8, 8, rngs=rngs) for key in keys})
        if "x" in keys:
            self.layers["x"] = nnx.Dict({"y": self.layers["x"]})

    def __call__(self, x):
        for key in self.keys:
            x = jnp.tanh((self.layers[key]["y"] if key == "x" else self.layers[key])(x))
        return x


def test_keys_of_any_text(tmp_path):
    for keys in (("a/b", "a.b", "a b", "é" * 60, ""), (0, 1)):
        model = Keyed(rngs(), *keys)
        peft = LORA.bind(model, X)
        adapter = moved(peft, model)
        close(peft.apply(model, adapter, X), peft.merge(model, adapter)(X))
        jpeft.save(tmp_path / "adapter", peft, adapter, model)
        same(jpeft.load(tmp_path / "adapter", model, X)[1], adapter)
    with pytest.raises(ValueError, match=r"two parameters are called 'layers/x/y/bias'"):
        LORA.bind(Keyed(rngs(), "x", "x/y"), X)


class Holding(nnx.Module):
    def __init__(self, rngs):
        self.pair = nnx.data((nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)))
        self.raw = nnx.data({"w": nnx.Param(jnp.eye(8))})

    def __call__(self, x):
        return jnp.tanh(self.pair[1](jnp.tanh(self.pair[0](x))) @ self.raw["w"][...])


def test_containers_that_are_no_modules():
    model = Holding(rngs())
    peft = LORA.bind(model, X)
    adapter = moved(peft, model)
    close(peft.apply(model, adapter, X), peft.merge(model, adapter)(X))
    with pytest.raises(ValueError, match=r"'raw/w' is not read .*exclude=\['raw/w'\]"):
        jpeft.nnx.attach(model, peft, rngs=rngs())
    tuned, own = jpeft.nnx.attach(model, dataclasses.replace(LORA, exclude="raw/w"), X, rngs=rngs())
    close(tuned(X), own.apply(model, own.adapter(tuned), X))
    with pytest.raises(ValueError, match=r"'raw/w' is in no module but in a tuple or a dict"):
        jpeft.nnx.attach(model, jpeft.Train("raw/w"), X, rngs=rngs())


class Odd(MLP):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.ids, self.none = nnx.Param(jnp.arange(8)), nnx.Param(jnp.zeros((0, 8)))
        self.scale, self.table = nnx.Param(jnp.float32(2)), nnx.Param(jnp.ones((8, 8), jnp.int8))

    def __call__(self, x):
        x = x + self.ids[...].astype(x.dtype) + self.none[...].sum() + x @ self.table[...].astype(x.dtype)
        return super().__call__(x) * self.scale[...]


def test_values_of_every_kind():
    model = Odd(rngs())
    with pytest.raises(ValueError, match=r"'table' is int8, .* exclude=\['table'\]"):
        LORA.bind(model, X)
    for method in (jpeft.Train("scale"), jpeft.Train("none"), jpeft.LoRA(rank=2, targets=r"a|b")):
        peft = method.bind(model, X)
        adapter = moved(peft, model)
        tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=adapter)
        close(tuned(X), peft.merge(model, adapter)(X))
    bad = jax.tree.map(lambda x: x.at[0, 0].set(jnp.nan), adapter)
    with pytest.raises(MergeError, match=r"'a/kernel' cannot be merged: the adapter's 'a/lora_"):
        peft.merge(model, bad)
    model.b.kernel[...] = model.b.kernel[...].at[0, 0].set(jnp.inf)
    with pytest.raises(MergeError, match=r"'b/kernel' cannot be merged: the base's 'b/kernel' holds NaN or infinity"):
        peft.merge(model, adapter)


class Raising(Net):
    fails: typing.ClassVar = False

    def __call__(self, x):
        self.seen = getattr(self, "seen", 0) + 1  # an attribute that the call sets
        y = super().__call__(x)
        if Raising.fails:
            raise RuntimeError("inside of the model")
        return y


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_model_is_changed(fails, tmp_path, monkeypatch):
    model = Raising(rngs())
    peft = LORA.bind(model, X)
    adapter = moved(peft, model)
    tuned, _ = jpeft.nnx.attach(model, peft, rngs=rngs(), adapter=adapter)
    eva = jpeft.LoRA(rank=2, targets=r".*", init_weights="eva")

    def loss_fn(adapter, params, batch, rng):
        return (peft.apply(params, adapter, batch) ** 2).mean(), {}

    runs = [  # what runs the model
        lambda: LORA.bind(model, X),
        lambda: peft.apply(model, adapter, X, mutable=True),
        lambda: jax.jit(peft.apply)(model, adapter, X),
        lambda: peft.module(model, adapter)(X),
        lambda: jpeft.nnx.attach(model, LORA, X, rngs=rngs())[0](X),
        lambda: jpeft.quantize(model, "nf4", model, X, block=8)(X),
        lambda: jpeft.observe(eva, model, nnx.state(model, nnx.Param), loss_fn, [X]),
        lambda: tuned(X),
    ]
    others = [
        lambda: peft.init(jax.random.key(0), model),
        lambda: peft.merge(model, adapter),
        lambda: jpeft.save(tmp_path / "adapter", peft, adapter, model),
        lambda: peft.detach(tuned),
    ]
    monkeypatch.setattr(Raising, "fails", fails)
    before = snapshot(model)
    for number, call in enumerate(runs + others):
        if fails and number < len(runs):
            with pytest.raises(RuntimeError, match=r"inside of the model"):
                call()
        else:
            call()
        assert snapshot(model) == before, number
    detached = peft.detach(tuned)
    for other in (tuned, detached, peft.merge(model, adapter), peft.module(model, adapter)):
        nnx.update(other, jax.tree.map(lambda x: x * 0, nnx.state(other, nnx.Param)))
    assert snapshot(model) == before and flatten(adapter)[("a", "lora_a")].any()


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.MultiHeadDotProductAttention(2, name="attention")(x, x), None


class LinenLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(LinenLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


def test_one_prefix_is_not_shared_by_layers_whose_calls_are_not_seen():
    x = jnp.ones((2, 3, 8))
    model = One(nnx.bridge.ToNNX(LinenLayers(), rngs=rngs()).lazy_init(x))
    with pytest.raises(ValueError, match="it lies in a loop over layers, of which the calls are not seen"):
        jpeft.PrefixTuning(length=2).bind(model, x)
