"""Checkpoints of other libraries behind KerasHub's `from_preset`."""

import contextlib
import inspect
import logging
import pathlib
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import keras

from keras_mamba2._compat.keras_hub_presets import KerasPresetLoader
from keras_mamba2._compat.keras_hub_presets import PresetLoader
from keras_mamba2._compat.keras_hub_presets import ask_for_loader
from keras_mamba2._compat.keras_hub_presets import check_file_exists
from keras_mamba2._compat.keras_hub_presets import load_json
from keras_mamba2.conversion import load
from keras_mamba2.conversion.architectures import OF_TRANSFORMERS
from keras_mamba2.conversion.architectures.architecture import HYBRID
from keras_mamba2.conversion.architectures.architecture import PURE
from keras_mamba2.conversion.architectures.architecture import backbone_name
from keras_mamba2.conversion.config import check_unquantized
from keras_mamba2.conversion.config import constructor_arguments
from keras_mamba2.conversion.config import errors_naming
from keras_mamba2.conversion.config import read_constructor_arguments
from keras_mamba2.conversion.config_values import check_arguments
from keras_mamba2.conversion.deferred import deferred_initialization
from keras_mamba2.conversion.deferred import initialize_the_rest
from keras_mamba2.conversion.deferred import loading
from keras_mamba2.conversion.keras_weights import check_number_of_blocks
from keras_mamba2.conversion.readers import most_common_dtype
from keras_mamba2.conversion.tokenizer import has_tokenizer
from keras_mamba2.conversion.tokenizer import tokenizer_arguments
from keras_mamba2.preset_files import BACKBONE_NAMES
from keras_mamba2.preset_files import CONFIG_FILE
from keras_mamba2.preset_files import KERAS_WEIGHTS
from keras_mamba2.preset_files import TASK_FILE
from keras_mamba2.preset_files import TASK_WEIGHTS
from keras_mamba2.preset_files import Preset
from keras_mamba2.preset_files import is_foreign
from keras_mamba2.preset_files import named_presets
from keras_mamba2.preset_files import read_json
from keras_mamba2.untrusted import some

logger = logging.getLogger(__name__)

AUTO = "auto"

OnBuilt = Callable[[Any], None]  # called with a model that may have no values yet

GPT_NEOX = "hf://EleutherAI/gpt-neox-20b"
# Its tokens, and what embeddings for them are padded to at most.
GPT_NEOX_VOCABULARY_SIZES = range(50277, 50433)


class CheckpointLoader(PresetLoader):
    """Loads checkpoints of transformers and state-spaces the way KerasHub loads its presets.

    What it inherits builds preprocessors and tasks from the parts that are loaded here.

    Args:
        files: a `Preset` that is a checkpoint.

    Raises:
        ValueError: for a configuration that is no Mamba-2 model's.
    """

    def __init__(self, files: Preset):
        super().__init__(files.name, files.config)
        self.files = files
        self._fills_later = False
        read_constructor_arguments(files.folder)  # raises

    def check_backbone_class(self):
        # What tasks have as their `backbone_cls`: they take either.
        return keras.saving.get_registered_object(PURE)

    def load_backbone(self, cls, load_weights: bool = True, **kwargs):
        if load_weights:
            with errors_naming(self.files.folder / CONFIG_FILE):
                check_unquantized(self.files.config)
        folder = self.files.weights_folder() if load_weights else self.files.folder
        if kwargs.get("dtype") == AUTO:
            kwargs["dtype"] = most_common_dtype(folder) if load_weights else self.config_dtype()
        arguments = read_constructor_arguments(folder)
        with contextlib.ExitStack() as stack:
            if set(kwargs) <= {"dtype"}:  # or those may be what is wrong
                stack.enter_context(errors_naming(folder / CONFIG_FILE))
            if not load_weights:
                return self.backbone_class(**{**arguments, **kwargs})
            load.check_number_of_layers(arguments, folder)
            with deferred_initialization():
                backbone = self.backbone_class(**{**arguments, **kwargs})
        if not self._fills_later:
            self._fill(backbone)
        return backbone

    def _fill(self, backbone) -> None:
        load.load_weights(backbone, self.files.weights_folder())
        initialize_the_rest(backbone.variables)  # the seeds of dropout

    @property
    def backbone_class(self) -> type:
        """The class of the model: a pure one, or a hybrid."""
        name = backbone_name(constructor_arguments(self.files.config))
        return keras.saving.get_registered_object(name)

    def config_dtype(self) -> str | None:
        """What the configuration says of the weights' dtype; that of state-spaces says nothing."""
        return self.files.config.get("dtype") or self.files.config.get("torch_dtype")

    def load_tokenizer(self, cls, config_file=None, **kwargs):
        return cls(**{**tokenizer_arguments(self.locate_tokenizer()), **kwargs})

    def load_preprocessor(self, cls, *args, **kwargs):
        found: Callable[[pathlib.Path], dict[str, Any]]
        found = getattr(cls, "checkpoint_arguments", lambda folder: {})
        return super().load_preprocessor(
            cls, *args, **{**found(self.files.tokenizer_folder()), **kwargs}
        )

    def locate_tokenizer(self) -> pathlib.Path:
        """A folder with the tokenizer: the checkpoint's, or that of the original models."""
        folder = self.files.tokenizer_folder()
        return folder if has_tokenizer(folder) else self._gpt_neox_folder()

    def load_task(
        self, cls, load_weights, load_task_weights=False, on_built: OnBuilt | None = None, **kwargs
    ):
        # Before the weights, so that a missing tokenizer is found before gigabytes are loaded.
        if "preprocessor" not in kwargs and cls.preprocessor_cls:
            kwargs["preprocessor"] = self.load_preprocessor(cls.preprocessor_cls)
        self._fills_later = load_weights and "backbone" not in kwargs
        task = super().load_task(cls, load_weights, load_task_weights, **kwargs)
        if on_built is not None:
            on_built(task)
        if self._fills_later:
            self._fill(task.backbone)
        return task

    def _gpt_neox_folder(self) -> pathlib.Path:
        size = constructor_arguments(self.config)["unpadded_vocabulary_size"]
        if size not in GPT_NEOX_VOCABULARY_SIZES:
            raise ValueError(
                f"{self.preset} has no tokenizer (tokenizer.json, or vocab.json and merges.txt), "
                f"and its vocabulary of {size} is not that of GPT-NeoX. Put its tokenizer into a "
                "local copy of the checkpoint, or pass `preprocessor=None` and use token ids."
            )
        logger.warning("%s has no tokenizer. Taking that of GPT-NeoX: %s", self.preset, GPT_NEOX)
        return Preset(GPT_NEOX).tokenizer_folder()


def open_preset(
    preset, weights: bool = True, tokenizer: bool = True, bare: bool = False
) -> tuple[CheckpointLoader | None, str]:
    """Finds out who loads `preset`.

    Args:
        preset: the name of a preset, a local folder, or a handle.
        weights: bool, whether the weights will be read.
        tokenizer: bool, whether the tokenizer will be read.
        bare: bool, whether a task that was saved without a preprocessor needs no tokenizer.

    Returns:
        Tuple `(loader, preset)`: a loader for a checkpoint of another library, else `None` and
        what KerasHub's `from_preset` takes, a local folder with sound files where possible.
    """
    if is_foreign(preset):
        return None, preset
    files = Preset(preset)
    if files.is_checkpoint:
        return CheckpointLoader(files), files.name
    folder = pathlib.Path(files.keras_folder(weights, tokenizer, bare=bare))
    for file in (CONFIG_FILE, TASK_FILE):
        if (folder / file).is_file():
            with errors_naming(folder / file):
                _check_backbone(read_json(folder / file))
    if weights:
        check_number_of_blocks(folder, files.config["config"])
    return None, str(folder)


def _check_backbone(serialized: Mapping[str, Any]) -> None:
    """Raises for values that no backbone has, in its configuration or in that of its task."""
    name, config = serialized["registered_name"], serialized["config"]
    if name not in BACKBONE_NAMES:
        backbone = config.get("backbone") or {}
        name, config = backbone.get("registered_name"), backbone.get("config") or {}
    check_arguments(config)
    keras.dtype_policies.get(config.get("dtype"))
    if name in BACKBONE_NAMES:
        known = inspect.signature(keras.saving.get_registered_object(name)).parameters
        if unknown := sorted(set(config) - set(known) - {"name", "trainable"}):
            raise ValueError(f"{name} has no such arguments: {some(unknown)}")


def load_preset(
    load: Callable,
    preset: str,
    load_weights: bool,
    arguments: dict,
    on_built: OnBuilt | None = None,
):
    """What KerasHub makes of a preset in its own format.

    No weight is drawn that the files replace.

    Args:
        load: function that loads, with `load_weights` and keywords.
        preset: as `open_preset` gives it.
        load_weights: bool.
        arguments: keywords for `from_preset`.
        on_built: function of a task, called before its weights are read where that can be, and
            in any case before this returns.
    """
    arguments = keras_arguments(preset, arguments)
    is_filled = load_weights and "backbone" not in arguments
    later = None if on_built is None or not is_filled else _weights_of_the_backbone(preset)

    def errors_named():
        if set(arguments) <= {"dtype"}:  # or those may be what is wrong
            return errors_naming(pathlib.Path(preset) / CONFIG_FILE)
        return contextlib.nullcontext()

    filled: contextlib.AbstractContextManager[list[keras.Variable]]
    filled = loading() if is_filled else contextlib.nullcontext([])
    with errors_named(), filled as variables:
        model = load(load_weights=load_weights and later is None, **arguments)
    if on_built is not None:
        on_built(model)
    if later is not None:
        with errors_named():
            model.backbone.load_weights(later)
    initialize_the_rest(variables)
    return model


def _weights_of_the_backbone(preset: str) -> str | None:
    """The file of a preset with all of a task's weights, if there is one that can be told."""
    folder = pathlib.Path(preset)
    if is_foreign(preset) or (folder / TASK_WEIGHTS).is_file():
        return None
    return next((str(folder / name) for name in KERAS_WEIGHTS if (folder / name).exists()), None)


def keras_arguments(preset: str, arguments: dict) -> dict:
    """Arguments for KerasHub's `from_preset`, which are enough for any `preset`.

    With `dtype="auto"` a model gets the dtype that it was saved with. Without a `dtype`, KerasHub
    takes the current policy for a model saved under another of floating point, but does not know a
    mixed one for such.
    """
    dtype = arguments.get("dtype")
    if dtype != AUTO and is_foreign(preset):
        return arguments
    config = load_json(preset, CONFIG_FILE)["config"]
    policy: str | dict[str, Any] = config.get("dtype") or {}
    if isinstance(policy, str):
        policy = {"class_name": "DTypePolicy", "config": {"name": policy}}
    name = str((policy.get("config") or {}).get("name"))
    if policy and policy.get("class_name") != "DTypePolicy":
        # A quantized model keeps its policies. KerasHub's backbone would be one of floats, which
        # takes the integers for its weights.
        check_is_not_quantized(preset, policy, dtype)
        return {**arguments, "dtype": policy if dtype in (None, AUTO) else dtype}
    if dtype is None:
        mixed = name.startswith("mixed_")
        return {**arguments, "dtype": keras.config.dtype_policy()} if mixed else arguments
    if dtype != AUTO:
        return arguments
    return {**arguments, "dtype": name if policy else None}


def check_is_not_quantized(preset: str, saved: Any, dtype: Any) -> None:
    """Raises where a model that was `saved` with quantized weights is asked for in a `dtype`."""
    if dtype not in (None, AUTO) and is_quantized(saved):
        raise ValueError(
            f"{preset} holds quantized weights, which keep their dtypes. Leave out `dtype`. "
            f"Received: dtype={dtype!r}"
        )


def is_quantized(saved: Any) -> bool:
    """Whether a serialized policy, or any in a map of several, is of quantized weights."""
    policy = keras.dtype_policies.get(saved)
    is_map = isinstance(policy, keras.dtype_policies.DTypePolicyMap)
    policies = [policy.default_policy, *policy.values()] if is_map else [policy]
    return any(each.quantization_mode for each in policies)


def register() -> None:
    """Lets KerasHub's own `from_preset` load the presets of this package.

    `keras_hub.models.CausalLM.from_preset("hf://state-spaces/mamba2-130m")` then finds this
    package, and so it does for all names of presets, checkpoints of other libraries, and hybrids.
    KerasHub has no hook for that: see `ask_for_loader`.
    """
    ask_for_loader(_loader_for)


def _loader_for(preset: str) -> KerasPresetLoader | CheckpointLoader | None:
    if preset in named_presets():
        config = Preset(preset).config
    elif is_foreign(preset) or not check_file_exists(preset, CONFIG_FILE):
        return None
    else:
        config = load_json(preset, CONFIG_FILE)
    if config.get("registered_name") == HYBRID:
        return KerasPresetLoader(preset, config, keras.saving.get_registered_object(PURE))
    own = {architecture.model_type for architecture in OF_TRANSFORMERS}
    if config.get("model_type") in own or "ssm_cfg" in config:
        return CheckpointLoader(Preset(preset))
    return None
