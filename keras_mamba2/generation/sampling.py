"""What the sampling parameters of each row leave of its probabilities."""

from keras import ops

from keras_mamba2.host.sampling import Sampling


def penalized(logits, sampling: Sampling, seen):
    """Logits `(b v)` after the repetition penalty on the ids `seen` `(b v)`."""
    penalty = ops.convert_to_tensor(sampling.repetition_penalty)[:, None]
    return ops.where(seen, ops.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits, sampling: Sampling):
    """The probabilities `(b v)` that temperature, `top_k`, `top_p` and `min_p` leave of `logits`.

    Each filter sees the probabilities that the one before has left, scaled to sum to 1. A row of
    temperature 0 has those of temperature 1.
    """
    temperature, top_k, top_p, min_p, _ = (ops.convert_to_tensor(a)[:, None] for a in sampling)
    temperature = ops.where(temperature > 0, temperature, 1.0)
    # Relative to the highest, so that a tiny temperature makes no infinity.
    logits = logits - ops.max(logits, axis=-1, keepdims=True)
    probabilities = ops.softmax(logits / temperature)
    # A sort costs more than the rest of sampling, so it is done only if a row needs it.
    sorts = ops.any(ops.logical_or(top_k < logits.shape[-1], top_p < 1))
    least = ops.cond(
        sorts,
        lambda: least_kept(probabilities, top_k, top_p),
        lambda: ops.zeros_like(probabilities[:, :1]),
    )
    least = ops.maximum(least, min_p * ops.max(probabilities, axis=-1, keepdims=True))
    kept = ops.where(probabilities >= least, probabilities, 0.0)
    return kept / ops.sum(kept, axis=-1, keepdims=True)


def least_kept(probabilities, top_k, top_p):
    """The least probability `(b 1)` that is left by `top_k`, and then by `top_p` of the rest."""
    falling = -ops.sort(-probabilities, axis=-1)
    last = ops.minimum(top_k, falling.shape[-1]) - 1
    kept = falling >= ops.take_along_axis(falling, last, axis=-1)
    falling = ops.where(kept, falling, 0.0)
    before = ops.cumsum(falling, axis=-1) - falling
    in_nucleus = before < top_p * ops.sum(falling, axis=-1, keepdims=True)
    # For `top_p=1` all of them, whatever rounding does to the last sum.
    in_nucleus = ops.logical_or(in_nucleus, top_p >= 1)
    return ops.min(ops.where(ops.logical_and(kept, in_nucleus), falling, 1.0), -1, keepdims=True)
