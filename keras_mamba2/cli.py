"""`keras-mamba2`: text, conversion and inspection from the command line."""

import contextlib
import enum
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


class Format(enum.StrEnum):
    keras = "keras"
    transformers = "transformers"


@app.callback()
def main() -> None:
    """Mamba-2 language models in Keras."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def errors_on_one_line() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(code=2) from None


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    preset: Annotated[
        str, typer.Option(help="The name of a preset, a folder, or hf://user/name.")
    ] = "mamba2_tiny_shakespeare",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens at most.")] = 300,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Below 1 safer, above 1 wilder; 0 is greedy.")
    ] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample among the likeliest that sum to this.")
    ] = 0.95,
    seed: Annotated[int | None, typer.Option(help="Makes the text reproducible.")] = None,
) -> None:
    """Continues a prompt: the text to stdout, the speed to stderr."""
    import keras_hub

    from keras_mamba2 import Mamba2CausalLM

    with errors_on_one_line():
        lm = Mamba2CausalLM.from_preset(preset)
        if temperature == 0:
            sampler = keras_hub.samplers.GreedySampler()
        else:
            sampler = keras_hub.samplers.TopPSampler(p=top_p, temperature=temperature, seed=seed)
        lm.compile(sampler=sampler)
        # The first token compiles the programs, which is not part of the speed.
        lm.generate(prompt, max_new_tokens=1)
        begun = time.perf_counter()
        text = lm.generate(prompt, max_new_tokens=max_new_tokens, strip_prompt=True)
        seconds = time.perf_counter() - begun
    print(prompt + text)
    count = len(lm.preprocessor.tokenizer(text))
    print(f"{count} tokens, {count / seconds:.0f} tokens/s", file=sys.stderr)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="The name of a preset, a folder, or hf://user/name.")
    ],
    folder: Annotated[pathlib.Path, typer.Argument(help="Where to write; must not exist yet.")],
    to: Annotated[Format, typer.Option(help="The format to write.")] = Format.keras,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights, such as bfloat16. float32 if not given.")
    ] = None,
    tokenizer: Annotated[bool, typer.Option(help="Whether to convert the tokenizer too.")] = True,
) -> None:
    """Converts a checkpoint. The folder appears when it is complete, or not at all."""
    from keras_mamba2 import Mamba2CausalLM
    from keras_mamba2.atomic_files import atomic_folder

    with errors_on_one_line(), atomic_folder(folder) as temporary:
        preprocessor = {} if tokenizer else {"preprocessor": None}
        lm = Mamba2CausalLM.from_preset(source, dtype=dtype, **preprocessor)
        if to is Format.keras:
            lm.save_to_preset(temporary)
        else:
            lm.export_to_transformers(temporary)
    print(f"{folder}: {lm.backbone.count_params():,} parameters, {to} format", file=sys.stderr)


@app.command()
def inspect(
    source: Annotated[
        str, typer.Argument(help="The name of a preset, a folder, or hf://user/name.")
    ],
) -> None:
    """Prints what a checkpoint is and how much memory it takes, without loading its weights."""
    import rich.console
    import rich.table

    from keras_mamba2.conversion import describe

    with errors_on_one_line():
        table = rich.table.Table(box=None, show_header=False)
        for name, value in describe(source).items():
            table.add_row(name, value)
        rich.console.Console(soft_wrap=True).print(table)
