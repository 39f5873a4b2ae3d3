"""Draw the pictures of docs/concepts.md.

    python scripts/draw_concepts.py docs [--seed 3]

Two of them show a run of the shipped demo model: the draft after each step, tinted by how unsure
the model is, and which draws of its first step the entropy bound accepts. The other two show the
two passes over the weights, and which positions see which.
"""

from __future__ import annotations

import argparse
from html import escape
from itertools import accumulate
from pathlib import Path

from mlx_diffgemma import load, stream_generate
from mlx_diffgemma.chart import Chart, linear_axis
from mlx_diffgemma.generation_response import GenerationResponse

PROMPT = "count\n7 24"
BOUND = 0.1  # nats, the release's and the demo's entropy bound
CELL = 15  # of a draft
INK, GREY, BLUE, RED = "#222", "#667", "#26a", "#c44"


class Drawing:
    """An SVG on a light ground, so that it is read in the dark too."""

    def __init__(self, width: int, height: int) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'font-family="sans-serif" font-size="14" fill="{INK}">',
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="{GREY}"/>'
            "</marker></defs>",
            f'<rect width="{width}" height="{height}" rx="8" fill="white"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """A rectangle."""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{fill}" stroke="#999" stroke-width="0.6"/>'
        )

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "middle", **style: str | int
    ) -> None:
        """A line of text about a point."""
        more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'
        )

    def arrow(self, path: str, *, both: bool = False) -> None:
        """An arrow along the path of an SVG."""
        start = ' marker-start="url(#tip)"' if both else ""
        self._parts.append(
            f'<path d="{path}" fill="none" stroke="{GREY}" stroke-width="1.5" '
            f'marker-end="url(#tip)"{start}/>'
        )

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text("\n".join([*self._parts, "</svg>"]) + "\n", encoding="utf-8")


def tint(nats: float) -> str:
    """White where the model is sure of a token, orange and red where it is not."""
    share = min(nats / 2.2, 1.0) ** 0.5
    red, green, blue = 255, round(255 - 130 * share), round(255 - 195 * share)
    return f"rgb({red},{green},{blue})"


def draw_steps(steps: list[GenerationResponse], pieces: list[list[str]], path: Path) -> None:
    """The draft after each step, a row each."""
    length, left, top = len(pieces[0]), 62, 40
    drawing = Drawing(left + length * CELL + 16, top + len(steps) * (CELL + 9) + 12)
    drawing.text(left, 24, f"A canvas of {length} tokens; the prompt is “{PROMPT}”", anchor="start")
    for row, (step, texts) in enumerate(zip(steps, pieces, strict=True)):
        y = top + row * (CELL + 9)
        drawing.text(left - 8, y + 12, f"step {step.step}", anchor="end", fill=GREY)
        for place, (text, nats) in enumerate(zip(texts, step.entropy, strict=True)):
            x = left + place * CELL
            drawing.box(x, y, CELL, CELL + 3, tint(nats))
            drawing.text(x + CELL / 2, y + 13, text, font_family="monospace", font_size=12)
    drawing.save(path)


def draw_bound(step: GenerationResponse, path: Path) -> None:
    """The entropies of a step from the surest position on, and where their sum meets the bound."""
    ordered = sorted(step.entropy)
    sums = [total - own for total, own in zip(accumulate(ordered), ordered, strict=True)]
    shown = [(place, total) for place, total in enumerate(sums, 1) if total <= 4 * BOUND]
    across = linear_axis("positions of the canvas, the surest first", 0, len(shown))
    chart = Chart(across, linear_axis("nats of the positions before it", 0, 4 * BOUND))
    chart.line([(0, BOUND), (across.high, BOUND)], RED)
    for place, total in shown:
        chart.dot(place, total, BLUE if total <= BOUND else "#bbb")
    accepted = sum(total <= BOUND for total in sums)
    said = (
        (f"the entropy bound, {BOUND} nats", RED),
        (f"{accepted} positions are accepted", BLUE),
        ("the others turn to noise again", GREY),
    )
    for row, (text, colour) in enumerate(said):
        chart.text(chart.x(0) + 12, chart.y(4 * BOUND) + 20 * (row + 1), text, colour=colour)
    chart.write(path)


def draw_passes(path: Path) -> None:
    """The two passes over one set of weights."""
    drawing = Drawing(720, 300)
    for name, x, count, fill in (("prompt", 30, 9, "#dbe7f6"), ("canvas", 470, 10, "#fbe3c4")):
        for place in range(count):
            drawing.box(x + 22 * place, 40, 22, 26, fill)
        drawing.text(x + 11 * count, 28, name)
    drawing.box(30, 200, 198, 56, "#dbe7f6")
    drawing.text(129, 224, "prefix", font_weight="bold")
    drawing.text(129, 244, "keys and values of each layer", font_size=12)
    drawing.arrow("M129 72V194")
    drawing.text(140, 128, "encoder", anchor="start", font_weight="bold")
    drawing.text(140, 146, "once, from left to right", anchor="start", font_size=12)
    drawing.box(470, 112, 220, 60, "#fbe3c4")
    drawing.text(580, 137, "decoder", font_weight="bold")
    drawing.text(580, 157, "all positions see each other", font_size=12)
    drawing.arrow("M500 72V106")
    drawing.arrow("M660 106V72")
    drawing.text(580, 94, "each step", font_size=12, fill=GREY)
    drawing.arrow("M228 214C380 214 380 142 464 142")
    drawing.text(362, 168, "read only", font_size=12, fill=GREY, anchor="end")
    drawing.arrow("M580 178C580 244 420 244 234 244")
    drawing.text(440, 262, "a finished canvas is encoded, and the next one begins", font_size=12)
    drawing.save(path)


def draw_visibility(path: Path) -> None:
    """Which position sees which, in a layer with full attention."""
    prompt, canvas, side, left, top = 7, 6, 24, 130, 60
    drawing = Drawing(left + (prompt + canvas) * side + 260, top + (prompt + canvas) * side + 20)
    drawing.text(left + prompt * side / 2, 46, "prompt")
    drawing.text(left + (prompt + canvas / 2) * side, 46, "canvas")
    drawing.text(left - 10, top + prompt * side / 2, "a position of", anchor="end")
    drawing.text(left - 10, top + prompt * side / 2 + 17, "the prompt", anchor="end")
    drawing.text(left - 10, top + (prompt + canvas / 2) * side, "a position of", anchor="end")
    drawing.text(left - 10, top + (prompt + canvas / 2) * side + 17, "the canvas", anchor="end")
    for row in range(prompt + canvas):
        for column in range(prompt + canvas):
            sees = row >= prompt or column <= row
            fill = ("#fbe3c4" if row >= prompt else "#9dbde4") if sees else "white"
            drawing.box(left + column * side, top + row * side, side, side, fill)
    right = left + (prompt + canvas) * side + 24
    drawing.text(right, top + 60, "sees what stands before it", anchor="start")
    drawing.text(right, top + prompt * side + 60, "sees the prompt and the", anchor="start")
    drawing.text(right, top + prompt * side + 78, "whole canvas, both ways", anchor="start")
    drawing.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="the folder of the SVG files")
    parser.add_argument("--seed", type=int, default=3, help="of the answer")
    arguments = parser.parse_args()
    model, tokenizer = load("demo")
    run = list(stream_generate(model, tokenizer, PROMPT, seed=arguments.seed))
    steps = [each for each in run if each.draft or each.canvas]
    steps = [each for each in steps if each.canvas_index == 0 and each.finish_reason is None]
    pieces = [[_shown(tokenizer.decode([token])) for token in each.canvas] for each in steps]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    draw_steps(steps, pieces, arguments.folder / "concept-steps.svg")
    draw_bound(steps[0], arguments.folder / "concept-entropy.svg")
    draw_passes(arguments.folder / "concept-passes.svg")
    draw_visibility(arguments.folder / "concept-visibility.svg")


def _shown(text: str) -> str:
    """A token as one character: a space shows as such, and the end of the text as a dot."""
    return "·" if len(text) != 1 else text.replace("\n", "⏎")


if __name__ == "__main__":
    main()
