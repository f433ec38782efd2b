"""PEFT folders for servers that read less of a folder than PEFT does.

vLLM and SGLang take one rank and one scale from the configuration. vLLM passes over ``rank_pattern`` and
``alpha_pattern``, and SGLang over ``use_rslora``, without a word: the scale is then wrong wherever they say something
else. A folder from here has one rank, that of the largest LoRA, and a scale of 1; each LoRA's own scale is in its B.

What they take is read from their sources of 2025 and 2026: vLLM's ``lora/peft_helper.py``, ``lora/lora_model.py`` and
``config/lora.py``, SGLang's ``lora/lora.py``, ``lora/lora_config.py`` and ``lora/utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from jpeft import conversion
from jpeft.conversion import MAX_ERROR, MAX_RANK, Converted
from jpeft.core import stacking
from jpeft.core.interchange import EMBEDDING, LINEAR
from jpeft.core.peft import Peft
from jpeft.core.sites import Site
from jpeft.core.tree import Tree
from jpeft.errors import UserError
from jpeft.hf.exporting import save
from jpeft.hf.layout import kind_of
from jpeft.hf.names import Prefix

_EMBEDDINGS = ("embed_tokens", "lm_head")
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Server:
    """The adapters that a server takes.

    Attributes:
      title: its name for people.
      ranks: the ranks that it has room for; empty for any.
      modules: the last names of the modules that it knows; empty for any linear layer.
      embeddings: the model types whose embedding and head it can adapt; None for any.
      fills: whether it needs all of the projections that it fuses, if one is adapted.
    """

    title: str
    ranks: tuple[int, ...] = ()
    modules: tuple[str, ...] = ()
    embeddings: tuple[str, ...] | None = None
    fills: bool = False


SERVERS: Mapping[str, Server] = {
    # --max-lora-rank takes no other numbers. LlamaForCausalLM, which mistral uses too, has `embedding_modules`.
    "vllm": Server("vLLM", ranks=(8, 16, 32, 64, 128, 256, 320, 512), embeddings=("llama", "mistral")),
    "sglang": Server(
        "SGLang",
        modules=("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj",
                 "down_proj", *_EMBEDDINGS),
        fills=True,
    ),
    "gguf": Server("llama.cpp"),
}  # fmt: skip


def save_for(
    server: str,
    path: str | PathLike[str],
    peft: Peft,
    adapter: Tree,
    params: Tree,
    *,
    rank: int = MAX_RANK,
    max_error: float = MAX_ERROR,
    dtype: str = "float32",
    prefix: Prefix | None = None,
    base_model: str | None = None,
) -> Converted:
    """Writes a PEFT folder that a server computes as jpeft does: LoRA of one rank, with a scale of 1.

    A LoRA of any scale, rank by site and start is written exactly. Other methods that can be merged become LoRA, see
    `jpeft.conversion.to_lora`.

    Args:
      server: "vllm" or "sglang".
      path: the folder; it appears whole or not at all.
      peft: the bound method.
      adapter: its leaves.
      params: the base.
      rank: the largest rank of what is no LoRA.
      max_error: the largest error of what is no LoRA, relative to the norm of its change.
      dtype: that of the tensors, "float32" or "float16".
      prefix: as for `jpeft.hf.save`.
      base_model: the base's name or folder, for whoever reads the configuration.

    Returns:
      What was written, with the errors.

    Raises:
      UserError: what neither the server nor a LoRA can hold; the message names method and site.
      FileExistsError: ``path`` holds other files.

    >>> import jax, jax.numpy as jnp, jpeft, tempfile
    >>> config = jpeft.models.decoder.DecoderConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2,
    ...                                             num_attention_heads=2)
    >>> model, ids = jpeft.models.decoder.Decoder(config), jnp.ones((1, 4), int)
    >>> params = model.init(jax.random.key(0), ids)["params"]
    >>> lora = jpeft.LoRA(rank=2, alpha=8, targets=["q_proj", "v_proj"], overrides={".*/v_proj": {"rank": 3}})
    >>> peft = lora.bind(model, params, ids)
    >>> folder = tempfile.mkdtemp()
    >>> save_for("vllm", folder, peft, peft.init(jax.random.key(1), params), params).peft.method.rank
    8
    """
    lora = as_lora(server, peft, adapter, params, rank=rank, max_error=max_error, dtype=dtype)
    save(path, lora.peft, lora.adapter, lora.params, prefix=prefix, task_type="CAUSAL_LM", base_model=base_model)
    return lora


def as_lora(
    server: str,
    peft: Peft,
    adapter: Tree,
    params: Tree,
    *,
    rank: int = MAX_RANK,
    max_error: float = MAX_ERROR,
    dtype: str = "float32",
) -> Converted:
    """An adapter as a LoRA that a server can compute. See `save_for`; "gguf" is a server here too.

    Raises:
      UserError: what neither the server nor a LoRA can hold; the message names method and site.
    """
    takes = SERVERS[server]
    conversion.check_matrices(peft)
    for action in peft.actions:
        if problem := _problem(takes, action.site, peft.model):
            raise UserError(f"{takes.title} cannot serve the {action.method.name} at {action.site.name!r}: {problem}")
    uniform: Sequence[int] | bool = takes.ranks or server != "gguf"
    lora = conversion.to_lora(peft, params, adapter, rank=rank, max_error=max_error, uniform=uniform)
    return conversion.cast(_filled(lora) if takes.fills else lora, dtype)


def _problem(server: Server, site: Site, model: Any) -> str:
    """Why a server cannot compute a change of a weight; empty if it can."""
    name = site.name.rpartition("/")[2]
    tied: Mapping[str, str] = getattr(model, "tied_modules", {})
    if (kind := kind_of(conversion.whole(site))) not in (LINEAR, EMBEDDING):
        return f"it is a {kind}, and only linear layers and embeddings can have a LoRA there"
    if site.name in {*tied, *tied.values()}:
        return f"embedding and head are tied, and it changes only one of them; leave it out with exclude=[{name!r}]"
    if server.modules and name not in server.modules:
        return f"it knows the modules {', '.join(server.modules)}"
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    if (kind == EMBEDDING or name in _EMBEDDINGS) and server.embeddings and model_type not in server.embeddings:
        return f"it adapts embedding and head of {', '.join(server.embeddings)} alone, and this is {model_type}"
    return ""


def _filled(lora: Converted) -> Converted:
    """A LoRA with zeros at the projections that are fused with adapted ones."""
    sites = {site.path: site for site in lora.peft.sites}
    missing = {}
    for site in stacking.unroll_peft(lora.peft).weights:
        *owner, name = site.path
        siblings = next((group for group in _FUSED if name in group), ())
        if site.path not in sites and any((*owner, other) in sites for other in siblings):
            missing[site.path] = site
    return conversion.with_zeros(lora, list(missing.values()))
