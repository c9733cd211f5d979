import functools
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import keras
import keras_hub
from keras import ops

from keras_mamba2._compat.keras_hub_presets import load_task
from keras_mamba2.arguments import BOOLEAN
from keras_mamba2.arguments import PATH
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import Kind
from keras_mamba2.arguments import check_keywords
from keras_mamba2.arguments import check_names
from keras_mamba2.arguments import instance
from keras_mamba2.arguments import optional
from keras_mamba2.arguments import shown
from keras_mamba2.conversion import OnBuilt
from keras_mamba2.conversion import WholeTaskWeights
from keras_mamba2.conversion import export_to_transformers
from keras_mamba2.conversion import load_preset
from keras_mamba2.conversion import open_preset
from keras_mamba2.generation import Proposer
from keras_mamba2.generation import check_speculation
from keras_mamba2.generation import sampler_of
from keras_mamba2.generation import use_compilation_cache
from keras_mamba2.models import Mamba2Backbone
from keras_mamba2.models import Mamba2State
from keras_mamba2.models import quantization
from keras_mamba2.models.kept_dtypes import KEPT_DTYPES
from keras_mamba2.models.kept_dtypes import set_kept_dtypes
from keras_mamba2.models.residual_backbone import ResidualBackbone
from keras_mamba2.models.stacked_blocks import WeightsApart
from keras_mamba2.saving import AtomicPreset
from keras_mamba2.saving import AtomicSave
from keras_mamba2.tasks.adapters import Adapters
from keras_mamba2.tasks.chatting import Chatting
from keras_mamba2.tasks.compile_config import compile_config
from keras_mamba2.tasks.compile_config import compile_from_config
from keras_mamba2.tasks.exporting import ProgramExport
from keras_mamba2.tasks.mamba2_causal_lm_preprocessor import Mamba2CausalLMPreprocessor
from keras_mamba2.tasks.push_to_hub import PushToHub
from keras_mamba2.tasks.scoring import Scoring
from keras_mamba2.tasks.text_generation import TextGeneration
from keras_mamba2.tasks.training_data import TrainingData
from keras_mamba2.training.kept_weights import KeptWeights
from keras_mamba2.training.loss_scaling import ScalesLoss

# Options of the preprocessor that `from_preset` takes, and what they may be.
PREPROCESSING = {"sequence_length": SIZE, "packing": BOOLEAN}
BACKBONE = instance(ResidualBackbone, "a `Mamba2Backbone` or a `Mamba2HybridBackbone`")
PREPROCESSOR = optional(instance(Mamba2CausalLMPreprocessor))


@keras.saving.register_keras_serializable(package="keras_mamba2")
class Mamba2CausalLM(
    TextGeneration,
    Chatting,
    TrainingData,
    Scoring,
    Adapters,
    ProgramExport,
    PushToHub,
    WeightsApart,
    AtomicPreset,
    AtomicSave,
    WholeTaskWeights,
    KeptWeights,
    ScalesLoss,
    keras_hub.models.CausalLM,
):
    """A Mamba-2 language model: text in, text out, and trainable with `fit`.

    Generation needs a state of fixed size, however long the text. `compile(sampler=...)` sets
    how tokens are picked: any KerasHub sampler, by name or object.

    Args:
        backbone: a `keras_mamba2.Mamba2Backbone`, or `keras_mamba2.Mamba2HybridBackbone`.
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
        backbone: ResidualBackbone,
        preprocessor: Mamba2CausalLMPreprocessor | None = None,
        **kwargs,
    ):
        check_keywords(type(self), kwargs)
        BACKBONE("backbone", backbone)
        PREPROCESSOR("preprocessor", preprocessor)

        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor

        # === Functional Model ===
        inputs = backbone.input
        outputs = backbone.logits(backbone(inputs))
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
        self.input_spec = None  # as in the backbone, whose own checks name what is wrong

    @classmethod
    def from_preset(
        cls,
        preset: str,
        load_weights: bool = True,
        on_built: Callable[["Mamba2CausalLM"], None] | None = None,
        stacked: bool = False,
        **kwargs,
    ) -> "Mamba2CausalLM":
        """Loads a model by name or folder. See `keras_hub.models.CausalLM.from_preset`.

        Args:
            preset: the name of a preset, the path of a folder, or a handle `hf://user/name`.
            load_weights: bool. If false, the weights are those of a new model.
            on_built: function of the model, called when all but the weights is there. What it
                starts with `warm_up(wait=False)` is compiled while they are read.
            stacked: bool, whether to call `stack_blocks`, for inference on a TPU.
            **kwargs: as there. `dtype` is a policy or its name, or `"auto"` for the dtype that
                the weights in the files have. `state_dtype="bfloat16"` keeps the states of mixers
                in half the bytes, `key_value_dtype="int8"` keys and values of attention.
                `sequence_length` and `packing` are set on the preprocessor: see
                `Mamba2CausalLMPreprocessor`.

        Raises:
            ValueError: for an unknown preset, damaged files, an unknown keyword, and options of
                the preprocessor together with `preprocessor`.
        """
        BOOLEAN("load_weights", load_weights)
        BOOLEAN("stacked", stacked)
        if on_built is not None and not callable(on_built):
            raise ValueError(f"`on_built` must be a function. Received: {shown(on_built)}")
        check_names(cls, kwargs, "dtype", *KEPT_DTYPES, *PREPROCESSING)
        kept, options = (_taken(kwargs, kinds) for kinds in (KEPT_DTYPES, PREPROCESSING))
        if options and "preprocessor" in kwargs:
            raise ValueError(f"Set {', '.join(options)} on the `preprocessor` that you pass.")

        def complete(lm):
            set_kept_dtypes(lm.backbone, **kept)
            if options and lm.preprocessor is None:
                raise ValueError(f"{preset} has no preprocessor to set {', '.join(options)} on.")
            for name, value in options.items():
                setattr(lm.preprocessor, name, value)
            if stacked:
                lm.stack_blocks()
            if on_built is not None:
                on_built(lm)

        lm = cls._from_preset(preset, load_weights, complete, **kwargs)
        if lm.backbone.stacked is not None:
            lm.backbone.stacked.move_weights()
        return lm

    @classmethod
    def _from_preset(
        cls, preset: str, load_weights: bool, on_built: OnBuilt, **kwargs
    ) -> "Mamba2CausalLM":
        tokenizer = kwargs.get("preprocessor", "from the preset") == "from the preset"
        loader, preset = open_preset(preset, load_weights, tokenizer, bare=True)
        if loader is not None:
            return loader.load_task(cls, load_weights, on_built=on_built, **kwargs)
        load = functools.partial(load_task, cls, ResidualBackbone, preset)
        return load_preset(load, preset, load_weights, kwargs, on_built)

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
        PATH("path", path)
        preprocessor = self.preprocessor
        tokenizer = None if preprocessor is None else preprocessor.tokenizer
        defaults = None if preprocessor is None else preprocessor.generation_defaults
        export_to_transformers(self.backbone, tokenizer, path, dtype, generation_defaults=defaults)

    def quantize(self, mode: str | None = None, config=None, filters=None, **kwargs) -> None:
        """Quantizes the projections, and in int8 and int4 experts and the embedding with its head.

        As `keras.Model.quantize`. The recurrence stays in float32. LoRA adapters can be trained
        on weights in int8 and int4. A saved model keeps the mode and sizes of groups, but not the
        quantizers of a `config`: when it is loaded, it has Keras' default ones.

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
        filters = quantization.prepare(self.backbone, config, filters)
        super().quantize(mode, config=config, filters=filters, **kwargs)
        quantization.remember_policies(self.backbone)

    def stack_blocks(self) -> None:
        """Makes the model one to generate with, whose programs are compiled faster.

        The weights of all blocks are moved to one array each, and programs run one block in a
        loop instead of all in a row. For a TPU 2.7B is compiled in less than a third of the time.
        There a step of decoding moves the same bytes, a block of a prompt a quarter more, and each
        call of the decode loop holds two more copies of the states. Generation, with all that is
        made of states, and `perplexity` give the same results up to rounding. Training, calls,
        `score`, quantizing, adapting, saving and exporting raise a `ValueError`.

        JAX only. Blocks must be alike, as those of `Mamba2Backbone`; a hybrid's are of two kinds
        and more.

        Raises:
            ValueError: on another backend, in a distribution, and for blocks that differ.

        Example:
        ```python
        lm = keras_mamba2.Mamba2CausalLM.from_preset("mamba2_2.7b_en", dtype="bfloat16")
        lm.quantize("int8")
        lm.stack_blocks()
        lm.generate("Once upon a time")
        ```
        """
        self.backbone.stack_blocks()

    def get_quantization_layer_structure(self, mode: str):
        return self.backbone.get_quantization_layer_structure(mode)

    def call(self, inputs, training=None):
        # Not the functional model's own head: the number of tokens is known only when KerasHub
        # has loaded the tokenizer.
        return self.logits(self.backbone(inputs, training=training))

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
            cache_update_index: not used, since the state counts its tokens itself. Callers pass
                it by KerasHub's convention.
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
            return self.logits(hidden_states)[:, None], hidden_states[:, None], cache
        hidden_states, cache = self.backbone.call_with_state(token_ids, cache, mask)
        return self.logits(hidden_states), hidden_states, cache

    def logits(self, hidden_states):
        """The head: logits `(... v)` of `hidden_states` `(... d)`.

        Ids that only pad the embedding get logits so low that they are never sampled and add
        nothing to a loss.
        """
        logits = self.backbone.logits(hidden_states)
        size, num_tokens = logits.shape[-1], self.num_tokens
        if num_tokens == size:
            return logits
        # Finite, since search samplers subtract log probabilities.
        masked = -6e4 if keras.backend.standardize_dtype(logits.dtype) == "float16" else -1e9
        return ops.where(ops.arange(size) < num_tokens, logits, ops.cast(masked, logits.dtype))

    @property
    def num_tokens(self) -> int:  # type: ignore[override]
        """Ids below it may be generated: model and tokenizer, if there is one, have them."""
        # A tokenizer made from a configuration has no vocabulary before its files are loaded.
        if self.preprocessor is None or not self.preprocessor.tokenizer.has_vocabulary:
            return self.backbone.unpadded_vocabulary_size
        # It knows best: tokens may have been added, in rows that were padding.
        return min(self.backbone.vocabulary_size, self.preprocessor.tokenizer.num_ids)

    def compile(
        self,
        *args,
        sampler="auto",
        speculation: Proposer | None = None,
        compilation_cache: str | None = None,
        **kwargs,
    ) -> None:
        """As `keras_hub.models.CausalLM.compile`.

        Args:
            *args: as there.
            sampler: a name, a KerasHub sampler, or a `keras_mamba2.FilterSampler`. `"auto"` for
                `"top_k"`, and for `chat` to draw as the checkpoint says.
            speculation: who proposes tokens, so that several come from one reading of the weights:
                a `keras_mamba2.PromptLookup` or a `keras_mamba2.DraftModel`. Texts stay the same,
                up to rounding. Only on JAX.
            compilation_cache: the path of a folder where JAX keeps compiled programs, so that
                the next process does not compile them again.
            **kwargs: as there.

        Raises:
            ValueError: for an unknown sampler, and for `speculation` with a sampler that has a
                loop of its own, on another backend, or by a model with another tokenizer.
        """
        optional(PATH)("compilation_cache", compilation_cache)
        is_auto = isinstance(sampler, str) and sampler == "auto"
        sampler = sampler_of("top_k" if is_auto else sampler)
        check_speculation(speculation, sampler, self)
        if compilation_cache is not None:
            use_compilation_cache(compilation_cache)
        super().compile(*args, sampler=sampler, **kwargs)
        self.has_own_sampler = not is_auto
        self.speculation = speculation

    def get_compile_config(self) -> dict:
        sampler = self.sampler if self.has_own_sampler else None
        return compile_config(super().get_compile_config(), self, sampler)

    def compile_from_config(self, config: dict) -> None:
        compile_from_config(self, config)


def _taken(kwargs: dict[str, Any], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Takes the arguments of these names out of `kwargs`, checked."""
    return {name: kind(name, kwargs.pop(name)) for name, kind in kinds.items() if name in kwargs}
