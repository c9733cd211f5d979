import functools
from collections.abc import Mapping

import keras
import keras_hub
from keras import ops

from keras_mamba2._compat.keras_hub_presets import load_task
from keras_mamba2.arguments import BOOLEAN
from keras_mamba2.arguments import RATE
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import Kind
from keras_mamba2.arguments import check_keywords
from keras_mamba2.arguments import check_names
from keras_mamba2.arguments import instance
from keras_mamba2.arguments import optional
from keras_mamba2.conversion import WholeTaskWeights
from keras_mamba2.conversion import load_preset
from keras_mamba2.conversion import open_preset
from keras_mamba2.host.inputs import NAMES
from keras_mamba2.host.inputs import names_of_texts
from keras_mamba2.host.inputs import standard_names
from keras_mamba2.host.texts import texts_of
from keras_mamba2.models import Mamba2Backbone
from keras_mamba2.models import quantization
from keras_mamba2.models.residual_backbone import ResidualBackbone
from keras_mamba2.saving import AtomicPreset
from keras_mamba2.saving import AtomicSave
from keras_mamba2.tasks.batch_checks import check_batch
from keras_mamba2.tasks.batch_checks import check_inputs
from keras_mamba2.tasks.batch_checks import check_labels
from keras_mamba2.tasks.batch_checks import check_rows
from keras_mamba2.tasks.batch_checks import check_samples
from keras_mamba2.tasks.batch_checks import check_weights
from keras_mamba2.tasks.compile_config import compile_config
from keras_mamba2.tasks.compile_config import compile_from_config
from keras_mamba2.tasks.datasets import arguments_of_fit
from keras_mamba2.tasks.datasets import check_batches_of
from keras_mamba2.tasks.datasets import is_dataset
from keras_mamba2.tasks.mamba2_text_classifier_preprocessor import Mamba2TextClassifierPreprocessor
from keras_mamba2.tasks.push_to_hub import PushToHub
from keras_mamba2.training.kept_weights import KeptWeights
from keras_mamba2.training.loss_scaling import ScalesLoss

BACKBONE = instance(ResidualBackbone, "a `Mamba2Backbone` or a `Mamba2HybridBackbone`")


def _function(value):
    if not callable(value):
        raise TypeError
    return value


PREPROCESSOR = optional(
    Kind("a `Mamba2TextClassifierPreprocessor`, or a function of texts", _function)
)
ACTIVATION = Kind(
    "a function, the name of one in `keras.activations`, or None", keras.activations.get
)


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Mamba2TextClassifier(
    AtomicPreset,
    AtomicSave,
    WholeTaskWeights,
    KeptWeights,
    ScalesLoss,
    keras_hub.models.TextClassifier,
    PushToHub,
):
    """Classifies texts by the hidden state of a Mamba-2 backbone at the last token of each.

    `fit`, `evaluate` and `predict` refuse rows without a token, and labels out of range: in arrays
    before the first step, in datasets when the batch is read.

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
            which tokens are real; padding may be on either side. Returns `(b num_classes)`. For
            a row without a real token the outputs have no meaning.

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
        check_keywords(type(self), kwargs)
        BACKBONE("backbone", backbone)
        PREPROCESSOR("preprocessor", preprocessor)
        num_classes = SIZE("num_classes", num_classes)
        hidden_dim = optional(SIZE)("hidden_dim", hidden_dim)
        dropout = RATE("dropout", dropout)
        activation = ACTIVATION("activation", activation)

        # === Config ===
        # Before `super().__init__`, which compiles with the loss of the activation.
        self.num_classes = num_classes
        self.activation = activation
        self.hidden_dim = hidden_dim
        self.dropout = dropout

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
        self.input_spec = None  # as in the backbone, whose own checks name what is wrong

    @classmethod
    def from_preset(
        cls, preset: str, load_weights: bool = True, **kwargs
    ) -> "Mamba2TextClassifier":
        """Loads a model by name or folder. See `keras_hub.models.TextClassifier.from_preset`.

        The preset may be a classifier's, or of any other task: with `num_classes`, the head is
        new.
        """
        BOOLEAN("load_weights", load_weights)
        check_names(cls, kwargs, "dtype")
        tokenizer = kwargs.get("preprocessor", "from the preset") == "from the preset"
        loader, preset = open_preset(preset, weights=load_weights, tokenizer=tokenizer)
        if loader is None:
            load = functools.partial(load_task, cls, ResidualBackbone, preset)
            return load_preset(load, preset, load_weights, kwargs)
        if "num_classes" not in kwargs:
            raise ValueError(f"{preset} has no head of a classifier. Pass `num_classes`.")
        return loader.load_task(cls, load_weights, **kwargs)

    def quantize(self, mode: str | None = None, config=None, filters=None, **kwargs) -> None:
        """Quantizes the backbone, as `Mamba2CausalLM.quantize`. The head stays as it is."""
        filters = quantization.prepare(self.backbone, config, filters)
        super().quantize(mode, config=config, filters=filters, **kwargs)
        quantization.remember_policies(self.backbone)

    def get_quantization_layer_structure(self, mode: str):
        return self.backbone.get_quantization_layer_structure(mode)

    def call(self, inputs, training=None):
        return super().call(names_of_texts(inputs), training=training)

    def preprocess_samples(self, x, y=None, sample_weight=None):
        samples = super().preprocess_samples(x, y, sample_weight)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(samples)
        x = standard_names(x)
        check_batch(self._check_batch, x["token_ids"], x["padding_mask"], y, sample_weight)
        return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)

    def fit(
        self,
        x=None,
        y=None,
        batch_size: int | None = None,
        sample_weight=None,
        validation_data=None,
        validation_split: float | None = None,
        shuffle: bool = False,
        validation_batch_size: int | None = None,
        **kwargs,
    ) -> keras.callbacks.History:
        """As `keras_hub.models.TextClassifier.fit`.

        Args:
            x: texts, tuples of them, or rows that are preprocessed already; or a dataset.
            y: labels.
            batch_size: int, as there, like the following.
            sample_weight: as there.
            validation_data: as there.
            validation_split: as there.
            shuffle: bool, whether arrays and lists are read in another order in every epoch.
            validation_batch_size: int, of `validation_data` that is no dataset. `None` for
                `batch_size`.
            **kwargs: as there.
        """
        self._check_arrays(x, y, sample_weight, with_labels=True)
        if isinstance(validation_data, tuple):
            vx, vy, weights = keras.utils.unpack_x_y_sample_weight(validation_data)
            self._check_arrays(vx, vy, weights, with_labels=True)
            validation_data = vx, vy, weights
        rows = x, y, sample_weight
        arguments = arguments_of_fit(
            rows,
            validation_data,
            batch_size,
            validation_split,
            shuffle,
            validation_batch_size,
            **kwargs,
        )
        return super().fit(**arguments)

    def evaluate(self, x=None, y=None, batch_size=None, sample_weight=None, **kwargs):
        self._check_arrays(x, y, sample_weight, with_labels=True)
        check_batches_of(x, batch_size, kwargs.get("steps"))
        return super().evaluate(x, y, batch_size, sample_weight, **kwargs)

    def predict(self, x=None, batch_size=None, **kwargs):
        self._check_arrays(x)
        check_batches_of(x, batch_size, kwargs.get("steps"))
        return super().predict(x, batch_size, **kwargs)

    def _check_arrays(self, x, y=None, sample_weight=None, with_labels: bool = False) -> None:
        # All of them at once: KerasHub's pipeline would find the first wrong batch in `tf.data`,
        # whose errors are of another type, and later ones after training steps.
        if is_dataset(x):
            return
        check_samples(x)
        if isinstance(x, Mapping):
            x = standard_names(x)
            self._check_batch(*(ops.convert_to_numpy(x[n]) for n in NAMES[:2]))
        elif self.preprocessor is not None:
            for segments in x if isinstance(x, tuple) else (x,):
                texts_of(segments)
        if with_labels and y is None:
            raise ValueError("Labels are missing. Received: y=None")
        y, weights = (None if a is None else ops.convert_to_numpy(a) for a in (y, sample_weight))
        self._check_labels(y, weights)

    def _check_batch(self, token_ids, padding_mask, labels=None, weights=None) -> None:
        check_inputs(token_ids, padding_mask, self.backbone.vocabulary_size)
        check_rows(padding_mask)
        self._check_labels(labels, weights)

    def _check_labels(self, labels, weights) -> None:
        if weights is not None:
            check_weights(weights)
        if labels is not None:
            check_labels(labels, self.loss, self.num_classes, weights=weights)

    def get_compile_config(self) -> dict:
        return compile_config(super().get_compile_config(), self)

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
    """`x` `(b t d)` at the last real token of each row: `(b d)`."""
    real = ops.cast(ops.not_equal(padding_mask, 0), "int32")
    # The first position where the count of real tokens is largest.
    last = ops.argmax(ops.cumsum(real, axis=1), axis=1)  # (b)
    return ops.squeeze(ops.take_along_axis(x, last[:, None, None], axis=1), axis=1)
