"""LoRA adapters of the `peft` library for transformers' models: read, and written back.

`peft` adapts the matrices of all experts as one parameter, with a rank for each expert. Of two
parameters of a module one adapter wraps the other, which tensors are named by: see `_wrappers`.
Where a model has a module for each expert, as older ones of Nemotron 3, each has an adapter of its
own, which is read too.

What is one matrix there and several here, as gate and up, has one adapter there: see `_joined`.
"""

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
from keras_mamba2.conversion.names import LINEAR
from keras_mamba2.conversion.names import Layout
from keras_mamba2.conversion.names import Names
from keras_mamba2.conversion.names import Piece
from keras_mamba2.conversion.names import Weight
from keras_mamba2.conversion.readers import read_file
from keras_mamba2.conversion.soundness import check_floats
from keras_mamba2.conversion.soundness import checksums_compared
from keras_mamba2.conversion.soundness import non_finite
from keras_mamba2.conversion.soundness import refuse_non_finite
from keras_mamba2.conversion.stored_tensor import StoredTensor
from keras_mamba2.conversion.stored_tensor import same_bits
from keras_mamba2.host.finite import is_finite
from keras_mamba2.host.tensor_file import save_tensors
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
    *("qalora_group_size", "ensure_weight_tying", "target_parameters"),
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
# Models for which `peft` refuses adapters of out_proj.
FUSED = ("mamba2", "falcon_h1", "nemotron_h")


class Adapter(NamedTuple):
    """What a file says of one projection. The layer adds `alpha / rank` times the product."""

    rank: int
    alpha: float
    a: np.ndarray  # of the shape of `lora_kernel_a`
    b: np.ndarray  # of the shape of `lora_kernel_b`

    def assign_to(self, layer: Any) -> None:
        layer.lora_kernel_a.assign(self.a)
        layer.lora_kernel_b.assign(self.b)


def _layouts(layer) -> tuple[Layout, Layout]:
    """How the factors A and B lie in a file."""
    e = getattr(layer, "num_experts", None)
    if e is None:
        return LINEAR, LINEAR
    # (e*r in) <-> (e in r), and (out r*e) <-> (e r out)
    return (
        Layout(
            lambda a: a.reshape(e, -1, a.shape[-1]).swapaxes(1, 2),
            lambda a: a.swapaxes(1, 2).reshape(-1, a.shape[1]),
        ),
        Layout(
            lambda b: b.reshape(len(b), -1, e).transpose(2, 1, 0),
            lambda b: b.transpose(2, 1, 0).reshape(b.shape[-1], -1),
        ),
    )


def read_peft_adapter(
    layers: Sequence[Any], backbone_config: Mapping[str, Any], preset
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
    file = next(folder / name for name in ADAPTER_WEIGHTS if (folder / name).exists())
    with errors_naming(folder):
        _check_config(config)
        tensors = read_file(file)
        _check_sound(file, tensors)
        names = exported_as(backbone_config)[0].names_for(backbone_config)
        pairs = _without_copies(_pairs(tensors, names), names)
        modules = _modules(layers, names, config.get("target_parameters") or ())
        of_experts = _modules_of_experts(layers, names)
        _check_modules(pairs, [*modules, *of_experts])
        adapters = {
            layer: _adapter(pairs[module], layer, config, names)
            for module, parts in modules.items()
            if module in pairs
            for layer in parts
        }
        for layer in dict.fromkeys(of_experts[m].layer for m in pairs if m in of_experts):
            if layer in adapters:
                raise ValueError(f"There are two adapters of {layer.path!r}.")
            adapters[layer] = _adapter_of_experts(pairs, layer, of_experts, config)
        return adapters


def _check_sound(file, tensors: Mapping[str, StoredTensor]) -> None:
    check_floats(file, tensors)
    bad = []
    with checksums_compared(tensors.values()), np.errstate(over="ignore", invalid="ignore"):
        for name, tensor in tensors.items():
            array = tensor.read().astype("float32")
            if not is_finite(array):
                bad.append(non_finite(name, array))
    refuse_non_finite(file, bad)


def module_name(layer, names: Names) -> str:
    """The name in transformers, such as `backbone.layers.0.mixer.in_proj`."""
    return names.in_memory(f"{layer.path}/kernel")


def _places(module: str, names: Names) -> list[str]:
    """`module`, and those that share its weights: a shared block is one at each of its places."""
    copies = [
        copy + module.removeprefix(original)
        for copy, original in names.copies.items()
        if copy != original and module.startswith(original)
    ]
    return [module, *copies]


def _is_parameter(layer, names: Names) -> bool:
    return _weight(layer, names).parameter is not None


def _modules(layers: Sequence[Any], names: Names, targets: Sequence[str]) -> dict[str, list[Any]]:
    """The layers that `peft` may adapt, by what the names of their tensors begin with.

    Several layers of one module are in the order of its rows.

    Args:
        layers: all projections.
        names: of their weights.
        targets: names of the parameters that are adapted, or their ends.
    """
    parameters = [module_name(layer, names) for layer in layers if _is_parameter(layer, names)]
    wrappers = _wrappers([name for name in parameters if _ends_with_one(name, targets)])
    modules: dict[str, list[Any]] = collections.defaultdict(list)
    for layer in sorted(layers, key=lambda layer: _weight(layer, names).part):
        name = module_name(layer, names)
        if name in wrappers or name not in parameters:
            modules[wrappers.get(name, name)].append(layer)
    return modules


class OfExpert(NamedTuple):
    """A module that is the matrix of one expert."""

    layer: Any
    expert: int
    name: str  # as in files


def _modules_of_experts(layers: Sequence[Any], names: Names) -> dict[str, OfExpert]:
    """The modules of models that have one for each expert."""
    modules = {}
    for layer in layers:
        weight, prefix = names.weight(f"{layer.path}/kernel")
        if "{expert}" not in weight.name:
            continue
        for i in range(layer.num_experts):
            name = prefix + weight.name.format(expert=i).removesuffix(".weight")
            modules[names.renamed_name(name)] = OfExpert(layer, i, name)
    return modules


def _weight(layer, names: Names) -> Weight:
    return names.weight(f"{layer.path}/kernel")[0]


def _ends_with_one(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _wrappers(parameters: Sequence[str]) -> dict[str, str]:
    """The module of each parameter's adapter: the last one of a module wraps the others."""
    wrappers: dict[str, str] = {}
    for name in reversed(dict.fromkeys(parameters)):
        module = name.rpartition(".")[0]
        while module in wrappers.values():
            module += ".base_layer"
        wrappers[name] = module
    return wrappers


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
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ValueError(
            f"`target_parameters` must be a list of names in {ADAPTER_CONFIG_FILE}. "
            f"Received: {shortened(targets)}"
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


def _pairs(tensors: Mapping[str, StoredTensor], names: Names) -> dict[str, dict[str, StoredTensor]]:
    """The factors A and B of each module."""
    pairs: dict[str, dict[str, StoredTensor]] = collections.defaultdict(dict)
    unknown = []
    for name, tensor in tensors.items():
        match = TENSOR_NAME.fullmatch(name)
        if match:
            pairs[names.renamed_name(match["module"])][match["factor"]] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"There is no place for these tensors: {_some(unknown)}")
    alone = [module for module, pair in pairs.items() if len(pair) < 2]
    if alone or not pairs:
        raise ValueError(f"Modules without both lora_A and lora_B: {_some(alone) or 'all'}")
    return pairs


def _without_copies(
    pairs: Mapping[str, dict[str, StoredTensor]], names: Names
) -> dict[str, dict[str, StoredTensor]]:
    """`pairs` with one adapter for all the places of a block that they share."""
    found = dict(pairs)
    for module in pairs:
        for copy in _places(module, names)[1:]:
            if copy not in found:
                continue
            pair = found.pop(copy)
            if not all(same_bits(pair[factor], pairs[module][factor]) for factor in "AB"):
                raise ValueError(
                    f"The adapter of {copy} differs from that of {module}. Both are places of one "
                    "block, which has one adapter here. Train one with `backbone.enable_lora`; "
                    "`peft` itself cannot merge one of each place into the weights that they share."
                )
    return found


def _check_modules(pairs: Mapping[str, Any], modules: Sequence[str]) -> None:
    unknown = [module for module in pairs if module not in modules]
    if unknown:
        raise ValueError(
            "The adapter is one of another architecture, or of modules that cannot be adapted "
            f"here. Without a place: {_some(unknown)}. The model has: {_some(modules)}"
        )


def _adapter(pair: Mapping[str, StoredTensor], layer, config, names: Names) -> Adapter:
    module, weight = module_name(layer, names), _weight(layer, names)
    rank, alpha = _rank_and_alpha(_spellings(module, names), config)
    factors = []
    for factor, layout, variable_shape in zip(
        "AB", _layouts(layer), layer.lora_shapes(rank), strict=True
    ):
        # Parts of a module share A, and each has its rows of B.
        part, parts = (0, (1,)) if factor == "A" else (weight.part, weight.parts)
        piece = Piece(weight._replace(layout=layout, part=part, parts=parts), module)
        shape = piece.file_shape(variable_shape)
        _check_shape(f"{module}.lora_{factor}", pair[factor], shape, rank)
        factors.append(layout.to_variable(piece.of_file(pair[factor].read())).astype("float32"))
    return Adapter(rank, alpha, *factors)


def _adapter_of_experts(pairs, layer, of_experts: Mapping[str, OfExpert], config) -> Adapter:
    """One of all experts, from those of each. To experts without one nothing is added."""
    found = [m for m, of_expert in of_experts.items() if of_expert.layer is layer and m in pairs]
    kinds = {_rank_and_alpha((module, of_experts[module].name), config) for module in found}
    if len(kinds) > 1:
        raise ValueError(
            f"The experts of {layer.path!r} must have one rank and one alpha. Received: "
            f"{shortened(sorted(kinds))}"
        )
    rank, alpha = kinds.pop()
    a, b = (np.zeros(shape, "float32") for shape in layer.lora_shapes(rank))
    for module in found:
        for factor, values in (("A", a), ("B", b)):
            value = values[of_experts[module].expert]
            tensor = pairs[module][factor]
            _check_shape(f"{module}.lora_{factor}", tensor, value.T.shape, rank)
            value[...] = tensor.read().T
    return Adapter(rank, alpha, a, b)


def _check_shape(name: str, tensor: StoredTensor, shape: tuple[int, ...], rank: int) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"The adapter is one of a model of another size. {name} has shape {tensor.shape}, and "
            f"needs {shape} for rank {rank} in this model."
        )


def _spellings(module: str, names: Names) -> tuple[str, str]:
    """A module's name in transformers, and in models of a checkpoint's own code."""
    in_file, in_memory = names.renamed
    return module, in_file + module.removeprefix(in_memory)


def _rank_and_alpha(spellings: Sequence[str], config: Mapping[str, Any]) -> tuple[int, float]:
    def value_of(pattern: str, key: str, default: float) -> Any:
        return _by_module(spellings, config.get(pattern), config.get(key, default))

    rank = value_of("rank_pattern", "r", DEFAULT_RANK)
    alpha = value_of("alpha_pattern", "lora_alpha", DEFAULT_ALPHA)
    if config.get("use_rslora"):
        alpha = alpha * math.sqrt(rank)  # alpha / sqrt(rank) is the scale
    return rank, alpha


def _by_module(spellings: Sequence[str], pattern: Mapping[str, Any] | None, default):
    """The value for the first key that is the end of a module's name, or a pattern for it."""
    for key, value in (pattern or {}).items():
        if any(re.match(rf"(.*\.)?({key})$", module) for module in spellings):
            return value
    return default


def _some(names: Sequence[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" * (len(names) > count))


def write_peft_adapter(
    layers: Sequence[Any],
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
        UserWarning: if out_proj is adapted, which `peft` refuses for most families.

    Raises:
        ValueError: if no layer is adapted, and for a folder with files in it.
    """
    adapted = [layer for layer in layers if layer.lora_enabled]
    if not adapted:
        raise ValueError("There is no LoRA adapter to save. Call `backbone.enable_lora` first.")
    architecture = exported_as(backbone_config)[0]
    names = architecture.names_for(backbone_config)
    modules = _modules(layers, names, [module_name(layer, names) for layer in adapted])
    joined = {
        module: _joined(parts)
        for module, parts in modules.items()
        if any(layer.lora_enabled for layer in parts)
    }
    of_modules = {
        place: adapter
        for module, adapter in joined.items()
        for place in _places(module_name(modules[module][0], names), names)
    }
    config = _config(of_modules, layers, names)
    config["base_model_name_or_path"] = base_model_name_or_path
    weights = {
        f"{PREFIX}{place}.lora_{factor}.weight": np.ascontiguousarray(layout.to_file(value))
        for module, adapter in joined.items()
        for place in _places(module, names)
        for factor, layout, value in zip(
            "AB", _layouts(modules[module][0]), (adapter.a, adapter.b), strict=True
        )
    }
    with atomic_folder(folder) as temporary:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (temporary / ADAPTER_CONFIG_FILE).write_text(text, "utf-8")
        save_tensors(temporary / ADAPTER_WEIGHTS[0], weights, {"format": "pt"})
    refused = architecture.model_type in FUSED
    if refused and any(layer.name == "out_proj" for layer in adapted):
        warnings.warn(
            "There are adapters of out_proj, which `peft` refuses for Mamba-2, since the fused "
            "CUDA kernels would pass them by. For `peft`, adapt others alone, or call "
            "`backbone.merge_lora()` and export the model.",
            stacklevel=3,
        )


def _joined(parts: Sequence[Any]) -> Adapter:
    """One adapter of a module whose rows are those of the layers in `parts`, one below another.

    It adds the same as theirs. A is that of the layers if they share one, as after
    `read_peft_adapter`. Otherwise the ranks are added, and each layer reads its own.
    """
    adapted = [layer for layer in parts if layer.lora_enabled]
    first = adapted[0]
    scales = {layer.lora_alpha / layer.lora_rank for layer in adapted}
    factors = {layer: _factors(layer) for layer in adapted}
    ranks = [layer.lora_rank for layer in adapted]
    is_shared = all(np.array_equal(a, factors[first][0]) for a, _ in factors.values())
    rank = ranks[0] if is_shared else sum(ranks)
    # A scale of its own, which a part of a module cannot have, goes into B.
    alpha = rank / first.lora_rank * first.lora_alpha if len(scales) == 1 else rank
    columns, begin = [], 0
    for layer in parts:
        column = np.zeros(layer.lora_shapes(rank)[1], "float32")  # (... rank out)
        if layer.lora_enabled:
            factor = 1 if len(scales) == 1 else layer.lora_alpha / layer.lora_rank
            column[..., begin : begin + layer.lora_rank, :] = factor * factors[layer][1]
            begin += 0 if is_shared else layer.lora_rank
        columns.append(column)
    all_a = [a for a, _ in factors.values()]
    a = all_a[0] if is_shared else np.concatenate(all_a, axis=-1)
    return Adapter(rank, alpha, a, np.concatenate(columns, axis=-1))


def _factors(layer) -> tuple[np.ndarray, np.ndarray]:
    a, b = (v.value for v in (layer.lora_kernel_a, layer.lora_kernel_b))
    return keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b)


def _config(adapters: Mapping[str, Adapter], layers: Sequence[Any], names: Names) -> dict[str, Any]:
    """What `peft.LoraConfig` is to say: the commonest rank and alpha, and who differs."""
    ranks = {module: adapter.rank for module, adapter in adapters.items()}
    alphas = {module: adapter.alpha for module, adapter in adapters.items()}
    rank, alpha = (collections.Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    in_parameters = {module_name(layer, names) for layer in layers if _is_parameter(layer, names)}
    parameters = [module for module in adapters if module in in_parameters]
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
        "target_modules": _targets([m for m in adapters if m not in parameters], layers, names),
        # With the name of their module: `experts.down_proj`.
        "target_parameters": _targets(parameters, layers, names, parts=2) or None,
    }


def _targets(
    adapted: Sequence[str], layers: Sequence[Any], names: Names, parts: int = 1
) -> list[str]:
    """The last parts of the names in `adapted`, if they are those of no other projection."""
    ends = sorted({".".join(name.split(".")[-parts:]) for name in adapted})
    meant = {
        place
        for layer in layers
        if _ends_with_one(name := module_name(layer, names), ends)
        for place in _places(name, names)
    }
    return ends if meant == set(adapted) else list(adapted)
