"""Private methods of Keras and KerasHub that classes of this package override.

They stay where the classes are, and call the inherited ones with `super()`.
"""

from typing import NamedTuple


class Overridden(NamedTuple):
    """A method of `base`, and the arguments that it has in Keras 3.15 and KerasHub 0.32."""

    base: str  # its full name
    name: str
    signature: str


OVERRIDDEN = (
    # layers/projection.py
    Overridden("keras.layers.Dense", "_int8_build", "(self, kernel_shape, config=None)"),
    Overridden("keras.layers.Dense", "_int8_call", "(self, inputs, training=None)"),
    Overridden("keras.layers.Dense", "_int4_call", "(self, inputs, training=None)"),
    Overridden("keras.layers.Dense", "_get_kernel_with_merged_lora", "(self)"),
    # layers/reversible_embedding.py
    Overridden("keras.layers.ReversibleEmbedding", "_int8_call", "(self, inputs, reverse=False)"),
    Overridden("keras.layers.ReversibleEmbedding", "_int4_call", "(self, inputs, reverse=False)"),
    Overridden("keras.layers.Embedding", "_get_embeddings_with_merged_lora", "(self)"),
    # training/kept_weights.py
    Overridden(
        "keras.src.backend.jax.trainer.JAXTrainer",
        "_get_jax_state",
        "(self, trainable_variables=False, non_trainable_variables=False, "
        "optimizer_variables=False, metrics_variables=False, purge_model_variables=False)",
    ),
    # training/backup.py
    Overridden("keras.callbacks.BackupAndRestore", "_save_model", "(self)"),
    # tasks/mamba2_causal_lm_preprocessor.py
    Overridden(
        "keras_hub.models.CausalLMPreprocessor",
        "_call_python",
        "(self, x, y=None, sample_weight=None, sequence_length=None)",
    ),
    Overridden(
        "keras_hub.models.CausalLMPreprocessor",
        "_call_tf",
        "(self, x, y=None, sample_weight=None, sequence_length=None)",
    ),
    Overridden(
        "keras_hub.models.CausalLMPreprocessor",
        "_generate_preprocess_python",
        "(self, x, sequence_length=None)",
    ),
    # tasks/mamba2_text_classifier_preprocessor.py
    Overridden(
        "keras_hub.models.TextClassifierPreprocessor",
        "_call_python",
        "(self, x, y=None, sample_weight=None)",
    ),
    Overridden(
        "keras_hub.models.TextClassifierPreprocessor",
        "_call_tf",
        "(self, x, y=None, sample_weight=None)",
    ),
    # conversion/preset_loader.py
    Overridden("keras_hub.src.utils.preset_utils.PresetLoader", "check_backbone_class", "(self)"),
    Overridden(
        "keras_hub.src.utils.preset_utils.PresetLoader",
        "load_backbone",
        "(self, cls, load_weights, **kwargs)",
    ),
    Overridden(
        "keras_hub.src.utils.preset_utils.PresetLoader",
        "load_tokenizer",
        "(self, cls, config_file='tokenizer.json', **kwargs)",
    ),
    Overridden(
        "keras_hub.src.utils.preset_utils.PresetLoader",
        "load_task",
        "(self, cls, load_weights, load_task_weights, **kwargs)",
    ),
)
