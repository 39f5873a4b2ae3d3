"""The settings that commands share: frozen dataclasses, of which every field is an option.

`mlx_diffgemma.cli.command` makes the options; `--help` shows the sentence of each field.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

from mlx_diffgemma.cli.command import Changes, Of
from mlx_diffgemma.config import SOFT_TOKENS
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.profiles import DEFAULT as DEFAULT_PROFILE
from mlx_diffgemma.diffusion.profiles import PROFILES, profile_settings
from mlx_diffgemma.distributed.group import Ranks
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.settings import Setting
from mlx_diffgemma.text.prompt_settings import PromptSettings

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

DEFAULT_MODEL = "mlx-community/diffusiongemma-26B-A4B-it-4bit"

_MODEL, _PROMPT, _DENOISING, _OUTPUT = "Model", "Prompt", "Denoising", "Output"


@dataclass(frozen=True)
class Loading:
    """Which model is loaded, and how.

    Attributes:
        ranks: the processes that compute the model together; None where this one is alone. It is no
            option: `cli.ranks` puts it in.
    """

    model: Annotated[
        str | None,
        Setting(
            "Path or Hugging Face repository, or 'demo' for the small model that ships with the "
            "program.",
            panel=_MODEL,
            default=DEFAULT_MODEL,
        ),
    ] = None
    revision: Annotated[str | None, Setting("Branch, tag or commit.", panel=_MODEL)] = None
    adapter_path: Annotated[
        str | None,
        Setting("Folder of adapters; without --model, their base is loaded.", panel=_MODEL),
    ] = None
    chat_template: Annotated[
        str | None,
        Setting("Jinja template, or a file with one, instead of the checkpoint's.", panel=_PROMPT),
    ] = None
    trust_remote_code: Annotated[
        bool, Setting("Permission to run tokenizer code of the repository.", panel=_MODEL)
    ] = False
    check: Annotated[
        bool, Setting("Search for NaN and infinity in all weights before use.", panel=_MODEL)
    ] = False
    parallel: Annotated[
        str | None,
        Setting(
            "Split of the model among the Macs that mlx.launch starts: tensor, experts, pipeline, "
            "or auto.",
            panel=_MODEL,
        ),
    ] = None
    weights: Annotated[
        str | None,
        Setting(
            "Shares of the Macs in the model, such as 2,1; equal ones if left out.",
            panel=_MODEL,
        ),
    ] = None
    ranks: Ranks | None = field(default=None, compare=False)

    def among(self, ranks: Ranks) -> Loading:
        """The same, for a model that these processes compute together."""
        return replace(self, ranks=ranks)

    def load(self, name: str | None = None) -> tuple[DiffusionGemma, TokenizerWrapper]:
        """Load the model, which is called `name`; None takes the one of the settings.

        Raises:
            DiffGemmaError: it cannot be loaded.
            SystemExit: this process followed rank 0, which has ended it.
        """
        from mlx_diffgemma.generation import load

        return load(
            name or self.model or DEFAULT_MODEL,
            revision=self.revision,
            adapter_path=self.adapter_path,
            chat_template=self.chat_template,
            trust_remote_code=self.trust_remote_code,
            check=self.check,
            ranks=self.ranks,
            parallel=self.parallel,
            weights=self.weights,
        )


@dataclass(frozen=True)
class Reaching:
    """Whether a running server answers in the place of a model that is loaded."""

    server: Annotated[
        str | None,
        Setting(
            "URL of a server that answers, so that no model is loaded; one on this machine that "
            "has the same model is found by itself.",
            panel=_MODEL,
        ),
    ] = None
    no_server: Annotated[bool, Setting("No use of a server that runs already.", panel=_MODEL)] = (
        False
    )


@dataclass(frozen=True)
class Asking:
    """How a prompt becomes token ids.

    Raises:
        UsageError: options contradict each other.
    """

    system_prompt: Annotated[
        str | None, Setting("Instructions that stand before the prompt.", panel=_PROMPT)
    ] = None
    thinking: Annotated[
        bool | None,
        Setting(
            "Thinking before the answer, if the template knows it; a constraint binds what follows "
            "the thought.",
            panel=_PROMPT,
        ),
    ] = None
    tools: Annotated[
        tuple[str, ...],
        Setting(
            "JSON file with a function that the model may call, or a list of them; it may be given "
            "several times.",
            panel=_PROMPT,
        ),
    ] = ()
    chat_template_config: Annotated[
        str | None, Setting("JSON object of variables for the chat template.", panel=_PROMPT)
    ] = None
    prefill_response: Annotated[
        str | None,
        Setting("Text that the answer begins with; the model goes on from there.", panel=_PROMPT),
    ] = None
    raw: Annotated[
        bool, Setting("Prompt as it is, without a chat template around it.", panel=_PROMPT)
    ] = False
    markers: Annotated[
        bool,
        Setting(
            "Control tokens where a --raw prompt spells them (<|turn>), which are plain"
            " text otherwise.",
            panel=_PROMPT,
        ),
    ] = False
    prefill_step_size: Annotated[
        int | None, Setting("Prompt tokens encoded at a time.", panel=_PROMPT)
    ] = None
    stop: Annotated[
        tuple[str, ...],
        Setting(
            "Text before which the answer ends; it may be given several times. Thoughts are not "
            "searched for it.",
            panel=_DENOISING,
        ),
    ] = ()
    extra_eos_token: Annotated[
        tuple[str, ...],
        Setting(
            "Token that ends an answer too, as it is spelt or as its id; it may be given several "
            "times.",
            panel=_DENOISING,
        ),
    ] = ()

    def __post_init__(self) -> None:
        of_templates = {
            "--system-prompt": self.system_prompt,
            "--thinking/--no-thinking": self.thinking,
            "--tools": self.tools or None,
            "--chat-template-config": self.chat_template_config,
            "--prefill-response": self.prefill_response,
        }
        for name, value in of_templates.items():
            if self.raw and value is not None:
                raise UsageError(f"{name} needs a chat template, and --raw uses none: drop one.")
        if self.markers and not self.raw:
            raise UsageError("--markers is for a --raw prompt: add --raw, or drop it.")
        if self.prefill_step_size is not None and self.prefill_step_size < 1:
            raise UsageError(
                f"--prefill-step-size must be at least 1, not {self.prefill_step_size}."
            )
        if not all(self.stop):
            raise UsageError("--stop must be a text of at least one character.")

    def prompt_settings(
        self, images: Sequence[object] = (), image_tokens: int | None = None
    ) -> PromptSettings:
        """How the prompt becomes token ids, with these pictures.

        Raises:
            DiffGemmaError: a file of `--tools` or `--chat-template-config` is not what it must be.
        """
        return PromptSettings(
            system_prompt=self.system_prompt,
            raw=self.raw,
            markers=self.markers,
            thinking=self.thinking,
            tools=self._offered(),
            chat_template_kwargs=self._variables(),
            prefill_response=self.prefill_response,
            images=images,
            image_tokens=image_tokens,
        )

    def _offered(self) -> list[dict[str, object]] | None:
        """The tools in the files of `--tools`; None where the option is not given.

        Raises:
            UsageError: a file holds no tools.
            DiffGemmaError: a file cannot be read.
        """
        if not self.tools:
            return None
        from mlx_diffgemma.editing.files import read_text
        from mlx_diffgemma.text.messages import checked_tools

        tools: list[dict[str, object]] = []
        for path in self.tools:
            found = parsed(read_text(path), path)
            try:
                tools += checked_tools(found if isinstance(found, list) else [found])
            except UsageError as error:
                raise UsageError(f"--tools {path}: {error}") from None
        return tools

    def _variables(self) -> dict[str, object] | None:
        """The variables of `--chat-template-config`; None where the option is not given.

        Raises:
            UsageError: it is no JSON object.
        """
        if self.chat_template_config is None:
            return None
        found = parsed(self.chat_template_config, "--chat-template-config")
        if not isinstance(found, dict):
            raise UsageError('--chat-template-config must be a JSON object, like {"name": true}.')
        return found


@dataclass(frozen=True)
class Pictures:
    """The pictures of a prompt.

    Raises:
        UsageError: a value is out of range, or an option is given without the one that it is for.
    """

    image: Annotated[
        tuple[str, ...],
        Setting(
            "Picture that stands before the prompt, - for stdin; it may be given several times.",
            panel=_PROMPT,
        ),
    ] = ()
    image_tokens: Annotated[
        int | None,
        Setting(
            f"Most tokens of a picture: {', '.join(map(str, SOFT_TOKENS))}; the checkpoint's own "
            "number if left out.",
            panel=_PROMPT,
        ),
    ] = None
    video: Annotated[
        tuple[str, ...],
        Setting(
            "Video whose frames stand before the prompt, 70 tokens each; needs "
            "mlx-diffgemma[video]. It may be given several times.",
            panel=_PROMPT,
        ),
    ] = ()
    fps: Annotated[
        float | None,
        Setting(
            "Frames of a second of video; --max-frames over all of it if left out.", panel=_PROMPT
        ),
    ] = None
    max_frames: Annotated[
        int | None, Setting("Most frames of a video; 32 if left out.", panel=_PROMPT)
    ] = None

    def __post_init__(self) -> None:
        if self.image_tokens is not None and self.image_tokens not in SOFT_TOKENS:
            known = ", ".join(map(str, SOFT_TOKENS))
            raise UsageError(f"--image-tokens must be one of {known}, not {self.image_tokens}.")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise UsageError(f"--fps must be a number above 0, not {self.fps:g}.")
        if self.max_frames is not None and self.max_frames < 1:
            raise UsageError(f"--max-frames must be at least 1, not {self.max_frames}.")
        if not self.video and (self.fps is not None or self.max_frames is not None):
            raise UsageError("--fps and --max-frames are for a --video: add it, or drop them.")
        if self.image.count("-") > 1:
            raise UsageError("--image - reads stdin, which there is once: give it once.")

    def read(self, prompt: str | None, *, raw: bool = False) -> list[object]:
        """What the library takes for `images`; a `prompt` of None or "-" comes from stdin too.

        Raises:
            UsageError: stdin is asked for twice, or a raw prompt has videos.
        """
        if "-" in self.image and prompt in (None, "-"):
            raise UsageError("the prompt and --image - both come from stdin: give one otherwise.")
        if self.video and raw:
            raise UsageError("--video needs a chat template, and --raw uses none: drop one.")
        images: list[object] = [_piped() if path == "-" else path for path in self.image]
        for path in self.video:
            part: dict[str, object] = {"type": "video", "video": path, "fps": self.fps}
            images.append({**part, "max_frames": self.max_frames})
        return images


def _piped() -> bytes:
    """The bytes of a picture's file from stdin."""
    from mlx_diffgemma.text.pictures import LARGEST_FILE

    return sys.stdin.buffer.read(LARGEST_FILE + 1)


def parsed(text: str, where: str) -> object:
    """JSON that the user gave; `where` is what an error calls it.

    Raises:
        UsageError: the text is no JSON, or is nested too deep.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{where} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}."
        ) from None
    except RecursionError:
        raise UsageError(f"{where} is nested too deep to be read.") from None


@dataclass(frozen=True)
class Denoising:
    """How a canvas is denoised; what is left out is the checkpoint's own.

    Raises:
        UsageError: a value is out of range.
    """

    profile: Annotated[
        str | None,
        Setting(
            f"Trade of fidelity for speed: {', '.join(PROFILES)}, or a file that `tune` wrote. "
            "'exact' is the reference.",
            panel=_DENOISING,
            default=DEFAULT_PROFILE,
        ),
    ] = None
    seed: Annotated[
        int | None,
        Setting(
            "Number that makes a run repeatable on one machine; drawn afresh if left out.",
            panel=_DENOISING,
        ),
    ] = None
    changes: Annotated[Changes, Of(DiffusionConfig)] = field(default_factory=Changes)

    def __post_init__(self) -> None:
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise UsageError(f"--seed must be between 0 and 2^64 - 1, not {self.seed}.")
        given: dict[str, object] = profile_settings(self.profile or DEFAULT_PROFILE)
        given |= self.changes
        # The other end of the temperature is the checkpoint's, which is not known yet.
        if isinstance(t_min := given.get("t_min"), float):
            given.setdefault("t_max", max(t_min, 1.0))
        elif "t_max" in given:
            given["t_min"] = 0.0
        DiffusionConfig().override(**given)

    def config(self, model: DiffusionGemma) -> DiffusionConfig:
        """The settings of the model's checkpoint with the user's put over them."""
        from mlx_diffgemma.fitting import diffusion_config

        return diffusion_config(model, self.profile or DEFAULT_PROFILE, **self.changes)


@dataclass(frozen=True)
class Showing:
    """What becomes of an answer.

    Raises:
        UsageError: options contradict each other.
    """

    watch: Annotated[
        bool,
        Setting("Drawing of the canvas while it forms, if stdout is a terminal.", panel=_OUTPUT),
    ] = True
    show_thought: Annotated[
        bool,
        Setting(
            "Whole thoughts on a terminal, which otherwise shows one line of each.", panel=_OUTPUT
        ),
    ] = False
    hide_thought: Annotated[
        bool, Setting("Answer alone, without its thoughts on stderr.", panel=_OUTPUT)
    ] = False
    json: Annotated[bool, Setting("One JSON object instead of the text.", panel=_OUTPUT)] = False

    def __post_init__(self) -> None:
        if self.show_thought and self.hide_thought:
            raise UsageError("--show-thought and --hide-thought contradict each other: drop one.")
