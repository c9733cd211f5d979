"""What kills cannot be timed to meet is set up by hand here; `tests/kills` has the rest."""

import os

import pytest

from keras_mamba2 import atomic_files
from keras_mamba2.atomic_files import atomic_file
from keras_mamba2.atomic_files import atomic_folder
from keras_mamba2.atomic_files import clean_up
from keras_mamba2.atomic_files import clean_up_in
from keras_mamba2.atomic_files import remove_folder
from keras_mamba2.atomic_files import replaced_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def make(folder, text):
    folder.mkdir(parents=True)
    (folder / "file").write_text(text)


@pytest.fixture
def between(tmp_path):
    """What a writer leaves that died between the two renamings; it replaced `tmp_path / "a"`."""
    holder = tmp_path / ".a.abcd_123.unfinished"
    make(holder / "old", "old")
    make(holder / "new" / "a", "new")
    (holder / "lock").touch()
    return holder


def test_a_replacement_cut_between_two_renamings_is_ended(between, tmp_path):
    clean_up(tmp_path / "a")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "new"


def test_it_is_ended_before_the_next_one(between, tmp_path):
    with pytest.raises(ValueError, match="stop"), replaced_folder(tmp_path / "a"):
        raise ValueError("stop")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "new"


@pytest.mark.parametrize("left", ["new", "old"])
def test_what_is_there_is_not_replaced_by_what_a_dead_writer_left(between, tmp_path, left):
    make(tmp_path / "a", "there")
    (between / left).rename(tmp_path / "gone")  # one that was still writing, or removing
    clean_up(tmp_path / "a")
    assert names(tmp_path) == ["a", "gone"]
    assert (tmp_path / "a" / "file").read_text() == "there"


def test_a_folder_that_the_user_removed_does_not_come_back(between, tmp_path):
    (between / "new" / "a").rename(tmp_path / "a")  # the writer died after that
    (tmp_path / "a").rename(tmp_path / "gone")
    clean_up(tmp_path / "a")
    assert names(tmp_path) == ["gone"]


@pytest.mark.parametrize("failures", [1, 2])
def test_the_old_folder_comes_back_when_the_new_one_cannot_be_renamed(
    tmp_path, monkeypatch, failures
):
    make(tmp_path / "a", "old")
    replace, calls = atomic_files.pathlib.Path.replace, []

    def failing(self, target):
        calls.append(self)
        if self.parent.name == "new" and len(calls) <= 1 + failures:
            raise PermissionError("no")
        return replace(self, target)

    monkeypatch.setattr(atomic_files.pathlib.Path, "replace", failing)
    with pytest.raises(PermissionError), replaced_folder(tmp_path / "a") as new:
        (new / "file").write_text("new")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "file").read_text() == ("new" if failures == 1 else "old")


def test_writers_that_live_are_left_alone(tmp_path):
    with atomic_file(tmp_path / "a") as first:
        first.write_text("1")
        clean_up_in(tmp_path)
        with atomic_file(tmp_path / "a") as second:
            second.write_text("2")
        assert (tmp_path / "a").read_text() == "2"
    assert (tmp_path / "a").read_text() == "1"
    assert names(tmp_path) == ["a"]


def test_litter_of_others_is_left_alone(tmp_path):
    others = [".a.b.abcd_123.unfinished", ".b.abcd_123.unfinished", ".a.abcd.unfinished", ".a"]
    for other in [*others, ".a.abcd_123.unfinished"]:
        (tmp_path / other).mkdir()
    with atomic_folder(tmp_path / "a"):
        pass
    assert names(tmp_path) == sorted([*others, "a"])
    clean_up_in(tmp_path)
    assert names(tmp_path) == [".a", ".a.abcd.unfinished", "a"]


def test_permissions_are_usual_and_stay(tmp_path):
    (tmp_path / "usual").mkdir()
    with replaced_folder(tmp_path / "a") as new:
        (new / "file").touch()
    modes = [(tmp_path / name).stat().st_mode for name in ("usual", "a")]
    assert modes[0] == modes[1]
    (tmp_path / "a").chmod(0o750)
    with replaced_folder(tmp_path / "a"):
        pass
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o750


def test_permissions_of_a_file_are_usual_and_stay(tmp_path):
    def write(mode):
        with atomic_file(tmp_path / "file") as new:
            new.touch()
            new.chmod(mode)

    (tmp_path / "usual").touch()
    write(0o600)
    modes = [(tmp_path / name).stat().st_mode for name in ("usual", "file")]
    assert modes[0] == modes[1]
    (tmp_path / "file").chmod(0o640)
    write(0o600)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_link_to_a_file_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/file")
    for text in ("old", "new"):
        with atomic_file(tmp_path / "link") as new:
            new.write_text(text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real" / "file").read_text() == text


@pytest.mark.parametrize("folder_of", [replaced_folder, atomic_folder])
def test_a_link_to_a_folder_stays_one(tmp_path, folder_of):
    if folder_of is replaced_folder:
        make(tmp_path / "real", "old")
    else:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with folder_of(tmp_path / "link") as new:
        (new / "file").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"


def test_the_current_folder_and_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder_of in (replaced_folder, atomic_folder):
        with pytest.raises(ValueError, match="current folder"), folder_of("."):
            pass
    (tmp_path / "a").touch()
    for folder_of in (replaced_folder, atomic_folder):
        with pytest.raises(ValueError, match="a"), folder_of("a"):
            pass
    with pytest.raises(ValueError, match="is a folder"), atomic_file("."):
        pass
    assert names(tmp_path) == ["a"]


def test_a_folder_is_removed(tmp_path):
    make(tmp_path / "a", "old")
    remove_folder(tmp_path / "a")
    assert not os.listdir(tmp_path)


def test_an_error_says_that_the_old_one_is_there(tmp_path):
    with pytest.raises(OSError, match="full") as caught, atomic_file(tmp_path / "a"):
        raise OSError("full")
    assert caught.value.__notes__ == [
        f"{tmp_path / 'a'} was not written. What was there before is unchanged."
    ]
