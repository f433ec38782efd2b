"""Two methods from outside of jpeft with their forms in HuggingFace PEFT: VeRA and DoRA, on linear layers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft.checks import BOOL, NUMBER, POSITIVE_INT, is_int
from jpeft.core.interchange import Field, HFSpec, SharedTensor, Tensor
from jpeft.methods.base import WeightMethod


def _torch_uniform(state, shape, bound):
    """Numbers of torch's generator on CPUs, uniform in ±bound: a Mersenne twister's, of which 24 bits count."""
    bits = state.randint(0, 2**32, math.prod(shape), dtype=np.uint32) & np.uint32(2**24 - 1)
    return (bits.astype(np.float32) * np.float32(2.0**-24) * np.float32(2 * bound) - np.float32(bound)).reshape(shape)


def _projections(method, sites):
    """PEFT's A ``[r, in]`` and B ``[out, r]``: kaiming uniform, drawn one after the other from the seed."""
    state = np.random.RandomState(method.seed)
    shapes = (method.rank, max(s.inputs for s in sites)), (max(s.outputs for s in sites), method.rank)
    return [_torch_uniform(state, shape, math.sqrt(6 / shape[1])) for shape in shapes]


@dataclass(frozen=True, kw_only=True)
class VeRA(WeightMethod):
    """VeRA (https://arxiv.org/abs/2310.11454): y = x W + ((x A) * d) B * b, with A and B frozen and shared."""

    rank: int = 16
    d_initial: float = 0.1
    seed: int = 0
    save_projection: bool = True
    dtype: Any = "float32"

    non_trainable: ClassVar = frozenset({"vera_a", "vera_b"})
    hf: ClassVar = HFSpec(
        peft_type="VERA",
        tensors=(Tensor("vera_lambda_b", "lambda_b"), Tensor("vera_lambda_d", "lambda_d")),
        shared=(
            SharedTensor("base_model.vera_A", "vera_a", "ri->ir", field="save_projection"),
            SharedTensor("base_model.vera_B", "vera_b", "or->ro", field="save_projection"),
        ),
        fields=(
            Field("r", "rank", 256, POSITIVE_INT),
            Field("d_initial", "d_initial", 0.1, NUMBER),
            Field("projection_prng_key", "seed", 0, (is_int, "an integer")),
            Field("save_projection", "save_projection", True, BOOL),
        ),
        constants={"vera_dropout": 0.0},
        ignored=frozenset({"fan_in_fan_out", "init_weights"}),
        bias="vera_only",
    )

    @property
    def regenerated(self):
        return frozenset() if self.save_projection else self.non_trainable

    def init(self, key, site, w):
        d = jnp.full((self.rank,), self.d_initial, self.dtype)
        return {"lambda_b": jnp.zeros((site.outputs,), self.dtype), "lambda_d": d}

    def shared(self, key, sites):
        a, b = _projections(self, sites)
        return {"vera_a": jnp.asarray(a.T), "vera_b": jnp.asarray(b.T)}

    def expand(self, site, shared, leaves):
        return {"a": shared["vera_a"] * leaves["lambda_d"], "b": shared["vera_b"], "scale": leaves["lambda_b"]}

    def merge(self, leaves, w, b):
        scale = leaves["scale"]
        return w + leaves["a"][: w.shape[0]] @ leaves["b"][:, : scale.shape[0]] * scale, b


@dataclass(frozen=True, kw_only=True)
class DoRA(jpeft.LoRA):
    """DoRA (https://arxiv.org/abs/2402.09353): W' = m (W + s A B) / |W + s A B|, the norm of each column."""

    roles: ClassVar[Mapping] = {**jpeft.LoRA.roles, "magnitude": ("out",)}
    hf: ClassVar = HFSpec(
        peft_type="LORA",
        when={"use_dora": True},
        tensors=(
            Tensor("lora_A.weight", "lora_a", "ri->ir"),
            Tensor("lora_B.weight", "lora_b", "or->ro"),
            Tensor("lora_magnitude_vector", "magnitude"),
        ),
        fields=jpeft.LoRA.hf.fields,
        constants={k: v for k, v in jpeft.LoRA.hf.constants.items() if k != "use_dora"},
        ignored=jpeft.LoRA.hf.ignored,
    )

    def init(self, key, site, w):
        return {**super().init(key, site, w), "magnitude": jnp.linalg.norm(w, axis=0)}

    def apply(self, leaves, base, x):
        return WeightMethod.apply(self, leaves, base, x)

    def merge(self, leaves, w, b):
        changed, b = super().merge(leaves, w, b)
        return changed * (leaves["magnitude"] / jax.lax.stop_gradient(jnp.linalg.norm(changed, axis=0))), b
