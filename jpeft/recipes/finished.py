"""What `jpeft generate` and `jpeft chat` do: a language model with its tokenizer answers in text, under an adapter.

speaker = open_text_generator("smollm2", adapter="runs/mine")
for piece in speaker.answer(speaker.codec.encode_chat([{"role": "user", "content": "Who are you?"}]), Settings()):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpeft import hf, models
from jpeft.core.peft import Peft
from jpeft.errors import AdapterError, UserError
from jpeft.hf.config import CONFIG as HF_CONFIG
from jpeft.io import CONFIG, load
from jpeft.quantization.tree import dequantize
from jpeft.recipes import run_folder
from jpeft.recipes.assets import resolve_model
from jpeft.recipes.config import CHAT, Config
from jpeft.recipes.tasks import chat
from jpeft.serving.text_generator import Settings, TextGenerator
from jpeft.text import chat_template
from jpeft.text.scoring import final_number


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
    peft: Peft,
    params: Any,
    adapter: Any,
    codec: chat_template.ChatTokenizer,
    prompts: Sequence[tuple[Any, str]],
    new_tokens: int,
) -> list[Sample]:
    """What the model answers, without chance, to `conversations.prompts`: as many tokens as asked, or its context has.

    >>> samples(peft, params, adapter, codec, conversations.prompts(test)[:4], 200)[0].answer  # doctest: +SKIP
    """
    speaker = TextGenerator.of(peft, params, adapter, codec)
    ids = [codec.encode_chat(list(messages)) for messages, _ in prompts]
    room = peft.model.config.max_position_embeddings - max(map(len, ids))
    texts = speaker.answers(ids, Settings(min(new_tokens, room)))
    return [Sample(messages[-1]["content"], reference, text)
            for (messages, reference), text in zip(prompts, texts, strict=True)]  # fmt: skip


def open_text_generator(
    name: str | None = None,
    adapter: str | Path | None = None,
    dtype: str = "float32",
    log: Callable[[str], None] = lambda line: None,
) -> TextGenerator:
    """A named model, a HuggingFace folder or a `.gguf` file, under the adapter of a run, of jpeft or of HuggingFace.

    Args:
      name: None is the model of the run that `adapter` is, quantized as it was trained on, else smollm2.

    Raises:
      UserError: what was named is no language model, or no adapter, or they do not belong together.

    >>> open_text_generator("smollm2")  # doctest: +SKIP
    """
    if adapter is not None and name is None and (Path(adapter).expanduser() / "metrics.jsonl").is_file():
        peft, params, leaves, codec, _ = open_chat_run(Path(adapter).expanduser(), log)
        return TextGenerator.of(peft, params, leaves, codec)
    path = resolve_model(name or "smollm2", log)
    codec = chat_template.read(path)
    if not models.is_decoder(path):
        raise UserError(f"{path}: not a language model, but an encoder; it cannot generate text")
    # Layers one by one are faster on a CPU; an adapter is read onto the layers as it was trained, and follows.
    on_cpu = jax.default_backend() == "cpu"
    options: dict[str, Any] = {"scan_layers": False} if on_cpu and adapter is None else {}
    model, params = models.load(path, param_dtype=jnp.dtype(dtype), **options)
    chat_template.check_vocabulary(codec, model.config.vocab_size)
    peft = leaves = None
    if adapter is not None:
        peft, leaves = _read_adapter(Path(adapter).expanduser(), model, params)
    if on_cpu:
        model, params, peft, leaves = models.unroll(model, dequantize(params), peft, leaves)
    return TextGenerator(model, params, codec, peft, leaves)


def open_chat_run(
    run: Path, log: Callable[[str], None] = lambda line: None
) -> tuple[Any, Any, Any, chat_template.ChatTokenizer, Path]:
    """`(peft, params, adapter, codec, model's path)` of a finished run of `jpeft finetune --task chat`.

    >>> open_chat_run(Path("runs/smollm2-lora-1"))  # doctest: +SKIP
    """
    record, folder = run_folder.finished(run)
    config = Config(**record["config"])
    if config.task != CHAT:
        raise UserError(f"{run}: was trained to label texts, not to chat: jpeft predict {run}")
    path = resolve_model(config.model, log)
    model, params = chat.load_base(path, config.quantize, dtype=config.dtype)
    codec = chat.load_chat_tokenizer(path, model, 1)
    peft, adapter = load(folder, model, params, *chat.example_inputs())
    return peft, params, adapter, codec, path


def export(run: Path, out: Path, requantize: bool = False) -> None:
    """Write a HuggingFace folder of a finished chat run, its adapter merged in.

    >>> export(Path("runs/smollm2-lora-1"), Path("merged"))  # doctest: +SKIP
    """
    peft, params, adapter, _, source = open_chat_run(run)
    schemes = chat.schemes_of(params)
    if requantize and not schemes:
        raise UserError(f"--requantize: {run} was trained over plain weights; jpeft quantize takes the folder")
    scheme = min(schemes) if requantize else None
    try:
        chat.export(out, peft, params, adapter, source, scheme)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}; nothing was kept of it") from error


def _read_adapter(path: Path, model: Any, params: Any) -> tuple[Any, Any]:
    inputs = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    if (path / HF_CONFIG).is_file():
        return hf.load(path, model, params, inputs)
    if any(path.glob("model*.safetensors")):
        raise UserError(f"{path}: a model, with no adapter of its own: --model {path}")
    folder = path / "adapter" if (path / "adapter").is_dir() else path
    if not (folder / CONFIG).is_file():
        raise UserError(f"--adapter {path}: no adapter there; expected a run, or a folder that jpeft or PEFT saved")
    try:
        return load(folder, model, params, inputs)
    except AdapterError:
        raise
    except (ValueError, KeyError) as error:
        raise UserError(f"--adapter {path}: does not fit {type(model).__name__}: {error}") from error
