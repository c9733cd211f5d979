"""Set before anything imports Keras. Fixtures that more than one module uses belong here."""

import atexit
import os
import tempfile

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The tests compare with float64. GPUs and TPUs would round float32 factors to fewer bits.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# No test asks a host outside. Those that need a hub have one on loopback: `hub_server.py`.
os.environ["HF_HUB_OFFLINE"] = "1"
# Many tests compile the same small programs, in two workers and many processes.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.TemporaryDirectory(prefix="compiled_by_tests")
    atexit.register(folder.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import pathlib

import pytest

SHARED_DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def byte_tokenizer():
    """The tokenizer of the embedded preset: ids are bytes, 256 is the end."""
    from keras_mamba2 import Mamba2Tokenizer
    from keras_mamba2.models.mamba2_tokenizer import byte_vocabulary

    return Mamba2Tokenizer(byte_vocabulary("<|endoftext|>"), [])


@pytest.fixture(scope="session")
def small_backbone_arguments():
    return {
        "vocabulary_size": 257,
        "num_layers": 2,
        "hidden_dim": 32,
        "state_dim": 8,
        "head_dim": 8,
        "num_groups": 2,
        "chunk_size": 16,
    }


@pytest.fixture(scope="session")
def preset_folder(tmp_path_factory, byte_tokenizer, small_backbone_arguments):
    """A preset with random weights, whose texts differ from prompt to prompt."""
    import keras

    import keras_mamba2

    keras.utils.set_random_seed(0)
    lm = keras_mamba2.Mamba2CausalLM(
        keras_mamba2.Mamba2Backbone(**small_backbone_arguments),
        keras_mamba2.Mamba2CausalLMPreprocessor(byte_tokenizer, sequence_length=32),
    )
    folder = tmp_path_factory.mktemp("presets") / "small"
    lm.save_to_preset(folder)
    return folder


# Programs of tests run once: most of their time is that of compiling them. Without LLVM's
# optimizations, emitters by way of MLIR, and parts of a program in threads it is a quarter.
COMPILE_SOON = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)


@pytest.fixture(scope="session")
def without_flags():
    """The environment of a user. The compiler of TPUs ends a process with flags of a CPU's."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


def pytest_configure(config):
    """`pytest -m ""` compiles as users do, and CI compiles some tests so (`.ci/run`)."""
    if config.option.markexpr in ("not slow", "slow"):
        os.environ.setdefault("XLA_FLAGS", COMPILE_SOON)


def pytest_collection_modifyitems(items):
    # Every subclass of TensorFlow's TestCase inherits a context manager named like a test.
    items[:] = [item for item in items if item.name != "test_session"]


def pytest_sessionfinish(session, exitstatus):
    """Where everything must run, as in CI, a skipped test is a failed run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not reporter:  # a worker of pytest-xdist, whose results another process reports
        return
    # But for want of a browser, which is no Python package, or of llama.cpp.
    missed = {"browser", "llama_cpp"}
    skipped = [r for r in reporter.stats.get("skipped", ()) if not missed & set(r.keywords)]
    if os.environ.get("KERAS_MAMBA2_NO_SKIPS") and skipped:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
