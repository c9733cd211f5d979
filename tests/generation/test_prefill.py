import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from keras_mamba2.host.blocks import BLOCK_SIZES
from keras_mamba2.host.blocks import block_sizes
from keras_mamba2.host.blocks import blocks


@given(st.integers(0, 5000))
def test_blocks_cover_the_prompt_and_waste_less_than_half_of_the_last(length):
    sizes = block_sizes(length)
    assert set(sizes) <= set(BLOCK_SIZES)
    waste = sum(sizes) - length
    assert waste >= 0
    assert not sizes or waste < max(sizes[-1] / 2, BLOCK_SIZES[-1])


@given(st.lists(st.integers(0, 700), min_size=1, max_size=4))
def test_masked_blocks_hold_every_token_of_every_prompt_in_order(lengths):
    prompts = [np.arange(1, length + 1) for length in lengths]
    seen = [[] for _ in prompts]
    for token_ids, padding_mask in blocks(prompts):
        for row, ids, mask in zip(seen, token_ids, padding_mask, strict=True):
            row.extend(ids[mask])
    for row, prompt in zip(seen, prompts, strict=True):
        np.testing.assert_array_equal(row, prompt)
