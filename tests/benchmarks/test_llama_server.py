"""llama.cpp's server beside ours."""

import json
import shutil

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import llama_server
from benchmarks import serving


def run(*options):
    app = typer.Typer()
    app.command()(serving.main)
    return CliRunner().invoke(app, list(map(str, options)))


@pytest.fixture
def script(tmp_path):
    """Writes a program that is called as llama.cpp's server."""

    def script(text):
        path = tmp_path / "llama-server"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    return script


def test_a_binary_that_is_not_there_is_refused_before_anything_is_measured(tmp_path):
    file = tmp_path / "found.json"
    found = run("--llama-server", tmp_path / "none", "--file", file)
    assert found.exit_code == 2
    assert "does not run" in " ".join(found.output.replace("│", " ").split())
    assert not file.exists()


@pytest.mark.parametrize("text", ["echo hello", "echo version: 1; exit 3"])
def test_what_is_no_server_of_llama_cpp_is_refused(text, script):
    with pytest.raises(ValueError, match="tells of no llama.cpp. Expected: the binary `llama-ser"):
        llama_server.version(script(text))


def test_a_server_that_ends_at_its_start_says_why(script, preset_folder):
    import keras_mamba2

    lm = keras_mamba2.Mamba2CausalLM.from_preset(str(preset_folder))
    binary = script("echo no memory; exit 1")
    with (
        pytest.raises(RuntimeError, match="did not start:\nno memory"),
        llama_server.serving(binary, lm, max_sequences=2, max_tokens=64),
    ):
        pass


@pytest.mark.llama_cpp
@pytest.mark.skipif(not shutil.which("llama-server"), reason="no llama-server")
@pytest.mark.slow
def test_both_servers_are_measured(tmp_path):
    file = tmp_path / "found.json"
    options = ["--model", "mamba2_tiny_shakespeare", "--rounds", 1, "--file", file]
    options += ["--clients", 1, "--clients", 2, "--prompt-tokens", 16, "--new-tokens", 8]
    options += ["--long-prompt", 600, "--prefix-tokens", 600]
    found = run(*options, "--llama-server", shutil.which("llama-server"))
    assert found.exit_code == 0, found.output
    [model] = json.loads(file.read_text())["models"].values()
    for figures in model["llama_cpp"].values():
        ours, theirs = figures["server"], figures["llama_cpp"]
        assert figures["ratio"] == pytest.approx(ours["tokens_s"] / theirs["tokens_s"])
