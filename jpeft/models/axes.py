"""The logical axis names of a model's parameters, and the shardings that follow from them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from jpeft.core import tree
from jpeft.models.families import abstract_leaves, family_of
from jpeft.models.layout import tree_of
from jpeft.parallel.rules import Rules, param_shardings


def logical_names(model: nn.Module) -> dict[str, Any]:
    """The logical axis names of a model's parameters, for `jpeft.shard`. Parameters without names are left out.

    The names are `vocab`, `embed`, `heads`, `kv_heads`, `mlp`, `head_dim` and `layers`.

    >>> from jpeft.models.decoder import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig(hidden_size=64, num_attention_heads=4, intermediate_size=96))
    >>> logical_names(model)["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    ('layers', 'embed', 'mlp')
    """
    family = family_of(model)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *family.example_inputs(model))["params"]
    specs = tree.flatten(nn.get_partition_spec(shapes))
    names = {path: tuple(spec) or family.axis_names(path) for path, spec in specs.items()}
    return tree.unflatten({path: entries for path, entries in names.items() if entries})


def logical_shardings(model: nn.Module, mesh: Mesh, rules: Rules | None = None) -> dict[str, Any]:
    """The shardings of a model's parameters on a mesh, from their logical axis names, for `load`.

    Args:
        model: a model of `jpeft.models`.
        mesh: the device mesh.
        rules: as for `jpeft.shard`.

    >>> from jpeft.models.decoder import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig(hidden_size=64, num_attention_heads=4, intermediate_size=96))
    >>> mesh = jax.make_mesh((1,), ("tensor",))
    >>> logical_shardings(model, mesh, [("mlp", "tensor")])["model"]["layers"]["mlp"]["up_proj"]["kernel"].spec
    P(None, None, 'tensor')
    """
    shapes = tree_of(abstract_leaves(family_of(model), model))
    return param_shardings(shapes, mesh, rules, names=logical_names(model))
