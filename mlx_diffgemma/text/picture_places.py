"""Where pictures stand in a prompt: one token of the template's text becomes as many as the vision
tower makes of the picture, between two marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from mlx_diffgemma.config import ModelConfig, VisionConfig
from mlx_diffgemma.errors import CheckpointError, PromptError, UsageError
from mlx_diffgemma.pictured import PicturedIds, PictureSpan
from mlx_diffgemma.text.pictures import Picture, read_picture
from mlx_diffgemma.text.tokenizer import hf_tokenizer

FRAME_TOKENS = 70
"""Most tokens of a frame of a video."""


@dataclass(frozen=True)
class PictureReader:
    """Reads the pictures of a prompt.

    Attributes:
        config: the config of the model; None where there is no model, and pictures are refused.
        image_tokens: most tokens of a picture; None takes the checkpoint's own number.
    """

    config: ModelConfig | None = None
    image_tokens: int | None = None

    @property
    def vision(self) -> VisionConfig:
        """How the model's vision tower wants pictures.

        Raises:
            PromptError: there is no model, or it has no vision tower.
        """
        if self.config is None:
            raise PromptError("pictures need a model; give encode_prompt its config, model.config.")
        vision = self.config.vision
        if vision is None:
            raise PromptError(
                "this checkpoint reads text only: it has no vision tower for pictures."
            )
        return vision

    def read(self, part: Mapping[str, Any], place: str) -> tuple[list[Picture], str]:
        """The pictures of a part of a message, and what is said of them, with the character
        `place` for each.

        Raises:
            PromptError: a picture cannot be read.
        """
        if part["type"] == "image":
            return [self._picture(part["image"])], place
        from mlx_diffgemma.text.video import read_frames

        frames = read_frames(part["video"], part.get("fps"), part.get("max_frames"))
        soft_tokens = min(FRAME_TOKENS, self.vision.soft_tokens)
        pictures = [read_picture(each.pixels, self.vision, soft_tokens) for each in frames]
        return pictures, " ".join(f"{each.stamp} {place}" for each in frames)

    def _picture(self, source: Any) -> Picture:
        return read_picture(source, self.vision, self.image_tokens)

    def spelled(self, tokenizer: Any) -> str:
        """How the token that stands for a picture is spelled.

        Raises:
            CheckpointError: the tokenizer does not know it.
        """
        own, config = hf_tokenizer(tokenizer), self.config
        token = None if config is None else config.image_token_id
        spelled = None if token is None else own.convert_ids_to_tokens(token)
        if not spelled or own.convert_tokens_to_ids(spelled) != token:
            raise CheckpointError(
                f"the tokenizer has no token {token}, which config.json names as image_token_id; "
                "they are of different models."
            )
        return str(spelled)

    def expanded(self, ids: Sequence[int], pictures: Sequence[Picture]) -> PicturedIds:
        """Token ids with the image tokens of every picture in the place of one.

        Raises:
            PromptError: there are not as many places as pictures.
        """
        config = self.config
        assert config is not None
        places = sum(token == config.image_token_id for token in ids)
        if places != len(pictures):
            raise PromptError(
                f"the prompt has {_count(places, 'place')} for {_count(len(pictures), 'picture')}; "
                "give as many."
            )
        before = [] if config.boi_token_id is None else [config.boi_token_id]
        behind = [] if config.eoi_token_id is None else [config.eoi_token_id]
        found: list[int] = []
        spans, left = [], iter(pictures)
        for token in ids:
            if token != config.image_token_id:
                found.append(token)
                continue
            picture = next(left)
            found += before
            spans.append(_span(picture, len(found)))
            found += [token] * picture.soft_tokens + behind
        return PicturedIds(found, spans)

    def in_ids(self, ids: list[int], images: Sequence[Any], bos: int | None) -> list[int]:
        """Token ids with pictures among them: in the places of their image tokens, one a picture or
        as many as it takes; where there is none, in front, behind a `bos`.

        Raises:
            PromptError: there are other image tokens than the pictures take, or a picture cannot be
                read.
            UsageError: a video is among them, which needs the chat template.
        """
        if not images:
            return ids
        if any(isinstance(image, Mapping) for image in images):
            raise UsageError("a video needs the chat template; raw prompts and token ids use none.")
        pictures = [self._picture(image) for image in images]
        config = self.config
        assert config is not None and config.image_token_id is not None
        runs, at = [], 0
        for token, run in groupby(ids):
            length = len(list(run))
            if token == config.image_token_id:
                runs.append((at, length))
            at += length
        if runs and [length for _, length in runs] == [each.soft_tokens for each in pictures]:
            spans = [_span(each, at) for each, (at, _) in zip(pictures, runs, strict=True)]
            return PicturedIds(ids, spans)
        if not runs:
            begin = 1 if bos is not None and ids[:1] == [bos] else 0
            ids = [*ids[:begin], *[config.image_token_id] * len(pictures), *ids[begin:]]
        return self.expanded(ids, pictures)


def read_images(images: Sequence[Any], reader: PictureReader) -> list[Any]:
    """Pictures read once, for prompts that share them; videos are left as they are."""
    return [
        image
        if isinstance(image, Mapping)
        else read_picture(image, reader.vision, reader.image_tokens)
        for image in images
    ]


def _span(picture: Picture, start: int) -> PictureSpan:
    return PictureSpan(
        start, start + picture.soft_tokens, picture.key, picture.patches, picture.columns
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
