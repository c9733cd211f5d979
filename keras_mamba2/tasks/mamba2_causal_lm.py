from collections.abc import Sequence
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_mamba2.generation import Generator
from keras_mamba2.generation import search
from keras_mamba2.models import Mamba2Backbone
from keras_mamba2.models import Mamba2State
from keras_mamba2.preset_files import find_preset
from keras_mamba2.tasks.mamba2_causal_lm_preprocessor import Mamba2CausalLMPreprocessor


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Mamba2CausalLM(keras_hub.models.CausalLM):
    """A Mamba-2 language model: text in, text out, and trainable with `fit`.

    Generation needs a state of fixed size, however long the text. `compile(sampler=...)` sets
    how tokens are picked: any KerasHub sampler, by name or object.

    Args:
        backbone: a `keras_mamba2.Mamba2Backbone`.
        preprocessor: a `keras_mamba2.Mamba2CausalLMPreprocessor`. Without it, inputs are dicts
            of `token_ids` and `padding_mask`.
        **kwargs: see `keras.Model`.

    Call arguments:
        inputs: dict of `token_ids` and `padding_mask`, int tensors `(b t)`. Returns logits
            `(b t v)`.

    Example:
    ```python
    lm = keras_mamba2.Mamba2CausalLM.from_preset("mamba2_tiny_shakespeare")
    lm.compile(sampler=keras_hub.samplers.TopPSampler(p=0.9, temperature=0.8))
    lm.generate("ROMEO:", max_new_tokens=200)
    lm.fit(["To be, or not to be, that is the question."])
    ```

    Reference:
        - [Dao and Gu, 2024](https://arxiv.org/abs/2405.21060)
        - [Compiler-First State Space Duality, 2026](https://arxiv.org/abs/2603.09555)
    """

    backbone_cls = Mamba2Backbone
    preprocessor_cls = Mamba2CausalLMPreprocessor

    def __init__(
        self,
        backbone: Mamba2Backbone,
        preprocessor: Mamba2CausalLMPreprocessor | None = None,
        **kwargs,
    ):
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor

        # === Functional Model ===
        inputs = backbone.input
        outputs = backbone.token_embedding(backbone(inputs), reverse=True)
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)

    @classmethod
    def from_preset(cls, preset: str, load_weights: bool = True, **kwargs) -> "Mamba2CausalLM":
        """Loads a model by name or folder. See `keras_hub.models.CausalLM.from_preset`."""
        tokenizer = kwargs.get("preprocessor", "from the preset") == "from the preset"
        folder = find_preset(preset, weights=load_weights, tokenizer=tokenizer)
        return super().from_preset(folder, load_weights=load_weights, **kwargs)

    def call_with_cache(
        self,
        token_ids,
        cache: Mamba2State | None,
        cache_update_index=None,
        padding_mask=None,
    ):
        """Runs the model on tokens after a state, as other KerasHub models do after a cache.

        Args:
            token_ids: int tensor `(b t)`. With `t = 1` the recurrent step is taken, else SSD.
            cache: the `Mamba2State` after the tokens before, `None` for the start.
            cache_update_index: not needed, since a state does not know positions; it is here
                for callers that pass it by KerasHub's convention.
            padding_mask: optional tensor `(b t)`, non-zero at real tokens.

        Returns:
            Tuple `(logits, hidden_states, cache)`: `(b t v)`, `(b t d)`, and the state after
            the last real token of each row.
        """
        mask = None if padding_mask is None else ops.cast(padding_mask, "bool")
        if token_ids.shape[1] == 1 and cache is not None:
            mask = None if mask is None else mask[:, 0]
            hidden_states, cache = self.backbone.step(token_ids[:, 0], cache, mask)
            # As rows of one matrix: products of (b 1 d) are slower on CPU.
            logits = self.backbone.token_embedding(hidden_states, reverse=True)
            return logits[:, None], hidden_states[:, None], cache
        hidden_states, cache = self.backbone.call_with_state(token_ids, cache, mask)
        return self.backbone.token_embedding(hidden_states, reverse=True), hidden_states, cache

    def generate_step(self, inputs, stop_token_ids=None):
        """Generation of one batch as one traceable function, with the sampler's own loop.

        `generate` calls it for samplers that search (beam, contrastive); for all others it
        takes the faster way of `keras_mamba2.generation`.
        """
        token_ids = search(
            self, self.sampler, inputs["token_ids"], inputs["padding_mask"], stop_token_ids
        )
        return {"token_ids": token_ids, "padding_mask": inputs["padding_mask"]}

    def make_generate_function(self) -> Generator:
        if self.generate_function is None:
            self.generate_function = Generator(self)
        return self.generate_function

    def generate(
        self,
        inputs,
        max_length: int | None = None,
        stop_token_ids: Sequence[int] | str | None = "auto",
        strip_prompt: bool = False,
        *,
        max_new_tokens: int | None = None,
    ):
        """Generates text, or token ids, that continue `inputs`.

        Prompts of different lengths in one batch give for each what it gives alone. A prompt
        costs what its tokens cost, and another number of tokens compiles nothing anew.

        Args:
            inputs: with a preprocessor a string, a list of strings or a `tf.data.Dataset` of
                them; without one a dict of `token_ids` and `padding_mask` `(b t)`.
            max_length: int, the total length of each row, prompt included. Defaults to the
                preprocessor's `sequence_length`; without a preprocessor, the inputs' length.
            stop_token_ids: token ids that end a row. `"auto"` is the tokenizer's end token,
                `None` is no token.
            strip_prompt: bool, whether to return only what is new.
            max_new_tokens: int, how many tokens each row gets at most, instead of `max_length`.

        Returns:
            What `inputs` is: a string, a list of strings, or a dict of arrays.

        Raises:
            ValueError: for an empty prompt, one longer than `max_length`, and token ids outside
                the vocabulary.
        """
        if max_new_tokens is not None:
            if max_length is not None:
                raise ValueError(
                    "Pass `max_length`, the total length, or `max_new_tokens`, not both. "
                    f"Received: max_length={max_length}, max_new_tokens={max_new_tokens}"
                )
            if max_new_tokens < 1:
                raise ValueError(f"`max_new_tokens` must be positive. Received: {max_new_tokens}")
        stop_token_ids = self._stop_token_ids(stop_token_ids)
        batches, is_scalar = self._normalize_generate_inputs(inputs)
        outputs = [
            self._generate_batch(batch, max_length, max_new_tokens, stop_token_ids, strip_prompt)
            for batch in batches
        ]
        return self._normalize_generate_outputs(outputs, is_scalar)

    def _generate_batch(self, inputs, max_length, max_new_tokens, stop_token_ids, strip_prompt):
        if self.preprocessor is not None:
            inputs = self._preprocess(inputs, max_length, max_new_tokens)
        elif max_new_tokens is not None:
            inputs = _with_room(inputs, max_new_tokens)
        outputs = self.make_generate_function()(
            inputs, stop_token_ids=stop_token_ids, max_new_tokens=max_new_tokens
        )
        if strip_prompt:
            outputs = _without_prompts(inputs, outputs)
        if self.preprocessor is not None:
            return self.preprocessor.generate_postprocess(outputs)
        return {name: ops.convert_to_tensor(value) for name, value in outputs.items()}

    def _preprocess(self, inputs, max_length, max_new_tokens) -> dict[str, Any]:
        if max_new_tokens is not None:
            rows = self.preprocessor.tokenizer(inputs)
            longest = max((len(row) for row in rows), default=0)
            max_length = longest + 1 + max_new_tokens  # 1 for a start token
        return self.preprocessor.generate_preprocess(inputs, sequence_length=max_length)

    def _stop_token_ids(self, stop_token_ids) -> tuple[int, ...]:
        if stop_token_ids is None:
            return ()
        if not isinstance(stop_token_ids, str):
            return tuple(int(id) for id in stop_token_ids)
        if stop_token_ids != "auto":
            raise ValueError(
                '`stop_token_ids` must be "auto", None or a sequence of token ids. '
                f"Received: {stop_token_ids!r}"
            )
        if self.preprocessor is None:
            raise ValueError(
                'A `preprocessor` must be attached to the model if `stop_token_ids="auto"`. '
                "Currently `preprocessor=None`. Pass `stop_token_ids=None` to generate until "
                "`max_length`, or the ids of tokens that end a row."
            )
        end_token_id = self.preprocessor.tokenizer.end_token_id
        return () if end_token_id is None else (end_token_id,)


def _with_room(inputs, max_new_tokens: int) -> dict[str, np.ndarray]:
    """Pads dict inputs so that `max_new_tokens` fit behind the longest prompt."""
    padding_mask = np.asarray(ops.convert_to_numpy(inputs["padding_mask"])).astype(bool)
    longest = int(padding_mask.sum(axis=1).max(initial=0))
    pad = max(0, longest + max_new_tokens - padding_mask.shape[1])
    token_ids = np.asarray(ops.convert_to_numpy(inputs["token_ids"]))
    return {
        "token_ids": np.pad(token_ids, [(0, 0), (0, pad)]),
        "padding_mask": np.pad(padding_mask, [(0, 0), (0, pad)]),
    }


def _without_prompts(prompts, outputs) -> dict[str, np.ndarray]:
    """Moves what is new to the start of each row."""
    lengths = np.asarray(ops.convert_to_numpy(prompts["padding_mask"])).astype(bool).sum(axis=1)
    stripped = {name: np.zeros_like(value) for name, value in outputs.items()}
    for name, rows in outputs.items():
        for i, length in enumerate(lengths):
            stripped[name][i, : rows.shape[1] - length] = rows[i, length:]
    return stripped
