import pathlib
import secrets
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import numpy as jnp

from keras_mamba2.arguments import BOOLEAN
from keras_mamba2.arguments import PATH
from keras_mamba2.arguments import STRING
from keras_mamba2.arguments import integer
from keras_mamba2.arguments import optional
from keras_mamba2.host import state_file
from keras_mamba2.host.conversations import check_is_session
from keras_mamba2.host.decoding import Decoding
from keras_mamba2.host.inputs import names_of_texts
from keras_mamba2.host.inputs import standard_names
from keras_mamba2.host.keys import row_keys
from keras_mamba2.host.keys import row_texts
from keras_mamba2.host.options import checked_lengths
from keras_mamba2.host.options import checked_stop_ids
from keras_mamba2.host.options import checked_stop_strings
from keras_mamba2.host.options import row_limits
from keras_mamba2.host.prompts import after_tokens
from keras_mamba2.host.prompts import check_prompts
from keras_mamba2.host.prompts import padded
from keras_mamba2.host.prompts import rows_of
from keras_mamba2.host.prompts import seen_ids
from keras_mamba2.host.rows import Rows
from keras_mamba2.host.rows import stop_tokens
from keras_mamba2.host.sampling import KINDS
from keras_mamba2.host.sampling import Sampling
from keras_mamba2.host.sampling import with_given
from keras_mamba2.host.session import Mamba2Session
from keras_mamba2.host.text_stream import TextStream
from keras_mamba2.host.text_stream import TextStreams
from keras_mamba2.host.text_stream import run_lengths
from keras_mamba2.host.texts import is_one_text
from keras_mamba2.host.texts import texts_of
from keras_mamba2.portable.codec import Codec
from keras_mamba2.portable.engine import Engine
from keras_mamba2.portable.loading import platform_of
from keras_mamba2.portable.loading import read_weights
from keras_mamba2.portable.manifest import TOKENIZER_FILE
from keras_mamba2.portable.manifest import Manifest
from keras_mamba2.portable.state import STATE
from keras_mamba2.portable.state import ProgramState


def load_programs(folder) -> "Programs":
    """Loads what `Mamba2CausalLM.export_programs` wrote. It needs JAX, and no Keras.

    Each program is compiled for this machine when it is first needed.

    Args:
        folder: path.

    Example:
    ```python
    programs = keras_mamba2.load_programs("shakespeare_programs")
    programs.generate("ROMEO:", max_new_tokens=200)
    ```

    Raises:
        ValueError: that names the file, if one is missing or damaged; for a version of the format
            or of `jax.export` that cannot be read; and on a platform without programs.
    """
    return Programs(folder)


class Programs:
    """A language model as programs that were exported: text in, text out, without Keras.

    Made by `load_programs`. It gives the tokens that `Mamba2CausalLM` gives, from the same
    arguments, with random samplers too if there is a `seed`.

    Args:
        folder: the path of a folder that `Mamba2CausalLM.export_programs` wrote.

    Example:
    ```python
    programs = keras_mamba2.load_programs("shakespeare_programs")
    programs.generate(["To be, or", "Once"], max_length=100, temperature=0.8)
    for piece in programs.stream("ROMEO:", max_new_tokens=200):
        print(piece, end="")
    session = programs.start("Once upon a time")
    ```
    """

    def __init__(self, folder):
        folder = pathlib.Path(PATH("folder", folder)).absolute()
        self.manifest = manifest = Manifest.read(folder)
        platform = platform_of(manifest, folder)
        self._codec_or_none = None
        if manifest.tokens is not None:
            self._codec_or_none = Codec(manifest.check(folder, TOKENIZER_FILE), manifest.tokens)
        weights = read_weights(manifest, folder) if manifest.weights == "beside" else []
        self._engines = {
            size: Engine(manifest, folder, platform, size, weights) for size in manifest.batch_sizes
        }

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """How many rows the programs take. Fewer are padded, more are cut into several batches."""
        return self.manifest.batch_sizes

    def generate(
        self,
        inputs,
        max_length: int | None = None,
        stop_token_ids: Sequence[int] | str | None = "auto",
        strip_prompt: bool = False,
        *,
        max_new_tokens: int | None = None,
        stop_strings: Sequence[str] | str | None = (),
        state: ProgramState | None = None,
        seed: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
    ):
        """Generates text, or token ids, that continue `inputs`.

        Args:
            inputs: a string, a list of strings, or a dict of `token_ids` and `padding_mask`.
            max_length: as in `Mamba2CausalLM.generate`, like the following.
            stop_token_ids: as there.
            strip_prompt: as there.
            max_new_tokens: as there.
            stop_strings: as there.
            state: the `ProgramState` of `prefill` that `inputs` continue, one row a prompt.
            seed: as there.
            temperature: as there.
            top_k: as there.
            top_p: as there.
            min_p: as there.
            repetition_penalty: as there.

        Returns:
            What `inputs` is: a string, a list of strings, or a dict of arrays.

        Raises:
            ValueError: as there.
        """
        BOOLEAN("strip_prompt", strip_prompt)
        prompts, limits = self._read(inputs, max_length, max_new_tokens, state)
        stop_ids = self._stop_ids(stop_token_ids)
        stop_strings = self._stop_strings(inputs, stop_strings)
        decodings = self._decodings(
            prompts,
            limits,
            stop_ids,
            state,
            seed,
            run_lengths if stop_strings else tuple,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        read: list[np.ndarray] = []
        new: list[Any] = []  # texts, or rows of token ids
        for run, its in decodings:
            read += its
            if stop_strings:
                new += self._streams(run, its, stop_strings).all_texts()
            else:
                new += run.all_tokens()[: len(its)]
        told = [prompt[:0] if strip_prompt else prompt for prompt in prompts]
        before = [r[: len(r) - len(t)] for r, t in zip(read, told, strict=True)]
        if stop_strings:
            pairs = zip(self._codec.texts(told, before), new, strict=True)
            texts = ["".join(pair) for pair in pairs]
            return texts[0] if is_one_text(inputs) else texts
        rows = [np.concatenate(pair) for pair in zip(told, new, strict=True)]
        if isinstance(inputs, Mapping):
            size = np.shape(standard_names(inputs)["token_ids"])[1]
            return padded(rows, max(size, *map(len, rows)))
        texts = self._codec.texts(rows, before)
        return texts[0] if is_one_text(inputs) else texts

    def stream(
        self,
        inputs: str | Sequence[str],
        max_length: int | None = None,
        stop_token_ids: Sequence[int] | str | None = "auto",
        *,
        max_new_tokens: int | None = None,
        stop_strings: Sequence[str] | str | None = (),
        state: ProgramState | None = None,
        seed: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
    ) -> Iterator[str] | TextStreams:
        """Yields what `generate` with `strip_prompt=True` returns, piece by piece.

        Args:
            inputs: a string, or a list of strings, not more than the largest of `batch_sizes`.
            max_length: as in `generate`, like the following.
            stop_token_ids: as there.
            max_new_tokens: as there.
            stop_strings: as there.
            state: as there.
            seed: as there.
            temperature: as there.
            top_k: as there.
            top_p: as there.
            min_p: as there.
            repetition_penalty: as there.

        Returns:
            Iterator over strings, or over lists with a string, maybe empty, for each row.
        """
        run = self._stream(
            inputs,
            max_length,
            max_new_tokens,
            stop_token_ids,
            stop_strings,
            state,
            seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        return (piece for [piece] in run) if is_one_text(inputs) else run

    def stream_on(self, session: Mamba2Session, text: str, **kwargs) -> TextStreams:
        """What follows the text of a session and `text`. For `Mamba2Session.stream`."""
        # For a penalty on repetition. Without the tokens that `encode` puts before a text.
        history = self._codec.encode([session.text], continued=False)[0]
        history = history[len(self._codec.tokens.start) :]
        return self._stream([text], state=session.state, history=[history], **kwargs)

    def _stream(
        self,
        inputs,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        stop_token_ids: Sequence[int] | str | None = "auto",
        stop_strings: Sequence[str] | str | None = (),
        state: ProgramState | None = None,
        seed: int | None = None,
        history: Sequence[np.ndarray] | None = None,
        **parameters: float | None,
    ) -> TextStreams:
        if isinstance(inputs, Mapping):
            raise ValueError("`stream` yields text. Received: a dict of token ids")
        prompts, limits = self._read(inputs, max_length, max_new_tokens, state)
        if len(prompts) > self.batch_sizes[-1]:
            raise ValueError(
                f"The programs stream at most {self.batch_sizes[-1]} texts at once. Export them "
                f"with a larger batch size, or call `stream` several times. Received: "
                f"{len(prompts)} texts"
            )
        stop_ids = self._stop_ids(stop_token_ids)
        stop_strings = self._stop_strings(inputs, stop_strings)
        [(decoding, read)] = self._decodings(
            prompts, limits, stop_ids, state, seed, run_lengths, history, **parameters
        )
        return self._streams(decoding, read, stop_strings)

    def prefill(self, inputs, state: ProgramState | None = None) -> ProgramState:
        """Reads text without generating any. See `Mamba2CausalLM.prefill`.

        Args:
            inputs: a string, a list of strings, or a dict of `token_ids` and `padding_mask`.
            state: the `ProgramState` that `inputs` continue, one row a prompt.
        """
        prompts = self._prompts(inputs, state)
        states = [
            engine.prefill(part, rows)[: len(prompts[where])]
            for engine, where, part, rows in self._batches(prompts, state)
        ]
        return states[0] if len(states) == 1 else ProgramState.concatenate(states)

    def start(self, text: str) -> Mamba2Session:
        """A session: one text that grows, and the state after it."""
        text = STRING("text", text)
        return Mamba2Session(self, text, self.prefill(text))

    def resume(self, file) -> Mamba2Session:
        """The session in a file, which `Mamba2Session.save` wrote, of this or of the model.

        Raises:
            ValueError: that names the file, if it is missing, damaged, that of another model, or
                a conversation.
        """
        manifest = self.manifest
        tensors, text = state_file.read(
            file,
            {spec.name: spec for spec in manifest.state},
            manifest.model,
            lambda: manifest.fingerprint,
            manifest.vocabulary_size,
        )
        check_is_session(file, text, len(tensors["token"]))
        dtypes = (jnp.dtype(spec.dtype) for spec in manifest.state)
        named = zip(manifest.state, dtypes, strict=True)
        layers = tuple(tensors[spec.name].astype(dtype) for spec, dtype in named)
        counts = {name: tensors[name] for name in state_file.COUNTS}
        return Mamba2Session(self, text, ProgramState(layers, **counts, specs=manifest.state))

    def save_state(self, file, state: ProgramState, text: str = "") -> None:
        """Writes a state to a safetensors file, and a text beside it.

        `Mamba2CausalLM.resume` reads it too, with the model that was exported.
        """
        self._check_state(state)
        longest = int(np.max(state.length, initial=0))
        tensors = {}
        for leaf, spec in zip(state.layers, state.specs, strict=True):
            array = state_file.filled(np.asarray(leaf), spec, longest)
            tensors[spec.name] = np.ascontiguousarray(array.astype(state_file.stored_dtype(spec)))
        for name in state_file.COUNTS:
            tensors[name] = np.asarray(getattr(state, name))
        state_file.write(file, tensors, self.manifest.model, self.manifest.fingerprint, text)

    @property
    def _codec(self) -> Codec:
        if self._codec_or_none is None:
            raise ValueError(
                "The model was exported without a tokenizer: pass a dict of token ids and mask."
            )
        return self._codec_or_none

    def _prompts(self, inputs, state: ProgramState | None) -> list[np.ndarray]:
        waiting = None
        if state is not None:
            self._check_state(state)
            waiting = np.asarray(state.token)
        if isinstance(inputs, Mapping):
            named = names_of_texts(inputs)
            prompts = rows_of(*(np.asarray(named[n]) for n in ("token_ids", "padding_mask")))
        else:
            prompts = self._codec.encode(texts_of(inputs), continued=state is not None)
        check_prompts(prompts, self.manifest.vocabulary_size, waiting)
        return prompts

    def _check_state(self, state: ProgramState) -> None:
        if STATE("state", state).specs != self.manifest.state:
            raise ValueError("The state belongs to other programs: its tensors are others.")

    def _read(
        self,
        inputs,
        max_length: int | None,
        max_new_tokens: int | None,
        state: ProgramState | None,
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """The prompts as token ids, and how many tokens may follow each."""
        total, max_new_tokens = checked_lengths(max_length, max_new_tokens)
        prompts = self._prompts(inputs, state)
        if total is None and max_new_tokens is None:
            total = self.manifest.sequence_length
            if isinstance(inputs, Mapping):
                total = np.shape(standard_names(inputs)["token_ids"])[1]
        return prompts, row_limits(prompts, total, max_new_tokens)

    def _stop_ids(self, stop_token_ids) -> tuple[int, ...]:
        tokens = self.manifest.tokens
        size = self.manifest.vocabulary_size
        ids = checked_stop_ids(stop_token_ids, size, None if tokens is None else tokens.end)
        if len(ids) > self.manifest.stop_token_capacity:
            raise ValueError(
                f"The programs take at most {self.manifest.stop_token_capacity} stop tokens. "
                f"Received: {len(ids)}"
            )
        return ids

    def _stop_strings(self, inputs, stop_strings) -> tuple[str, ...]:
        stop_strings = checked_stop_strings(stop_strings, self._codec_or_none is not None)
        if stop_strings and isinstance(inputs, Mapping):
            raise ValueError("`stop_strings` need prompts of text. Received: a dict of token ids")
        return stop_strings

    def _decodings(
        self,
        prompts: list[np.ndarray],
        limits: np.ndarray,
        stop_ids: Sequence[int],
        state: ProgramState | None,
        seed: int | None,
        lengths: Callable[[], Iterable[int]],
        history: Sequence[np.ndarray] | None = None,
        **parameters: float | None,
    ) -> Iterator[tuple[Decoding, list[np.ndarray]]]:
        """The loops of all batches that the prompts are cut into, and what their rows read."""
        optional(integer())("seed", seed)
        sampling, num_generators, dtype = self._sampling(parameters)
        before = () if state is None else (np.asarray(state.digest), np.asarray(state.token))
        texts = row_texts(prompts, *before)
        seed = secrets.randbits(64) if seed is None else seed
        keys = row_keys(seed, texts, num_generators, dtype)
        needs_history = sampling is not None or self.manifest.sampler.needs_history
        size = self.manifest.vocabulary_size if needs_history else 0
        read = prompts if state is None else after_tokens(np.asarray(state.token), prompts)
        seen = seen_ids(read, size)
        if history is not None:
            seen |= seen_ids(history, size)
        remaining = np.minimum(limits, np.iinfo("int32").max).astype("int32")

        def decoding(engine: Engine, where: slice, part: ProgramState, rows: list[np.ndarray]):
            b, n = engine.batch_size, len(prompts[where])
            return Decoding(
                engine,
                Rows(
                    state=engine.prefill(part, rows),
                    remaining=_padded(remaining[where], b),
                    stop_token_ids=stop_tokens(stop_ids, b, self.manifest.stop_token_capacity),
                    seen=_padded(seen[where], b),
                    keys=_padded(keys[where], b),
                    sampling=() if sampling is None else Sampling.of_rows(b, **sampling),
                ),
                lengths(),
            ), rows[:n]

        return (decoding(*batch) for batch in self._batches(prompts, state))

    def _sampling(
        self, parameters: Mapping[str, float | None]
    ) -> tuple[dict[str, Any] | None, int, str]:
        """The parameters of all rows, None for the sampler as it was compiled; its generators."""
        sampler = self.manifest.sampler
        given = {name: value for name, value in parameters.items() if value is not None}
        given = {name: KINDS[name](name, value) for name, value in given.items()}
        if sampler.has_program and not given:
            return None, sampler.num_generators, sampler.generator_dtype
        if sampler.parameters is None:
            raise ValueError(
                f"{sampler.name}, with which the programs were exported, does not take "
                f"{', '.join(given)}. Compile the model with `keras_mamba2.FilterSampler` before."
            )
        if sampler.name == "FilterSampler":
            return {**sampler.parameters, **given}, 1, GENERATOR_DTYPE
        return with_given(sampler.parameters, given), 1, GENERATOR_DTYPE

    def _batches(
        self, prompts: list[np.ndarray], state: ProgramState | None
    ) -> Iterator[tuple[Engine, slice, ProgramState, list[np.ndarray]]]:
        """Cuts prompts and state into batches of the programs' sizes, the last one padded."""
        if state is not None:
            prompts = after_tokens(np.asarray(state.token), prompts)
        for begin in range(0, len(prompts), self.batch_sizes[-1]):
            where = slice(begin, begin + self.batch_sizes[-1])
            rows = prompts[where]
            b = next(size for size in self.batch_sizes if size >= len(rows))
            missing = b - len(rows)
            zeros = ProgramState.zeros(self.manifest.state, b if state is None else missing)
            if state is None:
                part = zeros
            else:
                part = state if len(rows) == state.batch_size else state[where]
                part = ProgramState.concatenate([part, zeros]) if missing else part
            yield self._engines[b], where, part, rows + [np.zeros(0, "int32")] * missing

    def _streams(
        self,
        decoding: Decoding,
        read: Sequence[np.ndarray],
        stop_strings: Sequence[str],
    ) -> TextStreams:
        """The texts of a loop, each of which goes on from the tokens that were read."""
        skip = self._codec.tokens.special
        streams = [TextStream(self._codec.decode, skip, stop_strings, row) for row in read]
        return TextStreams(decoding, streams)


# Of the state of a `FilterSampler`'s random generator.
GENERATOR_DTYPE = "uint32"


def _padded(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """`rows` and zeros after them: a row of which nothing is asked."""
    return np.concatenate([rows, np.zeros((batch_size - len(rows), *rows.shape[1:]), rows.dtype)])
