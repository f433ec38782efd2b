"""What `jpeft generate` and `jpeft chat` do: a language model with its tokenizer answers in text, under an adapter.

speaker = open_speaker("smollm2", adapter="runs/mine")
for piece in speaker.answer(speaker.codec.encode_chat([{"role": "user", "content": "Who are you?"}]), Settings()):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

import platform
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jpeft
from jpeft import chat, generation, instruct, models, runs
from jpeft.assets import UserError, cache_folder, resolve_model
from jpeft.config import CHAT, Config
from jpeft.conversations import final_number
from jpeft.hf.config import CONFIG as HF_CONFIG
from jpeft.io import CONFIG, AdapterError

_SHORTEST = 256  # prompts are padded to it, so that the turns of a talk seldom meet a length that is not compiled


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen: see `jpeft.generate`."""

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


@dataclass
class Speed:
    """How fast an answer came."""

    prompt: int = 0  # tokens
    new: int = 0
    compiled: float = 0.0  # seconds for the first two tokens: each may have waited for a program to be compiled
    rest: float = 0.0  # seconds for the others

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the second; None where there is none."""
        return (self.new - 2) / self.rest if self.new > 2 and self.rest else None


@dataclass(frozen=True)
class Speaker:
    """A decoder with its tokenizer, and the adapter it runs under, if any."""

    model: Any
    params: Any
    codec: chat.Codec
    peft: Any = None
    adapter: Any = None

    @classmethod
    def of(cls, peft: jpeft.Peft, params: Any, adapter: Any, codec: chat.Codec) -> Speaker:
        """A model under its adapter, in the form that decoding is fast in on this backend.

        On a CPU the adapter is merged where it can be, codes become weights again, which every token would open anew,
        and layers stand one by one: then there is no Peft, and memory holds the model unquantised. Elsewhere nothing
        changes.
        """
        if jax.default_backend() != "cpu":
            return cls(peft.model, params, codec, peft, adapter)
        if all(action.method.mergeable for action in peft.actions):
            model, plain, _, _ = models.unroll(peft.model, jpeft.dequantize(peft.merge(params, adapter)))
            return cls(model, plain, codec)
        model, plain, peft, adapter = models.unroll(peft.model, jpeft.dequantize(params), peft, adapter)
        return cls(model, plain, codec, peft, adapter)

    def answer(self, ids: Sequence[int], settings: Settings, speed: Speed | None = None) -> Iterator[str]:
        """The text that goes on after a prompt, piece by piece."""
        speed = speed or Speed()
        text, began = chat.Stream(self.codec), time.perf_counter()
        for (token,) in generation.stream(self.model, self.params, [ids], **self._settings(settings)):
            assert token is not None  # the only row ends the stream
            now = time.perf_counter()
            speed.prompt, speed.new = len(ids), speed.new + 1
            if speed.new <= 2:
                speed.compiled += now - began
            else:
                speed.rest += now - began
            began = now
            yield text.push(token)
        yield text.finish()

    def answers(self, prompts: Sequence[Sequence[int]], settings: Settings) -> list[str]:
        """The texts that go on after several prompts, made as one batch."""
        rows = generation.generate(self.model, self.params, prompts, **self._settings(settings))
        return [self.codec.decode(row) for row in rows]

    def _settings(self, settings: Settings) -> dict[str, Any]:
        chosen = asdict(settings)
        return {
            "peft": self.peft,
            "adapter": self.adapter,
            "stop_ids": self.codec.stop_ids,
            "key": jax.random.key(chosen.pop("seed")),
            **chosen,
            "vocabulary": self.codec.size,
            "shortest": _SHORTEST,
        }


class Sample(NamedTuple):
    """A prompt, the answer that the data give, and the model's."""

    prompt: str
    reference: str
    answer: str

    @property
    def right(self) -> bool | None:
        """Whether both come to the same number; None where the data mark none by `####`.

        >>> Sample("3 * 6?", "#### 18", "It is 18.").right, Sample("Tea?", "Yes.", "Yes.").right
        (True, None)
        """
        if "####" not in self.reference:
            return None
        return final_number(self.answer) == final_number(self.reference)


def samples(
    peft: jpeft.Peft, params: Any, adapter: Any, codec: chat.Codec, prompts: Sequence[tuple[Any, str]], new_tokens: int
) -> list[Sample]:
    """What the model answers, without chance, to `conversations.prompts`: as many tokens as asked, or its context has.

    >>> samples(peft, params, adapter, codec, conversations.prompts(test)[:4], 200)[0].answer  # doctest: +SKIP
    """
    speaker = Speaker.of(peft, params, adapter, codec)
    ids = [codec.encode_chat(list(messages)) for messages, _ in prompts]
    room = peft.model.config.max_position_embeddings - max(map(len, ids))
    texts = speaker.answers(ids, Settings(min(new_tokens, room)))
    return [Sample(messages[-1]["content"], reference, text)
            for (messages, reference), text in zip(prompts, texts, strict=True)]  # fmt: skip


def open_speaker(
    name: str | None = None,
    adapter: str | Path | None = None,
    dtype: str = "float32",
    log: Callable[[str], None] = lambda line: None,
) -> Speaker:
    """A named model, a HuggingFace folder or a `.gguf` file, under the adapter of a run, of jpeft or of HuggingFace.

    Args:
      name: None is the model of the run that `adapter` is, quantised as it was trained on, else smollm2.

    Raises:
      UserError: what was named is no language model, or no adapter, or they do not belong together.

    >>> open_speaker("smollm2")  # doctest: +SKIP
    """
    if adapter is not None and name is None and (Path(adapter).expanduser() / "metrics.jsonl").is_file():
        peft, params, leaves, codec, _ = open_chat_run(Path(adapter).expanduser(), log)
        return Speaker.of(peft, params, leaves, codec)
    path = resolve_model(name or "smollm2", log)
    codec = chat.read(path)
    if not models.is_decoder(path):
        raise UserError(f"{path}: not a language model, but an encoder; it cannot generate text")
    # Layers one by one are faster on a CPU; an adapter is read onto the layers as it was trained, and follows.
    on_cpu = jax.default_backend() == "cpu"
    options: dict[str, Any] = {"scan_layers": False} if on_cpu and adapter is None else {}
    model, params = models.load(path, param_dtype=jnp.dtype(dtype), **options)
    chat.check_vocabulary(codec, model.config.vocab_size)
    peft = leaves = None
    if adapter is not None:
        peft, leaves = _read_adapter(Path(adapter).expanduser(), model, params)
    if on_cpu:
        model, params, peft, leaves = models.unroll(model, jpeft.dequantize(params), peft, leaves)
    return Speaker(model, params, codec, peft, leaves)


def open_chat_run(run: Path, log: Callable[[str], None] = lambda line: None) -> tuple[Any, Any, Any, chat.Codec, Path]:
    """`(peft, params, adapter, codec, model's path)` of a finished run of `jpeft finetune --task chat`.

    >>> open_chat_run(Path("runs/smollm2-lora-1"))  # doctest: +SKIP
    """
    record, folder = runs.finished(run)
    config = Config(**record["config"])
    if config.task != CHAT:
        raise UserError(f"{run}: was trained to label texts, not to chat: jpeft predict {run}")
    path = resolve_model(config.model, log)
    model, params = instruct.load_base(path, config.quantize, dtype=config.dtype)
    codec = instruct.load_codec(path, model, 1)
    peft, adapter = jpeft.load(folder, model, params, *instruct.example_inputs())
    return peft, params, adapter, codec, path


def export(run: Path, out: Path, requantize: bool = False) -> None:
    """Write a HuggingFace folder of a finished chat run, its adapter merged in.

    >>> export(Path("runs/smollm2-lora-1"), Path("merged"))  # doctest: +SKIP
    """
    peft, params, adapter, _, source = open_chat_run(run)
    schemes = instruct.schemes_of(params)
    if requantize and not schemes:
        raise UserError(f"--requantize: {run} was trained over plain weights; jpeft quantize takes the folder")
    scheme = min(schemes) if requantize else None
    try:
        instruct.export(out, peft, params, adapter, source, scheme)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}; nothing was kept of it") from error


def _read_adapter(path: Path, model: Any, params: Any) -> tuple[Any, Any]:
    inputs = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    if (path / HF_CONFIG).is_file():
        return jpeft.hf.load(path, model, params, inputs)
    if any(path.glob("model*.safetensors")):
        raise UserError(f"{path}: a model, with no adapter of its own: --model {path}")
    folder = path / "adapter" if (path / "adapter").is_dir() else path
    if not (folder / CONFIG).is_file():
        raise UserError(f"--adapter {path}: no adapter there; expected a run, or a folder that jpeft or PEFT saved")
    try:
        return jpeft.load(folder, model, params, inputs)
    except AdapterError:
        raise
    except (ValueError, KeyError) as error:
        raise UserError(f"--adapter {path}: does not fit {type(model).__name__}: {error}") from error


def keep_compiled() -> None:
    """Keeps compiled programs in the cache folder: the next process starts at once.

    Machines that share the folder each have their own: a CPU's programs use the instructions it has.
    """
    cpuinfo = Path("/proc/cpuinfo")
    about = next((line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))), "") \
        if cpuinfo.is_file() else platform.processor()  # fmt: skip
    folder = cache_folder() / f"compiled-{platform.machine()}-{zlib.crc32(about.encode()):08x}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a cache that cannot be written is no reason to stop
    jax.config.update("jax_compilation_cache_dir", str(folder))


@dataclass
class Conversation:
    """Turns so far, as a chat template wants them."""

    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})

    def add(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def take_back(self) -> None:
        """Forgets a last turn of the user's that was not answered."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()
