"""The answers of `mlx-diffgemma generate` that are valid by construction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from mlx_diffgemma.cli import editing
from mlx_diffgemma.cli.settings import Asking, Denoising, Loading, Reaching, Showing, parsed
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.settings import Setting
from mlx_diffgemma.text.prompt_settings import PromptSettings

_PANEL = "Always valid"


@dataclass(frozen=True)
class Validity:
    """The options that say what makes an answer valid."""

    choices_follow: Annotated[
        bool,
        Setting("Choice of the answer among the words that follow.", ("--choices",), panel=_PANEL),
    ] = False
    json_schema: Annotated[
        str | None,
        Setting(
            "File with a JSON schema; the answer is JSON that validates against it.", panel=_PANEL
        ),
    ] = None
    validate: Annotated[
        int | None,
        Setting(
            "Number of answers to try where --json-schema says more than can be "
            "enforced; each is validated, and the first valid one counts.",
            panel=_PANEL,
        ),
    ] = None
    regex: Annotated[
        str | None,
        Setting(
            "Regular expression, in Rust's syntax, that the whole answer matches.", panel=_PANEL
        ),
    ] = None

    def constraint(self, choices: Sequence[str]) -> Constraint | None:
        """The constraint that the options give; None where there is none. `choices` are the words
        behind the options.

        Raises:
            UsageError: there is more than one, or it cannot be read.
        """
        if choices and not self.choices_follow:
            raise UsageError(
                f"'{choices[0]}' is no option; give the prompt with --prompt, or choices behind "
                "--choices."
            )
        if self.choices_follow and not choices:
            raise UsageError("--choices needs answers behind it, such as: --choices yes no unsure.")
        given = [bool(choices), self.json_schema is not None, self.regex is not None]
        if sum(given) > 1:
            raise UsageError("give only one of --json-schema, --regex and --choices.")
        if self.validate is not None and self.json_schema is None:
            raise UsageError("--validate is for --json-schema: give both, or neither.")
        if self.validate is not None and self.validate < 1:
            raise UsageError(f"--validate must be at least 1, not {self.validate}.")
        if not any(given):
            return None
        schema = None if self.json_schema is None else _read_schema(self.json_schema)
        return Constraint(schema, self.validate, self.regex, tuple(choices) or None)


@dataclass(frozen=True)
class Constraint:
    """One of a JSON schema, a regular expression, and texts to choose among; the others are None.

    Attributes:
        validate: tries for an answer that the whole schema validates, or None.
    """

    json_schema: Any
    validate: int | None
    regex: str | None
    choices: tuple[str, ...] | None

    def form(self) -> dict[str, Any] | None:
        """The constraint as the `response_format` of a server; None where it has no such form."""
        if self.regex is not None:
            return {"type": "regex", "pattern": self.regex}
        if isinstance(self.json_schema, dict):
            described = {"name": "answer", "schema": self.json_schema}
            return {"type": "json_schema", "json_schema": described}
        return None


def answer(
    prompt: str,
    constraint: Constraint,
    asking: Asking,
    loading: Loading,
    reaching: Reaching,
    denoising: Denoising,
    showing: Showing,
    prompt_settings: PromptSettings,
) -> None:
    """Write an answer that satisfies the constraint.

    Raises:
        UsageError: --stop or --prefill-response is given.
        UnmetConstraintError: the model does not finish a valid answer.
    """
    from mlx_diffgemma.cli import output, remote

    if asking.stop:
        raise UsageError("--stop does not go with a constraint: drop one.")
    if asking.prefill_response is not None:
        raise UsageError("--prefill-response does not go with a constraint: drop one.")
    form = constraint.form()
    only_here = {
        **remote.only_here(asking, prompt_settings),
        "--raw": asking.raw,
        "--validate": constraint.validate is not None,
        "--choices": constraint.choices is not None,
        "--json-schema with true or false": form is None and constraint.choices is None,
    }
    server = remote.find(reaching, loading, only_here)
    if server is not None:
        name = server.name
        assert form is not None
        done = server.generate_valid(prompt, form, prompt_settings, denoising)
        tokens = done.generation_tokens
    else:
        name, done = _answer_here(
            prompt, constraint, asking, loading, denoising, showing, prompt_settings
        )
        tokens = len(done.thought_tokens) + len(done.tokens)
    if showing.json:
        editing.write_json(
            text=done.text,
            thought=done.thought,
            tokens=list(done.tokens),
            entropy=list(done.entropy),
            finish_reason="stop",
            generation_tokens=tokens,
            denoising_steps=list(done.denoising_steps),
            passes=done.passes,
            converged=done.converged,
            seed=done.seed,
            model=name,
        )
        return
    thoughts = output.thoughts(showing.show_thought, showing.hide_thought)
    output.note_thought(done.thought, thoughts)
    output.write_line(done.text)
    editing.note_effort(done.passes, done.seed, converged=done.converged)


def _answer_here(
    prompt: str,
    constraint: Constraint,
    asking: Asking,
    loading: Loading,
    denoising: Denoising,
    showing: Showing,
    prompt_settings: PromptSettings,
) -> tuple[str, Any]:
    """The name of the model that is loaded, and its answer."""
    from mlx_diffgemma.cli import opening, output
    from mlx_diffgemma.editing.structured import UnmetConstraintError, generate_structured

    opened = opening.open_to_ask(loading, asking, prompt)
    try:
        with editing.drawn(opened, showing) as on_step:
            return opened.name, generate_structured(
                opened.model,
                opened.tokenizer,
                prompt,
                json_schema=constraint.json_schema,
                validate=constraint.validate,
                regex=constraint.regex,
                choices=constraint.choices,
                seed=denoising.seed,
                prompt_settings=prompt_settings,
                prefill_step_size=asking.prefill_step_size,
                config=denoising.config(opened.model),
                on_step=on_step,
            )
    except UnmetConstraintError as error:
        output.note(f"by then was written: {error.partial}")
        raise


def _read_schema(path: str) -> Any:
    from mlx_diffgemma.editing.files import read_text

    schema = parsed(read_text(path), path)
    if not isinstance(schema, (dict, bool)):
        raise UsageError(f"{path} holds no JSON schema: it must be an object, true or false.")
    return schema
