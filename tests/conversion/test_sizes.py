"""The named presets: sizes as published, the same in their cards and in the README."""

import pathlib
import re

import pytest

import keras_mamba2
from keras_mamba2.conversion import constructor_arguments
from keras_mamba2.conversion import describe
from keras_mamba2.preset_files import Preset
from keras_mamba2.preset_files import named_presets
from keras_mamba2.preset_files import read_json

README = pathlib.Path(__file__).parents[2] / "README.md"

# As published with the checkpoints: what their files hold, counted by the hub or by llama.cpp.
PUBLISHED = {
    "mamba2_130m_en": 128_989_632,
    "mamba2_370m_en": 368_346_624,
    "mamba2_780m_en": 780_161_280,
    "mamba2_1.3b_en": 1_343_757_312,
    "mamba2_2.7b_en": 2_702_599_680,
    "mamba2_codestral_7b": 7_285_403_648,
    "granite_4.0_h_350m": 340_332_224,
    "granite_4.0_h_micro": 3_191_396_096,
    "granite_4.0_h_tiny": 6_939_037_248,
    "granite_4.0_h_small": 32_207_337_984,
    "falcon_h1_0.5b": 521_411_104,
    "falcon_h1_1.5b": 1_554_863_488,
    "falcon_h1_7b": 7_585_654_880,
    "nemotron_h_8b": 8_100_852_736,
    "nemotron_3_nano_30b_a3b": 31_577_940_288,
    "zamba2_1.2b": 1_215_064_704,
    "zamba2_2.7b": 2_662_214_560,
}
# Published in billions alone, with so many digits.
PUBLISHED_BILLIONS = {
    "granite_4.0_h_1b": "1.5",
    "nemotron_h_4b": "4.49",
    "bamba_9b": "9.78",
    "mamba2attn_2.7b": "2.7",
}
# The billions that a token uses, as published.
PUBLISHED_USED = {
    "granite_4.0_h_tiny": "1",
    "granite_4.0_h_small": "9",
    "nemotron_3_nano_30b_a3b": "3.6",
}
ELSEWHERE = {
    name: folder for name, folder in named_presets().items() if (folder / "sources.json").is_file()
}
FOLDERS = {n: folder for n, folder in ELSEWHERE.items() if (folder / "config.json").is_file()}
# Published in billions too, the architecture only with the weights.
WITH_THE_WEIGHTS = {"falcon_h1_3b": "3", "zamba2_7b": "7.4"}
BASES = [name for name in FOLDERS if name.startswith("granite") and name.endswith("_base")]


def rounded(count, published):
    """In billions, with the digits of `published`."""
    return f"{count / 1e9:.{len(published.partition('.')[2])}f}"


def test_every_preset_with_published_weights_is_measured():
    assert {*PUBLISHED, *PUBLISHED_BILLIONS, *BASES} == set(FOLDERS)
    assert set(WITH_THE_WEIGHTS) == set(ELSEWHERE) - set(FOLDERS)


@pytest.mark.parametrize("name", [*PUBLISHED, *PUBLISHED_BILLIONS])
def test_named_presets_are_the_published_models(name):
    described = describe(name)
    count, *used = (
        int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", described["parameters"])
    )
    if name in PUBLISHED:
        assert count == PUBLISHED[name]
    else:
        assert rounded(count, PUBLISHED_BILLIONS[name]) == PUBLISHED_BILLIONS[name]
    if name in PUBLISHED_USED:
        assert [rounded(n, PUBLISHED_USED[name]) for n in used] == [PUBLISHED_USED[name]]
    else:
        assert not used
    assert described["tokenizer"] == read_json(FOLDERS[name] / "sources.json")["tokenizer"]
    metadata = keras_mamba2.Mamba2CausalLM.presets[name]["metadata"]
    assert metadata["params"] == count
    card = (FOLDERS[name] / "README.md").read_text()
    assert f"| parameters | {described['parameters']} |" in card
    assert f"| state | {described['state']} |" in card
    assert f"{2 * count / 1e9:.2f} GB in bfloat16, {4 * count / 1e9:.2f} GB in float32" in card


@pytest.mark.parametrize("name", BASES)
def test_a_base_model_has_the_shape_of_the_one_that_was_tuned(name):
    tuned = FOLDERS[name.removesuffix("_base")]
    assert Preset(name).config == read_json(tuned / "config.json")
    metadata = [read_json(folder / "metadata.json") for folder in (FOLDERS[name], tuned)]
    assert metadata[0]["params"] == metadata[1]["params"]
    cards = [(folder / "README.md").read_text() for folder in (FOLDERS[name], tuned)]
    for row in ("parameters", "weights", "state"):
        lines = [re.search(rf"^\| {row} \|.*$", card, re.MULTILINE)[0] for card in cards]
        assert lines[0] == lines[1]


def test_what_is_described_of_each_kind_is_how_often_it_is_there():
    described = describe("zamba2_2.7b")
    names = ("mamba2", "transformer_0", "transformer_1")
    assert [described[name].split()[0] for name in names] == ["54", "5", "4"]


def test_hybrids_are_presets_of_their_own_class_too():
    hybrids = keras_mamba2.Mamba2HybridBackbone.presets
    of_blocks = {name for name in FOLDERS if "blocks" in constructor_arguments(Preset(name).config)}
    assert set(hybrids) == of_blocks | set(WITH_THE_WEIGHTS)
    assert set(hybrids) < set(keras_mamba2.Mamba2CausalLM.presets)


def alternatives(names):
    """`"a_{b,c}"` -> `["a_b", "a_c"]`."""
    before, brace, rest = names.partition("{")
    if not brace:
        return [names]
    inside, _, after = rest.partition("}")
    return [name for part in inside.split(",") for name in alternatives(before + part + after)]


def test_the_readme_lists_every_preset_with_its_size():
    listed = {}
    for row in re.findall(r"^\| `(\w\S*)` \| (.*?) \|", README.read_text(), re.MULTILINE):
        names, sizes = alternatives(row[0]), row[1].split(", ")
        times = len(names) // len(sizes)  # with and without `_base`
        listed |= dict(zip(names, [size for size in sizes for _ in range(times)], strict=True))
    assert set(listed) == set(named_presets())
    for name in FOLDERS:
        count = read_json(FOLDERS[name] / "metadata.json")["params"]
        size = f"{count / 1e6:.0f}M" if count < 1e9 else f"{count / 1e9:#.3g}B"
        assert listed[name].split()[0] == size
    for name, size in WITH_THE_WEIGHTS.items():
        assert listed[name] == f"{size}B"
