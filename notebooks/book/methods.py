"""A page for each method, and the table of methods, from the classes and what their docstrings say.

A method that `jpeft.methods` imports gets its page and its row without another edit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import re
import sys
from collections.abc import Iterator
from typing import Any

import jpeft
from book.docstrings import field_help, markdown, prose
from jpeft.core.interchange import HFSpec, Role, form
from jpeft.methods import METHODS, AttentionMethod, LeafMethod, OutputMethod, WeightMethod
from jpeft.methods.table import merges

# What the methods of a base class act on, and the paths that they take to it.
_KINDS: tuple[tuple[type, str, str], ...] = (
    (WeightMethod, "weights", "`fused`, `box`, `merge`"),
    (OutputMethod, "a module's output", "`fused`"),
    (AttentionMethod, "an attention's keys and values", "`fused`"),
    (LeafMethod, "base leaves", "`replace`"),
)
# Arguments of examples, for methods that do not act without.
_REQUIRED = {
    "AdapterFusion": 'members={"fr": jpeft.Bottleneck(), "de": jpeft.Bottleneck(size=4)}, train_members=True',
    "ALoRA": 'invocation_tokens=[5, 7], targets=["query", "value"]',
    "Average": 'members={"fr": jpeft.LoRA(rank=8), "de": jpeft.LoRA(rank=4)}, train_members=True',
    "Compacter": "reduction=16",
    "CPT": "token_ids=[5, 7, 9], token_types=[1, 2, 3]",
    "ParallelAdapter": "residual=True",
    "Stack": 'members={"fr": jpeft.Bottleneck(), "ner": jpeft.Bottleneck(size=4)}, frozen=["fr"]',
    "Train": 'r".*/LayerNorm/(scale|bias)"',
    "TrainableTokens": 'indices=[5, 7], targets=["word_embeddings"]',
    "VBLoRA": "num_vectors=32, vector_length=16",
    "XLoRA": "n_experts=3, hidden_size=64",
}

_SETUP = """\
import jax, jax.numpy as jnp, jpeft, optax
from jpeft.models.bert import Bert, BertConfig

config = BertConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                    intermediate_size=128, max_position_embeddings=64)
model, ids = Bert(config), jnp.array([[1, 5, 7, 2]])
params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
"""
_TRAIN = """\
def loss_fn(adapter, params, batch, rng):
    states = peft.apply(params, adapter, batch["ids"], rngs={"dropout": rng})
    return optax.softmax_cross_entropy_with_integer_labels(states[:, 0], batch["labels"]).mean(), {}


tx = optax.adamw(1e-2)
state = jpeft.TrainState.create(peft, peft.init(jax.random.key(1), params), tx, jax.random.key(2))
step = jpeft.train_step(peft, loss_fn, tx)
batch = {"ids": ids, "labels": jnp.array([3])}
for _ in range(3):
    state, metrics = step(state, params, batch)
    print(f"loss {metrics['loss']:.4f}")
"""
_MERGE = """\
merged = peft.merge(params, state.adapter)
tuned, plain = peft.apply(params, state.adapter, ids), model.apply({"params": merged}, ids)
print(jnp.allclose(tuned, plain, atol=1e-5))
"""


def table() -> str:
    """The methods as a Markdown table, with the parameters that each trains on MiniLM by default.

    >>> print(table().splitlines()[2][:59])
    | `Bottleneck` | A small two-layer network after a sublayer
    """
    rows = [
        ("method", "what it does", "family", "paper", "acts on", "parameters on MiniLM", "merges", "HuggingFace PEFT"),
        ("---", "---", "---", "---", "---", "---:", "---", "---"),
    ]
    for row in jpeft.methods(*_minilm()):
        count = "" if row.parameters is None else f"{row.parameters:,}"
        form = f"`{row.hf}`" if row.hf else ""
        paper = _paper(METHODS[row.name])
        rows.append((f"`{row.name}`", markdown(row.does), row.family, paper, row.acts_on, count, row.merges, form))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


@functools.cache
def _minilm() -> tuple[Any, ...]:
    """all-MiniLM-L6-v2 without its weights, and inputs."""
    import jax
    import jax.numpy as jnp

    from jpeft.models.bert import Bert, BertConfig

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=30522
    )
    model, ids = Bert(config), jnp.zeros((1, 8), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), ids, jnp.ones_like(ids)))["params"]
    return model, params, ids, jnp.ones_like(ids)


def pages() -> dict[str, str]:
    """The index and a page for each method."""
    found = {f"methods/{name}.md": page(cls) for name, cls in METHODS.items()}
    return {**found, "methods/index.md": _index()}


def _index() -> str:
    linked = re.sub(r"^\| `(\w+)`", r"| [`\1`](\1.md)", table(), flags=re.M)
    names = "\n".join(sorted(METHODS, key=str.lower))
    return f"""# Methods

A method is a frozen dataclass. `method.bind(model, params, *inputs)` finds the places in a model that it acts on, and
gives a {{py:obj}}`jpeft.Peft`. {{py:obj}}`jpeft.Chain` puts several to work together. Every method passes the same
tests: it runs under `jit`, `vmap`, `scan` and `remat`; a merged model computes what the adapted one does; saved and
loaded, it is the same to the bit.

{linked}

Names that are not in `jpeft` itself are in `jpeft.methods`. [Extending](../extending/index.md) shows how to write your
own. `jpeft.training.optimizers` has what some methods want of their optimizer: LoRA+, LoRA-FA, Riemannian
preconditioning, AdaLoRA's budget.

```{{toctree}}
:hidden:

{names}
```
"""


def page(cls: type) -> str:
    """A method's page."""
    facts = "\n".join(f"- **{name}**: {value}" for name, value in _facts(cls).items())
    parts = [
        f"# {cls.__name__}\n\n{_head(cls)}",
        f"{facts}\n",
        f"## Fields\n\n{_fields(cls)}",
        *_example(cls),
        _interchange(cls),
        f"## See also\n\n{{py:obj}}`{_public(cls)}` in the API, and its base class {{py:obj}}`{_kind_name(cls)}`; the\n"
        "[command line](../reference/command_line.md), whose flags give its fields.\n",
    ]
    return "\n".join(part for part in parts if part)


# --- facts ----------------------------------------------------------------------------------------------------------


def _kind(cls: type) -> tuple[str, str]:
    return next(((acts, via) for base, acts, via in _KINDS if issubclass(cls, base)), ("", ""))


def _kind_name(cls: type) -> str:
    return next(f"jpeft.methods.{base.__name__}" for base in cls.__mro__[1:] if base.__module__ == "jpeft.methods.base")


def _peft_type(cls: type) -> str:
    declared = form(cls)
    return f"`{declared.peft_type}`" if isinstance(declared, HFSpec) else f"`{declared.value}`" if declared else ""


def _public(cls: type) -> str:
    return f"jpeft.{cls.__name__}" if hasattr(jpeft, cls.__name__) else f"jpeft.methods.{cls.__name__}"


def _module_paragraphs(cls: type) -> list[str]:
    """The paragraphs of the docstring of a method's file: a title with the paper, equations, remarks."""
    return inspect.cleandoc(sys.modules[cls.__module__].__doc__ or cls.__name__).split("\n\n")


def _linked(text: str) -> str:
    return re.sub(r"([^\s,(;][^,(;]*), (https?://[^\s;)]+)", r"[\1](\2)", text)


def _paper(cls: type) -> str:
    found = re.search(r"\(([^()]*https?://[^()]*)\)", " ".join(_module_paragraphs(cls)[0].split()))
    return _linked(found[1].partition(";")[0]) if found else ""


def _head(cls: type) -> str:
    """What stands below the title: what the method is, its paper, its equation, its class's description."""
    first, *others = _module_paragraphs(cls)
    title, paren, rest = " ".join(first.split()).partition(" (")
    line = f"**{markdown(title.rstrip('.'))}**{' (' + _linked(rest).rstrip('.') if paren else ''}"
    return "\n\n".join([line, *map(_paragraph, others), markdown(prose(cls))]) + "\n"


def _paragraph(text: str) -> str:
    aligned, assigned = re.search(r"\S {3,}\S", text), re.search(r" (=|<-) ", text)
    if aligned or (assigned and not text.endswith(".")):
        text = text.replace("``", "")
        if max(map(len, text.splitlines())) > 90:  # what explains an equation stands below it
            text = re.sub(r"(?<=\S) {3,}", "\n    ", re.sub(r"^ {5,}", "    ", text, flags=re.M))
        return f"```text\n{text}\n```"
    return markdown(text)


def _facts(cls: Any) -> dict[str, str]:
    acts, via = _kind(cls)
    if getattr(cls, "reads_context", False):  # which a weight that is reached otherwise has not
        via = "`fused`"
    name, rate = _command_name(cls), cls.learning_rate
    return {
        "Acts on": acts,
        "Path taken (`via` in `peft.summary()`)": via,
        "Merges into the weights": merges(cls),
        "In a HuggingFace PEFT folder": _peft_type(cls) or "no such form",
        "On the command line": f"`jpeft finetune --method {name}`, with a default learning rate of {rate:g}",
    }


def _fields(cls: Any) -> str:
    helps, lines = field_help(cls), ["| field | type | default | |", "| --- | --- | --- | --- |"]
    inherited = {f.name for base in cls.__mro__[1:] if dataclasses.is_dataclass(base) for f in dataclasses.fields(base)}
    fields = sorted(dataclasses.fields(cls), key=lambda field: field.name in inherited)
    for field in fields:
        kind = str(getattr(field.type, "__name__", field.type)).replace("|", "\\|")
        text = helps.get(field.name, "").replace("|", "\\|")
        lines.append(f"| `{field.name}` | `{kind}` | {_default(field)} | {text} |")
    return "\n".join(lines) + "\n"


def _default(field: Any) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return f"`{dict(value)!r}`" if hasattr(value, "items") else f"`{value!r}`"


# --- examples -------------------------------------------------------------------------------------------------------


def code(cls: Any) -> list[str]:
    """The example's cells, or none if the method needs arguments to act on the example's model."""
    arguments = _REQUIRED.get(cls.__name__, "")
    bind = f"method = {_public(cls)}({arguments})\npeft = method.bind(model, params, ids)\n"
    try:
        exec(bind, dict(_ready()))
    except (TypeError, ValueError):
        return []
    bind += "print(peft.summary())\n"
    return [_SETUP, bind, _TRAIN, *([_MERGE] if merges(cls) != "no" else [])]


@functools.cache
def _ready() -> dict[str, Any]:
    """The names that an example's set-up defines; every example has the same."""
    scope: dict[str, Any] = {}
    exec(_SETUP, scope)
    return scope


def outputs(cls: type) -> Iterator[tuple[str, str]]:
    """The example's cells, each with what it prints."""
    scope = dict(_ready())
    for cell in code(cls):
        printed = io.StringIO()
        if cell != _SETUP:
            with contextlib.redirect_stdout(printed):
                exec(cell, scope)
        yield cell, printed.getvalue()


def checked(cls: type, cells: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The example's cells: a ValueError, and no book, if it does not train or its merged model computes otherwise."""
    losses = [float(loss) for _, printed in cells for loss in re.findall(r"^loss (\S+)$", printed, re.M)]
    if cells and not (len(losses) == 3 and losses[0] > losses[1] > losses[2]):
        raise ValueError(f"the example of {cls.__name__}: expected three losses that fall, got {losses}")
    if cells and merges(cls) != "no" and cells[-1][1] != "True\n":
        raise ValueError(f"the example of {cls.__name__}: expected True of the merged model, got {cells[-1][1]!r}")
    return cells


def _example(cls: type) -> list[str]:
    lines = ["## Example\n"]
    for cell, printed in checked(cls, list(outputs(cls))):
        lines.append(f"```python\n{cell.rstrip()}\n```\n")
        if printed:
            lines.append(f"```text\n{printed.rstrip()}\n```\n")
    return lines if len(lines) > 1 else []


# --- the command line, and HuggingFace PEFT -------------------------------------------------------------------------


def _command_name(cls: type) -> str:
    from jpeft.recipes.method_names import method_names

    return next(name for name, kind in method_names().items() if kind is cls)


def _interchange(cls: Any) -> str:
    declared = form(cls)
    if declared is None:
        return ""
    head = "## HuggingFace PEFT\n\n`jpeft.hf.save` writes and `jpeft.hf.load` reads folders of "
    if isinstance(declared, Role):
        return f"{head}any type that hold its leaves, by the field `{declared.value}` of `adapter_config.json`.\n"
    text = [f"{head}type `{declared.peft_type}`.\n", "| tensor | leaf | of |", "| --- | --- | --- |"]
    text += [f"| `{t.key}` | `{t.leaf}` | {', '.join(t.kinds)} |" for t in declared.tensors]
    text += [f"| `{t.key}` | `{t.leaf}` | all modules |" for t in declared.shared]
    fields = [f for f in declared.fields if f.name]
    if fields:
        text += ["", "| in `adapter_config.json` | field |", "| --- | --- |"]
        text += [f"| `{f.key}`{f', `{f.pattern}`' * bool(f.pattern)} | `{f.name}` |" for f in fields]
    if declared.constants:
        text += ["", "Settings that are refused unless they are off: " + _names(declared.constants) + "."]
    return "\n".join(text) + "\n"


def _names(values: Any) -> str:
    return ", ".join(f"`{value}`" for value in sorted(values))
