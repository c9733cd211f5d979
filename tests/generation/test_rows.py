"""What a row has of its own: random numbers, parameters, stop tokens, its place in a batch."""

import threading

import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_mamba2
from keras_mamba2 import FilterSampler
from keras_mamba2.generation import Generator
from keras_mamba2.state.digest import digest_after

PROMPTS = ["hello", "you", "a longer prompt than those"]
DRAWING = ["random", "top_k", "top_p", FilterSampler(top_p=0.9, min_p=0.01)]


@pytest.fixture(scope="module")
def models(preset_folder):
    """A model for each sampler, by its name."""
    models = {}
    for sampler in ["greedy", *DRAWING]:
        lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
        lm.compile(sampler=sampler)
        models[sampler if isinstance(sampler, str) else "filter"] = lm
    return models


@pytest.fixture(scope="module", params=["random", "top_k", "top_p", "filter"])
def drawing(models, request):
    return models[request.param]


@pytest.fixture(scope="module")
def greedy(models):
    return models["greedy"]


class TestDraws:
    def test_a_row_draws_what_it_draws_alone(self, drawing):
        together = drawing.generate(PROMPTS, max_new_tokens=20, seed=3)
        assert together == [drawing.generate(p, max_new_tokens=20, seed=3) for p in PROMPTS]
        assert drawing.generate(PROMPTS[::-1], max_new_tokens=20, seed=3) == together[::-1]

    def test_rows_of_one_text_differ(self, drawing):
        first = drawing.generate("hello", max_new_tokens=20, seed=3)
        both = drawing.generate(["hello", "hello"], max_new_tokens=20, seed=3)
        assert both == drawing.generate("hello", max_new_tokens=20, seed=3, num_return_sequences=2)
        assert both[0] == first != both[1]
        state = drawing.prefill("hello").repeat(2)
        again = drawing.generate(["", ""], state=state, max_new_tokens=20, seed=3)
        assert again[0] != again[1]

    def test_stopped_and_continued_with_the_same_seed_is_the_whole(self, drawing):
        generator = drawing.make_generate_function()
        prompts, state = drawing.preprocessor.prompts(["hello"]), None
        rows = generator.start(prompts, np.array([20]), seed=3)
        [whole] = generator.decode(rows).all_tokens()
        pieces = []
        for count in (1, 7, 12):
            rows = generator.start(prompts, np.array([count]), state=state, seed=3)
            decoding = generator.decode(rows)
            pieces += decoding.all_tokens()
            prompts, state = [np.zeros(0, "int32")], decoding.rows.state
        np.testing.assert_array_equal(np.concatenate(pieces), whole)

    def test_streams_do_not_disturb_each_other(self, drawing):
        def texts(streams):
            found = ["" for _ in streams]
            while streams:
                for i, stream in list(streams.items()):
                    piece = next(stream, None)
                    if piece is None:
                        del streams[i]
                    else:
                        found[i] += piece
                    drawing.generate("other", max_new_tokens=2)
            return found

        seeds = range(5)
        alone = [
            drawing.generate("hello", max_new_tokens=12, seed=seed, strip_prompt=True)
            for seed in seeds
        ]
        streams = {seed: drawing.stream("hello", max_new_tokens=12, seed=seed) for seed in seeds}
        assert texts(streams) == alone

    def test_threads_do_not_disturb_each_other(self, drawing):
        alone = [drawing.generate("hello", max_new_tokens=12, seed=seed) for seed in range(8)]
        found = {}

        def run(seed):
            if seed % 2:
                found[seed] = drawing.generate("hello", max_new_tokens=12, seed=seed)
            else:
                found[seed] = "hello" + "".join(
                    drawing.stream("hello", max_new_tokens=12, seed=seed)
                )

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[seed] for seed in range(8)] == alone

    def test_without_a_seed_they_go_on(self, drawing):
        texts = {drawing.generate("hello", max_new_tokens=20) for _ in range(3)}
        assert len(texts) == 3

    def test_rows_are_independent(self, models):
        """Among many rows of one prompt each first token is as often as it is likely."""
        lm, n = models["random"], 2000
        _, details = lm.generate(
            "hello", max_new_tokens=1, num_return_sequences=n, seed=0, return_logprobs=True
        )
        tokens = np.array([row["token_ids"][0] for row in details])
        likely = {
            int(t): np.exp(row["logprobs"][0]) for t, row in zip(tokens, details, strict=True)
        }
        for token, p in likely.items():
            deviation = np.sqrt(n * p * (1 - p))
            assert abs((tokens == token).sum() - n * p) < 5 * deviation + 1


class TestParameters:
    def test_of_a_call_are_those_of_a_sampler(self, greedy, preset_folder):
        parameters = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.02}
        lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
        lm.compile(sampler=FilterSampler(**parameters, repetition_penalty=1.3))
        expected = lm.generate(PROMPTS, max_new_tokens=20, seed=1)
        found = greedy.generate(
            PROMPTS, max_new_tokens=20, seed=1, repetition_penalty=1.3, **parameters
        )
        assert found == expected

    def test_of_a_call_replace_one_of_the_samplers_own(self, models):
        lm = models["filter"]
        coldest = lm.generate("hello", max_new_tokens=20, temperature=0)
        assert coldest == models["greedy"].generate("hello", max_new_tokens=20)
        one = lm.generate("hello", max_new_tokens=20, top_k=1, seed=1)
        assert one == coldest

    def test_of_a_greedy_sampler_draw_only_if_they_say_so(self, greedy):
        """As in transformers without `do_sample`, where a penalty draws nothing either."""
        text = greedy.generate("hello", max_new_tokens=20)
        for nothing in ({"repetition_penalty": 1.0}, {"top_p": 1.0}, {"min_p": 0.0}):
            assert greedy.generate("hello", max_new_tokens=20, **nothing) == text
        penalized = [
            greedy.generate("hello", max_new_tokens=20, repetition_penalty=1.5, seed=seed)
            for seed in range(2)
        ]
        assert penalized[0] == penalized[1] != text
        drawn = [greedy.generate("hello", max_new_tokens=20, min_p=1e-6, seed=s) for s in range(2)]
        assert drawn[0] != drawn[1]

    def test_share_one_program(self, greedy):
        greedy.generate("hello", max_new_tokens=3, temperature=0.5)
        program = greedy.generate_function._decode.program
        before = program._cache_size()
        for i in range(1, 6):
            greedy.generate(
                "hello", max_new_tokens=3, temperature=i / 3, top_k=i, top_p=i / 6, min_p=i / 9
            )
        assert program._cache_size() == before

    def test_are_a_row_s_own(self, greedy):
        generator = Generator(greedy)
        prompt = greedy.preprocessor.prompts(["hello"])

        def start(**parameters):
            return generator.start(prompt, np.array([12]), seed=0, **parameters)

        parameters = [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 3, "temperature": 2.0}]
        alone = [generator.decode(start(**p)).all_tokens()[0] for p in parameters]
        rows = generator.start(prompt * 3, np.array([12] * 3), seed=0, temperature=1.0)
        for i, p in enumerate(parameters):
            rows = generator.insert(rows, i, start(**p))
        together = generator.decode(rows).all_tokens()
        for found, expected in zip(together, alone, strict=True):
            np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"temperature": -1.0}, "temperature=-1"),
            ({"top_k": 0}, "top_k=0"),
            ({"top_p": 0.0}, "top_p=0"),
            ({"min_p": 2.0}, "min_p=2"),
            ({"repetition_penalty": 0.5}, "repetition_penalty=0.5"),
        ],
    )
    def test_out_of_range_are_named(self, greedy, arguments, message):
        with pytest.raises(ValueError, match=message):
            greedy.generate("hello", **arguments)
        with pytest.raises(ValueError, match=message):
            greedy.stream("hello", **arguments)

    def test_are_refused_for_samplers_that_have_none(self, preset_folder):
        class Own(keras_hub.samplers.RandomSampler):
            pass

        lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
        for sampler, message in ((Own(), "Own does not take top_k"), ("beam", "take `top_k`")):
            lm.compile(sampler=sampler)
            with pytest.raises(ValueError, match=message):
                lm.generate("hello", max_new_tokens=2, top_k=5)


class TestLogprobs:
    def test_are_those_of_the_forward_pass(self, greedy):
        texts, details = greedy.generate(
            PROMPTS, max_new_tokens=9, return_logprobs=True, stop_token_ids=None
        )
        assert texts == greedy.generate(PROMPTS, max_new_tokens=9, stop_token_ids=None)
        for prompt, row in zip(greedy.preprocessor.prompts(PROMPTS), details, strict=True):
            ids = np.concatenate([prompt, row["token_ids"]])[None]
            logits = greedy.score(ids, scoring_mode="logits")
            logprobs = ops.convert_to_numpy(ops.log_softmax(logits))[0]
            expected = logprobs[np.arange(len(prompt) - 1, ids.shape[1] - 1), row["token_ids"]]
            np.testing.assert_allclose(row["logprobs"], expected, atol=2e-5)

    def test_of_drawn_tokens_do_not_know_the_sampler(self, models):
        options = {"max_new_tokens": 5, "return_logprobs": True, "seed": 0}
        _, [hot] = models["filter"].generate("hello", temperature=5.0, **options)
        ids = np.concatenate(
            [models["filter"].preprocessor.prompts(["hello"])[0], hot["token_ids"]]
        )
        logits = models["filter"].score(ids[None])
        logprobs = ops.convert_to_numpy(ops.log_softmax(logits))[0]
        expected = logprobs[np.arange(4, 9), hot["token_ids"]]
        np.testing.assert_allclose(hot["logprobs"], expected, atol=2e-5)

    def test_searches_have_none(self, preset_folder):
        lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
        lm.compile(sampler="beam")
        with pytest.raises(ValueError, match="return_logprobs"):
            lm.generate("hello", return_logprobs=True)


class TestSlots:
    def test_a_row_is_put_in_while_others_run(self, models):
        lm = models["filter"]
        generator = Generator(lm)
        prompts = lm.preprocessor.prompts(PROMPTS)
        stop = [(), (300,), (7, 8)]

        def start(i, count):
            return generator.start([prompts[i]], np.array([count]), stop[i], seed=i)

        alone = [generator.decode(start(i, n)).all_tokens()[0] for i, n in enumerate((30, 8, 25))]
        rows = generator.start(prompts[:2], np.array([0, 0]), seed=0)
        rows = generator.insert(generator.insert(rows, 0, start(0, 30)), 1, start(1, 8))
        decoding = generator.decode(rows, run_lengths=[10])
        first = next(decoding)
        assert len(first[0]) == 10
        np.testing.assert_array_equal(first[1], alone[1])  # whole: its place is free
        rows = generator.insert(decoding.rows, 1, start(2, 25))
        rest = generator.decode(rows).all_tokens()
        np.testing.assert_array_equal(np.concatenate([first[0], rest[0]]), alone[0])
        np.testing.assert_array_equal(rest[1], alone[2])


class TestNotFinite:
    @pytest.fixture
    def broken(self, preset_folder):
        def broken(sampler, value=np.nan):
            lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
            lm.compile(sampler=sampler)
            embeddings = lm.backbone.token_embedding.embeddings
            values = np.array(embeddings.value)
            values[ord("z")] = value
            embeddings.assign(values)
            return lm

        return broken

    @pytest.mark.parametrize("sampler", ["greedy", "top_p", FilterSampler()])
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_logits_are_reported(self, broken, sampler, value):
        lm = broken(sampler, value)
        with pytest.raises(ValueError, match="logits of row 0 after 5 tokens are not finite"):
            lm.generate("hello", max_new_tokens=5)
        with pytest.raises(ValueError, match="not finite"):
            list(lm.stream("hello", max_new_tokens=5))
        with pytest.raises(ValueError, match="not finite"):
            lm.perplexity("hello")


def test_the_digest_is_the_same_in_pieces():
    rng = np.random.default_rng(0)
    token_ids = rng.integers(0, 50288, (3, 40)).astype("int32")
    whole = digest_after(np.zeros(3, "int32"), token_ids)
    first = digest_after(np.zeros(3, "int32"), token_ids[:, :13])
    np.testing.assert_array_equal(digest_after(first, token_ids[:, 13:]), whole)
    padded = np.concatenate([token_ids[:, :5] * 0 + 9, token_ids, token_ids[:, :3]], axis=1)
    mask = np.arange(48) // 5 > 0
    mask &= np.arange(48) < 45
    masked = digest_after(np.zeros(3, "int32"), padded, np.broadcast_to(mask, padded.shape))
    np.testing.assert_array_equal(masked, whole)
    assert len(np.unique(whole)) == 3


def test_many_tokens_need_no_room_before_they_come(models, monkeypatch):
    """Two billion tokens are asked for, and the text stops after a few."""
    lm = models["greedy"]
    text = lm.generate("hello", max_new_tokens=4, strip_prompt=True)
    end = [lm.preprocessor.tokenizer(text)[-1]]
    assert lm.generate("hello", max_new_tokens=2**31, stop_token_ids=end).startswith("hello")
    piece = next(lm.stream("hello", max_new_tokens=2**40))
    assert isinstance(piece, str)
