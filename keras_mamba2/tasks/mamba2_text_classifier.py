import functools

import keras
import keras_hub
from keras import ops

from keras_mamba2._compat.keras_hub_presets import load_task
from keras_mamba2.conversion import WholeTaskWeights
from keras_mamba2.conversion import load_preset
from keras_mamba2.conversion import open_preset
from keras_mamba2.models import Mamba2Backbone
from keras_mamba2.models.inputs import standard_names
from keras_mamba2.models.residual_backbone import ResidualBackbone
from keras_mamba2.saving import AtomicPreset
from keras_mamba2.saving import AtomicSave
from keras_mamba2.tasks.batch_checks import check_batch
from keras_mamba2.tasks.batch_checks import check_labels
from keras_mamba2.tasks.batch_checks import check_rows
from keras_mamba2.tasks.batch_checks import check_token_ids
from keras_mamba2.tasks.compile_config import compile_from_config
from keras_mamba2.tasks.compile_config import with_optimizer_built
from keras_mamba2.tasks.mamba2_text_classifier_preprocessor import Mamba2TextClassifierPreprocessor
from keras_mamba2.tasks.push_to_hub import PushToHub


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Mamba2TextClassifier(
    AtomicPreset, AtomicSave, WholeTaskWeights, keras_hub.models.TextClassifier, PushToHub
):
    """Classifies texts by what a Mamba-2 backbone knows at the last token of each.

    `fit`, `evaluate` and `predict` refuse rows without a token, and labels that are no class:
    for arrays before the first step, for datasets when the batch is read.

    Args:
        backbone: a `keras_mamba2.Mamba2Backbone`, or `keras_mamba2.Mamba2HybridBackbone`.
        num_classes: int.
        preprocessor: a `keras_mamba2.Mamba2TextClassifierPreprocessor`. Without it, inputs are
            dicts of `token_ids` and `padding_mask`.
        activation: of the outputs, a name or a function. `None` for logits.
        hidden_dim: int, the size of a dense layer with tanh before the last. `None` for none.
        dropout: float, the rate at which the inputs of the dense layers are dropped in training.
        **kwargs: see `keras.Model`.

    Call arguments:
        inputs: dict of `token_ids` and `padding_mask`, int tensors `(b t)`. The mask alone says
            which tokens are real; padding may be on either side. Returns `(b num_classes)`; for
            a row without a real token numbers without a meaning.

    Example:
    ```python
    classifier = keras_mamba2.Mamba2TextClassifier.from_preset(
        "mamba2_tiny_shakespeare", num_classes=2
    )
    classifier.backbone.enable_lora(4)  # or train all of it
    classifier.compile(optimizer=keras.optimizers.Adam(1e-3))
    classifier.fit(["O happy day!", "Out, damned spot!"], [1, 0])
    classifier.predict(["Good night, sweet prince."])  # logits (1 2)
    ```

    Reference:
        - [Dao and Gu, 2024](https://arxiv.org/abs/2405.21060)
    """

    pipeline_tag = "text-classification"
    backbone_cls = Mamba2Backbone
    preprocessor_cls = Mamba2TextClassifierPreprocessor

    def __init__(
        self,
        backbone: ResidualBackbone,
        num_classes: int,
        preprocessor: Mamba2TextClassifierPreprocessor | None = None,
        activation=None,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        **kwargs,
    ):
        for name, value in (("num_classes", num_classes), ("hidden_dim", hidden_dim)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be positive. Received: {name}={value}")

        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor
        dtype = backbone.dtype_policy
        hidden_layers = []
        if hidden_dim is not None:
            hidden_layers = [
                keras.layers.Dropout(dropout, dtype=dtype, name="pooled_dropout"),
                keras.layers.Dense(hidden_dim, "tanh", dtype=dtype, name="pooled_dense"),
            ]
        self.output_dropout = keras.layers.Dropout(dropout, dtype=dtype, name="output_dropout")
        self.output_dense = keras.layers.Dense(
            num_classes,
            activation,
            # Small, so that at first all classes are about as likely.
            kernel_initializer=keras.initializers.TruncatedNormal(stddev=0.02),
            dtype=dtype,
            name="logits",
        )

        # === Functional Model ===
        inputs = backbone.input
        x = _last_real(backbone(inputs), inputs["padding_mask"])  # (b d)
        for layer in (*hidden_layers, self.output_dropout):
            x = layer(x)
        super().__init__(inputs=inputs, outputs=self.output_dense(x), **kwargs)
        self.input_spec = None  # as the backbone's, which says what is wrong

        # === Config ===
        self.num_classes = num_classes
        self.activation = keras.activations.get(activation)
        self.hidden_dim = hidden_dim
        self.dropout = dropout

    @classmethod
    def from_preset(
        cls, preset: str, load_weights: bool = True, **kwargs
    ) -> "Mamba2TextClassifier":
        """Loads a model by name or folder. See `keras_hub.models.TextClassifier.from_preset`.

        The preset may be a classifier's, or of any other task: with `num_classes`, the head is
        new.
        """
        tokenizer = kwargs.get("preprocessor", "from the preset") == "from the preset"
        loader, preset = open_preset(preset, weights=load_weights, tokenizer=tokenizer)
        if loader is None:
            load = functools.partial(load_task, cls, ResidualBackbone, preset)
            return load_preset(load, preset, load_weights, kwargs)
        if "num_classes" not in kwargs:
            raise ValueError(f"{preset} has no head of a classifier. Pass `num_classes`.")
        return loader.load_task(cls, load_weights, **kwargs)

    def call(self, inputs, training=None):
        inputs = standard_names(inputs)
        if "segment_ids" in inputs:
            raise ValueError("A classifier reads one text a row, and takes no `segment_ids`.")
        return super().call(inputs, training=training)

    def preprocess_samples(self, x, y=None, sample_weight=None):
        samples = super().preprocess_samples(x, y, sample_weight)
        x, y, _ = keras.utils.unpack_x_y_sample_weight(samples)
        check_batch(self._check_batch, x["token_ids"], x["padding_mask"], y)
        return samples

    def fit(self, x=None, y=None, *args, **kwargs):
        self._check_arrays(x, y)
        if isinstance(kwargs.get("validation_data"), tuple):
            self._check_arrays(*kwargs["validation_data"][:2])
        return super().fit(x, y, *args, **kwargs)

    def evaluate(self, x=None, y=None, *args, **kwargs):
        self._check_arrays(x, y)
        return super().evaluate(x, y, *args, **kwargs)

    def predict(self, x=None, *args, **kwargs):
        self._check_arrays(x)
        return super().predict(x, *args, **kwargs)

    def _check_arrays(self, x, y=None) -> None:
        # All of them at once: KerasHub's pipeline would find the first wrong batch in `tf.data`,
        # whose errors are of another type, and later ones after training steps.
        if self.preprocessor is None and isinstance(x, dict):
            self._check_batch(*(ops.convert_to_numpy(x[n]) for n in ("token_ids", "padding_mask")))
        if y is not None:
            self._check_labels(ops.convert_to_numpy(y))

    def _check_batch(self, token_ids, padding_mask, labels=None) -> None:
        check_token_ids(token_ids, self.backbone.vocabulary_size)
        check_rows(padding_mask)
        if labels is not None:
            self._check_labels(labels)

    def _check_labels(self, labels) -> None:
        check_labels(labels, self.loss, self.num_classes)

    def get_compile_config(self) -> dict:
        return with_optimizer_built(super().get_compile_config(), self)

    def compile_from_config(self, config: dict) -> None:
        compile_from_config(self, config)

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "num_classes": self.num_classes,
                "activation": keras.activations.serialize(self.activation),
                "hidden_dim": self.hidden_dim,
                "dropout": self.dropout,
            }
        )
        return config


def _last_real(x, padding_mask):
    """What `x` `(b t d)` is at the last real token of each row: `(b d)`."""
    real = ops.cast(ops.not_equal(padding_mask, 0), "int32")
    # The count of real tokens is first at its largest where the last one is.
    last = ops.argmax(ops.cumsum(real, axis=1), axis=1)  # (b)
    return ops.squeeze(ops.take_along_axis(x, last[:, None, None], axis=1), axis=1)
