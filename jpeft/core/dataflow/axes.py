"""The origin of every axis of every array of a program: a parameter's axis, the data, a broadcast, a vmap.

An axis is a product of factors (`jpeft.core.dataflow.factors`); the tag of a factor is its origin. Where arrays meet,
the stronger origin wins: a vmap is stronger than data, data than a parameter, that than state or a constant, and a
broadcast is weakest, as it says nothing of what it is multiplied with. What is not known is never guessed: it may be
anything but is weaker than data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from jpeft.core.dataflow.factors import Axes, Axis, Factor, joined, places_of, refined, reshape
from jpeft.core.dataflow.program import Atom, Node, Program, Value, shape_of

# Origins, from weak to strong.
REPEAT = "repeat"  # a broadcast
STATE = "state"  # a variable that is no parameter, or a constant
WEIGHT = "weight"  # an axis of a parameter
UNKNOWN = "unknown"  # one that is not followed, of an array with data or parameters in it
DATA = "data"  # an axis of an input
VMAP = "vmap"  # an axis that a vmap around a module adds
_STRENGTH = {REPEAT: 0, STATE: 1, WEIGHT: 2, UNKNOWN: 3, DATA: 4, VMAP: 5}


class Origins:
    """The axes of the arrays of a program and of all programs inside of it."""

    def __init__(self, program: Program, inputs: Sequence[str]):
        """Finds them.

        Args:
          program: the program.
          inputs: the origin of each of its inputs.
        """
        self.known: dict[Value, Axes] = {}
        pairs = zip(program.inputs, inputs, strict=True)
        _run(self, program, [plain(value.shape, origin) for value, origin in pairs])

    def of(self, atom: Atom) -> Axes:
        """The axes of an array."""
        if isinstance(atom, Value) and (axes := self.known.get(atom)) is not None:
            return axes
        return plain(shape_of(atom), STATE)


def plain(shape: Sequence[int], origin: str) -> Axes:
    """The axes of an array that all come from one place."""
    return tuple((Factor(origin, n),) for n in shape)


def strongest(axis: Iterable[Factor]) -> str:
    """The strongest origin in an axis; a broadcast's for one without any."""
    return max((f.tag for f in axis), key=_STRENGTH.__getitem__, default=REPEAT)


def join(*arrays: Axes) -> Axes:
    """The axes of arrays of one shape that meet."""
    return tuple(_join_axis(axes) for axes in zip(*arrays, strict=True))


def _join_axis(axes: Sequence[Axis]) -> Axis:
    first, *rest = axes
    if all(axis == first for axis in rest):
        return first
    sizes = [[f for f in axis if f.size > 1] for axis in axes]
    if not any(sizes):
        return (Factor(strongest([f for axis in axes for f in axis]), 1),)
    groups = refined(*axes)
    if groups is None:
        return (_unfollowed([f for axis in axes for f in axis], places_of(max(axes, key=places_of))),)
    made = [Factor(strongest(group), group[0].size) for group in groups]
    ones = [f for axis in axes for f in (axis[:1] if axis and axis[0].size == 1 else ())]
    return joined([*ones[:1], *made])


def _resized(axis: Axis, places: int) -> Axis:
    return axis if places_of(axis) == places else (_unfollowed(axis, places),)


def _unfollowed(factors: Sequence[Factor], places: int) -> Factor:
    """An axis that was made of some factors: which of its places are of which is not known."""
    origins = {f.tag for f in factors if f.size > 1} or {f.tag for f in factors}
    is_mixed = len(origins - {REPEAT, STATE}) > 1
    return Factor(UNKNOWN if is_mixed else strongest(factors), places)


# --- programs ---------------------------------------------------------------------------------------------------------


def _run(origins: Origins, program: Program, inputs: Sequence[Axes]) -> list[Axes]:
    """The axes of a program's outputs, from those of its inputs."""
    origins.known.update(zip(program.inputs, inputs, strict=True))
    for node in program.nodes:
        for value, axes in zip(node.outputs, _outputs(origins, node), strict=True):
            origins.known[value] = axes
    return [origins.of(atom) for atom in program.outputs]


def _outputs(origins: Origins, node: Node) -> Sequence[Axes]:
    if node.parts:
        return [origins.of(part) for part in node.parts]
    if node.bodies:
        return _BODIES.get(node.name, _once)(origins, node)
    inputs = [origins.of(atom) for atom in node.inputs]
    if node.name == "call_mark":
        _marked(origins, node)
        return [origins.of(atom) for atom in node.inputs]
    rule = _RULES.get(node.name)
    if rule is None:
        rule = _reduction if node.name.startswith(("reduce_", "arg")) and "axes" in node.params else _elementwise
    made = rule(node, inputs)
    return [made] * len(node.outputs) if isinstance(made, tuple) else made


def _marked(origins: Origins, node: Node) -> None:
    """The axes that vmaps around a module add to the arrays that it is called with."""
    for atom, dims in zip(node.inputs, node.params["batched"], strict=True):
        if isinstance(atom, Value) and dims:
            places = batch_axes(len(atom.shape), dims)
            axes = origins.of(atom)
            origins.known[atom] = tuple(
                (Factor(VMAP, atom.shape[i]),) if i in places else axis for i, axis in enumerate(axes)
            )


def batch_axes(ndim: int, dims: Sequence[int | None]) -> set[int]:
    """The axes that vmaps added to an array of so many axes in all, from where each did, innermost first."""
    rest = list(range(ndim))
    return {rest.pop(dim) for dim in reversed(dims) if dim is not None}


def _once(origins: Origins, node: Node) -> list[Axes]:
    return _run(origins, node.bodies[0], [origins.of(atom) for atom in node.inputs])


def _branches(origins: Origins, node: Node) -> list[Axes]:
    inputs = [origins.of(atom) for atom in node.inputs[1:]]
    return [join(*axes) for axes in zip(*(_run(origins, body, inputs) for body in node.bodies), strict=True)]


def _until_fixed(run: Callable[[list[Axes]], list[Axes]], carry: list[Axes], count: int) -> list[Axes]:
    while True:
        outputs = run(carry)
        new = [join(old, out) for old, out in zip(carry, outputs[:count], strict=True)]
        if new == carry:
            return outputs
        carry = new


def _while(origins: Origins, node: Node) -> list[Axes]:
    inputs = [origins.of(atom) for atom in node.inputs]
    skipped, consts = node.params["cond_nconsts"], node.params["body_nconsts"]
    own, carry = inputs[skipped : skipped + consts], inputs[skipped + consts :]
    return _until_fixed(lambda carry: _run(origins, node.bodies[0], [*own, *carry]), carry, len(carry))


def scan_counts(node: Node) -> tuple[int, int]:
    """The numbers of a scan's constants and of its carries.

    From the ranks, because the parameters that tell them differ between versions of JAX.
    """
    body = node.bodies[0]
    first = sum(len(own.shape) == len(shape_of(outer)) for own, outer in zip(body.inputs, node.inputs, strict=True))
    carries = sum(len(shape_of(own)) == len(outer.shape) for own, outer in zip(body.outputs, node.outputs, strict=True))
    return first - carries, carries


def _scan(origins: Origins, node: Node) -> list[Axes]:
    inputs = [origins.of(atom) for atom in node.inputs]
    consts, carries = scan_counts(node)
    xs = inputs[consts + carries :]
    leading = {strongest(axes[0]) for axes in xs}
    step = Factor(DATA if DATA in leading else STATE, node.params["length"])

    def run(carry: list[Axes]) -> list[Axes]:
        return _run(origins, node.bodies[0], [*inputs[:consts], *carry, *(axes[1:] for axes in xs)])

    outputs = _until_fixed(run, inputs[consts : consts + carries], carries)
    return [*outputs[:carries], *(((step,), *axes) for axes in outputs[carries:])]


_BODIES: Mapping[str, Callable[[Origins, Node], list[Axes]]] = {"scan": _scan, "while": _while, "cond": _branches}


# --- equations --------------------------------------------------------------------------------------------------------


def _elementwise(node: Node, inputs: Sequence[Axes]) -> list[Axes]:
    """The axes of each output: those of the operands of its shape; axes of one place are broadcast to others."""
    out = []
    for value in node.outputs:
        shape = value.shape
        same = [
            tuple(_broadcast(axis, n, m) for axis, n, m in zip(axes, own, shape, strict=True))
            for axes, own in zip(inputs, map(shape_of, node.inputs), strict=True)
            if len(own) == len(shape) and all(n in (1, m) for n, m in zip(own, shape, strict=True))
        ]
        out.append(join(*same) if same else plain(shape, _of_others(inputs)))
    return out


def _of_others(inputs: Sequence[Axes]) -> str:
    """The origin of an array of another shape than those that it is computed from."""
    origins = {strongest(axis) for axes in inputs for axis in axes}
    return STATE if origins <= {REPEAT, STATE} else UNKNOWN


def _broadcast(axis: Axis, old: int, new: int) -> Axis:
    return axis if old == new else (Factor(REPEAT, new),)


def _broadcast_in_dim(node: Node, inputs: Sequence[Axes]) -> Axes:
    shape, dims = node.params["shape"], node.params["broadcast_dimensions"]
    out: list[Axis] = [(Factor(REPEAT, n),) for n in shape]
    for axis, dim, own in zip(inputs[0], dims, shape_of(node.inputs[0]), strict=True):
        out[dim] = _broadcast(axis, own, shape[dim])
    return tuple(out)


def _transpose(node: Node, inputs: Sequence[Axes]) -> Axes:
    return tuple(inputs[0][i] for i in node.params["permutation"])


def _reshape(node: Node, inputs: Sequence[Axes]) -> Axes:
    shape = node.params["new_sizes"]
    return reshape(inputs[0], shape) or plain(shape, _of_others(inputs))


def _squeeze(node: Node, inputs: Sequence[Axes]) -> Axes:
    dropped = {d % len(inputs[0]) for d in node.params["dimensions"]}
    return tuple(axis for i, axis in enumerate(inputs[0]) if i not in dropped)


def _reduction(node: Node, inputs: Sequence[Axes]) -> Axes:
    return tuple(axis for i, axis in enumerate(inputs[0]) if i not in node.params["axes"])


def _resize(node: Node, inputs: Sequence[Axes]) -> list[Axes]:
    """An equation whose outputs have their operand's axes, of which some are longer or shorter."""
    return [tuple(map(_resized, inputs[0], value.shape)) for value in node.outputs]


def _update(node: Node, inputs: Sequence[Axes]) -> Axes:
    shape = shape_of(node.inputs[0])
    return join(inputs[0], tuple(map(_resized, inputs[1], shape)))


def _concatenate(node: Node, inputs: Sequence[Axes]) -> Axes:
    shape = node.outputs[0].shape
    return join(*(tuple(map(_resized, axes, shape)) for axes in inputs))


def _stack(node: Node, inputs: Sequence[Axes]) -> Axes:
    axis, own = node.params["axis"] % (len(inputs[0]) + 1), join(*inputs)
    return (*own[:axis], (Factor(STATE, len(inputs)),), *own[axis:])


def _unstack(node: Node, inputs: Sequence[Axes]) -> list[Axes]:
    axis = node.params["axis"] % len(inputs[0])
    return [(*inputs[0][:axis], *inputs[0][axis + 1 :])] * len(node.outputs)


def _tile(node: Node, inputs: Sequence[Axes]) -> Axes:
    reps = node.params["reps"]
    return tuple(
        axis if n == 1 else joined((Factor(REPEAT, n), *axis)) for n, axis in zip(reps, inputs[0], strict=True)
    )


def _dot(node: Node, inputs: Sequence[Axes]) -> Axes:
    (contracted, batch), (lhs, rhs) = node.params["dimension_numbers"], inputs[:2]
    shared = tuple(join((lhs[i],), (rhs[j],))[0] for i, j in zip(*batch, strict=True))
    free = [
        axis
        for own, axes in enumerate((lhs, rhs))
        for i, axis in enumerate(axes)
        if i not in contracted[own] and i not in batch[own]
    ]
    return (*shared, *free)


def _gather(node: Node, inputs: Sequence[Axes]) -> Axes:
    numbers, sizes, shape = node.params["dimension_numbers"], node.params["slice_sizes"], node.outputs[0].shape
    dropped = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
    taken = [_resized(axis, n) for i, (axis, n) in enumerate(zip(inputs[0], sizes, strict=True)) if i not in dropped]
    places, offsets = iter(inputs[1][:-1]), iter(taken)
    return tuple(next(offsets) if i in numbers.offset_dims else next(places) for i in range(len(shape)))


def _convolution(node: Node, inputs: Sequence[Axes]) -> Axes:
    numbers, shape = node.params["dimension_numbers"], node.outputs[0].shape
    out: list[Axis] = [()] * len(shape)
    batch, feature, *spatial = numbers.out_spec
    out[batch] = _resized(inputs[0][numbers.lhs_spec[0]], shape[batch])
    out[feature] = _resized(inputs[1][numbers.rhs_spec[0]], shape[feature])
    for own, place in zip(numbers.lhs_spec[2:], spatial, strict=True):
        out[place] = _resized(inputs[0][own], shape[place])
    return tuple(out)


def _first(node: Node, inputs: Sequence[Axes]) -> Axes:
    return inputs[0]


_RULES: Mapping[str, Callable[[Node, Sequence[Axes]], Axes | list[Axes]]] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "slice": _resize,
    "dynamic_slice": _resize,
    "split": _resize,
    "pad": _resize,
    "top_k": _resize,
    "dynamic_update_slice": _update,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
    "dot_general": _dot,
    "gather": _gather,
    "conv_general_dilated": _convolution,
    "scatter": _first,
    "scatter-add": _first,
    "scatter_add": _first,
}
