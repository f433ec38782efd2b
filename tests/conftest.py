"""What every test runs under: eight CPU devices, strict promotion, warnings as errors (pyproject.toml)."""

import os

# Before jax is imported: a flag that comes later is ignored. Nearly all time goes into compiling what runs once, and
# half of that is LLVM's optimizer (what is compiled, its FLOPs and its bytes are XLA's and the same).
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"
])  # fmt: skip
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Before torch and numpy: pytest's processes use all cores, and threads of theirs would spin while they wait for one,
# which takes four times the CPU's time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import gc
from pathlib import Path

import jax
import pytest

from jpeft.core import attention
from jpeft.core.geometry import registry

jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="also run what is slow and exhaustive, as .ci/run does")
    parser.addoption("--products", action="store_true", help="also the contract's whole products: an hour, not in CI")
    parser.addoption("--all-meshes", action="store_true", help="a step on every mesh of 8 devices: half an hour")


# The files that take longest go first, so that no process waits for another at the end.
LONGEST = (
    "parallel/test_distributed.py", "parity/test_smollm2.py", "foreign/test_transformers.py", "core/test_contract.py",
    "recipes/test_chat_task.py", "parallel/test_sharding.py", "cli/test_cli.py", "parity/test_hf_decoder.py",
    "parity/test_decoder_torch.py", "parity/test_hf_peft.py", "test_benchmarks.py", "planning/test_planning.py",
    "quantization/test_quantization.py", "models/test_decoder.py", "cli/test_ends.py", "foreign/test_tunix.py",
    "nnx/test_twins.py", "nnx/test_nnx.py", "nnx/test_bad_input.py",
)  # fmt: skip


def pytest_collection_modifyitems(config, items):
    """Sorts the files. What is marked exhaustive or product is deselected without its flag: each such family has a
    cheap representative that runs."""
    here = Path(__file__).parent
    rank = {here / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
    off = [name for name, flag in (("exhaustive", "exhaustive"), ("product", "products")) if not config.getoption(flag)]
    left_out = [item for item in items if any(map(item.get_closest_marker, off))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture
def registries():
    """Lets a test register geometries and attentions, and forgets them afterwards."""
    tables = registry.REGISTERED, attention.REGISTERED
    saved = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, saved, strict=True):
        table.clear()
        table.update(before)


_MAPS = Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets compiled programs after a file, once there are many: each has some memory mappings, of which Linux gives
    a process 65,530. The next program then aborts the process."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()
        gc.collect()


def _quick_compiles():
    """Programs of tiny models are compiled without XLA's optimizations, which cost more than they give."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


quick_compiles = pytest.fixture(_quick_compiles)
quick_compiles_of_module = pytest.fixture(_quick_compiles, scope="module")  # also of what a module's fixtures compile


@pytest.fixture(scope="session")
def store():
    """A server for `gs://` paths, which this process and those that it starts use from now on."""
    from tests import object_store

    running = object_store.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in object_store.environment(running).items():
            patch.setenv(name, value)
        yield running
    running.shutdown()
    running.server_close()


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The HuggingFace folder of all-MiniLM-L6-v2: ``$JPEFT_MINILM``, or fetched once into jpeft's own cache."""
    from jpeft.recipes import assets

    given = os.environ.get("JPEFT_MINILM")
    return Path(given) if given else assets.resolve_model("minilm")


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct as a `.gguf` file: fetched once (93 MB)."""
    from jpeft.recipes import assets

    return assets.resolve_model("smollm2")


@pytest.fixture(scope="module")
def standard_promotion():
    """For a whole file: optax's Adam takes a power of a float by an integer, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def keep_compiled(tmp_path_factory):
    """Runs of one shape compile once in this process; those in a process of their own compile for themselves."""
    from jax.experimental.compilation_cache import compilation_cache

    wanted = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
