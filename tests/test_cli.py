from typer.testing import CliRunner

from keras_mamba2.cli import app


def run(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


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
