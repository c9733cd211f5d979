import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from keras_mamba2.generation.prefill import default_block_sizes
from keras_mamba2.host.blocks import BLOCK_SIZES
from keras_mamba2.host.blocks import WEIGHTS_AS_TOKENS
from keras_mamba2.host.blocks import block_sizes
from keras_mamba2.host.blocks import blocks
from keras_mamba2.ops.platform import compiling_for
from tests.laws import examples


def cost(sizes):
    return sum(sizes) + WEIGHTS_AS_TOKENS * len(sizes)


@examples(100)
@given(st.integers(0, 5000))
def test_blocks_cover_the_prompt_and_only_the_last_is_padded(length):
    sizes = block_sizes(length)
    assert set(sizes) <= set(BLOCK_SIZES)
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) >= length
    assert not sizes or sum(sizes[:-1]) < length


@examples(100)
@given(st.integers(1, 5000), st.tuples(*[st.integers(0, 4)] * (len(BLOCK_SIZES) - 1)))
def test_no_other_blocks_cost_less(length, counts):
    others = np.repeat(BLOCK_SIZES[1:], counts).tolist()
    left = max(length - sum(others), 0)
    others += [BLOCK_SIZES[0]] * -(-left // BLOCK_SIZES[0])
    assert cost(block_sizes(length)) <= cost(others)


@examples(100)
@given(st.lists(st.integers(0, 700), min_size=1, max_size=4))
def test_masked_blocks_hold_every_token_of_every_prompt_in_order(lengths):
    prompts = [np.arange(1, length + 1) for length in lengths]
    seen = [[] for _ in prompts]
    for token_ids, padding_mask in blocks(prompts):
        for row, ids, mask in zip(seen, token_ids, padding_mask, strict=True):
            row.extend(ids[mask])
    for row, prompt in zip(seen, prompts, strict=True):
        np.testing.assert_array_equal(row, prompt)


def test_blocks_are_longer_on_a_gpu_for_few_rows():
    assert default_block_sizes(1) == BLOCK_SIZES
    for name in ("gpu", "cuda", "rocm"):
        with compiling_for(name):
            assert default_block_sizes(8) == (2048, *BLOCK_SIZES)
            assert default_block_sizes(9) == BLOCK_SIZES
    with compiling_for("tpu"):
        assert default_block_sizes(1) == BLOCK_SIZES
