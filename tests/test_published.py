"""What PyPI shows: the README of the built wheel, whose links lead somewhere, and its addresses."""

import email
import email.message
import pathlib
import re
import runpy
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
HOME = runpy.run_path(str(ROOT / "guides" / "first_cell.py"))["HOME"]
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def metadata(tmp_path_factory) -> email.message.Message:
    """METADATA of the wheel, built here."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def described(metadata) -> str:
    return metadata.get_payload(decode=True).decode()


def disagreements(home: str, readme: str, metadata: email.message.Message) -> list[str]:
    """What in the metadata of a wheel does not fit the address of the repository."""
    addresses = [value.split(", ")[1] for value in metadata.get_all("Project-URL", [])]
    foreign = [url for url in addresses if not home or not url.startswith(home)]
    found = [f"{url} is not below {home!r}" for url in foreign]
    if home and home not in addresses:
        found.append(f"[project.urls] lacks {home}")
    links = {target for _, target in LINK.findall(described(metadata))}
    found += [f"{target} leads nowhere" for target in links if "://" not in target]
    if home:
        for is_picture, path in LINK.findall(readme):
            address = f"{home}/{'raw' if is_picture else 'blob'}/main/{path}"
            if "://" not in path and address not in links:
                found.append(f"no link to {address}")
    return found


def test_the_wheel_names_the_home_of_the_repository_and_nothing_else(metadata):
    assert not disagreements(HOME, (ROOT / "README.md").read_text(), metadata)


def test_without_a_home_links_to_files_are_text(metadata):
    if HOME:
        return  # they are links: see above
    assert metadata["Description-Content-Type"] == "text/markdown"
    shown, readme = described(metadata), (ROOT / "README.md").read_text()
    assert "how they were taken: benchmarks (`benchmarks/README.md`)." in shown
    assert "](https://arxiv.org/abs/2405.21060)" in shown

    def words(text):
        return re.findall(r"\w+", re.sub(r"!\[.*?\)", "", text))

    assert words(shown) == words(readme)


@pytest.mark.parametrize(
    ("home", "address", "body", "found"),
    [
        ("", None, "docs (`docs/a.md`)", []),
        ("", None, "[docs](docs/a.md)", ["docs/a.md leads nowhere"]),
        ("", "https://a.org/b", "", ["https://a.org/b is not below ''"]),
        ("https://a.org/b", "https://a.org/b", "[docs](https://a.org/b/blob/main/docs/a.md)", []),
        (
            "https://a.org/b",
            "https://a.org/c",
            "[docs](https://a.org/c/blob/main/docs/a.md)",
            [
                "https://a.org/c is not below 'https://a.org/b'",
                "[project.urls] lacks https://a.org/b",
                "no link to https://a.org/b/blob/main/docs/a.md",
            ],
        ),
    ],
)
def test_what_does_not_fit_the_home_is_named(home, address, body, found):
    message = email.message.Message()
    if address:
        message["Project-URL"] = f"Repository, {address}"
    message.set_payload(body)
    assert disagreements(home, "[docs](docs/a.md)", message) == found
