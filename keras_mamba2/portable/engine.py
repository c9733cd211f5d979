"""The exported programs of one batch size, compiled when they are first called."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from keras_mamba2.host.blocks import feed
from keras_mamba2.host.room import room_for
from keras_mamba2.host.rows import Rows
from keras_mamba2.portable.manifest import Manifest
from keras_mamba2.portable.manifest import program_file
from keras_mamba2.portable.state import ProgramState


class Engine:
    """Runs the programs of one batch size: `generation.Generator` with what was exported.

    Args:
        manifest: the `Manifest` of the folder.
        folder: path.
        platform: string, one of the manifest's.
        batch_size: int, one of the manifest's.
        weights: list of arrays; empty if they are inside of the programs.
    """

    # For `Decoding`.
    to_numpy = staticmethod(np.asarray)

    def __init__(
        self,
        manifest: Manifest,
        folder: pathlib.Path,
        platform: str,
        batch_size: int,
        weights: Sequence[Any],
    ):
        self.batch_size = batch_size
        self.decode_capacity = manifest.decode_capacity
        self._manifest = manifest
        self._folder = folder
        self._platform = platform
        self._weights = [list(weights)] if manifest.weights == "beside" else []
        self._compiled: dict[str, Callable] = {}

    def prefill(self, state: ProgramState, prompts: list[np.ndarray]) -> ProgramState:
        """The state after `prompts`, one a row; an empty one leaves its row as it was.

        `state` stays as it was.
        """
        before = [np.asarray(prompt[:-1], "int32") for prompt in prompts]
        last = [prompt[-1] if len(prompt) else 0 for prompt in prompts]
        # The programs reuse the memory of their argument.
        state = self.copied(_with_room(state, [len(prompt) for prompt in prompts]))
        sizes = self._manifest.block_sizes
        state = feed(state, before, self._prefill_block, self._prefill_row, sizes)
        return dataclasses.replace(state, token=np.array(last, "int32"))

    def advance(self, rows: Rows, num_steps: int, with_logprobs: bool = False):
        """As `Generator.advance`: the new rows, the tokens, and no log probabilities."""
        program = self._program("decode" if rows.sampling else "decode_as_compiled")
        given = _with_room(rows.state, np.minimum(rows.remaining, num_steps))
        state, remaining, seen, tokens = program(
            _flat(given),
            rows.remaining,
            rows.stop_token_ids,
            rows.seen,
            rows.keys,
            list(rows.sampling),
            np.array(num_steps, "int32"),
        )
        rows = rows._replace(state=_like(given, state), remaining=remaining, seen=seen)
        return rows, tokens, np.zeros((self.batch_size, 0), "float32")

    def copied(self, state: ProgramState) -> ProgramState:
        return _copied(state)

    def _prefill_block(self, state, token_ids, padding_mask) -> ProgramState:
        program = self._program(f"prefill_{token_ids.shape[1]}")
        return _like(state, program(_flat(state), token_ids, padding_mask))

    def _prefill_row(self, state, row, token_ids) -> ProgramState:
        return _like(state, self._program("prefill_row")(_flat(state), row, token_ids))

    def _program(self, name: str) -> Callable:
        if name not in self._compiled:
            self._compiled[name] = self._load(name)
        return functools.partial(self._compiled[name], *self._weights)

    def _load(self, name: str) -> Callable:
        from jax import export

        file = self._manifest.check(
            self._folder, program_file(self._platform, name, self.batch_size)
        )
        try:
            program = export.deserialize(bytearray(file.read_bytes()))
        except Exception as error:  # JAX and its formats say what they will
            raise ValueError(
                f"{file} was written by JAX {self._manifest.jax}, and JAX {jax.__version__} cannot "
                f"read it: {error}. {COMPATIBILITY}"
            ) from error
        # The state is the first argument after the weights.
        return jax.jit(program.call, donate_argnums=len(self._weights))


COMPATIBILITY = (
    "A program that was exported can be read by JAX of the next six months, and of three weeks "
    "before. Export it again, or install a version of JAX that is nearer."
)


def _flat(state: ProgramState) -> list[Any]:
    return [*state.layers, state.token, state.length, state.digest]


def _like(state: ProgramState, leaves: Sequence[Any]) -> ProgramState:
    """The state of a program's result, in the form of another state."""
    *layers, token, length, digest = leaves
    return ProgramState(tuple(layers), token, length, digest, state.specs)


def _with_room(state: ProgramState, num_tokens: int | Sequence[int]) -> ProgramState:
    """`state` with room for `num_tokens` more in each row, if it needs room."""
    if state.room is None:
        return state
    needed = int(np.max(np.asarray(state.length) + np.asarray(num_tokens)))
    return state if needed <= state.room else state.with_room(room_for(needed))


@jax.jit
def _copied(state: ProgramState) -> ProgramState:
    return jax.tree.map(jnp.copy, state)
