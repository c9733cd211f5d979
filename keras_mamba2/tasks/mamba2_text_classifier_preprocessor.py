import keras
import keras_hub
import numpy as np

from keras_mamba2._compat.keras_hub_preprocessing import convert_preprocessing_outputs_python
from keras_mamba2._compat.keras_hub_preprocessing import preprocessing_function
from keras_mamba2.arguments import BOOLEAN
from keras_mamba2.arguments import check_attributes
from keras_mamba2.arguments import check_keywords
from keras_mamba2.arguments import choice
from keras_mamba2.models import Mamba2Tokenizer
from keras_mamba2.tasks.build_once import build_once
from keras_mamba2.tasks.mamba2_preprocessor import TOKENIZER
from keras_mamba2.tasks.mamba2_preprocessor import Mamba2Preprocessor

NO_TOKEN = -1


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Mamba2TextClassifierPreprocessor(
    Mamba2Preprocessor, keras_hub.models.TextClassifierPreprocessor
):
    """Turns text into what `Mamba2TextClassifier` reads: token ids, and which of them are real.

    Texts that are too long lose their end, but never the end token. The segments of a tuple are
    joined with the end token between them.

    Args:
        tokenizer: a `keras_mamba2.Mamba2Tokenizer`.
        sequence_length: int, to which rows are padded on the right, or cut.
        truncate: `"round_robin"` or `"waterfall"`, how several segments share that length. See
            `keras_hub.layers.MultiSegmentPacker`.
        add_start_token: bool. Mamba-2 checkpoints were trained without a start token.
        add_end_token: bool, whether texts end with the end token, where the model then reads.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        x: a string, a batch of strings, or a tuple of batches of segments. KerasHub takes a tuple
            alone for `(x, y)`: with segments and no labels, pass `y=None` too.
        y: labels, passed through.
        sample_weight: passed through.

    Example:
    ```python
    preprocessor = keras_mamba2.Mamba2TextClassifierPreprocessor.from_preset(
        "mamba2_tiny_shakespeare", sequence_length=64
    )
    x, y = preprocessor(["What a piece of work!", "O horrible, most horrible!"], [1, 0])
    ```
    """

    def __init__(
        self,
        tokenizer: Mamba2Tokenizer,
        sequence_length: int = 512,
        truncate: str = "round_robin",
        add_start_token: bool = False,
        add_end_token: bool = True,
        **kwargs,
    ):
        check_keywords(type(self), kwargs, "config_file")
        super().__init__(
            tokenizer=TOKENIZER("tokenizer", tokenizer),
            sequence_length=sequence_length,
            truncate=choice("round_robin", "waterfall")("truncate", truncate),
            **kwargs,
        )
        self.add_start_token = add_start_token
        self.add_end_token = add_end_token
        check_attributes(self, add_start_token=BOOLEAN, add_end_token=BOOLEAN)

    @build_once
    def build(self, input_shape):
        # In `build`, since the tokenizer may have no vocabulary yet when `__init__` runs.
        def added(token_id):
            return [] if token_id is None else [token_id]

        end = added(self.tokenizer.end_token_id)
        self.packer = keras_hub.layers.MultiSegmentPacker(
            start_value=added(self.tokenizer.start_token_id) if self.add_start_token else [],
            sep_value=end,
            end_value=end if self.add_end_token else [],
            # No token has this id. The id of the pad token may be that of the end token.
            pad_value=NO_TOKEN,
            truncate=self.truncate,
            sequence_length=self.sequence_length,
        )
        self.built = True

    @preprocessing_function
    def _call_tf(self, x, y=None, sample_weight=None):
        import tensorflow as tf

        return keras.utils.pack_x_y_sample_weight(self._pack(x, tf.where), y, sample_weight)

    def _call_python(self, x, y=None, sample_weight=None):
        x = convert_preprocessing_outputs_python(self._pack(x, np.where))
        return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)

    def _pack(self, x, where):
        segments = x if isinstance(x, tuple) else (x,)
        token_ids, _ = self.packer(tuple(self.tokenizer(segment) for segment in segments))
        padding_mask = token_ids != NO_TOKEN
        token_ids = where(padding_mask, token_ids, self._pad_token_id)
        return {"token_ids": token_ids, "padding_mask": padding_mask}

    def get_config(self):
        config = super().get_config()
        config.update(
            {"add_start_token": self.add_start_token, "add_end_token": self.add_end_token}
        )
        return config
