"""The API, by the client that its users have."""

from tests.serving.conftest import NAME

GREEDY = {"model": NAME, "temperature": 0, "max_tokens": 20}


def alone(lm, prompt, count=20, **options):
    options = {"temperature": 0.0, "max_new_tokens": count, **options}
    return lm.generate(prompt, strip_prompt=True, **options)


def test_a_completion_is_what_generate_gives(client, lm):
    answer = client.completions.create(prompt="ROMEO:", **GREEDY)
    assert answer.choices[0].text == alone(lm, "ROMEO:")
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == NAME
    assert answer.usage.prompt_tokens == 6
    assert answer.usage.completion_tokens == 20


def test_pieces_of_a_stream_are_the_text(client, lm):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.completions.create(prompt="ROMEO:", **GREEDY, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == alone(lm, "ROMEO:")
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert last.choices == []
    assert last.usage.completion_tokens == 20
