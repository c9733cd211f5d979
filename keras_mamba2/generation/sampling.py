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
    least = least_kept(probabilities, top_k, top_p)
    least = ops.maximum(least, min_p * ops.max(probabilities, axis=-1, keepdims=True))
    kept = ops.where(probabilities >= least, probabilities, 0.0)
    return kept / ops.sum(kept, axis=-1, keepdims=True)


def least_kept(probabilities, top_k, top_p):
    """The least probability `(b 1)` that is left by `top_k`, and then by `top_p` of the rest.

    A token is left if those that are likelier are fewer than `top_k`, or sum to less than `top_p`.
    No sort: of 50,288 tokens it takes a CPU 20 times as long. Each of the two takes 30 passes over
    the probabilities, so it is done only if a row needs it.
    """

    def likelier(values, p):
        return ops.sum(ops.where(probabilities > p, values, 0.0), axis=-1, keepdims=True)

    def if_any(needed, least):
        zero = ops.zeros_like(probabilities[:, :1])
        # For a row that needs none all of them, whatever rounding does to the sums.
        return ops.cond(ops.any(needed), lambda: ops.where(needed, least(), zero), lambda: zero)

    def by_p():
        left = ops.where(probabilities >= by_k, probabilities, 0.0)
        most = top_p * ops.sum(left, axis=-1, keepdims=True)
        least = least_float(lambda p: likelier(left, p) < most, top_p)
        # The likeliest is left also by a `top_p` so small that float32 makes 0 of `most`.
        return ops.minimum(least, ops.max(probabilities, axis=-1, keepdims=True))

    by_k = if_any(
        top_k < probabilities.shape[-1],
        lambda: least_float(lambda p: likelier(1.0, p) < ops.cast(top_k, p.dtype), top_k),
    )
    return ops.maximum(by_k, if_any(top_p < 1, by_p))


def least_float(holds, like):
    """The least float32 in [0, 2) from which on `holds` is true, for each element of `like`.

    Bit after bit, since floats from 0 on have the order of their bits.
    """

    def holds_at(bits):
        return holds(ops.view(bits, "float32"))

    def with_bit(i, bits):
        more = ops.bitwise_or(bits, ops.left_shift(ops.ones_like(bits), 29 - i))
        return ops.where(holds_at(more), bits, more)

    zero = ops.zeros_like(like, "int32")
    last_where_not = ops.fori_loop(0, 30, with_bit, zero)
    return ops.view(ops.where(holds_at(zero), zero, last_where_not + 1), "float32")
