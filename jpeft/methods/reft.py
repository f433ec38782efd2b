"""LoReFT, NoReFT and DiReFT: representation fine-tuning (Wu et al. 2024, https://arxiv.org/abs/2404.03592).

LoReFT: h <- h + (h W + b - h R) Rᵀ        W, R: [features, r], Rᵀ R = I
NoReFT: the same with any R
DiReFT: h <- h + (h W + b) Rᵀ              any R
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jpeft.methods.families.reft import ReFT


@dataclass(frozen=True, kw_only=True)
class LoReFT(ReFT):
    """Overwrites a low-rank subspace of the states of the first and last tokens, after whole layers of a model.

    Padding, which the call's ``attention_mask`` tells, on either side, is no token. Where several texts are packed in a
    row, and the call's ``segment_ids`` tell them apart, each has its own first and last tokens. With a cache of keys
    and values, the tokens of the call that begins it are the text: those that are generated then stay as they are.
    Without a cache, the last tokens of a text that grows are others in each call.

    Attributes:
      targets: paths of modules whose output is ``[batch, length, features]``; by default the layers of the model, found
        by their names, ``encoder/layer/0`` or a scanned ``layers``.
      rank: r, the dimension of the subspace.
      prefix_positions: how many of the first tokens are changed.
      suffix_positions: how many of the last tokens are changed. A token of both is changed as one of the last.
      tied_weights: whether first and last tokens share one intervention, rather than have one each.
      activation: a function of h W + b, a name in HuggingFace's models; "linear" for none.
      dropout: the rate on the changed states, while the caller trains.
      dtype: dtype of the leaves.
      exclude, overrides: see `Method`. Of scanned layers, ``overrides={"model/layers": {"layers": [4, 8]}}`` are those
        to act on.

    Leaves at a site, ``prefix`` and ``suffix``, or ``both`` if they are tied: ``reft_prefix_source [features, r]``,
    ``reft_prefix_bias [r]`` and ``reft_prefix_rotation [features, r]``, whose columns are made orthonormal where they
    are used. A fresh adapter changes the model's outputs.

    >>> import jpeft
    >>> method = jpeft.methods.LoReFT(rank=4, prefix_positions=7, suffix_positions=7)
    """

    orthogonal: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class NoReFT(ReFT):
    """LoReFT without orthogonal directions: they may be any, which costs no decomposition.

    Attributes:
      targets, rank, prefix_positions, suffix_positions, tied_weights: see `jpeft.methods.LoReFT`.
      activation, dropout, dtype, exclude, overrides: see `jpeft.methods.LoReFT`.

    Leaves at a site: those of `jpeft.methods.LoReFT`.

    >>> import jpeft
    >>> method = jpeft.methods.NoReFT(rank=4, suffix_positions=3)
    """


@dataclass(frozen=True, kw_only=True)
class DiReFT(ReFT):
    """LoReFT without orthogonal directions, that adds to a subspace and takes nothing away: a LoRA of states.

    Attributes:
      targets, rank, prefix_positions, suffix_positions, tied_weights: see `jpeft.methods.LoReFT`.
      activation, dropout, dtype, exclude, overrides: see `jpeft.methods.LoReFT`.

    Leaves at a site: those of `jpeft.methods.LoReFT`.

    >>> import jpeft
    >>> method = jpeft.methods.DiReFT(rank=4, prefix_positions=5)
    """

    subtracts: ClassVar[bool] = False
