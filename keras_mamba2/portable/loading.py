"""What is read before a program runs: the platform it is for, and the weights."""

import pathlib
from typing import Any

import jax

from keras_mamba2.portable.engine import COMPATIBILITY
from keras_mamba2.portable.manifest import MANIFEST_FILE
from keras_mamba2.portable.manifest import WEIGHTS_FILE
from keras_mamba2.portable.manifest import Manifest


def platform_of(manifest: Manifest, folder: pathlib.Path) -> str:
    """The name that `jax.export` has for what JAX runs on here; checks that it can."""
    from jax import export

    oldest = export.minimum_supported_calling_convention_version
    newest = export.maximum_supported_calling_convention_version
    if not oldest <= manifest.calling_convention <= newest:
        raise ValueError(
            f"{folder} was written by JAX {manifest.jax}, in version {manifest.calling_convention} "
            f"of the calling convention of `jax.export`. JAX {jax.__version__} reads {oldest} to "
            f"{newest}. {COMPATIBILITY}"
        )
    platform = export.default_export_platform()
    if platform not in manifest.platforms:
        raise ValueError(
            f"{folder} has programs for {', '.join(manifest.platforms)}, and JAX runs on "
            f"{platform} here. Export them for it, or set JAX_PLATFORMS."
        )
    return platform


def read_weights(manifest: Manifest, folder: pathlib.Path) -> list[Any]:
    """The weights on the device, in the order that the programs take them."""
    from safetensors import SafetensorError
    from safetensors import safe_open

    file = manifest.check(folder, WEIGHTS_FILE)
    try:
        with safe_open(file, "flax") as stored:
            return [stored.get_tensor(name) for name in manifest.weight_names]
    except SafetensorError as error:
        raise ValueError(f"{file} is not what {MANIFEST_FILE} says: {error}") from error
