import pathlib
import runpy
import sys
import tomllib
import types

import jupytext
import nbclient
import nbformat
import pytest

GUIDES = pathlib.Path(__file__).parents[1] / "guides"
NOTEBOOKS = sorted(GUIDES.glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_their_guides(notebook):
    guide = jupytext.read(notebook.with_suffix(".py"))
    cells = [[(cell.cell_type, cell.source) for cell in nb.cells] for nb in (
        guide, jupytext.read(notebook)
    )]  # fmt: skip
    assert cells[0] == cells[1]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_is_that_of_all_guides(notebook):
    first = runpy.run_path(str(GUIDES / "first_cell.py"))["CELL"]
    assert notebook.with_suffix(".py").read_text().count(first) == 1


def test_the_home_is_named_once():
    home = runpy.run_path(str(GUIDES / "first_cell.py"))["HOME"]
    project = tomllib.loads((GUIDES.parent / "pyproject.toml").read_text())["project"]
    assert bool(home) == ("urls" in project)


@pytest.fixture
def first_cell(monkeypatch, tmp_path):
    """Runs the first cell as if in Colab without the package; returns what is run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    commands = []
    monkeypatch.setattr("subprocess.run", lambda command, check: commands.append(command))
    code = runpy.run_path(str(GUIDES / "first_cell.py"))["CELL"]

    def run():
        exec(compile(code, "first cell", "exec"), {})
        return commands

    return run


def test_colab_installs_an_uploaded_wheel(first_cell, tmp_path):
    (tmp_path / "keras_mamba2-0.1.0-py3-none-any.whl").touch()
    ((*_, source),) = first_cell()
    assert source == "keras_mamba2-0.1.0-py3-none-any.whl"


def test_colab_without_a_wheel_says_how_to_get_one(first_cell):
    with pytest.raises(FileNotFoundError, match="pip wheel --no-deps"):
        first_cell()


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        pytest.param("generate", "ROMEO", marks=pytest.mark.slow),
        pytest.param("speculation", "True", marks=pytest.mark.slow),
        pytest.param("load_and_convert", "the same, bit for bit", marks=pytest.mark.slow),
        pytest.param("stateful_generation", "8,192 tokens", marks=pytest.mark.slow),
    ],
)
def test_notebooks_run(name, printed, tmp_path):
    """As notebooks, in a kernel of their own, from the first cell on."""
    notebook = nbformat.read(GUIDES / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("LONGEST = 2**20", "LONGEST = 2**13")
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert printed in "".join(o.text for o in outputs if o.output_type == "stream")


@pytest.mark.slow
def test_a_tiny_hybrid_learns_to_talk(capsys):
    runpy.run_path(str(GUIDES / "chat.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "assistant: Vienna is in Austria.\n" in out
    assert "assistant: On the Danube.\n" in out  # which only who remembers the first turn knows
    assert "37 of them remembered" in out
    assert "4 messages; the last: On the Tiber." in out
    assert out.endswith("London is in England.\n")


def test_other_recurrences_are_calls_of_ssd():
    """Linear attention, retention and its gated kin, each against its own definition."""
    found = runpy.run_path(str(GUIDES / "ssd_beyond_mamba2.py"), run_name="__main__")
    assert len(found["errors"]) == 4
    for name, error in found["errors"].items():
        assert error < 3e-6, name


@pytest.mark.slow
def test_a_forecaster_beats_what_is_free(tmp_path, monkeypatch):
    """With fewer epochs than in the guide, in which it gets better still."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    shorter = tmp_path / "guide.py"
    source = (GUIDES / "forecast.py").read_text()
    shorter.write_text(source.replace("EPOCHS = 10", "EPOCHS = 2"))
    found = runpy.run_path(str(shorter), run_name="__main__")
    mae = found["mae"]
    assert len(found["history"].epoch) == 2
    assert mae.pop("Mamba2Forecaster") < 0.9 * min(mae.values())
    # Two days of silence before the forecast, and still.
    assert found["without"][48] < min(mae.values())


@pytest.mark.slow
def test_fine_tuning_teaches_another_style(tmp_path, monkeypatch):
    """With fewer recipes than in the guide, which are enough to see it."""
    monkeypatch.chdir(tmp_path)
    source = (GUIDES / "fine_tune.py").read_text()
    assert "BATCH_SIZE = 600, 50, 2, 8" in source
    shorter = tmp_path / "guide.py"
    shorter.write_text(source.replace("BATCH_SIZE = 600, 50, 2, 8", "BATCH_SIZE = 96, 12, 1, 4"))
    results = runpy.run_path(str(shorter), run_name="__main__")["results"]
    trained, recipes, shakespeare = zip(*results.values(), strict=True)
    assert trained[0] == 0 < trained[2] < trained[1] / 10
    before, after, with_lora = recipes
    assert after < 0.4 * before  # 0.12 in the guide
    assert with_lora < 0.6 * before
    assert min(shakespeare) == shakespeare[0]  # nothing is for free
    assert not list(tmp_path.glob("fine_tuned/*backup"))  # all trainings are complete
