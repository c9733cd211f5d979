"""Exported programs beside the model that they come from."""

import json
import pathlib
import shutil
import subprocess
import sys
from importlib.util import find_spec

import keras
import keras_hub
import numpy as np
import pytest

import keras_mamba2
from keras_mamba2 import FilterSampler
from keras_mamba2 import Mamba2CausalLM
from keras_mamba2 import ProgramState
from keras_mamba2.generation.decode import default_steps_a_write
from keras_mamba2.host.conversations import KIND
from keras_mamba2.ops.chunk_size import default_chunk_size
from keras_mamba2.ops.platform import compiling_for
from keras_mamba2.portable.manifest import own_sha256
from tests import reference

HERE = pathlib.Path(__file__).parent
PROMPTS = ["ROMEO: hello, you", "To be", "O", "Once upon a time"]


def model(preset_folder, **arguments):
    lm = Mamba2CausalLM.from_preset(str(preset_folder))
    lm.compile(**arguments)
    return lm


@pytest.fixture(scope="module")
def lm(preset_folder):
    return model(preset_folder)


@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "programs"
    lm.export_programs(folder, platforms=["cpu", "tpu"], batch_sizes=[2, 1])
    return folder


@pytest.fixture(scope="module")
def programs(folder):
    return keras_mamba2.load_programs(folder)


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": 1, "max_new_tokens": 20},  # by the sampler that the model was compiled with
        {"temperature": 0.0, "max_length": 30},
        {"seed": 2, "temperature": 1.5, "top_p": 0.9, "max_new_tokens": 20, "strip_prompt": True},
        {"seed": 3, "repetition_penalty": 1.3, "top_k": 9, "min_p": 0.01},
        {"seed": 4, "stop_strings": ["a", "\n"], "max_new_tokens": 30, "stop_token_ids": [7, 8]},
    ],
)
def test_the_text_is_that_of_the_model(lm, programs, arguments):
    expected = lm.generate(PROMPTS, **arguments)
    assert programs.generate(PROMPTS, **arguments) == expected  # in two batches of two
    assert programs.generate(PROMPTS[:1], **arguments) == expected[:1]
    assert programs.generate(PROMPTS[0], **arguments) == expected[0]


def test_long_prompts_of_different_lengths_share_a_batch(lm, programs):
    texts = ["abc " * 330, "To be " * 12]
    expected = lm.generate(texts, max_new_tokens=12, seed=5, strip_prompt=True)
    assert programs.generate(texts, max_new_tokens=12, seed=5, strip_prompt=True) == expected


def test_the_same_prompt_several_times_has_several_texts(lm, programs):
    expected = lm.generate(["To be"] * 3, max_new_tokens=20, seed=6)
    assert len(set(expected)) == 3
    assert programs.generate(["To be"] * 3, max_new_tokens=20, seed=6) == expected
    assert programs.generate("To be", max_new_tokens=20) != programs.generate(
        "To be", max_new_tokens=20
    )


def test_a_stream_is_the_text_in_pieces(programs):
    expected = programs.generate(PROMPTS[:2], max_new_tokens=40, seed=7, strip_prompt=True)
    pieces = list(programs.stream(PROMPTS[:2], max_new_tokens=40, seed=7))
    assert len(pieces) > 3
    assert ["".join(column) for column in zip(*pieces, strict=True)] == expected
    assert "".join(programs.stream(PROMPTS[0], max_new_tokens=40, seed=7)) == expected[0]


def test_token_ids_go_in_and_come_out(lm, programs):
    inputs = {
        "token_ids": np.array([[0, 5, 6, 7], [8, 9, 0, 0]]),
        "padding_mask": np.array([[0, 1, 1, 1], [1, 1, 0, 0]]),
    }
    expected = lm.generate(inputs, max_new_tokens=9, seed=8, stop_token_ids=None)
    found = programs.generate(inputs, max_new_tokens=9, seed=8, stop_token_ids=None)
    assert {name: rows.tolist() for name, rows in found.items()} == {
        name: rows.tolist() for name, rows in expected.items()
    }


def test_a_text_goes_on_from_its_state(lm, programs):
    state = programs.prefill(PROMPTS)
    assert state.batch_size == len(PROMPTS)
    expected = lm.generate([" and"] * 4, state=lm.prefill(PROMPTS), max_new_tokens=20, seed=9)
    for _ in range(2):  # the state stays as it was
        found = programs.generate([" and"] * 4, state=state, max_new_tokens=20, seed=9)
        assert found == expected
    alone = programs.generate(" and", state=state[2], max_new_tokens=20, seed=9)
    assert alone == expected[2]
    twice = programs.generate(["", ""], state=state[:1].repeat(2), max_new_tokens=20, seed=9)
    assert twice == lm.generate(
        ["", ""], state=lm.prefill(PROMPTS[:1]).repeat(2), max_new_tokens=20, seed=9
    )


def test_sessions_go_from_programs_to_the_model_and_back(lm, programs, tmp_path):
    sessions = [generator.start("ROMEO: hello") for generator in (lm, programs)]
    assert len({session.generate(" you", max_new_tokens=9, seed=1) for session in sessions}) == 1
    for i, session in enumerate(sessions):
        session.save(tmp_path / f"{i}.safetensors")
    resumed = [
        generator.resume(tmp_path / f"{i}.safetensors")
        for generator in (lm, programs)
        for i in range(2)
    ]
    assert len({session.text for session in resumed}) == 1
    assert len({session.generate(max_new_tokens=20, seed=2) for session in resumed}) == 1
    left, right = resumed[-1].fork(2)
    assert left.generate("a", max_new_tokens=5, seed=3) == right.generate(
        "a", max_new_tokens=5, seed=3
    )


@pytest.mark.parametrize("text", [b" you", [" you"], {"token_ids": [[1]]}, None, 3])
def test_what_is_no_string_leaves_a_session_as_it_is(lm, programs, text):
    for generator in (lm, programs):
        session = generator.start("ROMEO: hello")
        for call in (session.append, session.generate, session.stream, generator.start):
            with pytest.raises(ValueError, match="`text` must be a string"):
                call(text)
        assert session.text == "ROMEO: hello"
        options = {"max_new_tokens": 9, "seed": 1}
        assert session.generate(" you", **options) == lm.start(session.text[:12]).generate(
            " you", **options
        )


def test_documents_that_share_a_row_are_refused(lm, programs):
    """They would be read as one."""
    ids = np.array([[70, 71, 72, 73]])
    packed = {"token_ids": ids, "padding_mask": ids > 0, "segment_ids": [[1, 1, 2, 2]]}
    for generator in (lm, programs):
        for call in (generator.generate, generator.prefill):
            with pytest.raises(ValueError, match="no `segment_ids`"):
                call(packed)


def test_a_session_works_where_every_program_has_several_rows(lm, tmp_path):
    lm.export_programs(tmp_path / "programs", platforms=["cpu"], batch_sizes=[2])
    programs = keras_mamba2.load_programs(tmp_path / "programs")
    texts = []
    for generator in (lm, programs):
        session = generator.start("To be")
        texts.append(session.generate(max_new_tokens=9, seed=1, stop_strings="b"))
        texts[-1] += session.generate(" or", max_new_tokens=9, seed=2)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "sampler",
    [
        "greedy",
        FilterSampler(temperature=0.7, top_p=0.8, repetition_penalty=1.2),
        keras_hub.samplers.TopPSampler(p=0.9),
    ],
    ids=lambda sampler: getattr(sampler, "__class__", type(sampler)).__name__,
)
def test_the_sampler_is_the_default_and_its_parameters_may_be_others(
    preset_folder, tmp_path, sampler
):
    lm = model(preset_folder, sampler=sampler)
    lm.export_programs(tmp_path / "programs", platforms=["cpu"], batch_sizes=[1])
    programs = keras_mamba2.load_programs(tmp_path / "programs")
    for given in ({}, {"min_p": 0.02}):
        arguments = {"max_new_tokens": 20, "seed": 1, **given}
        assert programs.generate("To be", **arguments) == lm.generate("To be", **arguments)


def test_weights_inside_give_the_same_text(lm, programs, tmp_path):
    lm.export_programs(tmp_path / "inside", platforms=["cpu"], batch_sizes=[1], weights="inside")
    assert not (tmp_path / "inside" / "weights.safetensors").exists()
    inside = keras_mamba2.load_programs(tmp_path / "inside")
    arguments = {"max_new_tokens": 20, "seed": 1}
    assert inside.generate("To be", **arguments) == programs.generate("To be", **arguments)


@pytest.mark.parametrize(
    "variant",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8", "bfloat16", "lora")),
        "without tokenizer",
    ],
)
def test_models_are_exported_as_they_are(preset_folder, tmp_path, variant):
    options = {
        "bfloat16": {"dtype": "bfloat16"},
        "without tokenizer": {"preprocessor": None},
    }
    lm = Mamba2CausalLM.from_preset(str(preset_folder), **options.get(variant, {}))
    lm.compile(sampler="greedy")
    if variant == "int8":
        lm.quantize("int8")
    elif variant == "lora":
        lm.backbone.enable_lora(2)
        for weight in lm.backbone.trainable_weights:
            weight.assign(weight + 0.05)
    lm.export_programs(tmp_path / "programs", platforms=["cpu"], batch_sizes=[1])
    programs = keras_mamba2.load_programs(tmp_path / "programs")
    inputs = {"token_ids": np.array([[5, 6, 7]]), "padding_mask": np.ones((1, 3), bool)}
    arguments = {"max_new_tokens": 12, "stop_token_ids": None}
    expected = lm.generate(inputs, **arguments)["token_ids"]
    assert programs.generate(inputs, **arguments)["token_ids"].tolist() == expected.tolist()
    if variant == "without tokenizer":
        with pytest.raises(ValueError, match="exported without a tokenizer"):
            programs.generate("To be")


@pytest.mark.slow
def test_a_hybrid_makes_room_as_the_text_grows(byte_tokenizer, tmp_path):
    lm = Mamba2CausalLM(
        keras_mamba2.Mamba2HybridBackbone(
            vocabulary_size=257,
            hidden_dim=32,
            blocks=["mamba2", "attention", "mlp"],
            sublayers={
                "mamba2": {"state_dim": 8, "head_dim": 8, "chunk_size": 16},
                "attention": {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
                "mlp": {"intermediate_dim": 48},
            },
        ),
        keras_mamba2.Mamba2CausalLMPreprocessor(byte_tokenizer),
    )
    reference.randomize(lm.backbone)
    lm.compile(sampler=FilterSampler(temperature=0))
    lm.export_programs(tmp_path / "programs", platforms=["cpu", "tpu"], batch_sizes=[2])
    programs = keras_mamba2.load_programs(tmp_path / "programs")
    texts = ["To be, or not to be, that is the question. " * 5, "To be"]
    expected = lm.generate(texts, max_new_tokens=60)
    assert programs.generate(texts, max_new_tokens=60) == expected
    states = [programs.prefill(text) for text in texts * 3]
    assert {state.room for state in states} == {256}
    found = programs.generate([""] * 6, state=ProgramState.concatenate(states), max_new_tokens=60)
    assert [text + new for text, new in zip(texts * 3, found, strict=True)] == expected * 3
    session = programs.start(texts[0])
    session.generate(max_new_tokens=20)
    session.save(tmp_path / "session.safetensors")
    for generator in (lm, programs):
        resumed = generator.resume(tmp_path / "session.safetensors")
        resumed.generate(max_new_tokens=40)
        assert resumed.text == expected[0]


WITHOUT_KERAS = """
import sys
for name in ("keras", "keras_hub", "tensorflow", "torch", "grain"):
    sys.modules[name] = None  # imports of it fail, as if it was not installed
import keras_mamba2
programs = keras_mamba2.load_programs(sys.argv[1])
print(repr(programs.generate("To be", max_new_tokens=20, seed=1)))
assert hasattr(keras_mamba2, "load_programs") and not hasattr(keras_mamba2, "Mamba2CausalLM")
"""


def test_nothing_of_keras_is_imported(programs, folder):
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_KERAS, str(folder)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == repr(programs.generate("To be", max_new_tokens=20, seed=1))


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("libtpu"), reason="libtpu is not installed")
def test_the_compiler_of_tpus_takes_the_programs(folder, without_flags):
    """As they lie in the folder: it was exported here, where there is no TPU."""
    names = ("prefill_128_batch_2", "decode_batch_2", "decode_as_compiled_batch_1")
    files = [str(folder / "programs" / "tpu" / f"{name}.bin") for name in names]
    command = [sys.executable, str(HERE / "compile_for_tpu.py"), *files]
    result = subprocess.run(command, env=without_flags, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = [line.split() for line in result.stdout.splitlines()]
    assert [name for name, *_ in found] == list(names)
    weights = (folder / "weights.safetensors").stat().st_size
    assert all(int(arguments) > 0.9 * weights for _, arguments, _ in found)


def test_programs_are_what_is_fast_on_their_platform():
    for name, chunk_size, steps in (("cpu", 64, 1), ("tpu", 256, 12), ("cuda", 256, 1)):
        with compiling_for(name):
            assert (default_chunk_size(), default_steps_a_write(16)) == (chunk_size, steps)
    assert default_chunk_size() == 64


def test_what_is_not_as_it_was_written_is_named(folder, tmp_path):
    def copied(name, change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy / name)
        return copy

    def flip(file):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    def damaged_manifest(sealed=True, **changes):
        def change(file):
            content = {**json.loads(file.read_text()), **changes}
            if sealed:
                content["sha256"][file.name] = own_sha256(content)
            file.write_text(json.dumps(content))

        return copied("manifest.json", change)

    def run(folder):
        keras_mamba2.load_programs(folder).generate("To be", max_new_tokens=2, seed=1)

    for name in (
        "weights.safetensors",
        "tokenizer.json",
        "programs/cpu/prefill_16_batch_1.bin",
        "programs/cpu/decode_as_compiled_batch_1.bin",
    ):
        with pytest.raises(ValueError, match=f"{name} is damaged: its sha256"):
            run(copied(name, flip))
        with pytest.raises(ValueError, match=f"{name} is missing"):
            run(copied(name, lambda file: file.unlink()))
    with pytest.raises(ValueError, match="manifest.json is missing"):
        run(copied("manifest.json", lambda file: file.unlink()))
    with pytest.raises(ValueError, match="manifest.json is truncated or not JSON"):
        run(copied("manifest.json", lambda file: file.write_text('{"a":')))
    with pytest.raises(ValueError, match="format_version=2. Received: 99"):
        run(damaged_manifest(format_version=99))
    with pytest.raises(ValueError, match="manifest.json is damaged: it is not as it was written"):
        run(damaged_manifest(sealed=False, decode_capacity=756))
    for changes in (
        {"batch_sizes": "many"},
        {"batch_sizes": []},
        {"block_sizes": []},
        {"block_sizes": [8, 512]},
        {"state": [{}]},
        {"tokens": ["start", "end", "special"]},
        {"more": 1},
    ):
        with pytest.raises(ValueError, match="manifest.json is damaged: "):
            run(damaged_manifest(**changes))
    with pytest.raises(ValueError, match="calling convention.*Export it again"):
        run(damaged_manifest(calling_convention=99))
    with pytest.raises(ValueError, match="has programs for cuda, and JAX runs on cpu"):
        run(damaged_manifest(platforms=["cuda"]))
    # Programs for other platforms are not needed here.
    run(copied("programs/tpu", shutil.rmtree))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": ""}, "Prompt 0 has no tokens"),
        ({"inputs": []}, "batch of prompts is empty"),
        ({"inputs": 5}, "A prompt must be a string"),
        ({"inputs": "a", "max_length": 0}, "`max_length` must be a positive integer"),
        ({"inputs": "a", "max_length": 9, "max_new_tokens": 9}, "not both"),
        ({"inputs": "a" * 40}, "more than the total length of 32"),
        ({"inputs": "a", "temperature": -1}, "`temperature` must be"),
        ({"inputs": "a", "top_p": 2}, "`top_p` must be"),
        ({"inputs": "a", "seed": 1.5}, "`seed` must be an integer"),
        ({"inputs": "a", "stop_token_ids": [300]}, "`stop_token_ids` must be"),
        ({"inputs": "a", "stop_token_ids": range(9)}, "at most 8 stop tokens. Received: 9"),
        ({"inputs": "a", "stop_strings": ""}, "A stop string is empty"),
        ({"inputs": "a", "state": 5}, "`state` must be"),
        (
            {"inputs": {"token_ids": np.array([[300]]), "padding_mask": np.array([[1]])}},
            "token id 300, outside the model's vocabulary of 257",
        ),
        ({"inputs": {"token_ids": np.array([[3]])}}, "`padding_mask` is missing"),
        (
            {"inputs": {"token_ids": np.ones((1, 3), int), "padding_mask": np.ones((1, 4))}},
            r"must have one shape, .* padding_mask.shape=\(1, 4\)",
        ),
        ({"inputs": {"token_ids": np.ones(3, int), "padding_mask": np.ones(3)}}, "one shape"),
    ],
)
def test_bad_arguments_are_named(programs, arguments, message):
    with pytest.raises(ValueError, match=message):
        programs.generate(**arguments)


def test_a_state_in_the_middle_of_a_stream_stays_as_it_is(programs):
    stream = programs.stream(["To be"], max_new_tokens=40, stop_token_ids=None, seed=1)
    next(stream)
    state, length = stream.state, int(stream.state.length[0])
    assert len(list(stream)) > 1
    assert int(state.length[0]) == length
    programs.generate([""], state=state, max_new_tokens=2)


def test_states_and_streams_that_do_not_fit_are_named(programs, tmp_path):
    state = programs.prefill(["a", "b"])
    with pytest.raises(ValueError, match="The state has 2 rows, but there are 1"):
        programs.generate("c", state=state)
    with pytest.raises(ValueError, match="at most 2 texts at once.*Received: 3 texts"):
        programs.stream(["a", "b", "c"])
    programs.save_state(tmp_path / "two", state, "a")
    with pytest.raises(ValueError, match="two holds a state of 2 rows"):
        programs.resume(tmp_path / "two")
    with pytest.raises(ValueError, match="does not take `temprature`. Did you mean 'temperature'"):
        programs.start("a").generate("b", temprature=0.5)
    programs.save_state(tmp_path / "chat", state[:1], json.dumps({"kind": KIND}))
    with pytest.raises(ValueError, match="chat holds a conversation, not a text"):
        programs.resume(tmp_path / "chat")
    (tmp_path / "state.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is truncated, or not the file of a state"):
        programs.resume(tmp_path / "state.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"platforms": ["gpu"]}, "`platforms` must be"),
        ({"platforms": []}, "`platforms` is empty"),
        ({"batch_sizes": [0]}, "`batch_sizes` must be"),
        ({"batch_sizes": 3}, "`batch_sizes` must be"),
        ({"weights": "outside"}, "`weights` must be one of 'beside', 'inside'"),
        ({"folder": 5}, "`folder` must be a path"),
    ],
)
def test_bad_arguments_of_an_export_leave_nothing(lm, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        lm.export_programs(**{"folder": tmp_path / "programs", **arguments})
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_says_so(preset_folder, folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="BeamSampler searches with a loop of its own"):
        model(preset_folder, sampler="beam").export_programs(tmp_path / "programs")
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match="exists already and is not an empty folder"):
        model(preset_folder).export_programs(folder)
    assert sorted(folder.rglob("*")) == before
    lm = model(preset_folder)
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    with pytest.raises(ValueError, match="Keras runs on torch here. Set KERAS_BACKEND=jax"):
        lm.export_programs(tmp_path / "programs")
