"""A small tokenizer of Gemma's kind, built in memory: byte fallback, "▁" for spaces, control
tokens, plain added tokens, and control tokens that are not flagged as special."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONTROLS = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|image|>", "<|turn>x"]
UNFLAGGED = ["<|channel>", "<channel|>"]
PLAIN = ["\n\n", "\n\n\n", "<table>", "\t\t"]
MERGES = ["< |", "| >", "t u", "tu r", "tur n", "turn |>", "<| turn", "▁ a", "▁a b", "▁ ▁", "a b"]

TEMPLATE = """\
{{ bos_token }}{% for message in messages -%}
<|turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{% if message['content'] is string %}{{ message['content'] | trim }}{% else -%}
{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}<turn|>
{% endfor %}{% if enable_thinking is defined and enable_thinking %}<|channel>thought
{% endif %}{% if add_generation_prompt %}<|turn>model
{% endif %}"""


def build(
    template: str | None = TEMPLATE,
    controls: list[str] = CONTROLS,
    unflagged: list[str] = UNFLAGGED,
) -> PreTrainedTokenizerFast:
    tokens = controls + unflagged + PLAIN + [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += [chr(code) for code in range(33, 127)] + ["▁", "\n", "é", "\u0301"]
    tokens += [merge.replace(" ", "") for merge in MERGES]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in controls])
    backend.add_tokens([AddedToken(t, normalized=False) for t in unflagged + PLAIN])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def save(folder: Path, template: str | None = TEMPLATE) -> Path:
    build(template).save_pretrained(folder)
    return folder
