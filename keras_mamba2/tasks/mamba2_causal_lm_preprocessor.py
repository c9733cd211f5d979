import pathlib
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_mamba2._compat.keras_hub_preprocessing import uses_tensorflow
from keras_mamba2.arguments import BOOLEAN
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import check_attributes
from keras_mamba2.arguments import check_keywords
from keras_mamba2.arguments import optional
from keras_mamba2.chat import ChatTemplate
from keras_mamba2.conversion import checked_defaults
from keras_mamba2.conversion import generation_defaults
from keras_mamba2.host.continued import continued_ids
from keras_mamba2.host.inputs import NAMES
from keras_mamba2.host.texts import texts_of
from keras_mamba2.models import Mamba2Tokenizer
from keras_mamba2.tasks.build_once import build_once
from keras_mamba2.tasks.mamba2_preprocessor import TOKENIZER
from keras_mamba2.tasks.mamba2_preprocessor import Mamba2Preprocessor
from keras_mamba2.tasks.packing import pack


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Mamba2CausalLMPreprocessor(Mamba2Preprocessor, keras_hub.models.CausalLMPreprocessor):
    """Turns text into what `Mamba2CausalLM` is trained on, and generates from.

    For training, texts are tokenized, an end token is added, and all are cut or padded on the
    right to `sequence_length`; the targets are the next tokens, and padding has no weight.

    With `packing=True` several texts share a row, so that there is little padding.
    `segment_ids` number them, and each text has the same outputs as alone. Texts longer than a row
    are cut into pieces that are read on their own, so that nothing is cut off. The number of rows
    then differs from the number of texts; `fit` and `evaluate` make batches of equal size.

    Args:
        tokenizer: a `keras_mamba2.Mamba2Tokenizer`.
        sequence_length: int, the length of training rows, and the default total length of
            generated ones.
        add_start_token: bool. Mamba-2 checkpoints were trained without a start token.
        add_end_token: bool, whether texts end with the end token in training.
        packing: bool, whether texts share rows in training.
        generation_defaults: dict, what `Mamba2CausalLM.chat` takes where nothing else is said:
            `eos_token_id`, one or several, `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`,
            `repetition_penalty` and `max_new_tokens`, as in transformers' `generation_config.json`,
            from which they are read.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        x: a string or a batch of strings.
        y: ignored, targets come from `x`.
        sample_weight: ignored, it comes from the padding.
        sequence_length: overrides that of the layer.

    Example:
    ```python
    preprocessor = keras_mamba2.Mamba2CausalLMPreprocessor.from_preset("mamba2_tiny_shakespeare")
    x, y, sample_weight = preprocessor(["To be, or not to be"])
    ```
    """

    def __init__(
        self,
        tokenizer: Mamba2Tokenizer,
        sequence_length: int = 1024,
        add_start_token: bool = False,
        add_end_token: bool = True,
        packing: bool = False,
        generation_defaults: Mapping[str, Any] | None = None,
        **kwargs,
    ):
        check_keywords(type(self), kwargs, "config_file")
        super().__init__(
            tokenizer=TOKENIZER("tokenizer", tokenizer),
            sequence_length=sequence_length,
            add_start_token=add_start_token,
            add_end_token=add_end_token,
            **kwargs,
        )
        self.packing = packing
        check_attributes(self, add_start_token=BOOLEAN, add_end_token=BOOLEAN, packing=BOOLEAN)
        self.generation_defaults = checked_defaults(generation_defaults or {})

    @classmethod
    def checkpoint_arguments(cls, folder: pathlib.Path) -> dict[str, Any]:
        return {"generation_defaults": generation_defaults(folder)}

    @build_once
    def build(self, input_shape):
        super().build(input_shape)

    def call(self, x, y=None, sample_weight=None, sequence_length=None):
        sequence_length = optional(SIZE)("sequence_length", sequence_length)
        return super().call(x, y, sample_weight, sequence_length)

    def generate_preprocess(self, x, sequence_length=None):
        sequence_length = optional(SIZE)("sequence_length", sequence_length)
        return super().generate_preprocess(x, sequence_length)

    def _call_python(self, x, y=None, sample_weight=None, sequence_length=None):
        if not self.packing:
            return super()._call_python(x, y, sample_weight, sequence_length)
        texts: list[Any] = [x] if isinstance(x, (str, bytes)) else list(x)
        last = [self.tokenizer.end_token_id] if self.add_end_token else []
        documents = [[*prompt, *last] for prompt in self.prompts(texts)]
        return pack(documents, sequence_length or self.sequence_length, self._pad_token_id)

    def _call_tf(self, x, y=None, sample_weight=None, sequence_length=None):
        if not self.packing:
            return super()._call_tf(x, y, sample_weight, sequence_length=sequence_length)
        import tensorflow as tf

        def flat_rows(texts):
            texts = [text.decode("utf-8") for text in texts]
            x, y, sample_weight = self._call_python(texts, sequence_length=sequence_length)
            return *x.values(), y, sample_weight

        dtypes = (tf.int32,) * 4 + (tf.bool,)
        rows = tf.numpy_function(flat_rows, [tf.reshape(x, [-1])], dtypes)
        for part in rows:
            part.set_shape((None, sequence_length or self.sequence_length))
        *x, y, sample_weight = rows
        return dict(zip(NAMES, x, strict=True)), y, sample_weight

    def prompts(self, texts: Sequence[str], continued: bool = False) -> list[np.ndarray]:
        """The token ids of each text, for generation.

        Args:
            texts: sequence of strings.
            continued: bool, whether the texts continue others. They then get no start token,
                and none of the tokens and blanks that the tokenizer puts before a text.
        """
        if continued:
            rows = continued_ids(self.tokenizer.engine, texts)
            return [np.array(row, "int32") for row in rows]
        first = [self.tokenizer.start_token_id] if self.add_start_token else []
        rows = self.tokenizer(list(texts)) if len(texts) else []
        return [np.array([*first, *row], "int32") for row in rows]

    @property
    def chat_template(self) -> ChatTemplate:
        """The tokenizer's `keras_mamba2.ChatTemplate`.

        Raises:
            ValueError: for a model that has none.
        """
        template = self.tokenizer.chat_template
        if template is None:
            raise ValueError(
                "This model has no chat template: it continues texts, and was not trained to "
                "answer. Use `generate`, load a checkpoint that was (its name ends with instruct, "
                "chat or it, as a rule), or set "
                "`lm.preprocessor.tokenizer.chat_template = keras_mamba2.ChatTemplate(...)`."
            )
        return template

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> np.ndarray:
        """The token ids of a conversation, written by the tokenizer's chat template.

        Args:
            messages: as in `keras_mamba2.ChatTemplate.render`, like the following.
            tools: as there.
            add_generation_prompt: bool, whether a reply is to follow.
            **variables: as there.

        Raises:
            ValueError: for a model without a chat template, and as `render`.
        """
        text = self.chat_template.render(
            messages, tools, add_generation_prompt=add_generation_prompt, **variables
        )
        [text] = texts_of(text)
        # The template has written what a text begins with.
        row = self.tokenizer.engine.encode(text, add_special_tokens=False)
        return np.array(row.ids, "int32")

    def _generate_preprocess_python(self, x, sequence_length=None):
        # Not the inherited one, which adds a start token whatever `add_start_token` says, and
        # silently cuts a prompt that is too long.
        if not self.built:
            self.build(None)
        sequence_length = sequence_length or self.sequence_length
        token_ids = self.tokenizer(x)
        if not uses_tensorflow(self):
            self._check_lengths(token_ids, sequence_length)
        token_ids, padding_mask = self.packer(
            token_ids,
            sequence_length=sequence_length,
            add_start_value=self.add_start_token,
            add_end_value=False,
        )
        return {"token_ids": token_ids, "padding_mask": padding_mask}

    def _check_lengths(self, token_ids, sequence_length):
        for i, row in enumerate(token_ids if isinstance(token_ids, list) else [token_ids]):
            length = len(row) + (1 if self.add_start_token else 0)
            if length > sequence_length:
                raise ValueError(
                    f"Prompt {i} has {length} tokens, more than the total length of "
                    f"{sequence_length}. Pass a larger `max_length`, or `max_new_tokens` instead."
                )

    def get_config(self):
        config = {**super().get_config(), "packing": self.packing}
        if self.generation_defaults:
            config["generation_defaults"] = dict(self.generation_defaults)
        return config

    def generate_postprocess(self, x):
        # The inherited method would use a numpy mask of integers as indices.
        padding_mask = ops.convert_to_numpy(x["padding_mask"]).astype(bool)
        return super().generate_postprocess({**x, "padding_mask": padding_mask})
