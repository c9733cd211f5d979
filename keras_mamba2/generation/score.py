"""How likely a text is."""

import keras
from keras import ops


def block_loss(model, state, token_ids, targets, padding_mask):
    """The state after one block, and the sum of the losses of its targets, in float32."""
    logits, _, state = model.call_with_cache(token_ids, state, padding_mask=padding_mask)
    logits = ops.cast(logits, "float32")
    losses = keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True)
    return state, ops.sum(ops.where(padding_mask, losses, 0.0))
