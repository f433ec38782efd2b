"""The layout of the package, held by reading its files: which way imports point, and who may name what."""

import ast
import functools
from pathlib import Path

import pytest

import jpeft

ROOT = Path(jpeft.__file__).parents[1]
LONGEST = 12  # files in a chain of imports
# Who may name flax.linen outside of the Linen front end and the models, which are Linen modules.
NAMES_LINEN = {
    "jpeft.parallel.batches",  # constrains the outputs of modules to keep a batch's sharding
}


def _files():
    found = {}
    for file in (ROOT / "jpeft").rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(file.read_text())
    return found


FILES = _files()


def _imports(module, hard):
    """The modules of jpeft that a module imports; ``hard``: when it is imported itself."""
    found = set()

    def visit(node, deferred):
        for child in ast.iter_child_nodes(node):
            checks_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            later = deferred or checks_types or isinstance(child, ast.FunctionDef)
            if isinstance(child, ast.ImportFrom) and child.module and not (hard and later):
                names = {f"{child.module}.{alias.name}" for alias in child.names}
                found.update(name if name in FILES else child.module for name in names)
            elif isinstance(child, ast.Import) and not (hard and later):
                found.update(alias.name for alias in child.names)
            visit(child, later)

    visit(FILES[module], False)
    return {name for name in found if name in FILES and name != module}


def test_no_circle_of_imports_not_even_a_deferred_one():
    above = {module: _imports(module, hard=False) for module in FILES}
    while leaves := {module for module, own in above.items() if not own & above.keys()}:
        above = {module: own for module, own in above.items() if module not in leaves}
    assert not above, f"imports in circles, or of circles: {sorted(above)}"


def test_chains_of_imports_are_short():
    @functools.cache
    def chain(module):
        return (module, *max(map(chain, _imports(module, hard=True)), key=len, default=()))

    longest = max(map(chain, FILES), key=len)
    assert len(longest) <= LONGEST, " > ".join(longest)


def test_the_package_does_not_import_its_own_root():
    assert not [module for module in FILES if "jpeft" in _imports(module, hard=False)]


@pytest.mark.parametrize("folder", ["core", "methods", "hf", "quantization"])
def test_these_import_no_module_system(folder):
    inside = [module for module in FILES if module.startswith(f"jpeft.{folder}")]
    assert inside and not [module for module in inside if _names_flax(module, ("linen", "nnx"))]


def test_few_name_the_module_system():
    outside = {m for m in FILES if _names_flax(m, ("linen",)) and not m.startswith(("jpeft.linen", "jpeft.models"))}
    assert outside <= NAMES_LINEN and len(outside) <= 3


def _names_flax(module, systems):
    for node in ast.walk(FILES[module]):
        if isinstance(node, ast.Import) and any(a.name == f"flax.{s}" for a in node.names for s in systems):
            return True
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            if any(name.startswith(f"flax.{s}") for name in names for s in systems):
                return True
    return False


def test_the_engine_knows_no_method():
    methods = {cls.__module__ for cls in jpeft.methods.METHODS.values()}
    assert "jpeft.methods.lora" in methods
    engine = [m for m in FILES if m.split(".")[1:2] in ([f] for f in ("core", "linen", "hf", "training", "parallel"))]
    engine = [m for m in engine if not m.startswith("jpeft.training.optimizers.")]  # each is for the leaves of one
    assert not {m: found for m in engine if (found := _imports(m, hard=False) & methods)}
