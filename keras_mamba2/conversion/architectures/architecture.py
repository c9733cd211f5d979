from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

from keras_mamba2.conversion.names import Names

# The classes of backbones, as Keras has registered them.
PURE = "keras_mamba2>Mamba2Backbone"
HYBRID = "keras_mamba2>Mamba2HybridBackbone"


def backbone_name(arguments: Mapping[str, Any]) -> str:
    """The class whose arguments these are."""
    return HYBRID if "blocks" in arguments else PURE


class Architecture(NamedTuple):
    """A family of models of another library.

    Args:
        name: string, what it is called.
        model_type: string, of transformers; else `None`.
        arguments: function from a `config.json` to the arguments of a backbone. Raises
            `ValueError` for an option that no model here has.
        names: `Names`, or a function that makes them of the backbone's configuration, where they
            depend on it.
        config: function from the backbone's configuration to a `config.json`, without the ids of
            special tokens; `None` where the family has no such blocks. A hybrid's configuration is
            one of `sublayers.completed`. An option of it that the family lacks may be left out:
            `arguments` then does not give it back, and the family is not taken.
    """

    name: str
    model_type: str | None
    arguments: Callable[[Mapping[str, Any]], dict[str, Any]]
    names: Names | Callable[[Mapping[str, Any]], Names]
    config: Callable[[Mapping[str, Any]], dict[str, Any] | None] = lambda backbone_config: None

    def names_for(self, backbone_config: Mapping[str, Any]) -> Names:
        """The names of the weights of a model with `get_config()`."""
        return self.names if isinstance(self.names, Names) else self.names(backbone_config)
