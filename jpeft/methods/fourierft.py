"""FourierFT: few coefficients of a Fourier transform (Gao et al. 2024, https://arxiv.org/abs/2405.03003).

y = x (W + D) + b        D = s Re(F), F: the inverse discrete Fourier transform, in 2-D, of a matrix S of few entries c
x D = s Re(IDFT(IDFT(x) S))
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Key

from jpeft.checks import NONZERO, POSITIVE_INT, Rule
from jpeft.core.interchange import FAN_IN_FAN_OUT, Field, HFSpec, Tensor
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import Site
from jpeft.methods.base import WeightMethod
from jpeft.methods.families.low_rank import added
from jpeft.methods.families.torch_random import SEED, randperm


@dataclass(frozen=True, kw_only=True)
class FourierFT(WeightMethod):
    """Updates with the same few frequencies in all weights of one shape, each weight with coefficients of its own.

    The frequencies are those of HuggingFace PEFT for the same seed. The coefficients are zero at first (PEFT's
    ``init_weights=True``; its default changes the model).

    Attributes:
      n_frequency: the number of frequencies, and of trained parameters, of a weight.
      scaling: s, the factor on the update. Its authors use 100 to 150 for encoders, 300 for LLaMA.
      seed: of the random frequencies (PEFT's ``random_loc_seed``).
      dtype: dtype of the leaves; the Fourier transforms are computed in float32.
      targets, exclude, overrides, parts: see `WeightMethod`. ``overrides`` may set all fields but these three.

    Leaves at a site: ``fourierft_spectrum [n_frequency]``.

    >>> import jpeft
    >>> method = jpeft.methods.FourierFT(n_frequency=500, targets=r".*/(query|value)")
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    seed: int = 777
    dtype: Any = "float32"

    family: ClassVar[str] = "spectral"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.03003"
    neutral: ClassVar[float | None] = 0.0
    learning_rate: ClassVar[float] = 3e-2
    per_site: ClassVar[tuple[str, ...]] = ("n_frequency", "scaling", "seed", "dtype", "parts")
    rules: ClassVar[Mapping[str, Rule]] = {"n_frequency": POSITIVE_INT, "scaling": NONZERO, "seed": SEED}

    def prepare(self, site: Site) -> Site:
        site = super().prepare(site)
        if self.n_frequency > site.inputs * site.outputs:
            raise ValueError(
                f"FourierFT: n_frequency {self.n_frequency} is more than the {site.inputs * site.outputs} entries of "
                f"{site.name!r} ({site.inputs} inputs x {site.outputs} outputs); give fewer"
            )
        return site

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        return {"fourierft_spectrum": jnp.zeros((self.n_frequency,), self.dtype)}

    def expand(self, site: Site, shared: Leaves, leaves: Leaves) -> Leaves:
        values = self.scaling * leaves["fourierft_spectrum"]
        return {"fourierft_values": jax.lax.complex(values, jnp.zeros_like(values))}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        if not isinstance(x, jax.Array):
            return super().apply(leaves, base, x)
        sides = jax.eval_shape(lambda: base.weight).shape
        places = self._places(sides)
        form, change = partial(_transformed, places, sides), partial(_matrix, places, sides)
        return added(base, x, leaves["fourierft_values"], form, change, sides)

    def merge(self, leaves: Leaves, w: Float[Array, "in out"], b: Any) -> tuple[Float[Array, "in out"], Any]:
        return w + _matrix(self._places(w.shape), w.shape, leaves["fourierft_values"]).astype(w.dtype), b

    def _places(self, sides: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        return _places(*sides, self.n_frequency, self.seed)


@functools.lru_cache(maxsize=64)
def _places(inputs: int, outputs: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The frequencies ``(of the inputs, of the outputs)`` that PEFT draws for a weight (out, in)."""
    of_outputs, of_inputs = np.divmod(randperm(inputs * outputs, count, seed), inputs)
    return of_inputs, of_outputs


def _matrix(places: Any, sides: tuple[int, ...], values: Complex[Array, " n"]) -> Float[Array, "in out"]:
    """D, from one half of the frequencies: for F to be real, each entry and its mirror image are made conjugate."""
    (rows, columns), (inputs, outputs) = places, sides
    half = jnp.zeros((inputs, outputs // 2 + 1), values.dtype)
    for p, q in (places, (-rows % inputs, -columns % outputs)):
        half = half.at[p, q].add(values / 2, mode="drop")  # those of the other half lie outside
    return jnp.fft.irfft2(half, sides)


def _transformed(
    places: Any, sides: tuple[int, ...], x: Float[Array, "*tokens in"], values: Complex[Array, " n"]
) -> Float[Array, "*tokens out"]:
    """x D."""
    (rows, columns), (inputs, outputs) = places, sides
    found = jnp.fft.rfft(x.astype(values.real.dtype))[..., np.minimum(rows, inputs - rows)]
    found = jnp.where(rows > inputs // 2, found, jnp.conj(found)) * (values / (2 * inputs))
    half = jnp.zeros((*x.shape[:-1], outputs // 2 + 1), values.dtype)
    half = half.at[..., columns].add(found, mode="drop").at[..., -columns % outputs].add(jnp.conj(found), mode="drop")
    return jnp.fft.irfft(half, outputs)


FourierFT.hf = HFSpec(
    peft_type="FOURIERFT",
    tensors=(Tensor("fourierft_spectrum", "fourierft_spectrum"),),
    fields=(
        Field("n_frequency", "n_frequency", 1000, POSITIVE_INT, pattern="n_frequency_pattern"),
        Field("scaling", "scaling", 150.0, NONZERO),
        Field("random_loc_seed", "seed", 777, SEED),
        FAN_IN_FAN_OUT,
    ),
    ignored=frozenset({"init_weights"}),
    bias="fourier_only",
)
