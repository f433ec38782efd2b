"""The attention and feed-forward sublayers of a model, found by the names that models give them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from jpeft.checks import Rule, one_of
from jpeft.core.sites import Site, Survey
from jpeft.core.targets import TargetError

ATTENTION, FEED_FORWARD, BOTH = "attention", "feed_forward", "both"
SUBLAYERS: Rule = one_of((ATTENTION, FEED_FORWARD, BOTH))

# The places at a sublayer: its output before the residual connection; the module that computes all of it; the norm
# after the residual connection; the module that adds the residual connection and normalizes, as in BERT.
OUTPUT, MODULE, NORM, ADD_NORM = "output", "module", "norm", "add_norm"

_POST_NORM = r"(.*/)?(cross)?attention/output"
_ATTENTIONS = (
    r"(.*/)?(self_attn|attn|attention|self_attention|cross_attention|encoder_attn|encoder_decoder_attention"
    r"|SelfAttention|EncDecAttention|\w*Attention_\d+)"
)
_FEED_FORWARDS = r"(.*/)?(mlp(_\d+)?|ffn|ffw|ff|feed_?forward|DenseReluDense|\w*(Mlp|MLP|FeedForward)\w*_\d+)"
_NO_ATTENTION = r"(?!.*attention/output)(.*/)?output"

# The first pattern that a model has modules for is taken.
_PATTERNS = {
    OUTPUT: {
        ATTENTION: (rf"{_POST_NORM}/dense", _ATTENTIONS),
        FEED_FORWARD: (rf"{_NO_ATTENTION}/dense", _FEED_FORWARDS, r"(.*/)?fc2"),
    },
    MODULE: {ATTENTION: (_ATTENTIONS,), FEED_FORWARD: (_FEED_FORWARDS,)},
    NORM: {
        ATTENTION: (rf"{_POST_NORM}/LayerNorm", r"(.*/)?sa_layer_norm"),
        FEED_FORWARD: (rf"{_NO_ATTENTION}/LayerNorm", r"(.*/)?output_layer_norm"),
    },
    ADD_NORM: {ATTENTION: (_POST_NORM,), FEED_FORWARD: (_NO_ATTENTION,)},
}


def with_sublayers(survey: Survey, place: str, sublayers: str, what: str) -> list[Site]:
    """The output sites of a model, those at its sublayers with the role "attention" or "feed_forward".

    Args:
      survey: the candidates.
      place: ``OUTPUT``, ``MODULE``, ``NORM`` or ``ADD_NORM``.
      sublayers: the sublayers to find: "attention", "feed_forward" or "both".
      what: the method's name, for the error.

    Raises:
      TargetError: there are none, by the names of the modules.
    """
    roles: dict[str, str] = {}
    for sublayer in (ATTENTION, FEED_FORWARD) if sublayers == BOTH else (sublayers,):
        found = _named(survey.outputs, _PATTERNS[place][sublayer], place)
        if not found:
            names = ", ".join(site.name for site in survey.outputs[:12])
            raise TargetError(
                f"{what}: no module has a name that tells that it is {_MEANT[place]} of {_SHOWN[sublayer]}; name the "
                f"modules in targets, of {names}, …"
            )
        roles |= dict.fromkeys(found, sublayer)
    return [replace(site, role=roles.get(site.name, "")) for site in survey.outputs]


_MEANT = {
    OUTPUT: "the output",
    MODULE: "the whole",
    NORM: "the norm after the residual connection",
    ADD_NORM: "the end",
}
_SHOWN = {ATTENTION: "an attention sublayer", FEED_FORWARD: "a feed-forward sublayer"}


def _named(sites: Sequence[Site], patterns: Sequence[str], place: str) -> list[str]:
    """The names of the outermost modules that the first pattern with any matches."""
    names = [site.name for site in sites]
    # In BERT, the modules called "attention" add the residual connection too, and no module is a whole sublayer.
    if place == MODULE and any(re.fullmatch(rf"{_POST_NORM}/dense", name) for name in names):
        return []
    for pattern in patterns:
        if found := [name for name in names if re.fullmatch(pattern, name)]:
            return [name for name in found if not any(name.startswith(f"{other}/") for other in found)]
    return []


class AtSublayers:
    """The target of all sites that `with_sublayers` has given a role."""

    __name__ = "sublayers"

    def __call__(self, path: str, site: Site) -> bool:
        return bool(site.role)

    def __repr__(self) -> str:
        return self.__name__


AT_SUBLAYERS = AtSublayers()
