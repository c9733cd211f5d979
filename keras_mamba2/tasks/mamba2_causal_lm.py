import math
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_mamba2._compat.keras_hub_models import normalize_generate_inputs
from keras_mamba2._compat.keras_training import evaluates_within_fit
from keras_mamba2.conversion import export_to_transformers
from keras_mamba2.conversion import keras_arguments
from keras_mamba2.conversion import open_preset
from keras_mamba2.conversion import read_peft_adapter
from keras_mamba2.conversion import write_peft_adapter
from keras_mamba2.generation import Generator
from keras_mamba2.generation import picks_tokens
from keras_mamba2.generation import prompts_of
from keras_mamba2.generation import reseed
from keras_mamba2.generation import search
from keras_mamba2.generation import use_compilation_cache
from keras_mamba2.models import Mamba2Backbone
from keras_mamba2.models import Mamba2State
from keras_mamba2.models import lora
from keras_mamba2.models import quantization
from keras_mamba2.state import files as state_files
from keras_mamba2.tasks.batch_checks import check_batch
from keras_mamba2.tasks.batch_checks import check_labels
from keras_mamba2.tasks.batch_checks import check_token_ids
from keras_mamba2.tasks.batch_checks import real_positions
from keras_mamba2.tasks.compile_config import compile_from_config
from keras_mamba2.tasks.compile_config import with_optimizer_built
from keras_mamba2.tasks.mamba2_causal_lm_preprocessor import Mamba2CausalLMPreprocessor
from keras_mamba2.tasks.mamba2_session import Mamba2Session
from keras_mamba2.tasks.packing import first_batch
from keras_mamba2.tasks.packing import is_dataset
from keras_mamba2.tasks.packing import packed_dataset
from keras_mamba2.tasks.push_to_hub import PushToHub
from keras_mamba2.tasks.text_stream import TextStream
from keras_mamba2.tasks.text_stream import TextStreams
from keras_mamba2.tasks.text_stream import run_lengths

PREPROCESSING = ("sequence_length", "packing")


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Mamba2CausalLM(keras_hub.models.CausalLM, PushToHub):
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

    pipeline_tag = "text-generation"
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
        """Loads a model by name or folder. See `keras_hub.models.CausalLM.from_preset`.

        Args:
            preset: the name of a preset, the path of a folder, or a handle `hf://user/name`.
            load_weights: bool, whether the weights are read; else they are random.
            **kwargs: as there. `dtype` is a policy or its name, or `"auto"` for the dtype that
                the weights in the files have. `sequence_length` and `packing` are set on the
                preprocessor: see `Mamba2CausalLMPreprocessor`.

        Raises:
            ValueError: for an unknown preset, damaged files, and options of the preprocessor
                together with `preprocessor`.
        """
        options = {name: kwargs.pop(name) for name in PREPROCESSING if name in kwargs}
        if options and "preprocessor" in kwargs:
            raise ValueError(f"Set {', '.join(options)} on the `preprocessor` that you pass.")
        lm = cls._from_preset(preset, load_weights, **kwargs)
        for name, value in options.items():
            setattr(lm.preprocessor, name, value)
        return lm

    @classmethod
    def _from_preset(cls, preset: str, load_weights: bool, **kwargs) -> "Mamba2CausalLM":
        tokenizer = kwargs.get("preprocessor", "from the preset") == "from the preset"
        loader, preset = open_preset(preset, weights=load_weights, tokenizer=tokenizer)
        if loader is not None:
            return loader.load_task(cls, load_weights, **kwargs)
        return super().from_preset(
            preset, load_weights=load_weights, **keras_arguments(preset, kwargs)
        )

    def export_to_transformers(self, path, dtype: str | None = None) -> None:
        """Writes a folder for `AutoModelForCausalLM` and `AutoTokenizer` of transformers.

        Args:
            path: a folder that does not exist yet, or is empty. It appears when it is complete.
            dtype: string, of the weights in the files; `None` for that of the variables.
                `A_log`, `dt_bias` and `D` stay float32.

        Raises:
            ValueError: for a folder with files in it, an unknown dtype, and a model with LoRA
                adapters or quantized weights.
        """
        tokenizer = None if self.preprocessor is None else self.preprocessor.tokenizer
        export_to_transformers(self.backbone, tokenizer, path, dtype)

    def load_peft_adapter(self, preset) -> None:
        """Loads a LoRA adapter of the `peft` library for transformers' Mamba-2.

        It replaces the adapters that the model has. `backbone.merge_lora()` makes it part of the
        weights; to train it further, compile the model.

        Args:
            preset: the path of a folder with `adapter_config.json` and `adapter_model.safetensors`,
                or a handle `hf://user/name`.

        Raises:
            ValueError: before anything changes, for an adapter of another kind than LoRA, with
                parts that there is no place for, or of another architecture or size.
        """
        adapters = read_peft_adapter(lora.projections(self.backbone), preset)
        lora.check_trainable(adapters)
        lora.remove(self.backbone)
        lora.enable(self.backbone, {layer: (a.rank, a.alpha) for layer, a in adapters.items()})
        for layer, adapter in adapters.items():
            adapter.assign_to(layer)
        # Compiled programs hold the scale of the adapters before.
        self.generate_function = self.predict_function = None
        self.train_function = self.test_function = None

    def save_peft_adapter(self, path, base_model_name_or_path: str | None = None) -> None:
        """Writes the LoRA adapters for the `peft` library: `PeftModel.from_pretrained`.

        Args:
            path: a folder that does not exist yet, or is empty. It appears when it is complete.
            base_model_name_or_path: string, the model that is adapted, for `peft`'s `Auto` classes.

        Warns:
            UserWarning: if out_proj is adapted, which `peft` refuses for Mamba-2.

        Raises:
            ValueError: if LoRA is not enabled, and for a folder with files in it.
        """
        write_peft_adapter(lora.projections(self.backbone), path, base_model_name_or_path)

    def quantize(self, mode: str | None = None, config=None, filters=None, **kwargs) -> None:
        """Quantizes the projections, and in int8 and int4 the embedding with its head.

        As `keras.Model.quantize`. The recurrence stays in float32. LoRA adapters can be trained
        on weights in int8 and int4. A saved model keeps the mode and sizes of groups, but not the
        quantizers of a `config`: when it is loaded, it has those that Keras takes by itself.

        Args:
            mode: `"int8"`, `"int4"`, `"float8"`, `"gptq"` or `"awq"`.
            config: a configuration of `keras.quantizers`. `"gptq"` and `"awq"` need one, with
                texts to calibrate with.
            filters: which layers to quantize, by regular expressions for their names or a function
                of a layer. `None` for all that Keras can.
            **kwargs: as there.

        Raises:
            ValueError: for a model that is quantized already, one with LoRA adapters in a mode
                that Keras does not combine with them, and a configuration that does not fit.
        """
        quantization.check(self.backbone, config)
        filters = quantization.is_quantizable if filters is None else filters
        super().quantize(mode, config=config, filters=filters, **kwargs)
        quantization.remember_policies(self.backbone)

    def get_quantization_layer_structure(self, mode: str):
        return self.backbone.get_quantization_layer_structure(mode)

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
            the last real token of each row. Ids that are no tokens, but padding of the
            embedding, have logits that are never sampled.
        """
        mask = None if padding_mask is None else ops.cast(padding_mask, "bool")
        if token_ids.shape[1] == 1 and cache is not None:
            mask = None if mask is None else mask[:, 0]
            hidden_states, cache = self.backbone.step(token_ids[:, 0], cache, mask)
            # As rows of one matrix: products of (b 1 d) are slower on CPU.
            return self._logits(hidden_states)[:, None], hidden_states[:, None], cache
        hidden_states, cache = self.backbone.call_with_state(token_ids, cache, mask)
        return self._logits(hidden_states), hidden_states, cache

    def _logits(self, hidden_states):
        logits = self.backbone.token_embedding(hidden_states, reverse=True)
        size, num_tokens = logits.shape[-1], self.num_tokens
        if num_tokens == size:
            return logits
        # Finite, since search samplers subtract log probabilities.
        return ops.where(ops.arange(size) < num_tokens, logits, ops.cast(-1e9, logits.dtype))

    @property
    def num_tokens(self) -> int:
        """The ids below it may be generated: the model has them, and the tokenizer if attached."""
        num_tokens = self.backbone.unpadded_vocabulary_size
        if self.preprocessor is None:
            return num_tokens
        return min(num_tokens, self.preprocessor.tokenizer.num_ids)

    def generate_step(self, inputs, stop_token_ids=None):
        """Generation of one batch as one traceable function, with the sampler's own loop.

        `generate` calls it for samplers that search (beam, contrastive); for all others it
        takes the faster way of `keras_mamba2.generation`.
        """
        token_ids = search(
            self, self.sampler, inputs["token_ids"], inputs["padding_mask"], stop_token_ids
        )
        return {"token_ids": token_ids, "padding_mask": inputs["padding_mask"]}

    def fit(
        self, x=None, y=None, sample_weight=None, validation_data=None, **kwargs
    ) -> keras.callbacks.History:
        """As `keras_hub.models.CausalLM.fit`; texts share rows if the preprocessor packs.

        Texts longer than `sequence_length` are cut off there; packed, they go on in other rows.
        A text of less than two tokens, and a row of padding, have no loss and change nothing.
        Arrays and lists are read in their order, in every epoch.

        Args:
            x: texts as a list, an array, or a `tf.data` or `grain` dataset of batches of them.
                Or rows that are preprocessed already, as a dict of `token_ids` and
                `padding_mask`, or a dataset of them with targets.
            y: targets of preprocessed rows, `(b t)`.
            sample_weight: weights of preprocessed rows, `(b t)`. `None` for those that the
                padding mask gives: 0 at padding, 1 elsewhere. A target without weight is ignored.
            validation_data: as `x`, or a tuple `(x, y)` or `(x, y, sample_weight)`.
            **kwargs: as there.

        Raises:
            ValueError: for data with nothing to learn from, and for token ids and targets outside
                the vocabulary: in arrays before the first step, in datasets when the batch is
                read (inside of `tf.data`, TensorFlow wraps it in an error of its own).
        """
        if validation_data is not None:
            if not isinstance(validation_data, tuple):
                validation_data = (validation_data,)
            rows = self._prepared(*keras.utils.unpack_x_y_sample_weight(validation_data))
            validation_data = rows[0] if is_dataset(rows[0]) else rows
        x, y, sample_weight = self._prepared(x, y, sample_weight)
        return super().fit(
            x, y, sample_weight=sample_weight, validation_data=validation_data, **kwargs
        )

    def evaluate(self, x=None, y=None, sample_weight=None, **kwargs):
        """As `keras_hub.models.CausalLM.evaluate`; inputs as in `fit`."""
        if not evaluates_within_fit(kwargs):  # else `fit` has prepared them
            x, y, sample_weight = self._prepared(x, y, sample_weight)
        return super().evaluate(x, y, sample_weight=sample_weight, **kwargs)

    def predict(self, x=None, **kwargs):
        """As `keras_hub.models.CausalLM.predict`; inputs as in `fit`."""
        if isinstance(x, Mapping):
            self._check_batch(ops.convert_to_numpy(x["token_ids"]))
        return super().predict(x, **kwargs)

    def preprocess_samples(self, x, y=None, sample_weight=None):
        if isinstance(x, Mapping):  # preprocessed already
            if y is not None and sample_weight is None:
                sample_weight = real_positions(x["padding_mask"])
            samples = keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
        else:
            samples = super().preprocess_samples(x, y, sample_weight)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(samples)
        if isinstance(x, Mapping):
            check_batch(self._check_batch, x["token_ids"], y, sample_weight)
        return samples

    def _prepared(self, x, y, sample_weight):
        """Refuses data with nothing to learn from; packs texts, if the preprocessor packs."""
        packing = self.preprocessor is not None and self.preprocessor.packing
        if is_dataset(x):
            if packing:
                return packed_dataset(x, self.preprocessor), None, None
            first_batch(x)
        elif isinstance(x, Mapping):
            self._check_arrays(x, y, sample_weight)
        elif self.preprocessor is None:
            raise ValueError("Without a `preprocessor`, pass a dict of token ids and mask.")
        else:
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
        self._check_batch(token_ids, array(y), weights)

    def _check_batch(self, token_ids, labels=None, weights=None) -> None:
        size = self.backbone.vocabulary_size
        check_token_ids(token_ids, size)
        if labels is not None:
            check_labels(labels, self.loss, size, "vocabulary_size", weights)

    def compile(self, *args, compilation_cache: str | None = None, **kwargs) -> None:
        """As `keras_hub.models.CausalLM.compile`.

        Args:
            *args: as there.
            compilation_cache: the path of a folder where JAX keeps compiled programs, so that
                the next process does not compile them again.
            **kwargs: as there; `sampler` is a name, a KerasHub sampler, or a
                `keras_mamba2.FilterSampler`.
        """
        if compilation_cache is not None:
            use_compilation_cache(compilation_cache)
        super().compile(*args, **kwargs)

    def get_compile_config(self) -> dict:
        return with_optimizer_built(super().get_compile_config(), self)

    def compile_from_config(self, config: dict) -> None:
        compile_from_config(self, config)

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
        stop_strings: Sequence[str] | str = (),
        num_return_sequences: int = 1,
        state: Mamba2State | None = None,
        seed: int | None = None,
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
            stop_strings: a string or several. A row ends before the first that occurs in what
                is new.
            num_return_sequences: int, how often each prompt is continued, from one prefill. The
                results for a prompt follow one another.
            state: the `Mamba2State` of `prefill` that `inputs` continue, one row a prompt. A
                prompt may then be empty. The state stays as it was.
            seed: int. The same seed gives the same text, whatever was generated before.

        Returns:
            What `inputs` is: a string, a list of strings, or a dict of arrays. For one string
            and several sequences, a list of strings.

        Raises:
            ValueError: for an empty prompt, one longer than `max_length`, token ids outside the
                vocabulary, arguments out of range, and a state of another model or batch size.
        """
        _check_counts(max_length, max_new_tokens, num_return_sequences)
        stop_strings = self._stop_strings(stop_strings)
        stop_token_ids = self._stop_token_ids(stop_token_ids)
        if seed is not None:
            reseed(self.sampler, seed)
        batches, is_scalar = normalize_generate_inputs(self, inputs)
        outputs = []
        for batch in batches:
            batch = self._with_room(batch, max_length, max_new_tokens, state)
            options = (stop_token_ids, max_new_tokens, state, num_return_sequences)
            if stop_strings:
                outputs.append(self._generate_texts(batch, stop_strings, strip_prompt, *options))
            else:
                outputs.append(self._generate_batch(batch, strip_prompt, *options))
        if self.preprocessor is None:
            names = ("token_ids", "padding_mask")
            return {name: np.concatenate([output[name] for output in outputs]) for name in names}
        texts = [text for output in outputs for text in output]
        return texts[0] if is_scalar and num_return_sequences == 1 else texts

    def _generate_batch(self, inputs, strip_prompt, stop_token_ids, max_new_tokens, state, n):
        outputs = self.make_generate_function()(
            inputs,
            stop_token_ids=stop_token_ids,
            max_new_tokens=max_new_tokens,
            state=state,
            num_return_sequences=n,
        )
        if strip_prompt:
            outputs = _without_prompts(inputs, outputs, n)
        if self.preprocessor is None:
            return outputs
        return self.preprocessor.generate_postprocess(outputs)

    def _generate_texts(self, inputs, stop_strings, strip_prompt, *options) -> list[str]:
        run, n = self._begin(inputs, stop_strings, *options), options[-1]
        texts = [""] * len(run.streams)
        if not strip_prompt:
            prompts = self.preprocessor.generate_postprocess(inputs)
            texts = [prompt for prompt in prompts for _ in range(n)]
        for pieces in run:
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        return texts

    def stream(
        self,
        inputs: str | Sequence[str],
        max_length: int | None = None,
        stop_token_ids: Sequence[int] | str | None = "auto",
        *,
        max_new_tokens: int | None = None,
        stop_strings: Sequence[str] | str = (),
        state: Mamba2State | None = None,
        seed: int | None = None,
    ) -> Iterator[str] | TextStreams:
        """Yields what `generate` with `strip_prompt=True` returns, piece by piece.

        Text comes as soon as it is certain: never half a character, never the beginning of a
        stop string. The loop is one compiled program that pauses every few tokens. The
        iterator can be left at any time.

        Args:
            inputs: a string, or a list of strings.
            max_length: as in `generate`, like the following.
            stop_token_ids: as there.
            max_new_tokens: as there.
            stop_strings: as there.
            state: as there.
            seed: as there.

        Returns:
            Iterator over strings, or over lists with a string, maybe empty, for each row.

        Raises:
            ValueError: as `generate`, before the first piece is asked for.
        """
        _check_counts(max_length, max_new_tokens)
        if self.preprocessor is None:
            raise ValueError("`stream` yields text, which needs a `preprocessor`.")
        stop_strings = self._stop_strings(stop_strings)
        stop_token_ids = self._stop_token_ids(stop_token_ids)
        if seed is not None:
            reseed(self.sampler, seed)
        is_scalar = isinstance(inputs, str)
        batch = [inputs] if is_scalar else list(inputs)
        batch = self._with_room(batch, max_length, max_new_tokens, state)
        run = self._begin(batch, stop_strings, stop_token_ids, max_new_tokens, state)
        return (piece for [piece] in run) if is_scalar else run

    def prefill(self, inputs, state: Mamba2State | None = None) -> Mamba2State:
        """Reads text without generating any.

        Args:
            inputs: a string, a list of strings, or a dict of `token_ids` and `padding_mask`.
            state: the `Mamba2State` that `inputs` continue, one row a prompt. It stays as it was.

        Returns:
            The `Mamba2State` after `inputs`, one row a prompt, for `generate`, `stream` and
            `prefill`. Continuing from it gives what one long prompt gives, for the same tokens;
            text that is cut inside a word may be other tokens.
        """
        if isinstance(inputs, Mapping):
            prompts, _ = prompts_of(inputs)
        elif self.preprocessor is None:
            raise ValueError("Without a `preprocessor`, pass a dict of token ids and mask.")
        else:
            texts = [inputs] if isinstance(inputs, str) else list(inputs)
            prompts = self.preprocessor.prompts(texts, continued=state is not None)
        return self.make_generate_function().prefill(prompts, state)

    def start(self, text: str) -> Mamba2Session:
        """A session: one text that grows, and the state after it."""
        return Mamba2Session(self, text, self.prefill(text))

    def resume(self, file) -> Mamba2Session:
        """The session that `Mamba2Session.save` wrote to `file`."""
        layers, token, length, text = state_files.load(file, self.backbone)
        return Mamba2Session(self, text, Mamba2State(layers, token, length))

    def perplexity(
        self, texts: str | Sequence[str], stride: int | None = None
    ) -> float | list[float]:
        """exp of the mean loss of a text's tokens, each after all that come before it.

        The state is carried through texts of any length, in flat memory. The first token has
        nothing before it, and does not count.

        Args:
            texts: a string, or a list of strings.
            stride: int, forgets everything each time so many tokens are read, as a model with a
                limited context would. `None` never forgets.

        Returns:
            A float for a string, a list of floats for a list.
        """
        if isinstance(texts, str):
            return self.perplexity([texts], stride)[0]
        if stride is not None and stride < 2:
            raise ValueError(f"`stride` must be at least 2. Received: stride={stride}")
        if self.preprocessor is None:
            raise ValueError("`perplexity` reads text, which needs a `preprocessor`.")
        loss = self.make_generate_function().loss
        perplexities = []
        for i, token_ids in enumerate(self.preprocessor.prompts(texts)):
            if len(token_ids) < 2:
                raise ValueError(f"Text {i} has fewer than two tokens: {texts[i]!r}")
            size = stride or len(token_ids)
            pieces = [token_ids[j : j + size] for j in range(0, len(token_ids), size)]
            count = sum(len(piece) - 1 for piece in pieces)
            total = sum(loss(piece) for piece in pieces if len(piece) > 1)
            perplexities.append(math.exp(total / count))
        return perplexities

    def score(
        self,
        token_ids,
        padding_mask=None,
        scoring_mode: str = "logits",
        layer_intercept_fn=None,
        target_ids=None,
    ):
        """Scores token ids, as other KerasHub models do.

        Args:
            token_ids: int tensor `(b t)`.
            padding_mask: optional tensor `(b t)`, non-zero at real tokens.
            scoring_mode: `"logits"` or `"loss"`.
            layer_intercept_fn: optional function of hidden states `(b t d)` and the index of the
                block they come from, -1 for the embeddings. It returns hidden states to go on
                with.
            target_ids: int tensor `(b t)`, needed for `"loss"`.

        Returns:
            Logits `(b t v)`, or the loss of each target `(b t)`.
        """
        if scoring_mode not in ("logits", "loss"):
            raise ValueError(
                f"`scoring_mode` must be 'logits' or 'loss'. Received: {scoring_mode!r}"
            )
        if scoring_mode == "loss" and target_ids is None:
            raise ValueError("`scoring_mode='loss'` needs `target_ids`.")
        intercept = layer_intercept_fn or (lambda x, i: x)
        if padding_mask is None:
            padding_mask = ops.ones(ops.shape(token_ids), "int32")
        x = intercept(self.backbone.token_embedding(token_ids), -1)
        for i, block in enumerate(self.backbone.blocks):
            x = intercept(block(x, padding_mask=padding_mask), i)
        logits = self.backbone.token_embedding(self.backbone.norm(x), reverse=True)
        if scoring_mode == "logits":
            return logits
        return keras.losses.sparse_categorical_crossentropy(target_ids, logits, from_logits=True)

    def _begin(self, inputs, stop_strings, stop_token_ids, max_new_tokens, state, n=1):
        """The texts that come out of a loop, which begins to run when they are asked for."""
        if not picks_tokens(self.sampler):
            raise ValueError(
                f"{type(self.sampler).__name__} searches whole texts and takes them back. To "
                "stream, or to stop at strings, compile the model with a sampler that draws."
            )
        generator = self.make_generate_function()
        prompts, limits = prompts_of(inputs)
        if max_new_tokens is not None:
            limits = np.minimum(limits, max_new_tokens)
        decoding = generator.decode(
            generator.start(prompts, limits, state, n), stop_token_ids, run_lengths()
        )
        skip = (*stop_token_ids, *self.preprocessor.tokenizer.special_token_ids)
        decode = self.preprocessor.tokenizer.detokenize
        streams = [TextStream(decode, skip, stop_strings) for _ in range(len(prompts) * n)]
        return TextStreams(decoding, streams)

    def _with_room(self, inputs, max_length, max_new_tokens, state) -> dict[str, Any]:
        """`inputs` as a dict of token ids and mask, padded for what is to be generated."""
        if self.preprocessor is None:
            if max_new_tokens is None:
                return inputs
            prompts, _ = prompts_of(inputs)
            size = max(np.shape(inputs["token_ids"])[1], _longest(prompts) + max_new_tokens)
            return _padded(prompts, size)
        if not len(inputs):
            raise ValueError("There is nothing to generate from: the batch of prompts is empty.")
        if state is not None or max_new_tokens is not None:
            prompts = self.preprocessor.prompts(inputs, continued=state is not None)
        if max_new_tokens is not None:
            max_length = _longest(prompts) + max_new_tokens
        if state is None:
            return self.preprocessor.generate_preprocess(inputs, sequence_length=max_length)
        return _padded(prompts, max_length or self.preprocessor.sequence_length)

    def _stop_strings(self, stop_strings) -> tuple[str, ...]:
        stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        if not all(stop_strings):
            raise ValueError("A stop string is empty. Pass `stop_strings=()` for none.")
        if stop_strings and self.preprocessor is None:
            raise ValueError("`stop_strings` need text, and so a `preprocessor`.")
        return stop_strings

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


def _check_counts(max_length, max_new_tokens, num_return_sequences: int = 1) -> None:
    if max_new_tokens is not None and max_length is not None:
        raise ValueError(
            "Pass `max_length`, the total length, or `max_new_tokens`, not both. "
            f"Received: max_length={max_length}, max_new_tokens={max_new_tokens}"
        )
    for name, value in (
        ("max_length", max_length),
        ("max_new_tokens", max_new_tokens),
        ("num_return_sequences", num_return_sequences),
    ):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be positive. Received: {name}={value}")


def _longest(prompts: Sequence[np.ndarray]) -> int:
    return max(map(len, prompts), default=0)


def _padded(prompts: Sequence[np.ndarray], size: int) -> dict[str, np.ndarray]:
    """Prompts as a dict of arrays `(b size)`, padded on the right."""
    token_ids = np.zeros((len(prompts), size), "int32")
    padding_mask = np.zeros((len(prompts), size), bool)
    for i, prompt in enumerate(prompts):
        if len(prompt) > size:
            raise ValueError(f"Prompt {i} has {len(prompt)} tokens, more than {size}.")
        token_ids[i, : len(prompt)] = prompt
        padding_mask[i, : len(prompt)] = True
    return {"token_ids": token_ids, "padding_mask": padding_mask}


def _without_prompts(prompts, outputs, n: int) -> dict[str, np.ndarray]:
    """Moves what is new to the start of each row; `n` rows follow each prompt."""
    lengths = np.repeat([len(prompt) for prompt in prompts_of(prompts)[0]], n)
    stripped = {name: np.zeros_like(value) for name, value in outputs.items()}
    for name, rows in outputs.items():
        for i, length in enumerate(lengths):
            stripped[name][i, : rows.shape[1] - length] = rows[i, length:]
    return stripped
