"""The tables that the contract is run over: the methods, and the ways in which a module uses a weight.

Every method of `jpeft.methods.METHODS` is tried by itself. Another configuration of one is a line of `VARIANTS`,
another geometry a line of `USES`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import jpeft
from jpeft.core.tree import flatten, map_with_path
from jpeft.methods.families.prompt_method import PromptMethod

# --- owners that stand for other people's modules: matched by class name, as theirs are ----------------------------


class FlaxConv1D(nn.Module):
    """transformers' GPT-2: the kernel is stored ``(out, in)``."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs):
        inputs = jnp.asarray(inputs, self.dtype)
        kernel = self.param("kernel", nn.initializers.normal(), (self.features, inputs.shape[-1]), self.dtype)
        bias = self.param("bias", nn.initializers.normal(), (self.features,), self.dtype)
        return inputs @ kernel.T + bias


class Einsum(nn.Module):
    """Gemma and openpi: the equation comes with the call, the parameter is ``w``."""

    shape: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, eqn, x):
        return jnp.einsum(eqn, x, self.param("w", nn.initializers.normal(), self.shape, self.dtype))


class DenseGeneral(nn.Module):
    """T5X and Flaxformer: the kernel of many axes is stored as a matrix."""

    features: Any
    axis: Any = -1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs):
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        axis = (self.axis,) if isinstance(self.axis, int) else tuple(self.axis)
        axis = tuple(a % inputs.ndim for a in axis)
        sizes = tuple(inputs.shape[a] for a in axis)
        flat = (int(np.prod(sizes)), int(np.prod(features)))
        kernel = self.param("kernel", nn.initializers.normal(), flat, self.dtype).reshape(sizes + features)
        return jax.lax.dot_general(inputs, kernel, ((axis, tuple(range(len(axis)))), ((), ())))


class GatedFFN(nn.Module):
    """big_vision's and openpi's Gemma: weights read inside a larger method."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        gating = self.param("gating_einsum", nn.initializers.normal(), (2, x.shape[-1], self.hidden), self.dtype)
        linear = self.param("linear", nn.initializers.normal(), (self.hidden, x.shape[-1]), self.dtype)
        return (nn.gelu(x @ gating[0]) * (x @ gating[1])) @ linear


class SharedScope(nn.Module):
    """google-deepmind's Gemma: two einsums whose parameters lie in one scope."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        gating = nn.Einsum((2, x.shape[-1], self.hidden), "...d,ndh->...nh", False, param_dtype=self.dtype)
        linear = NamedEinsum((self.hidden, x.shape[-1]), "linear", self.dtype)
        nn.share_scope(self, gating)
        nn.share_scope(self, linear)
        y = gating(x)
        return linear("...h,hd->...d", nn.gelu(y[..., 0, :]) * y[..., 1, :])


class NamedEinsum(nn.Module):
    """An einsum that is told the name of its parameter."""

    shape: tuple[int, ...]
    leaf: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, eqn, x):
        return jnp.einsum(eqn, x, self.param(self.leaf, nn.initializers.normal(), self.shape, self.dtype))


class InLoop(nn.Module):
    """A recurrent layer: the weight is used in every step of a loop."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (x.shape[-1], x.shape[-1]), self.dtype)
        return jax.lax.scan(lambda h, x: (h := nn.tanh(h @ w + x), h), x[0], x)[1]


# --- owners that change the weight, the input or the output on the way ----------------------------------------------


class Standardized(nn.Dense):
    """octo's and vision_transformer's R+ViT: the weight is standardized before the product."""

    def param(self, name, *args, **kwargs):
        w = super().param(name, *args, **kwargs)
        return (w - w.mean(0)) / (w.std(0) + 1e-5) if name == "kernel" else w


def _normalized(dtype):
    class Einsum(nn.Module):
        """A foreign class that is only called ``Einsum``."""

        shape: tuple[int, ...]

        @nn.compact
        def __call__(self, eqn, x):
            w = self.param("w", nn.initializers.normal(), self.shape, dtype)
            return jnp.einsum(eqn, x, w / jnp.linalg.norm(w, axis=0))

    return lambda x: Einsum((4, 6), name="op")("...i,io->...o", x)


def rounded(x, w, *args, **kwargs):
    return 3 * jax.lax.dot_general(jnp.round(x * 8) / 8, w, *args, **kwargs)


def rounding(x, w, *args, **kwargs):
    return jax.lax.dot_general(x, jnp.round(w * 64) / 64, *args, **kwargs)


def _mapped(dtype):
    def double(tree):
        return jax.tree.map(lambda w: 2 * w + w**2, tree)

    kind = nn.map_variables(nn.Dense, "params", double, init=True)
    return lambda x: kind(6, dtype=dtype, param_dtype=dtype, name="op")(x)


def _weight_norm(dtype):
    return lambda x: nn.WeightNorm(nn.Dense(6, dtype=dtype, param_dtype=dtype, name="op"), param_dtype=dtype)(x)


# --- the uses -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """One way to use a weight: ``op(dtype)(x)`` runs in a compact scope and names its owner ``op``."""

    op: Callable[[Any], Callable[[Any], Any]]
    shape: tuple[int, ...]
    vocabulary: int = 0  # inputs are ids below it
    targets: Any = r".*/op(/.*)?"
    parts: int = 1
    via: str = "fused"
    block: int = 4  # of a quantized base: it divides an axis of the weight; 0 where none can be quantized

    def input(self, dtype: Any) -> jax.Array:
        if self.vocabulary:
            return jax.random.randint(jax.random.key(1), self.shape, 0, self.vocabulary)
        return jax.random.normal(jax.random.key(1), self.shape, jnp.float32).astype(dtype)


def _bias():
    return nn.initializers.normal(0.5)


def _with(kind, *args, **fields):
    """A module that is called on the input alone."""
    return lambda dtype: lambda x: kind(*args, **fields, dtype=dtype, param_dtype=dtype, name="op")(x)


def _linear(kind, *args, **fields):
    return _with(kind, *args, **{"bias_init": _bias(), **fields})


def _conv(*args, kind=nn.Conv, **fields):
    return _linear(kind, *args, **fields)


def _einsum(spec, shape, **fields):
    return _linear(nn.Einsum, shape, spec, **fields)


def _tied(dtype):
    def run(x):
        embed = nn.Embed(7, 6, dtype=dtype, param_dtype=dtype, name="op")
        return embed.attend(nn.gelu(embed(x)))

    return run


def _attend(dtype):
    return lambda x: nn.Embed(7, 6, dtype=dtype, param_dtype=dtype, name="op").attend(x)


def _transposed(dtype):
    def run(x):
        embed = nn.Embed(7, 6, dtype=dtype, param_dtype=dtype, name="op")
        return nn.gelu(embed(x)) @ embed.embedding.T

    return run


def _attention(dtype):
    return lambda x: nn.MultiHeadDotProductAttention(
        2, qkv_features=8, dtype=dtype, param_dtype=dtype, bias_init=_bias(), name="op"
    )(x, mask=nn.make_causal_mask(x[..., 0], dtype=bool))


def _on_tokens(dtype):
    def run(x):
        return _linear(nn.Dense, 6)(dtype)(nn.Embed(7, 4, dtype=dtype, param_dtype=dtype, name="table")(x))

    return run


MASK = np.tril(np.ones((3, 4, 6)))

USES: dict[str, Use] = {
    "dense": Use(_linear(nn.Dense, 6), (2, 3, 4)),
    "dense without bias": Use(_linear(nn.Dense, 6, use_bias=False), (3, 4)),
    "dense, one vector": Use(_linear(nn.Dense, 6), (4,)),
    "dense_general": Use(_linear(nn.DenseGeneral, (2, 3)), (2, 3, 4), block=2),
    "dense_general, axes": Use(_linear(nn.DenseGeneral, 5, axis=(-2, -1)), (2, 3, 2, 4)),
    "dense_general, first axes": Use(_linear(nn.DenseGeneral, (5, 2), axis=(1, 0)), (3, 4, 2), block=2),
    "dense_general, batch": Use(_linear(nn.DenseGeneral, (5, 2), axis=(-1,), batch_dims=(0,)), (3, 2, 4), block=2),
    "dense_general, two batch": Use(_linear(nn.DenseGeneral, 5, axis=(2,), batch_dims=(0, 1)), (2, 3, 4, 2)),
    "einsum": Use(_einsum("BTD,DNH->BTNH", (4, 2, 3)), (2, 3, 4), block=2),
    "einsum, many in": Use(_einsum("BTNH,NHD->BTD", (2, 3, 5)), (2, 3, 2, 3), block=0),
    "einsum, stored outputs first": Use(_einsum("BTD,HND->BTNH", (3, 2, 4)), (2, 3, 4)),
    "einsum, batch": Use(_einsum("BTND,NDH->BTNH", (2, 4, 5)), (2, 3, 2, 4)),
    "einsum, experts": Use(_einsum("GTD,GDF->GTF", (3, 4, 5)), (3, 2, 4)),
    "einsum, 3 fused": Use(_einsum("BSD,3KDH->3BSKH", (3, 2, 4, 5), use_bias=False), (2, 3, 4)),
    "einsum, any rank": Use(_einsum("...i,io->...o", (4, 6)), (2, 3, 4)),
    "conv 1-D": Use(_conv(6, (3,)), (2, 5, 4)),
    "conv 1-D causal": Use(_conv(6, (3,), padding="CAUSAL"), (2, 5, 4)),
    "conv 2-D strided": Use(_conv(6, (3, 2), strides=(2, 1)), (2, 5, 4, 4)),
    "conv 2-D grouped": Use(_conv(6, (3, 3), feature_group_count=2), (2, 4, 4, 4), block=2),
    "conv 2-D depthwise": Use(_conv(8, (3, 3), feature_group_count=4), (2, 4, 4, 4)),
    "conv 2-D dilated": Use(
        _conv(6, (3, 3), kernel_dilation=2, input_dilation=2, padding=((1, 1), (2, 1))), (2, 4, 4, 4)
    ),
    "conv 2-D circular": Use(_conv(6, (3, 3), padding="CIRCULAR"), (2, 4, 4, 4)),
    "conv 2-D padded, no batch": Use(_conv(6, (3, 3), padding=1), (4, 4, 4)),
    "conv 2-D, batches": Use(_conv(6, (2, 2)), (2, 3, 4, 4, 4)),
    "conv 3-D valid": Use(_conv(5, (2, 2, 2), padding="VALID"), (2, 3, 3, 3, 4)),
    "conv masked": Use(lambda d: _conv(6, (3,), mask=MASK.astype(d))(d), (2, 5, 4), via="box"),
    "conv local": Use(_conv(6, (3,), kind=nn.ConvLocal), (2, 5, 4), targets=r".*/op/kernel"),
    "conv transposed": Use(_conv(6, (3, 3), kind=nn.ConvTranspose, strides=(2, 2)), (2, 3, 3, 4)),
    "conv transposed, kernel too": Use(
        _conv(6, (3,), kind=nn.ConvTranspose, strides=(2,), transpose_kernel=True), (2, 3, 4)
    ),
    "embed": Use(_with(nn.Embed, 7, 6), (2, 3), vocabulary=7, block=2),
    "embed, attend": Use(_attend, (2, 3, 6), block=2),
    "embed, tied by attend": Use(_tied, (2, 3), vocabulary=7, block=2),
    "dense on tokens": Use(_on_tokens, (2, 3), vocabulary=7),
    "embed, tied by its table": Use(_transposed, (2, 3), vocabulary=7, via="box", block=2),
    "fused qkv": Use(_linear(nn.Dense, 12), (2, 3, 4), parts=3),
    "fused qkv, heads": Use(_linear(nn.DenseGeneral, (3, 2, 2)), (2, 3, 4), parts=3, block=2),
    "attention": Use(_attention, (2, 3, 8), targets=r".*/op/(query|key|value|out)"),
    "raw": Use(lambda d: lambda x: GatedFFN(5, d, name="op")(x), (2, 3, 4)),
    "raw, in a loop": Use(lambda d: lambda x: InLoop(d, name="op")(x), (3, 2, 4), via="box"),
    "shared scope": Use(lambda d: lambda x: SharedScope(5, d, name="op")(x), (2, 3, 4)),
    "standardized": Use(_with(Standardized, 6), (2, 3, 4), via="box"),
    "mapped variables": Use(_mapped, (2, 3, 4), via="merge", block=0),
    "weight norm": Use(_weight_norm, (2, 3, 4), via="merge", block=0),
    "product of its own": Use(_with(nn.Dense, 6, dot_general=rounded), (2, 3, 4)),
    "product that rounds the weight": Use(_with(nn.Dense, 6, dot_general=rounding), (2, 3, 4), via="box"),
    "named Einsum": Use(_normalized, (2, 3, 4), via="box"),
    "FlaxConv1D": Use(lambda d: lambda x: FlaxConv1D(6, d, name="op")(x), (2, 3, 4)),
    "Gemma Einsum": Use(lambda d: lambda x: Einsum((2, 4, 3), d, name="op")("BTD,NDH->BTNH", x), (2, 3, 4)),
    "Gemma Einsum, fused kv": Use(
        lambda d: lambda x: Einsum((2, 3, 4, 5), d, name="op")("BSD,CKDH->CBSKH", x), (2, 3, 4)
    ),
    "T5X DenseGeneral": Use(lambda d: lambda x: DenseGeneral((2, 3), dtype=d, name="op")(x), (2, 3, 4)),
    "T5X DenseGeneral, axes": Use(
        lambda d: lambda x: DenseGeneral(5, axis=(-2, -1), dtype=d, name="op")(x), (2, 3, 2, 4)
    ),
}


# --- the models -----------------------------------------------------------------------------------------------------

LAYERS = 2
MODES = ("plain", "scan", "remat")


class Block(nn.Module):
    op: Callable[[Any], Any]

    @nn.compact
    def __call__(self, x, _=None):
        y = self.op(x)
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = x * (1 + 0.1 * jnp.tanh(y.mean())).astype(x.dtype)
        return x, y


class Model(nn.Module):
    """A block once, scanned over layers, or rematerialized; the output of every layer is the model's."""

    op: Callable[[Any], Any]
    mode: str = "plain"

    @nn.compact
    def __call__(self, x):
        kind = Block
        if self.mode == "remat":
            kind = nn.remat(Block)
        if self.mode == "scan":
            kind = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        _, y = kind(self.op, name="block")(x, None)
        return y * 2

    def hidden_states(self, x):
        """The states that X-LoRA's classifier gets: here the inputs."""
        return x


# --- the methods ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A method under the contract: how to make it for a use, and the uses that it is tried on."""

    make: Callable[[Use], jpeft.methods.Method]
    uses: tuple[str, ...] = tuple(USES)  # a method that changes weights is tried on all
    quantized: bool = True  # whether it acts on a quantized base; codes have no gradient


def _parts(use: Use) -> dict[str, Any]:
    return {"targets": use.targets, "parts": use.parts}


SOME = ("dense", "attention", "conv 2-D strided")
# A method that changes weights is tried on these: a bias, stacked matrices, parts, a convolution, a table that is used
# in two ways, a weight that is reached only as a weight. The ways of use themselves are tried with the first methods.
WEIGHTS = (
    "dense", "einsum, experts", "fused qkv", "conv 2-D strided", "embed, tied by attend", "raw, in a loop",
)  # fmt: skip
_EVERYWHERE = {"LoRA", "IA3", "TrainableTokens"}

# A method that treats tokens differently is tried on weights that see them.
ROUTED = ("dense", "attention", "fused qkv")

# The uses that look token ids up in a table.
PROMPTED = ("embed", "embed, tied by attend", "dense on tokens")

# Arguments that suit the tiny weights of the uses, mostly 4 x 6; without them, a method is tried as it is by default.
SMALL: dict[str, dict[str, Any]] = {
    "MiSS": {"rank": 3},
    "GraLoRA": {"rank": 2, "blocks": 1, "alpha": 2},
    "HiRA": {"rank": 2},
    "DeLoRA": {"rank": 2, "boundary": 2},
    "LoHa": {"rank": 2},
    "LoKr": {"rank": 1, "alpha": 2},
    "FourierFT": {"n_frequency": 5},
    "SHiRA": {"rank": 1},
    "VeRA": {"rank": 3},
    "VBLoRA": {"rank": 2, "num_vectors": 5, "vector_length": 1, "init_vector_bank_bound": 1.0},
    "RandLoRA": {"rank": 3, "alpha": 2},
    "AdaLoRA": {"rank": 2},
    "OFT": {"blocks": 1},
    "BOFT": {"blocks": 1},
    "HRA": {"rank": 2},
    "PromptTuning": {"length": 2},
    "PTuning": {"length": 2, "hidden": 3},
    "MultitaskPromptTuning": {"length": 2, "init_std": 0.5, "task_std": 0.5},
    "CPT": {"token_ids": (1, 2), "epsilon": 9.0, "format_epsilon": 9.0},
}


def entry_of(cls: type[jpeft.methods.Method]) -> Entry:
    """A method's default configuration, on the uses that its kind can act on."""
    if issubclass(cls, PromptMethod):  # virtual tokens would be cut off, and of no effect on what is left
        return Entry(lambda use: cls(**SMALL.get(cls.__name__, {}), keep=True), PROMPTED)
    if issubclass(cls, jpeft.methods.WeightMethod):
        is_ours = cls.__module__.startswith("jpeft.")
        uses = WEIGHTS if is_ours and cls.__name__ not in _EVERYWHERE else tuple(USES)
        return Entry(lambda use: cls(**SMALL.get(cls.__name__, {}), **_parts(use)), uses)
    if issubclass(cls, jpeft.methods.OutputMethod):
        return Entry(lambda use: cls(targets=r".*/op"), (*SOME, "raw", "embed"))
    if issubclass(cls, jpeft.methods.AttentionMethod):
        return Entry(lambda use: cls(), ("attention",))
    return Entry(lambda use: cls(targets=r".*/op(/.*)?"), SOME)


def _members() -> dict[str, jpeft.methods.Method]:
    """Members of a composition. What does not train is as it starts, and must have an effect."""
    start = {"init_weights": "bert", "init_std": 1.0}
    return {name: jpeft.Bottleneck(size=n, **start, targets=r".*/op") for name, n in (("a", 2), ("b", 3))}


# Other configurations of methods that jpeft has, beside each one's default.
VARIANTS: dict[str, Entry] = {
    # It acts from one of these tokens on, which each row of the use has.
    "ALoRA": Entry(lambda u: jpeft.methods.ALoRA(rank=2, invocation_tokens=(5,), **_parts(u)), ("dense on tokens",)),
    "LoRA": Entry(lambda u: jpeft.LoRA(rank=2, alpha=3, **_parts(u))),
    "LoRA random": Entry(lambda u: jpeft.LoRA(rank=2, init_weights="random", rslora=True, **_parts(u)), SOME),
    "LoRA pissa": Entry(lambda u: jpeft.LoRA(rank=2, init_weights="pissa", rslora=True, **_parts(u)), (*SOME, "embed")),
    "LoRA mica": Entry(lambda u: jpeft.LoRA(rank=2, init_weights="mica", **_parts(u)), SOME),
    "LoRA-FA": Entry(lambda u: jpeft.LoRA(rank=2, freeze_a=True, **_parts(u)), SOME),
    "DoRA": Entry(lambda u: jpeft.methods.DoRA(rank=2, alpha=3, **_parts(u))),
    "DoRA olora": Entry(lambda u: jpeft.methods.DoRA(rank=2, init_weights="olora", **_parts(u)), SOME),
    "IA3 feedforward": Entry(lambda u: jpeft.IA3(feedforward=u.targets, **_parts(u))),
    "Train": Entry(lambda u: jpeft.Train(r".*/op(/.*)?"), (*SOME, "raw"), quantized=False),
    # The default takes indices: the ids of the embedding uses have these two, and every weight has as many outputs.
    "TrainableTokens": Entry(lambda u: jpeft.methods.TrainableTokens(indices=(0, 1), **_parts(u))),
    "LoRA + TrainableTokens": Entry(
        lambda u: jpeft.Chain(
            jpeft.LoRA(rank=2, **_parts(u)), jpeft.methods.TrainableTokens(indices=(1,), **_parts(u))
        ),
        ("embed, tied by attend", "embed", "embed, attend", "embed, tied by its table", "dense"),
    ),
    "LoRA + IA3": Entry(
        lambda u: jpeft.Chain(jpeft.LoRA(rank=2, **_parts(u)), jpeft.IA3(feedforward=u.targets, **_parts(u))),
        (*WEIGHTS, "attention", "raw", "mapped variables", "standardized"),
    ),
    "OFT exact, shared": Entry(
        lambda u: jpeft.methods.OFT(block_size=2, exact=True, share=True, coft=True, eps=0.2, **_parts(u)),
        (*SOME, "embed"),
    ),
    "BOFT two factors": Entry(lambda u: jpeft.methods.BOFT(block_size=2, factors=2, **_parts(u)), SOME),
    "HRA orthogonal": Entry(lambda u: jpeft.methods.HRA(rank=3, orthogonal=True, **_parts(u)), (*SOME, "embed")),
    "LoHa, as one product": Entry(lambda u: jpeft.methods.LoHa(rank=1, **_parts(u)), (*SOME, "fused qkv")),
    "LoHa, split": Entry(
        lambda u: jpeft.methods.LoHa(rank=2, alpha=3, effective_conv=True, **_parts(u)), ("conv 2-D strided", "dense")
    ),
    "LoKr, whole": Entry(lambda u: jpeft.methods.LoKr(rank=8, **_parts(u)), (*SOME, "embed, tied by attend")),
    "LoKr, split": Entry(
        lambda u: jpeft.methods.LoKr(rank=1, decompose_both=True, effective_conv=True, **_parts(u)),
        ("conv 2-D strided", "dense"),
    ),
    "MiSS bat": Entry(
        lambda u: jpeft.methods.MiSS(rank=2, variant="bat", **_parts(u)), (*SOME, "fused qkv", "raw, in a loop")
    ),
    "MiSS mini": Entry(
        lambda u: jpeft.methods.MiSS(rank=3, variant="mini", mini_rank=2, **_parts(u)), (*SOME, "embed")
    ),
    "GraLoRA hybrid": Entry(
        lambda u: jpeft.methods.GraLoRA(rank=2, hybrid_rank=1, alpha=3, **_parts(u)), (*SOME, "fused qkv")
    ),
    "SHiRA seed": Entry(lambda u: jpeft.methods.SHiRA(rank=1, seed=3, **_parts(u)), (*SOME, "fused qkv")),
    "SHiRA magnitude": Entry(lambda u: jpeft.methods.SHiRA(rank=1, mask="magnitude", **_parts(u)), SOME),
    # An embedding's rows have no bias.
    "BEFT": Entry(lambda u: jpeft.methods.BEFT(**_parts(u)), (*SOME, "einsum, experts", "fused qkv")),
    "BEFT without biases": Entry(lambda u: jpeft.methods.BEFT(**_parts(u)), ("dense without bias", "raw")),
    # Outputs in pairs.
    "RoAd": Entry(
        lambda u: jpeft.methods.RoAd(group_size=2, **_parts(u)),
        (*SOME, "dense_general, batch", "fused qkv", "embed, tied by attend", "raw, in a loop"),
    ),
    "RandLoRA sparse": Entry(lambda u: jpeft.methods.RandLoRA(rank=4, sparse=True, **_parts(u)), ("dense",)),
    "RoAd 4": Entry(lambda u: jpeft.methods.RoAd(variant="road_4", group_size=2, **_parts(u)), SOME),
    "Bottleneck": Entry(lambda u: jpeft.Bottleneck(size=2, targets=r".*/op"), (*SOME, "raw", "embed")),
    "Bottleneck, norms": Entry(
        lambda u: jpeft.Bottleneck(
            size=2,
            activation="tanh",
            scale="channel",
            ln_before=True,
            ln_after=True,
            init_weights="bert",
            targets=r".*/op",
        ),
        SOME,
    ),
    "Houlsby, gate": Entry(
        lambda u: jpeft.methods.Houlsby(size=2, gating=True, scale="learned", targets=r".*/op"), ("dense", "attention")
    ),
    "Compacter": Entry(
        lambda u: jpeft.methods.Compacter(size=4, phm_dim=2, phm_init_range=1.0, targets=r".*/op"),
        (*SOME, "raw", "embed"),
    ),
    "Compacter, all of a site": Entry(
        lambda u: jpeft.methods.Compacter(
            size=2,
            phm_dim=2,
            factorized_phm_w=False,
            shared_phm_rule=False,
            factorized_phm_rule=True,
            init_weights="identity",
            targets=r".*/op",
        ),
        SOME,
    ),
    "Compacter, all shared": Entry(
        lambda u: jpeft.methods.Compacter(
            size=4, phm_dim=2, phm_rank=2, shared_w_phm=True, learn_phm=False, phm_c_init="uniform", targets=r".*/op"
        ),
        SOME,
    ),
    # Outputs that have positions.
    **{
        name: Entry(
            lambda u, name=name: getattr(jpeft.methods, name)(rank=2, suffix_positions=1, targets=r".*/op"),
            ("dense", "attention", "raw", "embed"),
        )
        for name in ("LoReFT", "NoReFT", "DiReFT")
    },
    "Stack": Entry(lambda u: jpeft.methods.Stack(members=_members(), frozen=["a"]), (*SOME, "raw")),
    "Average": Entry(lambda u: jpeft.methods.Average(members=_members(), weights=(3, 1), learn_weights=True), SOME),
    "Average of weights": Entry(
        lambda u: jpeft.methods.Average(
            members={"a": jpeft.LoRA(rank=2, **_parts(u)), "b": jpeft.methods.VeRA(rank=3, **_parts(u))},
            learn_weights=True,
            train_members=True,
        ),
        WEIGHTS,
    ),
    "AdapterFusion": Entry(lambda u: jpeft.methods.AdapterFusion(members=_members()), (*SOME, "raw")),
    "AdapterFusion of LoReFT": Entry(
        lambda u: jpeft.methods.AdapterFusion(
            members={n: jpeft.methods.LoReFT(rank=i, targets=r".*/op") for i, n in ((1, "a"), (2, "b"))},
            train_members=True,
            residual_before=True,
        ),
        ("dense",),
    ),
    # One output for each input.
    "ParallelAdapter": Entry(
        lambda u: jpeft.methods.ParallelAdapter(size=3, activation="gelu", targets=r".*/op"),
        ("dense", "attention", "raw"),
    ),
    "Poly": Entry(lambda u: jpeft.methods.Poly(rank=2, n_skills=3, n_splits=2, **_parts(u)), ROUTED),
    "MoLE": Entry(lambda u: jpeft.methods.MoLE(rank=2, n_experts=3, top_k=2, **_parts(u)), ROUTED),
    "MoLE, frozen": Entry(
        lambda u: jpeft.methods.MoLE(rank=2, n_experts=3, freeze_experts=True, alpha=3, **_parts(u)), ROUTED
    ),
    "XLoRA": Entry(lambda u: jpeft.methods.XLoRA(rank=2, n_experts=3, hidden_size=u.shape[-1], **_parts(u)), ROUTED),
    "XLoRA, layerwise": Entry(
        lambda u: jpeft.methods.XLoRA(
            rank=2,
            n_experts=3,
            hidden_size=u.shape[-1],
            layerwise=True,
            depth=2,
            size=5,
            train_experts=True,
            **_parts(u),
        ),
        ROUTED,
    ),
    "PrefixTuning": Entry(lambda u: jpeft.PrefixTuning(length=2), ("attention",)),
    "PTuning, LSTM": Entry(lambda u: jpeft.methods.PTuning(length=2, encoder="lstm", hidden=3, keep=True), PROMPTED),
    "PromptTuning, from ids": Entry(
        lambda u: jpeft.methods.PromptTuning(length=3, init_ids=(1, 2), keep=True), PROMPTED
    ),
    "Cartridge": Entry(lambda u: jpeft.methods.Cartridge(length=3, shift_positions=False), ("attention",)),
    "PrefixTuning, MLP": Entry(
        lambda u: jpeft.PrefixTuning(length=2, reparametrize=True, hidden=5, embedding=3), ("attention",)
    ),
}


def table() -> dict[str, Entry]:
    """Every method that jpeft has or that was registered, and the variants."""
    return {name: entry_of(cls) for name, cls in jpeft.methods.METHODS.items()} | VARIANTS


METHODS = table()


def numbers(shapes: Any, scale: float = 0.5, seed: int = 0) -> Any:
    """Normal numbers in the shapes and dtypes of a tree. From numpy: compiling jax.random costs a second a shape."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, scale, s.shape).astype(s.dtype)), shapes)


def parameters(model: nn.Module, *inputs: Any, **kwargs: Any) -> Any:
    """Parameters for a model, drawn by `numbers`; boxes stay."""
    return numbers(jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **kwargs))["params"])


def moved(peft: jpeft.Peft, params: Any, scale: float = 0.3, seed: int = 1) -> Any:
    """An adapter away from its start, so that every leaf has an effect. What does not train is as it starts."""
    # Of abstract parameters, which traces nothing.
    shapes = peft.init(jax.random.key(0), jax.eval_shape(lambda: params))
    drawn, held = numbers(shapes, scale, seed), peft.non_trainable_paths
    fresh = flatten(peft.init(jax.random.key(0), params)) if held else {}
    return map_with_path(lambda path, x: fresh[path] if path in held else x, drawn)


def same(a: Any, b: Any) -> None:
    """Two trees with the same leaves, dtypes and bits."""
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(a[path], b[path])


def save_tensors(folder: Path, tensors: Mapping[str, np.ndarray], shards: int = 1) -> None:
    """A HuggingFace folder's weights, in one file or dealt out to several with their index."""
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return
    files = {name: f"model-{i % shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: value for name, value in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
