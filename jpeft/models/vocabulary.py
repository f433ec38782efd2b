"""A model with another vocabulary or head: `resize_embeddings` and `untie_head`.

    model, params = load(folder)
    model, params = resize_embeddings(model, params, tokenizer.get_vocab_size())
    new_rows = jpeft.methods.TrainableTokens(indices=range(old_size, new_size))

`jpeft.models.save` writes the result as a folder that transformers loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec

from jpeft.checks import is_positive_int
from jpeft.core.quantized import Quantized
from jpeft.core.tree import Path, Tree, box_as, combine, flatten, join, map_with_path, peek, unflatten
from jpeft.models.families import abstract_leaves, family_of
from jpeft.models.reshaped import extended, mean_rows, with_config
from jpeft.parallel.hosts import on_host

M = TypeVar("M", bound=nn.Module)


def resize_embeddings(model: M, params: Tree, size: int, *, multiple: int = 1) -> tuple[M, Any]:
    """The model with more tokens: its embedding, and its head, get rows. Each is the mean of the old ones.

    Args:
        model: a model that `load` or `abstract` returned.
        params: its parameters; they are not changed. Abstract ones give abstract ones.
        size: the number of rows, such as the number of a tokenizer's tokens.
        multiple: rounds the number of rows up to a multiple of this, for a mesh that splits them or for speed.

    Returns:
        `(model, params)`. The old rows are equal bit for bit, and all leaves keep their dtype and sharding.

    Raises:
        ValueError: the model has more rows already, an embedding is quantized, or a sharded one does not divide.

    >>> from jpeft.models.loading import abstract
    >>> model, params = abstract({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4})
    >>> model, params = resize_embeddings(model, params, 32_003, multiple=64)
    >>> params["model"]["embed_tokens"]["embedding"].shape, model.config.vocab_size
    ((32064, 64), 32064)
    """
    if not (is_positive_int(size) and is_positive_int(multiple)):
        raise ValueError(f"size and multiple must be positive integers, got {size!r} and {multiple!r}")
    config, rows = _config(model), -(-size // multiple) * multiple
    if rows < config.vocab_size:
        raise ValueError(
            f"the embedding has {config.vocab_size:,} rows, and {size:,} would be fewer: tokens would lose theirs"
        )
    resized = with_config(model, vocab_size=rows)
    if rows == config.vocab_size:
        return resized, params
    family = family_of(model)
    before, after = abstract_leaves(family, model), abstract_leaves(family, resized)

    def grow(path: Path, leaf: Any) -> Any:
        old, new = before[join(path)].shape, after[join(path)].shape
        axes = [axis for axis, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
        if not axes:
            return leaf
        if isinstance(peek(leaf), Quantized):
            raise ValueError(f"{join(path)!r} is quantized, and cannot grow from {old[axes[0]]:,} rows to {rows:,}")
        try:
            return box_as(leaf, _grown(peek(leaf), axes[0], rows))
        except ValueError as error:
            raise ValueError(f"{join(path)!r}: {error}") from None

    return resized, map_with_path(grow, params)


def untie_head(model: M, params: Tree) -> tuple[M, Any]:
    """The model with a head of its own, so that an adapter can change head and embedding apart.

    Args:
        model: a decoder that `load` or `abstract` returned, whose head is tied to its embedding.
        params: its parameters; they are not changed. Abstract ones give abstract ones.

    Returns:
        `(model, params)`: `lm_head/kernel` is the transposed embedding, and the logits are the same.

    Raises:
        ValueError: the model has no tied head, or the embedding is quantized.

    >>> from jpeft.models.loading import abstract
    >>> fields = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "tie_word_embeddings": True}
    >>> model, params = untie_head(*abstract(fields))
    >>> params["lm_head"]["kernel"].shape
    (64, 32000)
    """
    if not hasattr(_config(model), "tie_word_embeddings"):
        raise ValueError(f"{type(model).__name__} has no head over its vocabulary")
    tied: Mapping[str, str] = getattr(model, "tied_modules", {})
    if not tied:
        raise ValueError("the model's head is not tied to its embedding: it is a weight of its own already")
    leaves, heads = flatten(params), {}
    for head, own in tied.items():
        leaf = leaves[*own.split("/"), "embedding"]
        if isinstance(peek(leaf), Quantized):
            raise ValueError(f"{own!r} is quantized: load the model without quantizing it, then untie the head")
        heads[*head.split("/"), "kernel"] = _transposed(leaf)
    return with_config(model, tie_word_embeddings=False), combine(params, unflatten(heads))


def token_weights(model: Any) -> list[str]:
    """The paths of the modules whose weight has a row for each token: the embedding, and a head of its own.

    >>> from jpeft.models.decoder import Decoder, DecoderConfig
    >>> token_weights(Decoder(DecoderConfig(num_hidden_layers=1))), token_weights(
    ...     Decoder(DecoderConfig(num_hidden_layers=1, tie_word_embeddings=True)))
    (['lm_head', 'model/embed_tokens'], ['model/embed_tokens'])
    """
    family, other = family_of(model), with_config(model, vocab_size=model.config.vocab_size + 1)
    before, after = abstract_leaves(family, model), abstract_leaves(family, other)
    return sorted(path.rpartition("/")[0] for path, leaf in before.items() if leaf.shape != after[path].shape)


def reshape_like(model: M, params: Tree, other: Any) -> tuple[M, Any]:
    """The model with the vocabulary and the head of another model of its kind, by `untie_head`, `resize_embeddings`."""
    if getattr(model, "tied_modules", {}) and not getattr(other, "tied_modules", {}):
        model, params = untie_head(model, params)
    return resize_embeddings(model, params, other.config.vocab_size)


def _config(model: Any) -> Any:
    config = getattr(model, "config", None)
    if not hasattr(config, "vocab_size"):
        raise ValueError(f"expected a model of jpeft.models.load, got {type(model).__name__}")
    return config


def _grown(x: Any, axis: int, size: int) -> Any:
    shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding):
        _check_divides(sharding, shape, axis)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)
    mean = mean_rows(np.asarray(on_host(x)), axis)
    if not isinstance(x, jax.Array):
        return extended(np, x, mean, axis, size)
    return jax.jit(lambda x, mean: extended(jnp, x, mean, axis, size), out_shardings=sharding)(x, mean)


def _check_divides(sharding: NamedSharding, shape: tuple[int, ...], axis: int) -> None:
    try:
        sharding.shard_shape(shape)
    except ValueError:
        raise ValueError(
            f"{shape[axis]:,} rows do not divide over the mesh as {sharding.spec}; round their number up with multiple="
        ) from None


def _transposed(leaf: Any) -> Any:
    x, sharding = peek(leaf), getattr(peek(leaf), "sharding", None)
    if isinstance(sharding, NamedSharding):
        entries = (*sharding.spec, None, None)[:2]
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*entries[::-1]))
    if isinstance(x, jax.ShapeDtypeStruct):
        new: Any = jax.ShapeDtypeStruct(x.shape[::-1], x.dtype, sharding=sharding)
    elif isinstance(x, jax.Array):
        new = jax.jit(jnp.transpose, out_shardings=sharding)(x)
    else:
        new = np.array(x.T)
    if not isinstance(leaf, meta.Partitioned):
        return new
    return leaf.replace(value=new, names=leaf.names[::-1])
