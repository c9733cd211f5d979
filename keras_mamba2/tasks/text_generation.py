import concurrent.futures
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tqdm.auto
from keras import ops

from keras_mamba2.arguments import BOOLEAN
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import STRING
from keras_mamba2.arguments import optional
from keras_mamba2.arguments import several
from keras_mamba2.generation import Decoding
from keras_mamba2.generation import Generator
from keras_mamba2.generation import Proposer
from keras_mamba2.generation import needs_history
from keras_mamba2.generation import padded
from keras_mamba2.generation import picks_tokens
from keras_mamba2.generation import prompts_of
from keras_mamba2.host.conversations import check_is_session
from keras_mamba2.host.inputs import names_of_texts
from keras_mamba2.host.inputs import standard_names
from keras_mamba2.host.options import row_limits
from keras_mamba2.host.prompts import after_tokens
from keras_mamba2.host.session import Mamba2Session
from keras_mamba2.host.text_stream import TextStream
from keras_mamba2.host.text_stream import TextStreams
from keras_mamba2.host.text_stream import run_lengths
from keras_mamba2.host.text_stream import text_after
from keras_mamba2.host.texts import is_one_text
from keras_mamba2.host.texts import texts_of
from keras_mamba2.models import Mamba2State
from keras_mamba2.models.residual_backbone import ResidualBackbone
from keras_mamba2.state import STATE
from keras_mamba2.state import files as state_files
from keras_mamba2.tasks.datasets import batches
from keras_mamba2.tasks.generation_options import GenerationOptions


class TextGeneration:
    """The part of `Mamba2CausalLM` that generates: prompts in, texts out."""

    backbone: ResidualBackbone
    preprocessor: Any  # or None
    sampler: Any
    speculation: Proposer | None = None
    generate_function: Any  # a `Generator`, or None

    def make_generate_function(self) -> Generator:
        if self.generate_function is None:
            self.generate_function = Generator(self)
        self.generate_function.wait()
        return self.generate_function

    def generate(
        self,
        inputs,
        max_length: int | None = None,
        stop_token_ids: Sequence[int] | str | None = "auto",
        strip_prompt: bool = False,
        *,
        max_new_tokens: int | None = None,
        stop_strings: Sequence[str] | str | None = (),
        num_return_sequences: int = 1,
        state: Mamba2State | None = None,
        seed: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        return_logprobs: bool = False,
    ):
        """Generates text, or token ids, that continue `inputs`.

        Prompts of different lengths can share a batch. Each gets the text that it gets alone, up
        to rounding, with random samplers too. Another length of prompt, or another number of new
        tokens, compiles nothing anew.

        Args:
            inputs: a string, a list of strings, or a dataset of them, batched or not. Or a dict
                of `token_ids` and `padding_mask` `(b t)`, or a dataset of such.
            max_length: int, the total length of each row, prompt included. Defaults to the
                preprocessor's `sequence_length`; for a dict, to the inputs' length.
            stop_token_ids: token ids that end a row. `"auto"` is the tokenizer's end token,
                `None` is no token.
            strip_prompt: bool, whether to return only the new text.
            max_new_tokens: int, how many tokens each row gets at most, instead of `max_length`.
            stop_strings: a string or several. A row ends before the first of them in the new
                text.
            num_return_sequences: int, how often each prompt is continued, from one prefill. The
                results for a prompt follow one another.
            state: the `Mamba2State` of `prefill` that `inputs` continue, one row a prompt. A
                prompt may then be empty. The state stays as it was. A penalty on repetition knows
                the last of its tokens only; in a session, of `start`, it knows all.
            seed: int. The same seed gives the same text, whatever else was or is generated.
            temperature: float, instead of the sampler's, like the following. The first such call
                compiles a program, which then serves all values.
            top_k: int, as in `keras_mamba2.FilterSampler`, like the following.
            top_p: float, as there.
            min_p: float, as there.
            repetition_penalty: float, as there.
            return_logprobs: bool, whether to return the new tokens too, with the model's log
                probabilities, before temperature and filters.

        Returns:
            What `inputs` is: a string, a list of strings, or a dict of arrays. For one string
            and several sequences, a list of strings. With `return_logprobs` a tuple of that and
            a list: for each row a dict of `token_ids` `(n)` and `logprobs` `(n)`, natural
            logarithms, of all tokens that were generated, also those after a stop string.

        Raises:
            ValueError: for an empty prompt, one longer than `max_length`, token ids outside the
                vocabulary, arguments out of range, a state of another model or batch size, and
                logits that are not finite.
        """
        options = GenerationOptions.checked(
            self,
            max_length,
            max_new_tokens,
            stop_token_ids,
            stop_strings,
            state,
            seed,
            num_return_sequences,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        BOOLEAN("strip_prompt", strip_prompt)
        BOOLEAN("return_logprobs", return_logprobs)
        results: list[Any] = []
        logprobs: list[dict[str, np.ndarray]] = []
        size = 0
        for batch in batches(inputs):
            rows, its = self._generate_batch(batch, options, strip_prompt, return_logprobs)
            results += rows
            logprobs += its
            if isinstance(batch, Mapping):
                size = max(size, *map(len, rows), *(np.shape(x)[1] for x in batch.values()))
        if not results:
            raise ValueError("There is nothing to generate from: the batch of prompts is empty.")
        if not isinstance(results[0], str):
            outputs = padded(results, size)
        else:
            outputs = results[0] if is_one_text(inputs) and len(results) == 1 else results
        return (outputs, logprobs) if return_logprobs else outputs

    def _generate_batch(
        self, batch, options: GenerationOptions, strip_prompt: bool, with_logprobs: bool
    ) -> tuple[list[Any], list[dict[str, np.ndarray]]]:
        """The texts, or rows of token ids, of one batch; and log probabilities if asked for."""
        prompts, limits = self._read(batch, options)
        asked = [p for p in prompts for _ in range(options.num_return_sequences)]
        told = [p[:0] if strip_prompt else p for p in asked]
        if not picks_tokens(self.sampler):
            self._check_searchable(options, with_logprobs)
            new = self.make_generate_function().search(prompts, limits, options.stop_token_ids)
            before = [p[: len(p) - len(t)] for p, t in zip(asked, told, strict=True)]
            logprobs = []
        else:
            lengths = run_lengths() if options.stop_strings else ()
            decoding = self._decoding(prompts, limits, options, lengths, with_logprobs)
            read = self._after_state(asked, options)
            before = [r[: len(r) - len(t)] for r, t in zip(read, told, strict=True)]
            if options.stop_strings:
                new = self._streams(decoding, options, read).all_texts()
                texts = zip(self._texts(told, before), new, strict=True)
                return ["".join(pair) for pair in texts], decoding.likely_tokens()
            new, logprobs = decoding.all_tokens(), decoding.likely_tokens()
        rows = [np.concatenate(pair) for pair in zip(told, new, strict=True)]
        return (rows if isinstance(batch, Mapping) else self._texts(rows, before)), logprobs

    def stream(
        self,
        inputs: str | Sequence[str],
        max_length: int | None = None,
        stop_token_ids: Sequence[int] | str | None = "auto",
        *,
        max_new_tokens: int | None = None,
        stop_strings: Sequence[str] | str | None = (),
        state: Mamba2State | None = None,
        seed: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
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
            temperature: as there.
            top_k: as there.
            top_p: as there.
            min_p: as there.
            repetition_penalty: as there.

        Returns:
            Iterator over strings, or over lists with a string, maybe empty, for each row.

        Raises:
            ValueError: as `generate`, before the first piece is asked for; for logits that are
                not finite when they come.
        """
        options = GenerationOptions.checked(
            self,
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
        run = self.stream_text(texts_of(inputs), options)
        return (piece for [piece] in run) if is_one_text(inputs) else run

    def stream_text(
        self,
        texts: Sequence[str],
        options: GenerationOptions,
        history: Sequence[np.ndarray] | None = None,
    ) -> TextStreams:
        """What follows `texts`, of which `history` are the tokens before, if they are known."""
        prompts, limits = self._read(texts, options)
        decoding = self._decoding(prompts, limits, options, run_lengths(), history=history)
        return self._streams(decoding, options, self._after_state(prompts, options))

    def stream_on(self, session: Mamba2Session, text: str, **kwargs) -> TextStreams:
        """What follows the text of a session and `text`. For `Mamba2Session.stream`."""
        options = GenerationOptions.checked(self, state=session.state, **kwargs)
        return self.stream_text([text], options, self._history(session.text, options))

    def _history(self, text: str, options: GenerationOptions) -> list[np.ndarray] | None:
        """The tokens of a text so far, for a penalty on their repetition and for proposals.

        Text that was cut inside a word may have been read as other tokens, which matters to
        neither.
        """
        penalty = options.parameters.get("repetition_penalty") or 1
        if penalty == 1 and not needs_history(self.sampler) and self.speculation is None:
            return None
        return [np.array(self.preprocessor.tokenizer(text), "int32")]

    def warm_up(
        self,
        batch_size: int = 1,
        prompt_lengths: Sequence[int] | int = 1024,
        wait: bool = True,
    ) -> None:
        """Compiles what `generate` and `stream` need now, and not with the first prompt.

        The programs are compiled at the same time, on as many processors as there are. They are
        those of the sampler that the model was compiled with, without sampling arguments.

        Args:
            batch_size: int, how many prompts will share a batch.
            prompt_lengths: int or several, how many tokens prompts will have. Programs of one
                length serve most others: prompts are cut into blocks of 512, 128, 64, 32 and 16
                tokens.
            wait: bool. If false it returns at once, and the next call that generates waits. On
                JAX the weights need not be there yet: see `from_preset(on_built=...)`.

        Raises:
            ValueError: for arguments out of range, for a sampler that searches whole texts, and
                where tokens are proposed, which needs weights, with `wait=False`.
        """
        BOOLEAN("wait", wait)
        if not picks_tokens(self.sampler):
            raise ValueError(
                f"{type(self.sampler).__name__} searches with a loop of its own, which is compiled "
                "for each length of prompt and text. Compile with a sampler that draws to warm up."
            )
        if self.speculation is not None and not wait:
            raise ValueError("With `speculation` a warm-up needs weights. Received: wait=False")
        lengths = [prompt_lengths] if isinstance(prompt_lengths, int) else prompt_lengths
        lengths = several(SIZE)("prompt_lengths", lengths)
        generator = self.make_generate_function()
        tasks = generator.programs_for(SIZE("batch_size", batch_size), lengths)
        if keras.distribution.distribution() is not None:  # other threads would not see it
            for task in tqdm.auto.tqdm(tasks, "Compiling", unit=" programs"):
                task()
            return
        pool = concurrent.futures.ThreadPoolExecutor()
        compiling = [pool.submit(task) for task in tasks]
        pool.shutdown(wait=False)
        if not wait:
            generator.compiling += compiling
            return
        done = concurrent.futures.as_completed(compiling)
        for future in tqdm.auto.tqdm(done, "Compiling", len(tasks), unit=" programs"):
            future.result()

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
        optional(STATE)("state", state)
        return self.make_generate_function().prefill(self._prompts(inputs, state), state)

    def start(self, text: str) -> Mamba2Session:
        """A session: one text that grows, and the state after it."""
        text = STRING("text", text)
        return Mamba2Session(self, text, self.prefill(text))

    def save_state(self, file, state: Mamba2State, text: str = "") -> None:
        """Writes a state to a safetensors file, and a text beside it. See `Mamba2State.save`."""
        STATE("state", state).save(file, self.backbone, text)

    def resume(self, file) -> Mamba2Session:
        """The session that `Mamba2Session.save` wrote to `file`.

        Raises:
            ValueError: that names the file, if it is missing, damaged, that of another model, or
                a conversation.
        """
        *parts, text = state_files.load(file, self.backbone)
        state = Mamba2State(*parts)
        check_is_session(file, text, state.batch_size)
        return Mamba2Session(self, text, state)

    def _prompts(self, inputs, state: Mamba2State | None) -> list[np.ndarray]:
        if isinstance(inputs, Mapping):
            return prompts_of(names_of_texts(inputs))[0]
        if self.preprocessor is None:
            raise ValueError("Without a `preprocessor`, pass a dict of token ids and mask.")
        return self.preprocessor.prompts(texts_of(inputs), continued=state is not None)

    def _read(self, batch, options: GenerationOptions) -> tuple[list[np.ndarray], np.ndarray]:
        """The prompts of a batch as token ids, and how many tokens may follow each."""
        if isinstance(batch, Mapping) and options.stop_strings:
            raise ValueError("`stop_strings` need prompts of text. Received: a dict of token ids")
        prompts = self._prompts(batch, options.state)
        if options.max_new_tokens is not None:
            return prompts, row_limits(prompts, None, options.max_new_tokens)
        total = options.max_length
        if total is None and isinstance(batch, Mapping):
            total = np.shape(standard_names(batch)["token_ids"])[1]
        total = total or self.preprocessor.sequence_length
        return prompts, row_limits(prompts, total, None)

    def _decoding(
        self,
        prompts,
        limits,
        options: GenerationOptions,
        run_lengths,
        with_logprobs: bool = False,
        history: Sequence[np.ndarray] | None = None,
    ) -> Decoding:
        if not picks_tokens(self.sampler):
            raise ValueError(
                f"{type(self.sampler).__name__} searches whole texts and takes them back. To "
                "stream, or to stop at strings, compile the model with a sampler that draws."
            )
        generator = self.make_generate_function()
        rows = generator.start(
            prompts,
            limits,
            options.stop_token_ids,
            options.state,
            options.num_return_sequences,
            options.seed,
            history,
            **options.parameters,
        )
        return generator.decode(rows, run_lengths, with_logprobs)

    def _after_state(
        self, prompts: Sequence[np.ndarray], options: GenerationOptions
    ) -> list[np.ndarray]:
        """The prompts of all rows, each after the token that its state has not read yet."""
        if options.state is None:
            return list(prompts)
        waiting = ops.convert_to_numpy(options.state.token)
        return after_tokens(np.repeat(waiting, options.num_return_sequences), prompts)

    def _streams(
        self,
        decoding: Decoding,
        options: GenerationOptions,
        read: Sequence[np.ndarray],
        skip: Sequence[int] = (),
    ) -> TextStreams:
        """The texts of a loop, which begins to run when they are asked for.

        Each goes on from the tokens that were read.
        """
        tokenizer = self.preprocessor.tokenizer
        skip = (*tokenizer.special_token_ids, *skip)
        stops = options.stop_strings
        streams = [TextStream(tokenizer.detokenize, skip, stops, row) for row in read]
        return TextStreams(decoding, streams)

    def _texts(self, rows: list[np.ndarray], before: list[np.ndarray]) -> list[str]:
        """The text of each row, after other tokens."""
        if not any(map(len, before)):
            return self.preprocessor.generate_postprocess(padded(rows, max(map(len, rows))))
        tokenizer = self.preprocessor.tokenizer
        decode, special = tokenizer.detokenize, tokenizer.special_token_ids
        return [text_after(*pair, decode, special) for pair in zip(before, rows, strict=True)]

    def _check_searchable(self, options: GenerationOptions, with_logprobs: bool) -> None:
        asked = {
            **options.parameters,
            "state": options.state,
            "num_return_sequences": options.num_return_sequences - 1 or None,
            "stop_strings": options.stop_strings or None,
            "return_logprobs": with_logprobs or None,
        }
        asked = [f"`{name}`" for name, value in asked.items() if value is not None]
        if asked:
            raise ValueError(
                f"{type(self.sampler).__name__} searches with a loop of its own, which does not "
                f"take {', '.join(asked)}. Use a sampler that draws."
            )
