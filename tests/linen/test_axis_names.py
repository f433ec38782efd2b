"""Models that name mapped axes are traced outside of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jpeft.linen.axis_names import with_axis_names


class Named(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, axis_name=("batch", "data"))(nn.Dense(4)(x))
        x = jax.lax.psum(x, "model") * (jax.lax.axis_index("i") + 1).astype(x.dtype)
        return nn.remat(nn.BatchNorm)(use_running_average=False, axis_name="batch")(x)


def test_every_name_is_an_axis_of_size_one():
    model, x = Named(), jnp.ones((2, 4))
    envs = []

    def init(env):
        return jax.make_jaxpr(lambda x: model.init(jax.random.key(0), x), axis_env=env, return_shape=True)(x)[1]

    def apply(env):
        envs.append(dict(env))
        run = functools.partial(model.apply, mutable=["batch_stats"])
        return jax.make_jaxpr(run, axis_env=env, return_shape=True)(with_axis_names(init), x)[1]

    y, _ = with_axis_names(apply)
    assert y.shape == (2, 4) and envs[-1] == {"batch": 1, "data": 1, "model": 1, "i": 1}


def test_other_names_stay_errors():
    with pytest.raises(NameError, match="missing"):
        with_axis_names(lambda env: jax.make_jaxpr(lambda: missing, axis_env=env)())
