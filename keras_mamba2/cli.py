"""`keras-mamba2`: text, conversations, conversion and inspection from the command line."""

import contextlib
import enum
import io
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Annotated
from typing import Any

import typer

from keras_mamba2.command_process import RUN_PROGRAMS
from keras_mamba2.compiled_folder import VARIABLE
from keras_mamba2.compiled_folder import keep_programs
from keras_mamba2.untrusted import shown

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


API_KEY = "KERAS_MAMBA2_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


class Format(enum.StrEnum):
    keras = "keras"
    transformers = "transformers"


class Weights(enum.StrEnum):
    beside = "beside"
    inside = "inside"


Dtype = Annotated[
    str, typer.Option(help="Of the weights, such as bfloat16. auto: that of the files.")
]


Stop = Annotated[list[str] | None, typer.Option(help="Text to stop before; repeatable.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Makes the text reproducible.")]
SessionFile = Annotated[
    pathlib.Path | None,
    typer.Option(help="A session's file: goes on from it if it is there, and is written."),
]
Draft = Annotated[
    str | None,
    typer.Option(help="A smaller preset that proposes tokens: the same text, sooner."),
]
PromptLookup = Annotated[
    bool, typer.Option("--prompt-lookup", help="Propose tokens from the text before.")
]

CompilationCache = Annotated[
    str | None,
    typer.Option(
        envvar=VARIABLE,
        help="A folder where compiled programs are kept, or off. Default: one in the user's "
        "cache folder, of 1 GB at most.",
    ),
]


def speculation_of(draft: str | None, prompt_lookup: bool, dtype: str):
    """Who proposes tokens, as the options say."""
    import keras_mamba2

    if draft is not None and prompt_lookup:
        raise ValueError("Pass --draft or --prompt-lookup, not both.")
    if draft is not None:
        return keras_mamba2.DraftModel(keras_mamba2.Mamba2CausalLM.from_preset(draft, dtype=dtype))
    return keras_mamba2.PromptLookup() if prompt_lookup else None


@app.callback()
def main() -> None:
    """Mamba-2 language models in Keras."""
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            # On Windows a pipe or a file has another encoding, which lacks most characters.
            is_chosen = stream.isatty() or "PYTHONIOENCODING" in os.environ
            stream.reconfigure(encoding=None if is_chosen else "utf-8", errors=errors)


@contextlib.contextmanager
def errors_on_one_line() -> Iterator[None]:
    """One line on stderr, and exit code 2 for what was asked, 1 for what the disk says."""
    try:
        yield
    except BrokenPipeError:  # whoever reads the text has gone: `| head`
        raise
    except (OSError, ValueError) as error:
        line = " ".join(" ".join([str(error), *getattr(error, "__notes__", ())]).split())
        print(f"error: {shown(line)}".encode(errors="replace").decode(), file=sys.stderr)
        raise typer.Exit(code=1 if isinstance(error, OSError) else 2) from None


def check_text(name: str, text: str) -> None:
    """Raises for bytes that are no UTF-8: Python hands them over as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = text.encode(errors="surrogateescape")
        raise ValueError(f"`{name}` must be UTF-8. Received: {shown!r}") from None


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
    min_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Drop what is this much less likely.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(min=1.0, help="Above 1: fewer.")] = 1.0,
    stop: Stop = None,
    seed: Seed = None,
    state: SessionFile = None,
    draft: Draft = None,
    prompt_lookup: PromptLookup = False,
    dtype: Dtype = "auto",
    compilation_cache: CompilationCache = None,
) -> None:
    """Continues a prompt: the text to stdout as it comes, the speed to stderr."""
    import keras

    from keras_mamba2 import FilterSampler
    from keras_mamba2 import Mamba2CausalLM

    with errors_on_one_line():
        check_texts(prompt, stop)
        keep_programs(compilation_cache)
        speculation = speculation_of(draft, prompt_lookup, dtype)
        sampler = FilterSampler(
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )

        def prepare(lm: Mamba2CausalLM) -> None:
            lm.compile(sampler=sampler, speculation=speculation)
            if lm.preprocessor is None:
                raise ValueError(f"{preset} has no tokenizer, and a prompt is text.")
            if speculation is None and keras.config.backend() == "jax":
                # While the weights are read.
                [tokens] = lm.preprocessor.prompts([prompt], continued=False)
                lm.warm_up(prompt_lengths=max(len(tokens), 1), wait=False)

        lm = Mamba2CausalLM.from_preset(preset, dtype=dtype, on_built=prepare)
        if state is not None and state.exists():
            session = lm.resume(state)
        else:
            session, prompt = lm.start(prompt), ""
        if speculation is not None:  # which compiles more than the first token needs
            tokens = lm.preprocessor.tokenizer(session.text + prompt)
            lm.warm_up(prompt_lengths=max(len(tokens), 1))
        options = {"max_new_tokens": max_new_tokens, "stop_strings": stop or (), "seed": seed}
        with kept(session, state):
            text, seconds = print_more(session, prompt, options)
    count = len(lm.preprocessor.tokenizer(text))
    print(f"{count} tokens, {count / seconds:.0f} tokens/s", file=sys.stderr)


def check_texts(prompt: str, stop: list[str] | None) -> None:
    check_text("prompt", prompt)
    for text in stop or ():
        check_text("--stop", text)


@contextlib.contextmanager
def kept(session, file: pathlib.Path | None) -> Iterator[None]:
    """Writes a session to its file at the end; after Ctrl-C too, as far as its text was shown."""
    before = session.text
    try:
        yield
    except KeyboardInterrupt:
        if file is not None and session.text != before:
            session.save(file)
        raise
    if file is not None:
        session.save(file)


def print_more(session, prompt: str, options: dict[str, Any]) -> tuple[str, float]:
    """Continues a session as its text is printed. Returns the new text, and the time it took."""
    safe = shown if sys.stdout.isatty() else str
    print(safe(session.text + prompt), end="", flush=True)
    # The first token compiles the programs, which is not part of the speed.
    session.lm.generate(prompt, state=session.state, max_new_tokens=1)
    begun, text = time.perf_counter(), ""
    with contextlib.closing(session.stream(prompt, **options)) as pieces:
        for piece in pieces:
            print(safe(piece), end="", flush=True)
            text += piece
    print()
    return text, time.perf_counter() - begun


@app.command()
def chat(
    preset: Annotated[
        str, typer.Argument(help="The name of a preset, a folder, or hf://user/name.")
    ],
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the first turn.")
    ] = None,
    load: Annotated[
        pathlib.Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="A conversation that /save wrote, to go on with."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="How many tokens a reply has at most.")
    ] = None,
    max_context: Annotated[
        int | None, typer.Option(min=1, help="How many the whole conversation has at most.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Below 1 safer, above 1 wilder; 0 is greedy.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample among so many of the likeliest.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Sample among the likeliest that sum to this."),
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Drop what is this much less likely.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(min=1.0, help="Above 1: fewer.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the replies reproducible.")] = None,
    draft: Draft = None,
    prompt_lookup: PromptLookup = False,
    dtype: Dtype = "auto",
    compilation_cache: CompilationCache = None,
) -> None:
    """Talks with a model. Without options, replies are drawn as the checkpoint says.

    Type, or pipe, a line for each turn; /help lists commands.
    """
    from keras_mamba2 import Mamba2CausalLM
    from keras_mamba2 import Mamba2CausalLMPreprocessor
    from keras_mamba2.chat.terminal import Terminal

    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "max_context": max_context,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    with errors_on_one_line():
        if system is not None and load is not None:
            raise ValueError("Pass --system or --load, not both: a conversation has its own.")
        keep_programs(compilation_cache)
        preprocessor = Mamba2CausalLMPreprocessor.from_preset(preset)
        preprocessor.chat_template  # noqa: B018  raises, before the weights are read
        speculation = speculation_of(draft, prompt_lookup, dtype)

        def prepare(lm: Mamba2CausalLM) -> None:
            lm.compile(speculation=speculation)
            lm.start_chat(**options)  # raises, before the weights are read

        lm = Mamba2CausalLM.from_preset(
            preset, dtype=dtype, preprocessor=preprocessor, on_built=prepare
        )
        if load is None:
            conversation = lm.start_chat(system, **options)
        else:
            conversation = lm.resume_chat(load, **options)
        terminal = Terminal(conversation, lambda file: lm.resume_chat(file, **options))
        terminal.run()
    if terminal.failed and not sys.stdin.isatty():
        raise typer.Exit(code=2)


@app.command()
def serve(
    preset: Annotated[
        str, typer.Argument(help="The name of a preset, a folder, or hf://user/name.")
    ],
    host: Annotated[
        str, typer.Option(help="Where to listen; 0.0.0.0 is every network there is.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model. Default: its preset's name.")
    ] = None,
    max_sequences: Annotated[
        int, typer.Option(min=1, help="How many sequences get tokens at once.")
    ] = 8,
    max_waiting: Annotated[int, typer.Option(min=1, help="How many requests may wait.")] = 64,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=2, help="Of a sequence, prompt included. Default: 32768, with attention 4096."
        ),
    ] = None,
    prefix_cache_mb: Annotated[
        int, typer.Option(min=0, help="For states after the beginnings of prompts; 0: none.")
    ] = 1024,
    prefix_cache_folder: Annotated[
        pathlib.Path | None, typer.Option(help="Where these states survive a restart.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help=f"That clients must send; repeatable. Default: {API_KEY}, if it is set."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name that clients call the server by; repeatable. Default: the names of this "
            "machine alone if it listens there, else any."
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for an answer.")] = 600.0,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Of a request.")] = 8,
    drain_seconds: Annotated[
        float, typer.Option(min=0, max=86_400, help="For what runs, after SIGTERM.")
    ] = 60.0,
    dtype: Dtype = "auto",
    state_dtype: Annotated[
        str | None, typer.Option(help="bfloat16: half the bytes of a mixer's state.")
    ] = None,
    key_value_dtype: Annotated[
        str | None, typer.Option(help="int8: half the bytes of attention's keys and values.")
    ] = None,
    compilation_cache: CompilationCache = None,
) -> None:
    """Serves a model by OpenAI's API, and a page to try it. Many requests share one loop."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401  the last that the extra brings
        import uvicorn  # noqa: F401
    except ImportError as error:
        print(
            f'error: {error.name} is not installed. `pip install "keras-mamba2[serve]"` '
            "installs what a server needs.",
            file=sys.stderr,
        )
        raise typer.Exit(code=2) from None
    from keras_mamba2 import Mamba2CausalLM
    from keras_mamba2.serving.app import create_app
    from keras_mamba2.serving.engine import Engine
    from keras_mamba2.serving.limits import Limits
    from keras_mamba2.serving.limits import check_hosts
    from keras_mamba2.serving.limits import check_keys
    from keras_mamba2.serving.server import run

    # Not typer's `envvar`: it takes a key with blanks for several, and an empty one for none.
    api_key = api_key or ([os.environ[API_KEY]] if API_KEY in os.environ else [])
    with errors_on_one_line():
        check_hosts(allowed_host or ())
        check_keys(api_key)  # before the weights are read
        keep_programs(compilation_cache)
        lm = Mamba2CausalLM.from_preset(
            preset, dtype=dtype, state_dtype=state_dtype, key_value_dtype=key_value_dtype
        )
        lm.compile()
        engine = Engine(
            lm,
            max_sequences=max_sequences,
            max_waiting=max_waiting,
            max_tokens=max_tokens,
            prefix_cache_bytes=prefix_cache_mb * 2**20,
            prefix_cache_folder=prefix_cache_folder,
        )
        print("Compiling all programs; then they serve any request.", file=sys.stderr)
        engine.start()
        limits = Limits(body_bytes=max_body_mb * 2**20, seconds=timeout)
        hosts = allowed_host or (LOOPBACK if host in LOOPBACK else ("*",))
        folder = pathlib.Path(preset)
        name = name or (folder.resolve().name if folder.is_dir() else preset.removeprefix("hf://"))
        web = create_app(engine, name, limits, api_key, hosts)
        run(web, host, port, drain_seconds, most_connections=max_waiting + max_sequences + 64)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="The name of a preset, a folder, or hf://user/name.")
    ],
    folder: Annotated[pathlib.Path, typer.Argument(help="Where to write; must not exist yet.")],
    to: Annotated[Format, typer.Option(help="The format to write.")] = Format.keras,
    dtype: Dtype = "auto",
    tokenizer: Annotated[bool, typer.Option(help="Whether to convert the tokenizer too.")] = True,
) -> None:
    """Converts a checkpoint. The folder appears when it is complete, or not at all."""
    from keras_mamba2 import Mamba2CausalLM
    from keras_mamba2.atomic_files import atomic_folder

    with errors_on_one_line(), atomic_folder(folder) as temporary:
        preprocessor: dict[str, Any] = {} if tokenizer else {"preprocessor": None}
        lm = Mamba2CausalLM.from_preset(source, dtype=dtype, **preprocessor)
        if to is Format.keras:
            lm.save_to_preset(temporary)
        else:
            lm.export_to_transformers(temporary)
    print(f"{folder}: {lm.backbone.count_params():,} parameters, {to} format", file=sys.stderr)


@app.command()
def export_programs(
    source: Annotated[
        str, typer.Argument(help="The name of a preset, a folder, or hf://user/name.")
    ],
    folder: Annotated[pathlib.Path, typer.Argument(help="Where to write; must not exist yet.")],
    platform: Annotated[
        list[str] | None, typer.Option(help="cpu, cuda, rocm or tpu; repeatable.")
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Rows of a program; repeatable.")
    ] = None,
    weights: Annotated[
        Weights, typer.Option(help="One file beside the programs, or inside of each.")
    ] = Weights.beside,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="The default of calls; 0 is greedy.")
    ] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="The default of calls.")] = 0.95,
    dtype: Dtype = "auto",
) -> None:
    """Writes programs that `keras_mamba2.load_programs` runs without Keras, on any machine."""
    from keras_mamba2 import FilterSampler
    from keras_mamba2 import Mamba2CausalLM
    from keras_mamba2.arguments import choice
    from keras_mamba2.arguments import several
    from keras_mamba2.atomic_files import check_is_free
    from keras_mamba2.portable.manifest import PLATFORMS

    with errors_on_one_line():
        # Before weights are fetched.
        several(choice(*PLATFORMS))("--platform", platform or ())
        check_is_free(folder)
        sampler = FilterSampler(temperature=temperature, top_p=top_p)
        lm = Mamba2CausalLM.from_preset(source, dtype=dtype)
        lm.compile(sampler=sampler)
        given: dict[str, Any] = {"platforms": platform, "batch_sizes": batch_size}
        given = {name: values for name, values in given.items() if values}
        lm.export_programs(folder, weights=weights.value, **given)
    nbytes = sum(path.stat().st_size for path in folder.rglob("*"))
    print(f"{folder}: {nbytes / 1e6:,.1f} MB", file=sys.stderr)


@app.command(RUN_PROGRAMS)
def run_programs(
    folder: Annotated[pathlib.Path, typer.Argument(help="That export-programs has written.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens at most.")] = 300,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Below 1 safer, above 1 wilder; 0 is greedy.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Sample among the likeliest that sum to this."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Drop what is this much less likely."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(min=1.0, help="Above 1: fewer.")
    ] = None,
    stop: Stop = None,
    seed: Seed = None,
    state: SessionFile = None,
    compilation_cache: CompilationCache = None,
) -> None:
    """Continues a prompt with exported programs. Without Keras: it starts in a second or two.

    What is not said about sampling is as it was exported.
    """
    import keras_mamba2

    with errors_on_one_line():
        check_texts(prompt, stop)
        keep_programs(compilation_cache)
        programs = keras_mamba2.load_programs(folder)
        if state is not None and state.exists():
            session = programs.resume(state)
        else:
            session, prompt = programs.start(prompt), ""
        options = {"max_new_tokens": max_new_tokens, "stop_strings": stop or (), "seed": seed}
        sampling = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
        sampling["repetition_penalty"] = repetition_penalty
        with kept(session, state):
            text, seconds = print_more(session, prompt, {**options, **sampling})
    print(f"{len(text)} characters, {len(text) / seconds:.0f} characters/s", file=sys.stderr)


@app.command()
def inspect(
    source: Annotated[
        str, typer.Argument(help="The name of a preset, a folder, or hf://user/name.")
    ],
) -> None:
    """Prints what a checkpoint is and how much memory it takes, without loading its weights."""
    from keras_mamba2.conversion import describe

    with errors_on_one_line():
        lines = describe(source)
        width = max(map(len, lines))
        for name, value in lines.items():
            print(shown(f"{name:<{width}}  {value}"))


if __name__ == "__main__":
    app()
