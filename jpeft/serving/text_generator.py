"""Text generation: a decoder with its tokenizer, and optionally an adapter."""

from __future__ import annotations

import platform
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jpeft.core.peft import Peft
from jpeft.core.stacking import unroll
from jpeft.quantization.tree import dequantize
from jpeft.serving import generation
from jpeft.storage import cache_folder
from jpeft.text.chat_template import ChatTokenizer, Stream

# Prompts are padded to at least this length, so that the growing prompts of a conversation seldom compile anew.
_MIN_PROMPT_LENGTH = 256


@dataclass(frozen=True)
class Settings:
    """Sampling settings. See `jpeft.generate`; `seed` stands for its `key`."""

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


@dataclass
class Speed:
    """The speed of an answer, filled in while it is generated.

    Attributes:
        prompt: tokens of the prompt.
        new: new tokens.
        compiled: seconds for the first two tokens, each of which may include compilation.
        rest: seconds for the other tokens.
    """

    prompt: int = 0
    new: int = 0
    compiled: float = 0.0
    rest: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """The rate of the tokens after the second one; None if there are none."""
        return (self.new - 2) / self.rest if self.new > 2 and self.rest else None


@dataclass(frozen=True)
class TextGenerator:
    """A decoder with its tokenizer, and the adapter it runs with.

    Attributes:
        model: a decoder of `jpeft.models`.
        params: its parameters.
        tokenizer: its tokenizer and chat template.
        peft: the bound method of the adapter, if there is one.
        adapter: the adapter, if there is one.
    """

    model: Any
    params: Any
    tokenizer: ChatTokenizer
    peft: Any = None
    adapter: Any = None

    @classmethod
    def of(cls, peft: Peft, params: Any, adapter: Any, tokenizer: ChatTokenizer) -> TextGenerator:
        """A model with an adapter, in the form that decodes fastest on this backend.

        On a CPU, the adapter is merged if it can be, quantized weights are dequantized, which each token would do anew,
        and stacked layers are unrolled. Memory then holds the unquantized model. Other backends run it as it is.
        """
        if jax.default_backend() != "cpu":
            return cls(peft.model, params, tokenizer, peft, adapter)
        if peft.mergeable:
            model, merged, _, _ = unroll(peft.model, dequantize(peft.merge(params, adapter)))
            return cls(model, merged, tokenizer)
        model, params, peft, adapter = unroll(peft.model, dequantize(params), peft, adapter)
        return cls(model, params, tokenizer, peft, adapter)

    def stream(self, ids: Sequence[int], settings: Settings, speed: Speed | None = None) -> Iterator[str]:
        """Yields the completion of a prompt piece by piece.

        Args:
            ids: the token ids of the prompt.
            settings: the sampling settings.
            speed: filled in as tokens are generated.
        """
        speed = speed or Speed()
        text, began = Stream(self.tokenizer), time.perf_counter()
        for (token,) in generation.stream(self.model, self.params, [ids], **self._arguments(settings)):
            assert token is not None  # the stream ends with its only row
            now = time.perf_counter()
            speed.prompt, speed.new = len(ids), speed.new + 1
            if speed.new <= 2:
                speed.compiled += now - began
            else:
                speed.rest += now - began
            began = now
            yield text.push(token)
        yield text.finish()

    def generate(self, prompts: Sequence[Sequence[int]], settings: Settings) -> list[str]:
        """The completions of several prompts, generated as one batch."""
        rows = generation.generate(self.model, self.params, prompts, **self._arguments(settings))
        return [self.tokenizer.decode(row) for row in rows]

    def _arguments(self, settings: Settings) -> dict[str, Any]:
        return {
            "peft": self.peft,
            "adapter": self.adapter,
            "max_new_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "stop_ids": self.tokenizer.stop_ids,
            "key": jax.random.key(settings.seed),
            "vocabulary": self.tokenizer.size,
            "min_prompt_length": _MIN_PROMPT_LENGTH,
        }


@dataclass
class Conversation:
    """The messages of a conversation so far, as chat templates take them."""

    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})

    def add(self, role: str, content: str) -> None:
        """Appends a message."""
        self.messages.append({"role": role, "content": content})

    def take_back(self) -> None:
        """Removes a last message of the user that was not answered."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()


def keep_compiled() -> None:
    """Keeps compiled programs in the cache folder, so that the next process need not compile them.

    Machines that share the folder have separate caches, since a program for a CPU uses the instructions it has.
    """
    cpuinfo, features = Path("/proc/cpuinfo"), platform.processor()
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    folder = cache_folder() / f"compiled-{platform.machine()}-{zlib.crc32(features.encode()):08x}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # without a cache, programs are compiled again
    jax.config.update("jax_compilation_cache_dir", str(folder))
