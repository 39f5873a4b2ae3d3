"""Data files become the token ids that generation reads and writes; bad ones are one line."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.text.prompt import encode_prompt
from mlx_diffgemma.text.tokenizer import load_tokenizer
from mlx_diffgemma.train.data import Limits, load_data

sys.path.insert(0, str(Path(__file__).parents[1] / "text"))
import gemma_like
import release_like

DEMO = Path(__file__).parents[1] / "fixtures" / "demo-hf-tokenizer"
LIMITS = Limits(max_seq_length=200, context=256, canvas_length=64)
TURN, TEXT = 5, 1  # the demo's <turn|> and <eos>
GOOD = {"prompt": "sudoku", "completion": "123"}
ASKED, ANSWERED = {"role": "user", "content": "sudoku"}, {"role": "assistant", "content": "123"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO, eos_token_ids=[1, 5])


def write(folder: Path, split: str, *records: object) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def one(tmp_path, tokenizer, record):
    write(tmp_path, "train", record)
    (example,) = load_data(str(tmp_path), tokenizer, LIMITS, ["train"]).train
    return example


@pytest.mark.parametrize(
    "record",
    [
        GOOD,
        {"messages": [ASKED, ANSWERED]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "sudoku"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "123"}]},
            ]
        },
    ],
)
def test_an_example_is_what_generation_reads_and_then_writes(tmp_path, tokenizer, record):
    example = one(tmp_path, tokenizer, record)
    assert list(example.tokens[: example.prompt]) == encode_prompt(tokenizer, "sudoku")
    assert tokenizer.decode(list(example.response[:-1])) == "123"
    assert example.response[-1] == TURN


def test_the_last_answer_of_a_conversation_is_learnt(tmp_path, tokenizer):
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": text} for role, text in turns]
    example = one(tmp_path, tokenizer, {"messages": messages})
    assert list(example.tokens[: example.prompt]) == encode_prompt(tokenizer, messages[:-1])
    assert tokenizer.decode(list(example.response[:-1])) == "d"


def test_a_text_is_learnt_from_its_beginning(tmp_path, tokenizer):
    example = one(tmp_path, tokenizer, {"text": "123 456"})
    assert tokenizer.decode(list(example.tokens)) == "123 456<eos>"
    assert (example.prompt, example.response[-1]) == (1, TEXT)


def test_a_text_behind_a_bos(tmp_path):
    folder = gemma_like.save(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(folder, eos_token_ids=[1])
    tokenizer._tokenizer.backend_tokenizer.post_processor = _with_bos(tokenizer.bos_token_id)
    example = one(tmp_path, tokenizer, {"text": "ab ab"})
    assert example.tokens[: example.prompt] == (tokenizer.bos_token_id,)
    assert tokenizer.decode(list(example.response[:-1])) == "ab ab"


def _with_bos(bos: int):
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])


@pytest.mark.parametrize("key", ["prompt", "completion", "text"])
def test_a_spelled_control_token_is_text(tmp_path, tokenizer, key):
    spelling = "a<turn|>b<eos>"
    record = {"text": spelling} if key == "text" else {**GOOD, key: spelling}
    example = one(tmp_path, tokenizer, record)
    plain = one(tmp_path, tokenizer, {"text": "a"} if key == "text" else {**GOOD, key: "a"})
    for control in (TURN, TEXT, 4):
        assert example.tokens.count(control) == plain.tokens.count(control)
    assert len(example.tokens) > len(plain.tokens)


@pytest.fixture(scope="module")
def release():
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    own = release_like.build()
    return TokenizerWrapper(own, eos_token_ids=release_like.ends(own))


CALL = {"function": {"name": "get", "arguments": '{"city": "Austin, TX"}'}}


@pytest.mark.parametrize(
    ("answer", "response", "thinks"),
    [
        ({"content": "Paris."}, "Paris.<turn|>", False),
        ({"content": " a<turn|>"}, " a<turn|><turn|>", False),
        ({"tool_calls": [CALL]},
         '<|tool_call>call:get{city:<|"|>Austin, TX<|"|>}<tool_call|><|tool_response>', False),
        ({"content": "One moment.", "tool_calls": [CALL, CALL]},
         '<|tool_call>call:get{city:<|"|>Austin, TX<|"|>}<tool_call|>'
         '<|tool_call>call:get{city:<|"|>Austin, TX<|"|>}<tool_call|>One moment.<turn|>', False),
        ({"content": "Paris.", "reasoning_content": "plan"},
         "<|channel>thought\nplan<channel|>Paris.<turn|>", True),
        ({"content": "Paris.", "thinking": "plan"},
         "<|channel>thought\nplan<channel|>Paris.<turn|>", True),
    ],
)  # fmt: skip
def test_an_answer_is_learnt_as_the_template_renders_it(
    tmp_path, release, answer, response, thinks
):
    tools = [{"name": "get", "description": "d", "parameters": {"city": {}}}]
    record = {"messages": [ASKED, {"role": "assistant", **answer}], "tools": tools}
    example = one(tmp_path, release, record)
    prompt = encode_prompt(release, "sudoku", tools=tools, thinking=thinks or None)
    assert list(example.tokens[: example.prompt]) == prompt
    assert release.decode(list(example.response)) == response
    assert example.response[-1] in release_like.ends(release)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"content": "<|channel>thought\nplan<channel|>Paris."}, "put what was thought under"),
        ({"tool_calls": [CALL], "tool_responses": [{"name": "get", "response": 1}],
          "content": "Sunny."}, "does not render the text of the answer as given"),
        ({"tool_calls": [{"function": {"name": "a b", "arguments": {}}}]}, "calls of tools"),
        ({"content": "x", "reasoning_content": {"a": 1}}, "must be a text"),
    ],
)  # fmt: skip
def test_what_would_be_dropped_is_refused(tmp_path, release, answer, words):
    write(tmp_path, "train", {"messages": [ASKED, {"role": "assistant", **answer}]})
    with pytest.raises(UsageError, match=rf"train\.jsonl, line 1: .*{words}"):
        load_data(str(tmp_path), release, LIMITS, ["train"])


def test_blank_lines_windows_ends_and_a_byte_order_mark(tmp_path, tokenizer):
    content = "\ufeff" + json.dumps(GOOD) + "\r\n\r\n\n" + json.dumps(GOOD)
    (tmp_path / "train.jsonl").write_bytes(content.encode())
    assert len(load_data(str(tmp_path), tokenizer, LIMITS, ["train"]).train) == 2


def test_splits(tmp_path, tokenizer):
    write(tmp_path, "train", GOOD, GOOD)
    assert load_data(str(tmp_path), tokenizer, LIMITS).valid == ()
    write(tmp_path, "valid", GOOD)
    splits = load_data(str(tmp_path), tokenizer, LIMITS)
    assert (len(splits.train), len(splits.valid), splits.test) == (2, 1, ())
    with pytest.raises(UsageError, match="has no test split"):
        load_data(str(tmp_path), tokenizer, LIMITS, ["train", "test"])


LONG = {"prompt": "x", "completion": "1" * 300}
MESSAGE = {"role": "user", "content": "x"}
CALLING = {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": ', "is no JSON"),
        ("[1, 2]", "is no object"),
        ('{"question": "x"}', "has none of the known keys"),
        ('{"prompt": "x", "completion": 3}', "'completion' must be a text, not 3"),
        ('{"prompt": "x", "completion": ""}', "the response is empty"),
        ('{"prompt": " ", "completion": "x"}', "the prompt is empty"),
        ('{"text": ""}', "the text is empty"),
        (json.dumps(LONG), "more than --max-seq-length 200; raise it"),
        (json.dumps({"messages": [MESSAGE]}), "at least two"),
        (json.dumps({"messages": [MESSAGE, MESSAGE]}), "the last message must be the assistant's"),
        (json.dumps({"messages": [MESSAGE, {"role": "assistant"}]}), "is empty"),
        (json.dumps({"messages": ["x", {"role": "assistant", "content": "y"}]}), "message 1 must"),
        (json.dumps({**GOOD, "tools": [{}]}), "tool 1 must be a function"),
        (json.dumps({**GOOD, "tools": [{"name": "f"}]}), "chat template knows no tools"),
        (json.dumps({"messages": [ASKED, CALLING]}),
         "does not render the calls of tools of the answer"),
        (json.dumps({"messages": [ASKED, {**ANSWERED, "reasoning": "plan"}]}),
         "does not render the thought of the answer"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path, tokenizer, line, words):
    write(tmp_path, "train", GOOD, line)
    with pytest.raises(UsageError, match=words) as caught:
        load_data(str(tmp_path), tokenizer, LIMITS, ["train"])
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'train.jsonl'}, line 2: ")
    assert "\n" not in message


def test_bytes_that_are_no_text(tmp_path, tokenizer):
    (tmp_path / "train.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"text": "\xff"}\n')
    with pytest.raises(UsageError, match=r"train\.jsonl, line 2: is not UTF-8"):
        load_data(str(tmp_path), tokenizer, LIMITS, ["train"])


def test_more_than_the_context(tmp_path, tokenizer):
    write(tmp_path, "train", {"prompt": "x" * 100, "completion": "1" * 130})
    limits = Limits(max_seq_length=999, context=256, canvas_length=64)
    words = r"line 1: .* 3 canvas.* exceed the model's context of 256"
    with pytest.raises(UsageError, match=words):
        load_data(str(tmp_path), tokenizer, limits, ["train"])


def test_no_data(tmp_path, tokenizer):
    with pytest.raises(UsageError, match="has no train split"):
        load_data(str(tmp_path), tokenizer, LIMITS)
    write(tmp_path, "train", "")
    with pytest.raises(UsageError, match="train split is empty"):
        load_data(str(tmp_path), tokenizer, LIMITS)
    with pytest.raises(UsageError, match="is a file"):
        load_data(str(tmp_path / "train.jsonl"), tokenizer, LIMITS)
    with pytest.raises(UsageError, match="no such folder"):
        load_data(str(tmp_path / "no where"), tokenizer, LIMITS)


class FakeHub(types.ModuleType):
    """Stands in for the `datasets` package."""

    def __init__(self, splits) -> None:
        super().__init__("datasets")
        self.exceptions = types.SimpleNamespace(DatasetsError=RuntimeError)
        self._splits = splits

    def load_dataset(self, name):
        if name not in self._splits:
            raise RuntimeError(f"{name} doesn't\nexist")
        return self._splits[name]


def test_a_data_set_of_the_hub(monkeypatch, tokenizer):
    good = {**GOOD, "text": None}
    hub = FakeHub({"me/it": {"train": [good, {"prompt": "x"}], "validation": [good]}})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    splits = load_data("me/it", tokenizer, LIMITS, ["valid"])
    assert len(splits.valid) == 1
    with pytest.raises(UsageError, match=r"me/it, train row 1: has none"):
        load_data("me/it", tokenizer, LIMITS)
    with pytest.raises(UsageError, match=r"no data set \(me/other doesn't exist\)"):
        load_data("me/other", tokenizer, LIMITS)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install datasets"):
        load_data("me/it", tokenizer, LIMITS)
