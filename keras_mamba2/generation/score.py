"""How likely a text is."""

from keras import ops

from keras_mamba2.generation.decode import Likely
from keras_mamba2.generation.decode import logprob


def block_loss(model, state, token_ids, targets, padding_mask):
    """The state after one block, and the sum of the losses of its targets, in float32."""
    logits, _, state = model.call_with_cache(token_ids, state, padding_mask=padding_mask)
    return state, -ops.sum(ops.where(padding_mask, logprob(logits, targets), 0.0))


def block_logprobs(model, state, token_ids, targets, padding_mask, num_likely: int):
    """The state after one block; the log probabilities of its targets, and a `Likely` beside them.

    Both are of one array: a target that is the likeliest has the number that the likeliest has.
    """
    logits, _, state = model.call_with_cache(token_ids, state, padding_mask=padding_mask)
    logprobs = ops.log_softmax(ops.cast(logits, "float32"), axis=-1)
    found = ops.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    top, top_ids = ops.top_k(logprobs, num_likely)
    return state, found, Likely(ops.cast(top_ids, "int32"), top)
