"""Frames of a video with their times, as transformers' Gemma 4 processor takes and writes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mlx_diffgemma.checks import check_integer, check_number
from mlx_diffgemma.errors import PromptError, UsageError
from mlx_diffgemma.text.pictures import LARGEST_PICTURE

MOST_FRAMES = 32
"""Frames of a video, where nothing else is asked for."""


@dataclass(frozen=True)
class Frame:
    """A frame of a video.

    Attributes:
        pixels: [height, width, 3] uint8.
        seconds: the time at which it is shown, from the beginning of the video.
    """

    pixels: np.ndarray
    seconds: float

    @property
    def stamp(self) -> str:
        """Minutes and seconds, as they stand before the frame in a prompt."""
        return f"{int(self.seconds // 60):02d}:{int(self.seconds % 60):02d}"


def read_frames(
    source: Any, fps: float | None = None, max_frames: int | None = None
) -> list[Frame]:
    """Frames of a video file.

    Args:
        source: the path of the file.
        fps: frames to take of each second; None takes `max_frames` over the whole video.
        max_frames: most frames, which are spread over the whole video; None takes `MOST_FRAMES`.

    Raises:
        PromptError: it is no video, or damaged.
        UsageError: the extra with the decoder is not installed, or a setting is out of range.
    """
    if fps is not None:
        check_number("fps", fps, 0)
    if max_frames is not None:
        check_integer("max_frames", max_frames, 1)
    if not isinstance(source, (str, Path)):
        raise PromptError(f"a video must be a path, not of the type {type(source).__name__}.")
    if not Path(source).is_file():
        raise PromptError(f"the video {source} is not there, or no file; check its name.")
    try:
        import av
    except ImportError:
        raise UsageError(
            "videos need a decoder; install it with pip install 'mlx-diffgemma[video]'."
        ) from None
    try:
        with av.open(str(source)) as container:
            if not container.streams.video:
                raise PromptError(f"{source} holds no video; give another.")
            stream = container.streams.video[0]
            if stream.width * stream.height > LARGEST_PICTURE:
                raise PromptError(f"the frames of {source} are too large; make them smaller.")
            rate, total = float(stream.average_rate or 24), stream.frames
            if not total:  # some containers do not say
                total = sum(1 for _ in container.decode(stream))
                container.seek(0)
            wanted = sampled(total, rate, fps, max_frames or MOST_FRAMES)
            frames = list(_taken(container.decode(stream), wanted, rate))
            if not frames:
                raise PromptError(f"{source} holds no video; give another.")
            return frames
    except av.error.FFmpegError as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptError(f"{source} is no video that can be read ({reason}).") from None


def sampled(total: int, rate: float, fps: float | None, most: int) -> list[int]:
    """Which of `total` frames, `rate` a second, are taken: `fps` a second of them, `most` at most,
    evenly spread from the first on."""
    count = total if fps is None else max(1, int(total / rate * fps))
    count = min(count, most, total)
    return [place * total // count for place in range(count)]


def _taken(frames: Iterator[Any], wanted: list[int], rate: float) -> Iterator[Frame]:
    """The frames of the `wanted` numbers, which ascend; the others are passed over."""
    number = -1
    for place in wanted:
        frame = next(islice(frames, place - number - 1, None), None)
        if frame is None:  # the container promised more
            return
        number = place
        yield Frame(frame.to_ndarray(format="rgb24"), place / rate)
