"""The sandbox in which chat templates run: that of transformers, with bounds on time and size.

Templates come from the hub, so they are not trusted. The settings are those of transformers'
`apply_chat_template`, so that a template gives the same text.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable
from typing import Any

import jinja2
import markupsafe
from jinja2 import ext
from jinja2 import nodes
from jinja2 import runtime
from jinja2 import sandbox
from jinja2 import utils
from jinja2 import visitor

from keras_mamba2.chat.bounds import MOST_BITS
from keras_mamba2.chat.bounds import check_call
from keras_mamba2.chat.bounds import check_percent
from keras_mamba2.chat.bounds import check_size
from keras_mamba2.chat.bounds import checked
from keras_mamba2.chat.bounds import concatenate
from keras_mamba2.chat.bounds import count
from keras_mamba2.chat.bounds import size_of
from keras_mamba2.chat.bounds import tick
from keras_mamba2.chat.bounds import time_limit
from keras_mamba2.chat.bounds import written

# What filters may be given before what they filter.
OF_JINJA = (jinja2.Environment, nodes.EvalContext, runtime.Context)


def render(source: str, variables: dict[str, Any]) -> str:
    """The text that a template gives.

    Raises:
        jinja2.TemplateError: for a template that is none, that refuses the variables, or that
            takes too long or makes too much.
    """
    pieces, size = [], 0
    with time_limit():
        for piece in _compiled(source).generate(variables):
            pieces.append(piece)
            size += len(piece)
            check_size(size)
    return "".join(pieces)


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
    environment.extend(tick=tick, written=written, concatenate=concatenate)
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
        tick()
        owner = getattr(function, "__self__", None)
        if isinstance(owner, (str, bytes)) and function.__name__ == "join" and args:
            # Unlike the filter, it is a method of the separator.
            args = check_call("join", args[0], owner)[:1] + args[1:]
        elif isinstance(owner, (str, bytes, int)):
            check_call(function.__name__, owner, *args, *kwargs.values())
        return checked(super().call(context, function, *args, **kwargs))

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
        tick()
        if operator == "%" and isinstance(left, (str, bytes)):
            check_percent(left, right)
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            check_size(len(left) + len(right))
        elif operator == "*" and (hasattr(left, "__len__") or hasattr(right, "__len__")):
            check_size(count(left) * count(right))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            bits = bits * right if operator == "**" else bits + right.bit_length()
            if bits > MOST_BITS:
                raise sandbox.SecurityError("it computes with a number that is too large")
        return checked(super().call_binop(context, operator, left, right))


class _Formatter(sandbox.SandboxedFormatter):
    """Of `str.format`, field by field, so that none is huge."""

    size = 0

    def convert_field(self, value, conversion):
        size_of(value)
        return super().convert_field(value, conversion)

    def format_field(self, value, format_spec: str) -> str:
        check_size(size_of(value) + sum(map(int, re.findall(r"\d+", format_spec))))
        text = super().format_field(value, format_spec)
        self.size += len(text)
        check_size(self.size)
        return text


class _MarkupFormatter(_Formatter, sandbox.SandboxedEscapeFormatter):
    pass


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that gives nothing huge."""

    @functools.wraps(function)
    def bounded(*args, **kwargs):
        tick()
        # What Jinja itself hands over is no value.
        num_own = sum(isinstance(arg, OF_JINJA) for arg in args[:1])
        # `old` stands before `new`, also where both are named.
        named = [kwargs[key] for key in sorted(kwargs, reverse=True)]
        values = check_call(name, *args[num_own:], *named)
        args = (*args[:num_own], *values[: len(args) - num_own])
        return checked(function(*args, **kwargs))

    return bounded


def _ticking(function: Any) -> Callable[..., Any]:
    """A test, of which a filter may call many."""

    @functools.wraps(function)
    def ticking(*args, **kwargs):
        tick()
        return function(*args, **kwargs)

    return ticking


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
