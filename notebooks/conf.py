"""The documentation site: `sphinx-build -W --keep-going -b html notebooks OUT`.

The code of pages in Markdown is executed when they are built. Notebooks are shown with their stored outputs, because
some take minutes; `-t all` executes them too. Neither the build nor its result needs a network.
"""

import os
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the extension `book`, and this checkout's jpeft
# What kernels import and run is what this Python has.
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # pages print the same on every machine
XLA_FLAGS = os.environ.get("XLA_FLAGS", "")


def optimize(level):
    """How much LLVM optimizes for XLA, in processes that start or import jax after this.

    Pages compile what runs once, and the optimizer takes half of that time. Notebooks train.
    """
    os.environ["XLA_FLAGS"] = f"{XLA_FLAGS} --xla_backend_optimization_level={level}"


def setup(app):
    app.connect("source-read", lambda app, name, _: optimize(1 if app.env.doc2path(name).suffix == ".ipynb" else 0))


optimize(0)

project = "jpeft"
author = "The jpeft authors"
project_copyright = f"2026, {author}. Apache License 2.0"
release = version = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["version"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_markdown_builder",
    "book",
]
exclude_patterns = ["_build", "book", "**/.ipynb_checkpoints", "README.md"]

smartquotes = False  # quotes and dashes are those of code

# Markdown and execution.
myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_excludepatterns = [] if tags.has("all") else ["*.ipynb"]  # `tags` is of sphinx-build
nb_execution_timeout = 1200
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_mime_priority_overrides = [("markdown", "text/plain", 0), ("markdown", "image/png", 1)]  # in the copies
nb_ipywidgets_js = {}  # else pages load scripts from a CDN

# Docstrings: Google style, with single backticks for names.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
# Names that say more than what they stand for.
autodoc_type_aliases = {name: name for name in ("Array", "ArrayLike", "Leaves", "Targets", "Tree")}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
copybutton_exclude = ".linenos, .gp, .go"

# The look.
html_theme = "sphinx_book_theme"
html_title = "jpeft"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_theme_options = {
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": False,
    "footer_content_items": ["copyright.html"],
}
html_show_sourcelink = False
html_copy_source = False
