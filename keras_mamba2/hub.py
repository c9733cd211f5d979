"""From `hf://user/name` to a local folder. `huggingface_hub` does the work."""

import pathlib
from collections.abc import Callable
from collections.abc import Sequence

PREFIX = "hf://"

# Picks, from the names of a repository's files, those that are needed.
Choice = Callable[[Sequence[str]], list[str]]


def fetch(handle: str, choose: Choice) -> pathlib.Path:
    """A local folder with the files of a repository that `choose` picks.

    Where the hub cannot be reached, the files of an earlier download serve.

    Args:
        handle: `hf://user/name`, or `hf://user/name@revision`.
        choose: is given the names of all files, and raises a `ValueError` if what is needed is
            not among them.

    Raises:
        ValueError: that names the repository, if it is not there, not open to the user, not
            reachable and not in the cache, or a download fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub import errors
    from huggingface_hub import snapshot_download

    repository, revision = parse(handle)
    try:
        names = _chosen(handle, choose, HfApi().list_repo_files(repository, revision=revision))
        return pathlib.Path(snapshot_download(repository, revision=revision, allow_patterns=names))
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{handle} is a gated repository. Accept its terms on the hub, then log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"There is no repository {handle} on the hub, or it is private. For a private one "
            "log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"The repository of {handle} has no revision {revision!r}.") from error
    # Not one base class: no network, offline mode, a server's error, a file of a wrong size.
    except OSError as error:
        return _cached(handle, choose, error)
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2"):
            raise
        return _cached(handle, choose, error)


def _chosen(handle: str, choose: Choice, names: Sequence[str]) -> list[str]:
    try:
        return choose(names)
    except ValueError as error:
        raise ValueError(f"{handle}: {error}") from error


def parse(handle: str) -> tuple[str, str | None]:
    """`(repository, revision)` of `hf://user/name[@revision]`."""
    repository, _, revision = handle.removeprefix(PREFIX).partition("@")
    if not handle.startswith(PREFIX) or not all(repository.partition("/")[::2]):
        raise ValueError(f"A handle on the hub is written 'hf://user/name'. Received: {handle!r}")
    return repository, revision or None


def _cached(handle: str, choose: Choice, reason: Exception) -> pathlib.Path:
    """What an earlier download has left, or an error that says what to do."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, revision = parse(handle)
    try:
        folder = pathlib.Path(
            snapshot_download(
                repository,
                revision=revision,
                local_files_only=True,
                allow_patterns=["config.json", "tokenizer_config.json"],
            )
        )
        files = [path for path in folder.rglob("*") if path.is_file()]
        choose([path.relative_to(folder).as_posix() for path in files])
    except (LocalEntryNotFoundError, ValueError) as missing:
        detail = f" {missing}" if isinstance(missing, ValueError) else ""
        raise ValueError(
            f"{handle} could not be downloaded, and its files are not in the cache.{detail} When "
            f"online, get them with `hf download {repository}`; a download that was cut goes on "
            f"where it ended. The hub's client says: {reason}"
        ) from reason
    return folder
