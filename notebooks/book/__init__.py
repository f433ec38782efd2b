"""The Sphinx extension of this book: pages generated from the code, and their copies for coding assistants.

At the start of a build it writes `methods/` and `reference/`, which git ignores. A new method, public name, command or
field of a configuration needs no page written by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from book import api, commands, methods
from book.docstrings import prepare


def write_pages(app: Any) -> None:
    """Writes the generated pages; a file whose content has not changed is left alone, so that rebuilding is quick."""
    source = Path(app.srcdir)
    pages = {**methods.pages(), **commands.pages(), **api.pages()}
    for folder in ("methods", "reference"):
        for old in (source / folder).rglob("*"):
            if old.is_file() and str(old.relative_to(source)) not in pages:
                old.unlink()
    for name, text in pages.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def setup(app: Any) -> dict[str, Any]:
    """Connects the extension; called by Sphinx."""
    from book import copies  # imports Sphinx, which the tests of the other modules do without

    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", prepare, priority=400)  # before napoleon, at 500
    app.connect("missing-reference", api.resolve)
    app.connect("build-finished", copies.write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
