"""The API reference: a page for each name of `jpeft`, and one for each documented package or module below it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection
from types import ModuleType
from typing import Any

from book.docstrings import summary

FOLDER = "reference/api"
# Packages whose names are imported from them, then modules by what they are for.
SECTIONS: dict[str, tuple[str, ...]] = {
    "Methods": (
        "jpeft.methods",
        "jpeft.core.targets",
        "jpeft.core.sites",
        "jpeft.core.method",
    ),
    "Models and HuggingFace": (
        "jpeft.models",
        "jpeft.models.decoder",
        "jpeft.models.bert",
        "jpeft.models.classifier",
        "jpeft.hf",
        "jpeft.conversion",
        "jpeft.core.interchange",
    ),
    "NNX": ("jpeft.nnx", "jpeft.qwix"),
    "Training": (
        "jpeft.training.step",
        "jpeft.training.observe",
        "jpeft.training.optimizers",
        "jpeft.training.losses",
        "jpeft.training.checkpoint",
    ),
    "Quantized bases": ("jpeft.quantization",),
    "Meshes and many hosts": (
        "jpeft.parallel.rules",
        "jpeft.parallel.batches",
        "jpeft.parallel.mesh",
        "jpeft.parallel.distributed",
        "jpeft.parallel.hosts",
    ),
    "Planning": ("jpeft.planning",),
    "Generation": (
        "jpeft.serving.generation",
        "jpeft.serving.sampling",
        "jpeft.serving.text_generator",
    ),
    "Serving": (
        "jpeft.serving.engine",
        "jpeft.serving.request",
        "jpeft.serving.http.app",
        "jpeft.recipes.serve",
    ),
    "Text": (
        "jpeft.text.conversations",
        "jpeft.text.labeled",
        "jpeft.text.chat_template",
        "jpeft.text.batching",
        "jpeft.text.scoring",
    ),
    "Geometries": ("jpeft.core.geometry", "jpeft.core.geometry.registry"),
    "Runs from Python": (
        "jpeft.recipes.config",
        "jpeft.recipes.prepare",
        "jpeft.recipes.finetune",
        "jpeft.recipes.run_folder",
        "jpeft.recipes.adapters",
        "jpeft.recipes.exporting",
        "jpeft.recipes.generate",
        "jpeft.recipes.describing",
        "jpeft.recipes.loggers",
        "jpeft.recipes.assets",
    ),
    "Trees and errors": ("jpeft.core.tree", "jpeft.io", "jpeft.errors"),
}
# What is documented of modules whose other names are parts.
_ONLY = {
    "jpeft.models.decoder": ("Decoder", "DecoderConfig"),
    "jpeft.models.bert": ("Bert", "BertConfig"),
    "jpeft.core.method": ("Linear",),
}
_INTRODUCTION = """\
Every public name, from its docstring. `import jpeft` gives what is listed first, and `jpeft.hf`, `jpeft.models`,
`jpeft.methods` and `jpeft.nnx`; the other modules are imported by name. Everything else in the package may change."""


def top_level() -> dict[str, Any]:
    """The public names of `jpeft` but its packages, and what they are."""
    import jpeft

    found = {name: getattr(jpeft, name) for name in sorted(jpeft.__all__, key=str.lower)}
    return {name: value for name, value in found.items() if not isinstance(value, ModuleType) and _is_ours(value)}


def public(module: str) -> dict[str, Any]:
    """The public names of a module, and what they are: those that it defines, or that a package imports to offer them.

    >>> list(public("jpeft.hf"))
    ['save', 'load', 'save_for']
    """
    holder = importlib.import_module(module)
    found = {n: v for n, v in vars(holder).items() if n[0] != "_" and not isinstance(v, ModuleType)}
    if hasattr(holder, "__path__"):
        return {n: v for n, v in found.items() if _is_ours(v) or isinstance(v, Collection)}
    found = {n: v for n, v in found.items() if n in _ONLY.get(module, found)}
    return {n: v for n, v in found.items() if getattr(v, "__module__", "") == module and _is_ours(v) and v.__doc__}


def _is_ours(value: Any) -> bool:
    return (inspect.isclass(value) or inspect.isroutine(value)) and value.__module__.startswith("jpeft")


def owners() -> dict[str, str]:
    """Where each public thing is documented, by its page: the shortest name that it can be imported by.

    >>> owners()["jpeft.models.load"], owners()["jpeft.LoRA"]
    ('reference/api/jpeft.models', 'reference/api/jpeft.LoRA')
    """
    return {name: page for page, names in contents().items() for name in names}


def contents() -> dict[str, list[str]]:
    """The names that each page documents."""
    found = {f"{FOLDER}/jpeft.{name}": [f"jpeft.{name}"] for name in top_level()}
    seen = {id(value) for value in top_level().values()}
    for module in (module for modules in SECTIONS.values() for module in modules):
        own = {name: value for name, value in public(module).items() if id(value) not in seen}
        seen |= {id(value) for value in own.values()}
        found[f"{FOLDER}/{module}"] = [f"{module}.{name}" for name in own]
    return found


def pages() -> dict[str, str]:
    """The pages of the reference."""
    top = top_level()
    found = {f"{FOLDER}/jpeft.{name}.rst": _page(f"jpeft.{name}", value) for name, value in top.items()}
    names = contents()
    for modules in SECTIONS.values():
        for module in modules:
            found[f"{FOLDER}/{module}.rst"] = _module_page(module, names[f"{FOLDER}/{module}"])
    return {**found, f"{FOLDER}/index.md": _index(top)}


def _heading(title: str, mark: str = "=") -> str:
    return f"{title}\n{mark * len(title)}\n\n"


def _page(name: str, value: Any) -> str:
    return _heading(name) + _directive(name, value)


def _directive(name: str, value: Any) -> str:
    if inspect.isclass(value):
        return f".. autoclass:: {name}\n   :members:\n\n"
    if inspect.isroutine(value):
        return f".. autofunction:: {name}\n\n"
    return f".. py:data:: {name}\n\n   {_keys(value)}\n\n"


def _keys(value: Any) -> str:
    """A constant's content in a line."""
    keys = ", ".join(f"``{key}``" for key in value)
    return f"A {type(value).__name__} with {keys}."


def _module_page(module: str, names: list[str]) -> str:
    holder = importlib.import_module(module)
    text = _heading(module) + f".. automodule:: {module}\n\n"
    elsewhere = {f"{module}.{name}" for name in public(module)} - set(names)
    if elsewhere:
        text += "See also: " + ", ".join(f":py:obj:`{_top_name(name)}`" for name in sorted(elsewhere)) + ".\n\n"
    return text + "".join(_directive(name, getattr(holder, name.rpartition(".")[2])) for name in names)


def _top_name(name: str) -> str:
    """The name under which something of a module is documented."""
    module, _, last = name.rpartition(".")
    thing = getattr(importlib.import_module(module), last)
    for other in owners():
        holder, _, own = other.rpartition(".")
        if getattr(importlib.import_module(holder), own) is thing:
            return other
    return name


def _index(top: dict[str, Any]) -> str:
    lines = ["# API reference", "", _INTRODUCTION, "", "## jpeft", "", "| name | |", "| --- | --- |"]
    lines += [f"| [`jpeft.{name}`](jpeft.{name}.rst) | {summary(value)} |" for name, value in top.items()]
    for title, modules in SECTIONS.items():
        lines += ["", f"## {title}", "", "| module | |", "| --- | --- |"]
        lines += [f"| [`{module}`]({module}.rst) | {summary(importlib.import_module(module))} |" for module in modules]
    entries = [f"jpeft.{name}" for name in top] + [module for modules in SECTIONS.values() for module in modules]
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", "", *entries, "```", ""])


def resolve(app: Any, env: Any, node: Any, content: Any) -> Any:
    """A reference by the end of a name, such as `Peft.summary`, or by the module that defines something."""
    target = node.get("reftarget", "")
    if node.get("refdomain") not in ("py", "") or not target:
        return None
    domain = env.get_domain("py")
    matches = {name for name in domain.objects if name == target or name.endswith("." + target)}
    if len(matches) != 1 and target.startswith("jpeft."):
        last = target.rpartition(".")[2]
        matches = {name for name in domain.objects if name.endswith("." + last)}
    if len(matches) != 1:
        return None
    (name,) = matches
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, content)
