"""LoftQ: a quantized base and a LoRA adapter that compensates its rounding errors, fitted together.

Li et al. 2023, https://arxiv.org/abs/2310.08659.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from jpeft.core import fingerprint
from jpeft.core.actions import Action, acts_on, init_leaves
from jpeft.core.peft import Peft
from jpeft.core.quantized import Quantized, requantize_leaf
from jpeft.core.sites import map_axes, stack_back, stack_first
from jpeft.core.targets import Targets
from jpeft.core.tree import Tree, flatten, join, like, split_variables, unflatten
from jpeft.frontends import as_tree
from jpeft.methods.families.starts import RANDOM
from jpeft.methods.lora import LoRA
from jpeft.quantization.tree import quantize


def loftq(
    peft: Peft,
    params: Tree,
    key: jax.Array,
    scheme: str = "nf4",
    *,
    block: int = 64,
    double: bool = True,
    targets: Targets = None,
    exclude: Targets = None,
    iterations: int = 1,
) -> tuple[Any, Any]:
    """A quantized base Q and a LoRA adapter with Q + s A B close to the original weights W.

    Each iteration quantizes W - s A B to Q, then sets A and B to the best approximation of W - Q of their rank. In
    layers of a stack that the method does not act on, Q is W rounded. The adapter is valid for this base alone; the
    base's fingerprint enforces it.

    Args:
      peft: LoRA bound to the model and ``params``. It is valid for the quantized base too.
      params: the base tree in full precision.
      key: for the adapter leaves at weights that are not quantized.
      scheme: as for `jpeft.quantize`.
      block: as for `jpeft.quantize`.
      double: as for `jpeft.quantize`.
      targets: as for `jpeft.quantize`.
      exclude: as for `jpeft.quantize`.
      iterations: 1 is the default of the paper's code and of HuggingFace PEFT; more come closer.

    Returns:
      ``(base, adapter)``, for ``peft.apply(base, adapter, ...)``.

    Raises:
      ValueError: as `jpeft.quantize`; fewer than one iteration; a quantized weight with anything but one LoRA, or one
        with a start from the weight or from data.

    >>> # base, adapter = loftq(peft, params, jax.random.key(0), "nf4", iterations=4)
    """
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be a whole number, at least 1, got {iterations!r}")
    _check_starts(peft)
    params, restore = as_tree(params)
    own, _ = split_variables(params)
    quantized = quantize(own, scheme, peft, block=block, double=double, targets=targets, exclude=exclude)
    base, full, adapter = flatten(quantized), flatten(meta.unbox(own)), flatten(meta.unbox(peft.init(key, params)))
    done = set()
    for action in peft.actions:
        path = action.site.weight_path
        if action.site.kind != "weight" or not isinstance(base.get(path), Quantized):
            continue
        if not isinstance(action.method, LoRA) or not action.mergeable or path in done:
            given = "two methods" if path in done else action.method.name
            raise ValueError(f"LoftQ needs exactly one LoRA at each quantized weight; {join(path)!r} has {given}")
        done.add(path)
        base[path], leaves = _fit(action, full[path], base[path], iterations)
        adapter |= {action.leaf_path(name): leaf for name, leaf in leaves.items()}
    new = like(unflatten(base), own)
    laid = peft.place_like_base(adapter, base)
    base_tree = new if own is params else like({**params, "params": new}, params)
    return restore(base_tree), like(unflatten(laid), own)


def _check_starts(peft: Peft) -> None:
    for action in peft.actions:
        if isinstance(action.method, LoRA) and action.method.init_weights not in RANDOM:
            raise ValueError(
                f"LoftQ computes A and B itself, but {action.method.name} at {action.site.name!r} has init_weights="
                f"{action.method.init_weights!r}; use 'kaiming'"
            )


@functools.partial(jax.jit, static_argnums=(0, 3))
def _fit(action: Action, w: Any, box: Quantized, iterations: int) -> tuple[Quantized, dict[str, jax.Array]]:
    """The quantized weight and the leaves, in their stored layout."""
    site, method = action.site, action.method
    geom, depth = site.geometry, len(site.stack)
    assert geom is not None

    def view(w: jax.Array) -> jax.Array:
        return map_axes(geom.view, depth)(stack_first(w, site.stack))

    def unview(m: jax.Array) -> jax.Array:
        return stack_back(map_axes(geom.unview, depth)(m), site.stack)

    rank, wide = method.rank, w.astype(jnp.float32)
    acts = jnp.asarray(acts_on(site), jnp.float32)[..., None, None]  # in other layers, A and B stay zero
    rest, a, b = wide, None, None
    for _ in range(iterations):
        box = requantize_leaf(box, rest.astype(box.dtype))
        u, s, vt = jnp.linalg.svd(view(wide - box.unbox().astype(jnp.float32)), full_matrices=False)
        root = jnp.sqrt(s[..., :rank])
        a, b = acts * u[..., :rank] * root[..., None, :], acts * root[..., None] * vt[..., :rank, :]
        if (lacking := rank - root.shape[-1]) > 0:  # the matrix has a smaller rank
            none = [(0, 0)] * (a.ndim - 2)
            a, b = jnp.pad(a, [*none, (0, 0), (0, lacking)]), jnp.pad(b, [*none, (0, lacking), (0, 0)])
        rest = wide - unview(a @ b)
    assert a is not None and b is not None
    # Neither the original weights nor other quantizations of them have this checksum: the adapter fits this base alone.
    sums = jnp.broadcast_to(fingerprint.checksum(box.unbox()), box.origin.shape)
    box = dataclasses.replace(box, origin=sums)
    leaves = {"lora_a": a.astype(method.dtype), "lora_b": (b / method.scale).astype(method.dtype)}
    # What else the method has, as DoRA's norms, fits the new weight.
    changed = box.unbox().astype(jnp.float32) + unview(a @ b)
    others = init_leaves(method, site, jax.random.key(0), changed)
    leaves = {name: stack_first(leaf, site.stack) for name, leaf in others.items()} | leaves
    return box, {name: stack_back(leaf, site.stack) for name, leaf in leaves.items()}
