"""The documentation site in notebooks/: its generated pages cover the code. .ci/run builds it, which runs its code."""

import ast
import dataclasses
import doctest
import functools
import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jpeft
from jpeft.methods import METHODS, WeightMethod, register

ROOT = Path(__file__).parents[2]
BOOK = ROOT / "notebooks"
sys.path.insert(0, str(BOOK))

import tables  # noqa: E402
from book import api, commands, docstrings, methods  # noqa: E402


@functools.cache
def reference():
    return api.pages()


@pytest.fixture(autouse=True)
def _as_users_do():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def without_examples(monkeypatch):
    """Pages of methods without their examples, which the build runs."""
    monkeypatch.setattr(methods, "outputs", lambda cls: [])


def exported(package):
    """The names that a package's `__init__.pyi` or `__init__.py` offers from modules, as its text says."""
    folder = ROOT / package.replace(".", "/")
    path = next(path for path in (folder / "__init__.pyi", folder / "__init__.py") if path.exists())
    froms = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    imports = [alias for node in froms if node.module is not None for alias in node.names]
    return {alias.name for alias in imports if alias.asname == alias.name}


def documented(name):
    """The pages of the API reference that hold a directive for a name."""
    pattern = re.compile(rf"^\.\. (autoclass|autofunction|py:data):: {re.escape(name)}$", re.M)
    return [page for page, text in reference().items() if pattern.search(text)]


@pytest.mark.parametrize("module", ["book.api", "book.docstrings", "book.methods"])
def test_examples_of_the_extension(module):
    assert not doctest.testmod(importlib.import_module(module)).failed


def test_every_public_name_of_the_package_has_its_page():
    names = exported("jpeft")
    assert {"LoRA", "Peft", "plan", "generate", "train_step"} < names
    for name in names:
        assert documented(f"jpeft.{name}") == [f"reference/api/jpeft.{name}.rst"], name


PACKAGES = ("hf", "models", "methods", "nnx", "planning", "quantization", "core.geometry")


@pytest.mark.parametrize("package", [f"jpeft.{name}" for name in PACKAGES])
def test_every_public_name_of_a_package_is_on_a_page(package):
    things = {id(getattr(jpeft, name)): f"jpeft.{name}" for name in api.top_level()}
    found = importlib.import_module(package)
    for name in exported(package):
        own = f"{package}.{name}"
        assert documented(things.get(id(getattr(found, name)), own)) or documented(own), own


def test_the_index_links_every_page_of_the_reference():
    index = reference()["reference/api/index.md"]
    listed = set(index.partition("```{toctree}")[2].split())
    for page in reference().keys() - {"reference/api/index.md"}:
        name = Path(page).name.removesuffix(".rst")
        assert f"({name}.rst)" in index and name in listed


def test_every_method_has_a_page_with_its_fields_its_paper_and_its_form(without_examples):
    pages = methods.pages()
    for name, cls in METHODS.items():
        page = pages[f"methods/{name}.md"]
        fields = set(re.findall(r"^\| `(\w+)` \| `.*` \| .+ \| .+ \|$", page, re.M))
        assert fields >= {field.name for field in dataclasses.fields(cls)}, name  # and each says what it is
        assert f"`{name}`](" in pages["methods/index.md"] and f"\n{name}\n" in pages["methods/index.md"]
    lora = pages["methods/LoRA.md"]
    assert "y = x W + s (x A) B" in lora and "[Hu et al. 2021](https://arxiv.org/abs/2106.09685)" in lora
    assert "`jpeft finetune --method lora`" in lora and "| `lora_A.weight` | `lora_a` |" in lora


@pytest.fixture
def shift():
    """A method from outside of jpeft, registered."""

    @dataclass(frozen=True, kw_only=True)
    class Shift(WeightMethod):
        """Adds a vector to each row of a weight.

        Attributes:
          start: value of the vector at first.
        """

        start: float = 0.0

        def init(self, key, site, w):
            return {"shift": jnp.full((site.outputs,), self.start)}

        def merge(self, leaves, w, b):
            return w + leaves["shift"], b

    yield register(Shift)
    del METHODS["Shift"]


def test_a_method_that_is_added_gets_its_page_and_its_row(shift, without_examples):
    page = methods.pages()["methods/Shift.md"]
    assert "| `start` | `float` | `0.0` | value of the vector at first. |" in page
    assert "- **Merges into the weights**: yes" in page and "Adds a vector to each row of a weight." in page
    # 6 layers of 4 weights with 384 outputs each, one with 1,536 and one with 384
    assert "| `Shift` | Adds a vector to each row of a weight |  |  | weights | 20,736 | yes |  |" in methods.table()


@pytest.mark.exhaustive  # its step compiles
def test_an_example_trains_and_merges(shift, monkeypatch):
    monkeypatch.setattr(jpeft.methods, "Shift", shift, raising=False)
    page = methods.page(shift)
    assert "peft = method.bind(model, params, ids)" in page and "```text\nTrue\n```" in page


@pytest.mark.exhaustive  # each is bound
def test_every_method_has_an_example_which_the_build_runs():
    assert [name for name, cls in METHODS.items() if not methods.code(cls)] == []


FALLS, RISES = "loss 3.0\nloss 2.0\nloss 1.0\n", "loss 3.0\nloss 1.0\nloss 2.0\n"


@pytest.mark.parametrize(
    ("printed", "error"),
    [
        ((RISES, "True\n"), "the example of LoRA: expected three losses that fall, got [3.0, 1.0, 2.0]"),
        (("loss 3.0\n" * 3,), "the example of LoRA: expected three losses that fall, got [3.0, 3.0, 3.0]"),
        (("", "True\n"), "the example of LoRA: expected three losses that fall, got []"),
        ((FALLS, "False\n"), "the example of LoRA: expected True of the merged model, got 'False\\n'"),
        ((FALLS,), "the example of LoRA: expected True of the merged model, got 'loss 3.0"),
    ],
)
def test_an_example_that_does_not_work_stops_the_build(printed, error, monkeypatch):
    monkeypatch.setattr(methods, "outputs", lambda cls: [("", text) for text in printed])
    with pytest.raises(ValueError, match=re.escape(error)):
        methods.page(jpeft.LoRA)


def test_the_readme_shows_the_table_of_methods():
    text = (ROOT / "README.md").read_text()
    assert tables.filled(text, methods.table()) == text, "run: python notebooks/tables.py --write"


def test_every_command_and_every_field_of_a_configuration_is_in_the_reference():
    from jpeft.recipes.config import Config

    pages = commands.pages()
    for name in ("finetune", "plan", "predict", "merge", "export", "generate", "chat", "serve", "quantize", "inspect"):
        assert f"## jpeft {name}\n" in pages["reference/command_line.md"]
    assert "--batch-size" in pages["reference/command_line.md"] and "--topology" in pages["reference/command_line.md"]
    for field in dataclasses.fields(Config):
        assert f"`{field.name}`" in pages["reference/configuration.md"], field.name


def test_every_table_of_measurements_names_the_command_that_made_it():
    sections = re.split(r"^#+ ", (BOOK / "benchmarks.md").read_text(), flags=re.M)
    tables_found = 0
    for section in sections:
        before, rule, after = section.partition("\n|")
        if rule and re.search(r"\d", after):
            tables_found += 1
            named = re.findall(r"`(?:python (benchmarks/\w+\.py)|jpeft \w+)[^`]*`", before)
            assert named or re.search(r"`(python benchmarks/|jpeft \w)", after), section.splitlines()[0]
            assert all((ROOT / script).is_file() for script in named if script)
    assert tables_found >= 8


def test_first_sentences_and_the_help_of_fields_are_read_from_docstrings():
    class Base:
        """Base.

        Attributes:
          size: how large.
        """

    class Thing(Base):
        """Does a thing. More of it.

        Attributes:
          name, other: of a thing,
            or of another ``one``.
          size: see `Base`.

        >>> 1
        1
        """

    assert docstrings.summary(Thing) == "Does a thing." and docstrings.prose(Thing) == "Does a thing. More of it."
    text = "of a thing, or of another `one`."
    assert docstrings.field_help(Thing) == {"name": text, "other": text, "size": "how large."}


def test_docstrings_become_valid_markup():
    lines = [
        "Takes ``x``s and `Y`s:",
        "- one,",
        "  two;",
        "- three.",
        "",
        "Args:",
        "  model, *inputs, **kwargs: as there.",
    ]
    docstrings.prepare(None, "function", "f", None, None, lines)
    assert lines == [
        "Takes ``x``\\ s and `Y`\\ s:", "", "- one,", "  two;", "- three.", "", "Args:",
        "  model, \\*inputs, \\*\\*kwargs: as there.",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["no marks", "<!-- methods -->\n<!-- /methods -->\n" * 2])
def test_a_readme_without_one_pair_of_marks_is_told(text):
    with pytest.raises(ValueError, match="expected one pair of lines"):
        tables.filled(text, "| a |")
