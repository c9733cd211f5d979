"""Pages of the site that are files of the repository: guides, README, benchmarks, changes."""

import pathlib
import re

import jupytext
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {
    "index.md": "README.md",
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
PICTURES = tuple(
    f"benchmarks/results/{name}" for name in ("cpu.png", "speculation.svg", "prompts.png")
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in PAGES.items():
        text = links_within_site((ROOT / source).read_text(), source)
        files.append(File.generated(config, page, content=text))
    for notebook in sorted((ROOT / "guides").glob("*.ipynb")):
        guide = jupytext.read(notebook.with_suffix(".py"))
        text = jupytext.writes(guide, "md")
        files.append(File.generated(config, f"guides/{notebook.stem}.md", content=text))
    for picture in PICTURES:
        files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown: str, page: Page, **_) -> str:
    """Links of `docs/*.md` are those of the repository, so that they work there too."""
    source = pathlib.PurePath(page.file.src_uri)
    if source.parent.name or str(source) in PAGES:
        return markdown
    return links_within_site(markdown, f"docs/{source}")


def links_within_site(text: str, source: str) -> str:
    """Links to files of the repository lead to their pages; those without one become text."""
    folder = (ROOT / source).parent
    known = {ROOT / file: page for page, file in PAGES.items()}
    known |= {ROOT / picture: picture for picture in PICTURES}
    known |= {
        path: path.name for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".png")
    }
    known |= {
        path.with_suffix(".py"): f"guides/{path.stem}.md"
        for path in (ROOT / "guides").glob("*.ipynb")
    }

    def replace(match: re.Match[str]) -> str:
        label, target = match.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        page = known.get((folder / path).resolve())
        if page is None and label.startswith("!"):
            raise ValueError(f"{source} shows {path}, which is not among the site's pictures.")
        if page is None:
            return label.removeprefix("[").removesuffix("]")
        return f"{label}({page}{'#' + anchor if anchor else ''})"

    return re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", replace, text)
