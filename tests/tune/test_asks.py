"""Prompts from a file, and the ways to know whether an answer holds."""

from __future__ import annotations

import json

import pytest

from mlx_diffgemma.errors import DiffGemmaError, UsageError
from mlx_diffgemma.tune.asks import Ask, Judge, agreement, check_of, read_asks
from mlx_diffgemma.tune.prompts import PROMPTS


def test_prompts_and_answers_are_read_in_every_form(tmp_path):
    path, question = tmp_path / "p.jsonl", {"role": "user", "content": "hi"}
    lines = [
        {"prompt": "a", "answer": "1"},
        {"prompt": "b", "completion": "2"},
        {"messages": [question, {"role": "assistant", "content": "3"}]},
    ]
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert read_asks(path) == [Ask("a", "1"), Ask("b", "2"), Ask([question], "3")]


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "has no prompts"),
        ("nonsense", "line 1 is not JSON"),
        ("[1]", "line 1 is"),
        ('{"text": "x"}', "line 1 has no prompt"),
        ('{"prompt": "a", "answer": 3}', "no text"),
        ('{"prompt": "a", "answer": "3"}\n{"prompt": "b"}', "1 of 2 lines"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(tmp_path, text, says):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DiffGemmaError, match=says) as raised:
        read_asks(tmp_path / "p.jsonl")
    assert "\n" not in str(raised.value)


def test_checks(tmp_path):
    (tmp_path / "s.json").write_text('{"type": "object", "required": ["a"]}')
    for given, good, bad in (
        ("regex:v[0-9]+", " v12\n", "v12 or so"),
        (f"json-schema:{tmp_path / 's.json'}", '{"a": 1}', '{"b": 1}'),
        (f"json-schema:{tmp_path / 's.json'}", '{"a": {}}', "{"),
        ("command:grep -q right", "all right", "all wrong"),
    ):
        holds = check_of(given)
        assert holds(good) and not holds(bad)


@pytest.mark.parametrize("given", ["v[0-9]", "regex:", "regex:(", "json-schema:none", "sql:x"])
def test_a_check_that_is_none_is_refused(given):
    with pytest.raises(DiffGemmaError):
        check_of(given)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("[1]", "holds [1], which is no JSON schema"),
        ('{"type": 3}', "the JSON schema cannot be used: 3 is not valid"),
        ('{"$ref": "http://127.0.0.1:9/s.json"}', "its reference 'http://127.0.0.1:9/s.json'"),
        ("{", "is not JSON"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_in_a_line(tmp_path, schema, says):
    (tmp_path / "s.json").write_text(schema)
    with pytest.raises(UsageError) as raised:
        check_of(f"json-schema:{tmp_path / 's.json'}")
    said = str(raised.value)
    assert said.startswith(f"--check: {tmp_path / 's.json'}") and says in said and "\n" not in said


def test_a_check_comes_before_known_answers_and_these_before_agreement():
    known, free = [Ask("a", "1")], [Ask("a")]
    assert Judge.of(known, check_of("regex:x"), 3).name == "check"
    assert Judge.of(known, None, 3).name == "exact"
    assert Judge.of(free, None, 3).name == "agreement"
    with pytest.raises(UsageError, match="at least 2"):
        Judge.of(free, None, 1)


def test_agreement_is_1_for_equal_texts_alone():
    assert agreement("a b c", "a b c") == 1
    assert agreement("a b c", "d e f") == 0
    assert agreement("a b c d", "a b x d") == 0.75
    assert agreement("a  b", "a b") < 1


def test_the_prompts_that_come_with_it_are_64():
    assert len(set(PROMPTS)) == len(PROMPTS) == 64
