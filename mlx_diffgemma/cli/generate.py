"""`mlx-diffgemma generate`: one prompt, one answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import typer

from mlx_diffgemma.cli import errors, options, structured
from mlx_diffgemma.errors import UsageError

GO_ON = "--max-tokens {} leaves room to go on."


@dataclass(frozen=True)
class Request:
    """What the command line asked for.

    Attributes:
        loading: keyword arguments of `load`.
        settings: keyword arguments of `stream_generate`.
    """

    prompt: str
    model: str | None
    loading: dict[str, Any]
    settings: dict[str, Any]
    watch: bool
    json: bool
    show_thought: bool = False
    hide_thought: bool = False


def generate(
    ctx: typer.Context,
    choices: structured.Choices = None,
    choices_follow: structured.ChoicesFollow = False,
    json_schema: structured.JsonSchema = None,
    validate: structured.Validate = None,
    regex: structured.Regex = None,
    prompt: options.Prompt = None,
    system_prompt: options.SystemPrompt = None,
    thinking: options.Thinking = None,
    raw: options.Raw = False,
    chat_template: options.ChatTemplate = None,
    prefill_step_size: options.PrefillStepSize = None,
    model: options.Model = None,
    revision: options.Revision = None,
    adapter_path: options.AdapterPath = None,
    trust_remote_code: options.TrustRemoteCode = False,
    check: options.Check = False,
    max_tokens: options.MaxTokens = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    steps: options.Steps = None,
    canvas_length: options.CanvasLength = None,
    t_min: options.TMin = None,
    t_max: options.TMax = None,
    profile: options.Profile = None,
    sampler: options.Sampler = None,
    accept_threshold: options.AcceptThreshold = None,
    entropy_bound: options.EntropyBound = None,
    stability_threshold: options.StabilityThreshold = None,
    confidence_threshold: options.ConfidenceThreshold = None,
    stop_at_eos: options.StopAtEos = None,
    eos_certainty: options.EosCertainty = None,
    shrink_canvas: options.ShrinkCanvas = None,
    soft_cutoff: options.SoftCutoff = None,
    confident_after: options.ConfidentAfter = None,
    settled_after: options.SettledAfter = None,
    watch: options.Watch = True,
    show_thought: options.ShowThought = False,
    hide_thought: options.HideThought = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write the answer to one prompt, drafted and refined before your eyes.

    stdout carries the answer alone; statistics and progress go to stderr.

    Always valid: --json-schema FILE, --regex 'v[0-9]+', or --choices yes no unsure.
    """

    def body() -> None:
        options.check_thoughts(show_thought, hide_thought)
        if raw and (system_prompt is not None or thinking is not None):
            given = "--system-prompt" if system_prompt is not None else "--thinking/--no-thinking"
            raise UsageError(f"{given} needs a chat template, and --raw uses none: drop one.")
        settings = options.generation_settings(
            max_tokens=max_tokens,
            seed=seed,
            stop=stop,
            prefill_step_size=prefill_step_size,
            max_denoising_steps=steps,
            canvas_length=canvas_length,
            t_min=t_min,
            t_max=t_max,
            profile=profile,
            sampler=sampler,
            accept_threshold=accept_threshold,
            entropy_bound=entropy_bound,
            stability_threshold=stability_threshold,
            confidence_threshold=confidence_threshold,
            stop_at_eos=stop_at_eos,
            eos_certainty=eos_certainty,
            shrink_canvas=shrink_canvas,
            soft_cutoff=soft_cutoff,
            confident_after=confident_after,
            settled_after=settled_after,
        )
        settings |= {"system_prompt": system_prompt, "raw": raw, "thinking": thinking}
        loading = {
            "revision": revision,
            "adapter_path": adapter_path,
            "chat_template": chat_template,
            "trust_remote_code": trust_remote_code,
            "check": check,
        }
        from mlx_diffgemma.cli.session import read_prompt

        constraint = structured.constraint(choices, choices_follow, json_schema, regex, validate)
        if constraint and stop:
            raise UsageError("--stop does not go with a constraint: drop one.")
        request = Request(
            read_prompt(prompt, raw=raw),
            model,
            loading,
            settings,
            watch,
            json,
            show_thought,
            hide_thought,
        )
        if constraint:
            structured.answer(request, constraint)
        else:
            _answer(request)

    errors.run(body, debug=errors.debugging(ctx))


def _answer(request: Request) -> None:
    from mlx_diffgemma.cli import output, report, session

    opened = session.open_model(request.model, **request.loading)
    from mlx_diffgemma.generation import stream_generate

    def start(on_prefill: output.OnPrefill) -> Any:
        return stream_generate(
            opened.model,
            opened.tokenizer,
            request.prompt,
            draft=False,
            on_prefill=on_prefill,
            **request.settings,
        )

    outcome = session.Outcome()
    if request.json:
        output.collect(start, outcome)
        output.write_line(report.as_json(outcome, opened))
        return
    thoughts = output.thoughts(request.show_thought, request.hide_thought)
    if output.can_draw(request.watch):
        output.draw(start, session.pieces_of(opened.tokenizer), outcome, thoughts)
    else:
        output.stream(start, outcome, thoughts)
    for remark in report.remarks(outcome, GO_ON):
        output.note(remark)
    output.note(report.statistics(outcome))
