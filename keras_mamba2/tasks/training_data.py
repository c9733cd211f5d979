from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mamba2._compat.keras_training import evaluates_within_fit
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import optional
from keras_mamba2.host.inputs import NAMES
from keras_mamba2.host.inputs import standard_names
from keras_mamba2.models.residual_backbone import ResidualBackbone
from keras_mamba2.tasks.batch_checks import check_batch
from keras_mamba2.tasks.batch_checks import check_inputs
from keras_mamba2.tasks.batch_checks import check_labels
from keras_mamba2.tasks.batch_checks import check_samples
from keras_mamba2.tasks.batch_checks import check_texts_alone
from keras_mamba2.tasks.batch_checks import check_weights
from keras_mamba2.tasks.batch_checks import real_positions
from keras_mamba2.tasks.datasets import arguments_of_fit
from keras_mamba2.tasks.datasets import check_batches_of
from keras_mamba2.tasks.datasets import first_batch
from keras_mamba2.tasks.datasets import is_dataset
from keras_mamba2.tasks.packing import packed_dataset


class TrainingData:
    """The part of `Mamba2CausalLM` that prepares the data of `fit`, `evaluate` and `predict`."""

    backbone: ResidualBackbone
    preprocessor: Any  # or None
    num_tokens: int
    loss: Any

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
        """As `keras_hub.models.CausalLM.fit`; texts share rows if the preprocessor packs.

        Texts longer than `sequence_length` are cut off there; packed, the rest gets other rows.
        A text of fewer than two tokens, and a row of padding, have no loss and change nothing.

        Args:
            x: texts as a list, an array, or a `tf.data` or `grain` dataset of batches of them.
                Or rows that are preprocessed already, as a dict of `token_ids` and
                `padding_mask`, or a dataset of them with targets.
            y: targets of preprocessed rows, `(b t)`. Texts are their own targets.
            batch_size: int, as there, and not for datasets.
            sample_weight: weights of preprocessed rows, `(b t)`. `None` for those that the
                padding mask gives: 0 at padding, 1 elsewhere. A target without weight is ignored.
            validation_data: as `x`, or a tuple `(x, y)` or `(x, y, sample_weight)`.
            validation_split: float, as there.
            shuffle: bool, whether arrays and lists are read in another order in every epoch. A
                dataset keeps its own order. The orders depend on
                `keras.utils.set_random_seed`; a restarted run begins with the first of them.
            validation_batch_size: int, of `validation_data` that is no dataset. `None` for
                `batch_size`.
            **kwargs: as there.

        Raises:
            ValueError: for data with nothing to learn from, for texts with targets or weights,
                and for token ids and targets outside the vocabulary: in arrays before the first
                step, in datasets when the batch is read (inside of `tf.data`, TensorFlow wraps it
                in an error of its own).
        """
        batch_size = optional(SIZE)("batch_size", batch_size)
        if validation_data is not None:
            if not isinstance(validation_data, tuple):
                validation_data = (validation_data,)
            rows = keras.utils.unpack_x_y_sample_weight(validation_data)
            validation_data = self._prepared(*rows)
        rows = self._prepared(x, y, sample_weight)
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

    def evaluate(self, x=None, y=None, batch_size: int | None = None, sample_weight=None, **kwargs):
        """As `keras_hub.models.CausalLM.evaluate`; inputs as in `fit`."""
        batch_size = optional(SIZE)("batch_size", batch_size)
        if not evaluates_within_fit(kwargs):  # else `fit` has prepared them
            x, y, sample_weight = self._prepared(x, y, sample_weight)
            check_batches_of(x, batch_size, kwargs.get("steps"))
        return super().evaluate(x, y, batch_size, sample_weight, **kwargs)

    def predict(self, x=None, batch_size: int | None = None, **kwargs):
        """As `keras_hub.models.CausalLM.predict`; inputs as in `fit`."""
        if isinstance(x, Mapping):
            x = standard_names(x)
            self._check_batch(*(ops.convert_to_numpy(x[name]) for name in NAMES[:2]))
        batch_size = optional(SIZE)("batch_size", batch_size)
        check_batches_of(x, batch_size, kwargs.get("steps"))
        return super().predict(x, batch_size, **kwargs)

    def preprocess_samples(self, x, y=None, sample_weight=None):
        if isinstance(x, Mapping):  # preprocessed already
            x = standard_names(x)
            if y is not None and sample_weight is None:
                sample_weight = real_positions(x["padding_mask"])
            samples = keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
        else:
            check_texts_alone(y, sample_weight)
            samples = super().preprocess_samples(x, y, sample_weight)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(samples)
        if isinstance(x, Mapping):
            check_batch(self._check_batch, x["token_ids"], x["padding_mask"], y, sample_weight)
        return samples

    def _prepared(self, x, y, sample_weight):
        """Refuses data with nothing to learn from; packs texts, if the preprocessor packs."""
        packing = self.preprocessor is not None and self.preprocessor.packing
        if is_dataset(x):
            if packing:
                return packed_dataset(x, self.preprocessor), y, sample_weight
            first_batch(x)
        elif isinstance(x, Mapping):
            x = standard_names(x)
            self._check_arrays(x, y, sample_weight)
        elif self.preprocessor is None:
            raise ValueError("Without a `preprocessor`, pass a dict of token ids and mask.")
        else:
            check_samples(x)
            check_texts_alone(y, sample_weight)
            weights = (self.preprocessor(text)[2] for text in x)  # of no more texts than needed
            if not any(np.any(ops.convert_to_numpy(weight)) for weight in weights):
                raise ValueError(f"No text has two tokens to learn from. Received {len(x)} texts.")
            if packing:
                return self.preprocessor(x)
        return x, y, sample_weight

    def _check_arrays(self, x, y, sample_weight) -> None:
        # All of them at once: KerasHub's pipeline would find the first wrong batch in `tf.data`,
        # whose errors are of another type, and later ones after training steps.
        array = ops.convert_to_numpy
        token_ids, real = array(x["token_ids"]), array(x["padding_mask"])
        weights = real if sample_weight is None else array(sample_weight)
        shapes = {"token_ids": token_ids.shape, "y": np.shape(y), "sample_weight": weights.shape}
        if not shapes["y"][:2] == shapes["sample_weight"] == token_ids.shape:
            raise ValueError(
                "Preprocessed rows need targets and weights, one for each position. "
                f"Received: {', '.join(f'{name} {shape}' for name, shape in shapes.items())}"
            )
        if not np.any((real != 0) & (weights != 0)):
            raise ValueError(
                f"No row has a token to learn from. Received {len(token_ids)} rows, in which all "
                "is padding, or has no weight."
            )
        self._check_batch(token_ids, real, array(y), weights)

    def _check_batch(self, token_ids, padding_mask, labels=None, weights=None) -> None:
        check_inputs(token_ids, padding_mask, self.backbone.vocabulary_size)
        if weights is not None:
            check_weights(weights)
        if labels is not None:
            check_labels(labels, self.loss, self.num_tokens, "num_tokens", weights)
