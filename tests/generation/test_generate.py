"""Laws of generation, on a model with random weights. Token ids in, token ids out."""

import contextlib
import functools
import re
import subprocess
import sys
from unittest import mock

import jax
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_mamba2
from keras_mamba2._compat.keras_variables import has_value
from keras_mamba2.generation import Generator
from keras_mamba2.host.blocks import BLOCK_SIZES

MAX_LENGTH = 24
SAMPLERS = ["greedy", "top_k", "top_p", "random", "beam", "contrastive"]


@pytest.fixture(scope="module")
def lm(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, preprocessor=None)
    lm.compile(sampler="greedy")
    return lm


@pytest.fixture(scope="module")
def forward(lm):
    """Logits of one sequence, by the whole forward pass, padded to one shape."""

    @jax.jit
    def call(weights, inputs):
        return lm.stateless_call(*weights, inputs)[0]

    weights = [
        [v.value for v in variables]
        for variables in (lm.trainable_variables, lm.non_trainable_variables)
    ]

    def logits(sequence):
        token_ids = np.zeros((1, 2 * MAX_LENGTH), "int32")
        token_ids[0, : len(sequence)] = sequence
        padding_mask = np.arange(2 * MAX_LENGTH)[None] < len(sequence)
        inputs = {"token_ids": token_ids, "padding_mask": padding_mask.astype("int32")}
        return np.array(call(weights, inputs))[0, : len(sequence)]

    return logits


def continue_greedily(forward, prompt, count, stop=()):
    sequence = list(prompt)
    for _ in range(count):
        sequence.append(int(forward(sequence)[-1].argmax()))
        if sequence[-1] in stop:
            break
    return sequence


def batch(prompts, length=MAX_LENGTH, side="right"):
    token_ids = np.full((len(prompts), length), 7, "int32")  # padding of a real id
    padding_mask = np.zeros((len(prompts), length), "int32")
    for ids, mask, prompt in zip(token_ids, padding_mask, prompts, strict=True):
        where = slice(0, len(prompt)) if side == "right" else slice(length - len(prompt), length)
        ids[where], mask[where] = prompt, 1
    return {"token_ids": token_ids, "padding_mask": padding_mask}


def rows(outputs):
    token_ids, mask = (ops.convert_to_numpy(outputs[k]) for k in ("token_ids", "padding_mask"))
    return [ids[real.astype(bool)].tolist() for ids, real in zip(token_ids, mask, strict=True)]


def prompts_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, length).tolist() for length in lengths]


@pytest.mark.parametrize(
    "lengths",
    [(9, 9, 9), (1, 13, 2), (3, MAX_LENGTH, 20)],
    ids=["equal", "ragged, shorter than the convolution", "a full row"],
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_greedy_is_the_argmax_of_repeated_forward_passes(lm, forward, lengths, side):
    prompts = prompts_of(*lengths)
    found = rows(lm.generate(batch(prompts, side=side), stop_token_ids=None))
    for prompt, row in zip(prompts, found, strict=True):
        assert row == continue_greedily(forward, prompt, MAX_LENGTH - len(prompt))


def test_rows_stop_each_at_its_own_stop_token(lm, forward):
    prompts = prompts_of(4, 9, 6)
    free = rows(lm.generate(batch(prompts), stop_token_ids=None))
    stop = (free[0][6], free[1][12])
    found = rows(lm.generate(batch(prompts), stop_token_ids=stop))
    for prompt, row in zip(prompts, found, strict=True):
        assert row == continue_greedily(forward, prompt, MAX_LENGTH - len(prompt), stop)


def test_max_new_tokens_counts_for_each_row(lm, forward):
    prompts = prompts_of(4, 9, 22)
    found = rows(lm.generate(batch(prompts), stop_token_ids=None, max_new_tokens=5))
    for prompt, row in zip(prompts, found, strict=True):
        assert row == continue_greedily(forward, prompt, 5)


def test_ids_and_mask_have_one_shape(lm):
    inputs = {"token_ids": np.ones((2, 3), "int32"), "padding_mask": np.ones((3, 3), "int32")}
    with pytest.raises(ValueError, match=r"must have one shape.*\(2, 3\).*\(3, 3\)"):
        lm.generate(inputs, stop_token_ids=None)


def test_strip_prompt_returns_what_is_new(lm):
    prompts = prompts_of(4, 9)
    whole = rows(lm.generate(batch(prompts), stop_token_ids=None))
    new = rows(lm.generate(batch(prompts), stop_token_ids=None, strip_prompt=True))
    assert [p + n for p, n in zip(prompts, new, strict=True)] == whole


def test_the_loop_leaves_each_row_the_state_of_its_own_text(lm):
    """Every token but the last touched the state once, also in rows that stopped early."""
    generator = Generator(lm)
    seen = {}

    def keep(rows, *args, **kwargs):
        seen["rows"], *found = decode(rows, *args, **kwargs)
        return seen["rows"], *found

    decode = generator._decode
    generator._decode = keep
    prompts = [np.array(prompt) for prompt in prompts_of(3, 10, 1)]
    limits = np.array([2, 7, 5])
    new = generator.generate(prompts, limits, ())
    texts = [np.concatenate(pair) for pair in zip(prompts, new, strict=True)]
    expected = generator.prefill(texts)
    for found, truth in zip(
        jax.tree.leaves(seen["rows"].state), jax.tree.leaves(expected), strict=True
    ):
        scale = np.abs(truth).max()
        np.testing.assert_allclose(found, truth, atol=2e-6 * scale, rtol=0)
    np.testing.assert_array_equal(seen["rows"].state.token, [text[-1] for text in texts])
    np.testing.assert_array_equal(seen["rows"].state.length, [len(text) - 1 for text in texts])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_continues_every_prompt(preset_folder, sampler):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, preprocessor=None)
    lm.compile(sampler=sampler)
    prompts = prompts_of(3, 8)
    found = rows(lm.generate(batch(prompts, 12), stop_token_ids=None))
    for prompt, row in zip(prompts, found, strict=True):
        assert row[: len(prompt)] == prompt
        assert len(row) == 12
        assert all(0 <= id < 257 for id in row)


def test_one_beam_is_greedy(lm, preset_folder):
    prompts = prompts_of(3, 8)
    expected = rows(lm.generate(batch(prompts, 12), stop_token_ids=None))
    beam = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, preprocessor=None)
    beam.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=1))
    assert rows(beam.generate(batch(prompts, 12), stop_token_ids=None)) == expected


def test_a_seed_makes_text_reproducible(preset_folder):
    def text(seed):
        lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, preprocessor=None)
        lm.compile(sampler=keras_hub.samplers.RandomSampler(seed=seed))
        first, second = (
            rows(lm.generate(batch(prompts_of(3)), stop_token_ids=None)) for _ in range(2)
        )
        assert first != second, "the seed must advance from call to call"
        return first

    assert text(1) == text(1)
    assert text(1) != text(2)


@pytest.mark.parametrize(
    "sampler_of",
    [
        keras_hub.samplers.RandomSampler,
        functools.partial(keras_hub.samplers.TopKSampler, 9),
        functools.partial(keras_hub.samplers.TopPSampler, 0.9),
    ],
    ids=["random", "top_k", "top_p"],
)
def test_a_seed_is_the_samplers_also_where_a_call_changes_it(preset_folder, sampler_of):
    def text(seed):
        lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, preprocessor=None)
        lm.compile(sampler=sampler_of(seed=seed))
        return rows(lm.generate(batch(prompts_of(3)), stop_token_ids=None, temperature=0.9))

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_top_p_of_the_whole_is_no_filter(lm):
    """KerasHub keeps tokens that sum to `p` of all, also after `k`; a filter, of what `k` left."""
    sampler = keras_hub.samplers.TopPSampler(p=0.5, k=2)
    probabilities = ops.convert_to_tensor([[0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1]])
    assert {int(sampler.get_next_token(probabilities)[0]) for _ in range(50)} == {0, 1}
    other = keras_mamba2.Mamba2CausalLM(lm.backbone)
    other.compile(sampler=sampler)
    with pytest.raises(ValueError, match="TopPSampler with `k` does not take repetition_penalty"):
        other.generate(batch(prompts_of(3)), stop_token_ids=None, repetition_penalty=1.0)


def test_eager_is_compiled(lm, preset_folder):
    eager = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, preprocessor=None)
    eager.compile(sampler="greedy", run_eagerly=True)
    inputs = batch(prompts_of(2, 9), 12)
    assert rows(eager.generate(inputs, stop_token_ids=None)) == rows(
        lm.generate(inputs, stop_token_ids=None)
    )


def test_low_precision_keeps_the_state_in_float32(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, preprocessor=None, dtype="bfloat16")
    lm.compile(sampler="greedy")
    [row] = rows(lm.generate(batch(prompts_of(9)), stop_token_ids=None))
    assert len(row) == MAX_LENGTH
    state = Generator(lm).prefill([np.arange(9)])
    assert {str(layer.ssm.dtype) for layer in state.layers} == {"float32"}
    assert {str(layer.conv.dtype) for layer in state.layers} == {"bfloat16"}


def test_prompts_and_lengths_share_programs(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, preprocessor=None)
    lm.compile(sampler="greedy")
    rng = np.random.default_rng(0)
    for length in [1, 2, 5, *rng.integers(1, 1500, 8)]:
        prompt = rng.integers(0, 256, length)[None]
        inputs = {"token_ids": prompt, "padding_mask": np.ones_like(prompt)}
        new = int(rng.integers(1, 300))
        found = lm.generate(inputs, stop_token_ids=(3, 5)[: new % 3], max_new_tokens=new)
        assert ops.shape(found["token_ids"]) == (1, length + new)
    generator = lm.generate_function
    assert generator._prefill_block.program._cache_size() <= len(BLOCK_SIZES)
    assert generator._decode.program._cache_size() == 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_any_prompts_and_any_numbers_of_tokens_are_eight_compilations(preset_folder, batch_size):
    """All that XLA compiles is counted, whoever asks for it."""
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, preprocessor=None)
    lm.compile(sampler="greedy")
    rng = np.random.default_rng(0)
    lengths = [1, 2, 5000, *rng.integers(1, 5000, 37)]
    with counting_compilations() as compilations:
        for i, length in enumerate(lengths):
            prompts = prompts_of(length, *rng.integers(1, length + 1, batch_size - 1), seed=i)
            inputs = batch(prompts, max(map(len, prompts)))
            state = None if i % 2 else lm.prefill(inputs) if batch_size == 1 else None
            lm.generate(inputs, stop_token_ids=None, max_new_tokens=1 + i % 20, state=state)
    assert len(compilations) <= 8, compilations


@contextlib.contextmanager
def counting_compilations():
    compilations = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(kwargs.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_decoding_is_one_loop_without_the_host(lm):
    """One `while` and no callback in the compiled program, and weights are not copied into it."""
    generator = Generator(lm)
    program = generator._decode.program
    with mock.patch.object(generator, "_decode", side_effect=InterruptedError) as decode:
        with pytest.raises(InterruptedError):
            generator.generate([np.arange(3), np.arange(5)], np.array([3, 3]), ())
    rows, *rest = decode.call_args.args
    variables = [*lm.trainable_variables, *lm.non_trainable_variables, *lm.sampler.variables]
    lowered = program.lower([v.value for v in variables], rows, tuple(rest))
    text = lowered.compile().as_text()
    loops = [line for line in text.splitlines() if re.search(r" while\(", line)]
    # Inner loops carry no vocabulary or state: the sort of a sampler, say. Greedy has none.
    assert len(loops) == 1, loops
    for word in ("callback", "infeed", "outfeed", "send(", "recv("):
        assert word not in text
    embedding = lm.backbone.token_embedding.embeddings.value
    assert f"f32[{embedding.shape[0]},{embedding.shape[1]}]{{1,0}} constant" not in text


def test_a_new_weight_is_seen_without_recompiling(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, preprocessor=None)
    lm.compile(sampler="greedy")
    inputs = batch(prompts_of(5))
    before = rows(lm.generate(inputs, stop_token_ids=None))
    embeddings = lm.backbone.token_embedding.embeddings
    embeddings.assign(embeddings.value[::-1])
    assert rows(lm.generate(inputs, stop_token_ids=None)) != before
    assert lm.generate_function._decode.program._cache_size() == 1


def test_generate_function_lives_until_compile(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.compile(sampler="greedy")
    lm.generate("a", max_new_tokens=2)
    first = lm.generate_function
    lm.generate("b", max_new_tokens=2)
    assert lm.generate_function is first
    lm.compile(sampler="greedy")
    assert lm.generate_function is None


def test_call_with_cache_decides_the_logits(preset_folder):
    """KerasHub's own test of early stopping: overriding `call_with_cache` changes generation."""
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.compile(sampler="greedy")
    call_with_cache = lm.call_with_cache
    end = lm.preprocessor.tokenizer.end_token_id

    def always_end(*args, **kwargs):
        logits, hidden_states, cache = call_with_cache(*args, **kwargs)
        update = ops.ones_like(logits)[:, :, end] * 1e9
        return ops.slice_update(logits, (0, 0, end), update[..., None]), hidden_states, cache

    with mock.patch.object(lm, "call_with_cache", wraps=always_end):
        prompts = ["airplane at airport", "airplane"]
        assert lm.generate(prompts) == prompts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens.*0"),
        ({"max_new_tokens": 3, "max_length": 9}, "max_length=9, max_new_tokens=3"),
        ({"stop_token_ids": "newline"}, "newline"),
    ],
)
def test_bad_arguments_are_named(lm, arguments, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(batch(prompts_of(3)), **{"stop_token_ids": None, **arguments})


def test_bad_prompts_are_named(lm):
    with pytest.raises(ValueError, match="preprocessor"):
        lm.generate(batch(prompts_of(3)))
    with pytest.raises(ValueError, match="Prompt 1 has no tokens"):
        lm.generate(batch([[1, 2], []]), stop_token_ids=None)
    with pytest.raises(ValueError, match="Prompt 1 has token id 257.*257"):
        lm.generate(batch([[1, 2], [3, 257]]), stop_token_ids=None)
    with pytest.raises(ValueError, match="batch of prompts is empty"):
        lm.generate(batch([]), stop_token_ids=None)


@pytest.mark.slow
def test_a_seed_gives_the_same_text_in_another_process(preset_folder):
    code = (
        "import sys, keras_mamba2\n"
        "lm = keras_mamba2.Mamba2CausalLM.from_preset(sys.argv[1])\n"
        "lm.compile(sampler='top_k')\n"
        "print(ascii(lm.generate(['hello', 'you'], max_new_tokens=20, seed=5)))"
    )
    command = [sys.executable, "-c", code, str(preset_folder)]
    elsewhere = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.compile(sampler="top_k")
    lm.generate("something else", max_new_tokens=3)
    here = lm.generate(["hello", "you"], max_new_tokens=20, seed=5)
    assert ascii(here) == elsewhere.strip()


@pytest.mark.slow
def test_compiled_programs_are_kept_for_the_next_process(preset_folder, tmp_path):
    from jax.experimental.compilation_cache import compilation_cache

    folder, before = tmp_path / "programs", jax.config.jax_compilation_cache_dir
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    try:
        compilation_cache.reset_cache()
        lm.compile(sampler="greedy", compilation_cache=folder)
        lm.generate("hello", max_new_tokens=2)
        kept = sorted(file.name for file in folder.iterdir())
        assert any("keras_mamba2_prefill" in name for name in kept)
        again = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
        again.compile(sampler="greedy", compilation_cache=folder)
        again.generate("hello", max_new_tokens=2)
        entries = {name for name in kept if not name.endswith("-atime")}
        assert {f.name for f in folder.iterdir() if not f.name.endswith("-atime")} == entries
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
        compilation_cache.reset_cache()


@pytest.fixture
def compilations():
    with counting_compilations() as names:
        yield names


def ours(names):
    return [name for name in names if name.startswith("jit(keras_mamba2_")]


@pytest.mark.parametrize(
    "speculation", [None, keras_mamba2.PromptLookup(3), keras_mamba2.PromptLookup()]
)
def test_after_a_warm_up_nothing_is_compiled(preset_folder, speculation, compilations):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, preprocessor=None)
    lm.compile(sampler="greedy", speculation=speculation)
    lm.warm_up(batch_size=2, prompt_lengths=[70, 9])
    assert len(ours(compilations)) >= 4
    compilations.clear()
    generator = lm.make_generate_function()
    for lengths in ((70, 70), (9, 9), (5, 66)):
        generator.generate([np.array(p) for p in prompts_of(*lengths)], np.array([9, 9]), ())
    assert ours(compilations) == []


def test_programs_are_compiled_while_weights_are_read(preset_folder, compilations):
    texts = []
    for wait in (False, True):

        def prepare(lm, wait=wait):
            assert not any(has_value(variable) for variable in lm.backbone.weights)
            lm.compile(sampler="greedy")
            [tokens] = lm.preprocessor.prompts(["hello"], continued=False)
            lm.warm_up(prompt_lengths=len(tokens), wait=wait)

        compilations.clear()
        lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, on_built=prepare)
        texts.append(lm.generate("hello", max_new_tokens=5))
        names = ("zeros", "decode_rows", "prefill")  # each once
        assert sorted(ours(compilations)) == sorted(f"jit(keras_mamba2_{name})" for name in names)
    assert texts[0] == texts[1]


def test_what_goes_wrong_meanwhile_is_raised(lm, monkeypatch):
    def fail():
        raise MemoryError("none left")

    generator = lm.make_generate_function()
    monkeypatch.setattr(generator, "programs_for", lambda *_: [fail])
    lm.warm_up(wait=False)
    with pytest.raises(MemoryError, match="none left"):
        lm.prefill({"token_ids": [[1, 2]], "padding_mask": [[1, 1]]})
    lm.prefill({"token_ids": [[1, 2]], "padding_mask": [[1, 1]]})


@pytest.mark.parametrize("sampler", ["beam", "contrastive"])
def test_a_search_cannot_be_warmed_up(preset_folder, sampler):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.compile(sampler=sampler)
    with pytest.raises(ValueError, match="compiled for each length"):
        lm.warm_up()


@pytest.mark.parametrize("arguments", [(0, 9), (1, 0), (1, [9, -1]), (1, "a"), (1.5, 9)])
def test_a_warm_up_of_nothing_is_refused(lm, arguments):
    with pytest.raises(ValueError, match="`(batch_size|prompt_lengths)` must be"):
        lm.warm_up(*arguments)


def test_proposed_tokens_need_weights_to_warm_up(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.compile(speculation=keras_mamba2.PromptLookup())
    with pytest.raises(ValueError, match="wait=False"):
        lm.warm_up(wait=False)
