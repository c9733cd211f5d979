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


def test_generate_runs(capsys):
    runpy.run_path(str(GUIDES / "generate.py"), run_name="__main__")
    assert "ROMEO" in capsys.readouterr().out
