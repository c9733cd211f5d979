"""Small tokenizers with the settings that those of the families of hybrids have."""

import functools
import json

import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors

SAMPLE = [
    "To be, or not to be: that is the question. Être ou ne pas être, 日本語 日本, 🤷🏽 " * 4,
    "def f(x):\n    return {'a': [1, 22, 333, 4444]}\n\n\n" * 4,
    "We'll say: I'm here! They've gone... <|user|> HelloWorld camelCase\t\r\n" * 4,
]
# Of tiktoken's cl100k_base, in Llama 3 and Granite 4; and as in Mistral's Tekken, in Nemotron.
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_by(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def beginning_with(token, *, of):
    return processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{token} $A",
                pair=f"{token} $A {token}:1 $B:1",
                special_tokens=[(token, of.token_to_id(token))],
            ),
        ]
    )


def byte_level(pre_tokenizer, special, plain=(), normalizer=None, merges=200):
    engine = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    engine.pre_tokenizer = pre_tokenizer
    engine.decoder = decoders.ByteLevel()
    if normalizer is not None:
        engine.normalizer = normalizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + len(special) + merges,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(SAMPLE, trainer)
    engine.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in plain])
    return engine


def granite():
    roles = ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|pad|>"]
    return byte_level(split_by(CL100K), roles, ["<tool_call>", "</tool_call>", "<think>"])


def nemotron():
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    engine = byte_level(split_by(TEKKEN), special, ["<think>", "</think>"])
    engine.post_processor = beginning_with("<s>", of=engine)
    return engine


def falcon_h1():
    """Digits in threes, punctuation apart."""
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(tokenizers.Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    return byte_level(pre_tokenizer, special, normalizer=normalizers.NFC())


def bamba():
    """That of Llama 3."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    engine = byte_level(split_by(CL100K), special)
    engine.post_processor = beginning_with("<|begin_of_text|>", of=engine)
    return engine


def zamba2():
    """That of Mistral: from sentencepiece, with bytes for what is not in the vocabulary."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=150, limit_alphabet=40, show_progress=False)
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(SAMPLE, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(model["vocab"], key=model["vocab"].get)
    engine = tokenizers.Tokenizer(
        models.BPE(
            {token: id for id, token in enumerate(tokens)},
            [tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    engine.normalizer = trained.normalizer
    engine.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    engine.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    engine.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return engine


def metaspace():
    """The newer form of the same: a blank before the first word alone."""
    engine = zamba2()
    engine.normalizer = None
    engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return engine


# With what tokenizer_config.json says of each.
FAMILIES = {
    "granite": (
        granite,
        {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"},
    ),
    "nemotron": (
        nemotron,
        {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"},
    ),
    "falcon_h1": (falcon_h1, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}),
    "bamba": (bamba, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}),
    "zamba2": (zamba2, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "metaspace": (metaspace, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
}


@functools.cache
def trained(family):
    """The file of its tokenizer, as text: training takes a moment."""
    return FAMILIES[family][0]().to_str()


def save(family, folder, **config):
    """Writes the files of a checkpoint's tokenizer. `config` is added to its configuration."""
    tokenizers.Tokenizer.from_str(trained(family)).save(str(folder / "tokenizer.json"))
    tokens = FAMILIES[family][1]
    config = {**tokens, "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
