"""Rematerialization policies: the activations of a layer that are saved for the backward pass."""

from __future__ import annotations

from typing import Any

import jax

_SAVEABLE = (
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots",
    "checkpoint_dots_with_no_batch_dims",
)
LAYER_INPUT = "layer_input"  # the checkpoint name of each layer's input
#: Names for `Decoder.remat` → names in `jax.checkpoint_policies`. Policies that take arguments are left out.
REMAT = {
    "full": "nothing_saveable",
    "dots": "dots_with_no_batch_dims_saveable",
    "offload": "save_and_offload_only_these_names",  # each layer's input, to host memory
    **{name: name for name in _SAVEABLE},
}


def check_remat(name: Any) -> str:
    """The name itself, or a ValueError if it is not in `REMAT`."""
    if not isinstance(name, str) or name not in REMAT:
        raise ValueError(f"remat={name!r} is not one of {', '.join(REMAT)}")
    return name


def remat_policy(name: str) -> Any:
    """The `jax.checkpoint` policy of a name in `REMAT`.

    >>> remat_policy("full") is jax.checkpoint_policies.nothing_saveable
    True
    """
    policy = getattr(jax.checkpoint_policies, REMAT[check_remat(name)])
    if name != "offload":
        return policy
    return policy(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    )
