"""Checkpoints of transformers and of state-spaces: read, and written back. No torch in it."""

from keras_mamba2.conversion.config import constructor_arguments as constructor_arguments
from keras_mamba2.conversion.config import format_of as format_of
from keras_mamba2.conversion.config import read_constructor_arguments as read_constructor_arguments
from keras_mamba2.conversion.config import transformers_config as transformers_config
from keras_mamba2.conversion.deferred import building as building
from keras_mamba2.conversion.describe import describe as describe
from keras_mamba2.conversion.export import export_to_transformers as export_to_transformers
from keras_mamba2.conversion.generation_config import checked_defaults as checked_defaults
from keras_mamba2.conversion.generation_config import generation_defaults as generation_defaults
from keras_mamba2.conversion.keras_weights import WholeTaskWeights as WholeTaskWeights
from keras_mamba2.conversion.keras_weights import WholeWeights as WholeWeights
from keras_mamba2.conversion.load import load_weights as load_weights
from keras_mamba2.conversion.peft import read_peft_adapter as read_peft_adapter
from keras_mamba2.conversion.peft import write_peft_adapter as write_peft_adapter
from keras_mamba2.conversion.preset_loader import CheckpointLoader as CheckpointLoader
from keras_mamba2.conversion.preset_loader import OnBuilt as OnBuilt
from keras_mamba2.conversion.preset_loader import load_preset as load_preset
from keras_mamba2.conversion.preset_loader import open_preset as open_preset
from keras_mamba2.conversion.preset_loader import register as register
