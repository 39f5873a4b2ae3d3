"""`mlx-diffgemma chat`: several turns over one prefix cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from mlx_diffgemma.cli import errors, options
from mlx_diffgemma.errors import DiffGemmaError, PromptError

if TYPE_CHECKING:
    from mlx_diffgemma.cli.session import Opened, Outcome

GO_ON = "ask to go on, or start the chat with --max-tokens {}."
PROMPT, CONTINUED = "> ", ". "
HELP = """\
/help           this list
/reset          forget the conversation, keep the system prompt
/system TEXT    set the system prompt; 'off' for none; without TEXT, show it
/quit           end (so does Ctrl-D)
Ctrl-C          stop the answer; at the prompt, end
A line that ends in a backslash goes on in the next one."""


def chat(
    ctx: typer.Context,
    system_prompt: options.SystemPrompt = None,
    thinking: options.Thinking = None,
    tools: options.Tools = None,
    chat_template: options.ChatTemplate = None,
    chat_template_config: options.ChatTemplateConfig = None,
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
    debug: options.Debug = False,
) -> None:
    """Talk in turns; what was said is not encoded again. /help lists the commands."""

    def body() -> None:
        options.check_thoughts(show_thought, hide_thought)
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
        loading = {
            "revision": revision,
            "adapter_path": adapter_path,
            "chat_template": chat_template,
            "trust_remote_code": trust_remote_code,
            "check": check,
        }
        settings |= options.prompt_settings(tools, chat_template_config)
        from mlx_diffgemma.cli.session import open_model

        opened = open_model(model, **loading)
        if extra_eos_token:
            from mlx_diffgemma.text.tokenizer import add_end_tokens

            add_end_tokens(opened.tokenizer, extra_eos_token)
        settings["thinking"] = thinking
        Chat(
            opened,
            settings,
            watch=watch,
            show_thought=show_thought,
            hide_thought=hide_thought,
            system_prompt=system_prompt,
        ).run()

    errors.run(body, debug=errors.debugging(ctx))


@dataclass
class Chat:
    """A conversation.

    Attributes:
        settings: keyword arguments of `stream_generate`.
        watch: whether to draw the canvas where that can be done.
        show_thought, hide_thought: whether thoughts are shown whole, or not at all.
        system_prompt: what is put before the first turn.
        turns: the messages so far, questions and answers in turn.
    """

    opened: Opened
    settings: dict[str, Any]
    watch: bool = True
    show_thought: bool = False
    hide_thought: bool = False
    system_prompt: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._cache = self.opened.model.make_cache()

    def run(self) -> None:
        """Take turns until the input ends or the user quits.

        Raises:
            DiffGemmaError: a turn failed and nobody is there to mend it.
            KeyboardInterrupt: Ctrl-C at the prompt, or where nobody is at the prompt.
        """
        interactive = sys.stdin.isatty()
        if interactive:
            _say("/help lists the commands, Ctrl-D ends.")
        for line in _questions(interactive):
            if line.startswith("/"):
                if line.split()[0] == "/quit":
                    return
                self._command(line)
            elif line.strip():
                self._turn(line, interactive)

    def messages(self, question: str) -> list[dict[str, str]]:
        """The conversation with a question at its end."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, *self.turns, {"role": "user", "content": question}]

    def _command(self, line: str) -> None:
        name, _, text = line.partition(" ")
        text = text.strip()
        if name == "/help":
            _say(HELP)
        elif name == "/reset":
            self.turns.clear()
            self._forget()
            _say("the conversation is forgotten.")
        elif name == "/system" and text:
            self.system_prompt = None if text == "off" else text
            _say("no system prompt." if text == "off" else "the system prompt is set.")
        elif name == "/system":
            _say(self.system_prompt or "no system prompt.")
        else:
            _say(f"{name} is not a command; /help lists them. A space before it sends it as text.")

    def _turn(self, question: str, interactive: bool) -> None:
        from mlx_diffgemma.cli import report
        from mlx_diffgemma.cli.session import Outcome, is_text

        outcome = Outcome()
        try:
            if not is_text(question):
                raise PromptError("the question is not UTF-8 text: re-encode it.")
            self._answer(question, outcome)
        except KeyboardInterrupt:
            if not interactive:
                raise
            _say("stopped; this question and what was answered are left out of the conversation.")
        except DiffGemmaError as error:
            if not interactive:
                raise
            errors.complain(str(error))
        else:
            for remark in report.remarks(outcome, GO_ON):
                _say(remark)
            if not outcome.text.strip():
                return
            # What was thought is left out, as templates leave it out of earlier turns.
            self.turns.append({"role": "user", "content": question})
            self.turns.append({"role": "assistant", "content": outcome.text})
            _say(report.summary(outcome))

    def _answer(self, question: str, outcome: Outcome) -> None:
        from mlx_diffgemma.cli import output
        from mlx_diffgemma.cli.session import pieces_of
        from mlx_diffgemma.generation import stream_generate

        model, tokenizer = self.opened.model, self.opened.tokenizer
        # A run that is broken off gives the cache free when it is closed; what it encoded is kept.
        with ExitStack() as runs:

            def start(on_prefill: output.OnPrefill) -> Any:
                responses: Any = stream_generate(
                    model,
                    tokenizer,
                    self.messages(question),
                    prefix_cache=self._cache,
                    draft=False,
                    on_prefill=on_prefill,
                    **self.settings,
                )
                return runs.enter_context(closing(responses))

            thoughts = output.thoughts(self.show_thought, self.hide_thought)
            if output.can_draw(self.watch):
                output.draw(start, pieces_of(tokenizer), outcome, thoughts)
            else:
                output.stream(start, outcome, thoughts)

    def _forget(self) -> None:
        self._cache = self.opened.model.make_cache()


def _questions(interactive: bool) -> Iterator[str]:
    """The user's lines, those joined that end in a backslash."""
    from mlx_diffgemma.cli.session import read_text

    if interactive:
        with suppress(ImportError):  # not in every build of Python; gives editing and history
            import readline  # noqa: F401
    pending = ""
    while line := read_text(partial(_ask, CONTINUED if pending else PROMPT, interactive)):
        line = line.removesuffix("\n").removesuffix("\r")
        if line.endswith("\\"):
            pending += line[:-1] + "\n"
            continue
        yield pending + line
        pending = ""
    if pending:
        yield pending


def _ask(prompt: str, interactive: bool) -> str:
    """A line with its newline, or "" at the end. stdout is not for the prompt where it is not
    the terminal."""
    if not interactive:
        return sys.stdin.readline()
    try:
        if sys.stdout.isatty():
            return input(prompt) + "\n"
        print(prompt, end="", file=sys.stderr, flush=True)
        return sys.stdin.readline()
    except (EOFError, KeyboardInterrupt) as end:
        print(file=sys.stderr)  # leave the line of the prompt
        if isinstance(end, KeyboardInterrupt):
            raise
        return ""


def _say(text: str) -> None:
    from mlx_diffgemma.cli.output import note

    note(text)
