"""The sandbox in which chat templates run: that of transformers, with bounds on time and size.

Templates come from the hub, so they are not trusted. The settings are those of transformers'
`apply_chat_template`, so that a template gives the same text.

The time is looked at in each round of a loop and with each call, operator and filter. How long a
text would be is known before it is made: a short list of long lists may have gigabytes. Not bounded
are one comparison of such lists, and what many texts take together.
"""

import contextlib
import contextvars
import dataclasses
import datetime
import functools
import json
import re
import time
import types
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import jinja2
import markupsafe
from jinja2 import ext
from jinja2 import nodes
from jinja2 import runtime
from jinja2 import sandbox
from jinja2 import utils
from jinja2 import visitor

SECONDS = 10
MOST_CHARACTERS = 10_000_000
# What a macro writes is written again by its caller.
MOST_WRITTEN = 10 * MOST_CHARACTERS
MOST_BITS = 10_000
# Of filters that take more than proportional time.
MOST_FOR_SLOW = 100_000
SLOW = ("striptags", "sum", "urlize", "wordwrap")
# Filters of Jinja, and methods of strings and numbers, that take a length.
PADDING = ("batch", "center", "ljust", "rjust", "slice", "to_bytes", "zfill")
PADDING_LINES = ("expandtabs", "indent")
# Filters that make no text of what they are given.
NO_TEXT = ("attr", "count", "d", "default", "dictsort", "first", "groupby", "items", "last")
NO_TEXT += ("length", "list", "map", "max", "min", "random", "reject", "rejectattr", "reverse")
NO_TEXT += ("select", "selectattr", "sort", "unique")
# What filters may be given before what they filter.
OF_JINJA = (jinja2.Environment, nodes.EvalContext, runtime.Context)
FIELDS = re.compile(r"%(?:\(.*?\))?[-#0 +\d*.]*")  # of `%`


@dataclasses.dataclass
class Run:
    """What one rendering may take, and has taken."""

    deadline: float
    written: int = 0


_run: contextvars.ContextVar[Run] = contextvars.ContextVar("run")


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
    token = _run.set(Run(time.monotonic() + SECONDS))
    try:
        yield
    finally:
        _run.reset(token)


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
    environment.extend(tick=_tick, written=_written, concatenate=_concatenate)
    environment.filters["tojson"] = _tojson
    del environment.globals["lipsum"]  # any amount of random text
    for name, function in environment.filters.items():
        environment.filters[name] = _bounded(name, function)
    for name, test in environment.tests.items():
        environment.tests[name] = _ticking(test)
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
        _tick()
        owner = getattr(function, "__self__", None)
        if isinstance(owner, (str, bytes)) and function.__name__ == "join" and args:
            # Unlike the filter, it is a method of the separator.
            args = _check_call("join", args[0], owner)[:1] + args[1:]
        elif isinstance(owner, (str, bytes, int)):
            _check_call(function.__name__, owner, *args, *kwargs.values())
        return _checked(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value):
        if super().wrap_str_format(value) is None:
            return None
        text, is_map = value.__self__, value.__name__ == "format_map"

        def format(*args, **kwargs):
            if isinstance(text, markupsafe.Markup):
                formatter = _MarkupFormatter(self, escape=text.escape)
            else:
                formatter = _Formatter(self)
            if is_map:
                [kwargs], args = args, ()
            return type(text)(formatter.vformat(text, args, kwargs))

        return format

    def call_binop(self, context, operator: str, left, right):
        _tick()
        if operator == "%" and isinstance(left, (str, bytes)):
            _check_percent(left, right)
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_size(len(left) + len(right))
        elif operator == "*" and (hasattr(left, "__len__") or hasattr(right, "__len__")):
            _check_size(_count(left) * _count(right))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            bits = bits * right if operator == "**" else bits + right.bit_length()
            if bits > MOST_BITS:
                raise sandbox.SecurityError("it computes with a number that is too large")
        return _checked(super().call_binop(context, operator, left, right))


class _Formatter(sandbox.SandboxedFormatter):
    """Of `str.format`, field by field, so that none is huge."""

    size = 0

    def convert_field(self, value, conversion):
        _size(value)
        return super().convert_field(value, conversion)

    def format_field(self, value, format_spec: str) -> str:
        _check_size(_size(value) + sum(map(int, re.findall(r"\d+", format_spec))))
        text = super().format_field(value, format_spec)
        self.size += len(text)
        _check_size(self.size)
        return text


class _MarkupFormatter(_Formatter, sandbox.SandboxedEscapeFormatter):
    pass


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that gives nothing huge."""

    @functools.wraps(function)
    def bounded(*args, **kwargs):
        _tick()
        # What Jinja itself hands over is no value.
        count = sum(isinstance(arg, OF_JINJA) for arg in args[:1])
        # `old` stands before `new`, also where both are named.
        named = [kwargs[key] for key in sorted(kwargs, reverse=True)]
        checked = _check_call(name, *args[count:], *named)
        args = (*args[:count], *checked[: len(args) - count])
        return _checked(function(*args, **kwargs))

    return bounded


def _ticking(function: Any) -> Callable[..., Any]:
    """A test, of which a filter may call many."""

    @functools.wraps(function)
    def ticking(*args, **kwargs):
        _tick()
        return function(*args, **kwargs)

    return ticking


def _check_call(name: str, *values) -> tuple[Any, ...]:
    """Raises where something huge is asked for, before it is made. Returns the values.

    Args:
        name: string, of a filter or a method.
        *values: what it is given; the first is the one that is filtered, or has the method.
    """
    if name == "join" and isinstance(values[0], Iterator):  # of what it will give
        values = (list(values[0]), *values[1:])
    if name in NO_TEXT or not values:
        return values
    text, *others = values
    if name == "sum":
        others = [v for v in others if isinstance(v, list)]
        if not others:
            return values
    size = sum(map(_size, values))
    widths = sum(abs(v) for v in others if isinstance(v, int))
    texts = [v for v in others if isinstance(v, (str, bytes))]
    if name in PADDING:
        _check_size(widths)
    elif name in PADDING_LINES:
        lines = _text(text)
        _check_size((lines.count("\n") + lines.count("\t") + 1) * (widths + sum(map(len, texts))))
    elif name == "join" and others and isinstance(text, Collection):
        _check_size(len(text) * _size(others[0]))
    elif name == "replace" and len(others) > 1:
        old, new = map(_text, others[:2])
        _check_size(_text(text).count(old) * len(new))
    elif name == "translate":
        _check_size(_size(text) * max(map(_size, others), default=0))
    elif name == "format":
        _check_percent(_text(text), tuple(others))
    elif name in SLOW and size > MOST_FOR_SLOW:
        raise sandbox.SecurityError(f"`{name}` is for at most {MOST_FOR_SLOW:,} characters")
    return values


def _text(value) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _check_percent(text: str | bytes, values) -> None:
    """Raises where `text % values` would be huge."""
    fields = FIELDS.findall(_text(text))
    widths = sum(int(digits) for field in fields for digits in re.findall(r"\d+", field))
    several = values if isinstance(values, tuple) else (values,)
    if any("*" in field for field in fields):
        widths += sum(abs(value) for value in several if isinstance(value, int))
    # Fields with names may name the same one.
    times = len(fields) if isinstance(values, Mapping) else 1
    _check_size(widths + times * sum(map(_size, several)))


def _size(value) -> int:
    """About how many characters `value` is as a text, a list as often as it is in others.

    Raises:
        jinja2.sandbox.SecurityError: as soon as it is more than there may be.
    """
    size, left = 0, [value]
    while left:
        value = left.pop()
        if isinstance(value, (str, bytes)):
            size += len(value)
        elif isinstance(value, int):
            size += 1 + value.bit_length() // 4
        elif isinstance(value, utils.Namespace):
            raise sandbox.SecurityError("it makes a text of a namespace")
        elif isinstance(value, Collection) and not isinstance(value, range):
            size += 1 + len(value)
            _check_size(size)
            left.extend(value)
            left.extend(value.values() if isinstance(value, Mapping) else ())
        else:
            size += 1
        _check_size(size)
    return size


def _checked(value):
    if isinstance(value, (str, bytes, list)):
        _check_size(len(value))
    return _limited(value) if isinstance(value, types.GeneratorType) else value


def _limited(items: Iterator[Any]) -> Iterator[Any]:
    """What a filter gives item by item."""
    size = 0
    for item in items:
        _tick()
        size += len(item) if isinstance(item, (str, bytes, list)) else 1
        _check_size(size)
        yield item


def _count(value) -> int:
    """The length of a sequence, and a number itself."""
    return len(value) if hasattr(value, "__len__") else int(value)


def _check_size(size: int) -> None:
    if size > MOST_CHARACTERS:
        raise sandbox.SecurityError(f"it makes more than {MOST_CHARACTERS:,} characters")


class _Bounds(visitor.NodeTransformer):
    """Looks at the time in each round of a loop and call of a macro, and at what is written."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self._with_tick(node)
        if node.test is not None:
            tick = nodes.Not(_call("tick", [], node.lineno), lineno=node.lineno)
            node.test = nodes.And(tick, node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        return self._with_tick(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call("concatenate", node.nodes, node.lineno)

    def visit_Output(self, node: nodes.Output) -> list[nodes.Stmt]:
        self.generic_visit(node)
        length = 0
        parts: list[nodes.Expr] = []
        for part in node.nodes:
            if isinstance(part, nodes.TemplateData):
                length += len(part.data)
                parts.append(part)
            else:
                parts.append(_call("written", [part], node.lineno))
        node.nodes = parts
        tick = _call("tick", [nodes.Const(length, lineno=node.lineno)], node.lineno)
        return [nodes.ExprStmt(tick, lineno=node.lineno), node]

    def _with_tick(self, node):
        self.generic_visit(node)
        tick = _call("tick", [], node.lineno)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node


def _call(name: str, arguments: list[nodes.Expr], lineno: int) -> nodes.Call:
    """A call of an attribute of the environment, which no template can replace."""
    function = nodes.EnvironmentAttribute(name, lineno=lineno)
    return nodes.Call(function, arguments, [], None, None, lineno=lineno)


def _tick(num_characters: int = 0) -> str:
    """Looks at the time, and counts what is written, if only into a variable."""
    run = _run.get()
    run.written += num_characters
    if time.monotonic() > run.deadline:
        raise sandbox.SecurityError(f"it takes longer than {SECONDS} seconds")
    if run.written > MOST_WRITTEN:
        raise sandbox.SecurityError(f"it writes more than {MOST_WRITTEN:,} characters")
    return ""


def _written(value):
    _tick(_size(value))
    return value


def _concatenate(*parts) -> str:
    _check_size(sum(map(_size, parts)))
    return "".join(map(str, parts))


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
