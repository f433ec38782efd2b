"""A decoder with its tokenizer, generating text."""

from __future__ import annotations

import platform
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax

from jpeft import models
from jpeft.core.peft import Peft
from jpeft.quantization.tree import dequantize
from jpeft.recipes.assets import cache_folder
from jpeft.serving import generation
from jpeft.text import chat_template

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
class TextGenerator:
    """A decoder with its tokenizer, and the adapter it runs under, if any."""

    model: Any
    params: Any
    codec: chat_template.ChatTokenizer
    peft: Any = None
    adapter: Any = None

    @classmethod
    def of(cls, peft: Peft, params: Any, adapter: Any, codec: chat_template.ChatTokenizer) -> TextGenerator:
        """A model under its adapter, in the form that decoding is fast in on this backend.

        On a CPU the adapter is merged where it can be, codes become weights again, which every token would open anew,
        and layers stand one by one: then there is no Peft, and memory holds the model unquantized. Elsewhere nothing
        changes.
        """
        if jax.default_backend() != "cpu":
            return cls(peft.model, params, codec, peft, adapter)
        if all(action.method.mergeable for action in peft.actions):
            model, plain, _, _ = models.unroll(peft.model, dequantize(peft.merge(params, adapter)))
            return cls(model, plain, codec)
        model, plain, peft, adapter = models.unroll(peft.model, dequantize(params), peft, adapter)
        return cls(model, plain, codec, peft, adapter)

    def answer(self, ids: Sequence[int], settings: Settings, speed: Speed | None = None) -> Iterator[str]:
        """The text that goes on after a prompt, piece by piece."""
        speed = speed or Speed()
        text, began = chat_template.Stream(self.codec), time.perf_counter()
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
            "min_prompt_length": _SHORTEST,
        }


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
