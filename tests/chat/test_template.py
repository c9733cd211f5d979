"""A template gives the text that it gives in transformers; a bad one gives an error."""

import enum
import re

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

import keras_mamba2
from keras_mamba2.chat import ChatTemplate
from keras_mamba2.chat import bounds
from tests.chat import templates
from tests.chat.test_tools import cancel
from tests.chat.test_tools import weather

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Finds pages <b>& more</b> — überall.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string"}, "count": {"type": "integer"}},
            "required": ["query"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": "rain é"}}}
SYSTEM = {"role": "system", "content": " Be brief. "}
FIRST = {"role": "user", "content": "Is it raining?\n"}
SECOND = {"role": "user", "content": "<b>And</b> 'tomorrow'? 🤷🏽"}
REPLY = {"role": "assistant", "content": "  No.\n"}
CONVERSATIONS = {
    "one": [FIRST],
    "system": [SYSTEM, FIRST],
    "turns": [SYSTEM, FIRST, REPLY, SECOND],
    "answered": [FIRST, REPLY],
    "thinking": [FIRST, REPLY | {"content": "<think>\nhm\n</think>\n\nNo."}, SECOND],
    "reasoning": [FIRST, REPLY | {"reasoning": "hm"}, SECOND, REPLY | {"thinking": "well"}],
    "called": [
        FIRST,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '"none"', "name": "search"},
        {"role": "assistant", "content": "It is dry.", "tool_calls": None},
        SECOND,
    ],
    "called without content": [
        FIRST,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": '"none"', "name": "search"},
    ],
    "two system": [SYSTEM, SYSTEM, FIRST],
    "two users": [FIRST, SECOND],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}],
    "unknown role": [FIRST, {"role": "narrator", "content": "Silence."}],
}
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOCUMENTS = [{"title": "Weather", "text": "Dry.\nWarm."}]


def transformers_tokenizer(template):
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine, chat_template=template, **TOKENS
    )


def outcome(render, *args, **kwargs):
    """What is rendered, or `None` for a template that refuses."""
    try:
        return render(*args, **kwargs)
    except Exception:
        return None


@pytest.fixture(scope="module", params=templates.ALL)
def pair(request):
    """Both ways from messages to text."""
    source = templates.ALL[request.param]
    theirs = transformers_tokenizer(source)
    return ChatTemplate(source, theirs.special_tokens_map), theirs


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(
    "tools",
    [None, [], [SEARCH], [SEARCH, weather, cancel]],
    ids=["no tools", "an empty list", "a schema", "functions too"],
)
def test_text_is_that_of_transformers(pair, conversation, prompt, tools):
    ours, theirs = pair
    messages = CONVERSATIONS[conversation]
    options = {"tools": tools, "add_generation_prompt": prompt}
    for more in ({}, {"documents": DOCUMENTS}, {"enable_thinking": False}):
        expected = outcome(theirs.apply_chat_template, messages, tokenize=False, **options, **more)
        assert outcome(ours.render, messages, **options, **more) == expected


def test_the_cases_show_something():
    """Every template writes most conversations, and some of them refuse some."""
    counts = {}
    for name, source in templates.ALL.items():
        template = ChatTemplate(source, TOKENS)
        rendered = [outcome(template.render, messages) for messages in CONVERSATIONS.values()]
        counts[name] = sum(text is not None for text in rendered)
    assert min(counts.values()) >= 6
    assert counts["mistral"] < len(CONVERSATIONS) == counts["granite"]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    contents=st.lists(st.text(max_size=20), min_size=1, max_size=5),
    prompt=st.booleans(),
    name=st.sampled_from(sorted(templates.ALL)),
)
def test_any_text_is_written_as_in_transformers(contents, prompt, name):
    theirs = transformers_tokenizer(templates.ALL[name])
    ours = ChatTemplate(templates.ALL[name], theirs.special_tokens_map)
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert ours.render(messages, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(3) %}\n  {{ i }}\n{% endfor %}\n",
        "{% for i in [] %}{% else %}none{% endfor %}",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
        "{% if i > 4 %}{% break %}{% endif %}{{ loop.index ~ i ~ none ~ missing }}{% endfor %}",
        "{% macro f(x, y=2) %}{{ x ~ y }}{% endmacro %}{{ f(1) ~ f(1, y=3) }}",
        "{% set ns = namespace(self=1, n=0) %}{% for m in messages %}"
        "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n ~ ns.self }}",
        "{{ dict(a=1) | tojson }}{{ dict.fromkeys('ab', 1) }}{{ {'é': '<&>'} | tojson }}",
        "{{ {'b': [1], 'a': none} | tojson(sort_keys=true, separators=(',', ':'), indent=1) }}",
        "{{ {'é': 1} | tojson(ensure_ascii=true) }}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ [1] + [2] }}{{ 'a' + 'b' }}{{ 3 * 2.5 }}{{ 7 // 2 }}",
        "{{ messages[0].content | upper }}{{ messages | length }}{{ tools is none }}",
        "{% filter upper %}{% for m in messages recursive %}{{ m.role }}{% endfor %}"
        "{% endfilter %}",
        "{{ eos_token }}{{ sep_token is defined }}{{ messages.append(1) }}",
        "{{ ''.__class__ }}|{{ messages.__len__() }}",
        "{{ '%05.1f|%s' % (1.5, 'é') }}{{ '{:>4}'.format(1) }}{{ 7 % 4 }}{{ 'a'.center(5) }}",
        "{{ messages | map(attribute='role') | join(', ') }}{{ [3, 1] | sort | first }}",
        "{{ messages | selectattr('role', 'eq', 'user') | list | length }}{{ 'a b' | wordcount }}",
        "{{ messages | groupby('role') | map('first') | list }}{{ 'x' | indent(3, true) | safe }}",
        "{% set ns = namespace(_a=1) %}",
        "{{ '{:>{}}|{a!r}|{a}'.format(1, 5, a='é') }}{{ '{a}'.format_map({'a': [1]}) }}",
        "{{ ('<b>{}' | safe).format('<') }}{{ '{.__class__}'.format(1) }}",
        "{{ '%*d|%%|%-5s|' % (4, 7, 'a') }}{{ '%(a)s%(a)s' % {'a': 1} }}{{ '%s' | format('a') }}",
        "{{ 'a b c'.split(sep=' ', maxsplit=1) }}{{ 'ab' | replace(new='x', old='a') }}",
        "{{ [1, 2] | join(d='-') }}{{ messages | map(attribute='role') | reverse | join }}",
        "{% for a in range(9) if a is odd %}{{ loop.index ~ a }}{% else %}none{% endfor %}",
        "{% for a in range(9) if a > 9 %}{{ a }}{% else %}none{% endfor %}",
        "{% macro f() %}a{{ caller() }}{% endmacro %}{% call f() %}b{{ 1 }}{% endcall %}"
        "{% set x %}c{{ [2] }}{% endset %}{{ x }}{{ missing }}{{ none }}{{ 1.5 }}{{ {'a': 1} }}",
        "{{ [[1], [2]] | sum(start=[]) }}{{ [1, 2] | sum }}{{ 'a b' | wordwrap(1) }}",
        "{{ (1).to_bytes(2, 'big') }}{{ 'a\tb'.expandtabs(4) }}{{ 'a\nb' | indent('> ') }}",
        "{{ 'aXbX'.replace('X', '--').translate({97: 'c'}) }}{{ '-'.join(['a', 'b']) }}",
        "{{ messages[0].update({'a': 1}) }}",
    ],
)
def test_the_language_is_that_of_transformers(source):
    theirs = transformers_tokenizer(source)
    ours = ChatTemplate(source, theirs.special_tokens_map)
    messages = CONVERSATIONS["turns"]
    expected = outcome(theirs.apply_chat_template, messages, tokenize=False)
    assert outcome(ours.render, messages) == expected


def test_one_of_several_is_chosen_as_in_transformers():
    several = {"default": "plain", "tool_use": "with tools", "rag": "with documents"}
    ours, theirs = ChatTemplate(several), transformers_tokenizer(several)
    for tools in (None, [], [SEARCH]):
        expected = theirs.apply_chat_template([FIRST], tools=tools, tokenize=False)
        assert ours.render([FIRST], tools) == expected
    assert ours.render([FIRST], name="rag") == "with documents"
    with pytest.raises(ValueError, match="default, rag, tool_use. Received: name='other'"):
        ours.render([FIRST], name="other")
    with pytest.raises(ValueError, match="no chat template 'default'.*of one: rag"):
        ChatTemplate({"rag": ""}).render([FIRST])


class Kind(enum.StrEnum):
    user = "user"


def test_nothing_but_data_reaches_a_template():
    seen = ChatTemplate("{{ messages[0].role }}").render([{"role": Kind.user, "content": "a"}])
    assert seen == "user"
    with pytest.raises(ValueError, match="Only JSON data.*In message 0.*object"):
        ChatTemplate("").render([{"role": "user", "content": "a", "file": object()}])
    endless = []
    endless.append(endless)
    with pytest.raises(ValueError, match="Only JSON data"):
        ChatTemplate("").render([FIRST], extra=endless)


@pytest.mark.parametrize("name", ["/tmp/x", "../x", "a/b", "", "..", "a\0", 7])
def test_names_that_are_none_of_files_are_refused(name):
    """Templates are exported to files of their names, and come from the hub."""
    with pytest.raises(ValueError, match="name of a chat template"):
        ChatTemplate({"default": "", name: ""})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hello", "list of messages.*Received: messages='Hello'"),
        ({"role": "user"}, "list of messages"),
        (None, "Received: messages=None"),
        ([], "conversation is empty"),
        (["Hello"], "Message 0 must be a dict with a `role`.*Received: 'Hello'"),
        ([FIRST, {"content": "a"}], "Message 1 must be a dict with a `role`"),
        ([{"role": 1, "content": "a"}], "Message 0 must be a dict"),
        ([FIRST, {"role": "user", "content": 7}], "`content` of message 1.*Received: content=7"),
        ([{"role": "user", "content": b"a"}], "Received: content=b'a'"),
    ],
)
def test_messages_of_another_form_are_named(messages, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(templates.CHATML).render(messages)


def test_tools_of_another_form_are_named():
    template = ChatTemplate(templates.GRANITE)
    with pytest.raises(ValueError, match="`tools` must be a list.*Received: tools='search'"):
        template.render([FIRST], tools="search")
    with pytest.raises(ValueError, match="schema or a function. Received: 'search'"):
        template.render([FIRST], tools=["search"])


def test_what_a_template_refuses_is_told_in_its_words():
    with pytest.raises(
        ValueError, match="refuses this conversation.*must alternate.*roles=\\['user', 'user'\\]"
    ):
        ChatTemplate(templates.MISTRAL, TOKENS).render(CONVERSATIONS["two users"])
    with pytest.raises(ValueError, match="Only user and assistant roles are supported"):
        ChatTemplate(templates.MISTRAL, TOKENS).render(CONVERSATIONS["unknown role"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].missing.more }}", "has no attribute 'missing'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
        (LOOP, "longer"),
        ("{% for a in range(99999) if range(99999) | sum < 0 %}{% endfor %}", "longer"),
        ("{{ range(99999) | select('in', range(99999) | list) | list }}", "longer"),
        ("{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(40) }}", "longer"),
        ("{% for a in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}", "more than"),
        ("{% set ns = namespace(x='a') %}{% for a in range(99) %}"
         "{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "more than"),
        ("{% set ns = namespace(x='a') %}{% for a in range(99) %}"
         "{% set ns.x = ns.x + ns.x %}{% endfor %}", "more than"),
        ("{{ 'a' * 10 ** 9 }}", "more than"),
        ("{{ 10 ** 9 * [1] }}", "more than"),
        ("{{ 9 ** 99999 }}", "too large"),
        ("{{ 'a' | center(10 ** 9) }}", "more than"),
        ("{{ 'a'.rjust(10 ** 9) }}", "more than"),
        ("{{ '%20000000d' % 1 }}", "more than"),
        ("{{ '{:20000000}'.format(1) }}", "more than"),
        ("{{ ('a' * 9999) | replace('a', 'b' * 9999) | length }}", "more than"),
    ],
)  # fmt: skip
def test_a_template_that_fails_or_does_not_end_is_an_error(source, message, monkeypatch):
    monkeypatch.setattr(bounds, "SECONDS", 0.3)
    with pytest.raises(ValueError, match=f"refuses this conversation, or fails.*{message}"):
        ChatTemplate(source).render([FIRST])


NESTED = (
    "{% set a = [0] * 999 %}{% set b = [a] * 999 %}{% set c = [b] * 999 %}{% set x = 'a' * 99999 %}"
)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ c }}", "makes more than"),
        ("{{ c | tojson | length }}", "makes more than"),
        ("{{ c | string | length }}", "makes more than"),
        ("{{ (c ~ '') | length }}", "makes more than"),
        ("{{ ('%s' % c) | length }}", "makes more than"),
        ("{{ '{!r:>3}'.format(c) | length }}", "makes more than"),
        ("{{ {'a': c}.items() }}", "makes more than"),
        ("{{ namespace(a=c) }}", "text of a namespace"),
        ("{{ ([x] * 99999) | join | length }}", "makes more than"),
        ("{{ ''.join([x] * 99999) | length }}", "makes more than"),
        ("{{ x.join(['a'] * 99999) | length }}", "makes more than"),
        ("{{ (['a'] * 99999) | map('center', 99999) | list | length }}", "makes more than"),
        ("{{ ('%10000000000d' % 1) | length }}", "makes more than"),
        ("{{ ('%*d' % (10000000000, 1)) | length }}", "makes more than"),
        ("{{ '%.10000000000f' | format(1.0) | length }}", "makes more than"),
        ("{{ ('%(a)s' * 9999) % {'a': x} }}", "makes more than"),
        ("{{ '{:{}}'.format(1, 10000000000) | length }}", "makes more than"),
        ("{{ ('{0}' * 9999).format(x) | length }}", "makes more than"),
        ("{{ ('\n' * 99999) | indent(99999) | length }}", "makes more than"),
        ("{{ x | replace(new=x, old='a') | length }}", "makes more than"),
        ("{{ ('1' * 99999) | replace(1, x) | length }}", "makes more than"),
        ("{{ x | join([x]) | length }}", "makes more than"),
        ("{{ x.translate({97: x}) | length }}", "makes more than"),
        ("{{ (1).to_bytes(10000000000, 'big') | length }}", "makes more than"),
        ("{% macro f() %}{% for i in range(99999) %}{{ x }}{% endfor %}{% endmacro %}"
         "{{ f() | length }}", "writes more than"),
        ("{% set y %}{% for i in range(99999) %}" + "a" * 9999 + "{% endfor %}{% endset %}",
         "writes more than"),
        ("{{ ([[0] * 99] * 99) | sum(start=[]) | length }}", "`sum` is for at most"),
        ("{{ x | wordwrap(1) | length }}", "`wordwrap` is for at most"),
    ],
)  # fmt: skip
def test_a_text_that_would_be_huge_is_not_made(source, message, monkeypatch):
    monkeypatch.setattr(bounds, "MOST_CHARACTERS", 100_000)
    monkeypatch.setattr(bounds, "MOST_WRITTEN", 1_000_000)
    monkeypatch.setattr(bounds, "MOST_FOR_SLOW", 10_000)
    with pytest.raises(ValueError, match=message):
        ChatTemplate(NESTED + source).render([FIRST])


def test_a_template_cannot_reach_its_clock(monkeypatch):
    monkeypatch.setattr(bounds, "SECONDS", 0.3)
    for name in ("tick", "environment", "concatenate", "written"):
        with pytest.raises(ValueError, match="takes longer than"):
            ChatTemplate(f"{{% set {name} = 1 %}}{LOOP}").render([FIRST])


def test_a_long_conversation_is_within_the_bounds():
    messages = [FIRST | {"content": "a" * 1000}, REPLY] * 1000
    text = ChatTemplate(templates.CHATML).render(messages)
    assert len(re.findall("<.im_start.>user", text)) == 1000


def test_a_template_comes_back_from_its_configuration():
    template = ChatTemplate(templates.FALCON, TOKENS)
    again = ChatTemplate(**template.get_config())
    assert again.render([FIRST]) == template.render([FIRST])
    with pytest.raises(ValueError, match="must be a string. Received: default=7"):
        ChatTemplate({"default": 7})
    assert keras_mamba2.ChatTemplate is ChatTemplate
