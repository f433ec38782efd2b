"""Markdown copies of the pages, `llms.txt` and `llms-full.txt` (https://llmstxt.org), for coding assistants.

The copies are written from the doctrees of the HTML build, so they hold what the pages hold: outputs of code, and
docstrings. `PAGE.md` lies beside `PAGE.html`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx_markdown_builder.builder import MarkdownBuilder
from sphinx_markdown_builder.translator import MarkdownTranslator

_LANGUAGES = {"ipython3": "python", "myst-ansi": "text", "default": "python", "pycon": "python"}


class Translator(MarkdownTranslator):
    """Markdown from a doctree."""

    def visit_literal_block(self, node: Any) -> None:
        node["language"] = _LANGUAGES.get(node.get("language", ""), node.get("language", ""))
        super().visit_literal_block(node)

    def visit_abbreviation(self, node: Any) -> None:
        """The stars in signatures, before keyword-only parameters."""

    def visit_PassthroughTextElement(self, node: Any) -> None:
        """The links of cards."""


class Copies(MarkdownBuilder):
    """The builder of the copies. It reuses what the HTML build has read."""

    name = "markdown"
    default_translator_class = Translator


def write(app: Any, exception: Exception | None) -> None:
    """Writes the copies and the two files beside the pages."""
    if exception or app.builder.format != "html":
        return
    out, builder = Path(app.outdir), Copies(app, app.env)
    builder.init()
    builder.prepare_writing(set())
    pages = app.builder
    app.builder = builder  # post-transforms resolve references and choose outputs for it
    try:
        for name in sorted(app.env.found_docs):
            builder.write_doc(name, app.env.get_and_resolve_doctree(name, builder, tags=app.tags))
    finally:
        app.builder = pages
    order = list(_in_order(app.env, app.config.root_doc))
    summary = _first_paragraph(app.env.get_doctree(app.config.root_doc))
    lines = [f"# {app.config.project}", "", f"> {summary}", ""]
    for section, names in _sections(app.env, app.config.root_doc):
        lines += [f"## {section}", ""]
        lines += [_entry(app.env, name) for name in names] + [""]
    (out / "llms.txt").write_text("\n".join(lines))
    (out / "llms-full.txt").write_text("\n\n".join((out / f"{name}.md").read_text() for name in order))


def _in_order(env: Any, name: str, seen: set[str] | None = None) -> Iterator[str]:
    """A page and those below it, as the table of contents lists them."""
    seen = set() if seen is None else seen
    if name not in seen:
        seen.add(name)
        yield name
        for child in env.toctree_includes.get(name, ()):
            yield from _in_order(env, child, seen)


def _sections(env: Any, root: str) -> Iterator[tuple[str, list[str]]]:
    """The captions of the table of contents, with the pages of each."""
    for node in env.get_doctree(root).findall(addnodes.toctree):
        names = [page for _, entry in node["entries"] if entry in env.found_docs for page in _in_order(env, entry)]
        yield node["caption"] or "Pages", names


def _entry(env: Any, name: str) -> str:
    title = env.titles[name].astext()
    about = _first_paragraph(env.get_doctree(name))
    return f"- [{title}]({name}.md)" + f": {about}" * bool(about)


def _first_paragraph(tree: Any) -> str:
    """The first sentence of a page's text, or of the docstring that it shows."""
    for node in tree.findall(nodes.paragraph):
        if isinstance(node.parent, (nodes.section, addnodes.desc_content)):
            text = " ".join(node.astext().split())
            return re.split(r"[.:](?= [A-Z]|$)", text)[0] + "."
    return ""
