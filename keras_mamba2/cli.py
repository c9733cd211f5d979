"""`keras-mamba2`: text from the command line."""

import os
import sys
import time
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Mamba-2 language models in Keras."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    preset: Annotated[
        str, typer.Option(help="The name of a preset, or a folder.")
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

    try:
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
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(code=2) from None
    print(prompt + text)
    count = len(lm.preprocessor.tokenizer(text))
    print(f"{count} tokens, {count / seconds:.0f} tokens/s", file=sys.stderr)
