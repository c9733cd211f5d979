import pathlib
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from keras_mamba2.chat.tools import tool_schema

DEFAULT = "default"
TOOL_USE = "tool_use"
# The first that a message has is what its template reads, under the first and second name.
REASONING = ("reasoning_content", "thinking", "reasoning")

# What makes the plain value of one that belongs to a subclass, such as an enum.
PLAIN: dict[type, Callable[[Any], Any]] = {
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
}

Message = Mapping[str, Any]


class ChatTemplate:
    """Writes a conversation as the text that a model was trained on.

    It is the Jinja template that comes with a checkpoint, run in a sandbox, and gives what
    `apply_chat_template(..., tokenize=False)` of transformers gives.

    Args:
        templates: the source of a Jinja template, or a dict of several by name. With tools the one
            named `"tool_use"` is taken, else `"default"`.
        special_tokens: dict of names and tokens that templates use, such as `bos_token`.

    Example:
    ```python
    template = lm.preprocessor.tokenizer.chat_template
    template.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    ```
    """

    def __init__(
        self,
        templates: str | Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
    ):
        self.templates = {DEFAULT: templates} if isinstance(templates, str) else dict(templates)
        self.special_tokens = dict(special_tokens or {})
        for name, source in self.templates.items():
            # Names come from the hub, and files are named after them.
            is_name = isinstance(name, str) and pathlib.PurePath(name).name == name
            if not is_name or name in ("", "..") or "\0" in name:
                raise ValueError(
                    f"The name of a chat template must be one of a file. Received: {name!r}"
                )
            if not isinstance(source, str):
                raise ValueError(
                    "A chat template must be a string. "
                    f"Received: {name}={source!r}, a {type(source).__name__}"
                )

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        name: str | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: list of dicts with `role` and, as a rule, `content`.
            tools: what the model may call: JSON schemas, or functions with type hints and a
                docstring in Google's form, which `keras_mamba2.chat.tool_schema` turns into such.
            add_generation_prompt: bool, whether the text ends where a reply begins.
            name: which of several templates.
            **variables: what else the template reads, such as `documents` or `enable_thinking`.

        Raises:
            ValueError: for messages of another form, those that the template refuses, and a
                template that fails, takes too long or makes too much text.
        """
        source = self._source(name, tools is not None)
        values = {
            "documents": None,
            **self.special_tokens,
            **_plain(variables, "template variables"),
            "messages": checked_messages(messages),
            "tools": checked_tools(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        # Jinja is slow to import, and not every user has a chat.
        from keras_mamba2.chat import environment

        try:
            return environment.render(source, values)
        except Exception as error:  # a template may raise anything
            raise ValueError(
                "The chat template refuses this conversation, or fails: "
                f"{str(error) or type(error).__name__}. "
                f"Received: roles={_shortened([message['role'] for message in messages])}"
            ) from error

    def get_config(self) -> dict[str, dict[str, str]]:
        """The arguments of the constructor."""
        return {"templates": self.templates, "special_tokens": self.special_tokens}

    def _source(self, name: str | None, with_tools: bool) -> str:
        if name is None:
            name = TOOL_USE if with_tools and TOOL_USE in self.templates else DEFAULT
        if name not in self.templates:
            raise ValueError(
                f"There is no chat template {name!r}. Pass the `name` of one: "
                f"{', '.join(sorted(self.templates))}. Received: name={name!r}"
            )
        return self.templates[name]


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as plain data, without keys that are `None`, as in transformers.

    Raises:
        ValueError: for anything but a list of dicts with a `role`, and for what is not JSON.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise ValueError(
            "A conversation must be a list of messages, such as "
            f'[{{"role": "user", "content": "Hello"}}]. Received: messages={_shortened(messages)}'
        )
    if not messages:
        raise ValueError("The conversation is empty. Pass one message at least. Received: []")
    return [_message(i, message) for i, message in enumerate(messages)]


def _message(i: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"Message {i} must be a dict with a `role`, such as "
            f'{{"role": "user", "content": "Hello"}}. Received: {_shortened(message)}'
        )
    if isinstance(message.get("content"), (bytes, int, float, Mapping)):
        raise ValueError(
            f"The `content` of message {i} must be a string, or a list of parts. "
            f"Received: content={_shortened(message['content'])}"
        )
    message = {k: v for k, v in _plain(message, f"message {i}").items() if v is not None}
    thoughts = next((message[key] for key in REASONING if key in message), None)
    if thoughts is not None:
        message = {REASONING[1]: thoughts, **message, REASONING[0]: thoughts}
    return message


def checked_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tools as JSON schemas, `None` for none.

    Raises:
        ValueError: for what is neither a schema nor a function that can be described by one.
    """
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise ValueError(
            "`tools` must be a list of JSON schemas or functions. "
            f"Received: tools={_shortened(tools)}"
        )
    return [
        _plain(tool, f"tool {i}") if isinstance(tool, Mapping) else tool_schema(tool)
        for i, tool in enumerate(tools)
    ]


def _plain(value: Any, where: str) -> Any:
    """A copy of JSON data: what else a template could get hold of may have methods that act.

    Raises:
        ValueError: for anything that is not.
    """
    try:
        return _copied(value)
    except (TypeError, RecursionError) as error:
        raise ValueError(
            "Only JSON data reaches a chat template: strings, numbers, lists and dicts. "
            f"In {where}, received: {error}"
        ) from None


def _copied(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    for cls, plain in PLAIN.items():
        if isinstance(value, cls):
            return plain(value)
    if isinstance(value, Mapping):
        return {_copied(key): _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(item) for item in value]
    raise TypeError(f"{_shortened(value)}, a {type(value).__name__}")


def _shortened(value: Any, length: int = 100) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."
