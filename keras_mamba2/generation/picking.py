"""The next token of each row, by any sampler and with the row's own random numbers."""

import threading
from collections.abc import Sequence

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_mamba2.arguments import POSITIVE
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import check_attributes
from keras_mamba2.arguments import choice
from keras_mamba2.arguments import instance
from keras_mamba2.arguments import number
from keras_mamba2.arguments import optional
from keras_mamba2.arguments import shown
from keras_mamba2.generation.sampler import FilterSampler
from keras_mamba2.generation.sampling import filtered
from keras_mamba2.generation.sampling import penalized
from keras_mamba2.host.rows import Rows
from keras_mamba2.host.sampling import with_given

_drawing_seeds = threading.Lock()


def pick(sampler: keras_hub.samplers.Sampler, logits, rows: Rows, digest):
    """The token that `sampler` picks for each row, `(b)`, from logits `(b v)`.

    Args:
        sampler: any that picks tokens by `get_next_token`; a `FilterSampler` for rows with
            their own sampling parameters.
        logits: tensor `(b v)`.
        rows: `Rows`, the progress of each row.
        digest: int32 `(b)`, a number for the text before. The random numbers for a token depend
            on it and on the row's key, so that a text may be stopped and continued at any token.
    """
    if type(sampler) is keras_hub.samplers.GreedySampler:
        return likeliest(logits)
    keys = ops.stack([rows.keys, ops.broadcast_to(digest[:, None], rows.keys.shape)], axis=-1)
    if not rows.sampling:
        history = {"seen": rows.seen} if needs_history(sampler) else {}
        probabilities = sampler.compute_probabilities(logits, **history)
        return draw(sampler.get_next_token, sampler.variables, probabilities, keys)
    logits = ops.cast(logits, "float32")
    if rows.seen.shape[1]:
        logits = penalized(logits, rows.sampling, rows.seen)
    best = likeliest(logits)

    def drawn():
        probabilities = filtered(logits, rows.sampling)
        return ops.cast(draw(sampler.draw, sampler.variables, probabilities, keys), best.dtype)

    draws = ops.logical_and(rows.remaining > 0, rows.sampling.temperature > 0)  # (b)
    # Random numbers for a whole vocabulary: a fifth of a step of eight rows on a CPU.
    return ops.where(draws, ops.cond(ops.any(draws), drawn, lambda: best), best)


def draw(get_next_token, generators: Sequence[keras.Variable], probabilities, keys):
    """`get_next_token(probabilities)`, with states of the random generators for each row.

    Args:
        get_next_token: function of `(b v)`, which may draw from `generators`.
        generators: the states of r random generators.
        probabilities: tensor `(b v)`.
        keys: int tensor `(b r 2)`, the states for each row.
    """
    if not generators:
        return get_next_token(probabilities)

    def draw_row(row):
        probabilities, key = row
        mapping = list(zip(generators, ops.unstack(key), strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return get_next_token(probabilities[None])[0]

    if keras.config.backend() == "jax":
        return ops.vectorized_map(draw_row, (probabilities, keys))
    # `vectorized_map` of the other backends does not support random numbers.
    return ops.stack([draw_row((probabilities[i], keys[i])) for i in range(keys.shape[0])])


def likeliest(logits):
    """`argmax(logits)`. XLA on CPU compiles that to a slow loop over single ids."""
    v = logits.shape[-1]
    ids = ops.arange(v, dtype="int32")
    highest = ops.max(logits, axis=-1, keepdims=True)
    return ops.min(ops.where(logits == highest, ids, v - 1), axis=-1)


def needs_history(sampler: keras_hub.samplers.Sampler) -> bool:
    """Whether `sampler` needs to know which tokens occurred in a row."""
    return getattr(sampler, "needs_history", False)


def picks_tokens(sampler: keras_hub.samplers.Sampler) -> bool:
    """Whether `sampler` only picks tokens, by `get_next_token`, and has no loop of its own."""
    return type(sampler).__call__ is keras_hub.samplers.Sampler.__call__


def sampler_of(identifier) -> keras_hub.samplers.Sampler:
    """The sampler for a name, a configuration or an object.

    Raises:
        ValueError: for an unknown name, an object that is no sampler, and a sampler of KerasHub
            with parameters out of range, which KerasHub accepts.
    """
    if isinstance(identifier, str):
        choice(*NAMES)("sampler", identifier)
    try:
        sampler = keras_hub.samplers.get(identifier)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"`sampler` is none: {error}. Received: {shown(identifier)}") from error
    SAMPLER("sampler", sampler)
    for cls, kinds in KINDS.items():
        if isinstance(sampler, cls):
            check_attributes(sampler, **kinds)
    if getattr(sampler, "return_all_beams", False):
        raise ValueError(
            "`return_all_beams` must be False: a prompt gets one text, of the best beam. "
            "Received: return_all_beams=True"
        )
    return sampler


def sampling_of(sampler: keras_hub.samplers.Sampler, batch_size: int, **overrides):
    """The parameters of each row: `overrides` that are not `None`, else those of `sampler`.

    Returns:
        `Sampling`, or the empty tuple for a sampler of another kind without overrides, which is
        used as it is.

    Raises:
        ValueError: for overrides of a sampler that has no such parameters, or out of range.
    """
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if type(sampler) is FilterSampler:
        parameters = {**sampler.get_config(), **overrides}
    elif not overrides:
        return ()
    elif is_filter(sampler):
        theirs = PARAMETERS[type(sampler)]
        parameters = {ours: getattr(sampler, name) for ours, name in theirs.items()}
        parameters = with_given({"temperature": 0.0, **parameters}, overrides)
    else:
        own = " with `k`" if type(sampler) in PARAMETERS else ""
        raise ValueError(
            f"{type(sampler).__name__}{own} does not take {', '.join(overrides)}. Compile the "
            "model with `keras_mamba2.FilterSampler`, or with another sampler of KerasHub that "
            "draws."
        )
    return FilterSampler(**parameters).sampling(batch_size)


def is_filter(sampler: keras_hub.samplers.Sampler) -> bool:
    """Whether a `FilterSampler` with some parameters draws as `sampler` does."""
    # Of the `k` likeliest tokens KerasHub keeps those that sum to `p` as they are; a filter sees
    # them scaled to sum to 1.
    sums_before = isinstance(sampler, keras_hub.samplers.TopPSampler) and sampler.k is not None
    return type(sampler) in (FilterSampler, *PARAMETERS) and not sums_before


def row_parameters(sampler: keras_hub.samplers.Sampler, **overrides) -> dict[str, float]:
    """The parameters that make a row of `FilterSampler` draw as `sampler` does.

    Raises:
        ValueError: as `sampling_of`, and for a sampler that has no such parameters.
    """
    if type(sampler) is not FilterSampler and overrides.get("repetition_penalty") is None:
        overrides["repetition_penalty"] = 1.0  # something is given, which changes nothing
    sampling = sampling_of(sampler, 1, **overrides)
    return {name: values.item() for name, values in sampling._asdict().items()}


# Of KerasHub's samplers.
NAMES = ("greedy", "random", "top_k", "top_p", "beam", "contrastive")
SAMPLER = instance(
    keras_hub.samplers.Sampler, "a name, or an object of `keras_hub.samplers.Sampler`"
)
# What parameters of theirs may be; at a temperature of 0 they divide by it.
KINDS = {
    keras_hub.samplers.Sampler: {"temperature": number(at_least=0)},
    keras_hub.samplers.RandomSampler: {"temperature": POSITIVE},
    keras_hub.samplers.TopKSampler: {"temperature": POSITIVE, "k": SIZE},
    keras_hub.samplers.TopPSampler: {
        "temperature": POSITIVE,
        "p": number(above=0, at_most=1),
        "k": optional(SIZE),
    },
    keras_hub.samplers.BeamSampler: {"temperature": POSITIVE, "num_beams": SIZE},
    keras_hub.samplers.ContrastiveSampler: {
        "temperature": POSITIVE,
        "k": SIZE,
        "alpha": number(at_least=0, at_most=1),
    },
}
# What KerasHub calls the parameters of `FilterSampler`. Greedy is a temperature of 0.
PARAMETERS = {
    keras_hub.samplers.GreedySampler: {},
    keras_hub.samplers.RandomSampler: {"temperature": "temperature"},
    keras_hub.samplers.TopKSampler: {"temperature": "temperature", "top_k": "k"},
    keras_hub.samplers.TopPSampler: {"temperature": "temperature", "top_p": "p"},
}


def run_seed(sampler: keras_hub.samplers.Sampler) -> str:
    """The seed of a run without one: the state of the sampler's generators, which it advances."""
    with _drawing_seeds:
        drawn = [np.array(ops.convert_to_numpy(variable)) for variable in sampler.variables]
        for variable, (seed, count) in zip(sampler.variables, drawn, strict=True):
            variable.assign(np.array([seed, count + 1], variable.dtype))
    return " ".join(str(number) for state in drawn for number in state)
