"""`mlx-diffgemma chat`: several turns over one prefix cache."""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mlx_diffgemma.cli import errors
from mlx_diffgemma.cli.command import Only, Without, command
from mlx_diffgemma.cli.settings import Asking, Denoising, Loading, Pictures, Reaching, Showing
from mlx_diffgemma.errors import DiffGemmaError, PromptError, UsageError
from mlx_diffgemma.text.prompt_settings import PromptSettings

if TYPE_CHECKING:
    from mlx_diffgemma.cli.opening import Opened
    from mlx_diffgemma.cli.outcome import Outcome
    from mlx_diffgemma.cli.remote import Remote

GO_ON = "ask to go on, or start the chat with --max-tokens {}."
MAKE_ROOM = "/reset forgets the conversation and makes room."
COMMANDS = ("/help", "/reset", "/system", "/image", "/quit")
HELP = """\
/help           this list
/reset          forget the conversation, keep the system prompt
/system TEXT    set the system prompt; 'off' for none; without TEXT, show it
/image FILE     show a picture with the next question
/quit           end (so does Ctrl-D)
//...           ask a question that begins with a slash
Ctrl-C          stop the answer; at the prompt, clear the line, or twice: end
A line that ends in a backslash goes on in the next one. A paste is one question.
Keys typed while an answer forms are dropped."""


@command(
    "mlx-diffgemma chat",
    "mlx-diffgemma chat --model demo --seed 7",
    "mlx-diffgemma chat --thinking --system-prompt 'Answer in one sentence.'",
)
def chat(
    *,
    asking: Annotated[Asking, Without("raw", "markers", "prefill_response")],
    pictures: Annotated[Pictures, Only("image_tokens")],
    loading: Loading,
    reaching: Reaching,
    denoising: Denoising,
    showing: Annotated[Showing, Without("json")],
) -> None:
    """Talk in turns; what was said is not encoded again. /help lists the commands."""
    from mlx_diffgemma.cli import remote
    from mlx_diffgemma.cli.keys import Guard
    from mlx_diffgemma.cli.opening import Opened, end_at, open_model

    prompt_settings = asking.prompt_settings(image_tokens=pictures.image_tokens)
    only_here = {
        **remote.only_here(asking),
        "--image-tokens": pictures.image_tokens is not None,
    }
    server = remote.find(reaching, loading, only_here)
    if server is not None:
        opened = Opened(server.name, None, None, 0.0)
    else:
        with Guard():
            opened = open_model(loading)
            end_at(opened, asking)
    system_prompt, others = (
        prompt_settings.system_prompt,
        replace(prompt_settings, system_prompt=None),
    )
    Chat(opened, asking, denoising, showing, system_prompt, others, server).run()


@dataclass
class Chat:
    """A conversation.

    Attributes:
        opened: the model and its tokenizer, both None where a server answers.
        asking, denoising, showing: the options of the command line, for every question.
        system_prompt: what is put before the first turn.
        prompt_settings: how every prompt is encoded; None stands for the defaults.
        server: the server that answers in the place of a model, or None.
        turns: the messages so far, questions and answers in turn.
        images: pictures that go with the next question.
    """

    opened: Opened
    asking: Asking = field(default_factory=Asking)
    denoising: Denoising = field(default_factory=Denoising)
    showing: Showing = field(default_factory=Showing)
    system_prompt: str | None = None
    prompt_settings: PromptSettings | None = None
    server: Remote | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._forget()
        if self.server is None:
            self._config = self.denoising.config(self.opened.model)

    def run(self) -> None:
        """Take turns until the input ends or the user quits.

        Raises:
            DiffGemmaError: a turn failed, or a command is unknown, and nobody is there to mend it.
            KeyboardInterrupt: Ctrl-C twice at the prompt, or where nobody is at the prompt.
        """
        from mlx_diffgemma.cli import keys
        from mlx_diffgemma.cli.ask import questions

        interactive = sys.stdin.isatty()
        if interactive:
            _say("/help lists the commands, Ctrl-D ends.")
            keys.drop()
        for line in questions(interactive):
            name = line.split(maxsplit=1)[0] if line.strip() else ""
            if line.startswith("/") and name == "/quit":
                return
            if line.startswith("/") and _is_command(line, name):
                self._command(line, interactive)
            elif name:
                single = line.startswith("//") and "\n" not in line
                self._turn(line[1:] if single else line, interactive)

    def messages(self, question: str) -> list[dict[str, Any]]:
        """The conversation with a question, and the pictures for it, at its end."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, *self.turns, self._asked(question)]

    def _asked(self, question: str) -> dict[str, Any]:
        if not self.images:
            return {"role": "user", "content": question}
        shown_first = [{"type": "image", "image": image} for image in self.images]
        return {"role": "user", "content": [*shown_first, {"type": "text", "text": question}]}

    def _command(self, line: str, interactive: bool) -> None:
        name, *rest = line.split(maxsplit=1)
        text = "".join(rest).strip()
        if name == "/help":
            _say(HELP)
        elif name == "/reset":
            self.turns.clear()
            self.images.clear()
            self._forget()
            _say("the conversation is forgotten.")
        elif name == "/system" and text:
            self.system_prompt = None if text == "off" else text
            _say("no system prompt." if text == "off" else "the system prompt is set.")
        elif name == "/system":
            _say(self.system_prompt or "no system prompt.")
        elif name == "/image" and text:
            self._show(text, interactive)
        elif name == "/image":
            _say(f"{len(self.images)} pictures go with the next question; /image FILE adds one.")
        else:
            unknown = f"{name} is not a command; /help lists them. // in place of / asks it."
            if not interactive:
                raise UsageError(unknown)
            _say(unknown)

    def _show(self, file: str, interactive: bool) -> None:
        """Take a picture for the next question."""
        from mlx_diffgemma.text.picture_places import PictureReader, read_images

        try:
            if self.server is not None:
                raise UsageError("a server is not shown pictures; start the chat with --no-server.")
            model = self.opened.model
            path = str(Path(file).expanduser())
            how = self.prompt_settings
            most = None if how is None else how.image_tokens
            self.images += read_images([path], PictureReader(model.config, most))
        except DiffGemmaError as error:
            if not interactive:
                raise
            errors.complain(str(error))
        else:
            _say(f"{file} goes with the next question.")

    def _turn(self, question: str, interactive: bool) -> None:
        from mlx_diffgemma.cli import summaries
        from mlx_diffgemma.cli.inputs import is_text
        from mlx_diffgemma.cli.opening import note_markers
        from mlx_diffgemma.cli.outcome import Outcome

        outcome = Outcome()
        try:
            if not is_text(question):
                raise PromptError("the question is not UTF-8 text: re-encode it.")
            if self.server is None:
                note_markers(self.opened, question)
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
            for remark in summaries.remarks(outcome, GO_ON, MAKE_ROOM):
                _say(remark)
            if not outcome.text.strip():
                return
            # Chat templates leave thoughts out of earlier turns, so they are left out here.
            self.turns.append(self._asked(question))
            self.images.clear()
            self.turns.append({"role": "assistant", "content": outcome.text})
            _say(summaries.summary(outcome))

    def _answer(self, question: str, outcome: Outcome) -> None:
        from mlx_diffgemma.cli import keys, output, remote_answers
        from mlx_diffgemma.cli.outcome import pieces_of

        model, tokenizer = self.opened.model, self.opened.tokenizer
        pieces = remote_answers.pieces if self.server is not None else pieces_of(tokenizer)
        # Closing a run that is broken off releases the cache, which keeps what the run encoded.
        with ExitStack() as runs:

            def start(on_prefill: output.OnPrefill) -> Any:
                if self.server is not None:
                    answers = self.server.generate(
                        self.messages(question),
                        self.prompt_settings or PromptSettings(),
                        self.asking.stop,
                        self.denoising,
                    )
                    return runs.enter_context(closing(answers))
                from mlx_diffgemma.generation import stream_generate

                responses: Any = stream_generate(
                    model,
                    tokenizer,
                    self.messages(question),
                    prefix_cache=self._cache,
                    draft=False,
                    on_prefill=on_prefill,
                    seed=self.denoising.seed,
                    prompt_settings=self.prompt_settings,
                    prefill_step_size=self.asking.prefill_step_size,
                    config=self._config,
                    stop=self.asking.stop,
                )
                return runs.enter_context(closing(responses))

            thoughts = output.thoughts(self.showing.show_thought, self.showing.hide_thought)
            try:
                if output.can_draw(self.showing.watch):
                    output.draw(start, pieces, outcome, thoughts)
                else:
                    output.stream(start, outcome, thoughts)
            finally:
                if sys.stdin.isatty():
                    keys.drop()

    def _forget(self) -> None:
        self._cache = None if self.server is not None else self.opened.model.make_cache()


def _is_command(line: str, name: str) -> bool:
    """Whether a line that begins with a slash is meant as a command: one that is known, or a
    single line that does not begin with two. Texts of several lines may begin with a comment."""
    return name in COMMANDS or ("\n" not in line and not line.startswith("//"))


def _say(text: str) -> None:
    from mlx_diffgemma.cli.output import note

    note(text)
