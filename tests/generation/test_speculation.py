"""Tokens that are proposed change how fast a text comes, and nothing else."""

import re

import hypothesis
import jax
import keras
import keras_hub
import numpy as np
import pytest
from hypothesis import strategies as st
from keras import ops

import keras_mamba2
from keras_mamba2.generation import Generator
from keras_mamba2.generation import proposers as generation_proposers
from keras_mamba2.generation import speculative_decoding
from keras_mamba2.generation.speculative_decoding import Pace
from keras_mamba2.host import room as host_room
from keras_mamba2.host.rows import Rows
from keras_mamba2.host.state_file import filled
from keras_mamba2.layers import sublayer
from keras_mamba2.state import room
from tests import reference

NEW = 40


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


FILTERS = {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.01}
SAMPLERS = {
    "greedy": "greedy",
    "filters": keras_mamba2.FilterSampler(**FILTERS),
    "penalty": keras_mamba2.FilterSampler(temperature=0.5, repetition_penalty=1.3),
    "random": keras_hub.samplers.RandomSampler(temperature=0.5),
    "top_k": keras_hub.samplers.TopKSampler(k=3),
    "top_p": keras_hub.samplers.TopPSampler(p=0.6),
}


def model_of(kind, tokenizer, hidden_dim=32, vocabulary_size=257, seed=0):
    keras.utils.set_random_seed(seed)
    mixer = {"state_dim": 8, "head_dim": 8, "chunk_size": 16}
    if kind == "mamba2":
        backbone = keras_mamba2.Mamba2Backbone(
            vocabulary_size, 2, hidden_dim=hidden_dim, num_groups=2, **mixer
        )
    else:
        attention = {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        backbone = keras_mamba2.Mamba2HybridBackbone(
            vocabulary_size=vocabulary_size,
            hidden_dim=hidden_dim,
            blocks=["mamba2", "attention", "mlp"],
            sublayers={
                "mamba2": mixer,
                "attention": {**attention, "rotary_dim": 4, "conv_kernel_size": 3},
                "mlp": {"intermediate_dim": 48},
            },
        )
    reference.randomize(backbone)
    if tokenizer is None:
        return keras_mamba2.Mamba2CausalLM(backbone)
    preprocessor = keras_mamba2.Mamba2CausalLMPreprocessor(tokenizer, sequence_length=64)
    return keras_mamba2.Mamba2CausalLM(backbone, preprocessor)


@pytest.fixture(scope="module", autouse=True)
def _little_room():
    """So that states and texts grow in small tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_room, "LEAST_ROOM", 32)
        patch.setattr(sublayer, "LEAST_ROOM", 32)
        patch.setattr(generation_proposers, "LEAST_TEXT", 32)
        yield


@pytest.fixture(scope="module")
def models(byte_tokenizer):
    return {kind: model_of(kind, byte_tokenizer) for kind in ("mamba2", "hybrid")}


@pytest.fixture(scope="module")
def proposers(byte_tokenizer):
    """One that is now and then right, one always, and two that know fewer or more ids."""
    draft = keras_mamba2.DraftModel
    return {
        "lookup": lambda kind: keras_mamba2.PromptLookup(3),
        "itself": lambda kind: draft(model_of(kind, byte_tokenizer), 4),
        "fewer ids": lambda kind: draft(model_of("mamba2", None, 16, 200, seed=3), 1),
        "more ids": lambda kind: draft(model_of("hybrid", None, 16, 300, seed=3), 2),
    }


def prompts_of(*lengths, seed=0):
    """Of few tokens, so that they repeat themselves."""
    rng = np.random.default_rng([seed, *lengths])
    return [rng.integers(97, 101, length).astype("int32") for length in lengths]


PROMPTS = prompts_of(1, 13, 40)


def run(lm, prompts=PROMPTS, limits=NEW, run_lengths=(), **arguments):
    """The tokens, their log probabilities and the state after them."""
    generator = lm.make_generate_function()
    rows = generator.start(prompts, np.full(len(prompts), limits), **arguments)
    decoding = generator.decode(rows, run_lengths, with_logprobs=True)
    tokens = [row.tolist() for row in decoding.all_tokens()]
    return tokens, [row["logprobs"] for row in decoding.likely_tokens()], decoding.rows.state


def assert_same(lm, found, expected):
    assert found[0] == expected[0]
    for ours, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
    ours, theirs = found[2], expected[2]
    for name in ("token", "length", "digest"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    for i in range(ours.batch_size):
        n = int(ours.length[i])
        pairs = [
            [filled(leaf, spec, n) for spec, leaf in room._tensors(state[i], lm.backbone)]
            for state in (ours, theirs)
        ]
        for mine, its in zip(*pairs, strict=True):
            scale = max(1.0, float(np.abs(its).max()))
            np.testing.assert_allclose(mine, its, atol=2e-5 * scale, rtol=0)


@pytest.mark.parametrize(
    ("kind", "proposer"),
    [
        ("mamba2", "lookup"),
        slow("hybrid", "itself"),
        slow("mamba2", "itself"),
        slow("mamba2", "more ids"),
        slow("hybrid", "lookup"),
    ],
)
def test_texts_and_states_are_those_without(models, proposers, kind, proposer):
    lm = models[kind]
    state = lm.make_generate_function().prefill(prompts_of(5, 21, seed=1))
    continued = [PROMPTS[0], PROMPTS[0][:0]]

    def runs():
        free = run(lm)
        yield free
        stops = (free[0][0][9], free[0][2][30])
        yield run(lm, stop_token_ids=stops)
        yield run(lm, num_return_sequences=2, limits=7)
        yield run(lm, continued, state=state)
        yield run(lm, continued, state=state, history=prompts_of(5, 21, seed=1), limits=9)
        yield run(lm, run_lengths=(1, 2, 4))

    lm.compile(sampler="greedy")
    expected = list(runs())
    lm.compile(sampler="greedy", speculation=proposers[proposer](kind))
    for ours, theirs in zip(runs(), expected, strict=True):
        assert_same(lm, ours, theirs)
    for prompt, tokens in zip(PROMPTS, expected[0][0], strict=True):
        assert run(lm, [prompt])[0] == [tokens]


@pytest.mark.parametrize("proposer", ["lookup", *map(slow, ("itself", "fewer ids"))])
@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_drawn_is_what_is_drawn_without(models, proposers, name, proposer):
    lm = models["mamba2"]
    lm.compile(sampler=SAMPLERS[name])
    expected = run(lm, seed=5, limits=20)
    lm.compile(sampler=SAMPLERS[name], speculation=proposers[proposer]("mamba2"))
    assert_same(lm, run(lm, seed=5, limits=20), expected)
    if name == "greedy":
        lm.compile(sampler=SAMPLERS[name])
        expected = run(lm, seed=5, limits=20, temperature=0.8, repetition_penalty=1.2)
        lm.compile(sampler=SAMPLERS[name], speculation=proposers[proposer]("mamba2"))
        found = run(lm, seed=5, limits=20, temperature=0.8, repetition_penalty=1.2)
        assert_same(lm, found, expected)


def test_the_draft_is_right_as_often_as_probabilities_allow(models, proposers):
    """A model that proposes to itself is always right, whatever is drawn."""
    lm = models["mamba2"]
    lm.compile(sampler=SAMPLERS["filters"], speculation=proposers["itself"]("mamba2"))
    generator = lm.make_generate_function()
    rows = generator.start(PROMPTS, np.full(3, 25), seed=1)
    outcome = generator.speculate(rows, 99, 4)[-1]
    assert (int(outcome.accepted), int(outcome.rejected)) == (3 * 20, 0)


@pytest.mark.slow
def test_pairs_of_tokens_have_the_probabilities_of_the_sampler(byte_tokenizer):
    """Exactly: with 40,000 draws, a residual that was left out or counted twice would show."""
    lm, other = (model_of("mamba2", None, 8, 5, seed=seed) for seed in (1, 2))
    sampler = keras_mamba2.FilterSampler(temperature=0.8, top_k=4)
    lm.compile(sampler=sampler, speculation=keras_mamba2.DraftModel(other, 2))
    prompt, n = np.array([3, 1, 4], "int32"), 40_000
    generator = lm.make_generate_function()
    rows = generator.start([prompt], np.array([3]), num_return_sequences=n, seed=0)
    tokens = np.array(generator.decode(rows).all_tokens())

    expected = np.zeros((5, 5))
    step = jax.jit(lambda state: lm.call_with_cache(state.token[:, None], state)[::2])
    logits, after = step(generator.prefill([prompt]))
    first = np.asarray(sampler.compute_probabilities(logits[:, 0]))[0]
    for token in range(5):
        logits, _ = step(after.with_token(np.array([token], "int32")))
        expected[token] = first[token] * np.asarray(sampler.compute_probabilities(logits[:, 0]))[0]
    counts = np.zeros((5, 5))
    np.add.at(counts, (tokens[:, 0], tokens[:, 1]), 1)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_square = ((counts - n * expected) ** 2)[kept] / (n * expected[kept])
    assert chi_square.sum() < 50  # of 15 degrees of freedom: once in 10^5 by chance


@hypothesis.settings(deadline=None, derandomize=True, max_examples=60)
@hypothesis.given(
    texts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=1, max_size=3),
    max_ngram=st.integers(1, 4),
)
def test_a_lookup_proposes_what_followed_the_longest_repetition(texts, max_ngram):
    proposer, k = keras_mamba2.PromptLookup(4, max_ngram), 4
    context = proposer.start([np.array(text) for text in texts])
    found, _ = proposer.propose(Rows(*[None] * 6, context), k, None, 3)
    for text, proposals in zip(texts, np.asarray(found), strict=True):
        assert proposals.tolist() == looked_up(text, max_ngram, k)


def looked_up(text, max_ngram, k):
    for n in range(min(max_ngram, len(text) - 1), 0, -1):
        for end in range(len(text) - 1, n - 1, -1):
            if text[end - n : end] == text[len(text) - n :]:
                return [text[end + i % (len(text) - end)] for i in range(k)]
    return [text[-1]] * k


def test_a_context_that_was_read_is_one_that_was_started(proposers):
    for name in ("lookup", "itself"):
        proposer = proposers[name]("mamba2")
        new = prompts_of(0, 3, 9, seed=2)
        read = proposer.with_room(proposer.read(proposer.start(PROMPTS), new), 1)
        texts = [np.concatenate(pair) for pair in zip(PROMPTS, new, strict=True)]
        whole = proposer.with_room(proposer.start(texts), 1)
        for ours, theirs in zip(jax.tree.leaves(read), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


COSTS = {3: 1.41, 7: 1.69}  # of rounds of 130M on a CPU, in steps: benchmarks/README.md
PROBE = speculative_decoding.PROBE


class TestPace:
    def test_a_fixed_number_stays(self):
        pace = Pace({5: 1.5}, 0.0)
        for _ in range(9):
            pace.record(32, 0, 32)
        assert (pace.num_tokens, pace.pause) == (5, 0)

    def test_proposals_that_are_right_become_more(self):
        pace = Pace(COSTS, 0.0)
        first = pace.num_tokens
        pace.record(PROBE, 30, 1)
        assert 0 < first < pace.num_tokens == max(COSTS)

    def test_short_runs_are_judged_together(self):
        """As those at the start of a stream, of 1, 2, 4 tokens."""
        pace = Pace(COSTS, 0.0)
        pace.record(1, 0, 1)
        assert pace.num_tokens == min(COSTS)
        pace.record(2, 6, 0)
        pace.record(4, 12, 0)
        assert pace.num_tokens == max(COSTS)

    def test_proposals_that_are_wrong_stop_for_longer_and_longer(self):
        pace, pauses = Pace(COSTS, 0.0), []
        for _ in range(9):
            assert pace.num_tokens > 0
            pace.record(PROBE, 0, PROBE)
            assert pace.num_tokens == 0
            pauses.append(pace.pause)
            pace.rest(pace.pause)
        assert pauses == sorted(pauses)
        assert pauses[0] < pauses[-1] == pauses[-2] == speculative_decoding.LONGEST_PAUSE

    def test_what_is_wrong_costs_at_most_a_tenth(self):
        """In rounds of the cost that the benchmark measured."""
        pace, steps, tokens = Pace(COSTS, 0.0), 0.0, 0
        while tokens < 3000:
            k = pace.num_tokens
            if k:
                steps += pace.rounds * COSTS[k]
                tokens += pace.rounds
                pace.record(pace.rounds, 0, pace.rounds)
            else:
                steps, tokens = steps + pace.pause, tokens + pace.pause
                pace.rest(pace.pause)
            assert steps < 1.1 * tokens + 3

    def test_a_draft_as_large_as_the_model_does_not_pay(self):
        pace = Pace(COSTS, 1.0)
        pace.record(32, 32, 0)
        assert pace.num_tokens == 0


def test_a_number_that_follows_the_acceptance_changes_no_text(models, proposers, monkeypatch):
    monkeypatch.setattr(speculative_decoding, "SHORTEST_PAUSE", 8)
    monkeypatch.setattr(speculative_decoding, "LONGEST_PAUSE", 16)
    monkeypatch.setattr(speculative_decoding, "ROUNDS", 4)
    lm, chosen = models["mamba2"], []
    lm.compile(sampler="greedy")
    expected = run(lm, limits=120)
    draft = proposers["fewer ids"]("mamba2").model
    lm.compile(sampler="greedy", speculation=keras_mamba2.DraftModel(draft))
    generator = lm.make_generate_function()
    speculate, advance = generator.speculate, generator.advance
    monkeypatch.setattr(generator, "speculate", lambda *a: chosen.append(a[2]) or speculate(*a))
    monkeypatch.setattr(generator, "advance", lambda *a: chosen.append(0) or advance(*a))
    assert_same(lm, run(lm, limits=120), expected)
    assert 0 in chosen
    assert set(chosen) & set(speculative_decoding.CHOICES)


@pytest.mark.parametrize("kind", ["mamba2", "hybrid"])
def test_a_state_that_is_written_every_few_steps_is_the_same(models, kind):
    """Also where a row stops, or all do, in the middle of a cycle."""
    lm = models[kind]
    lm.compile(sampler="greedy")
    expected = [run(lm, limits=11), run(lm, limits=12)]
    stops = (expected[0][0][0][4],)
    expected.append(run(lm, limits=12, stop_token_ids=stops))
    lm.generate_function = Generator(lm, steps_a_write=4)
    found = [run(lm, limits=11), run(lm, limits=12), run(lm, limits=12, stop_token_ids=stops)]
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(lm, ours, theirs)


def test_other_lengths_and_rows_compile_nothing_anew(models, proposers):
    lm = models["mamba2"]
    lm.compile(sampler="greedy", speculation=proposers["itself"]("mamba2"))
    run(lm, prompts_of(9, 20), 10)
    program = lm.generate_function._speculate.program
    assert program._cache_size() == 1
    run(lm, prompts_of(3, 70), 31)
    assert program._cache_size() == 1


def test_rows_that_are_inserted_go_on_without_proposals(models):
    lm = models["hybrid"]
    lm.compile(sampler="greedy", speculation=keras_mamba2.PromptLookup(3))
    expected = run(lm, PROMPTS, 9)[0]
    generator = lm.make_generate_function()
    rows = generator.start(PROMPTS[:2], np.array([9, 0]))
    rows = generator.insert(rows, 1, generator.start(PROMPTS[2:], np.array([9])))
    _, tokens, *_ = generator.advance(rows, 9)
    assert np.asarray(tokens)[:, :9].tolist() == [expected[0], expected[2]]


def test_rows_that_are_not_finite_are_named(models):
    lm = models["mamba2"]
    lm.compile(sampler="greedy", speculation=keras_mamba2.PromptLookup(3))
    kernel = lm.backbone.blocks[0].sublayer.D
    before = ops.convert_to_numpy(kernel)
    kernel.assign(np.full_like(before, np.nan))
    try:
        with pytest.raises(ValueError, match=r"row 0 after \d+ tokens are not finite"):
            run(lm)
    finally:
        kernel.assign(before)


class TestTexts:
    """What users call, with the embedded preset's kind of tokenizer."""

    @pytest.mark.parametrize("proposer", [slow("lookup"), slow("itself")])
    def test_of_all_kinds_are_those_without(self, models, proposers, proposer, tmp_path):
        lm, texts = models["hybrid"], ["to be, or not to be, ", "a"]

        def found():
            plain = lm.generate(texts, max_new_tokens=NEW, strip_prompt=True)
            yield plain
            yield lm.generate(texts, max_new_tokens=NEW, stop_strings=plain[0][11:14])
            yield ["".join(row) for row in zip(*lm.stream(texts, max_new_tokens=NEW), strict=True)]
            session = lm.start("to be, or not ")
            yield session.generate("to be", max_new_tokens=11)
            session.save(tmp_path / "session.safetensors")
            yield lm.resume(tmp_path / "session.safetensors").generate(max_new_tokens=9)
            yield session.generate(max_new_tokens=9), session.text

        lm.compile(sampler="greedy")
        expected = list(found())
        lm.compile(sampler="greedy", speculation=proposers[proposer]("hybrid"))
        assert list(found()) == expected


class TestBadInput:
    @pytest.mark.parametrize("sampler", ["beam", "contrastive"])
    def test_a_sampler_without_probabilities(self, models, sampler):
        with pytest.raises(ValueError, match="without `speculation`"):
            models["mamba2"].compile(sampler=sampler, speculation=keras_mamba2.PromptLookup())

    @pytest.mark.parametrize("value", [0, -1, 2.5, "3", True, 64])
    def test_a_number_of_tokens(self, value):
        with pytest.raises(ValueError, match=re.escape(f"num_tokens={value!r}")):
            keras_mamba2.PromptLookup(num_tokens=value)

    @pytest.mark.parametrize("value", ["lookup", 3, keras_mamba2.PromptLookup])
    def test_no_proposer(self, models, value):
        with pytest.raises(ValueError, match=r"PromptLookup"):
            models["mamba2"].compile(sampler="greedy", speculation=value)

    def test_no_model(self, models):
        for value in ("mamba2_130m_en", models["mamba2"].backbone, None):
            with pytest.raises(ValueError, match=r"must be a `keras_mamba2.Mamba2CausalLM`"):
                keras_mamba2.DraftModel(value)

    def test_another_tokenizer(self, models, byte_tokenizer):
        vocabulary = byte_tokenizer.get_vocabulary()
        a, b = (byte_tokenizer.id_to_token(i) for i in (97, 98))
        vocabulary[a], vocabulary[b] = 98, 97
        other = model_of("mamba2", keras_mamba2.Mamba2Tokenizer(vocabulary, []))
        lm = models["mamba2"]
        with pytest.raises(ValueError, match="token 97 is 'b' in the draft model and 'a' here"):
            lm.compile(sampler="greedy", speculation=keras_mamba2.DraftModel(other))


def test_a_draft_may_have_ids_with_gaps():
    tokenizer = keras_mamba2.Mamba2Tokenizer({"a": 0, "<|endoftext|>": 2}, [])
    lm, draft = (model_of("mamba2", tokenizer, 16, 3) for _ in range(2))
    lm.compile(sampler="greedy", speculation=keras_mamba2.DraftModel(draft))
    other = model_of(
        "mamba2", keras_mamba2.Mamba2Tokenizer({"a": 0, "b": 1, "<|endoftext|>": 2}, []), 16, 3
    )
    with pytest.raises(ValueError, match="token 1 is 'b' in the draft model and None here"):
        lm.compile(sampler="greedy", speculation=keras_mamba2.DraftModel(other))


def test_more_tokens_take_more_of_the_experts():
    """Of 8 experts a token takes 2, each as large as all that is dense."""
    experts = {"num_experts": 8, "num_experts_per_token": 2, "intermediate_dim": 48}
    backbone = keras_mamba2.Mamba2HybridBackbone(
        vocabulary_size=17,
        hidden_dim=16,
        blocks=["moe"],
        sublayers={"moe": {"kind": "mixture_of_experts", **experts}},
    )
    of_experts = 8 * 3 * 16 * 48 * 4
    dense = 4 * backbone.count_params() - of_experts
    for num_tokens, share in ((1, 1 / 4), (2, 7 / 16), (1000, 1)):
        read = generation_proposers.bytes_read(backbone, num_tokens)
        np.testing.assert_allclose(read, dense + share * of_experts)
    one, four = (speculative_decoding.cost_of_a_round(k, backbone, 1) for k in (1, 3))
    draft = keras_mamba2.DraftModel(keras_mamba2.Mamba2CausalLM(backbone))
    assert [draft.cost(draft.model, b) for b in (1, 8)] == [1, 1]
    assert four - one > (37 / 64 - 7 / 16) * of_experts / (dense + of_experts / 4)


@pytest.mark.parametrize("proposer", ["lookup", "fewer ids"])
def test_a_stream_goes_on_as_it_began_while_the_model_is_compiled_anew(models, proposers, proposer):
    lm = models["mamba2"]
    lm.compile(sampler="greedy")
    expected = "".join(lm.stream("to be or", max_new_tokens=60))
    for speculation in (None, proposers[proposer]("mamba2")):
        lm.compile(sampler="greedy", speculation=speculation)
        stream = lm.stream("to be or", max_new_tokens=60)
        text = next(stream)
        lm.compile(sampler="top_k")
        assert text + "".join(stream) == expected


def test_a_pause_compiles_nothing_for_a_longer_text(models, monkeypatch):
    monkeypatch.setattr(speculative_decoding, "SHORTEST_PAUSE", 8)
    monkeypatch.setattr(Pace, "gain", lambda pace, k: 0.0)
    lm = models["mamba2"]
    lm.compile(sampler="greedy", speculation=keras_mamba2.PromptLookup())
    run(lm, limits=120)
    assert lm.generate_function._decode.program._cache_size() == 1


def test_what_is_known_of_a_text_ends_with_its_last_token_once(models, byte_tokenizer):
    lm = models["mamba2"]
    lm.compile(sampler="greedy", speculation=keras_mamba2.PromptLookup(3))
    session, generator = lm.start("to be or not to be"), lm.make_generate_function()
    known = [byte_tokenizer(session.text)]
    nothing = [np.zeros(0, "int32")]
    for history, expected in ((known, known[0]), (None, known[0][-1:])):
        text = generator._context(nothing, session.state, history)
        assert text.token_ids[0, : text.length[0]].tolist() == list(expected)


def test_a_compilation_that_fails_changes_nothing(models):
    lm = models["mamba2"]
    lm.compile(sampler="greedy")
    with pytest.raises(ValueError, match="adamm"):
        lm.compile("adamm", speculation=keras_mamba2.PromptLookup())
    assert lm.speculation is None
    assert lm.has_own_sampler
