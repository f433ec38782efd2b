"""The forms in which a checkpoint names a model's tensors: with or without the prefix of a wrapping module."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

_TENSORFLOW_LEAF = {"gamma": "weight", "beta": "bias"}  # of LayerNorm, in checkpoints converted from TensorFlow


class Naming(NamedTuple):
    """One form of the names in a checkpoint.

    Attributes:
        prefixes: the prefix in the file for each prefix of the model's own names. The longest one that fits holds.

    >>> naming = Naming({"": "bert.", "classifier.": "classifier."})
    >>> naming.in_file("pooler.dense.bias"), naming.in_file("classifier.bias")
    ('bert.pooler.dense.bias', 'classifier.bias')
    >>> naming.in_model("bert.encoder.layer.0.output.LayerNorm.gamma")
    'encoder.layer.0.output.LayerNorm.weight'
    >>> naming.in_model("cls.predictions.bias")
    """

    prefixes: Mapping[str, str]

    def in_file(self, name: str) -> str:
        """The name in the file of a tensor of the model. Inverse of `in_model`."""
        own = max((own for own in self.prefixes if name.startswith(own)), key=len)
        return self.prefixes[own] + name.removeprefix(own)

    def in_model(self, name: str) -> str | None:
        """The model's name of a tensor in the file; None if the name belongs to another part of the checkpoint."""
        fits = [(file, own) for own, file in self.prefixes.items() if name.startswith(file)]
        if not fits:
            return None
        file, own = max(fits, key=lambda pair: len(pair[0]))
        owner, dot, leaf = name.removeprefix(file).rpartition(".")
        return own + owner + dot + _TENSORFLOW_LEAF.get(leaf, leaf)


def choose(namings: Sequence[Naming], expected: Collection[str], names: Collection[str]) -> Naming:
    """The naming under which most tensors of a file are the model's; of equals, the first.

    >>> plain, bare = Naming({"": ""}), Naming({"model.": ""})
    >>> choose([plain, bare], {"model.norm.weight"}, ["norm.weight"]) == bare
    True
    """
    return max(namings, key=lambda naming: sum(naming.in_model(name) in expected for name in names))
