"""C3A: circular convolutions of blocks (Chen et al. 2024, https://arxiv.org/abs/2407.19342).

y = x (W + D) + b        D: blocks of n x n, each circulant: D[i, j] = k[(i - j) mod n] / in
x D of a block = irfft(rfft(x) conj(rfft(k))) / in
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Key

from jpeft.checks import POSITIVE_INT, Rule, or_none
from jpeft.core.interchange import Field, HFSpec, Tensor
from jpeft.core.method import Leaves, Linear
from jpeft.core.sites import Site
from jpeft.methods.base import WeightMethod
from jpeft.methods.families.low_rank import added


@dataclass(frozen=True, kw_only=True)
class C3A(WeightMethod):
    """Updates of high rank with the parameters of a low one: each block of the weight has one circulant matrix.

    Its kernels are zero at first (HuggingFace PEFT's ``init_weights=True``; its default changes the model). They act
    divided by the number of inputs, so they want a large learning rate.

    Attributes:
      block_size: n, a divisor of a weight's inputs and outputs; larger blocks have fewer parameters. By default the
        largest that divides 256 too, which is PEFT's default.
      dtype: dtype of the leaves; the Fourier transforms are computed in float32.
      targets, exclude, overrides, parts: see `WeightMethod`. ``overrides`` may set all fields but these three.

    Leaves at a site: ``c3a_kernel [in / n, out / n, n]``.

    >>> import jpeft
    >>> method = jpeft.methods.C3A(block_size=64, targets=r".*/(query|value)")
    """

    block_size: int | None = None
    dtype: Any = "float32"

    family: ClassVar[str] = "circulant"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.19342"
    neutral: ClassVar[float | None] = 0.0
    learning_rate: ClassVar[float] = 0.3
    per_site: ClassVar[tuple[str, ...]] = ("block_size", "dtype", "parts")
    rules: ClassVar[Mapping[str, Rule]] = {"block_size": or_none(POSITIVE_INT)}

    def size(self, site: Site) -> int:
        """The size of a site's blocks."""
        return self.block_size or math.gcd(256, site.inputs, site.outputs)

    def prepare(self, site: Site) -> Site:
        site = super().prepare(site)
        if site.inputs % self.size(site) or site.outputs % self.size(site):
            largest = math.gcd(site.inputs, site.outputs)
            raise ValueError(
                f"C3A: block_size {self.size(site)} must divide the {site.inputs} inputs and {site.outputs} outputs "
                f"of {site.name!r}; set overrides={{{site.name!r}: {{'block_size': {largest}}}}} or a divisor of it"
            )
        return site

    def init(self, key: Key[Array, ""], site: Site, w: Any) -> Leaves:
        n = self.size(site)
        return {"c3a_kernel": jnp.zeros((site.inputs // n, site.outputs // n, n), self.dtype)}

    def expand(self, site: Site, shared: Leaves, leaves: Leaves) -> Leaves:
        return {"c3a_spectrum": jnp.conj(jnp.fft.rfft(leaves["c3a_kernel"])) / site.inputs}

    def apply(self, leaves: Leaves, base: Linear, x: Any) -> Float[Array, "*tokens out"]:
        if not isinstance(x, jax.Array):
            return super().apply(leaves, base, x)
        spectrum, inputs = leaves["c3a_spectrum"], x.shape[-1]
        rows, columns, _ = spectrum.shape
        n = inputs // rows
        return added(base, x, spectrum, _convolved, partial(_matrix, n), (inputs, columns * n))

    def merge(self, leaves: Leaves, w: Float[Array, "in out"], b: Any) -> tuple[Float[Array, "in out"], Any]:
        spectrum = leaves["c3a_spectrum"]
        return w + _matrix(w.shape[0] // len(spectrum), spectrum).astype(w.dtype), b


def _convolved(
    x: Float[Array, "*tokens in"], spectrum: Complex[Array, "rows columns f"]
) -> Float[Array, "*tokens out"]:
    """x D."""
    blocks = x.reshape(*x.shape[:-1], len(spectrum), -1).astype(spectrum.real.dtype)
    y = jnp.einsum("...rf,rcf->...cf", jnp.fft.rfft(blocks), spectrum)
    return jnp.fft.irfft(y, blocks.shape[-1]).reshape(*x.shape[:-1], -1)


def _matrix(n: int, spectrum: Complex[Array, "rows columns f"]) -> Float[Array, "in out"]:
    """D."""
    kernel = jnp.fft.irfft(jnp.conj(spectrum), n)
    circulant = kernel[..., (np.arange(n)[:, None] - np.arange(n)) % n]
    return jnp.moveaxis(circulant, 1, 2).reshape(len(spectrum) * n, -1)


C3A.hf = HFSpec(
    peft_type="C3A",
    tensors=(Tensor("c3a_kernel", "c3a_kernel", "oin->ion"),),
    fields=(
        Field(
            "block_size",
            "block_size",
            256,
            POSITIVE_INT,
            pattern="block_size_pattern",
            write=lambda method, site, config: method.size(site),
        ),
    ),
    ignored=frozenset({"init_weights"}),
    bias="c3a_only",
)
