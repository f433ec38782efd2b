"""Base classes of methods. A method is a frozen dataclass: its configuration, and a few short functions of one site.

Subclass `WeightMethod` for a method that changes a weight: it is written for one matrix ``[in, out]``, and the core
maps it over scans, experts, heads and convolutions. Subclass `OutputMethod` for a method that changes a module's
output, `AttentionMethod` for one that adds keys and values, and `LeafMethod` for one that trains copies of base leaves.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Float, Key

from jpeft.checks import POSITIVE_INT, Rule, is_int, shown
from jpeft.core.method import Attend, Inputs, Leaves, Linear, ModuleContext, Project, widened
from jpeft.core.sites import BOX, MERGE, HiddenAttention, Site, Survey
from jpeft.core.targets import (
    ALL_LINEAR,
    Matched,
    TargetError,
    Targets,
    compile_pattern,
    count_matches,
    matches_entry,
    select,
)
from jpeft.methods.spelling import InitSignature, check_names, check_protocol, no_field

if TYPE_CHECKING:
    from jpeft.core.interchange import HFSpec, Role
    from jpeft.core.peft import Peft


LAYERS = "layers"  # in `overrides`, beside the fields that a site may have


@dataclass(frozen=True, kw_only=True)
class Method:
    """The base class of all methods.

    Attributes:
      targets: the sites to act on, see `jpeft.core.targets`; None for the method's default.
      exclude: the sites to leave out, even if ``targets`` matches them.
      overrides: fields by target pattern, e.g. ``{r".*/query": {"rank": 16}}``; the first pattern that matches applies.
        Of a weight or module that a scan stacks, ``{"layers": [0, 2]}`` are the layers to act on.

    A subclass may set these class attributes; ``non_trainable``, ``regenerated`` and ``observes`` may be properties:

    - ``roles``: for each leaf, the roles of its axes ("in", "out" or None), for leaves that are sharded like weights.
    - ``non_trainable``: names of the leaves, at a site or shared, that never train; they may be integers.
    - ``regenerated``: names of the non-trainable leaves that `init` and `shared` give back bit for bit from the
      configuration alone, whatever the key. `jpeft.save` leaves them out.
    - ``uncast``: names of the leaves that `apply` gets as they are, or as `expand` gives them, not in the dtype of the
      computation.
    - ``reads_context``: whether `apply` reads the arguments of the model's own call, ``base.context``.
    - ``arguments``: names of arguments that the model's call takes under the method, beside its own. The model does not
      get them; methods that read the context do.
    - ``observes``: the statistic of the data that `init` takes, "covariance" or "gradient", see `jpeft.observe`; None
      for a start that needs no data.
    - ``penalty_reduction``: how `Peft.penalty` combines the terms of all matrices, "sum" or "mean".
    - ``inert``: names of the fields that do not matter to what a trained adapter does, such as those of its start.
    - ``resizable``: names of the fields that may be larger than those of an adapter: a rank, if zeros in place of the
      leaves that it adds change nothing. `jpeft.stack` then takes adapters of any smaller rank.
    - ``rescaled``: names of the fields that differ from those of an adapter by `factors` on its leaves alone.
    - ``neutral``: the number under which the method changes nothing at a site, if all its leaves there are it. None, if
      there is no such number: where it shall not act, its output is then not taken.
    - ``per_site``: names of the fields that ``overrides`` may set.
    - ``rules``: what its fields may be, by name: a predicate and its description, beside those of its base classes. A
      field ``dtype`` is checked and becomes a name in any case.
    - ``learning_rate``: the peak learning rate of `jpeft finetune` where none is given.
    - ``family``, ``paper``: the kind of method, and its paper's address, for the table of methods.
    - ``hf``: its form in HuggingFace PEFT folders, see `jpeft.core.interchange`. Not inherited.
    """

    targets: Targets = None
    exclude: Targets = None
    overrides: Mapping[str, Mapping[str, Any]] = FrozenDict()

    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {}
    non_trainable: ClassVar[frozenset[str]] = frozenset()
    regenerated: ClassVar[frozenset[str]] = frozenset()
    reads_context: ClassVar[bool] = False
    observes: ClassVar[str | None] = None
    uncast: ClassVar[frozenset[str]] = frozenset()
    per_site: ClassVar[tuple[str, ...]] = ()
    learning_rate: ClassVar[float] = 5e-4
    penalty_reduction: ClassVar[str] = "sum"
    inert: ClassVar[frozenset[str]] = frozenset({
        "targets", "exclude", "overrides", "dropout", "dtype", "init_weights", "init_std", "init_options", "init_ids",
    })  # fmt: skip
    resizable: ClassVar[frozenset[str]] = frozenset()
    rescaled: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[float | None] = None
    family: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    rules: ClassVar[Mapping[str, Rule]] = {}
    hf: ClassVar[HFSpec | Role | None] = None
    arguments: ClassVar[tuple[str, ...]] = ()
    parameters: ClassVar[Mapping[str, Sequence[str] | None]] = {}  # see `jpeft.methods.spelling.check_protocol`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_protocol(cls, cls.parameters)

    if not TYPE_CHECKING:  # type checkers and editors read the fields of each method

        def __new__(cls, *args: Any, **kwargs: Any) -> Method:
            check_names(cls, kwargs)
            return super().__new__(cls)

        __signature__ = InitSignature()

    def __post_init__(self) -> None:
        if "dtype" in (field.name for field in dataclasses.fields(self)):
            object.__setattr__(self, "dtype", dtype_name(getattr(self, "dtype")))  # noqa: B009
        for cls in reversed(type(self).__mro__):
            check_fields(self, vars(cls).get("rules", {}))
        for name in ("targets", "exclude"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                object.__setattr__(self, name, tuple(value))
        given: Any = self.overrides
        if not isinstance(given, Mapping) or not all(isinstance(fields, Mapping) for fields in given.values()):
            raise ValueError(
                f"{self.name}.overrides must have a mapping of fields for each target pattern, as in "
                f"{{'.*/query': {{'rank': 16}}}}, got {shown(given)}"
            )
        overrides = FrozenDict({k: FrozenDict(_with_tuple(v)) for k, v in given.items()})
        object.__setattr__(self, "overrides", overrides)
        for pattern, fields in overrides.items():
            compile_pattern(pattern)
            known = [field.name for field in dataclasses.fields(self)]
            _check_layers(self.name, pattern, fields.get(LAYERS))
            for field in fields.keys() - {LAYERS}:
                if field not in known:
                    raise TypeError(f"overrides[{pattern!r}]: {no_field(type(self), field, self.per_site)}")
                if field not in self.per_site:
                    raise ValueError(
                        f"{self.name}: overrides[{pattern!r}] sets {field!r}, which cannot differ per site; per-site "
                        f"fields: {', '.join(self.per_site) or 'none'}"
                    )
            try:
                self._replaced(dict(fields))  # checks the values
            except ValueError as error:
                raise ValueError(f"{self.name}: overrides[{pattern!r}]: {error}") from error

    # --- what a subclass may define -----------------------------------------------------------------------------

    def candidates(self, survey: Survey) -> Sequence[Site]:
        """The sites of a model that this method can act on."""
        return survey.weights

    def default_targets(self) -> Targets:
        """The targets where ``targets`` is None."""
        return ALL_LINEAR

    def prepare(self, site: Site) -> Site:
        """The site as this method sees it.

        Raises:
          ValueError: the method cannot act on the site.
        """
        return site

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        """Fresh leaves at a site.

        Args:
          key: a PRNG key.
          site: the site; for a weight, ``site.inputs`` and ``site.outputs`` are the sizes of the matrix.
          w: the base weight as ``[in, out]``; for a "leaf" site, the leaf; None for an output or attention.
        """
        return {}

    def shared(self, key: Key[Array, ""], sites: Sequence[Site]) -> Leaves:
        """Fresh leaves that all sites share. They lie at the adapter's root, under the method's name, held once."""
        return {}

    def expand(self, site: Site, shared: Leaves, leaves: Leaves) -> Leaves:
        """The leaves that `apply` and `merge` take, computed from shared leaves and those at a site.

        It runs where the leaves are used, for one layer and one matrix at a time. Floating leaves arrive in at least
        float32, so that norms, solves and decompositions need no care; `apply` gets the result in the dtype of the
        computation, `merge` as it is.
        """
        return leaves

    def trains(self, leaf: str) -> bool:
        """Whether a leaf ever trains; by default all but the ``non_trainable``."""
        return leaf not in self.non_trainable

    def mergeable(self, site: Site) -> bool:
        """Whether what the method does at a site can be merged into the base's leaves."""
        return True

    def enter(self, inputs: Inputs) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The arguments of the model's own call as the model gets them, and what methods at sites find in the context.

        It runs once, before the outermost call of the model, whichever of its methods that is.

        Args:
          inputs: the call. See `jpeft.core.method.Inputs`.
        """
        return inputs.arguments, {}

    def leave(self, output: Any, context: Mapping[str, Any]) -> Any:
        """The output of the model's own call as the caller gets it; ``context`` is that which `enter` returned."""
        return output

    def virtual_tokens(self) -> int:
        """The number of positions that the method adds to every sequence, and to a cache of keys and values."""
        return 0

    def check(self, site: Site, leaves: Leaves) -> None:
        """Checks the leaves of one matrix that were read from a file, as numpy arrays; their shapes fit already.

        Raises:
          ValueError: they are none that the method can use.
        """

    def penalty(self, leaves: Leaves) -> Float[Array, ""] | float:
        """The method's own term of the loss, for one matrix. See `Peft.penalty`."""
        return 0.0

    def factors(self, other: Any) -> Mapping[str, float]:
        """The factors on leaves, by name, under which it does what ``other`` does with them.

        ``other`` is of its class, and differs from it at most in fields that are ``inert``, ``resizable`` or
        ``rescaled``.
        """
        return {}

    def columns(self) -> Mapping[str, str]:
        """The method's own columns in `Peft.summary`; by default its ``rank``, if it has such a field."""
        rank = getattr(self, "rank", None)
        return {} if rank is None else {"rank": str(rank)}

    @property
    def identity_at_init(self) -> bool:
        """Whether a fresh adapter leaves the model's outputs unchanged."""
        return True

    @property
    def input_dropout(self) -> float:
        """The rate at which ``apply`` drops entries of its input; by default its field ``dropout``, or 0.0."""
        return getattr(self, "dropout", 0.0)

    @property
    def draws(self) -> bool:
        """Whether ``apply`` draws random numbers while the caller trains: by dropout or `Linear.sampled`."""
        return self.input_dropout > 0.0

    # --- what the core calls ------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The class's name, used in messages and configurations."""
        return type(self).__name__

    @property
    def slug(self) -> str:
        """The name in snake case: the key of shared leaves in the adapter."""
        return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", self.name).lower()

    @property
    def checks(self) -> bool:
        """Whether a subclass defines `check`."""
        return type(self).check is not Method.check

    @property
    def enters(self) -> bool:
        """Whether a subclass defines `enter`."""
        return type(self).enter is not Method.enter

    @property
    def expands(self) -> bool:
        """Whether a subclass defines `expand`."""
        return type(self).expand is not Method.expand

    @property
    def penalized(self) -> bool:
        """Whether a subclass defines `penalty`."""
        return type(self).penalty is not Method.penalty

    def sites(self, survey: Survey) -> list[Site]:
        """The sites of a model that the method acts on.

        Raises:
          TargetError: a target or an override matches nothing.
          ValueError: the method cannot act on a site.
        """
        chosen = self._select(self.candidates(survey), survey)
        for pattern in self.overrides:
            if not any(override_matches(pattern, site) for site in chosen):
                names = ", ".join(s.name for s in chosen[:8])
                raise TargetError(f"{self.name}: overrides pattern {pattern!r} matches none of its sites: {names}")
        return [self._on_layers(self.at(s).prepare(s), s) for s in chosen]

    def _select(self, candidates: Sequence[Any], survey: Survey) -> list[Any]:
        """The candidates that its targets match and ``exclude`` does not."""
        targets = self.default_targets() if self.targets is None else self.targets
        return select(candidates, targets, self.exclude, what=self.name, others=survey.names)

    def _on_layers(self, prepared: Site, site: Site) -> Site:
        """A site as the method sees it, with the layers that the overrides give."""
        if (layers := self.fields_at(site).get(LAYERS)) is None:
            return prepared
        count = site.stack[0][1] if site.stack and site.kind != "leaf" else 0
        if max(layers) >= count:
            what = f"has {count} layers" if count else "is no weight or module that a scan stacks"
            raise ValueError(f"{self.name}: overrides give {site.name!r} the layers {list(layers)}, but it {what}")
        return dataclasses.replace(prepared, layers=layers)

    def matched(self, survey: Survey, sites: Sequence[Site]) -> list[Matched]:
        """The number of sites that each entry of its targets matched.

        Args:
          survey: the candidates.
          sites: those that it acts on, from `sites`.
        """
        candidates = self.candidates(survey)
        targets = self.default_targets() if self.targets is None else self.targets
        found = count_matches(candidates, targets, "targets")
        if self.targets is None:
            found = [entry._replace(entry=f"{entry.entry} (the default)") for entry in found]
        applied = [next((p for p in self.overrides if override_matches(p, site)), None) for site in sites]
        overridden = [Matched("overrides", repr(pattern), applied.count(pattern)) for pattern in self.overrides]
        return found + count_matches(candidates, self.exclude, "exclude") + overridden

    def at(self, site: Site) -> Method:
        """The method with the overrides for a site applied."""
        return self if not self.overrides else self._replaced(dict(self.fields_at(site)))

    def fields_at(self, site: Site) -> Mapping[str, Any]:
        """The fields that the overrides set at a site, the layers among them."""
        return next((fields for pattern, fields in self.overrides.items() if override_matches(pattern, site)), {})

    def _replaced(self, fields: dict[str, Any]) -> Any:
        fields = {name: value for name, value in fields.items() if name != LAYERS}
        return dataclasses.replace(self, **{**fields, "overrides": FrozenDict()})

    def bind(self, model: Any, /, *inputs: Any, **kwargs: Any) -> Peft:
        """Finds the method's sites in a model by one abstract call, and returns the bound `Peft`.

        Args:
          model: a Linen or NNX module; it is not changed.
          *inputs: for a Linen module, its parameters or all its variables ``{"params": ..., "batch_stats": ...}``, and
            then what the model is called with, as for ``model.apply``. An NNX module has its parameters: only what it
            is called with. Arrays may be ``jax.ShapeDtypeStruct``.
          **kwargs: as for ``model.apply``; for an NNX module, as for its call, and ``method``, another method's name.

        Raises:
          TargetError: a target matches nothing.
          ValueError: the method cannot act on a site, or ``params`` do not fit the model.

        >>> import flax.linen as nn, jax, jax.numpy as jnp, jpeft
        >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]), jnp.ones((1, 4))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> peft = jpeft.LoRA(rank=2, targets="layers_0").bind(model, params, x)
        >>> [site.name for site in peft.sites]
        ['layers_0']
        """
        from jpeft.binding import bind

        return bind(self, model, *inputs, **kwargs)

    def bind_function(self, fn: Any, params: Any, /, *inputs: Any, **kwargs: Any) -> Peft:
        """Binds the method to a plain function of parameters: an Equinox module, a Haiku transform, one of your own.

        Its weights are merged before it runs, which costs a product of the size of each, and `summary` says so. Targets
        match the paths of the parameters.

        Args:
          fn: ``fn(params, *inputs)``.
          params: any pytree of arrays.
          *inputs: what the function is called with; arrays may be ``jax.ShapeDtypeStruct``. A trace then shows which
            axes of a weight are its inputs. Without inputs, they are the last but one.
          **kwargs: as for the call.

        Raises:
          TargetError: a target matches nothing.
          ValueError: the method cannot be merged, or cannot act on a weight.

        >>> import jax, jax.numpy as jnp, jpeft
        >>> def fn(params, x):
        ...     return jnp.tanh(x @ params["w"].T) @ params["v"]
        >>> params, x = {"w": jnp.ones((8, 4)), "v": jnp.ones((8, 2))}, jnp.ones((3, 4))
        >>> peft = jpeft.LoRA(rank=2, targets="w").bind_function(fn, params, x)
        >>> adapter = peft.init(jax.random.key(0), params)
        >>> peft.apply(params, adapter, x).shape, peft.sites[0].inputs
        ((3, 2), 4)
        """
        from jpeft.binding import bind_survey
        from jpeft.function import FunctionFrontEnd

        frontend = FunctionFrontEnd()
        return bind_survey(self, fn, params, frontend.survey(fn, params, inputs, kwargs), frontend)

    def methods(self) -> tuple[Method, ...]:
        """The members of a chain; for another method, the method itself."""
        return (self,)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values. Inverse of `jpeft.methods.from_dict`."""
        out: dict[str, Any] = {"method": self.name}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if callable(value):
                raise ValueError(
                    f"{self.name}.{field.name} is a function, which has no JSON form; give patterns instead"
                )
            out[field.name] = json.loads(json.dumps(value, default=_jsonable))
        return out


def _jsonable(value: Any) -> Any:
    """A dict for a ``FrozenDict``."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} has no JSON form")


def _with_tuple(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an override, whose layers may be a list."""
    return {k: tuple(v) if k == LAYERS and isinstance(v, list) else v for k, v in fields.items()}


def _check_layers(name: str, pattern: str, layers: Any) -> None:
    good = isinstance(layers, tuple) and layers and all(is_int(i) and i >= 0 for i in layers)
    if layers is not None and not (good and len(set(layers)) == len(layers)):
        raise ValueError(f"{name}: overrides[{pattern!r}] sets layers, which must be indices, got {shown(layers)}")


def override_matches(pattern: str, site: Site) -> bool:
    """Whether a pattern of ``overrides`` means a site."""
    return any(compile_pattern(pattern).fullmatch(n) or matches_entry(pattern, n) for n in site.names)


@dataclass(frozen=True, kw_only=True)
class WeightMethod(Method):
    """The base class of methods that change a weight.

    A subclass defines ``init``, ``merge`` and, if there is a cheaper form than the product with the merged weight,
    ``apply``. A method that cannot be merged at a site, such as a bias that is added where the module has none, says
    so in ``mergeable``.

    Attributes:
      parts: number of equal blocks of the outputs of a fused weight (q, k and v in one); each block has its own leaves.
        Usually set per site: ``overrides={r".*/qkv": {"parts": 3}}``.
    """

    parts: int = 1

    per_site: ClassVar[tuple[str, ...]] = ("parts",)
    rules: ClassVar[Mapping[str, Rule]] = {"parts": POSITIVE_INT}

    def prepare(self, site: Site) -> Site:
        if not jnp.issubdtype(jnp.dtype(site.dtype), jnp.floating):
            raise ValueError(
                f"{self.name}: the weight of {site.name!r} is {site.dtype}, and only a floating one can be changed; "
                f"leave it out with exclude=[{site.name!r}]"
            )
        if self.input_dropout and site.via in (BOX, MERGE):
            raise ValueError(
                f"{self.name}: dropout acts on a module's input, but {site.name!r} is reached only as a weight (path "
                f"taken: {site.via}); set overrides={{{site.name!r}: {{'dropout': 0.0}}}}"
            )
        return site.split(self.parts)

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        """The outputs for ``x: [tokens..., in]``. By default, the product with the merged weight.

        ``x`` may also be what stands for one-hot rows or for the patches of an image, `Lookup` and `Patches`, which are
        multiplied by a matrix alone; for these, `WeightMethod.apply` is always right.
        """
        return base.merged(x)

    def merge(
        self, leaves: Leaves, w: Float[Array, "in out"], b: Float[Array, " out"] | None
    ) -> tuple[Float[Array, "in out"], Float[Array, " out"] | None]:
        """The merged weight and bias. ``b`` is None where the module has none."""
        raise TypeError(f"{self.name} does not define merge")


@dataclass(frozen=True, kw_only=True)
class OutputMethod(Method):
    """The base class of methods that change a module's output ``[..., features]``.

    Of a module that returns several arrays, in tuples or mappings, it is the first floating one, the least nested one:
    ``y`` in ``(y, cache)`` and in ``(cache, y)``. A subclass defines ``init``, and ``apply`` or ``change``.
    """

    parameters: ClassVar[Mapping[str, Sequence[str] | None]] = {
        "apply": ("leaves", "x", "y", "context"), "change": ("leaves", "x", "y", "context"),
        "add": ("change", "x", "y", "context"),
    }  # fmt: skip

    def mergeable(self, site: Site) -> bool:
        return False

    def candidates(self, survey: Survey) -> Sequence[Site]:
        return survey.outputs

    @property
    def feeds(self) -> bool:
        """Whether `feed` changes anything."""
        return type(self).feed is not OutputMethod.feed

    def feed(self, leaves: Leaves, inputs: tuple[Array, ...], context: ModuleContext) -> tuple[Array, ...]:
        """The floating arrays among a module's arguments, in their order, as the module gets them.

        It runs before the module, which cannot run again then; `apply` runs after it.
        """
        return inputs

    def apply(
        self, leaves: Leaves, x: Any, y: Float[Array, "*tokens features"], context: ModuleContext
    ) -> Float[Array, "*tokens features"]:
        """The changed output.

        Args:
          leaves: the leaves, in the output's dtype.
          x: the module's input: the first floating array of its arguments or, without one, the first array.
          y: its output.
          context: the arguments of the model's call by name, for a method that ``reads_context``, see
            `jpeft.core.method.Linear.context`; and functions for dropout and to run the module again, see
            `jpeft.core.method.ModuleContext`.
        """
        if type(self).change is OutputMethod.change:
            raise TypeError(f"{self.name} defines neither apply nor change")
        return self.add(self.change(leaves, x, y, context), x, y, context)[1]

    def change(
        self, leaves: Leaves, x: Any, y: Float[Array, "*tokens features"], context: ModuleContext
    ) -> Float[Array, "*tokens features"]:
        """The method's term: by default the difference. Compositions add terms up. Arguments as for `apply`."""
        return self.apply(leaves, x, y, context) - y

    def add(
        self,
        change: Float[Array, "*tokens features"],
        x: Any,
        y: Float[Array, "*tokens features"],
        context: ModuleContext,
    ) -> tuple[Any, Float[Array, "*tokens features"]]:
        """The module's input and output for what comes after, when a change has been added."""
        return x, y + change


@dataclass(frozen=True, kw_only=True)
class AttentionMethod(Method):
    """The base class of methods that change an attention, after any position encoding of its queries and keys.

    A subclass defines ``init`` and ``attend``. The model needs no registration: the attention is found in the trace of
    a module's call. See `jpeft.register_attention` for one that is hidden in a kernel.
    """

    parameters: ClassVar[Mapping[str, Sequence[str] | None]] = {
        "attend": ("leaves", "attend", "query", "key", "value", "mask", "project"), "apply": None,
    }  # fmt: skip

    def mergeable(self, site: Site) -> bool:
        return False

    def candidates(self, survey: Survey) -> Sequence[Site]:
        return survey.attentions

    def default_targets(self) -> Targets:
        return r".*"

    def _select(self, candidates: Sequence[Any], survey: Survey) -> list[Any]:
        # Of modules that only have the name of an attention, those are told that targets name, or all if there is none.
        told = [h for h in survey.hidden_attentions if h.seen or self.targets is not None or not survey.attentions]
        if not candidates and not told:
            raise TargetError(
                f"{self.name} acts on attentions, and the trace of this model's call shows none: no softmax over keys "
                f"between products with keys and with values. If a module attends in another way, move{_REGISTER}"
                "(TheModule)"
            )
        chosen = super()._select([*candidates, *told], survey)
        if missed := [site for site in chosen if isinstance(site, HiddenAttention)]:
            raise TargetError(_hidden(self.name, missed, len(survey.attentions)))
        return chosen

    def attend(
        self, leaves: Leaves, attend: Attend, query: Array, key: Array, value: Array, mask: Any, project: Project
    ) -> Array:
        """The attention's output ``[..., queries, heads, value_dim]``, before the module's output projection.

        Args:
          leaves: the leaves, in the dtype of the keys.
          attend: the original operation; ``attend(query, key, value, mask)`` is its output.
          query: ``[..., queries, heads, key_dim]``.
          key: ``[..., keys, kv_heads, key_dim]``; with a cache, those of earlier calls too.
          value: ``[..., keys, kv_heads, value_dim]``.
          mask: boolean, broadcasts to ``[..., heads, queries, keys]``, or None. It is given on to ``attend`` as it is:
            in a foreign module, what hides keys is not known, and None.
          project: the module's own projections of other states.
        """
        raise TypeError(f"{self.name} does not define attend")


def _hidden(name: str, missed: Sequence[HiddenAttention], others: int) -> str:
    """The error for attentions that a method cannot act on."""
    found = "".join(f"\n  {h.name or 'the model itself'!r} ({h.owner}): {h.reason}" for h in missed)
    hint = "leave them out with exclude=[...] or, to reach them, move" if others else "Move"
    return (
        f"{name} cannot act on {len(missed)} of {len(missed) + others} attentions:{found}\n{hint}{_REGISTER}"
        f"({missed[0].owner})"
    )


_REGISTER = (
    " the attention into a method of its module, and register that:\n"
    "  def attend(self, query, key, value, mask): ...\n  jpeft.register_attention"
)


@dataclass(frozen=True, kw_only=True)
class LeafMethod(Method):
    """The base class of methods whose adapter leaves replace base leaves, and start as copies of them.

    Copies of floating leaves are at least float32, since narrower ones would round small updates away. The model gets
    them in the base's dtype.
    """

    def candidates(self, survey: Survey) -> Sequence[Site]:
        return survey.leaves

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        wide = widened(w.dtype) if jnp.issubdtype(w.dtype, jnp.floating) else w.dtype
        # A copy, since donating the training state would delete the base's own buffer.
        return {"": jnp.array(w, wide, copy=True)}


def dtype_name(dtype: Any) -> str:
    """The name of a floating dtype, for configurations in JSON.

    >>> dtype_name(jnp.bfloat16)
    'bfloat16'
    """
    try:
        if dtype is None:  # float64 in numpy
            raise TypeError
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise ValueError(
            f"dtype {dtype!r} is unknown; give a floating dtype, such as 'float32' or 'bfloat16'"
        ) from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"adapter leaves must be floating, got dtype {dtype.name!r}")
    return dtype.name


def check_fields(method: Method, rules: Mapping[str, Rule]) -> None:
    """Checks fields of a method.

    Raises:
      ValueError: a field breaks its rule.
    """
    for field, (accepts, expected) in rules.items():
        value = getattr(method, field)
        try:
            accepted = accepts(value)
        except TypeError:  # e.g. a comparison with a string
            accepted = False
        if not accepted:
            raise ValueError(f"{method.name}.{field} must be {expected}, got {shown(value)}")


def normal(key: Key[Array, ""], shape: tuple[int, ...], std: float, dtype: str) -> Array:
    """Normal numbers. They are drawn in float32, so that all dtypes start from the same numbers."""
    return (jax.random.normal(key, shape, jnp.float32) * float(std)).astype(dtype)
