"""Continue = whole, fork = independent, stream = generate: in tokens and in text."""

import itertools

import keras_hub
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from keras import ops
from keras import tree

import keras_mamba2
from keras_mamba2.host.text_stream import TextStream
from tests.conversion import family_tokenizers
from tests.laws import examples

TEXT = "First Citizen: Before we proceed any further, hear me speak."


@pytest.fixture(scope="module")
def lm(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.compile(sampler="greedy")
    return lm


class AsciiSampler(keras_hub.samplers.RandomSampler):
    """Draws letters, so that every text is one of whole characters, and never ends by itself."""

    def get_next_token(self, probabilities):
        is_letter = np.isin(np.arange(257), list(range(97, 123)))
        return super().get_next_token(ops.where(is_letter, probabilities, 1e-30))


class OneToken(keras_hub.samplers.RandomSampler):
    """Picks one token always."""

    def __init__(self, token_id):
        super().__init__()
        self.token_id = token_id

    def get_next_token(self, probabilities):
        return ops.full((probabilities.shape[0],), self.token_id, "int32")


@pytest.fixture(scope="module")
def letters(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.compile(sampler=AsciiSampler())
    return lm


@pytest.fixture(scope="module")
def drawing(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.compile(sampler="random")
    return lm


def arrays(state):
    return [np.array(ops.convert_to_numpy(leaf)) for leaf in tree.flatten(state)]


@examples(20)
@given(cuts=st.sets(st.integers(1, len(TEXT) - 1), max_size=3))
def test_pieces_give_what_the_whole_gives(lm, cuts):
    state = None
    cuts = [0, *sorted(cuts), len(TEXT)]
    for start, end in itertools.pairwise(cuts):
        state = lm.prefill(TEXT[start:end], state)
    whole = lm.prefill(TEXT)
    for piece, expected in zip(arrays(state), arrays(whole), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(piece, expected, atol=5e-6 * scale, rtol=0)
    new = lm.generate("", state=state, max_new_tokens=20)
    assert new == lm.generate(TEXT, max_new_tokens=20, strip_prompt=True)


def test_a_state_is_continued_with_text(lm):
    state = lm.prefill(["First ", "Second "])
    before = arrays(state)
    expected = lm.generate(["First Citizen", "Second "], max_new_tokens=9, strip_prompt=True)
    for _ in range(2):
        found = lm.generate(["Citizen", ""], state=state, max_new_tokens=9, strip_prompt=True)
        assert found == expected
    for now, then in zip(arrays(state), before, strict=True):
        np.testing.assert_array_equal(now, then)
    again = lm.generate(["Citizen", ""], state=state, max_length=16)
    assert again == ["Citizen" + expected[0], lm.generate("", state=state[1], max_length=16)]


@pytest.mark.slow
@examples(10)
@given(lengths=st.lists(st.integers(1, 2300), min_size=2, max_size=5))
def test_very_different_lengths_give_what_each_gives_alone(lm, lengths):
    rng = np.random.default_rng(0)
    prompts = ["".join(map(chr, rng.integers(32, 127, length))) for length in lengths]
    together = lm.generate(prompts, max_new_tokens=5)
    assert together == [lm.generate(prompt, max_new_tokens=5) for prompt in prompts]


def test_several_sequences_come_from_one_prompt(lm, drawing):
    texts = drawing.generate("hello", max_new_tokens=20, num_return_sequences=3, seed=0)
    assert len(set(texts)) == 3
    assert all(text.startswith("hello") for text in texts)
    new = drawing.generate(
        "hello", max_new_tokens=20, num_return_sequences=3, seed=0, strip_prompt=True
    )
    assert ["hello" + text for text in new] == texts
    several = lm.generate(["hello", "you"], max_new_tokens=5, num_return_sequences=2)
    one = lm.generate(["hello", "you"], max_new_tokens=5)
    assert several == [one[0], one[0], one[1], one[1]]


def test_a_seed_reproduces_whatever_ran_before(drawing):
    first = drawing.generate("hello", max_new_tokens=20, seed=7)
    assert drawing.generate("hello", max_new_tokens=20) != first
    assert drawing.generate("hello", max_new_tokens=20, seed=7) == first
    assert drawing.generate("hello", max_new_tokens=20, seed=8) != first


@pytest.mark.parametrize("seed", range(3))
def test_the_pieces_of_a_stream_are_the_generated_text(drawing, seed):
    """Random bytes: half of the characters are broken."""
    pieces = list(drawing.stream("hello", max_new_tokens=100, seed=seed))
    assert len(pieces) > 1
    text = drawing.generate("hello", max_new_tokens=100, seed=seed, strip_prompt=True)
    assert "".join(pieces) == text
    prompts = ["hello", "a longer one"]
    rows = zip(*drawing.stream(prompts, max_new_tokens=30, seed=seed), strict=True)
    expected = drawing.generate(prompts, max_new_tokens=30, seed=seed, strip_prompt=True)
    assert ["".join(row) for row in rows] == expected


def test_text_ends_before_the_first_stop_string(letters):
    def generate(**kwargs):
        return letters.generate(
            ["hello", "you"], max_new_tokens=60, seed=5, strip_prompt=True, **kwargs
        )

    free = generate()
    stops = [free[0][20:23], free[0][30:32], free[1][40]]
    expected = [min((text.split(stop)[0] for stop in stops), key=len) for text in free]
    assert generate(stop_strings=stops) == expected
    options = {"max_new_tokens": 60, "seed": 5, "stop_strings": stops}
    pieces = list(letters.stream(["hello", "you"], **options))
    assert len(pieces) > 3
    assert ["".join(row) for row in zip(*pieces, strict=True)] == expected
    whole = letters.generate(["hello", "you"], **options)
    assert whole == ["hello" + expected[0], "you" + expected[1]]


def test_a_stream_may_be_left(lm):
    stream = lm.stream("hello", max_new_tokens=100)
    next(stream)
    stream.close()
    assert lm.generate("hello", max_new_tokens=5).startswith("hello")


@pytest.mark.parametrize("texts", [["hello"], ["hello", "you"]])
def test_a_state_in_the_middle_of_a_stream_stays_as_it_is(letters, texts):
    stream = letters.stream(texts, max_new_tokens=40, seed=1, stop_token_ids=None)
    next(stream)
    state = stream.state
    before = int(ops.convert_to_numpy(state.length)[0])
    for _ in stream:
        pass
    assert before < int(ops.convert_to_numpy(stream.state.length)[0])
    assert int(ops.convert_to_numpy(state.length)[0]) == before
    assert all(np.isfinite(ops.convert_to_numpy(leaf)).all() for leaf in state.layers[0])
    letters.generate([""] * len(texts), state=state, max_new_tokens=2)


def test_an_interrupted_call_leaves_the_model_usable(lm, monkeypatch):
    expected = lm.generate("hello", max_new_tokens=5)
    generator, calls = lm.make_generate_function(), []
    advance = generator.advance

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return advance(*args)

    monkeypatch.setattr(generator, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(lm.stream("hello", max_new_tokens=50))
    assert lm.generate("hello", max_new_tokens=5) == expected


class TestSession:
    def test_it_grows(self, letters):
        session = letters.start("First ")
        new = session.generate("Citizen", max_new_tokens=8, seed=0)
        assert session.text == "First Citizen" + new
        assert new == letters.generate("First Citizen", max_new_tokens=8, strip_prompt=True, seed=0)
        more = session.generate(max_new_tokens=8, seed=0)
        assert new + more == letters.generate(
            "First Citizen", max_new_tokens=16, strip_prompt=True, seed=0
        )
        session.append(" And")
        assert session.text.endswith(" And")

    def test_forks_are_independent(self, drawing):
        left, right = drawing.start("Once upon").fork(2)
        new = left.generate(max_new_tokens=20, seed=1)
        assert right.text == "Once upon"
        assert right.generate(max_new_tokens=20, seed=2) != new
        alone = drawing.start("Once upon")
        assert alone.generate(max_new_tokens=20, seed=1) == new

    def test_a_file_resumes_it(self, lm, tmp_path):
        session = lm.start("Once upon a time")
        session.generate(max_new_tokens=10)
        session.save(tmp_path / "story.safetensors")
        resumed = lm.resume(tmp_path / "story.safetensors")
        assert resumed.text == session.text
        assert resumed.generate(" and", max_new_tokens=9) == session.generate(
            " and", max_new_tokens=9
        )

    @pytest.mark.parametrize("how", ["left", "forgotten", "interrupted", "stopped"])
    def test_text_and_state_stay_together(self, letters, how):
        """Also where the loop was ahead of the text: the next words are those of the text."""
        session = letters.start("Once upon a time")
        options = {"max_new_tokens": 50, "seed": 0}
        if how != "stopped":
            pieces = session.stream(" there", **options)
            for _ in range(3):
                next(pieces)
            if how == "left":
                pieces.close()
            elif how == "interrupted":
                with pytest.raises(KeyboardInterrupt):
                    pieces.throw(KeyboardInterrupt)
            else:
                session.append("")
                with pytest.raises(StopIteration):
                    next(pieces)
        else:
            free = letters.generate("Once upon a time there", strip_prompt=True, **options)
            stop = free[17:19]
            new = session.generate(" there", stop_strings=stop, **options)
            assert new == free.split(stop)[0]
        assert session.text.startswith("Once upon a time there")
        assert len(session.text) < len("Once upon a time there") + 50
        expected = letters.generate(session.text + " so", strip_prompt=True, **options)
        assert session.generate(" so", **options) == expected

    def test_a_stream_ends_where_the_next_begins(self, letters):
        session, options = letters.start("Once upon"), {"max_new_tokens": 30, "seed": 0}
        for text in (" a time", " there", " was"):
            pieces = session.stream(text, **options)  # the former one still has a name
            new = next(pieces) + next(pieces)
        assert session.text.startswith("Once upon a time")
        text = session.text + " was" + new
        assert session.generate(" so", **options) == letters.generate(
            text + " so", strip_prompt=True, **options
        )

    def test_what_never_began_leaves_no_trace(self, letters):
        session, options = letters.start("Once upon"), {"max_new_tokens": 9, "seed": 0}
        unread = session.stream(" a time", **options)
        assert session.generate(" there", **options) == letters.generate(
            "Once upon there", strip_prompt=True, **options
        )
        assert list(unread) == []

    def test_text_that_stops_at_once_is_said_all_the_same(self, letters):
        session = letters.start("Once upon")
        options = {"max_new_tokens": 9, "seed": 0}
        first = letters.generate("Once upon a", strip_prompt=True, **options)[0]
        assert session.generate(" a", stop_strings=first, **options) == ""
        assert session.text == "Once upon a"

    def test_a_penalty_on_repetition_knows_the_whole_text(self, lm):
        """Token for token: pieces of the text may end in half a character."""
        options = {"seed": 0, "repetition_penalty": 1.5, "temperature": 0.5}
        session = lm.start("First Citizen")
        session.generate(max_new_tokens=8, **options)
        session.generate(max_new_tokens=8, **options)
        _, [whole] = lm.generate(
            "First Citizen", max_new_tokens=16, return_logprobs=True, **options
        )
        found = lm.prefill(
            {"token_ids": whole["token_ids"][None], "padding_mask": np.ones((1, 16))},
            lm.prefill("First Citizen"),
        )
        np.testing.assert_array_equal(session.state.token, found.token)
        np.testing.assert_array_equal(session.state.digest, found.digest)

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"temprature": 0.5}, "does not take `temprature`. Did you mean 'temperature'"),
            ({"num_return_sequences": 2}, "does not take `num_return_sequences`"),
            ({"state": None}, "does not take `state`"),
        ],
    )
    def test_what_it_does_not_take_is_named(self, lm, option, message):
        session = lm.start("a")
        with pytest.raises(ValueError, match=message):
            session.generate("b", **option)
        assert session.text == "a"

    def test_it_is_one_text(self, lm, tmp_path):
        lm.save_state(tmp_path / "two", lm.prefill(["a", "bcd"]), "a")
        with pytest.raises(ValueError, match=r"two holds a state of 2 rows.*Mamba2State.load"):
            lm.resume(tmp_path / "two")

    def test_nothing_can_be_forked_into_none(self, lm):
        with pytest.raises(ValueError, match="n=0"):
            lm.start("a").fork(0)


@examples(200)
@given(
    text=st.text(alphabet="ab\né日🤷", max_size=30),
    stops=st.lists(st.text(alphabet="ab\né", min_size=1, max_size=3), max_size=3),
    sizes=st.lists(st.integers(1, 5), min_size=1),
)
def test_a_text_stream_gives_the_text_up_to_the_first_stop_string(text, stops, sizes):
    ids = list(text.encode())
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), stop_strings=stops)
    given, i = "", 0
    while i < len(ids) and not stream.stopped:
        size = sizes[i % len(sizes)]
        given += stream.push(ids[i : i + size])
        i += size
        assert "\N{REPLACEMENT CHARACTER}" not in given
    given += stream.finish()
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert given == text[: min(found, default=(0, len(text)))[1]]


class TestScore:
    @pytest.mark.slow
    def test_perplexity_is_that_of_the_whole_forward_pass(self, lm):
        texts = [TEXT, "ab", TEXT * 20]
        found = lm.perplexity(texts)
        for text, perplexity in zip(texts, found, strict=True):
            token_ids = np.array([list(text.encode())])
            losses = lm.score(token_ids[:, :-1], scoring_mode="loss", target_ids=token_ids[:, 1:])
            expected = np.exp(np.mean(np.array(losses), dtype="float64"))
            assert perplexity == pytest.approx(expected, rel=1e-5)
        assert lm.perplexity(TEXT) == found[0]

    def test_a_stride_forgets(self, lm):
        pieces = [TEXT[i : i + 16] for i in range(0, len(TEXT), 16)]
        counts = [len(piece) - 1 for piece in pieces]
        logs = np.log(lm.perplexity(pieces))
        expected = np.exp(np.average(logs, weights=counts))
        assert lm.perplexity(TEXT, stride=16) == pytest.approx(expected, rel=1e-6)

    def test_the_loss_is_float32_whatever_the_model_is(self, preset_folder):
        lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, dtype="bfloat16")
        ids = np.array([lm.preprocessor.tokenizer(TEXT)])
        losses = lm.score(ids[:, :-1], scoring_mode="loss", target_ids=ids[:, 1:])
        assert losses.dtype == "float32"
        logits = np.asarray(lm.score(ids[:, :-1]), np.float64)
        truth = (
            np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, ids[:, 1:, None], 2)[..., 0]
        )
        np.testing.assert_allclose(losses, truth, rtol=1e-5)

    def test_score_can_look_between_the_blocks(self, lm):
        token_ids = np.array([list(b"to be or not")])
        seen = []

        def look(x, i):
            seen.append(i)
            return x

        logits = lm.score(token_ids, layer_intercept_fn=look)
        assert seen == [-1, 0, 1]
        inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
        np.testing.assert_allclose(logits, lm(inputs), atol=1e-5)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda lm: lm.perplexity(["ab", "a"]), "Text 1 has fewer than two tokens: 'a'"),
            (lambda lm: lm.perplexity("abc", stride=1), "stride=1"),
            (lambda lm: lm.score(np.ones((1, 3)), scoring_mode="x"), "Received: scoring_mode='x'"),
            (lambda lm: lm.score(np.ones((1, 3)), scoring_mode="loss"), "needs `target_ids`"),
        ],
    )
    def test_bad_arguments_are_named(self, lm, call, message):
        with pytest.raises(ValueError, match=message):
            call(lm)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"max_length": 0}, "max_length=0"),
        ({"max_length": 9, "max_new_tokens": 9}, "max_length=9, max_new_tokens=9"),
        ({"stop_strings": ["a", ""]}, "stop string is empty"),
        ({"num_return_sequences": 0}, "num_return_sequences=0"),
    ],
)
def test_bad_arguments_are_named_before_any_work(lm, arguments, message):
    with pytest.raises(ValueError, match=message):
        lm.generate("hello", **arguments)
    arguments.pop("num_return_sequences", None)
    if arguments:
        with pytest.raises(ValueError, match=message):
            lm.stream("hello", **arguments)


def test_bad_states_and_batches_are_named(lm):
    with pytest.raises(ValueError, match="state has 2 rows, but there are 1 prompts"):
        lm.generate("hello", state=lm.prefill(["a", "b"]))
    with pytest.raises(ValueError, match="batch of prompts is empty"):
        lm.generate([])
    with pytest.raises(ValueError, match="batch of prompts is empty"):
        lm.prefill([])
    with pytest.raises(ValueError, match="Prompt 0 has no tokens"):
        lm.prefill("")
    with pytest.raises(ValueError, match="Prompt 1 has token id 300"):
        lm.prefill({"token_ids": np.array([[1], [300]]), "padding_mask": np.ones((2, 1))})
    for bad in (3.5, np.nan, -1.0, np.inf):
        with pytest.raises(ValueError, match=f"`token_ids` must be whole numbers.*{bad} in row 0"):
            lm.prefill({"token_ids": np.array([[bad, 2.0]]), "padding_mask": np.ones((1, 2))})


def test_ids_may_be_whole_numbers_in_floating_point(lm):
    ids = np.array([[3, 5, 7, 0]])
    inputs = {"token_ids": ids, "padding_mask": ids > 0}
    floats = {"token_ids": np.where(ids > 0, ids, np.nan), "padding_mask": ids > 0}
    options = {"max_new_tokens": 5, "stop_token_ids": None, "repetition_penalty": 1.2, "seed": 1}
    found = lm.generate(floats, **options)["token_ids"]
    np.testing.assert_array_equal(found, lm.generate(inputs, **options)["token_ids"])


def test_searches_do_not_stream(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=2))
    with pytest.raises(ValueError, match="BeamSampler searches whole texts"):
        lm.stream("hello", max_new_tokens=5)
    with pytest.raises(ValueError, match="does not take `state`"):
        lm.generate("hello", max_new_tokens=5, state=lm.prefill("a"))
    without = keras_mamba2.Mamba2CausalLM(lm.backbone)
    for call in (without.stream, without.prefill, without.perplexity):
        with pytest.raises(ValueError, match="`preprocessor`"):
            call("hello")


def test_blanks_between_tokens_stay_where_tokenizers_strip_them_before_a_text(tmp_path):
    """Those of sentencepiece write no blank at the beginning: text, stream, session, programs."""
    tokenizer = keras_mamba2.Mamba2Tokenizer(
        tokenizer=family_tokenizers.zamba2(), start_token="<s>", end_token="</s>"
    )
    lm = keras_mamba2.Mamba2CausalLM(
        keras_mamba2.Mamba2Backbone(tokenizer.num_ids, num_layers=1, hidden_dim=16, head_dim=8),
        keras_mamba2.Mamba2CausalLMPreprocessor(tokenizer, add_start_token=False),
    )
    lm.compile(sampler=OneToken(tokenizer.token_to_id("▁be")))
    lm.export_programs(tmp_path / "programs", platforms=["cpu"], batch_sizes=[1])
    text, whole = "def f(x):\n", "def f(x):\n be be be"
    for model in (lm, keras_mamba2.load_programs(tmp_path / "programs")):
        options = {"max_new_tokens": 3}
        assert model.generate(text, **options) == whole
        assert model.generate(text, stop_strings="never", **options) == whole
        assert text + model.generate(text, strip_prompt=True, **options) == whole
        assert text + "".join(model.stream(text, **options)) == whole
        session = model.start(text)
        session.generate(**options)
        assert session.text == whole
        state = model.prefill(text)
        assert model.generate("", state=state, **options) == whole.removeprefix(text)
        assert model.generate("  to", state=state, **options) == "  to be be be"


def test_a_stop_token_that_is_text_is_part_of_the_text(letters):
    """Of a stream and a session too, whose state has read it."""
    options = {"max_new_tokens": 200, "stop_token_ids": list(b"aeiou"), "seed": 1}
    text = letters.generate(TEXT, strip_prompt=True, **options)
    assert text[-1] in "aeiou"
    assert "".join(letters.stream(TEXT, **options)) == text
    options["stop_strings"] = "never to be found"
    assert letters.generate(TEXT, strip_prompt=True, **options) == text
    session = letters.start(TEXT)
    assert session.generate(**options) == text
    whole = letters.prefill(session.text)
    assert session.state.digest.tolist() == whole.digest.tolist()
    assert session.state.token.tolist() == whole.token.tolist()


def test_a_penalty_knows_the_last_token_of_a_state(drawing):
    generator = drawing.make_generate_function()
    nothing, one = [np.zeros(0, "int32")], np.array([1])
    rows = generator.start(nothing, one, state=drawing.prefill("abc"), repetition_penalty=1.5)
    assert np.flatnonzero(rows.seen).tolist() == [ord("c")]


def test_a_continued_text_has_no_start_token(lm):
    """Neither that of the preprocessor, nor that of a tokenizer that adds one by itself."""
    plain = lm.preprocessor.prompts(["abc"])[0].tolist()
    tokenizer = keras_mamba2.Mamba2Tokenizer(tokenizer=_adding_an_end(lm.preprocessor.tokenizer))
    preprocessor = keras_mamba2.Mamba2CausalLMPreprocessor(tokenizer, add_start_token=True)
    assert preprocessor.prompts(["abc"])[0].tolist() == [256, 256, *plain]
    assert preprocessor.prompts(["abc"], continued=True)[0].tolist() == plain
    model = keras_mamba2.Mamba2CausalLM(lm.backbone, preprocessor)
    state = model.prefill("c", model.prefill("ab"))
    assert int(state.length[0]) == 4  # two starts, a, b; c waits


def _adding_an_end(tokenizer):
    engine = tokenizers.Tokenizer.from_str(tokenizer.engine.to_str())
    end = "<|endoftext|>"
    engine.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, 256)]
    )
    return engine
