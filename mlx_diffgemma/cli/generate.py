"""`mlx-diffgemma generate`: one prompt, one answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from mlx_diffgemma.cli import errors, options, structured
from mlx_diffgemma.errors import UsageError

if TYPE_CHECKING:
    from mlx_diffgemma.cli.session import Opened

_TEXTS = ("system_prompt", "prefill_response")
GO_ON = "--max-tokens {} leaves room to go on."


@dataclass(frozen=True)
class Request:
    """What the command line asked for.

    Attributes:
        loading: keyword arguments of `load`.
        settings: keyword arguments of `stream_generate`.
        ends: more tokens that end an answer.
    """

    prompt: str
    model: str | None
    loading: dict[str, Any]
    settings: dict[str, Any]
    watch: bool
    json: bool
    show_thought: bool = False
    hide_thought: bool = False
    ends: tuple[str, ...] = ()


def generate(
    ctx: typer.Context,
    choices: structured.Choices = None,
    choices_follow: structured.ChoicesFollow = False,
    json_schema: structured.JsonSchema = None,
    regex: structured.Regex = None,
    prompt: options.Prompt = None,
    system_prompt: options.SystemPrompt = None,
    thinking: options.Thinking = None,
    raw: options.Raw = False,
    markers: options.Markers = False,
    tools: options.Tools = None,
    chat_template: options.ChatTemplate = None,
    chat_template_config: options.ChatTemplateConfig = None,
    prefill_response: options.PrefillResponse = None,
    prefill_step_size: options.PrefillStepSize = None,
    model: options.Model = None,
    revision: options.Revision = None,
    adapter_path: options.AdapterPath = None,
    trust_remote_code: options.TrustRemoteCode = False,
    check: options.Check = False,
    max_tokens: options.MaxTokens = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    extra_eos_token: options.ExtraEosToken = None,
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
        _check_raw(
            raw,
            markers,
            {
                "--system-prompt": system_prompt,
                "--thinking/--no-thinking": thinking,
                "--tools": tools,
                "--chat-template-config": chat_template_config,
                "--prefill-response": prefill_response,
            },
        )
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
        settings |= options.prompt_settings(
            tools, chat_template_config, markers=markers, prefill_response=prefill_response
        )
        loading = {
            "revision": revision,
            "adapter_path": adapter_path,
            "chat_template": chat_template,
            "trust_remote_code": trust_remote_code,
            "check": check,
        }
        from mlx_diffgemma.cli.session import read_prompt

        constraint = structured.constraint(choices, choices_follow, json_schema, regex)
        if constraint and stop:
            raise UsageError("--stop does not go with a constraint: drop one.")
        if constraint and prefill_response is not None:
            raise UsageError("--prefill-response does not go with a constraint: drop one.")
        request = Request(
            read_prompt(options.spaced(prompt), raw=raw),
            model,
            loading,
            settings,
            watch,
            json,
            show_thought,
            hide_thought,
            tuple(extra_eos_token or ()),
        )
        if constraint:
            structured.answer(request, constraint)
        else:
            _answer(request)

    errors.run(body, debug=errors.debugging(ctx))


def _check_raw(raw: bool, markers: bool, of_templates: dict[str, object]) -> None:
    """Refuse options that mean nothing with --raw, or without it."""
    for name, value in of_templates.items():
        if raw and value is not None:
            raise UsageError(f"{name} needs a chat template, and --raw uses none: drop one.")
    if markers and not raw:
        raise UsageError("--markers is for a --raw prompt: add --raw, or drop it.")


def opened_for(request: Request) -> Opened:
    """The model of a request, ready for it. Says on stderr what may surprise: control tokens that
    the prompt spells are text.

    Raises:
        DiffGemmaError: it cannot be loaded, or its vocabulary lacks a token that is to end answers.
    """
    from mlx_diffgemma.cli import output, session

    opened = session.open_model(request.model, **request.loading)
    if request.ends:
        from mlx_diffgemma.text.tokenizer import add_end_tokens

        add_end_tokens(opened.tokenizer, request.ends)
    given = [request.prompt, *(request.settings.get(name) or "" for name in _TEXTS)]
    if any("<" in text or "[" in text for text in given) and not request.settings.get("markers"):
        from mlx_diffgemma.text.control_tokens import spelled_in

        if spelled := spelled_in(opened.tokenizer, given):
            output.note(
                f"the prompt spells {', '.join(spelled)}, which is read as text; "
                "--raw --markers has control tokens count."
            )
    return opened


def _answer(request: Request) -> None:
    from mlx_diffgemma.cli import output, report, session

    opened = opened_for(request)
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
