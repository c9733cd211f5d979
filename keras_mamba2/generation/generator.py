"""The host's side of generation: prompts in, tokens out, a visit to the device now and then."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras_hub
import numpy as np
from keras import ops

from keras_mamba2.generation.decode import NO_TOKEN
from keras_mamba2.generation.decode import Rows
from keras_mamba2.generation.decode import decode
from keras_mamba2.generation.prefill import blocks
from keras_mamba2.generation.prefill import prefill_block
from keras_mamba2.generation.programs import compiled

# The decode loop returns to the host after so many tokens, so one program serves any number.
DECODE_CAPACITY = 256
# Fewer stop tokens are filled up, so that their number is not compiled in.
STOP_TOKEN_CAPACITY = 8


class Generator:
    """The compiled programs of one model and its sampler: KerasHub's `generate_function`.

    Args:
        model: a `Mamba2CausalLM` after `compile`.
    """

    def __init__(self, model):
        self.model = model

        def prefill(state, token_ids, padding_mask):
            return prefill_block(model, state, token_ids, padding_mask)

        def decode_rows(rows, num_steps, stop_token_ids):
            return decode(
                model, model.sampler, Rows(*rows), num_steps, stop_token_ids, DECODE_CAPACITY
            )

        self._prefill_block = compiled(model, prefill, donate=True)
        self._decode = compiled(model, decode_rows, donate=True)
        self._search = compiled(model, model.generate_step, static=("stop_token_ids",))

    def __call__(
        self,
        inputs: Mapping[str, Any],
        stop_token_ids: Sequence[int] | None = None,
        max_new_tokens: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Fills the padding of a batch of prompts with generated tokens.

        Args:
            inputs: `token_ids` and `padding_mask`, `(b max_length)`, padded on either side.
            stop_token_ids: token ids that end a row.
            max_new_tokens: int, ends a row too; by default the padding does.

        Returns:
            The same two arrays. Rows are padded on the right, whatever they were before.
        """
        token_ids = np.asarray(ops.convert_to_numpy(inputs["token_ids"]))
        padding_mask = np.asarray(ops.convert_to_numpy(inputs["padding_mask"])).astype(bool)
        prompts = [row[mask] for row, mask in zip(token_ids, padding_mask, strict=True)]
        self._check_prompts(prompts)
        room = token_ids.shape[1] - np.array([len(prompt) for prompt in prompts])
        if max_new_tokens is not None:
            room = np.minimum(room, max_new_tokens)
        generate = self.generate if picks_tokens(self.model.sampler) else self.search
        rows = generate(prompts, room, tuple(stop_token_ids or ()))

        token_ids, padding_mask = np.zeros_like(token_ids), np.zeros_like(padding_mask)
        for i, (prompt, new) in enumerate(zip(prompts, rows, strict=True)):
            length = len(prompt) + len(new)
            token_ids[i, :length] = np.concatenate([prompt, new])
            padding_mask[i, :length] = True
        return {"token_ids": token_ids, "padding_mask": padding_mask}

    def prefill(self, prompts: list[np.ndarray]):
        """The state after `prompts`, rows of token ids of any lengths, zero included."""
        state = self.model.backbone.initial_state(len(prompts))
        for token_ids, padding_mask in blocks(prompts):
            state = self._prefill_block(
                state, ops.convert_to_tensor(token_ids), ops.convert_to_tensor(padding_mask)
            )
        return state

    def start(self, prompts: list[np.ndarray], room: np.ndarray) -> Rows:
        """Where the rows stand before their first new token, of which `room[i]` may come."""
        return Rows(
            state=self.prefill([prompt[:-1] for prompt in prompts]),
            token=ops.convert_to_tensor([int(prompt[-1]) for prompt in prompts], "int32"),
            remaining=ops.convert_to_tensor(room, "int32"),
        )

    def advance(self, rows: Rows, num_steps: int, stop_token_ids: Sequence[int] = ()):
        """Runs the loop for at most `num_steps <= DECODE_CAPACITY` tokens a row.

        The memory of `rows` is given up. Returns the new rows, and the tokens
        `(b DECODE_CAPACITY)` with -1 where a row had stopped.
        """
        size = -(-max(len(stop_token_ids), 1) // STOP_TOKEN_CAPACITY) * STOP_TOKEN_CAPACITY
        stops = [*stop_token_ids] + [NO_TOKEN] * (size - len(stop_token_ids))
        num_steps = ops.convert_to_tensor(num_steps, "int32")
        return self._decode(rows, num_steps, ops.convert_to_tensor(stops, "int32"))

    def generate(
        self, prompts: list[np.ndarray], room: np.ndarray, stop_token_ids: Sequence[int]
    ) -> list[np.ndarray]:
        """The tokens that follow each prompt, at most `room[i]` of them."""
        rows = self.start(prompts, room)
        pieces = [np.zeros((len(prompts), 0), "int32")]
        missing, going = int(room.max()), True
        while missing > 0 and going:
            rows, tokens = self.advance(rows, min(missing, DECODE_CAPACITY), stop_token_ids)
            pieces.append(ops.convert_to_numpy(tokens))
            going = bool(np.any(ops.convert_to_numpy(rows.remaining) > 0))
            missing -= DECODE_CAPACITY
        tokens = np.concatenate(pieces, axis=1)
        return [row[row != NO_TOKEN] for row in tokens]

    def search(
        self, prompts: list[np.ndarray], room: np.ndarray, stop_token_ids: tuple[int, ...]
    ) -> list[np.ndarray]:
        """As `generate`, for a sampler that searches with a loop of its own."""
        lengths = np.array([len(prompt) for prompt in prompts])
        token_ids = np.zeros((len(prompts), int((lengths + room).max())), "int32")
        for row, prompt in zip(token_ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        padding_mask = np.arange(token_ids.shape[1]) < lengths[:, None]
        inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
        inputs = {name: ops.convert_to_tensor(value) for name, value in inputs.items()}
        found = self._search(inputs, stop_token_ids=stop_token_ids or None)
        found = ops.convert_to_numpy(found["token_ids"])
        rows = []
        for row, length, limit in zip(found, lengths, room, strict=True):
            new = row[length : length + limit]
            stops = np.flatnonzero(np.isin(new, stop_token_ids))
            rows.append(new[: stops[0] + 1] if len(stops) else new)
        return rows

    def _check_prompts(self, prompts: list[np.ndarray]) -> None:
        if not prompts:
            raise ValueError("There is nothing to generate from: the batch of prompts is empty.")
        size = self.model.backbone.vocabulary_size
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(
                    f"Prompt {i} has no tokens. A prompt needs at least one: write some text, or "
                    "set `add_start_token=True` on the preprocessor."
                )
            if prompt.min() < 0 or prompt.max() >= size:
                bad = prompt[(prompt < 0) | (prompt >= size)][0]
                raise ValueError(
                    f"Prompt {i} has token id {bad}, outside the model's vocabulary of {size}."
                )


def picks_tokens(sampler: keras_hub.samplers.Sampler) -> bool:
    """Whether `sampler` only picks tokens, by `get_next_token`, and has no loop of its own."""
    return type(sampler).__call__ is keras_hub.samplers.Sampler.__call__
