"""Imports go one way: ops -> layers -> models -> generation -> tasks -> cli."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "keras_mamba2"
ORDER = ["ops", "layers", "models", "generation", "tasks", "cli"]
LEAVES = ["atomic_files", "conversion", "hub", "preset_files", "training"]
LEAVES += ["models.mamba2_tokenizer"]
MODEL_PARTS = {*ORDER} - {"cli"}
FILES = sorted(PACKAGE.rglob("*.py"))


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
    """Beside the loop of an operation, for eager calls, and the making of models without values."""
    if not is_in(module_of(path), ["generation", "ops.ssd_jax", "conversion.deferred"]):
        assert not uses(path, ["jax.jit", "StatelessScope"])


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
