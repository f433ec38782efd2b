"""The optimizer and the training step of a configuration."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jpeft.core.peft import Peft
from jpeft.recipes.config import Config
from jpeft.training.step import train_step


def learning_rate(config: Config, steps: int) -> optax.Schedule:
    """The learning rate by step: linear warmup, then linear decay to zero.

    >>> schedule = learning_rate(Config(lr=1.0, warmup=0.5), 4)
    >>> [round(float(schedule(step)), 2) for step in range(4)]
    [0.33, 0.67, 1.0, 0.5]
    """
    warm = min(steps - 1, round(config.warmup * steps))

    def schedule(count: Any) -> jax.Array:
        # The rate is above zero at the first and at the last step, so that neither is wasted.
        done = jnp.asarray(count, jnp.float32)
        return config.rate * jnp.minimum((done + 1) / (warm + 1), (steps - done) / (steps - warm))

    return schedule


def optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """AdamW with the configuration's learning rate and weight decay.

    >>> optimizer(Config(), 100).init({"bias": jnp.zeros(2)})[0].count
    Array(0, dtype=int32)
    """
    return optax.adamw(learning_rate(config, steps), weight_decay=config.weight_decay)


def training_step(peft: Peft, loss_fn: Any, tx: optax.GradientTransformation, config: Config) -> Any:
    """The training step: clipped gradients, accumulated over the configuration's micro-batches.

    >>> step = training_step(job.peft, job.loss_fn(), optimizer(job.config, job.steps), job.config)  # doctest: +SKIP
    """
    return train_step(peft, loss_fn, tx, clip=1.0, accumulate=config.accumulate)
