"""The tokenizer of a checkpoint, from its folder; nothing is ever downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.checks import check_text
from mlx_diffgemma.errors import CheckpointError, UsageError
from mlx_diffgemma.reading import is_there, os_reason, read_json, read_text, shown

_VOCABULARIES = ("tokenizer.json", "tokenizer.model")
_COPY = "copy it again from the original checkpoint"
_CONTROL = re.compile(r"<\|\w+\|?>|<\w+\|>")  # `|>` alone is an operator of some languages


class Tokenizer(TokenizerWrapper):
    """mlx-lm's wrapper with a chat template that turns thinking on only where the caller asks for
    it. mlx-lm turns it on wherever the vocabulary has tokens around thoughts."""

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        name = getattr(self, "_thinking_kwarg", "enable_thinking")
        if "enable_thinking" not in kwargs:
            kwargs.setdefault(name, False)
        return super().apply_chat_template(*args, **kwargs)


def load_tokenizer(
    path: Path,
    *,
    eos_token_ids: int | Iterable[int] | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> Tokenizer:
    """The tokenizer in the folder `path`, from `tokenizer.json` or, failing that, from
    sentencepiece's `tokenizer.model`.

    Args:
        eos_token_ids: the ids that end an answer, beside the tokenizer's own eos.
        chat_template: a Jinja template, or a file that holds one, in place of the checkpoint's.
        trust_remote_code: whether Python code in the folder may be run to read the tokenizer.

    Raises:
        CheckpointError: there is no tokenizer, or it is damaged.
        UsageError: `chat_template` names a file that cannot be read.
    """
    from mlx_lm.tokenizer_utils import load

    override = None if chat_template is None else _read_template(chat_template)
    if not any(is_there(path / name) for name in _VOCABULARIES):
        raise CheckpointError(
            f"{path} has no tokenizer ({' or '.join(_VOCABULARIES)}); copy the tokenizer's files "
            "from the original checkpoint."
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        _check_json(path / name)
    for name in ("tokenizer.model", "chat_template.jinja", "chat_template.json"):
        _check_readable(path / name)
    try:
        tokenizer = load(
            path,
            {"local_files_only": True, "trust_remote_code": trust_remote_code},
            eos_token_ids=eos_token_ids,
        )
    except Exception as error:
        # The Rust library raises bare Exceptions; other types that are no reading error are bugs.
        reading = (
            OSError, ValueError, LookupError, TypeError, AttributeError, ImportError,
            RecursionError,
        )  # fmt: skip
        if type(error) is not Exception and not isinstance(error, reading):
            raise
        raise _unreadable(path, error) from error
    tokenizer.__class__ = Tokenizer
    own = hf_tokenizer(tokenizer).eos_token_id
    if own is not None and own not in tokenizer.eos_token_ids:
        tokenizer.add_eos_token(str(own))  # mlx-lm before 0.32 leaves it out
    no_json = not (path / "tokenizer.json").is_file()
    _flag_special_tokens(hf_tokenizer(tokenizer), symbols=no_json)
    if override is not None:
        tokenizer.chat_template = override
        tokenizer.has_chat_template = True
    return tokenizer


def hf_tokenizer(tokenizer: Any) -> Any:
    """The Hugging Face tokenizer inside mlx-lm's wrapper, or `tokenizer` where it is one."""
    return tokenizer._tokenizer if isinstance(tokenizer, TokenizerWrapper) else tokenizer


def end_token_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer, as mlx-lm's wrapper or a Hugging Face tokenizer has them now."""
    if isinstance(tokenizer, TokenizerWrapper):
        return frozenset(tokenizer.eos_token_ids)
    own = tokenizer.eos_token_id
    return frozenset() if own is None else frozenset({own})


def add_end_tokens(tokenizer: TokenizerWrapper, tokens: Iterable[str]) -> None:
    """Let more tokens end an answer, each given as it is spelt or as its id.

    Raises:
        UsageError: the vocabulary has no such token.
    """
    own = hf_tokenizer(tokenizer)
    for token in tokens:
        if token.isascii() and token.isdecimal():  # mlx-lm takes digits for an id too
            found = int(token) if int(token) < len(own) else None
        else:
            found = own.convert_tokens_to_ids(token)
            if found is not None and own.convert_ids_to_tokens(found) != token:
                found = None
        if found is None:
            raise UsageError(
                f"{token!r} is no token of this tokenizer, so it ends no answer; name one of "
                "its tokens, or give an id."
            )
        tokenizer.add_eos_token(str(found))


def check_tokenizer(tokenizer: Any) -> None:
    """Raise UsageError where `tokenizer` is something else."""
    if isinstance(tokenizer, str) or not hasattr(tokenizer, "encode"):
        raise UsageError(f"tokenizer must be what `load` returns, not {shown(tokenizer)}.")


def _flag_special_tokens(tokenizer: Any, *, symbols: bool) -> None:
    """Have the control tokens of a `tokenizer.model` treated as those of a `tokenizer.json`:
    sentencepiece knows them as user-defined symbols, which would be printed as text. Transformers
    makes them special tokens, plain added ones, or (5.24, without a configuration) mere words."""
    from tokenizers import AddedToken

    if not tokenizer.is_fast:
        return
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    unflagged = [t for t in tokenizer.all_special_tokens if t in added and not added[t].special]
    words = tokenizer.get_vocab().keys() - added.keys() if symbols else ()
    unflagged += sorted(word for word in words if _CONTROL.fullmatch(word))
    if unflagged:
        tokenizer.backend_tokenizer.add_special_tokens(
            [AddedToken(token, normalized=False, special=True) for token in unflagged]
        )


def _read_template(chat_template: str) -> str:
    check_text("chat_template", chat_template)
    if "{" in chat_template or "\n" in chat_template:
        return chat_template
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError:
        why = "is not a text file in UTF-8"
    except (OSError, ValueError, RuntimeError) as error:
        why = f"cannot be read ({os_reason(error)})"
    raise UsageError(f"chat template {chat_template!r} {why}; give a Jinja file or its text.")


def _check_json(path: Path) -> None:
    if not is_there(path):
        return
    content = read_json(path, mend=_COPY)
    if not isinstance(content, dict):
        raise _damaged(path, "it is not a JSON object")
    if path.name == "tokenizer.json" and not isinstance(content.get("model"), dict):
        raise _damaged(path, "it has no 'model'")


def _check_readable(path: Path) -> None:
    if not is_there(path):
        return
    if path.suffix != ".model":
        read_text(path, mend=_COPY)
        return
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({os_reason(error)}); {_COPY}.") from None


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({why}); {_COPY}.")


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        return CheckpointError(
            f"{path}: the tokenizer needs Python code of its repository; read that code, then "
            "allow it with --trust-remote-code."
        )
    reason = next(iter(str(error).strip().splitlines()), "") or "no reason given"
    return CheckpointError(
        f"{path}: the tokenizer cannot be read ({type(error).__name__}: {reason}); copy the "
        "tokenizer's files again from the original checkpoint."
    )
