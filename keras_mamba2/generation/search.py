"""Samplers with a loop of their own, such as beam and contrastive search."""

import types

from keras import ops
from keras import tree

from keras_mamba2.generation.decode import model_variables


def search(model, sampler, token_ids, padding_mask, stop_token_ids):
    """Calls `sampler` as KerasHub's models do, on right-padded prompts `(b max_length)`.

    The sampler's loop starts at the end of the shortest prompt by feeding the token before it,
    and then feeds every token of the longer ones. So the state it starts from is that after
    `shortest - 1` tokens of every row.

    Returns:
        int tensor `(b max_length)`.
    """
    padding_mask = ops.cast(padding_mask, "bool")
    shortest = ops.min(ops.sum(ops.cast(padding_mask, "int32"), axis=1))
    before = ops.arange(ops.shape(token_ids)[1], dtype="int32") < shortest - 1
    before = ops.broadcast_to(before, ops.shape(padding_mask))
    _, state = model.backbone.call_with_state(token_ids, padding_mask=before)
    hidden_states, _ = model.backbone.call_with_state(token_ids, padding_mask=padding_mask)

    def next(prompt, cache, index):
        token = ops.take(prompt, index - 1, axis=1)[:, None]
        cache = tree.pack_sequence_as(state, cache)
        logits, hidden_states, cache = model.call_with_cache(token, cache, index - 1)
        return logits[:, 0], hidden_states[:, 0], tree.flatten(cache)

    return sampler(
        next=next,
        prompt=token_ids,
        cache=tree.flatten(state),  # TensorFlow's loops take only their own pytrees
        index=shortest,
        mask=padding_mask,
        stop_token_ids=stop_token_ids,
        hidden_states=hidden_states,
        model=types.SimpleNamespace(
            trainable_variables=model_variables(model), non_trainable_variables=[]
        ),
    )
