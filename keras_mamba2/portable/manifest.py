"""What stands in a folder of exported programs: `manifest.json`, and the names of its files."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

from keras_mamba2.arguments import BOOLEAN
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import STRING
from keras_mamba2.arguments import choice
from keras_mamba2.arguments import integer
from keras_mamba2.arguments import optional
from keras_mamba2.arguments import several
from keras_mamba2.host.sampling import KINDS
from keras_mamba2.untrusted import check_file
from keras_mamba2.untrusted import read_json
from keras_mamba2.untrusted import shortened

FORMAT_VERSION = 2
MANIFEST_FILE, WEIGHTS_FILE, TOKENIZER_FILE = (
    "manifest.json",
    "weights.safetensors",
    "tokenizer.json",
)
# JAX's names of what a program can be compiled for.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
WEIGHTS = ("beside", "inside")
# Of states, and of random numbers.
DTYPES = ("float64", "float32", "float16", "bfloat16", "int8", "int32", "int64", "uint32", "uint64")
MOST_GENERATORS = 1000


def program_file(platform: str, name: str, batch_size: int) -> str:
    return f"programs/{platform}/{name}_batch_{batch_size}.bin"


class StoredTensorSpec(NamedTuple):
    """One tensor of a state, without its batch axis."""

    name: str
    shape: tuple[int | None, ...]  # None for the room, the number of tokens that it has place for
    dtype: str
    room_axis: int | None = None

    def sizes(self, room: int) -> tuple[int, ...]:
        """The shape with room for so many tokens."""
        return tuple(room if size is None else size for size in self.shape)


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
    block_sizes: tuple[int, ...]  # in falling order
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
        hashes[MANIFEST_FILE] = own_sha256(content)
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
        hashes = content.get("sha256")
        if not isinstance(hashes, dict) or hashes.pop(MANIFEST_FILE, None) != own_sha256(
            {"format_version": version, **content}
        ):
            raise ValueError(f"{file} is damaged: it is not as it was written. {REMEDY}")
        names = [field.name for field in dataclasses.fields(cls)]
        if set(content) != set(names):
            odd = sorted(set(content) ^ set(names))
            raise ValueError(f"{file} is damaged: {shortened(odd)} is missing, or of no use.")
        read = {}
        for name in names:
            try:
                read[name] = _READ[name](content[name])
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{file} is damaged: {name}={shortened(content[name])}") from error
        return cls(**read)

    def check(self, folder: pathlib.Path, name: str) -> pathlib.Path:
        """The path of a file of `folder`.

        Raises:
            ValueError: that names the file, if it is missing, or not as it was written.
        """
        file = folder / name
        check_file(file)
        if name not in self.sha256 or sha256(file) != self.sha256[name]:
            raise ValueError(
                f"{file} is damaged: its sha256 is not that of {MANIFEST_FILE}. {REMEDY}"
            )
        return file


REMEDY = "Copy the folder again, or export the programs again."


def own_sha256(content: Mapping[str, Any]) -> str:
    """Of what a manifest says beside it."""
    hashes = {name: of for name, of in content["sha256"].items() if name != MANIFEST_FILE}
    text = json.dumps({**content, "sha256": hashes}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(file: pathlib.Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    """`value` for JSON: named tuples as objects."""
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _one(cls: Any) -> Callable[[Any], Any]:
    """Reads a named tuple from the object of its parts."""

    def read(parts):
        if set(_object(parts)) != set(cls._fields):
            raise ValueError(f"{shortened(parts)} is no {cls.__name__}")
        return cls(**{name: _PARTS[name](value) for name, value in parts.items()})

    return read


def _object(value: Any) -> dict:
    if not isinstance(value, dict):
        raise TypeError(f"{shortened(value)} is no object")
    return value


def _parameters(value: Any) -> dict[str, float]:
    return {name: KINDS[name].standard(number) for name, number in _object(value).items()}


def _rising_sizes(value: Any) -> tuple[int, ...]:
    sizes = several(SIZE, in_order=True).standard(value)
    if not sizes:
        raise ValueError("there is none")
    return sizes


def _falling_sizes(value: Any) -> tuple[int, ...]:
    return _rising_sizes(several(SIZE).standard(value)[::-1])[::-1]


def _tensors(values: Any) -> tuple[StoredTensorSpec, ...]:
    return tuple(map(_one(StoredTensorSpec), values))


_count = integer(at_least=0)
_PARTS: dict[str, Callable[[Any], Any]] = {
    "name": STRING.standard,
    "shape": several(optional(_count)).standard,
    "dtype": choice(*DTYPES).standard,
    "room_axis": optional(_count).standard,
    "parameters": lambda value: None if value is None else _parameters(value),
    "needs_history": BOOLEAN.standard,
    "num_generators": integer(at_least=0, at_most=MOST_GENERATORS).standard,
    "generator_dtype": choice(*DTYPES).standard,
    "start": several(_count).standard,
    "end": several(_count).standard,
    "special": several(_count).standard,
}
_READ: dict[str, Callable[[Any], Any]] = {
    "keras_mamba2": STRING.standard,
    "jax": STRING.standard,
    "calling_convention": _count.standard,
    "platforms": several(choice(*PLATFORMS)).standard,
    "batch_sizes": _rising_sizes,
    "block_sizes": _falling_sizes,
    "decode_capacity": SIZE.standard,
    "stop_token_capacity": SIZE.standard,
    "weights": choice(*WEIGHTS).standard,
    "weight_names": several(STRING).standard,
    "model": STRING.standard,
    "fingerprint": STRING.standard,
    "vocabulary_size": SIZE.standard,
    "sequence_length": optional(SIZE).standard,
    "state": _tensors,
    "sampler": _one(Sampler),
    "tokens": lambda value: None if value is None else _one(Tokens)(value),
    "sha256": _object,
}
