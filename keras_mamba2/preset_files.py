"""From the name of a preset to a local folder with its files, checked before anything is loaded."""

import difflib
import json
import pathlib

CONFIG_FILE = "config.json"
WEIGHTS_FILES = ("model.weights.h5", "model.weights.json")
TOKENIZER_FILES = ("tokenizer.json", "assets/tokenizer/tokenizer.json")
BACKBONE_NAME = "keras_mamba2>Mamba2Backbone"
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def embedded_presets() -> dict[str, pathlib.Path]:
    """The presets that ship with the package, weights included, by name."""
    package = pathlib.Path(__file__).parent
    # Inside the package once installed, beside it in a source checkout.
    for folder in (package / "presets", package.parent / "presets"):
        if folder.is_dir():
            return {path.parent.name: path.parent for path in sorted(folder.glob("*/config.json"))}
    return {}


def find_preset(preset: str, weights: bool = True, tokenizer: bool = True) -> str:
    """Resolves `preset` to what KerasHub loads from, and checks the files of a local folder.

    Args:
        preset: the name of an embedded preset, a local folder, or a handle such as `hf://...`.
        weights: bool, whether the weights will be read.
        tokenizer: bool, whether the tokenizer will be read.

    Returns:
        The path of a folder, or the handle as it is.

    Raises:
        ValueError: for an unknown name, and for a missing, truncated or foreign file.
    """
    preset = str(preset)
    if "://" in preset:
        return preset
    known = embedded_presets()
    folder = known.get(preset, pathlib.Path(preset))
    if not folder.is_dir():
        near = difflib.get_close_matches(preset, known, n=1, cutoff=0.4)
        raise ValueError(
            f"Unknown preset {preset!r}: neither the name of a preset nor a local folder. "
            f"Known names: {', '.join(known)}."
            + (f" Did you mean {near[0]!r}?" if near else "")
            + " A preset on the Hugging Face hub is written 'hf://user/name'."
        )
    check_folder(folder, weights, tokenizer)
    return str(folder)


def check_folder(folder: pathlib.Path, weights: bool = True, tokenizer: bool = True) -> None:
    """Raises a `ValueError` that names the file, unless `folder` is a preset of this package."""
    config = read_json(folder / CONFIG_FILE)
    name = config.get("registered_name")
    if name != BACKBONE_NAME:
        raise ValueError(
            f"{folder / CONFIG_FILE} is not the configuration of a Mamba2Backbone. "
            f"Expected: registered_name={BACKBONE_NAME!r}. Received: {name!r}"
        )
    if weights:
        check_weights(folder)
    if tokenizer:
        for file in TOKENIZER_FILES:
            read_json(folder / file)


def check_weights(folder: pathlib.Path) -> None:
    present = [folder / file for file in WEIGHTS_FILES if (folder / file).is_file()]
    if not present:
        raise ValueError(f"{folder / WEIGHTS_FILES[0]} is missing.")
    if present[0].suffix == ".json":
        shards = read_json(present[0]).get("weight_map", {}).values()
        # The shards of a variable: one name, or a list where it is cut over several.
        names = sorted({n for s in shards for n in ([s] if isinstance(s, str) else s)})
        files = [folder / name for name in names]
    else:
        files = present[:1]
    for file in files:
        check_hdf5(file)


def check_hdf5(file: pathlib.Path) -> None:
    """Raises unless `file` is a whole HDF5 file: an open one tells its own size."""
    import h5py

    if not file.is_file():
        raise ValueError(f"{file} is missing.")
    with file.open("rb") as stream:
        if stream.read(len(HDF5_SIGNATURE)) != HDF5_SIGNATURE:
            raise ValueError(f"{file} is not a weights file in HDF5 format.")
    try:
        h5py.File(file, "r").close()
    except OSError as error:
        raise ValueError(f"{file} is truncated or damaged: {error}") from error


def read_json(file: pathlib.Path) -> dict:
    try:
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} is missing.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is truncated or not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object. Received: {type(value).__name__}")
    return value
