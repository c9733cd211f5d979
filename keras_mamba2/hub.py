"""From `hf://user/name` to a local folder, and back. `huggingface_hub` does the work."""

import pathlib
import tempfile
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Sequence

from keras_mamba2.saving import TASK_FILES
from keras_mamba2.untrusted import some

PREFIX = "hf://"
CARD = "README.md"

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
    names = None
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
    # No network, offline mode, a server's error, a file of a wrong size. `HTTPError` is that of
    # the HTTP library, whichever the client uses.
    except (OSError, errors.HTTPError) as error:
        return _cached(handle, choose, names, error)


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


def push(
    handle: str,
    save: Callable[[pathlib.Path], None],
    card: Callable[[str], str],
    private: bool | None,
    token: str | None,
    commit_message: str,
) -> str:
    """Uploads what `save` writes into a folder as one commit, and returns the commit's address.

    The repository is made if there is none.

    Args:
        handle: `user/name` or `hf://user/name`.
        save: writes the files into the empty folder that it is given.
        card: from the repository's name the model card for one that has none.
        private: whether a new repository is private; `None` for the user's default.
        token: the user's token; `None` for that of `hf auth login` or HF_TOKEN.
        commit_message: of the commit.

    Raises:
        ValueError: for a handle that is none, and where the hub does not know the user, or does
            not let them write there. Without a valid token before anything is saved.
    """
    from huggingface_hub import HfApi
    from huggingface_hub import errors

    repository, revision = parse(PREFIX + handle.removeprefix(PREFIX))
    if revision is not None:
        raise ValueError(f"A preset is pushed to a repository, not to a revision: {handle!r}")
    api = HfApi(token=token)
    try:
        api.whoami()
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary)
            save(folder)
            repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
            if not api.file_exists(repository, CARD):
                (folder / CARD).write_text(card(repository))
            # What an earlier push has left would be loaded with the new files, or before them.
            return api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=commit_message,
                delete_patterns=list(TASK_FILES),
            ).commit_url
    except (errors.LocalTokenNotFoundError, errors.HfHubHTTPError) as error:
        raise ValueError(
            f"{handle} could not be pushed. Log in with `hf auth login`, set HF_TOKEN or pass "
            f"`token`: one that may write there. The hub's client says: {error}"
        ) from error


def card(repository: str, pipeline_tag: str, task: str) -> str:
    """A short model card: metadata, and how the class `task` loads the model."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="keras-hub", pipeline_tag=pipeline_tag, tags=["mamba2", "keras_mamba2"]
    )
    name = repository.split("/")[-1]
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n```python\nimport keras_mamba2\n\n"
        f'model = keras_mamba2.{task}.from_preset("{PREFIX}{repository}")\n```\n'
    )


def _cached(
    handle: str, choose: Choice, names: Collection[str] | None, reason: Exception
) -> pathlib.Path:
    """What an earlier download has left, or an error that says what to do.

    `names` are of the files that are needed; `None` where the hub did not even list its files.
    """
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
        found = [path.relative_to(folder).as_posix() for path in files]
        choose(found)
        if missing := sorted(set(names or ()) - set(found)):
            raise ValueError(f"Of those, {some(missing)} did not arrive.")
    except (LocalEntryNotFoundError, ValueError) as error:
        detail = f" {error}" if isinstance(error, ValueError) else ""
        cause = f" ({reason.__cause__})" if reason.__cause__ is not None else ""
        raise ValueError(
            f"{handle} could not be downloaded, and its files are not in the cache.{detail} When "
            f"online, get them with `hf download {repository}`; a download that was cut goes on "
            f"where it ended. The hub's client says: {reason}{cause}"
        ) from reason
    return folder
