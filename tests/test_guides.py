import pathlib
import runpy

import jupytext
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


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("generate", "ROMEO"),
        ("load_and_convert", "the same, bit for bit"),
        ("stateful_generation", "8,192 tokens"),
    ],
)
def test_guides_run(name, printed, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    source = (GUIDES / f"{name}.py").read_text()
    shorter = tmp_path / "guide.py"
    shorter.write_text(source.replace("LONGEST = 2**20", "LONGEST = 2**13"))
    runpy.run_path(str(shorter), run_name="__main__")
    assert printed in capsys.readouterr().out


def test_other_recurrences_are_calls_of_ssd():
    """Linear attention, retention and its gated kin, each against its own definition."""
    found = runpy.run_path(str(GUIDES / "ssd_beyond_mamba2.py"), run_name="__main__")
    assert len(found["errors"]) == 4
    for name, error in found["errors"].items():
        assert error < 3e-6, name


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
