"""Names of torch modules and paths in the tree: ``.`` for ``/``, and the prefix of a wrapper."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from jpeft.core.tree import Path, join, nearest
from jpeft.errors import AdapterError

Prefix = str | Mapping[str, str]

ROOT = "base_model.model."  # before every name in a file of HuggingFace PEFT
PLAIN_ROOT = "base_model."  # the same beside virtual tokens, for which PEFT does not change the model's modules


def _closed(text: str, end: str) -> str:
    return text if not text or text.endswith(end) else text + end


@dataclass(frozen=True)
class Names:
    """Maps names to paths and back.

    Attributes:
      rules: pairs of a prefix of names and one of paths, such as ``("bert.", "encoder/")``.

    >>> names = Names.of({"encoder/": "bert."})
    >>> names.torch(("encoder", "layer", "0")), names.torch(("classifier",))
    ('bert.layer.0', 'classifier')
    """

    rules: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, prefix: Prefix) -> Names:
        """From the prefix of every torch name, or a mapping from tree prefixes to torch prefixes."""
        given = {"": prefix} if isinstance(prefix, str) else prefix
        return cls(tuple((_closed(torch, "."), _closed(tree, "/")) for tree, torch in given.items()))

    def torch(self, path: Path) -> str:
        """``("encoder", "layer", "0")`` to ``"encoder.layer.0"``. Inverse of `tree`."""
        name = "".join(part + "/" for part in path)
        rules = sorted([*self.rules, ("", "")], key=lambda rule: -len(rule[1]))  # the user's rules come first
        torch, tree = next(rule for rule in rules if name.startswith(rule[1]))
        return (torch + name[len(tree) :].replace("/", ".")).rstrip(".")

    def tree(self, module: str, owners: Collection[Path]) -> Path | None:
        """The path of a torch module, if it is one of ``owners``. Inverse of `torch`."""
        name = module + "."
        for torch, tree in sorted([*self.rules, ("", "")], key=lambda rule: -len(rule[0])):
            if name.startswith(torch):
                path = tuple(part for part in (tree + name[len(torch) :].replace(".", "/")).split("/") if part)
                if path in owners:
                    return path
        return None

    def covers(self, path: Path) -> bool:
        """Whether a path lies in the torch model, which by a rule may be only a part of this one."""
        return all(torch or join(path).startswith(tree) for torch, tree in self.rules)


def of_model(model: Any) -> Names:
    """The names of the torch model whose parts a model has, from its attribute ``torch_names``; else unchanged ones.

    >>> from jpeft.models.bert import Bert, BertConfig
    >>> of_model(Bert(BertConfig(), pooler=True, num_labels=2)).torch(("pooler", "dense"))
    'bert.pooler.dense'
    """
    return Names.of(getattr(model, "torch_names", ""))


def find(folder: FilePath, modules: Collection[str], owners: set[Path], own: Names = Names()) -> Names:
    """The names under which every module of a file has an owner.

    They are unchanged if possible, else the model's ``own``, else those by the shortest prefix.

    Raises:
      AdapterError: a module that has no place under any prefix, or several prefixes that fit equally well.
    """
    modules = sorted(modules)
    tried = (Names(), own, *_candidates(modules, owners))
    places = {names: [names.tree(m, owners) for m in modules] for names in tried}
    fits = [names for names, paths in places.items() if None not in paths]
    if first := [names for names in tried[:2] if names in fits]:
        return first[0]
    if not fits:
        best = min(places, key=lambda names: (places[names].count(None), names.rules))
        first = modules[places[best].index(None)]
        hint = nearest(first.replace(".", "/"), map(join, sorted(owners)))
        raise AdapterError(
            f"{folder} has tensors for {first!r}, which this model lacks{hint}; it belongs to another model, or "
            f"jpeft.hf.load takes prefix=, where modules lie, and ignore=[{first!r}], to leave it out"
        )
    shortest = min(len(names.rules[0][0]) for names in fits)
    rivals = sorted((n for n in fits if len(n.rules[0][0]) == shortest), key=lambda names: names.rules)
    if any(places[names] != places[rivals[0]] for names in rivals):
        options = " or ".join(f"prefix={ {tree: torch} }" for torch, tree in (n.rules[0] for n in rivals))
        raise AdapterError(f"{folder} fits several places of this model; choose one: {options}")
    return rivals[0]


def _candidates(modules: Iterable[str], owners: Iterable[Path]) -> set[Names]:
    """Prefixes to try: those of a module and an owner that end alike. A layer's number is never a part of one."""
    found = set()
    for parts in (tuple(m.split(".")) for m in modules):
        for owner in owners:
            for rest in range(1, min(len(parts), len(owner)) + 1):
                if parts[-rest] != owner[-rest]:
                    break
                torch, tree = parts[:-rest], owner[:-rest]
                if not any(part.isdigit() for part in torch + tree):
                    found.add(Names((("".join(p + "." for p in torch), "".join(p + "/" for p in tree)),)))
    return found
