"""The uses of every parameter in a marked trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.extend.core import Literal
from jax.interpreters import partial_eval as pe

from jpeft.core.dataflow import marks
from jpeft.core.dataflow.jaxprs import INLINED, is_call, open_jaxpr
from jpeft.core.dataflow.marks import mark_p
from jpeft.core.dataflow.steps import product, step, taken
from jpeft.core.dataflow.views import DOT, OTHER, VMAPPED, Atom, Axis, Product, Use, View
from jpeft.core.tree import Path

# The views that an output passes through on its way to an output of the model.
_KEEPS_OUTPUT = frozenset({"convert_element_type", "reshape", "squeeze", "transpose", "sharding_constraint"})


@dataclass
class Flow:
    """The uses of all parameters in a trace.

    Attributes:
      uses: the uses of each parameter.
      transformed: scopes that see another value of a parameter than the stored one (`nn.map_variables`).
      returned: the calls whose output is an output of the model that nothing else consumes.
      slices: for each module, the axes that scans, vmaps and indices around its calls took off its parameters,
        outermost first, each as one of the axes that were left by then.
    """

    uses: dict[Path, list[Use]] = field(default_factory=dict)
    transformed: set[Path] = field(default_factory=set)
    returned: set[int] = field(default_factory=set)
    slices: dict[Path, tuple[int, ...]] = field(default_factory=dict)


def walk(jaxpr: Any, paths: Sequence[Path], scopes: Mapping[int, Path], *, indexed: bool = False) -> Flow:
    """The uses of parameters.

    Args:
      jaxpr: a jaxpr whose first inputs are the parameters.
      paths: path of each parameter.
      scopes: the path of the module of each call that `marks` bracket, by number.
      indexed: whether a parameter of which the module sees one place along an axis is a stack, as if a scan had taken
        the axis off. Otherwise it is another function of the parameter.
    """
    walker = _Walker(scopes, indexed)
    frame = _Frame(jaxpr, None, None)
    for path, var in zip(paths, jaxpr.invars, strict=False):
        frame.weights[var] = _Weight(path, View.of(var.aval.shape), var.aval.shape)
    walker.run(frame)
    return walker.flow


@dataclass(frozen=True)
class _Weight:
    """A variable that is a view of a parameter.

    Attributes:
      path: the parameter's path.
      view: the view.
      shape: the shape of what is viewed: the parameter as it is stored or, in a call of its module, as that sees it.
      calls: the calls of its module that all steps of the view lie in; None before the first step.
      sliced: the axes that scans and indices took off, outermost first.
    """

    path: Path
    view: View
    shape: tuple[int, ...]
    calls: tuple[int, ...] | None = None
    sliced: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Data:
    """A variable that is a view of a call's input, or of a product plus values that do not depend on it.

    Attributes:
      view: the view.
      call: the call whose input it is, or that the product lies in.
      use: the product.
    """

    view: View
    call: int | None
    use: Use | None = None


class _Frame:
    """A jaxpr that is walked, in the equation `eqn` of the frame around it."""

    def __init__(self, jaxpr: Any, outer: _Frame | None, eqn: Any):
        self.jaxpr, self.outer, self.eqn = jaxpr, outer, eqn
        self.weights: dict[Any, _Weight] = {}
        self.data: dict[Any, _Data] = {}
        self._consumers: dict[Any, list[Any]] | None = None
        self.wanted = [True] * len(jaxpr.outvars)  # whether an output of the model depends on an output
        if outer is not None and len(eqn.outvars) == len(jaxpr.outvars):
            self.wanted = [v in outer.live for v in eqn.outvars]
        self.live = _live(jaxpr, self.wanted)
        self.passed = {} if outer is None else _passed(eqn, jaxpr)

    def consumers(self, var: Any) -> list[Any]:
        """The equations that use a variable, without marks and without those that no output depends on."""
        if self._consumers is None:
            self._consumers = {}
            for eqn in self.jaxpr.eqns:
                if eqn.primitive is not mark_p and _is_live(eqn, self.live):
                    for v in _variables(eqn.invars):
                        self._consumers.setdefault(v, []).append(eqn)
        return self._consumers.get(var, [])

    def is_final(self, var: Any, adds: bool = False) -> bool:
        """Whether a variable only becomes an output of the model.

        Args:
          adds: whether a parameter may be added on the way: a bias.
        """
        for eqn in self.consumers(var):
            is_bias = adds and eqn.primitive.name == "add" and any(_is_in(v, self.weights) for v in eqn.invars)
            if not is_bias and eqn.primitive.name not in _KEEPS_OUTPUT:
                return False
            if not self.is_final(eqn.outvars[0], adds and not is_bias):
                return False
        places = [i for i, v in enumerate(self.jaxpr.outvars) if v is var]
        if not places or self.outer is None:
            return bool(places or self.consumers(var))
        if not is_call(self.eqn.primitive.name):
            return False
        return all(self.outer.is_final(self.eqn.outvars[i], adds) for i in places)


class _Walker:
    def __init__(self, scopes: Mapping[int, Path], indexed: bool):
        self.scopes, self.indexed, self.flow = scopes, indexed, Flow()
        self.open: list[tuple[int, int]] = []  # (call, level), outermost first
        self.level = 0
        self.pending: list[tuple[Use, _Frame, Any]] = []

    def run(self, frame: _Frame) -> None:
        self.walk(frame)
        for use, inner, var in self.pending:
            use.final = inner.is_final(var, adds=True)

    def walk(self, frame: _Frame) -> None:
        for eqn in frame.jaxpr.eqns:
            if eqn.primitive is mark_p:
                self.mark(frame, eqn)
            elif _is_live(eqn, frame.live):
                self.equation(frame, eqn)
        if frame.outer is not None and frame.eqn.primitive.name in INLINED:
            return
        for i, (var, wanted) in enumerate(zip(frame.jaxpr.outvars, frame.wanted, strict=True)):
            if wanted and i not in frame.passed and _is_in(var, frame.weights):
                self.use(frame, frame.weights[var], Product(OTHER, frame.weights[var].view), None)

    # --- marks ---

    def mark(self, frame: _Frame, eqn: Any) -> None:
        (var,), kind, call, dims = eqn.invars, eqn.params["kind"], eqn.params["call"], eqn.params["batched"]
        if kind == marks.ENTER:
            if (call, self.level) not in self.open:
                self.open.append((call, self.level))
            self.enter(frame, var, self.scopes[call], eqn.params["name"], dims)
        elif kind == marks.SCOPE:
            scope, path = eqn.params["name"]
            if (weight := frame.weights.get(var)) is not None and weight.path == path:
                self.slice(scope, weight, _unbatched(var.aval.shape, dims, "w"))
        elif kind == marks.INPUT:
            frame.data[var] = _Data(_unbatched(var.aval.shape, dims, "x"), call)
        elif kind == marks.OUTPUT:
            data = frame.data.get(var)
            if data is not None and data.use is not None and data.call == call:
                data.use.returned = data.view
            if frame.is_final(var):
                self.flow.returned.add(call)
        else:
            self.open = [entry for entry in self.open if entry[0] != call]

    def enter(self, frame: _Frame, var: Any, scope: Path, name: str, dims: tuple[int, ...]) -> None:
        """Checks that a module's own parameter is the stored one, and starts its views anew."""
        path, view = (*scope, name), _unbatched(var.aval.shape, dims, "w")
        stored = frame.weights.get(var)
        if stored is None or stored.path != path or not _is_whole(stored, view):
            self.flow.transformed.add(scope)
        else:
            frame.weights[var] = _Weight(path, view, view.without(VMAPPED).shape, sliced=stored.sliced)
            self.slice(scope, stored, view)

    def slice(self, scope: Path, weight: _Weight, seen: View) -> None:
        """Records what was taken off a parameter that is one of a module, or lies below it, as the module sees it."""
        pairs = zip(weight.view.axes, seen.axes, strict=True)
        vmapped = [atom.axis for axis, own in pairs if _is_vmapped(own) for atom in axis]
        axes = _relative((*weight.sliced, *vmapped))
        self.flow.slices[scope] = max(axes, self.flow.slices.get(scope, ()), key=len)

    # --- equations ---

    def equation(self, frame: _Frame, eqn: Any) -> None:
        weights = [(i, frame.weights[v]) for i, v in enumerate(eqn.invars) if _is_in(v, frame.weights)]
        inner = list(_jaxprs(eqn))
        if inner:
            passed = {i for _, operands in inner for i in operands}
            for i, weight in weights:
                if i not in passed:
                    self.use(frame, weight, Product(OTHER, weight.view), None)
            for sub, operands in inner:
                self.call(frame, eqn, sub, operands)
            return
        if len(weights) > 1:
            weights = self.of_parameters(frame, eqn, weights)
        if weights:
            self.weight(frame, eqn, *weights[0])
        self.values(frame, eqn)

    def of_parameters(self, frame: _Frame, eqn: Any, weights: list[tuple[int, _Weight]]) -> list[tuple[int, _Weight]]:
        """The parameter that an equation of several multiplies with the input of its call; the others are used by it.

        There is none if none of the others is that input: learned queries are, where a layer is called on them.
        """
        kept = []
        for i, weight in weights:
            calls, data = self.calls_of(weight), frame.data.get(eqn.invars[1 - i]) if len(eqn.invars) == 2 else None
            if not kept and data is not None and data.use is None and calls and data.call == calls[-1]:
                kept = [(i, weight)]
            else:
                self.use(frame, weight, Product(OTHER, weight.view), None)
        return kept

    def weight(self, frame: _Frame, eqn: Any, index: int, weight: _Weight) -> None:
        """A step of a view of a parameter, or a use of it."""
        if self.indexed and index == 0 and not self.calls_of(weight) and self.index(frame, eqn, weight):
            return
        views = step(eqn, weight.view) if index == 0 else (None,)
        seen = [view for view in views if view is not None]
        if len(seen) == len(views):
            calls = self.calls_of(weight)
            for var, view in zip(eqn.outvars, seen, strict=True):
                frame.weights[var] = dataclasses.replace(weight, view=view, calls=calls)
            return
        found = product(eqn, index, weight.view)
        use = self.use(frame, weight, found, eqn.invars[1 - index] if found.kind == DOT else None)
        if found.kind != OTHER and use.call is not None:
            frame.data[eqn.outvars[0]] = _Data(_output_view(eqn, use), use.call, use)
            self.pending.append((use, frame, eqn.outvars[0]))

    def index(self, frame: _Frame, eqn: Any, weight: _Weight) -> bool:
        """Whether an equation outside of the calls of a parameter's module takes places of an axis, or the axis off."""
        view, axis = taken(eqn, weight.view) or (None, ())
        if eqn.primitive.name == "squeeze":
            dims = [d % len(weight.view.axes) for d in eqn.params["dimensions"]]
            view, axis = weight.view.squeeze(dims), tuple(a.axis for d in dims for a in weight.view.axes[d])
        if view is None:
            return False
        sliced = (*weight.sliced, *axis)
        frame.weights[eqn.outvars[0]] = dataclasses.replace(weight, view=view, calls=(), sliced=sliced)
        return True

    def use(self, frame: _Frame, weight: _Weight, found: Product, operand: Any) -> Use:
        """Records a use."""
        calls = self.calls_of(weight)
        use = Use(found, calls[-1] if calls else None)
        data = frame.data.get(operand) if operand is not None and not isinstance(operand, Literal) else None
        if data is not None and data.use is None and data.call == use.call:
            use.operand = data.view
        self.flow.uses.setdefault(weight.path, []).append(use)
        return use

    def calls_of(self, weight: _Weight) -> tuple[int, ...]:
        """The open calls of a parameter's module, at this level, that all steps of its view so far lie in."""
        owner = weight.path[:-1]
        here = tuple(c for c, level in self.open if level == self.level and self.scopes[c] == owner)
        return here if weight.calls is None else tuple(c for c in here if c in weight.calls)

    def values(self, frame: _Frame, eqn: Any) -> None:
        """A step of a view of an input or of a product."""
        known = [(i, frame.data[v]) for i, v in enumerate(eqn.invars) if _is_in(v, frame.data)]
        name = eqn.primitive.name
        if name in ("add", "add_any", "sub") and known:
            products = [(i, d) for i, d in known if d.use is not None and (i == 0 or name != "sub")]
            # The sum of a product with itself is another function of it.
            if len(products) == 1 and eqn.invars[0] is not eqn.invars[1]:
                data = products[0][1]
                if eqn.outvars[0].aval.shape == eqn.invars[products[0][0]].aval.shape:
                    frame.data[eqn.outvars[0]] = data
        elif len(known) == 1 and known[0][0] == 0 and not any(_is_in(v, frame.weights) for v in eqn.invars):
            data = known[0][1]
            for var, view in zip(eqn.outvars, step(eqn, data.view), strict=True):
                if view is not None:
                    frame.data[var] = dataclasses.replace(data, view=view)

    def call(self, frame: _Frame, eqn: Any, jaxpr: Any, operands: Sequence[int | None]) -> None:
        """An equation that runs a jaxpr: a jitted function, a scan, a branch."""
        inlined, scanned = eqn.primitive.name in INLINED, _num_scanned(eqn)
        inner = _Frame(jaxpr, frame, eqn)
        for var, i in zip(jaxpr.invars, operands, strict=True):
            outer = eqn.invars[i] if i is not None else None
            if outer is None or isinstance(outer, Literal):
                continue
            if inlined and outer in frame.data:
                inner.data[var] = frame.data[outer]
            if outer in frame.weights:
                weight = frame.weights[outer]
                if scanned is not None and i is not None and i >= scanned:
                    first, *axes = weight.view.axes
                    sliced = (*weight.sliced, *(atom.axis for atom in first[:1]))
                    weight = dataclasses.replace(weight, view=View(tuple(axes), weight.view.fixed), sliced=sliced)
                if inlined:
                    inner.weights[var] = weight
                elif _is_stored(weight.view):
                    inner.weights[var] = dataclasses.replace(weight, calls=None)
                else:
                    self.use(frame, weight, Product(OTHER, weight.view), None)
        if not inlined:
            self.level += 1
        opened = len(self.open)
        self.walk(inner)
        if not inlined:
            self.level -= 1
            del self.open[opened:]
            for output, operand in inner.passed.items():
                if _is_in(eqn.invars[operand], frame.weights):
                    frame.weights[eqn.outvars[output]] = frame.weights[eqn.invars[operand]]
            return
        for outer, var in zip(eqn.outvars, jaxpr.outvars, strict=True):
            if _is_in(var, inner.weights):
                frame.weights[outer] = inner.weights[var]
            if _is_in(var, inner.data):
                frame.data[outer] = inner.data[var]


def _live(jaxpr: Any, wanted: Sequence[bool]) -> set[Any]:
    """The variables of a jaxpr that those of its outputs depend on that are ``wanted``."""
    live = {v for v, is_wanted in zip(jaxpr.outvars, wanted, strict=True) if is_wanted and not isinstance(v, Literal)}
    for eqn in reversed(jaxpr.eqns):
        if eqn.primitive is not mark_p and _is_live(eqn, live):
            live.update(_variables(eqn.invars))
    return live


def _passed(eqn: Any, jaxpr: Any) -> dict[int, int]:
    """The outputs of a call that are operands as they are, with the operand: functions of states return all of them."""
    name, inputs = eqn.primitive.name, {v: k for k, v in enumerate(jaxpr.invars)}
    same = {i: inputs[v] for i, v in enumerate(jaxpr.outvars) if not isinstance(v, Literal) and v in inputs}
    if name in INLINED or not same:
        return {}
    if name == "scan":
        first, carries = _scanned(eqn)
        return {i: k for i, k in same.items() if (k >= first if i >= carries else k == first - carries + i)}
    return same if is_call(name) and len(jaxpr.invars) == len(eqn.invars) else {}


def _is_live(eqn: Any, live: set[Any]) -> bool:
    return bool(eqn.effects) or any(v in live for v in eqn.outvars)


def _variables(atoms: Sequence[Any]) -> Iterator[Any]:
    return (v for v in atoms if not isinstance(v, Literal))


def _is_in(atom: Any, known: Mapping[Any, Any]) -> bool:
    return not isinstance(atom, Literal) and atom in known


def _output_view(eqn: Any, use: Use) -> View:
    """The output of a product: for a dot with a known operand as atoms of both, else as its own."""
    if use.product.kind == DOT and use.operand is not None:
        return use.output()
    return View.of(eqn.outvars[0].aval.shape, "y")


def _unbatched(shape: Sequence[int], dims: Sequence[int], source: str) -> View:
    """The view of an array as a module sees it, from its shape outside of the vmaps around the module."""
    axes: list[int | None] = list(range(len(shape)))
    for dim in reversed(dims):  # outermost first
        axes.pop(dim)
    own = View.of([shape[i] for i in axes if i is not None], source)
    numbers = {axis: i for i, axis in enumerate(axes)}
    views = []
    for i, size in enumerate(shape):
        if i in numbers:
            views.append(own.axes[numbers[i]])
        else:
            views.append((Atom(VMAPPED, i, 1, size),) if size != 1 else ())
    return View(tuple(views))


def _is_stored(view: View) -> bool:
    """Whether a view only orders the axes of the parameter, or leaves out some."""
    whole = all(len(axis) <= 1 and all(atom.stride == 1 for atom in axis) for axis in view.axes)
    return whole and not view.fixed and not view.flipped


def _is_vmapped(axis: Axis) -> bool:
    return any(atom.source == VMAPPED for atom in axis)


def _relative(axes: Sequence[int]) -> tuple[int, ...]:
    """Axes that are taken off one after the other, each as one of those that are left by then.

    >>> _relative((1, 0, 2))
    (1, 0, 0)
    """
    return tuple(axis - sum(other < axis for other in axes[:i]) for i, axis in enumerate(axes))


def _is_whole(stored: _Weight, seen: View) -> bool:
    """Whether a module sees a parameter without stacked axes, in the order in which it is stored."""
    if not _is_stored(stored.view) or stored.view.shape != seen.shape:
        return False
    pairs = zip(stored.view.axes, seen.axes, strict=True)
    kept = [mine for mine, theirs in pairs if not any(a.source != "w" for a in theirs)]
    atoms = [axis[0] for axis in kept if axis]
    places = [atom.axis for atom in atoms]
    return places == sorted(places) and all(atom.size == stored.shape[atom.axis] for atom in atoms)


def _num_scanned(eqn: Any) -> int | None:
    """For a scan, the index of the first operand that is sliced."""
    if eqn.primitive.name != "scan":
        return None
    return _scanned(eqn)[0]


def _scanned(eqn: Any) -> tuple[int, int]:
    """The index of the first operand that a scan slices, and the number of its carries.

    From the ranks, because the parameters that tell it differ between versions of JAX: a carry has the same rank
    outside, what is sliced or returned by a step has an axis more.
    """
    jaxpr = eqn.params["jaxpr"].jaxpr
    first = sum(own.aval.ndim == outer.aval.ndim for own, outer in zip(jaxpr.invars, eqn.invars, strict=True))
    return first, sum(own.aval.ndim == outer.aval.ndim for own, outer in zip(jaxpr.outvars, eqn.outvars, strict=True))


def _jaxprs(eqn: Any) -> Iterator[tuple[Any, Sequence[int | None]]]:
    """The jaxprs that a call runs, with the index of the operand that each of their inputs is.

    An input that changes from one pass of a loop to the next has None. An equation that is no call, such as a scatter,
    has none: what its operands hold is used by itself.
    """
    name, n, p = eqn.primitive.name, len(eqn.invars), eqn.params
    if name == "while":
        cond, body = p["cond_nconsts"], p["body_nconsts"]
        carry = [None] * (n - cond - body)
        yield p["cond_jaxpr"].jaxpr, [*range(cond), *carry]
        yield p["body_jaxpr"].jaxpr, [*range(cond, cond + body), *carry]
    elif name == "scan":
        jaxpr, (last, carries) = p["jaxpr"].jaxpr, _scanned(eqn)
        yield jaxpr, [None if last - carries <= i < last else i for i in range(n)]
    elif name == "cond":
        for branch in p["branches"]:
            yield branch.jaxpr, list(range(1, n))
    elif is_call(name):
        for value in p.values():
            jaxpr = open_jaxpr(value)
            if jaxpr is not None and len(jaxpr.invars) == n:
                yield jaxpr, list(range(n))


def unused(trial: Any, plain: Any, paths: Collection[Path]) -> set[Path]:
    """Those of some parameters that the outputs of a trial do not depend on; none if it computes another program.

    Args:
      trial: a jaxpr whose last inputs are the parameters.
      plain: the jaxpr of the same call without them.
      paths: the path of each parameter.
    """
    if primitives(trial) != primitives(plain):
        return set()
    _, used = pe.dce_jaxpr(trial, [True] * len(trial.outvars))
    return {path for path, is_used in zip(paths, used[-len(paths) :], strict=True) if not is_used}


def primitives(jaxpr: Any) -> list[str]:
    """The names of all primitives that the outputs of a jaxpr depend on, in their order."""

    def names(jaxpr: Any) -> Iterator[str]:
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name
            for value in eqn.params.values():
                for part in value if isinstance(value, (tuple, list)) else (value,):
                    if (inner := open_jaxpr(part)) is not None:
                        yield from names(inner)

    return list(names(pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]))
