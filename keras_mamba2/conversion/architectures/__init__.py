"""The families of models that are read: one file each, with its configuration and names."""

import math
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NoReturn

from keras_mamba2.conversion.architectures.architecture import Architecture as Architecture
from keras_mamba2.conversion.architectures.bamba import BAMBA
from keras_mamba2.conversion.architectures.falcon_h1 import FALCON_H1
from keras_mamba2.conversion.architectures.granite import GRANITE
from keras_mamba2.conversion.architectures.mamba2 import MAMBA2
from keras_mamba2.conversion.architectures.mamba2 import config as mamba2_config
from keras_mamba2.conversion.architectures.nemotron_h import NEMOTRON_H
from keras_mamba2.conversion.architectures.state_spaces import STATE_SPACES
from keras_mamba2.conversion.architectures.zamba2 import ZAMBA2
from keras_mamba2.conversion.names import Names

# In this order they are tried for a model that is exported.
OF_TRANSFORMERS = (MAMBA2, GRANITE, NEMOTRON_H, FALCON_H1, BAMBA, ZAMBA2)
MAMBA_1 = ("mamba", "falcon_mamba", "Mamba1")


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The family that a `config.json` belongs to.

    Raises:
        ValueError: for Mamba-1, another model type, and a configuration of neither
            transformers nor state-spaces.
    """
    if "hidden_size" not in config and ("ssm_cfg" in config or "n_layer" in config):
        # The reference takes Mamba-1 where the configuration names no layer.
        layer = (config.get("ssm_cfg") or {}).get("layer", "Mamba1")
        if layer != "Mamba2":
            _refuse("ssm_cfg.layer", layer, ["Mamba2"])
        return STATE_SPACES
    if "model_type" not in config:
        raise ValueError(
            "The configuration has neither `model_type` (transformers) nor `ssm_cfg` "
            f"(state-spaces). Received keys: {', '.join(sorted(config)) or 'none'}"
        )
    for architecture in OF_TRANSFORMERS:
        if config["model_type"] == architecture.model_type:
            return architecture
    return _refuse("model_type", config["model_type"], [a.model_type for a in OF_TRANSFORMERS])


def exported_as(backbone_config: Mapping[str, Any]) -> tuple[Architecture, dict[str, Any]]:
    """The family that a model can be exported as, and its `config.json` there.

    Raises:
        ValueError: if no family has such a model.
    """
    if "blocks" not in backbone_config:
        return MAMBA2, mamba2_config(backbone_config)
    for architecture in OF_TRANSFORMERS[1:]:
        config = architecture.config(backbone_config)
        # What a family does not have would be lost.
        if config is not None and _same(architecture.arguments(config), backbone_config):
            return architecture, config
    raise ValueError(
        "transformers has no model of such blocks. It has "
        f"{', '.join(architecture.name for architecture in OF_TRANSFORMERS)}. "
        f"Received: blocks={backbone_config['blocks']}"
    )


def names_in(
    architecture: Architecture, backbone_config: Mapping[str, Any], tensors: Iterable[str]
) -> Names:
    """The names that the tensors of a checkpoint have: pure Mamba-2 has two spellings."""
    tensors = set(tensors)
    spellings = (MAMBA2, STATE_SPACES) if architecture in (MAMBA2, STATE_SPACES) else ()
    for spelling in spellings:
        names = spelling.names_for(backbone_config)
        if names.embedding in tensors:
            return names
    return architecture.names_for(backbone_config)


def _same(arguments: Mapping[str, Any], backbone_config: Mapping[str, Any]) -> bool:
    """Whether a configuration that was written is read as the model that it was written of."""
    defaults = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_multiplier": 1.0}
    arguments = {**defaults, **arguments}
    kinds = arguments["sublayers"], backbone_config["sublayers"]
    return (
        arguments["blocks"] == backbone_config["blocks"]
        and all(_close(arguments[key], backbone_config[key]) for key in arguments)
        and set(kinds[0]) == set(kinds[1])
    )


def _close(a: Any, b: Any) -> bool:
    """Equal, whatever the spelling of defaults, and up to the rounding of 1 / (1 / x)."""
    if isinstance(a, Mapping):
        return all(key in b and _close(a[key], b[key]) for key in a if key in b)
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-9)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_close, a, b))
    return a == b


def _refuse(key: str, value: Any, expected: Sequence[str | None]) -> NoReturn:
    if value in MAMBA_1:
        raise ValueError(
            f"The checkpoint is a Mamba-1 model, not a Mamba-2 model: another architecture, "
            f"which is not supported. Received: {key}={value!r} (the default without the key)"
        )
    names = " or ".join(map(repr, expected))
    raise ValueError(f"Unknown `{key}`. Expected: {names}. Received: {value!r}")
