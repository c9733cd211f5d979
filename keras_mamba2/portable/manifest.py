"""What stands in a folder of exported programs: `manifest.json`, and the names of its files."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

from keras_mamba2.untrusted import check_file
from keras_mamba2.untrusted import read_json
from keras_mamba2.untrusted import shortened

FORMAT_VERSION = 1
MANIFEST_FILE, WEIGHTS_FILE, TOKENIZER_FILE = (
    "manifest.json",
    "weights.safetensors",
    "tokenizer.json",
)
# JAX's names of what a program can be compiled for.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
WEIGHTS = ("beside", "inside")


def program_file(platform: str, name: str, batch_size: int) -> str:
    return f"programs/{platform}/{name}_batch_{batch_size}.bin"


class StoredTensorSpec(NamedTuple):
    """One tensor of a state, without its batch axis."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    room_axis: None = None  # its size is fixed


class Sampler(NamedTuple):
    """How the model picked tokens when it was exported."""

    name: str
    # Of `FilterSampler`; None for a sampler that has no such parameters.
    parameters: Mapping[str, float | None] | None
    needs_history: bool
    num_generators: int
    generator_dtype: str

    @property
    def has_program(self) -> bool:
        """Whether it has a program of its own, beside the one with parameters for each row."""
        return self.name != "FilterSampler"


class Tokens(NamedTuple):
    """What a tokenizer's file does not tell."""

    start: tuple[int, ...]  # before every text
    end: tuple[int, ...]  # where a text ends
    special: tuple[int, ...]  # that are no text


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a loader must know before it runs anything."""

    keras_mamba2: str  # versions that wrote it
    jax: str
    calling_convention: int
    platforms: tuple[str, ...]
    batch_sizes: tuple[int, ...]  # in rising order
    block_sizes: tuple[int, ...]
    decode_capacity: int
    stop_token_capacity: int
    weights: str
    weight_names: tuple[str, ...]  # in the order that the programs take them
    model: str
    fingerprint: str
    vocabulary_size: int
    sequence_length: int | None  # the default `max_length`
    state: tuple[StoredTensorSpec, ...]
    sampler: Sampler
    tokens: Tokens | None  # None without a tokenizer
    sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def write(self, folder: pathlib.Path) -> None:
        """Writes the manifest of `folder`, with the hashes of all files that are there."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        hashes = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
        parts = {
            field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)
        }
        content = {"format_version": FORMAT_VERSION, **parts, "sha256": hashes}
        (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=1) + "\n", "utf-8")

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Manifest":
        """The manifest of `folder`.

        Raises:
            ValueError: that names the file, for one that is missing, damaged, or of another
                version of the format.
        """
        file = folder / MANIFEST_FILE
        content = read_json(file)
        version = content.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{file} is not of the format that this version reads. Export the programs again "
                f"with this version. Expected: format_version={FORMAT_VERSION}. "
                f"Received: {shortened(version)}"
            )
        names = [field.name for field in dataclasses.fields(cls)]
        if set(content) != set(names):
            odd = sorted(set(content) ^ set(names))
            raise ValueError(f"{file} is damaged: {shortened(odd)} is missing, or of no use.")
        try:
            return cls(**{name: _READ[name](content[name]) for name in names})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged: {shortened(str(error))}") from error

    def check(self, folder: pathlib.Path, name: str) -> pathlib.Path:
        """The path of a file of `folder`.

        Raises:
            ValueError: that names the file, if it is missing, or not as it was written.
        """
        file = folder / name
        check_file(file)
        if name not in self.sha256 or sha256(file) != self.sha256[name]:
            raise ValueError(
                f"{file} is damaged: its sha256 is not that of {MANIFEST_FILE}. Copy the folder "
                "again, or export the programs again."
            )
        return file


def sha256(file: pathlib.Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    """`value` for JSON: named tuples as objects."""
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _of(cls: type) -> Callable[[Any], Any]:
    def read(value):
        if not isinstance(value, cls) or (isinstance(value, bool) and cls is int):
            raise TypeError(f"{value!r} is no {cls.__name__}")
        return value

    return read


def _tuple_of(read: Callable[[Any], Any]) -> Callable[[Any], tuple]:
    return lambda values: tuple(read(value) for value in _of(list)(values))


def _optional(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def _state_tensor(value: dict) -> StoredTensorSpec:
    return StoredTensorSpec(
        _text(value["name"]), _tuple_of(_count)(value["shape"]), _text(value["dtype"])
    )


def _sampler(value: dict) -> Sampler:
    return Sampler(
        _text(value["name"]),
        _optional(_of(dict))(value["parameters"]),
        _of(bool)(value["needs_history"]),
        _count(value["num_generators"]),
        _text(value["generator_dtype"]),
    )


def _tokens(value: dict) -> Tokens:
    return Tokens(*(_tuple_of(_count)(value[name]) for name in Tokens._fields))


def _one_of(*names: str) -> Callable[[Any], str]:
    def read(value):
        if value not in names:
            raise ValueError(f"{value!r} is none of {names}")
        return value

    return read


_text, _count = _of(str), _of(int)
_READ: dict[str, Callable[[Any], Any]] = {
    "keras_mamba2": _text,
    "jax": _text,
    "calling_convention": _count,
    "platforms": _tuple_of(_one_of(*PLATFORMS)),
    "batch_sizes": _tuple_of(_count),
    "block_sizes": _tuple_of(_count),
    "decode_capacity": _count,
    "stop_token_capacity": _count,
    "weights": _one_of(*WEIGHTS),
    "weight_names": _tuple_of(_text),
    "model": _text,
    "fingerprint": _text,
    "vocabulary_size": _count,
    "sequence_length": _optional(_count),
    "state": _tuple_of(_state_tensor),
    "sampler": _sampler,
    "tokens": _optional(_tokens),
    "sha256": _of(dict),
}
