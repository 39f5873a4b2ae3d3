"""Record a person who pins cells of a sudoku on the page, for the README.

    PYTHONPATH=tests/web python scripts/record_page.py docs/page.gif

It needs Chromium and the extra `browser`. The server is a real one with the demo model; the hand is
drawn in afterwards.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from browsing import Served, Visitor, chromium
from PIL import Image, ImageChops, ImageDraw

WIDTH, HEIGHT = 880, 650
TICK = 120  # milliseconds between two pictures
HOLD = 14  # pictures of the end
COLOURS = 96
TRIES = 12
HAND = [(0, 0), (0, 17), (4, 13), (7, 19), (10, 18), (7, 12), (12, 12)]


class Recorder:
    """Pictures of a page with a hand on it, each with how long it lasts."""

    def __init__(self, page: Any) -> None:
        self._page, self._hand = page, (620.0, 470.0)
        self.pictures: list[Image.Image] = []
        self.lasting: list[int] = []

    def look(self, times: int = 1) -> None:
        for _ in range(times):
            whole = Image.open(io.BytesIO(self._page.screenshot())).convert("RGB")
            shape = [(x + self._hand[0], y + self._hand[1]) for x, y in HAND]
            ImageDraw.Draw(whole).polygon(shape, fill=(30, 30, 30), outline=(255, 255, 255))
            if self.pictures and ImageChops.difference(whole, self.pictures[-1]).getbbox() is None:
                self.lasting[-1] += TICK
            else:
                self.pictures.append(whole)
                self.lasting.append(TICK)
            self._page.wait_for_timeout(TICK / 2)

    def go(self, selector: str) -> None:
        """Move the hand onto an element, in a few steps."""
        box = self._page.locator(selector).first.bounding_box()
        target = (box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.6)
        start = self._hand
        for part in (0.35, 0.7, 0.92, 1.0):
            self._hand = tuple(a + (b - a) * part for a, b in zip(start, target, strict=True))
            self._page.mouse.move(*self._hand)
            self.look()

    def form(self) -> str:
        """Look on until the grid is done; what is said of it."""
        while self._page.locator("button.primary").inner_text() == "Stop":
            self.look()
        return str(self._page.get_by_role("status").inner_text())

    def save(self, path: Path) -> None:
        some = self.pictures[:: max(1, len(self.pictures) // 12)]
        sheet = Image.new("RGB", (WIDTH, HEIGHT * len(some)))
        for number, each in enumerate(some):
            sheet.paste(each, (0, HEIGHT * number))
        palette = sheet.quantize(COLOURS)
        flat = [each.quantize(palette=palette, dither=Image.Dither.NONE) for each in self.pictures]
        flat[0].save(
            path,
            save_all=True,
            append_images=flat[1:],
            duration=self.lasting,
            loop=0,
            optimize=True,
        )


def record(page: Any) -> tuple[Recorder, bool]:
    """A run, and whether all that formed in it is right."""
    recorder = Recorder(page)
    page.locator("button", has_text="Clear").click()
    recorder.look(3)
    for cell, digit in ((0, "5"), (8, "1"), (14, "6"), (21, "3"), (27, "2"), (35, "4")):
        recorder.go(f"[data-cell='{cell}']")
        page.locator(f"[data-cell='{cell}']").focus()
        page.keyboard.press(digit)
        recorder.look(2)
    recorder.go("button.primary")
    page.locator("button.primary").click()
    right = recorder.form().startswith("Solved")
    recorder.look(8)
    third = "[data-cell='2']"
    recorder.go(third)
    found = page.locator(third).inner_text()
    page.locator(third).focus()
    # What stands in its column, its row and its box stays possible.
    page.keyboard.press(next(digit for digit in "234" if digit != found))
    right = recorder.form().startswith("Solved") and right
    recorder.look(HOLD)
    return recorder, right


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", type=Path, help="the GIF to write")
    path = parser.parse_args().path
    served = Served()
    with chromium() as browser:
        for _ in range(TRIES):
            size = {"width": WIDTH, "height": HEIGHT}
            visitor = Visitor(browser, served.url, viewport=size, reduced_motion="reduce")
            page = visitor.open("sudoku")
            page.locator(".cell.pinned").first.wait_for()
            recorder, right = record(page)
            visitor.context.close()
            if right:
                break
    served.stop()
    recorder.save(path)
    print(f"{path}: {len(recorder.pictures)} pictures, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
