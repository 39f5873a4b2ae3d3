"""A small tokenizer that has the released model's markers, each a special token of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from text import gemma_like
from transformers import PreTrainedTokenizerFast

MARKERS = [
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<|think|>", "<|tool>",
    "<tool|>", "<tool_response|>",
]  # fmt: skip
TOOL_RESPONSE = 50  # its id in the release too
EOS = ("<eos>", "<turn|>", "<|tool_response>")
FIXTURES = Path(__file__).parents[1] / "fixtures"

# Tools, calls, results and thoughts as the release's template has them.
TEMPLATE = """\
{%- macro value(item) -%}
{%- if item is string -%}<|"|>{{ item }}<|"|>
{%- elif item is mapping -%}{{ '{' }}{{ pairs(item) }}{{ '}' }}
{%- elif item is sequence -%}[{% for each in item %}{{ value(each) }}{{ ',' if not loop.last }}\
{% endfor %}]
{%- else -%}{{ item | tojson }}{%- endif -%}
{%- endmacro -%}
{%- macro pairs(items) -%}
{%- for key, item in items | dictsort -%}
{{ key }}:{{ value(item) }}{{ ',' if not loop.last }}
{%- endfor -%}
{%- endmacro -%}
{%- macro said(text) -%}
{{ text.split('<channel|>')[-1].split('<|channel>')[0] | trim }}
{%- endmacro -%}
{{ bos_token }}{% set first = messages[0]['role'] == 'system' -%}
{%- if tools or enable_thinking or first -%}
<|turn>system
{% if enable_thinking %}<|think|>{% endif %}
{%- if first %}{{ messages[0]['content'] | trim }}{% endif %}
{%- for tool in tools or [] -%}
{%- set function = tool['function'] -%}
<|tool>declaration:{{ function['name'] }}{description:{{ value(function['description']) }},\
parameters:{{ value(function['parameters']) }}}<tool|>
{%- endfor -%}
<turn|>
{% endif -%}
{% for message in (messages[1:] if first else messages) -%}
{%- set own = message['role'] in ['assistant', 'model'] -%}
<|turn>{{ 'model' if own else message['role'] }}
{% if message['reasoning_content'] and loop.last -%}
<|channel>thought
{{ message['reasoning_content'] }}<channel|>{% endif %}\
{% for call in message['tool_calls'] or [] -%}
<|tool_call>call:{{ call['function']['name'] }}{{ value(call['function']['arguments']) }}\
<tool_call|>{% endfor %}{% for result in message['tool_responses'] or [] -%}
<|tool_response>response:{{ result['name'] }}{{ value(result['response']) }}<tool_response|>\
{% endfor %}{% if message['content'] is string -%}
{{ said(message['content']) if own else message['content'] | trim }}{% else -%}
{% for part in message['content'] or [] -%}
{{ said(part['text']) if own else part['text'] | trim }}{% endfor %}{% endif %}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>model
{% if suffix %}{{ suffix }}{% endif %}{% endif %}"""


def build() -> PreTrainedTokenizerFast:
    controls = gemma_like.CONTROLS + MARKERS
    controls += [f"<unused{number}>" for number in range(TOOL_RESPONSE - len(controls))]
    return gemma_like.build(TEMPLATE, controls=[*controls, "<|tool_response>"], unflagged=[])


def ends(tokenizer: Any) -> tuple[int, ...]:
    """The ids that end an answer."""
    return tuple(tokenizer.convert_tokens_to_ids(list(EOS)))


def ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text in which spelt markers are markers."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def cases(name: str = "answers") -> list[dict[str, Any]]:
    """What a model writes and what is to be made of it ("answers"), or what it is to read
    ("messages")."""
    lines = (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
