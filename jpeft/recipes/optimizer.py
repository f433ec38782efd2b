"""The optimizer and the training step of a configuration."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jpeft.core.peft import Peft
from jpeft.methods.adalora import AdaLoRA
from jpeft.recipes.config import Config
from jpeft.training.optimizers.adalora import allocate_ranks
from jpeft.training.step import train_step


def learning_rate(config: Config, steps: int, peak: Any = None) -> optax.Schedule:
    """The learning rate by step: linear warmup, then linear decay to zero.

    Args:
        peak: another peak than the configuration's; it may be traced.

    >>> schedule = learning_rate(Config(lr=1.0, warmup=0.5), 4)
    >>> [round(float(schedule(step)), 2) for step in range(4)]
    [0.33, 0.67, 1.0, 0.5]
    """
    warm, peak = min(steps - 1, round(config.warmup * steps)), config.rate if peak is None else peak

    def schedule(count: Any) -> jax.Array:
        # The rate is above zero at the first and at the last step, so that neither is wasted.
        done = jnp.asarray(count, jnp.float32)
        return peak * jnp.minimum((done + 1) / (warm + 1), (steps - done) / (steps - warm))

    return schedule


def optimizer(config: Config, steps: int, peft: Peft, peak: Any = None) -> optax.GradientTransformation:
    """AdamW with the configuration's learning rate and weight decay, and with what the method wants of an optimizer.

    AdaLoRA's ranks fall to two thirds of their mean between a tenth and seven tenths of the steps.

    Args:
        peak: another peak of the learning rate than the configuration's.

    >>> tx = optimizer(job.config, job.steps, job.peft)  # doctest: +SKIP
    """
    tx = optax.adamw(learning_rate(config, steps, peak), weight_decay=config.weight_decay)
    ranks = [action.method.rank for action in peft.actions if isinstance(action.method, AdaLoRA)]
    target = 2 * sum(ranks) // (3 * len(ranks)) if ranks else 0
    if not target:
        return tx
    first, last = steps // 10, 3 * steps // 10
    return allocate_ranks(peft, tx, total_steps=steps, target_rank=target, initial_steps=first, final_steps=last)


def training_step(peft: Peft, loss_fn: Any, tx: optax.GradientTransformation, config: Config) -> Any:
    """The training step: clipped gradients, accumulated over the configuration's micro-batches.

    >>> step = training_step(job.peft, job.loss_fn(), tx, job.config)  # doctest: +SKIP
    """
    return train_step(peft, loss_fn, tx, clip=1.0, accumulate=config.accumulate)
