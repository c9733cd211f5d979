"""LoRA adapters of the `peft` library for transformers' Mamba-2: read, and written back."""

import collections
import json
import math
import re
import warnings
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import numpy as np

from keras_mamba2.atomic_files import atomic_folder
from keras_mamba2.conversion.architectures import exported_as
from keras_mamba2.conversion.config import errors_naming
from keras_mamba2.conversion.export import StoredWeight
from keras_mamba2.conversion.export import write_safetensors
from keras_mamba2.conversion.names import LINEAR
from keras_mamba2.conversion.names import Names
from keras_mamba2.conversion.names import Weight
from keras_mamba2.conversion.readers import read_file
from keras_mamba2.conversion.soundness import check_floats
from keras_mamba2.conversion.soundness import checksums_compared
from keras_mamba2.conversion.soundness import is_finite
from keras_mamba2.conversion.soundness import non_finite
from keras_mamba2.conversion.soundness import refuse_non_finite
from keras_mamba2.conversion.stored_tensor import StoredTensor
from keras_mamba2.preset_files import ADAPTER_CONFIG_FILE
from keras_mamba2.preset_files import ADAPTER_WEIGHTS
from keras_mamba2.preset_files import adapter_folder
from keras_mamba2.preset_files import read_json
from keras_mamba2.untrusted import shortened

PREFIX = "base_model.model."
TENSOR_NAME = re.compile(rf"(?:{re.escape(PREFIX)})?(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# Keys of the configuration that are read, and those that change nothing in a trained adapter. Of
# which modules there are adapters, the tensors tell.
KNOWN_KEYS = {
    *("peft_type", "task_type", "bias", "init_lora_weights", "r", "lora_alpha", "use_rslora"),
    *("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"),
    *("layers_to_transform", "lora_dropout", "inference_mode", "base_model_name_or_path"),
    *("revision", "auto_mapping", "peft_version", "runtime_config", "megatron_core", "eva_config"),
    *("qalora_group_size", "ensure_weight_tying"),
}
# What a key may be. Other initialisations change the weights that are adapted.
POSSIBLE = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none",),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
MOST_REPETITIONS = 2  # in the pattern for a module's name
DEFAULT_RANK = DEFAULT_ALPHA = 8  # of `peft.LoraConfig`


class Adapter(NamedTuple):
    """What a file says of one projection. The layer adds `alpha / rank` times the product."""

    rank: int
    alpha: float
    A: StoredTensor  # (rank in)
    B: StoredTensor  # (out rank)

    def assign_to(self, layer: keras.layers.Dense) -> None:
        layer.lora_kernel_a.assign(LINEAR.to_variable(self.A.read()).astype("float32"))
        layer.lora_kernel_b.assign(LINEAR.to_variable(self.B.read()).astype("float32"))


def read_peft_adapter(
    layers: Sequence[keras.layers.Dense], backbone_config: Mapping[str, Any], preset
) -> dict[Any, Adapter]:
    """The adapters in a folder, or in a repository `hf://user/name`, by layer.

    Args:
        layers: the projections that can be adapted.
        backbone_config: `get_config()` of their backbone.
        preset: the path of a folder, or a handle.

    Raises:
        ValueError: that names the folder, for an adapter of another kind than LoRA, one with
            parts that there is no place for, and one of another architecture or size.
    """
    folder = adapter_folder(preset)
    config = read_json(folder / ADAPTER_CONFIG_FILE)
    file = next(folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file())
    with errors_naming(folder):
        _check_config(config)
        tensors = read_file(file)
        _check_sound(file, tensors)
        pairs = _pairs(tensors)
        names = exported_as(backbone_config)[0].names_for(backbone_config)
        modules = {module_name(layer, names): layer for layer in layers if _is_whole(layer, names)}
        _check_modules(pairs, modules)
        return {
            modules[module]: _adapter(module, pair, modules[module], config)
            for module, pair in pairs.items()
        }


def _check_sound(file, tensors: Mapping[str, StoredTensor]) -> None:
    check_floats(file, tensors)
    with checksums_compared(tensors.values()), np.errstate(over="ignore", invalid="ignore"):
        arrays = {name: tensor.read().astype("float32") for name, tensor in tensors.items()}
    bad = [non_finite(name, array) for name, array in arrays.items() if not is_finite(array)]
    refuse_non_finite(file, bad)


def module_name(layer: keras.layers.Dense, names: Names) -> str:
    """The name in transformers, such as `backbone.layers.0.mixer.in_proj`."""
    weight, prefix = names.weight(f"{layer.path}/kernel")
    return (prefix + weight.name).removesuffix(".weight")


def _is_whole(layer: keras.layers.Dense, names: Names) -> bool:
    """Whether transformers has a module for this projection alone."""
    return names.weight(f"{layer.path}/kernel")[0].parts == (1,)


def _check_config(config: Mapping[str, Any]) -> None:
    for key, values in POSSIBLE.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(
                f"`{key}` must be one of {values} in {ADAPTER_CONFIG_FILE}. "
                f"Received: {key}={shortened(repr(config[key]))}"
            )
    for key, value in config.items():
        if key not in KNOWN_KEYS and value:
            raise ValueError(
                f"The adapter uses `{shortened(key)}`, which is not supported. Merge it with "
                "`peft`'s `merge_and_unload`, and load the whole model. Received: "
                f"{shortened(key)}={shortened(value)}"
            )
    _check_numbers(config)


def _check_numbers(config: Mapping[str, Any]) -> None:
    """Raises for ranks and alphas that are none, and for patterns that take for ever to match."""
    for key, of_modules in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        pattern = config.get(of_modules) or {}
        if not isinstance(pattern, Mapping):
            raise ValueError(f"A pattern must be an object. Received: {shortened(pattern)}")
        for value in (config.get(key, DEFAULT_RANK), *pattern.values()):
            # An alpha of 0 turns an adapter off.
            is_number = type(value) in (int, float) and math.isfinite(value) and value >= 0
            if not is_number or (key == "r" and (type(value) is not int or value < 1)):
                words = "a positive whole number" if key == "r" else "finite and not negative"
                raise ValueError(f"`{key}` must be {words}. Received: {key}={shortened(value)}")
        for name in pattern:
            if len(re.findall(r"[*+{]", name)) > MOST_REPETITIONS or re.search(r"\)[*+?{]", name):
                raise ValueError(
                    f"A pattern for names of modules is too complex: {shortened(name)!r}"
                )
            try:
                re.compile(name)
            except re.error as error:
                raise ValueError(
                    f"`{of_modules}` in {ADAPTER_CONFIG_FILE} has a pattern that is none: {error}. "
                    f"Received: {shortened(name)!r}"
                ) from error


def _pairs(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """The factors A and B of each module."""
    pairs: dict[str, dict[str, StoredTensor]] = collections.defaultdict(dict)
    unknown = []
    for name, tensor in tensors.items():
        match = TENSOR_NAME.fullmatch(name)
        if match:
            pairs[match["module"]][match["factor"]] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"There is no place for these tensors: {_some(unknown)}")
    alone = [module for module, pair in pairs.items() if len(pair) < 2]
    if alone or not pairs:
        raise ValueError(f"Modules without both lora_A and lora_B: {_some(alone) or 'all'}")
    return pairs


def _check_modules(pairs: Mapping[str, Any], modules: Mapping[str, Any]) -> None:
    unknown = [module for module in pairs if module not in modules]
    if unknown:
        raise ValueError(
            "The adapter is one of another architecture, or of modules that cannot be adapted "
            f"here. Without a place: {_some(unknown)}. The model has: {_some(list(modules))}"
        )


def _adapter(module: str, pair: Mapping[str, StoredTensor], layer, config) -> Adapter:
    rank = _by_module(module, config.get("rank_pattern"), config.get("r", DEFAULT_RANK))
    alpha = _by_module(module, config.get("alpha_pattern"), config.get("lora_alpha", DEFAULT_ALPHA))
    expected = {"A": (rank, layer.input_spec.axes[-1]), "B": (layer.units, rank)}
    for factor, shape in expected.items():
        if pair[factor].shape != shape:
            raise ValueError(
                f"The adapter is one of a model of another size. {module}.lora_{factor} has shape "
                f"{pair[factor].shape}, and needs {shape} for rank {rank} in this model."
            )
    if config.get("use_rslora"):
        alpha = alpha * math.sqrt(rank)  # alpha / sqrt(rank) is the scale
    return Adapter(rank, alpha, pair["A"], pair["B"])


def _by_module(module: str, pattern: Mapping[str, Any] | None, default):
    """The value for the first key that is the end of a module's name, or a pattern for it."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _some(names: Sequence[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" * (len(names) > count))


def write_peft_adapter(
    layers: Sequence[keras.layers.Dense],
    backbone_config: Mapping[str, Any],
    folder,
    base_model_name_or_path: str | None = None,
) -> None:
    """Writes the adapters of `layers` for `peft.PeftModel.from_pretrained`.

    Args:
        layers: all projections that can be adapted.
        backbone_config: `get_config()` of their backbone.
        folder: the path of a folder that does not exist yet, or is empty.
        base_model_name_or_path: string, where `peft`'s `Auto` classes find the model.

    Warns:
        UserWarning: if out_proj is adapted, which `peft` refuses for Mamba-2.

    Raises:
        ValueError: if no layer is adapted, for one that is a part of a module of transformers, and
            for a folder with files in it.
    """
    adapted = [layer for layer in layers if layer.lora_enabled]
    if not adapted:
        raise ValueError("There is no LoRA adapter to save. Call `backbone.enable_lora` first.")
    names = exported_as(backbone_config)[0].names_for(backbone_config)
    for layer in adapted:
        if not _is_whole(layer, names):
            raise ValueError(
                f"{layer.path!r} is a part of {module_name(layer, names)!r} in transformers, where "
                "an adapter is one of the whole. Adapt other projections, or call "
                "`backbone.merge_lora()` and export the model."
            )
    config = {**_config(layers, names), "base_model_name_or_path": base_model_name_or_path}
    weights = [
        StoredWeight.of(
            variable, Weight(f"{PREFIX}{module_name(layer, names)}.lora_{factor}.weight", LINEAR)
        )
        for layer in adapted
        for factor, variable in (("A", layer.lora_kernel_a), ("B", layer.lora_kernel_b))
    ]
    with atomic_folder(folder) as temporary:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (temporary / ADAPTER_CONFIG_FILE).write_text(text, "utf-8")
        write_safetensors(temporary / ADAPTER_WEIGHTS[0], weights)
    if any(layer.name == "out_proj" for layer in adapted):
        warnings.warn(
            "There are adapters of out_proj, which `peft` refuses for Mamba-2, since the fused "
            "CUDA kernels would pass them by. For `peft`, adapt in_proj alone, or call "
            "`backbone.merge_lora()` and export the model.",
            stacklevel=3,
        )


def _config(layers: Sequence[keras.layers.Dense], names: Names) -> dict[str, Any]:
    """What `peft.LoraConfig` is to say: the commonest rank and alpha, and who differs."""
    adapted = {module_name(layer, names): layer for layer in layers if layer.lora_enabled}
    ranks = {module: layer.lora_rank for module, layer in adapted.items()}
    alphas = {module: layer.lora_alpha for module, layer in adapted.items()}
    rank, alpha = (collections.Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    names = {layer.name for layer in adapted.values()}
    everywhere = sum(layer.name in names for layer in layers) == len(adapted)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "inference_mode": True,
        "lora_dropout": 0.0,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {m: value for m, value in ranks.items() if value != rank},
        "alpha_pattern": {m: value for m, value in alphas.items() if value != alpha},
        "target_modules": sorted(names) if everywhere else list(adapted),
    }
