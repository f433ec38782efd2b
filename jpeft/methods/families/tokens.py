"""Helpers of methods that treat tokens differently: weights that see tokens, and which tokens a weight sees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Shaped

from jpeft.core.interchange import window
from jpeft.core.sites import FUSED, Site


def check_sees_tokens(name: str, site: Site) -> None:
    """Checks that a weight is one matrix in the call of its module, whose inputs are tokens.

    Args:
      name: the method's name, for the error.
      site: the weight.

    Raises:
      ValueError: it is an embedding, a convolution, a stack of matrices, or reached only as a weight.
    """
    if site.via == FUSED and not (site.lookup or window(site) or site.batch):
        return
    kind = "an embedding" if site.lookup else "a convolution" if window(site) else "a stack of matrices"
    what = f"reached only as a weight (path taken: {site.via})" if site.via != FUSED else kind
    raise ValueError(
        f"{name}: {site.name!r} is {what}, whose tokens cannot be told apart; leave it out with exclude=[{site.name!r}]"
    )


def by_row(
    name: str, x: Float[Array, "*tokens features"], context: Mapping[str, Any], rows: int
) -> Float[Array, "rows length features"]:
    """The tokens that a weight sees by row of the batch. The rows come one after the other, also where they are joined.

    Args:
      name: the method's name, for the error.
      x: the input of the weight.
      context: the arguments of the model's call, some of which are ``[rows, length, ...]``.
      rows: the number of rows.

    Raises:
      ValueError: it is not clear which tokens are of which row.
    """
    lead = x.shape[:-1]
    joined = {math.prod(np.shape(a)[:2]) for a in jax.tree.leaves(context) if np.ndim(a) > 1 and np.shape(a)[0] == rows}
    if rows == 1 or (lead and lead[0] == rows) or (len(lead) == 1 and lead[0] in joined):
        return x.reshape(rows, -1, x.shape[-1])
    raise ValueError(
        f"{name}: a weight sees tokens {list(lead)}, and which of them are of which of the {rows} rows of the call "
        "cannot be told; leave this weight out with exclude=[...]"
    )


def like_input(name: str, values: Shaped[Array, "*batch n"], x: Float[Array, "*tokens features"]) -> jax.Array:
    """Values of the tokens of the model's call, as ``[*tokens, n]`` of a weight that sees the same tokens.

    In one of the two, the tokens of all rows may be joined.

    Args:
      name: the method's name, for the error.
      values: the values.
      x: the input of the weight.

    Raises:
      ValueError: it sees other tokens.
    """
    lead, own = x.shape[:-1], values.shape[:-1]
    if lead != own and (math.prod(lead) != math.prod(own) or min(len(lead), len(own)) > 1):
        raise ValueError(
            f"{name}: a weight sees tokens {list(lead)}, and the model's call has tokens {list(own)}: they must be the "
            "same tokens; leave this weight out with exclude=[...]"
        )
    return values.reshape(*lead, values.shape[-1])
