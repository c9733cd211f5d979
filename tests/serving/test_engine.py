"""The engine: each request gets what it gets alone, whoever comes and goes."""

import contextlib
import itertools
import threading
import types

import jax
import numpy as np
import pytest
from keras import ops

import keras_mamba2
from keras_mamba2.host.blocks import BLOCK_SIZES
from keras_mamba2.serving import scheduler
from keras_mamba2.serving.engine import Closed
from keras_mamba2.serving.engine import Engine
from keras_mamba2.serving.engine import QueueFull
from keras_mamba2.serving.slots import Slots
from tests import reference
from tests.serving.collected import GREEDY
from tests.serving.collected import Collected
from tests.serving.collected import alone
from tests.serving.collected import wait_until

PROMPTS = ["hello", "you", "a longer prompt " * 20, "x" * 130, "what, then?", "ROMEO:"]
DRAWN = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.3}


@pytest.fixture(scope="module")
def hybrid(byte_tokenizer):
    """A model whose states hold keys and values too."""
    backbone = keras_mamba2.Mamba2HybridBackbone(
        vocabulary_size=257,
        hidden_dim=32,
        blocks=["mamba2", "attention"],
        sublayers={
            "mamba2": {"state_dim": 8, "head_dim": 8, "chunk_size": 16},
            "attention": {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
        },
    )
    reference.randomize(backbone)
    lm = keras_mamba2.Mamba2CausalLM(
        backbone, keras_mamba2.Mamba2CausalLMPreprocessor(byte_tokenizer, sequence_length=32)
    )
    lm.compile(sampler="greedy")
    return lm


@pytest.fixture(scope="module")
def hybrid_engine(hybrid):
    engine = Engine(hybrid, max_sequences=2, max_tokens=500, block_size=32)
    engine.start()
    yield engine
    engine.close()


@contextlib.contextmanager
def started(lm, **options):
    """An engine of its own, closed at the end."""
    engine = Engine(lm, **{"max_sequences": 2, "max_tokens": 4096, "block_size": 32, **options})
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


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


class TestTokens:
    def test_more_requests_than_places_get_what_each_gets_alone(self, engine, lm):
        requests = [Collected(prompt).submit(engine) for prompt in PROMPTS]
        for prompt, request in zip(PROMPTS, requests, strict=True):
            assert [request.tokens()] == alone(lm, prompt, **GREEDY)
            assert request.reasons == ["length"]

    def test_drawn_ones_too_beside_greedy_ones(self, engine, lm):
        requests = [
            Collected(prompt, parameters=DRAWN if i % 2 else GREEDY, seed=i).submit(engine)
            for i, prompt in enumerate(PROMPTS)
        ]
        for i, (prompt, request) in enumerate(zip(PROMPTS, requests, strict=True)):
            parameters = DRAWN if i % 2 else GREEDY
            assert [request.tokens()] == alone(lm, prompt, seed=i, **parameters)

    def test_who_joins_and_leaves_changes_nothing(self, engine, lm):
        """Others come while it runs: with it the number of rows grows, and shrinks."""
        others = []

        def join(delivery):
            if len(others) < 6:
                others.append(Collected("other", limit=len(others) + 1).submit(engine))

        request = Collected("hello", limit=300, parameters=DRAWN, seed=5, on_delivery=join)
        [expected] = alone(lm, "hello", limit=300, seed=5, **DRAWN)
        assert request.submit(engine).tokens() == expected
        assert len(others) > 1
        [expected] = alone(lm, "other", limit=6, **GREEDY)
        for other in others:
            assert other.tokens() == expected[: other.request.limit]

    def test_several_sequences_of_one_prompt(self, engine, lm):
        request = Collected("hello", parameters=DRAWN, seed=3, count=3).submit(engine)
        found = [request.tokens(i) for i in range(3)]
        assert found == alone(lm, "hello", count=3, seed=3, **DRAWN)
        assert len(set(map(tuple, found))) == 3
        last = Collected("hello", parameters=DRAWN, seed=3, first=2).submit(engine)
        assert last.tokens() == found[2]

    def test_stop_tokens(self, engine, lm):
        [tokens] = alone(lm, "hello", **GREEDY)
        request = Collected("hello", stop_token_ids=(tokens[5],)).submit(engine)
        assert request.tokens() == tokens[: tokens.index(tokens[5]) + 1]
        assert request.reasons == ["stop"]

    def test_log_probabilities(self, engine, lm):
        _, [expected] = lm.generate(
            "hello", max_new_tokens=12, stop_token_ids=None, return_logprobs=True, **GREEDY
        )
        plain = Collected("hello").submit(engine)
        request = Collected("hello", with_likely=True).submit(engine)
        assert request.tokens() == plain.tokens()
        likely = [d.likely for d in request.deliveries]
        logprobs = np.concatenate([part.logprobs for part in likely])
        np.testing.assert_allclose(logprobs, expected["logprobs"], atol=1e-4)
        top = np.concatenate([part.top_logprobs for part in likely])
        top_ids = np.concatenate([part.top_ids for part in likely])
        np.testing.assert_array_equal(top_ids[:, 0], expected["token_ids"])  # greedy
        np.testing.assert_allclose(top[:, 0], logprobs, atol=1e-6)
        assert (np.diff(top, axis=1) <= 0).all()
        assert all(d.likely is None for d in plain.deliveries)

    def test_scores_of_a_prompt(self, engine, lm):
        request = Collected("hello " * 40, limit=0, scores_prompt=True).submit(engine).wait()
        [delivery] = request.deliveries
        assert (len(delivery.token_ids), delivery.finish_reason) == (0, "length")
        ids = np.array([request.request.prompt])
        losses = lm.score(ids[:, :-1], scoring_mode="loss", target_ids=ids[:, 1:])[0]
        np.testing.assert_allclose(delivery.prompt_likely.logprobs, -losses, atol=1e-4)
        assert delivery.prompt_likely.top_ids.shape == (239, 20)

    @pytest.mark.slow
    def test_of_a_model_with_attention(self, hybrid_engine, hybrid):
        prompts = ["hello", "x" * 200, "what, then?", "you", "x" * 200]
        requests = [Collected(prompt, limit=30).submit(hybrid_engine) for prompt in prompts]
        for prompt, request in zip(prompts, requests, strict=True):
            assert [request.tokens()] == alone(hybrid, prompt, limit=30, **GREEDY)
        again = Collected("x" * 200 + "y", limit=250).submit(hybrid_engine)
        assert [again.tokens()] == alone(hybrid, "x" * 200 + "y", limit=250, **GREEDY)
        assert again.request.cached_tokens > 190


@pytest.mark.slow
def test_states_in_bfloat16_are_what_they_are_alone(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(str(preset_folder), state_dtype="bfloat16")
    lm.compile(sampler="greedy")
    prompts = [prompt for prompt in PROMPTS if len(prompt) < 64]
    with started(lm, prefix_cache_bytes=0) as engine:
        requests = [Collected(prompt, limit=30).submit(engine) for prompt in prompts]
        for prompt, request in zip(prompts, requests, strict=True):
            assert [request.tokens()] == alone(lm, prompt, limit=30, **GREEDY)


class TestCompilation:
    @pytest.mark.parametrize(
        "kind", ["engine", pytest.param("hybrid_engine", marks=pytest.mark.slow)]
    )
    def test_nothing_is_compiled_once_it_runs(self, kind, request):
        """Whatever the prompts, parameters and neighbours are; also with known prefixes."""
        engine = request.getfixturevalue(kind)
        rng = np.random.default_rng(0)
        with counting_compilations() as compilations:
            requests = [
                Collected(
                    rng.integers(0, 257, rng.integers(1, 300)) if i % 3 else [7] * 150,
                    limit=int(rng.integers(1, 90)),
                    parameters=DRAWN if i % 2 else GREEDY,
                    count=1 + i % 2,
                    with_likely=i % 4 == 0,
                    scores_prompt=i % 5 == 0,
                    stop_token_ids=(3,) * (i % 8),
                ).submit(engine)
                for i in range(16)
            ]
            for each in requests:
                each.wait()
        assert not any(each.errors for each in requests)
        assert compilations == []

    def test_there_are_as_many_rows_as_are_needed(self, engine, monkeypatch):
        monkeypatch.setattr(scheduler, "RUN_SECONDS", 1e-3)  # so that there are many runs
        requests = [Collected("hello", limit=4000).submit(engine) for _ in range(4)]
        wait_until(lambda: engine.num_running == 4)
        assert engine.num_rows == 4
        for each in requests[:3]:
            engine.cancel(each.request)
        wait_until(lambda: engine.num_rows == 1)
        engine.cancel(requests[3].request)

    def test_who_comes_after_all_have_gone_has_no_rows_of_theirs(self, engine, lm):
        for each in [Collected("hello", limit=30).submit(engine) for _ in range(4)]:
            each.wait()
        wait_until(lambda: not engine.num_running)
        rows = []
        alone_again = Collected("you", on_delivery=lambda d: rows.append(engine.num_rows))
        assert [alone_again.submit(engine).tokens()] == alone(lm, "you", **GREEDY)
        assert set(rows) == {1}

    def test_rows_go_once_they_have_not_been_needed_for_a_while(self, lm):
        generator = lm.make_generate_function()
        slots = Slots(generator, most=6, max_tokens=100)
        state = generator.empty_state(100)
        for owner in "abcde":
            [row] = generator.sequences(state, np.ones(1, "int32"), limit=50, temperature=0.0)
            slots.insert(row, owner)
        found = []
        for leaving in "a bc    d   e":
            if leaving != " ":
                slots.release(leaving)
            slots.shrink()
            found.append((slots.used, slots.num_rows))
        assert found[:4] == [(4, 6), (4, 6), (3, 6), (2, 4)]
        assert found[4:] == [(2, 4), (2, 4), (2, 2), (2, 2), (1, 2), (1, 2), (1, 2), (1, 1), (0, 1)]


def test_nobody_waits_for_a_state_that_is_kept(engine, monkeypatch):
    """Of a prompt it is kept after the first tokens are delivered, of a text after the last."""
    order = []
    add = engine.prefix_cache.add

    def adding(token_ids, state):
        order.append(len(token_ids))
        add(token_ids, state)

    monkeypatch.setattr(engine.prefix_cache, "add", adding)
    request = Collected("q" * 50, limit=30, on_delivery=lambda d: order.append("tokens"))
    request.submit(engine).wait()
    wait_until(lambda: 79 in order)
    assert order == ["tokens", 49, *["tokens"] * order[2:].count("tokens"), 79]


class TestDeliveries:
    @pytest.fixture
    def order(self, engine, lm, monkeypatch):
        """What happens one after the other, with runs of one token."""
        monkeypatch.setattr(scheduler, "RUN_SECONDS", 1e-9)
        order, generator = [], lm.make_generate_function()
        run, read = generator.advance_telling, generator.read

        def running(*args):
            order.append("run")
            return run(*args)

        def reading(*args):
            order.append("read")
            return read(*args)

        monkeypatch.setattr(generator, "advance_telling", running)
        monkeypatch.setattr(generator, "read", reading)
        return order

    def test_the_device_does_not_wait_for_receivers(self, engine, order):
        """Tokens are delivered when the next run has begun; the first and the last at once."""
        Collected([5], limit=5, on_delivery=lambda d: order.append("tokens")).submit(engine).wait()
        assert order == ["run", "tokens", "run", *["run", "tokens"] * 3, "tokens"]

    def test_receivers_do_not_wait_for_a_prompt(self, engine, order):
        first = Collected([5], limit=3000, on_delivery=lambda d: order.append("tokens"))
        first.submit(engine)
        wait_until(lambda: order.count("tokens") > 3)
        Collected("w" * 640, limit=1).submit(engine).wait()
        engine.cancel(first.request)
        assert order.count("read") >= 20
        assert ("run", "read") not in itertools.pairwise(order)

    def test_long_blocks_are_read_while_nobody_has_text(self, engine, lm, monkeypatch):
        """And what comes after them is the same."""
        monkeypatch.setattr(scheduler, "READING_SHARE", 0.0)
        monkeypatch.setattr(scheduler, "RUN_SECONDS", 1e-3)  # so that there are many runs
        monkeypatch.setattr(engine._scheduler, "_block_sizes", (512, 32))
        monkeypatch.setattr(engine._scheduler, "_block_seconds", {512: 0.2, 32: 0.01})
        sizes, generator, rng = [], lm.make_generate_function(), np.random.default_rng(8)
        read = generator.read

        def reading(state, token_ids):
            sizes.append(len(token_ids))
            return read(state, token_ids)

        monkeypatch.setattr(generator, "read", reading)
        prompt = rng.integers(0, 257, 700).tolist()
        assert [Collected(prompt).submit(engine).tokens()] == alone(lm, prompt, **GREEDY)
        assert sizes == [512, 187]
        sizes.clear()
        running = Collected([5], limit=4000).submit(engine)
        wait_until(lambda: running.deliveries)
        prompt = rng.integers(0, 257, 700).tolist()
        assert [Collected(prompt).submit(engine).tokens()] == alone(lm, prompt, **GREEDY)
        engine.cancel(running.request)
        assert set(sizes) == {32, 699 % 32}

    def test_blocks_are_as_long_as_those_who_run_may_wait(self, engine, monkeypatch):
        of_engine = engine._scheduler
        monkeypatch.setattr(of_engine, "_block_sizes", BLOCK_SIZES)
        seconds = {512: 0.6, 128: 0.2, 64: 0.12, 32: 0.08, 16: 0.05}
        monkeypatch.setattr(of_engine, "_block_seconds", seconds)
        found = [of_engine._largest_block(most) for most in (0.0, 0.05, 0.1, 0.2, 0.59, 1.0)]
        assert found == [16, 16, 32, 128, 128, 512]

    @pytest.mark.parametrize(("count", "steps"), [(1, 5), (25, 5), (50, 10), (100, 20)])
    def test_runs_of_many_sequences_are_longer(self, count, steps):
        """Or handing out their pieces would take as long as making them."""
        owners = [types.SimpleNamespace(token_ids=[1])] * count
        slots = types.SimpleNamespace(num_rows=128, used=count, owners=owners)
        of_nobody = scheduler.Scheduler(generator=None, cache=None, slots=slots)
        of_nobody._step_seconds[128] = 0.0099
        assert of_nobody._num_steps() == steps

    def test_a_receiver_that_cancels_gets_nothing_more(self, engine):
        """One run later at the latest, and nothing is delivered of what that run found."""
        request = Collected("hello", limit=4000)
        request._on_delivery = lambda d: engine.cancel(request.request)
        request.submit(engine)
        wait_until(lambda: request.deliveries and not engine.num_running)
        assert len(request.deliveries) == 1


class TestQueue:
    def test_a_long_prompt_does_not_stop_others(self, engine, monkeypatch):
        """Between two pieces of its prompt the others get tokens, and a short one overtakes it."""
        monkeypatch.setattr(scheduler, "RUN_SECONDS", 1e-3)  # so that there are many runs
        order = []
        running = Collected("hello", limit=3000, on_delivery=lambda d: order.append("running"))
        running.submit(engine)
        wait_until(lambda: order)
        long = Collected("z" * 4000, limit=1, on_delivery=lambda d: order.append("long"))
        long.submit(engine)
        short = Collected("you", limit=1, on_delivery=lambda d: order.append("short"))
        short.submit(engine)
        long.wait()
        engine.cancel(running.request)
        assert order.index("short") < order.index("long")
        assert order[: order.index("long")].count("running") > 10

    def test_too_many_are_refused_and_nothing_of_them_is_taken(self, lm):
        with started(lm, max_sequences=1, max_waiting=3) as engine:
            running = Collected("hello", limit=4000).submit(engine)
            wait_until(lambda: engine.num_running == 1)
            waiting = [Collected("hello", limit=1).submit(engine) for _ in range(2)]
            with pytest.raises(QueueFull, match="2 requests are waiting, 3 may"):
                engine.submit([Collected("hello").request for _ in range(2)])
            assert engine.num_waiting == 2
            with pytest.raises(ValueError, match="4 requests of at most 1 .* each, and 3 may wait"):
                engine.submit([Collected("hello").request for _ in range(4)])
            engine.cancel(running.request)
            assert len({tuple(each.tokens()) for each in waiting}) == 1

    def test_a_cancelled_request_frees_its_place(self, engine):
        cancelled = engine.counts.cancelled
        requests = [Collected("hello", limit=4000).submit(engine) for _ in range(4)]
        wait_until(lambda: engine.num_running == 4)
        long = Collected("z" * 4000, limit=1).submit(engine)
        for each in (*requests, long):
            engine.cancel(each.request)
        wait_until(lambda: engine.num_running + engine.num_reading + engine.num_waiting == 0)
        assert engine.counts.cancelled >= cancelled + 4
        assert Collected("hello", limit=3).submit(engine).wait().reasons == ["length"]
        assert not any(each.reasons for each in (*requests, long))

    def test_one_sequence_of_several_is_cancelled(self, engine):
        request = Collected("hello", limit=500, count=2, parameters=DRAWN)
        engine.cancel(request.request, 0)
        request.submit(engine)
        wait_until(lambda: request.reasons)
        assert {d.sequence for d in request.deliveries} == {1}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prompt": []}, "no tokens"),
            ({"prompt": [257]}, "Token id 257 is outside the model's vocabulary of 257"),
            ({"prompt": [-1]}, "Token id -1"),
            ({"prompt": [1] * 4000, "limit": 97}, "4096 tokens. The prompt has 4000, and 97 are"),
            ({"prompt": [1], "limit": 0}, "limit"),
            ({"prompt": [1], "count": 5}, "count"),
            ({"prompt": [1], "stop_token_ids": (1,) * 9}, "At most 8 stop tokens"),
        ],
    )
    def test_what_can_never_be_served_is_refused(self, engine, options, message):
        with pytest.raises(ValueError, match=message):
            Collected(**options).submit(engine)

    def test_close_finishes_what_was_submitted(self, lm):
        with started(lm, max_sequences=1) as engine:
            requests = [Collected("hello", limit=400).submit(engine) for _ in range(3)]
        assert [each.reasons for each in requests] == [["length"]] * 3
        assert not engine.is_ready
        with pytest.raises(Closed):
            Collected("hello").submit(engine)

    def test_a_prompt_to_be_scored_does_not_stop_others_either(self, engine, monkeypatch):
        monkeypatch.setattr(scheduler, "RUN_SECONDS", 1e-3)  # so that there are many runs
        order = []
        running = Collected("hello", limit=3000, on_delivery=lambda d: order.append("running"))
        running.submit(engine)
        wait_until(lambda: order)
        scored = Collected("z" * 4000, 0, scores_prompt=True)
        scored._on_delivery = lambda d: order.append("scored")
        scored.submit(engine).wait()
        engine.cancel(running.request)
        assert order[: order.index("scored")].count("running") > 10


class TestGathering:
    """Before any text has begun, those that are read wait for others that are soon read."""

    @pytest.fixture(autouse=True)
    def one_block_a_visit(self, monkeypatch):
        monkeypatch.setattr(scheduler, "READING_SHARE", 0.0)

    def submit(self, engine, prompts, on_delivery, limit=12):
        requests = [Collected(p, limit=limit, on_delivery=on_delivery) for p in prompts]
        engine.submit([each.request for each in requests])
        return requests

    def test_those_who_come_together_begin_together(self, engine, lm, monkeypatch):
        monkeypatch.setattr(scheduler, "GATHERING_SECONDS", 1e6)
        running = []
        prompts = ["hello", "x" * 130, "you", "a longer prompt " * 20]
        requests = self.submit(engine, prompts, lambda d: running.append(engine.num_running))
        for prompt, request in zip(prompts, requests, strict=True):
            assert [request.tokens()] == alone(lm, prompt, **GREEDY)
        assert running[0] == 4

    def test_those_who_come_as_others_go_begin_together(self, engine, monkeypatch):
        """All find places at once: one that is cancelled has none any more."""
        monkeypatch.setattr(scheduler, "GATHERING_SECONDS", 1e6)
        running, requests = [], []

        def go(delivery):
            engine.cancel(gone.request)
            prompts = ["hello", "x" * 130, "you", "new to the cache " * 40]
            requests.extend(
                self.submit(engine, prompts, lambda d: running.append(engine.num_running))
            )

        gone = Collected("hello", limit=3000, on_delivery=go).submit(engine)
        wait_until(lambda: requests)
        for request in requests:
            request.wait()
        assert running[0] == 4

    def test_not_for_longer_than_they_may(self, engine, monkeypatch):
        monkeypatch.setattr(scheduler, "GATHERING_SECONDS", 0.0)
        running = []
        for each in self.submit(
            engine, ["hello", "you"], lambda d: running.append(engine.num_running)
        ):
            each.wait()
        assert running[0] == 1

    def test_not_for_a_prompt_that_takes_long(self, engine, monkeypatch):
        monkeypatch.setattr(scheduler, "GATHERING_SECONDS", 1e4)
        monkeypatch.setattr(engine._scheduler, "_block_seconds", dict.fromkeys(BLOCK_SIZES, 1e3))
        reading = []
        prompts = ["hello", "not known yet " * 250]  # of one block, and of 110
        requests = self.submit(engine, prompts, lambda d: reading.append(engine.num_reading))
        for each in requests:
            each.wait()
        assert reading[0] == 1

    def test_nobody_who_has_text_waits(self, engine, monkeypatch):
        monkeypatch.setattr(scheduler, "GATHERING_SECONDS", 1e6)
        monkeypatch.setattr(scheduler, "RUN_SECONDS", 1e-3)  # so that there are many runs
        order = []
        running = Collected("hello", limit=3000, on_delivery=lambda d: order.append("running"))
        running.submit(engine)
        wait_until(lambda: order)
        other = Collected("not known " * 64, limit=1, on_delivery=lambda d: order.append("other"))
        other.submit(engine).wait()
        engine.cancel(running.request)
        assert order[: order.index("other")].count("running") > 15

    def test_one_that_waits_can_be_cancelled(self, engine, monkeypatch):
        monkeypatch.setattr(scheduler, "GATHERING_SECONDS", 1e6)
        blocks, read = [], engine._scheduler._read_block
        may_go_on = threading.Event()

        def one_by_one(reading, size):
            read(reading, size)
            blocks.append(reading)
            if len(blocks) > 3:  # the short one has been read by now, the long one has not
                assert may_go_on.wait(timeout=60)

        monkeypatch.setattr(engine._scheduler, "_read_block", one_by_one)
        first, second = self.submit(engine, ["hello", "not read yet " * 300], None, limit=4)
        wait_until(lambda: len(blocks) > 3)
        assert (engine.num_running, engine.num_reading) == (1, 1)
        engine.cancel(first.request)
        may_go_on.set()
        second.wait()
        assert not first.deliveries
        wait_until(lambda: engine.num_running + engine.num_reading + engine.num_waiting == 0)


class TestFailures:
    def test_a_receiver_that_fails_ends_no_other(self, engine, lm):
        def fail(delivery):
            raise RuntimeError("gone")

        Collected("hello", limit=4000, on_delivery=fail).submit(engine)
        assert [Collected("you").submit(engine).tokens()] == alone(lm, "you", **GREEDY)
        wait_until(lambda: engine.num_running == 0)

    def test_a_prompt_that_cannot_be_read_ends_no_other(self, engine, lm, monkeypatch):
        generator, read = lm.make_generate_function(), lm.make_generate_function().read

        def failing(state, token_ids):
            if 13 in token_ids:
                raise RuntimeError("a crash")
            return read(state, token_ids)

        monkeypatch.setattr(generator, "read", failing)
        good = Collected("hello", limit=300).submit(engine)
        bad = Collected([13] * 80).submit(engine).wait()
        assert str(bad.errors[0]) == "a crash"
        assert [good.tokens()] == alone(lm, "hello", limit=300, **GREEDY)

    def test_after_a_crash_of_the_loop_it_goes_on(self, engine, lm, monkeypatch):
        advance, failures = Slots.advance, [RuntimeError("a crash")]

        def failing(self, *args):
            if failures:
                raise failures.pop()
            return advance(self, *args)

        monkeypatch.setattr(Slots, "advance", failing)
        lost = Collected("hello").submit(engine).wait()
        assert str(lost.errors[0]) == "a crash"
        assert [Collected("hello").submit(engine).tokens()] == alone(lm, "hello", **GREEDY)
        assert engine.is_ready

    def test_logits_that_are_not_finite_end_one_sequence(self, preset_folder):
        broken = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
        table = np.copy(ops.convert_to_numpy(broken.backbone.token_embedding.embeddings))
        table[13] = np.inf
        broken.backbone.token_embedding.embeddings.assign(table)
        broken.compile(sampler="greedy")
        with started(broken, max_sequences=1) as engine:
            bad = Collected([13, 13]).submit(engine).wait()
            assert "not finite" in str(bad.errors[0])
            assert engine.counts.failed == 1

    def test_when_it_cannot_begin_anew_all_are_told(self, lm, monkeypatch):
        with started(lm, max_sequences=1) as engine:

            def failing(*args):
                raise RuntimeError("a crash")

            monkeypatch.setattr(Slots, "advance", failing)
            monkeypatch.setattr(Slots, "reset", failing)
            requests = [Collected("hello").submit(engine) for _ in range(3)]
            for each in requests:
                assert str(each.wait().errors[0]) == "a crash"
            wait_until(lambda: not engine.is_ready)
            assert engine.failure is not None

    def test_too_little_memory_says_what_a_sequence_needs(self, lm):
        engine = Engine(lm, max_sequences=2**32, max_tokens=100)
        with pytest.raises(ValueError, match=r"no memory for 4294967296 sequences of 6,\d+ bytes"):
            engine.start()

    def test_block_size(self, lm):
        with pytest.raises(ValueError, match=r"one of \(512, 128, 64, 32, 16\)"):
            Engine(lm, block_size=7)


def test_many_threads_at_once(engine, lm):
    found = {}

    def ask(i):
        found[i] = Collected(PROMPTS[i % 6], seed=i % 6, parameters=DRAWN).submit(engine).tokens()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(6):
        assert [found[i]] == alone(lm, PROMPTS[i], seed=i, **DRAWN)
        assert found[i + 6] == found[i]
