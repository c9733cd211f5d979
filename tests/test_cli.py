import errno
import io
import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import keras_mamba2
from keras_mamba2.cli import app
from keras_mamba2.cli import main
from keras_mamba2.host.session import Mamba2Session
from keras_mamba2.serving import limits
from keras_mamba2.untrusted import shown
from tests.conversion.checkpoints import assert_same_weights
from tests.tasks import tiny_granite


def run_app(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def run(*arguments):
    return run_app("generate", *arguments)


def test_generate_prints_text_and_speed(preset_folder):
    options = ("--preset", preset_folder, "--max-new-tokens", 20, "--seed", 3)
    result = run("ROMEO:", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("ROMEO:")
    assert "tokens/s" in result.stderr
    assert run("ROMEO:", *options).stdout == result.stdout
    greedy = run("ROMEO:", *options, "--temperature", 0)
    assert greedy.exit_code == 0
    assert greedy.stdout != result.stdout


def test_errors_are_one_line():
    result = run("ROMEO:", "--preset", "mamba2_tiny_shakespear")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: Unknown preset 'mamba2_tiny_shakespear'")
    assert "Traceback" not in result.output


def test_a_session_goes_on_in_its_file(preset_folder, tmp_path):
    file = tmp_path / "session.safetensors"
    options = ("--preset", preset_folder, "--max-new-tokens", 10, "--seed", 3, "--state", file)
    first = run("ROMEO:", *options)
    assert first.exit_code == 0, first.output
    second = run(" But soft", *options)
    assert second.exit_code == 0, second.output
    assert second.stdout.startswith(first.stdout.removesuffix("\n") + " But soft")


def test_its_process_runs_without_what_it_does_not_use(preset_folder, tmp_path):
    """Which takes long to import. `sys.argv` is that of the installed command."""
    code = """
import atexit
import gc
import sys

atexit.register(lambda: print(gc.get_freeze_count()))  # of what is not searched at the end
from keras_mamba2.cli import app

for name in ("tensorflow", "tensorflow_text", "pandas", "matplotlib", "IPython", "torch"):
    assert sys.modules.get(name) is None, name
assert sys.modules.get("transformers") is None
assert gc.isenabled()
assert gc.get_freeze_count() > 100_000  # what was imported is never searched
for arguments in (
    ["generate", "to be", "--preset", sys.argv[1], "--max-new-tokens=5"],
    ["convert", sys.argv[1], sys.argv[2] + "/hf", "--to", "transformers"],
    ["convert", sys.argv[2] + "/hf", sys.argv[2] + "/keras"],
    ["inspect", sys.argv[2] + "/keras"],
):
    app(arguments, standalone_mode=False)
"""
    script = tmp_path / "keras-mamba2"
    script.write_text(code)
    command = [sys.executable, script, preset_folder, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("to be")
    assert int(result.stdout.split()[-1]) > 100_000


@pytest.mark.parametrize("speculation", [("--prompt-lookup",), ("--draft",)])
def test_proposed_tokens_change_no_text(preset_folder, speculation):
    options = ("to be", "--preset", preset_folder, "--max-new-tokens", 20, "--seed", 3)
    speculation += (preset_folder,) * (speculation == ("--draft",))
    speculative = run(*options, *speculation)
    assert speculative.exit_code == 0, speculative.output
    assert speculative.stdout == run(*options).stdout


def test_one_proposer_is_enough(preset_folder):
    result = run("to be", "--draft", preset_folder, "--prompt-lookup")
    assert result.exit_code == 2
    assert result.stderr == "error: Pass --draft or --prompt-lookup, not both.\n"


@pytest.mark.parametrize("to", ["keras", "transformers"])
def test_convert_there_and_back(preset_folder, tmp_path, to):
    result = run_app("convert", preset_folder, tmp_path / "new", "--to", to)
    assert result.exit_code == 0, result.output
    again = run_app("convert", tmp_path / "new", tmp_path / "again")
    assert again.exit_code == 0, again.output
    backbones = [
        keras_mamba2.Mamba2Backbone.from_preset(folder)
        for folder in (preset_folder, tmp_path / "again")
    ]
    assert_same_weights(*backbones)


def test_convert_to_another_dtype(preset_folder, tmp_path):
    result = run_app("convert", preset_folder, tmp_path / "new", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["config"]["dtype"]["config"]["name"] == "bfloat16"


def test_convert_keeps_the_dtype_of_the_files(preset_folder, tmp_path):
    narrow, again = tmp_path / "narrow", tmp_path / "again"
    run_app("convert", preset_folder, narrow, "--to", "transformers", "--dtype", "bfloat16")
    result = run_app("convert", narrow, again)
    assert result.exit_code == 0, result.output
    config = json.loads((again / "config.json").read_text())
    assert config["config"]["dtype"]["config"]["name"] == "bfloat16"


def test_an_unknown_dtype_is_one_line(preset_folder, tmp_path):
    result = run_app("convert", preset_folder, tmp_path / "new", "--dtype", "float17")
    assert result.exit_code == 2
    assert "float17" in result.output
    assert not (tmp_path / "new").exists()


def test_another_dtype_of_states_is_one_line(preset_folder):
    result = run_app("serve", preset_folder, "--state-dtype", "int4")
    assert result.exit_code == 2
    assert "state_dtype" in result.output


@pytest.mark.parametrize("variable", [None, "", " "])
def test_a_blank_key_of_a_server_is_one_line(preset_folder, monkeypatch, variable):
    options = ("--api-key", "") if variable is None else ()
    if variable is not None:
        monkeypatch.setenv("KERAS_MAMBA2_API_KEY", variable)
    result = run_app("serve", preset_folder, *options)
    assert_one_line(result, 2, "API keys must be a list of strings that are not blank")


def test_a_key_of_the_environment_is_one(preset_folder, monkeypatch):
    """Its words are no keys."""
    found = []

    def check(keys):
        found.extend(keys)
        raise ValueError("enough")

    monkeypatch.setattr(limits, "check_keys", check)
    monkeypatch.setenv("KERAS_MAMBA2_API_KEY", "my secret phrase")
    assert_one_line(run_app("serve", preset_folder), 2, "enough")
    assert found == ["my secret phrase"]


def test_a_pattern_of_hosts_is_one_line(preset_folder):
    result = run_app("serve", preset_folder, "--allowed-host", "api-*")
    assert_one_line(result, 2, "Received: 'api-*'")


def test_quantized_weights_keep_their_dtype(preset_folder, tmp_path):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.quantize("int8")
    lm.save_to_preset(tmp_path / "int8")
    told = run_app("inspect", tmp_path / "int8").stdout
    assert "quantized" in told
    assert f"{sum(w.nbytes for w in lm.backbone.get_weights()) / 1e6:.1f} MB" in told
    result = run("a", "--preset", tmp_path / "int8", "--dtype", "bfloat16")
    assert_one_line(result, 2, "holds quantized weights, which keep their dtypes. Leave out")
    assert run("a", "--preset", tmp_path / "int8", "--max-new-tokens", 2).exit_code == 0


def test_names_are_shown_as_they_are_and_steer_nothing(preset_folder, tmp_path):
    folder = shutil.copytree(preset_folder, tmp_path / "[models]" / "a:b:c x[/b]")
    assert str(folder) in run_app("inspect", folder).stdout
    config = json.loads((folder / "config.json").read_text())
    config["config"]["\x1b[2J"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    result = run_app("inspect", folder)
    assert_one_line(result, 2, "\N{REPLACEMENT CHARACTER}[2J")
    assert "\x1b" not in result.stderr


def test_ctrl_c_keeps_what_was_shown(preset_folder, tmp_path, monkeypatch):
    def interrupted(self, text="", **options):
        yield from itertools.islice(stream(self, text, **options), 3)
        raise KeyboardInterrupt

    stream = Mamba2Session.stream
    file = tmp_path / "session.safetensors"
    options = ("--preset", preset_folder, "--max-new-tokens", 50, "--state", file)
    with monkeypatch.context() as context:
        context.setattr(Mamba2Session, "stream", interrupted)
        result = run("ROMEO:", *options)
    assert result.exit_code == 130
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    assert lm.resume(file).text == result.stdout.removesuffix("\n")
    assert len(result.stdout) > len("ROMEO:")


def test_convert_leaves_nothing_half_done(preset_folder, tmp_path, monkeypatch):
    full = tmp_path / "full"
    full.mkdir()
    (full / "a").touch()
    result = run_app("convert", preset_folder, full)
    assert (result.exit_code, result.stderr) == (
        2,
        f"error: {full} exists already and is not an empty folder.\n",
    )

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(keras_mamba2.Mamba2CausalLM, "save_to_preset", fail)
    assert run_app("convert", preset_folder, tmp_path / "new").exit_code != 0
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_export_programs_writes_what_is_loaded(preset_folder, tmp_path):
    folder = tmp_path / "programs"
    options = ("--platform", "cpu", "--batch-size", 1, "--temperature", 0)
    result = run_app("export-programs", preset_folder, folder, *options)
    assert result.exit_code == 0, result.output
    assert result.stderr.rstrip().endswith("MB")
    programs = keras_mamba2.load_programs(folder)
    assert programs.batch_sizes == (1,)
    text = programs.generate("To be", max_new_tokens=9)
    greedy = ("--preset", preset_folder, "--temperature", 0, "--max-new-tokens", 9)
    assert run("To be", *greedy).stdout == text + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "exists already and is not an empty folder"),
        (("--platform", "gpu"), "`--platform` must be a sequence of values, each one of 'cpu'"),
        (("--top-p", 0), "`top_p` must be"),
    ],
)
def test_bad_options_of_an_export_are_named_before_weights_are_fetched(tmp_path, options, message):
    if not options:
        (tmp_path / "programs").mkdir()
        (tmp_path / "programs" / "mine").touch()
    result = run_app("export-programs", "no_such_preset", tmp_path / "programs", *options)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.fixture(scope="module")
def programs_folder(preset_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "programs"
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.compile(sampler=keras_mamba2.FilterSampler(temperature=0.8, top_p=0.95))
    lm.export_programs(folder, platforms=["cpu"], batch_sizes=[1])
    return folder


def test_programs_give_the_text_of_the_model(programs_folder, preset_folder, tmp_path):
    """Stopped, drawn and greedy, and in a session that either goes on with."""
    for options in (("--temperature", 0), ("--seed", 3), ("--seed", 4, "--stop", "a")):
        options = ("--max-new-tokens", 12, *options)
        result = run_app("run-programs", programs_folder, "ROMEO:", *options)
        assert result.exit_code == 0, result.output
        assert result.stdout == run("ROMEO:", "--preset", preset_folder, *options).stdout
        assert "characters/s" in result.stderr
    options = ("--max-new-tokens", 10, "--temperature", 0, "--state", tmp_path / "a.safetensors")
    first = run_app("run-programs", programs_folder, "ROMEO:", *options)
    assert first.exit_code == 0, first.output
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    second = run_app("run-programs", programs_folder, " But soft", *options)
    other = ("--preset", preset_folder, *options[:-1], tmp_path / "b.safetensors")
    assert second.stdout == run(" But soft", *other).stdout
    assert second.stdout.startswith(first.stdout.removesuffix("\n") + " But soft")


def test_programs_run_without_keras(programs_folder, tmp_path):
    """Though it is installed. `sys.argv` is that of the installed command."""
    code = """
import sys
from keras_mamba2.cli import app

app(standalone_mode=False)
assert not [name for name in ("keras", "keras_hub", "tensorflow") if sys.modules.get(name)]
"""
    script = tmp_path / "keras-mamba2"
    script.write_text(code)
    command = [sys.executable, script, "run-programs", programs_folder, "to be", "--seed=1"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = run_app("run-programs", programs_folder, "to be", "--seed", 1)
    assert result.stdout == expected.stdout


@pytest.mark.slow
def test_a_stdout_that_lacks_a_character(programs_folder, tmp_path):
    command = [sys.executable, "-m", "keras_mamba2.cli", "run-programs", programs_folder]
    command += ["ROMEO \u2192", "--state", tmp_path / "session"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    result = subprocess.run(list(map(str, command)), capture_output=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(b"ROMEO ?")
    assert (tmp_path / "session").exists()


def test_pipes_are_utf_8_also_on_windows(monkeypatch):
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    for name in ("stdin", "stdout"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    main()
    assert (sys.stdin.encoding, sys.stdout.encoding) == ("utf-8", "utf-8")
    print("\udcff", flush=True)
    assert sys.stdout.buffer.getvalue() == b"?\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{preset}", "to be"), "manifest.json"),
        (("{folder}/nowhere", "to be"), "nowhere"),
        (("{folder}", ""), "no tokens"),
        (("{folder}", "ROMEO\udcff"), "`prompt` must be UTF-8"),
        (("{folder}", "to be", "--state", "/"), "/ is not a file"),
    ],
)
def test_what_is_wrong_with_programs_is_one_line(programs_folder, preset_folder, arguments, words):
    names = {"folder": programs_folder, "preset": preset_folder}
    arguments = [argument.format(**names) for argument in arguments]
    assert_one_line(run_app("run-programs", *arguments), 2, words)


def test_inspect_tells_sizes_without_weights(preset_folder, tmp_path):
    backbone = keras_mamba2.Mamba2Backbone.from_preset(preset_folder)
    result = run_app("inspect", preset_folder)
    assert result.exit_code == 0, result.output
    assert f"{backbone.count_params():,}" in result.stdout
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder, preprocessor=None)
    lm.export_to_transformers(tmp_path / "new")
    (tmp_path / "new" / "model.safetensors").unlink()
    result = run_app("inspect", tmp_path / "new")
    assert f"{backbone.count_params():,}" in result.stdout
    assert "none:" in result.stdout  # no tokenizer
    result = run_app("inspect", "mamba2_tiny_shakespear")
    assert (result.exit_code, "Did you mean" in result.stderr) == (2, True)


def assert_one_line(result, code, words):
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["generate", "convert", "inspect"])
def test_a_folder_in_the_place_of_a_file_is_one_line(command, preset_folder, tmp_path):
    folder = shutil.copytree(preset_folder, tmp_path / "copy")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    arguments = {
        "generate": ["a", "--preset", folder],
        "convert": [folder, tmp_path / "new"],
        "inspect": [folder],
    }
    assert_one_line(run_app(command, *arguments[command]), 2, "config.json is not a file")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("ROMEO\udcff", (), "`prompt` must be UTF-8. Received: b'ROMEO\\xff'"),
        ("ROMEO", ("--stop", "\udcff"), "`--stop` must be UTF-8"),
        ("ROMEO", ("--preset", "\udcff"), "Unknown preset"),
        ("ROMEO", ("--preset", ""), "The name of a preset is empty"),
        ("ROMEO", ("--state", "/"), "/ is not a file: it is a folder"),
    ],
)
def test_what_cannot_be_meant_is_one_line(prompt, options, words, preset_folder):
    assert_one_line(run(prompt, "--preset", preset_folder, *options), 2, words)


def test_a_negative_seed_is_refused(preset_folder):
    result = run("ROMEO", "--preset", preset_folder, "--seed", "-1")
    assert result.exit_code == 2
    assert "Invalid value for '--seed'" in result.stderr


def test_a_full_disk_is_one_line(preset_folder, tmp_path, monkeypatch):
    def fail(self, folder):
        (folder / "model.weights.h5").write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(keras_mamba2.Mamba2CausalLM, "save_to_preset", fail)
    result = run_app("convert", preset_folder, tmp_path / "new")
    assert_one_line(result, 1, f"No space left on device {tmp_path / 'new'} was not written.")
    assert not list(tmp_path.iterdir())


def test_a_session_that_cannot_be_written_is_one_line(preset_folder):
    options = ("--max-new-tokens", 3, "--state", "/proc/nowhere/session.safetensors")
    result = run("ROMEO", "--preset", preset_folder, *options)
    assert_one_line(result, 1, "/proc/nowhere")


@pytest.fixture(scope="module")
def granite_folder(tmp_path_factory):
    return tiny_granite.save(tmp_path_factory.mktemp("granite"))


def chat(folder, *lines, options=()):
    arguments = ["chat", str(folder), "--max-new-tokens", "6", *map(str, options)]
    return CliRunner().invoke(app, arguments, input="".join(f"{line}\n" for line in lines))


def test_chat_holds_a_conversation(granite_folder, tmp_path):
    file = tmp_path / "chat.safetensors"
    result = chat(
        granite_folder,
        *("Hello?", "And now?", "/undo", "/fork", "And now?", f"/save {file}"),
        options=("--system", "Be brief."),
    )
    assert result.exit_code == 0, result.output
    assert result.stderr.count("tokens/s") == 3
    assert "remembered" in result.stderr
    lm = keras_mamba2.Mamba2CausalLM.from_preset(granite_folder)
    messages = lm.resume_chat(file).messages
    assert [message["role"] for message in messages] == [
        *("system", "user", "assistant", "user", "assistant")
    ]
    first, second = messages[2]["content"], messages[4]["content"]
    assert first == lm.chat(messages[:2], max_new_tokens=6)
    # The last turn is taken back and asked again of a copy: greedy, it is the same.
    assert result.stdout == "".join(f"{shown(reply)}\n" for reply in (first, second, second))
    resumed = chat(granite_folder, "/undo", "And now?", options=("--load", file))
    assert resumed.exit_code == 0, resumed.output
    assert resumed.stdout == f"{shown(second)}\n"


def test_chat_errors_are_one_line(granite_folder, preset_folder):
    result = chat(preset_folder, "Hello?")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: This model has no chat template")
    result = chat(granite_folder, "Hello?", options=("--system", "a", "--load", __file__))
    assert "--system or --load, not both" in result.stderr
    result = chat(granite_folder, "Hello?", options=("--load", "missing"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "'missing' does not exist" in result.stderr


def test_chat_refuses_options_before_it_reads_weights(granite_folder, monkeypatch):
    monkeypatch.delattr("keras_mamba2.conversion.preset_loader.CheckpointLoader._fill")
    result = chat(granite_folder, options=("--top-p", 0))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "top_p=0" in result.stderr


def test_chat_has_no_room_in_a_small_context(granite_folder):
    result = chat(granite_folder, "Hello?", options=("--max-context", 9))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "max_context=9" in result.stderr
