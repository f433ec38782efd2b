"""A run's vocabulary: rows for tokens that were added to a tokenizer, and a head of its own.

model, params, rows = reshape(model, params, config, lambda: tokenizer.size, reporter.say)
peft = with_rows(method, model, rows).bind(model, params, *example_inputs())
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jpeft.errors import UserError
from jpeft.methods.base import Method
from jpeft.methods.chain import Chain
from jpeft.methods.trainable_tokens import TrainableTokens
from jpeft.models.vocabulary import resize_embeddings, token_weights, untie_head
from jpeft.recipes.config import Config


def reshape(
    model: Any,
    params: Any,
    config: Config,
    tokens: Callable[[], int],
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Any, Any, range]:
    """The model and parameters of a run, and the new rows.

    Args:
        model: the base, as it was loaded, and its parameters.
        config: its `resize_embeddings` and `untie_head` count.
        tokens: returns the number of the tokenizer's tokens; it is called if the former is set.
        say: receives what is changed.

    >>> reshape(model, params, Config(), lambda: 32_003)[2]  # doctest: +SKIP
    range(0, 0)
    """
    new = range(0)
    if config.untie_head:
        try:
            model, params = untie_head(model, params)
        except ValueError as error:
            raise UserError(f"`untie_head`: {error}") from error
    if config.resize_embeddings:
        old, size = model.config.vocab_size, tokens()
        if size <= old:
            say(f"`resize_embeddings`: the embedding has {old:,} rows, enough for {size:,} tokens; it gets none")
            return model, params, new
        try:
            model, params = resize_embeddings(model, params, size, multiple=config.resize_embeddings)
        except ValueError as error:
            raise UserError(f"`resize_embeddings` {config.resize_embeddings}: {error}") from error
        new = range(old, size)
        say(
            f"the embedding grows from {old:,} to {model.config.vocab_size:,} rows for {size:,} tokens: the new rows "
            "start at the mean of the others"
        )
    return model, params, new


def with_rows(method: Method, model: Any, rows: range, prefix: str = "") -> Method:
    """The method, with new rows trained beside it. One that trains all weights has them already.

    Args:
        model: the reshaped model.
        rows: as from `reshape`.
        prefix: put before the paths of the model's modules, if it is a part of another.

    >>> with_rows(LoRA(), model, range(32_000, 32_003)).members[1].targets  # doctest: +SKIP
    ('lm_head', 'model/embed_tokens')
    """
    if not rows or any(member.targets == ".*" and member.exclude is None for member in method.methods()):
        return method
    targets = [prefix + path for path in token_weights(model)]
    return Chain(method, TrainableTokens(indices=rows, targets=targets))
