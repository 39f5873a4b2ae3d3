"""Tokenizers are read from a folder, never from the network, and every way in which one can be
broken is one line."""

from __future__ import annotations

import io
import json
import shutil
import socket
from pathlib import Path

import gemma_like
import pytest
import sentencepiece

from mlx_diffgemma.errors import CheckpointError, UsageError
from mlx_diffgemma.text.detokenize import StreamingText
from mlx_diffgemma.text.prompt import encode_prompt
from mlx_diffgemma.text.tokenizer import hf_tokenizer, load_tokenizer

DEMO = Path(__file__).parents[1] / "fixtures" / "demo-hf-tokenizer"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any attempt to reach another machine fails loudly."""

    def refuse(*args, **kwargs):
        raise AssertionError("a tokenizer must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo model's tokenizer, to be spoilt."""
    return Path(shutil.copytree(DEMO, tmp_path / "checkpoint"))


def error_of(kind: type[Exception], path: Path, **settings) -> str:
    with pytest.raises(kind) as caught:
        load_tokenizer(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_tokenizer_is_the_checkpoints(folder):
    tokenizer = load_tokenizer(folder, eos_token_ids=[1, 5])
    assert tokenizer.eos_token_ids == {1, 5}
    assert tokenizer.chat_template == (DEMO / "chat_template.jinja").read_text(encoding="utf-8")
    text = "<bos><|turn>user\nsudoku<turn|>\n<|turn>model\n"
    assert tokenizer.decode(encode_prompt(tokenizer, "sudoku")) == text


def test_one_eos_may_be_given_as_a_number(folder):
    assert load_tokenizer(folder, eos_token_ids=7).eos_token_ids == {1, 7}
    assert load_tokenizer(folder).eos_token_ids == {1}


def test_another_template_may_be_given_as_text_or_file(folder, tmp_path):
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
    file = tmp_path / "mine.jinja"
    file.write_text(template, encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    for given in (template, str(file)):
        tokenizer = load_tokenizer(folder, chat_template=given)
        assert tokenizer.has_chat_template
        assert tokenizer.decode(encode_prompt(tokenizer, "hi")) == "user:hi"


def test_a_template_file_that_cannot_be_read(folder, tmp_path):
    assert error_of(UsageError, folder, chat_template="no/such.jinja") == (
        "chat template 'no/such.jinja' cannot be read (No such file or directory); give a Jinja "
        "file or its text."
    )
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    assert error_of(UsageError, folder, chat_template=str(binary)) == (
        f"chat template {str(binary)!r} is not a text file in UTF-8; give a Jinja file or its text."
    )


def test_no_template_is_found_out_when_one_is_needed(folder):
    (folder / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(folder)
    assert len(encode_prompt(tokenizer, "hi", raw=True)) == 2
    with pytest.raises(CheckpointError) as caught:
        encode_prompt(tokenizer, "hi")
    assert str(caught.value) == (
        f"{folder} has no chat template; give one with --chat-template FILE, or send the prompt "
        "as it is with --raw."
    )


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    assert error_of(CheckpointError, folder) == (
        f"{folder} has no tokenizer (tokenizer.json or tokenizer.model); copy the tokenizer's "
        "files from the original checkpoint."
    )


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("tokenizer.json", '{"model": ', "Expecting value: line 1 column 11 (char 10)"),
        ("tokenizer.json", "[1]", "it is not a JSON object"),
        ("tokenizer.json", "{}", "it has no 'model'"),
        ("tokenizer_config.json", "", "Expecting value: line 1 column 1 (char 0)"),
        ("tokenizer_config.json", '"text"', "it is not a JSON object"),
    ],
)
def test_a_damaged_file_is_named(folder, name, content, why):
    (folder / name).write_text(content, encoding="utf-8")
    assert error_of(CheckpointError, folder) == (
        f"{folder / name} is damaged ({why}); copy it again from the original checkpoint."
    )


def change(path: Path, **values) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **values}), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "values", "why"),
    [
        ("tokenizer.json", {"model": {"type": "WordLevel"}}, "Exception: "),
        ("tokenizer.json", {"model": {"type": "Unheard"}}, "Exception: "),
        ("tokenizer.json", {"added_tokens": [{"id": 0}]}, ""),
        ("tokenizer.json", {"decoder": {"type": "Unheard"}}, "Exception: "),
        ("tokenizer_config.json", {"chat_template_type": "unheard"}, "ModuleNotFoundError: "),
    ],
)
def test_a_tokenizer_that_the_libraries_cannot_read(folder, name, values, why):
    change(folder / name, **values)
    message = error_of(CheckpointError, folder)
    assert message.startswith(f"{folder}: the tokenizer cannot be read ({why}")
    assert message.endswith("); copy the tokenizer's files again from the original checkpoint.")


def test_code_of_a_repository_is_not_run_unasked(folder):
    code = {"AutoTokenizer": ["own.Own", None]}
    change(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map=code)
    (folder / "own.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    assert error_of(CheckpointError, folder) == (
        f"{folder}: the tokenizer needs Python code of its repository; read that code, then allow "
        "it with --trust-remote-code."
    )


@pytest.mark.parametrize("with_config", [True, False])
def test_nothing_but_a_sentencepiece_model(tmp_path, with_config):
    """Control tokens, which sentencepiece only knows as symbols, behave as in a tokenizer.json."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words[i:] + words[:i]) for i in range(9)] * 9),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        user_defined_symbols=["<|turn>", "<turn|>"],
        minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    if with_config:
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
    tokenizer = load_tokenizer(tmp_path, chat_template=gemma_like.TEMPLATE)
    ids = encode_prompt(tokenizer, "the lazy <turn|> 🦊")
    turn = hf_tokenizer(tokenizer).convert_tokens_to_ids("<turn|>")
    assert ids.count(turn) == 1
    end = "<turn|>\n<|turn>model\n"
    assert tokenizer.decode(ids).endswith(f"<|turn>user\nthe lazy <turn|> 🦊{end}")
    stream = StreamingText(tokenizer)
    assert stream.add(ids) + stream.finish() == "user\nthe lazy <turn|> 🦊\nmodel\n"


def test_a_damaged_sentencepiece_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    message = error_of(CheckpointError, tmp_path)
    assert message.startswith(f"{tmp_path}: the tokenizer cannot be read (")
