"""Prompts are tokenized as the reference does it, and user text is never a control token."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import gemma_like
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from text_strategies import plain_texts, spelling_texts
from transformers import BatchEncoding

from mlx_diffgemma.errors import CheckpointError, PromptError, UsageError
from mlx_diffgemma.text.control_tokens import spelled_in
from mlx_diffgemma.text.prompt import encode_prompt, rows_of
from mlx_diffgemma.text.tokenizer import hf_tokenizer, load_tokenizer

DEMO = Path(__file__).parents[1] / "fixtures" / "demo-hf-tokenizer"
TOKENIZERS: dict[str, Any] = {"demo": load_tokenizer(DEMO), "gemma-like": gemma_like.build()}
GEMMA = TOKENIZERS["gemma-like"]
each_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def controls(name: str) -> set[int]:
    """The ids that no text may turn into; an unknown character may be <unk>."""
    tokenizer = TOKENIZERS[name]
    names = [*tokenizer.all_special_tokens, *gemma_like.CONTROLS, *gemma_like.UNFLAGGED]
    known = [token for token in names if token in tokenizer.get_vocab()]
    return {tokenizer.convert_tokens_to_ids(token) for token in known} - {tokenizer.unk_token_id}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def reference(tokenizer: Any, messages: list[dict[str, Any]], **settings: Any) -> list[int]:
    """What transformers makes of messages."""
    return hf_tokenizer(tokenizer).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False, **settings
    )


def spells_nothing(text: str) -> bool:
    names = [*gemma_like.CONTROLS, *gemma_like.UNFLAGGED, "<|tool_response>"]
    return not any(name in text for name in names)


@each_tokenizer
@settings(max_examples=200, deadline=None)
@given(text=plain_texts, system=st.none() | plain_texts)
def test_plain_text_is_tokenized_as_transformers_does(name, text, system):
    if not text.strip() or not spells_nothing(text + (system or "")):
        return
    tokenizer = TOKENIZERS[name]
    messages = [user(text)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    expected = reference(tokenizer, messages)
    assert encode_prompt(tokenizer, text, system_prompt=system) == expected
    assert encode_prompt(tokenizer, messages) == expected


@each_tokenizer
@settings(max_examples=300, deadline=None)
@given(text=spelling_texts, answer=spelling_texts, system=st.none() | spelling_texts)
@example(text="<turn|>", answer="a", system=None)
@example(text="a<|turn>x", answer="<|", system="turn|>")
def test_text_that_spells_control_tokens_stays_text(name, text, answer, system):
    if not text.strip():
        return
    tokenizer = TOKENIZERS[name]
    messages = [user(answer), {"role": "assistant", "content": answer}, user(text)]
    harmless = [user("a"), {"role": "assistant", "content": "a"}, user("a")]
    ids = encode_prompt(tokenizer, messages, system_prompt=system)
    expected = encode_prompt(tokenizer, harmless, system_prompt=None if system is None else "a")
    # The control tokens are those of the template, in its order.
    forbidden = controls(name)
    assert [i for i in ids if i in forbidden] == [i for i in expected if i in forbidden]
    # And nothing is lost or added.
    if name == "gemma-like":
        contents = [answer, answer, text] if system is None else [system, answer, answer, text]
        roles = ["user", "model", "user"] if system is None else ["system", "user", "model", "user"]
        turns = "".join(
            f"<|turn>{role}\n{content.strip()}<turn|>\n"
            for role, content in zip(roles, contents, strict=True)
        )
        shown = f"<bos>{turns}<|turn>model\n".replace("▁", " ")
        assert GEMMA.decode(ids) == shown


@each_tokenizer
@settings(max_examples=200, deadline=None)
@given(text=spelling_texts)
def test_raw_text_is_text_as_well(name, text):
    if not text:
        return
    tokenizer = TOKENIZERS[name]
    ids = encode_prompt(tokenizer, text, raw=True)
    assert controls(name).isdisjoint(ids)
    if name == "gemma-like":
        assert GEMMA.decode(ids) == text.replace("▁", " ")
    if spells_nothing(text):
        assert ids == tokenizer.encode(text)


def test_tokenization_around_a_spelling_does_not_change():
    """Only the spelling itself differs: it is tokenized as if the control token did not exist."""
    plain = gemma_like.build()
    text = "ab <turn|> ab\n\nab<|turn>"
    ids = encode_prompt(plain, text, raw=True)
    assert plain.convert_ids_to_tokens(ids) == [
        "ab", "▁", "<", "turn|>", "▁ab", "\n\n", "ab", "<|turn",  ">",
    ]  # fmt: skip
    # The tokenizer is as it was.
    assert plain.encode("<turn|>") == [plain.convert_tokens_to_ids("<turn|>")]


def test_spellings_joined_from_parts_stay_text():
    turn = GEMMA.convert_tokens_to_ids("<turn|>")
    for cut in range(1, len("<turn|>")):
        parts = [{"type": "text", "text": t} for t in ("a<turn|>"[: cut + 1], "<turn|>"[cut:])]
        ids = encode_prompt(GEMMA, [user(parts)])
        assert ids.count(turn) == 1, parts
        assert "a<turn|><turn|>\n" in GEMMA.decode(ids)


def test_parts_go_to_a_template_that_reads_them_and_joined_to_another():
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "  ab "}]
    expected = reference(GEMMA, [user(parts)])
    assert encode_prompt(GEMMA, [user(parts)]) == expected
    demo = TOKENIZERS["demo"]
    assert encode_prompt(demo, [user(parts)]) == encode_prompt(demo, "ab  ab ")


def test_raw_prompts_begin_with_bos_where_the_tokenizer_adds_it():
    from tokenizers import processors

    tokenizer = gemma_like.build()
    bos = tokenizer.bos_token_id
    assert encode_prompt(tokenizer, "ab", raw=True)[0] != bos
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", bos)]
    )
    ids = encode_prompt(tokenizer, "ab<bos><|channel>", raw=True)
    assert ids[0] == bos
    assert ids.count(bos) == 1
    assert tokenizer.decode(ids) == "<bos>ab<bos><|channel>"
    assert tokenizer.decode(encode_prompt(tokenizer, "ab")).startswith("<bos><|turn>user\nab")


@pytest.mark.parametrize(
    "ids",
    [
        [5, 4, 3],
        (5, 4, 3),
        np.array([5, 4, 3]),
        np.array([[5, 4, 3]], np.int32),
        list(np.array([5, 4, 3])),
        mx.array([5, 4, 3]),
        mx.array([[5, 4, 3]], mx.uint32),
        BatchEncoding({"input_ids": [5, 4, 3], "attention_mask": [1, 1, 1]}),
        BatchEncoding({"input_ids": np.array([[0, 5, 4, 3]]), "attention_mask": [[0, 1, 1, 1]]}),
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_token_ids_are_taken_as_they_are(ids):
    for raw in (False, True):
        taken = encode_prompt(GEMMA, ids, raw=raw)
        assert taken == [5, 4, 3]
        assert all(type(token) is int for token in taken)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "a prompt must be a text, a list of messages, or token ids, not of the type None"),
        (7, "not of the type int."),
        (b"ab", "not of the type bytes."),
        (user("ab"), "not of the type dict."),
        ({5, 4}, "not of the type set."),
        (iter([5]), "not of the type list_iterator."),
        (np.array(5), "not of the type ndarray."),
        (np.array([0.5]), "message 1 must be an object"),
        ([5, True], "message 1 must be an object"),
        (np.array([[1, 2], [3, 4]]), "the prompt is 2 prompts; give them to batch_generate."),
        (np.zeros((1, 0), int), "the prompt is empty"),
        (BatchEncoding({"input_ids": []}), "the prompt is empty"),
    ],
)
def test_what_is_no_prompt(prompt, message):
    assert message in error_of(PromptError, prompt)


def test_the_prompts_of_a_batch():
    rows = [[5, 4], [3, 2]]
    assert rows_of(rows) == rows_of(tuple(rows)) == rows_of(np.array(rows)) == rows
    padded = BatchEncoding({"input_ids": [[0, 4], [3, 2]], "attention_mask": [[0, 1], [1, 1]]})
    assert [encode_prompt(GEMMA, row) for row in rows_of(padded)] == [[4], [3, 2]]
    for prompts in ("ab", b"ab", {"a": 1}, 7):
        with pytest.raises(UsageError, match="give a list of prompts, or use generate"):
            rows_of(prompts)


def test_markers_of_a_raw_prompt_count_if_they_are_to():
    text = "<bos><|turn>user\nab<turn|>\n<|channel>"
    assert encode_prompt(GEMMA, text, raw=True, markers=True) == GEMMA.encode(text)
    assert controls("gemma-like").isdisjoint(encode_prompt(GEMMA, text, raw=True))
    assert spelled_in(GEMMA, [text, "<turn|>", "<turn"]) == [
        "<bos>", "<|turn>", "<turn|>", "<|channel>",
    ]  # fmt: skip
    assert spelled_in(GEMMA, ["<TURN|> < |turn>"]) == []
    assert error_of(UsageError, "ab", markers=True) == (
        "markers count in a raw prompt only; add raw, or leave markers out."
    )


def test_a_bos_that_is_spelt_is_not_doubled():
    from tokenizers import processors

    tokenizer = gemma_like.build()
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", bos)]
    )
    for text in ("ab", "<bos>ab"):
        assert encode_prompt(tokenizer, text, raw=True, markers=True).count(bos) == 1


def test_a_template_may_change_the_case_of_a_text():
    template = "{{ messages[0].content | lower }}{{ messages[1].content | upper }}<turn|>"
    tokenizer = gemma_like.build(template, controls=[*gemma_like.CONTROLS, "[INST]"])
    ids = encode_prompt(tokenizer, [user("a<TURN|>"), user("[inst]b")])
    assert ids.count(tokenizer.convert_tokens_to_ids("<turn|>")) == 1
    assert tokenizer.convert_tokens_to_ids("[INST]") not in ids
    assert tokenizer.decode(ids) == "a<turn|>[INST]B<turn|>"


def test_what_belongs_to_the_tokenizer_is_made_once(monkeypatch):
    tokenizer, made = gemma_like.build(), []
    cls = type(tokenizer)
    real = cls.added_tokens_decoder.fget
    monkeypatch.setattr(
        cls, "added_tokens_decoder", property(lambda self: made.append(1) or real(self))
    )
    for text in ("ab", "a<turn|>", "b"):
        encode_prompt(tokenizer, text)
        encode_prompt(tokenizer, text, raw=True)
        spelled_in(tokenizer, [text])
    assert len(made) == 1
    kept = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert kept() is None


def test_thinking_is_the_templates_own_choice_unless_asked_for():
    turned_on = reference(GEMMA, [user("ab")], enable_thinking=True)
    turned_off = reference(GEMMA, [user("ab")], enable_thinking=False)
    assert turned_on != turned_off
    assert encode_prompt(GEMMA, "ab") == reference(GEMMA, [user("ab")]) == turned_off
    assert encode_prompt(GEMMA, "ab", thinking=True) == turned_on
    assert encode_prompt(GEMMA, "ab", thinking=False) == turned_off
    # The unflagged control token of the template is itself, that of the text is not.
    channel = GEMMA.convert_tokens_to_ids("<|channel>")
    assert encode_prompt(GEMMA, "<|channel>", thinking=True).count(channel) == 1


def test_the_wrapper_does_not_switch_thinking_on(tmp_path):
    """mlx-lm's own `apply_chat_template` would, as the vocabulary has `<|channel>`."""
    wrapped = load_tokenizer(gemma_like.save(tmp_path))
    assert wrapped.has_thinking
    plain = reference(GEMMA, [user("ab")])
    assert encode_prompt(wrapped, "ab") == plain
    asked = {"add_generation_prompt": True}
    assert wrapped.apply_chat_template([user("ab")], **asked) == plain
    thinks = wrapped.apply_chat_template([user("ab")], enable_thinking=True, **asked)
    assert thinks == reference(GEMMA, [user("ab")], enable_thinking=True) != plain


def error_of(kind: type[Exception], prompt: Any, tokenizer: Any = GEMMA, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        encode_prompt(tokenizer, prompt, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("prompt", ["", " \n", [], [user("")], [user([])], [user("a"), user(" ")]])
def test_an_empty_prompt_is_refused(prompt):
    assert error_of(PromptError, prompt) == "the prompt is empty; say what to write about."


def test_an_empty_raw_prompt_is_refused_and_white_space_is_not():
    assert error_of(PromptError, "", raw=True) == "the prompt is empty; say what to write about."
    assert encode_prompt(GEMMA, "\n\n", raw=True) == GEMMA.encode("\n\n")


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("a", {"raw": True, "system_prompt": "b"},
         "a system prompt needs the chat template, and a raw prompt uses none; leave it out."),
        ("a", {"raw": True, "thinking": True},
         "a thinking mode needs the chat template, and a raw prompt uses none; leave it out."),
        ([1, 2], {"system_prompt": "b"},
         "a system prompt needs the chat template, and a prompt of token ids uses none; leave it "
         "out."),
        ([user("a")], {"raw": True}, "a raw prompt is a text; leave out raw to send messages."),
        ([{"role": "system", "content": "a"}, user("b")], {"system_prompt": "c"},
         "the messages have a system prompt already; leave out the other."),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other(prompt, settings, message):
    assert error_of(UsageError, prompt, **settings) == message


@pytest.mark.parametrize(("thinking", "flag"), [(True, "--thinking"), (False, "--no-thinking")])
def test_thinking_needs_a_template_that_knows_it(thinking, flag):
    assert error_of(UsageError, "a", TOKENIZERS["demo"], thinking=thinking) == (
        f"this checkpoint's chat template knows no thinking mode; leave out {flag}."
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([user("a"), "b"],
         'message 2 must be an object like {"role": "user", "content": "..."}, not \'b\'.'),
        ([{"content": "a"}],
         'message 1 must be an object like {"role": "user", "content": "..."}, '
         "not {'content': 'a'}."),
        ([user(7)], "message 1: 'content' must be a text or a list of parts."),
        ([user([{"type": "image", "url": "x"}])],
         "message 1 holds image data: only text is supported yet."),
        ([user([{"type": "text"}])],
         'message 1: a part of its content must be {"type": "text", "text": "..."}, '
         "not {'type': 'text'}."),
    ],
)  # fmt: skip
def test_messages_that_cannot_be_read(messages, message):
    assert error_of(PromptError, messages) == message


@pytest.mark.parametrize("raw", [True, False])
def test_text_that_is_no_unicode(raw):
    assert error_of(PromptError, "ab\udce9", raw=raw) == (
        "the prompt is not valid Unicode at character 3; give it as text in UTF-8."
    )


BROKEN = [
    ("{% for x in y %}\nab", CheckpointError,
     "the chat template is broken: line 2: Unexpected end of template."),
    ("{{ bos_token }}\n{{ messages[0].tools.name }}", CheckpointError,
     "the chat template fails: line 2: 'dict object' has no attribute 'tools'; "
     "mend it, or give another with --chat-template."),
    ("\n\n{{ 1 + bos_token }}", CheckpointError, "the chat template fails: line 3: TypeError: "),
    ("{{ raise_exception('No system\nrole') }}", PromptError,
     "the chat template refuses these messages: No system role"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "kind", "message"), BROKEN)
def test_a_broken_template_is_named_with_its_line(template, kind, message):
    assert error_of(kind, "a", gemma_like.build(template)).startswith(message)


def test_a_missing_template_is_an_error_only_where_one_is_needed():
    tokenizer = gemma_like.build(template=None)
    assert error_of(CheckpointError, "ab", tokenizer) == (
        "the tokenizer has no chat template; give one with --chat-template FILE, or send the "
        "prompt as it is with --raw."
    )
    assert encode_prompt(tokenizer, "ab", raw=True) == tokenizer.encode("ab")
    assert encode_prompt(tokenizer, [7]) == [7]


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_the_templates_tokens_keep_their_flags_beside_a_spelling(flag):
    """What the tokenizer does around its own control tokens is the same on both paths."""
    from tokenizers import AddedToken

    tokenizer = gemma_like.build("{{ messages[0].content }}.  <|image|>  a b<|image|>b <|image|>")
    tokenizer.backend_tokenizer.add_special_tokens(
        [AddedToken("<|image|>", normalized=False, special=True, **{flag: True})]
    )
    whole = encode_prompt(tokenizer, "a")
    assert whole == reference(tokenizer, [user("a")])
    full_stop = tokenizer.convert_tokens_to_ids(".")
    marked = encode_prompt(tokenizer, "<turn|>")
    assert marked[marked.index(full_stop) :] == whole[whole.index(full_stop) :]


def test_of_several_templates_the_default_one_is_used():
    tokenizer = gemma_like.build()
    tokenizer.chat_template = {"default": gemma_like.TEMPLATE, "other": "{{ no }}"}
    assert encode_prompt(tokenizer, "ab") == reference(GEMMA, [user("ab")])
    tokenizer.chat_template = {"other": "{{ no }}"}
    assert error_of(CheckpointError, "a", tokenizer).startswith(
        "the tokenizer has no chat template"
    )


def test_a_message_may_call_tools_instead_of_saying_something():
    template = "{% for m in messages %}{{ m.content or m.tool_calls[0].name }};{% endfor %}"
    messages = [
        user("a"),
        {"role": "assistant", "content": None, "tool_calls": [{"name": "b<eos>"}]},
    ]
    tokenizer = gemma_like.build(template)
    ids = encode_prompt(tokenizer, messages)
    assert tokenizer.decode(ids) == "a;b<eos>;"
    assert tokenizer.eos_token_id not in ids
