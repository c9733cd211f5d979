"""The first cell of every guide, which installs the package in Colab.

    python guides/first_cell.py

writes it into all guides and their notebooks. Maintainers set `HOME` when the repository has an
address on the web. Only pyproject.toml names it too: in `[project.urls]`, and in the links that the
README has on PyPI. `tests/test_published.py` checks that they agree.
"""

import pathlib
import re

import jupytext

HOME = ""  # the repository, such as "https://github.com/user/keras_mamba2"; "" for none yet
SOURCE = f"git+{HOME}" if HOME else ""

CELL = f"""# %%
# In Colab this installs the package; elsewhere it does nothing.
import importlib.util
import pathlib
import subprocess
import sys

if "google.colab" in sys.modules and importlib.util.find_spec("keras_mamba2") is None:
    source = "{SOURCE}"
    if not source:  # not published yet: from a wheel beside this notebook, or its own repository
        wheels = sorted(map(str, pathlib.Path().glob("keras_mamba2-*.whl")))
        source = wheels[-1] if wheels else ".."
        if not wheels and not pathlib.Path("../pyproject.toml").exists():
            raise FileNotFoundError(
                "keras_mamba2 is not published yet. Make a wheel with `pip wheel --no-deps .` in "
                "its repository, upload it here (Files, on the left), and run this cell again."
            )
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source], check=True)
"""

FIRST_CELL = re.compile(r"# %%\n# In Colab.*?\n(?=\n# %%)", re.DOTALL)


def main() -> None:
    for guide in sorted(pathlib.Path(__file__).parent.glob("*.ipynb")):
        source = guide.with_suffix(".py")
        text, count = FIRST_CELL.subn(lambda _: CELL, source.read_text(), count=1)
        if count != 1:
            raise ValueError(f"{source} has no cell that begins with '# In Colab'.")
        source.write_text(text)
        old, new = jupytext.read(guide), jupytext.read(source)
        for cell, former in zip(new.cells, old.cells, strict=True):
            cell["id"] = former["id"]  # so that only what changed is changed in the file
        new.metadata = old.metadata
        jupytext.write(new, guide)


if __name__ == "__main__":
    main()
