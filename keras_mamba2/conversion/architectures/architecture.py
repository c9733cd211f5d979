from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

from keras_mamba2.conversion.names import Names

PURE = "keras_mamba2>Mamba2Backbone"
HYBRID = "keras_mamba2>Mamba2HybridBackbone"


class Architecture(NamedTuple):
    """A family of models of another library.

    Args:
        name: string, what it is called.
        model_type: string, of transformers; else `None`.
        backbone: string, the class here, as Keras has registered it.
        arguments: function from a `config.json` to the class' arguments. Raises `ValueError` for
            an option that no model here has.
        names: `Names`.
        config: function from the class' configuration to a `config.json`, without the ids of
            special tokens; `None` where the family has no such model.
    """

    name: str
    model_type: str | None
    backbone: str
    arguments: Callable[[Mapping[str, Any]], dict[str, Any]]
    names: Names
    config: Callable[[Mapping[str, Any]], dict[str, Any] | None] = lambda backbone_config: None
