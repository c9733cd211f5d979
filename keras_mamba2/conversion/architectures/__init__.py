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
from keras_mamba2.conversion.architectures.sublayers import completed
from keras_mamba2.conversion.architectures.sublayers import has_usual_kinds
from keras_mamba2.conversion.architectures.zamba2 import ZAMBA2
from keras_mamba2.conversion.names import Names

# In this order they are tried for a model that is exported. Without attention, and with no
# multipliers, a model of Granite is one of Bamba too; Granite's own have multipliers.
OF_TRANSFORMERS = (MAMBA2, BAMBA, GRANITE, NEMOTRON_H, FALCON_H1, ZAMBA2)
MAMBA_1 = ("mamba", "falcon_mamba", "Mamba1")
# Of families that have none.
MULTIPLIERS = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_multiplier": 1.0}
MOST_SHOWN = 4


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The family that a `config.json` belongs to.

    Raises:
        ValueError: for Mamba-1, another model type, and a configuration of neither
            transformers nor state-spaces.
    """
    if "hidden_size" not in config and (
        "ssm_cfg" in config or ("n_layer" in config and "model_type" not in config)
    ):
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
    model = completed(backbone_config)
    near = []
    for architecture in OF_TRANSFORMERS[1:] if has_usual_kinds(model) else ():
        config = architecture.config(model)
        if config is None:
            continue
        read = completed({**MULTIPLIERS, **architecture.arguments(config)})
        lost = _lost({key: model[key] for key in read}, read)
        if not lost:
            return architecture, config
        near.append((len(lost), f"{architecture.name} lacks {', '.join(lost[:MOST_SHOWN])}. "))
    raise ValueError(
        "transformers has no model of such blocks. It has "
        f"{', '.join(architecture.name for architecture in OF_TRANSFORMERS)}. "
        f"{min(near)[1] if near else ''}Received: blocks={backbone_config['blocks']}"
    )


def names_in(
    architecture: Architecture, backbone_config: Mapping[str, Any], tensors: Iterable[str]
) -> Names:
    """The names that the tensors of a checkpoint have: of pure Mamba-2 there are two kinds."""
    tensors = set(tensors)
    kinds = (MAMBA2, STATE_SPACES) if architecture in (MAMBA2, STATE_SPACES) else ()
    for kind in kinds:
        names = kind.names_for(backbone_config).in_files_of(tensors)
        if names.embedding in tensors:
            return names
    return architecture.names_for(backbone_config).in_files_of(tensors)


def _lost(model: Mapping[str, Any], read: Mapping[str, Any], path: str = "") -> list[str]:
    """What differs in the configuration that a model is read with, as `attention.scale=0.5`."""
    lost = []
    for key in {**model, **read}:
        ours, theirs = model.get(key), read.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            lost += _lost(ours, theirs, f"{path}{key}.".removeprefix("sublayers."))
        elif not _close(theirs, ours):
            lost.append(f"{path}{key}={ours!r}")
    return lost


def _close(a: Any, b: Any) -> bool:
    """Equal, up to the rounding of 1 / (1 / x)."""
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
