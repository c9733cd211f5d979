"""The sandbox in which chat templates run: that of transformers, with bounds on time and size.

Templates come from the hub, so they are not trusted. The settings are those of transformers'
`apply_chat_template`, so that a template gives the same text.
"""

import contextlib
import contextvars
import datetime
import functools
import json
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import jinja2
from jinja2 import ext
from jinja2 import nodes
from jinja2 import sandbox
from jinja2 import utils
from jinja2 import visitor

SECONDS = 10
MOST_CHARACTERS = 10_000_000
MOST_BITS = 10_000
# Filters of Jinja and methods of strings that take a length.
PADDING = ("batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "zfill")

_deadline: contextvars.ContextVar[float] = contextvars.ContextVar("deadline")


def render(source: str, variables: dict[str, Any]) -> str:
    """The text that a template gives.

    Raises:
        jinja2.TemplateError: for a template that is none, that refuses the variables, or that
            takes too long or makes too much.
    """
    pieces, size = [], 0
    with _time_limit():
        for piece in _compiled(source).generate(variables):
            pieces.append(piece)
            size += len(piece)
            _check_size(size)
    return "".join(pieces)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    token = _deadline.set(time.monotonic() + SECONDS)
    try:
        yield
    finally:
        _deadline.reset(token)


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    environment = _environment()
    tree = _Bounds().visit(environment.parse(source))
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.globals)


@functools.cache
def _environment() -> "_Environment":
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, ext.loopcontrols]
    )
    environment.extend(tick=_tick, concatenate=_concatenate)
    environment.filters["tojson"] = _tojson
    environment.filters.update(
        {name: _bounded(function) for name, function in environment.filters.items()}
    )
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda format: datetime.datetime.now().strftime(format),
        dict=_Dict(),
        namespace=_Namespace,
    )
    return environment


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which operators and calls make nothing huge."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def call(self, context, function, /, *args, **kwargs):
        _check_arguments(function, *args, *kwargs.values())
        return _checked(super().call(context, function, *args, **kwargs))

    def call_binop(self, context, operator: str, left, right):
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_size(len(left) + len(right))
        elif operator == "*" and (hasattr(left, "__len__") or hasattr(right, "__len__")):
            _check_size(_count(left) * _count(right))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            bits = bits * right if operator == "**" else bits + right.bit_length()
            if bits > MOST_BITS:
                raise sandbox.SecurityError("it computes with a number that is too large")
        return _checked(super().call_binop(context, operator, left, right))


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that gives nothing huge."""

    @functools.wraps(function)
    def bounded(*args, **kwargs):
        _check_arguments(function, *args, *kwargs.values())
        return _checked(function(*args, **kwargs))

    return bounded


def _check_arguments(function, *args) -> None:
    """Raises where something huge is asked for, before it is made."""
    if getattr(function, "__name__", "").removeprefix("do_") in PADDING:
        for argument in args:
            _check_size(abs(argument) if isinstance(argument, int) else 0)


def _checked(value):
    if isinstance(value, (str, list)):
        _check_size(len(value))
    return value


def _count(value) -> int:
    """The length of a sequence, and a number itself."""
    return len(value) if hasattr(value, "__len__") else int(value)


def _check_size(size: int) -> None:
    if size > MOST_CHARACTERS:
        raise sandbox.SecurityError(f"it makes more than {MOST_CHARACTERS:,} characters")


class _Bounds(visitor.NodeTransformer):
    """Looks at the time in each round of a loop and call of a macro, and at what `~` makes."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        return self._with_tick(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        return self._with_tick(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call("concatenate", node.nodes, node.lineno)

    def _with_tick(self, node):
        self.generic_visit(node)
        tick = _call("tick", [], node.lineno)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node


def _call(name: str, arguments: list[nodes.Expr], lineno: int) -> nodes.Call:
    """A call of an attribute of the environment, which no template can replace."""
    function = nodes.EnvironmentAttribute(name, lineno=lineno)
    return nodes.Call(function, arguments, [], None, None, lineno=lineno)


def _tick() -> str:
    if time.monotonic() > _deadline.get():
        raise sandbox.SecurityError(f"it takes longer than {SECONDS} seconds")
    return ""


def _concatenate(*parts) -> str:
    texts = list(map(str, parts))
    _check_size(sum(map(len, texts)))
    return "".join(texts)


class _GenerationTag(ext.Extension):
    """`{% generation %}`, which marks what the model wrote: it shows as it is."""

    tags = {"generation"}  # noqa: RUF012  no `ClassVar`, since Jinja declares none

    def parse(self, parser) -> nodes.CallBlock:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("written"), [], [], body, lineno=lineno)

    def written(self, caller) -> str:
        return caller()


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Not Jinja's own, which escapes for HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Dict:
    """`dict` without its attributes, which lead out of the sandbox."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs):
        return dict.fromkeys(*args, **kwargs)


class _Namespace(utils.Namespace):
    """Jinja's, without names that begin with an underscore."""

    def __init__(*args, **kwargs):  # so that a template may give it a `self`
        self, *args = args
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name, value):
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise sandbox.SecurityError(f"a namespace has no place for the name {name!r}")
