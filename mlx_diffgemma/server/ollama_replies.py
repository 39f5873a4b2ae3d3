"""What Ollama's clients read: answers, whole and line by line, and what the model is."""

from __future__ import annotations

import hashlib
import re
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from mlx.utils import tree_flatten

from mlx_diffgemma.config import MODEL_TYPE
from mlx_diffgemma.server.pieces import Call, Ended, Piece, Started, Text, Thought, TokenInfo
from mlx_diffgemma.text.chat_template import template_text
from mlx_diffgemma.text.tokenizer import hf_tokenizer

if TYPE_CHECKING:
    from mlx_diffgemma.server.engine import Engine


class Reply:
    """An answer while it is written, line by line.

    Args:
        model: what the client calls the model.
        chat: whether it is a message of a chat, and not a completion.
    """

    def __init__(self, model: str, *, chat: bool) -> None:
        self.model, self._chat = model, chat
        self._asked = self._encoded = time.perf_counter_ns()

    def line(self, text: str, *, done: bool, **more: Any) -> dict[str, Any]:
        """A line that says `text`, with the fields of `more` beside it."""
        said: dict[str, Any] = {"response": text}
        if self._chat:
            own = {key: more.pop(key) for key in ("thinking", "tool_calls") if key in more}
            said = {"message": {"role": "assistant", "content": text, **own}}
        return {"model": self.model, "created_at": now(), **said, "done": done, **more}

    def loaded(self, keep_alive: Any) -> dict[str, Any]:
        """The line for a client that only wants the model to be loaded, or to be let go of."""
        reason = "unload" if keep_alive in (0, "0", "0s") else "load"
        return self.line("", done=True, done_reason=reason)

    def add(self, piece: Piece) -> dict[str, Any] | None:
        """The line that tells a piece of the answer, if any does."""
        if isinstance(piece, Started):
            self._encoded = time.perf_counter_ns()
        if isinstance(piece, Text) and (piece.text or piece.tokens):
            more = {"logprobs": list(map(_logprob, piece.tokens))} if piece.tokens else {}
            return self.line(piece.text, done=False, **more)
        if isinstance(piece, Thought):
            return self.line("", done=False, thinking=piece.text)
        if isinstance(piece, Call):
            function = {"index": piece.number, "name": piece.name, "arguments": piece.arguments}
            return self.line("", done=False, tool_calls=[{"id": piece.id, "function": function}])
        return self._last(piece) if isinstance(piece, Ended) else None

    def _last(self, piece: Ended) -> dict[str, Any]:
        end = time.perf_counter_ns()
        return self.line(
            "",
            done=True,
            done_reason="length" if piece.reason == "length" else "stop",
            total_duration=end - self._asked,
            load_duration=0,
            prompt_eval_count=piece.prompt_tokens,
            prompt_eval_duration=self._encoded - self._asked,
            eval_count=piece.completion_tokens,
            eval_duration=end - self._encoded,
        )

    def whole(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """The lines of an answer joined into one."""
        last = dict(lines[-1])
        said = [line["message"] if self._chat else line for line in lines]
        key = "content" if self._chat else "response"
        joined: dict[str, Any] = {key: "".join(each[key] for each in said)}
        thoughts = [each["thinking"] for each in said if "thinking" in each]
        calls = [call for each in said for call in each.get("tool_calls", ())]
        joined |= {"thinking": "".join(thoughts)} if thoughts else {}
        joined |= {"tool_calls": calls} if calls else {}
        tokens = [token for line in lines for token in line.get("logprobs", ())]
        last |= {"logprobs": tokens} if tokens else {}
        return {**last, "message": {**last["message"], **joined}} if self._chat else last | joined


def _logprob(token: TokenInfo) -> dict[str, Any]:
    return {
        "token": token.text,
        "logprob": token.log_probability,
        "bytes": list(token.spelled),
        "entropy": token.entropy,
    }


def tagged(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def listed(engine: Engine, since: str) -> dict[str, Any]:
    name = tagged(engine.name)
    arrays: list[tuple[str, Any]] = tree_flatten(engine.model.parameters())
    size = sum(array.nbytes for _, array in arrays)
    return {
        "name": name,
        "model": name,
        "modified_at": since,
        "size": size,
        "digest": hashlib.sha256(f"{name} {size}".encode()).hexdigest(),
        "details": _details(engine),
    }


def _details(engine: Engine) -> dict[str, Any]:
    quantized = engine.model.config.quantization
    kind = str(engine.model.dtype).removeprefix("mlx.core.").upper()
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": MODEL_TYPE,
        "families": [MODEL_TYPE],
        "parameter_size": _short(_parameters(engine.model)),
        "quantization_level": f"{quantized['bits']}-bit" if quantized else kind,
    }


def _parameters(model: Any) -> int:
    """Number of parameters, with those that are packed into words counted one by one."""
    count = 0
    for module in model.modules():
        bits = getattr(module, "bits", None)
        own = {name: array for name, array in module.items() if hasattr(array, "nbytes")}
        if bits is not None and "scales" in own:
            own = {"weight": own["weight"]}
            count += own["weight"].nbytes * 8 // bits
        else:
            count += sum(array.size for array in own.values())
    return count


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count / 1000:.0f}K"


def shown(engine: Engine, since: str) -> dict[str, Any]:
    template = template_text(hf_tokenizer(engine.tokenizer))
    can = {"tools": re.search(r"\btools\b", template), "thinking": "enable_thinking" in template}
    return {
        "modelfile": f"FROM {engine.name}",
        "parameters": "",
        "template": template,
        "details": _details(engine),
        "model_info": {
            "general.architecture": MODEL_TYPE,
            "general.basename": engine.name,
            "general.parameter_count": _parameters(engine.model),
            f"{MODEL_TYPE}.context_length": engine.context,
            f"{MODEL_TYPE}.canvas_length": engine.model.config.canvas_length,
        },
        "capabilities": ["completion", "insert", *(name for name, has in can.items() if has)],
        "modified_at": since,
    }


def now() -> str:
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
