"""The spelling of methods' names on the command line. Imports nothing, so that the command line starts fast."""

from __future__ import annotations


def spelled(method: str) -> str:
    """A method's name as `jpeft.recipes.method_names` has it, from that of its class or HuggingFace's.

    >>> spelled("PrefixTuning"), spelled("prompt_tuning"), spelled("p-tuning"), spelled("LoRA")
    ('prefix', 'prompt', 'ptuning', 'lora')
    """
    name = method.lower().replace("_", "").replace("-", "")
    short = name.removesuffix("tuning")
    return short if len(short) > 1 else name
