import pathlib
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import keras
import tqdm.auto

from keras_mamba2.arguments import PATH
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import choice
from keras_mamba2.arguments import several
from keras_mamba2.atomic_files import atomic_folder
from keras_mamba2.conversion.export import StoredWeight
from keras_mamba2.conversion.export import write_safetensors
from keras_mamba2.conversion.names import Weight
from keras_mamba2.devices import undistributed
from keras_mamba2.generation import picks_tokens
from keras_mamba2.generation import row_parameters
from keras_mamba2.generation.exporting import programs
from keras_mamba2.generation.exporting import serialized
from keras_mamba2.generation.picking import is_filter
from keras_mamba2.generation.picking import needs_history
from keras_mamba2.host.blocks import BLOCK_SIZES
from keras_mamba2.host.rows import DECODE_CAPACITY
from keras_mamba2.host.rows import STOP_TOKEN_CAPACITY
from keras_mamba2.models.residual_backbone import ResidualBackbone
from keras_mamba2.portable.manifest import PLATFORMS
from keras_mamba2.portable.manifest import TOKENIZER_FILE
from keras_mamba2.portable.manifest import WEIGHTS
from keras_mamba2.portable.manifest import WEIGHTS_FILE
from keras_mamba2.portable.manifest import Manifest
from keras_mamba2.portable.manifest import Sampler
from keras_mamba2.portable.manifest import StoredTensorSpec
from keras_mamba2.portable.manifest import Tokens
from keras_mamba2.portable.manifest import program_file
from keras_mamba2.state import files as state_files

# One file of `jax.export` holds at most this many bytes.
LARGEST_PROGRAM = 2**31 - 1


class ProgramExport:
    """The part of `Mamba2CausalLM` that exports compiled programs."""

    backbone: ResidualBackbone
    preprocessor: Any  # or None
    sampler: Any
    weights: Any

    def export_programs(
        self,
        folder,
        platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
        batch_sizes: Sequence[int] = (1, 8),
        weights: str = "beside",
    ) -> None:
        """Writes a folder that `keras_mamba2.load_programs` runs, without Keras.

        It holds prefill and the decode loop as programs of `jax.export`, for each platform and
        batch size, the weights, the tokenizer, and a manifest. The sampler that the model is
        compiled with is the default, and its parameters may be others in every call.

        Args:
            folder: the path of a folder that does not exist yet, or is empty. It appears when it
                is complete.
            platforms: of `"cpu"`, `"cuda"`, `"rocm"` and `"tpu"`. None of them is needed here.
            batch_sizes: ints, how many rows the programs take.
            weights: `"beside"` for one file of weights; `"inside"` for weights as constants of
                every program, each of which is then as large as the model.

        Example:
        ```python
        lm = keras_mamba2.Mamba2CausalLM.from_preset("mamba2_tiny_shakespeare")
        lm.export_programs("shakespeare_programs", platforms=["cpu"])
        keras_mamba2.load_programs("shakespeare_programs").generate("ROMEO:")
        ```

        Raises:
            ValueError: on another backend than JAX, for a folder with files in it, arguments out
                of range, and a sampler with a loop of its own.
        """
        PATH("folder", folder)
        platforms = several(choice(*PLATFORMS))("platforms", platforms)
        batch_sizes = several(SIZE)("batch_sizes", batch_sizes)
        choice(*WEIGHTS)("weights", weights)
        self._check_exportable(platforms, batch_sizes, weights)
        manifest = self._manifest(
            tuple(dict.fromkeys(platforms)), tuple(sorted(set(batch_sizes))), weights
        )
        # Programs run where the devices of a distribution are not.
        with undistributed(), atomic_folder(folder) as temporary:
            self._write_programs(temporary, manifest)
            if weights == "beside":
                variables = self.weights
                stored = [StoredWeight.of(v, Weight(v.path)) for v in variables]
                write_safetensors(temporary / WEIGHTS_FILE, stored)
            if self.preprocessor is not None:
                engine = self.preprocessor.tokenizer.engine
                engine.save(str(temporary / TOKENIZER_FILE))
            manifest.write(temporary)

    def _check_exportable(self, platforms, batch_sizes, weights: str) -> None:
        if keras.config.backend() != "jax":
            raise ValueError(
                f"Programs are exported by JAX, and Keras runs on {keras.config.backend()} here. "
                "Set KERAS_BACKEND=jax before Keras is imported."
            )
        for name, values in (("platforms", platforms), ("batch_sizes", batch_sizes)):
            if not values:
                raise ValueError(f"`{name}` is empty: there would be no program.")
        if not picks_tokens(self.sampler):
            raise ValueError(
                f"{type(self.sampler).__name__} searches with a loop of its own, which is not "
                "exported. Compile the model with a sampler that draws."
            )
        nbytes = sum(v.value.nbytes for v in self.weights)
        if weights == "inside" and nbytes > LARGEST_PROGRAM:
            raise ValueError(
                f"A program holds at most {LARGEST_PROGRAM:,} bytes, and the weights have "
                f'{nbytes:,}. Pass `weights="beside"`.'
            )

    def _write_programs(self, folder: pathlib.Path, manifest: Manifest) -> None:
        found = [(b, program) for b in manifest.batch_sizes for program in programs(self, b)]
        whole = [(platform, b, program) for platform in manifest.platforms for b, program in found]
        for platform, b, program in tqdm.auto.tqdm(whole, desc="Exporting", unit=" programs"):
            file = folder / program_file(platform, program.name, b)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(serialized(self, program, platform, manifest.weights))

    def _manifest(self, platforms, batch_sizes, weights: str) -> Manifest:
        import jax

        preprocessor = self.preprocessor
        specs = state_files.named_specs(self.backbone)
        return Manifest(
            keras_mamba2=metadata.version("keras-mamba2"),
            jax=metadata.version("jax"),
            calling_convention=jax.config.jax_export_calling_convention_version,  # type: ignore[attr-defined]
            platforms=platforms,
            batch_sizes=batch_sizes,
            block_sizes=BLOCK_SIZES,
            decode_capacity=DECODE_CAPACITY,
            stop_token_capacity=STOP_TOKEN_CAPACITY,
            weights=weights,
            weight_names=tuple(variable.path for variable in self.weights),
            model=self.backbone.architecture,
            fingerprint=state_files.fingerprint(self.backbone),
            vocabulary_size=self.backbone.vocabulary_size,
            sequence_length=None if preprocessor is None else preprocessor.sequence_length,
            state=tuple(
                StoredTensorSpec(name, tuple(spec.shape), spec.dtype, spec.room_axis)
                for name, spec in specs.items()
            ),
            sampler=_sampler(self.sampler),
            tokens=None if preprocessor is None else _tokens(preprocessor),
        )


def _sampler(sampler) -> Sampler:
    parameters = None
    if is_filter(sampler):
        parameters = row_parameters(sampler)
    generators = sampler.variables
    return Sampler(
        name=type(sampler).__name__,
        parameters=parameters,
        needs_history=needs_history(sampler),
        num_generators=len(generators),
        generator_dtype=str(generators[0].dtype) if generators else "int32",
    )


def _tokens(preprocessor) -> Tokens:
    tokenizer = preprocessor.tokenizer
    start, end = tokenizer.start_token_id, tokenizer.end_token_id
    return Tokens(
        start=(start,) if preprocessor.add_start_token else (),
        end=() if end is None else (end,),
        special=tuple(int(id) for id in tokenizer.special_token_ids),
    )
