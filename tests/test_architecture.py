"""Imports go one way: ops -> layers -> state -> models -> generation -> tasks -> serving -> cli."""

import ast
import functools
import pathlib
import runpy

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "keras_mamba2"
ORDER = ["ops", "layers", "state", "models", "generation", "tasks", "serving", "cli"]
LEAVES = [
    "host",
    "_compat",
    "arguments",
    "atomic_files",
    "backend_choice",
    "chat",
    "command_process",
    "compiled_folder",
    "conversion",
    "devices",
    "hub",
    "portable",
    "preset_files",
    "saving",
    "training",
    "untrusted",
]
LEAVES += ["models.mamba2_tokenizer"]
MODEL_PARTS = {*ORDER} - {"cli"}
FILES = sorted(PACKAGE.rglob("*.py"))
OUTSIDE_COMPAT = [path for path in FILES if path.parent.name != "_compat"]
OVERRIDDEN = runpy.run_path(str(PACKAGE / "_compat" / "overridden.py"))["OVERRIDDEN"]
# Of the server. What is not of the engine is of the application.
ENGINE = ["answers", "engine", "prefix_cache", "prefix_folder", "prompts", "reading"]
ENGINE += ["requests", "scheduler", "slots"]
WEB = ["fastapi", "pydantic", "prometheus_client", "starlette", "uvicorn"]
# Documented, in spite of their names.
OF_NAMED_TUPLES = {"_asdict", "_field_defaults", "_fields", "_make", "_replace"}


def module_of(path):
    """`models.mamba2_backbone` of its file; '' of the package's own `__init__.py`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(tree, module=""):
    """The full names of the modules that a file imports, wherever in it; names from them too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path):
    """What a file imports from the package, below it: `layers.mamba2_block.Mamba2Block`."""
    for name in imports_of(ast.parse(path.read_text()), module_of(path)):
        if name.split(".")[0] == "keras_mamba2":
            yield name.removeprefix("keras_mamba2").removeprefix(".")


def is_in(name, modules):
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def is_leaf(path):
    return is_in(module_of(path), LEAVES)


def uses(path, names):
    """Which attributes or imported names of `names`, such as `jax.jit`, a file mentions."""
    tree = ast.parse(path.read_text())
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    mentioned = attributes | set(imports_of(tree))
    return {name for name in names if any(f".{m}".endswith(f".{name}") for m in mentioned)}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def defined_in(tree):
    """The private names of a file: its functions, classes, methods, and attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) == "self" else []


@functools.cache
def defined_in_package():
    return {name for path in FILES for name in defined_in(ast.parse(path.read_text()))}


def foreign_private_names(tree):
    """Which private names of others a file reads or sets, as `module.name` or `object.name`.

    What `self` has is its own if the package defines it, what `super()` has if it is listed as
    overridden, and what another object has if the same file defines it.
    """
    own = set(defined_in(tree)) | OF_NAMED_TUPLES
    overridden = {entry.name for entry in OVERRIDDEN}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            allowed = {"super()": overridden, "self": own | defined_in_package() | overridden}
            if node.attr not in allowed.get(owner, own):
                yield f"{owner}.{node.attr}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value):
                yield f"{ast.unparse(node.args[0])}.{name.value}"
    for name in imports_of(tree):
        if name.startswith(("keras.src", "keras_hub.src")):
            yield name


def of(path):
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=of)
def test_no_import_goes_up(path):
    part = module_of(path).split(".")[0]
    if part not in ORDER[:-1] or is_leaf(path):
        return  # cli, the top, may import the package as its users do
    allowed = ORDER[: ORDER.index(part) + 1] + LEAVES
    upward = [name for name in own_imports(path) if not is_in(name, allowed)]
    assert not upward, f"{part} imports {upward}"


@pytest.mark.parametrize("path", [path for path in FILES if is_leaf(path)], ids=of)
def test_leaves_know_no_model(path):
    known = [
        name for name in own_imports(path) if is_in(name, MODEL_PARTS) and not is_in(name, LEAVES)
    ]
    assert not known, f"{module_of(path)} imports {known}"


@pytest.mark.parametrize("path", [path for path in FILES if "tokenizer" in path.name], ids=of)
def test_the_tokenizer_needs_no_jax(path):
    assert not [name for name in imports_of(ast.parse(path.read_text())) if is_in(name, ["jax"])]


@pytest.mark.parametrize("path", FILES, ids=of)
def test_programs_are_compiled_under_generation_only(path):
    """And exported ones, loops of an operation and over blocks, and models without values."""
    others = ["portable", "ops.ssd_jax", "models.stacked_blocks", "conversion.deferred"]
    if not is_in(module_of(path), ["generation", *others]):
        assert not uses(path, ["jax.jit", "StatelessScope"])


@pytest.mark.parametrize("path", OUTSIDE_COMPAT, ids=of)
def test_private_parts_of_others_are_taken_from_compat(path):
    names = list(foreign_private_names(ast.parse(path.read_text())))
    assert not names, f"{of(path)} uses {names}, which belongs into keras_mamba2/_compat"


def test_compat_is_below_everything():
    for path in sorted((PACKAGE / "_compat").glob("*.py")):
        above = [name for name in own_imports(path) if not is_in(name, ["_compat"])]
        assert not above, f"{of(path)} imports {above}"


def test_every_part_has_its_place():
    """A new folder or file at the top is put in the order, or it is a leaf."""
    parts = {module_of(path).split(".")[0] for path in FILES} - {""}
    assert parts <= {*ORDER, *LEAVES}


def test_the_rules_see_what_they_forbid():
    source = "import jax\nfrom keras_mamba2.tasks import x\ndef f():\n    import keras_mamba2.cli\n"
    assert list(imports_of(ast.parse(source))) == [
        "jax",
        "keras_mamba2.tasks.x",
        "keras_mamba2.cli",
    ]
    jitted = [path for path in FILES if uses(path, ["jax.jit", "StatelessScope"])]
    assert jitted, "generation compiles its programs in a way that this test does not know"


def test_the_rule_sees_private_parts_of_others():
    source = """
from keras.src.backend import config
import keras_hub.src.models
class A(Dense):
    def __init__(self):
        self._own = 1
    def call(self, x):
        super()._int8_call(x)
        super()._untrack_variable(x)
        self._untrack_variable(x)
        getattr(x, "_value")
        x._autocast = False
        return self._own + x._own + x._replace(a=1)
"""
    assert set(foreign_private_names(ast.parse(source))) == {
        "keras.src.backend.config",
        "keras_hub.src.models",
        "super()._untrack_variable",
        "self._untrack_variable",
        "x._value",
        "x._autocast",
    }


@pytest.mark.parametrize("path", sorted((PACKAGE / "serving").glob("*.py")), ids=of)
def test_the_engine_knows_no_http_and_the_application_no_arrays(path):
    foreign = WEB if path.stem in ENGINE else ["jax", "numpy", "keras"]
    assert not [name for name in imports_of(ast.parse(path.read_text())) if is_in(name, foreign)]
