"""From a Python function to the JSON schema by which a model knows it as a tool."""

import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable
from typing import Any

SCALARS = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
}
PLAIN = {**SCALARS, list: "array", tuple: "array", dict: "object"}
SECTIONS = re.compile(r"\s*(?:Args:|Returns:|Raises:)")
ARGUMENTS = re.compile(r"\n\s*Args:\n(.*?)\s*(?:Returns:|Raises:|\Z)", re.DOTALL)
RETURNS = re.compile(r"\n\s*Returns:\n\s*(.*?)\s*(?:Raises:|\Z)", re.DOTALL)
# "name:" or "name (type):", up to the next such line that is not indented deeper.
ARGUMENT = re.compile(
    r"(?:^|\n)([ \t]*)(\w+)(?:[ \t]*\([^()\n]*\))?:\s*(.*?)\s*"
    r"(?=\n(?!\1[ \t])[ \t]*\w+(?:[ \t]*\([^()\n]*\))?:|\Z)",
    re.DOTALL,
)
CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function, as transformers' `get_json_schema` makes it.

    Args:
        function: one with type hints, and a docstring with a line for each argument in Google's
            form. A line may end with `(choices: ["a", "b"])`.

    Raises:
        ValueError: for a function without them, and types that JSON does not have.

    Example:
    ```python
    def weather(city: str) -> str:
        '''The weather now.

        Args:
            city: Name of the city.
        '''

    lm.chat([{"role": "user", "content": "Is it raining in Bern?"}], tools=[weather])
    ```
    """
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        raise ValueError(f"A tool must be a JSON schema or a function. Received: {function!r}")
    name = function.__name__
    doc = (inspect.getdoc(function) or "").strip()
    if not doc:
        raise ValueError(f"The tool {name} needs a docstring, which tells the model what it is.")
    described = _described_arguments(doc)
    properties, required = _properties(function, name)
    returned = properties.pop("return", None)
    for argument, schema in properties.items():
        if argument not in described:
            raise ValueError(
                f"The docstring of the tool {name} must describe each argument under `Args:`. "
                f"Received: none for {argument!r}"
            )
        schema.update(_described(described[argument]))
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    description = SECTIONS.split(doc, maxsplit=1)[0].strip()
    tool = {"name": name, "description": description, "parameters": parameters}
    if returned is not None:
        found = RETURNS.search(doc)
        tool["return"] = {**returned, "description": found[1].strip()} if found else returned
    return {"type": "function", "function": tool}


def _properties(
    function: Callable[..., Any], name: str
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The schema of each argument, and of what is returned if it has one; what is required."""
    hints = typing.get_type_hints(function)
    parameters = dict(inspect.signature(function).parameters)
    first = next(iter(parameters.values()), None)
    if first is not None and first.name in ("self", "cls") and first.annotation is first.empty:
        del parameters[first.name]
    for parameter in parameters:
        if parameter not in hints:
            raise ValueError(
                f"The tool {name} needs a type hint for each argument. "
                f"Received: none for {parameter!r}"
            )
    properties = {}
    for argument, hint in hints.items():
        try:
            properties[argument] = _schema(hint)
        except ValueError as error:
            if argument != "return":  # of which templates make nothing
                raise ValueError(f"The tool {name}: {error}") from None
    required = [p.name for p in parameters.values() if p.default is p.empty]
    return properties, required


def _described_arguments(doc: str) -> dict[str, str]:
    found = ARGUMENTS.search(doc)
    lines = [line for line in found[1].split("\n") if line.strip()] if found else []
    matches = ARGUMENT.findall("\n".join(lines))
    return {name: re.sub(r"\s*\n+\s*", " ", text.strip()) for _, name, text in matches}


def _described(text: str) -> dict[str, Any]:
    choices = CHOICES.search(text)
    if choices is None:
        return {"description": text}
    values = [v.strip() if isinstance(v, str) else v for v in json.loads(choices[1])]
    return {"enum": values, "description": text[: choices.start()].strip()}


def _schema(hint: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if origin is typing.Literal:
        return _enum(arguments, hint)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments)
    if origin is list and arguments:
        return {"type": "array", "items": _schema(arguments[0])}
    if origin is tuple and len(arguments) > 1 and ... not in arguments:
        return {"type": "array", "prefixItems": [_schema(a) for a in arguments]}
    if origin is dict and len(arguments) == 2:
        return {"type": "object", "additionalProperties": _schema(arguments[1])}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enum([member.value for member in hint], hint)
    if not arguments and (origin or hint) in PLAIN:
        hint = origin or hint
        return {"type": PLAIN[hint]}
    raise ValueError(
        f"There is no JSON for the type {hint!r}. Use int, float, str, bool, list, tuple of fixed "
        "length, dict, Literal, an Enum or unions of these, or pass a JSON schema."
    )


def _enum(values: typing.Sequence[Any], hint: Any) -> dict[str, Any]:
    if not values or any(type(value) not in SCALARS for value in values):
        raise ValueError(f"Choices must be strings, numbers or None. Received: {hint!r}")
    kinds = list(dict.fromkeys(SCALARS[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(values)}


def _union(arguments: typing.Sequence[Any]) -> dict[str, Any]:
    schemas = [_schema(a) for a in arguments if a is not type(None)]
    if len(schemas) == 1:
        [schema] = schemas
    elif all(s.keys() == {"type"} and isinstance(s["type"], str) for s in schemas):
        kinds = sorted({s["type"] for s in schemas})
        schema = {"type": kinds[0] if len(kinds) == 1 else kinds}
    else:
        schema = {"anyOf": schemas}
    return {**schema, "nullable": True} if type(None) in arguments else schema
