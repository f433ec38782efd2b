"""The PRNG keys of an adapter's dropout, which lie in the modules of the copy of a model."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jpeft.core.operation import Dropout, no_dropout
from jpeft.core.sites import Site, stack_back
from jpeft.core.tree import join
from jpeft.nnx.state import modules, raw

_DROPPING = (nnx.Dropout, nnx.MultiHeadAttention)
KEY = "jpeft_dropout"  # the attribute of a module that holds the data of its key
RNGS = "jpeft_rngs"  # the attribute of the root from which the keys of each call are drawn


def key_data(key: Any, site: Site) -> jax.Array:
    """The data of the keys of one site, stacked as its leaves are."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    key = jax.random.fold_in(key, zlib.crc32(site.name.encode()))
    bits = jax.random.bits(key, (*(n for _, n in site.stack), 2), jnp.uint32)
    return stack_back(bits, site.stack)


def draw(root: Any, site_of: Callable[[Any], Site]) -> None:
    """Draws new keys for the modules that train, from the root's generator."""
    rngs = vars(root).get(RNGS)
    training = list(_training(root)) if rngs is not None else []
    if rngs is not None and training:
        key = rngs.dropout()
        for module in training:
            vars(module)[KEY].set_raw_value(key_data(key, site_of(module)))


def reseed(model: Any, rngs: Any) -> None:
    """Gives the generators of a model of one's own new keys.

    Args:
      model: the model.
      rngs: keys by the name of a stream; or one for "dropout", which is also for the layers that drop from a stream of
        another name, such as that of ``nnx.Rngs(0)``.
    """
    keys = rngs if isinstance(rngs, Mapping) else {"dropout": rngs}
    droppers = {id(s) for _, m in modules(model) if isinstance(m, _DROPPING) for s in vars(m).values()}
    for path, stream in nnx.iter_graph(model):
        if not isinstance(stream, nnx.RngStream):
            continue
        key = keys.get(stream.key.tag, keys.get("dropout") if id(stream) in droppers else None)
        if key is not None:
            key = jax.random.fold_in(key, zlib.crc32(join(tuple(map(str, path))).encode()))
            shape = stream.key.shape
            stream.key.set_value(jax.random.split(key, shape) if shape else key)
            stream.count.set_value(jnp.zeros(shape, jnp.uint32))


def _training(root: Any) -> Iterator[Any]:
    return (m for _, m in modules(root) if KEY in vars(m) and vars(m).get("deterministic") is not True)


def dropout(module: Any, draws: bool) -> Dropout:
    """Random numbers, as of dropout: off without a key, and in a module that is set to evaluate."""
    key = vars(module).get(KEY)
    if not draws or key is None or vars(module).get("deterministic") is True:
        return no_dropout
    return Dropout(jax.random.wrap_key_data(raw(key), impl="threefry2x32"))
