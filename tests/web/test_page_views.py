"""Every view in a browser, by mouse and by keyboard, against a server with the demo model."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("playwright", reason="the tests of the page need the extra 'browser'")

from browsing import Visitor, posted, told
from playwright.sync_api import Page, expect

from mlx_diffgemma.demo import sudoku

pytestmark = [pytest.mark.browser, pytest.mark.slow]

COUNTED = " ".join(map(str, range(28, 42)))


def cells(page: Page) -> str:
    texts = page.locator(".cell").all_inner_texts()
    return "\n".join("".join(text or "." for text in texts[r * 6 : r * 6 + 6]) for r in range(6))


def pinned(page: Page) -> list[bool]:
    return page.locator(".cell").evaluate_all("all => all.map(e => e.ariaPressed === 'true')")


def fast(page: Page) -> None:
    box = page.get_by_label("Slowly")
    box.uncheck()


def text_of(page: Page) -> str:
    return "".join(page.locator(".token:not(.special)").all_inner_texts()).replace("↵", "\n")


def test_sudoku(visitor: Visitor) -> None:
    page = visitor.open("")
    expect(page.locator("h1")).to_have_text("Sudoku")
    expect(page.locator(".cell.pinned").first).to_be_visible()
    fast(page)
    givens = cells(page)
    with posted(page, "/v1/page/canvases") as answer:
        page.get_by_role("button", name="Solve").click()
    expect(page.get_by_role("status")).to_contain_text("Solved in")
    solved = cells(page)
    assert sudoku.is_valid_grid(solved)
    assert all(a in (".", b) for a, b in zip(givens, solved, strict=True))
    lines = told(answer.value)
    last = [line for line in lines if "ids" in line][-1]
    spelt: dict[str, str] = {}
    for line in lines:
        spelt |= line.get("words", {})
    assert "".join(spelt[str(token)] for token in last["ids"][:41]) == solved
    assert [char != "." for char in givens.replace("\n", "")] == pinned(page)
    visitor.picture("sudoku")

    # A given is cleared and found again; what was found is pinned.
    first = page.locator(".cell.pinned").first
    number, digit = first.get_attribute("data-cell"), first.inner_text()
    with posted(page, "/v1/page/canvases"):
        first.click()
    expect(page.locator(f"[data-cell='{number}']")).to_have_attribute("aria-pressed", "false")
    expect(page.get_by_role("status")).to_contain_text("Solved in")
    expect(page.locator(f"[data-cell='{number}']")).to_have_text(digit)
    page.locator(f"[data-cell='{number}']").click()
    expect(page.locator(f"[data-cell='{number}']")).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("status")).to_contain_text("Solved in")

    # The steps are gone back to, and what is looked at is what was there.
    slider = page.get_by_role("slider", name="Step")
    slider.focus()
    page.keyboard.press("Home")
    expect(page.get_by_role("status")).to_contain_text("as it was")
    with posted(page, "/v1/page/canvases/"):
        page.get_by_role("button", name="Continue from here").click()
    expect(page.get_by_role("status")).to_contain_text("Solved in")
    assert sudoku.is_valid_grid(cells(page))


def test_sudoku_by_keyboard(visitor: Visitor) -> None:
    page = visitor.open("sudoku")
    expect(page.locator(".cell.pinned").first).to_be_visible()
    fast(page)
    page.get_by_role("button", name="Clear", exact=True).press("Enter")
    assert cells(page) == "\n".join(["......"] * 6)
    page.locator("[data-cell='0']").focus()
    for key in ("5", "ArrowRight", "3", "ArrowDown", "6", "ArrowLeft", "4"):
        page.keyboard.press(key)
    assert cells(page).split("\n")[:2] == ["53....", "46...."]
    page.keyboard.press("Backspace")
    assert cells(page).split("\n")[1] == ".6...."
    page.keyboard.press("3")  # a second 3 in the box
    expect(page.get_by_role("status")).to_contain_text("no solution")
    page.keyboard.press("4")
    page.get_by_role("button", name="Solve").press("Enter")
    expect(page.get_by_role("button", name="Solve")).to_be_visible()
    expect(page.get_by_role("status")).to_contain_text(re.compile("Solved|Not a solution"))
    assert cells(page).startswith("53") and cells(page).split("\n")[1].startswith("46")
    page.reload()
    expect(page.get_by_role("status")).not_to_be_empty()
    assert cells(page).startswith("53")


def form(page: Page, prompt: str = "count\n28 41") -> None:
    fast(page)
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Form", exact=True).click()
    expect(page.get_by_role("status")).to_contain_text("Done after")


def test_canvas_by_mouse(visitor: Visitor) -> None:
    page = visitor.open("canvas")
    form(page)
    assert text_of(page) == COUNTED
    token = page.locator("[data-place='3']")
    token.click()
    expect(token).to_have_attribute("aria-pressed", "true")

    # What else might stand there, and one of it taken.
    with posted(page, "/alternatives") as answer:
        page.locator("[data-place='4']").hover()
    offered = answer.value.json()["alternatives"]
    assert len(offered) == 8 and sum(each["probability"] for each in offered) <= 1.0001
    options = page.locator(".option")
    expect(options).to_have_count(8)
    visitor.picture("canvas")
    word = options.nth(1).locator(".option-word").inner_text()
    with posted(page, "/v1/page/canvases/") as answer:
        options.nth(1).click()
    lines = told(answer.value)
    assert [line["pins"] for line in lines if "pins" in line][-1] == [3, 4]
    expect(page.get_by_role("status")).to_contain_text("Done after")
    assert page.locator("[data-place='4']").inner_text() == (" " if word == "space" else word)

    # Typed over.
    page.locator("[data-place='0']").dblclick()
    page.get_by_label("Text for token 1").fill("7")
    with posted(page, "/v1/page/canvases/") as answer:
        page.keyboard.press("Enter")
    assert [line["pins"] for line in told(answer.value) if "pins" in line][-1] == [0, 3, 4]
    expect(page.locator("[data-place='0']")).to_have_text("7")
    expect(page.get_by_role("status")).to_contain_text("Done after")

    # A span renoised; what is pinned in it stays.
    page.locator("[data-place='0']").hover()
    page.mouse.down()
    page.locator("[data-place='5']").hover()
    page.locator("[data-place='9']").hover()
    page.mouse.up()
    expect(page.get_by_role("toolbar")).to_contain_text("10 tokens")
    with posted(page, "/v1/page/canvases/") as answer:
        page.get_by_role("button", name="Renoise").click()
    frames = [line for line in told(answer.value) if "ids" in line]
    assert any(nats < 0 for nats in frames[0]["nats"][:10])
    assert all(nats >= 0 for nats in frames[0]["nats"][10:])
    expect(page.get_by_role("status")).to_contain_text("Done after")
    expect(page.locator("[data-place='0']")).to_have_text("7")

    # Back to the first step, and on from there: another branch, and the steps behind it are new.
    slider = page.get_by_role("slider", name="Step")
    slider.fill("1")
    expect(page.get_by_role("status")).to_contain_text("An earlier step")
    before = page.locator(".token").all_inner_texts()
    page.reload()
    expect(page.locator("[data-place='0']")).to_be_visible()
    assert page.locator(".token").all_inner_texts() == before
    with posted(page, "/v1/page/canvases/") as answer:
        page.get_by_role("button", name="Continue from here").click()
    assert told(answer.value)[0] == {"back": 1}
    expect(page.get_by_role("status")).to_contain_text("Done after")


def test_canvas_by_keyboard(visitor: Visitor) -> None:
    page = visitor.open("canvas")
    fast(page)
    page.get_by_label("Prompt").fill("count\n28 41")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status")).to_contain_text("Done after")
    page.locator("[data-place='0']").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("[data-place='1']")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Enter")
    expect(page.locator("[data-place='1']")).to_have_attribute("aria-pressed", "false")
    with posted(page, "/alternatives"):
        page.keyboard.press("Alt+ArrowDown")
    expect(page.locator(".option")).to_have_count(8)
    page.keyboard.press("Escape")
    expect(page.locator(".option")).to_have_count(0)
    with posted(page, "/v1/page/canvases/") as answer:
        page.keyboard.press("9")
        page.keyboard.press("Enter")
    assert [line["pins"] for line in told(answer.value) if "pins" in line][-1] == [1]
    expect(page.locator("[data-place='1']")).to_have_text("9")
    expect(page.get_by_role("status")).to_contain_text("Done after")
    page.locator("[data-place='3']").focus()
    for _ in range(4):
        page.keyboard.press("Shift+ArrowRight")
    expect(page.get_by_role("toolbar")).to_contain_text("5 tokens")
    with posted(page, "/v1/page/canvases/"):
        page.keyboard.press("Delete")
    expect(page.get_by_role("status")).to_contain_text("Done after")
    expect(page.locator("[data-place='1']")).to_have_text("9")


def test_pins_change_while_a_canvas_forms(visitor: Visitor) -> None:
    page = visitor.open("canvas")
    page.get_by_label("Slowly").check()
    page.get_by_label("Prompt").fill("count\n28 41")
    page.get_by_role("button", name="Form", exact=True).click()
    page.locator("[data-place='0']").click()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("status")).to_contain_text(re.compile("Step [1-9]"))
    visitor.picture("forming")
    expect(page.get_by_role("status")).to_contain_text("Done after")
    expect(page.locator("[data-place='0']")).to_have_attribute("aria-pressed", "true")


def test_chat(visitor: Visitor) -> None:
    page = visitor.open("chat")
    box = page.get_by_role("textbox", name="Message")
    box.fill("count\n28 41")
    with posted(page, "/v1/page/chat") as answer:
        box.press("Enter")
    lines = told(answer.value)
    assert any("runs" in line for line in lines) and lines[-1]["end"] == "stop"
    said = page.locator(".message.assistant .said")
    expect(said).to_have_text(COUNTED)
    expect(page.locator(".statistics").last).to_contain_text("tokens in")
    page.get_by_role("button", name="Copy message 2").click()
    assert page.evaluate("navigator.clipboard.readText()") == COUNTED
    visitor.picture("chat")

    page.get_by_role("button", name="Edit message 1").click()
    page.get_by_role("textbox", name="Your message").fill("count\n5 9")
    page.get_by_role("button", name="Send again").press("Enter")
    expect(said).to_have_text("5 6 7 8 9")
    with posted(page, "/v1/page/chat") as answer:
        page.get_by_role("button", name="Regenerate").click()
    assert answer.value.request.post_data_json["messages"] == [
        {"role": "user", "content": "count\n5 9"}
    ]
    expect(said).to_have_text("5 6 7 8 9")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()  # it is no draft any more
    page.reload()
    expect(said).to_have_text("5 6 7 8 9")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".message")).to_have_count(0)


def test_document(visitor: Visitor) -> None:
    page = visitor.open("document")
    paper = page.get_by_role("textbox", name="Text", exact=True)
    before = paper.input_value()
    wrong = before.split("\n")[1]
    expect(page.get_by_label("Rewrite line 2")).to_be_visible()
    with posted(page, "/v1/page/rewrite") as answer:
        page.get_by_role("button", name="Rewrite").click()
    found = told(answer.value)[-1]
    assert found["before"] == wrong and found["start"] == 7
    expect(page.locator("ins").first).to_be_visible()
    visitor.picture("document")
    page.get_by_role("button", name="Accept all").click()
    after = before.replace(wrong, found["after"])
    expect(paper).to_have_value(after)
    assert sudoku.is_valid_grid(after)
    page.get_by_role("button", name="Undo").click()
    expect(paper).to_have_value(before)
    page.get_by_role("button", name="Redo").click()
    expect(paper).to_have_value(after)

    # Two rows are wrong; the change of one is taken, by keyboard, and all else stays.
    lines = before.split("\n")
    spoilt = [lines[0], "654321", "123456", *lines[3:]]
    paper.fill("\n".join(spoilt))
    paper.evaluate("element => element.setSelectionRange(7, 20)")
    paper.press("Shift")
    expect(page.get_by_label("Rewrite lines 2 to 3")).to_be_visible()
    page.get_by_role("slider", name="Strength").fill("100")
    with posted(page, "/v1/page/rewrite"):
        paper.press("Control+Enter")
    expect(page.locator(".change")).to_have_count(2)
    new = page.locator("ins").all_inner_texts()
    page.get_by_role("button", name=f"Accept {new[1]}").press("Enter")
    expect(page.locator(".change")).to_have_count(1)
    page.get_by_role("button", name=f"Reject {new[0]}").press("Enter")
    expect(paper).to_have_value("\n".join([lines[0], "654321", new[1], *lines[3:]]))
    paper.press("Control+z")
    expect(paper).to_have_value("\n".join(spoilt))

    # A hole is filled.
    paper.fill("532461\n\n146253\n253146\n314625\n625314")
    paper.evaluate("element => element.setSelectionRange(7, 7)")
    paper.press("Shift")
    with posted(page, "/v1/page/hole") as answer:
        page.get_by_role("button", name="Fill in at the cursor").click()
    assert told(answer.value)[-1]["after"] == "461532"
    page.get_by_role("button", name="Accept all").click()
    expect(paper).to_have_value(after)

    # The beginning goes on.
    page.locator("summary").click()
    page.get_by_role("textbox", name="What the model is told").fill("count\n28 41")
    paper.fill("28 29 30")
    with posted(page, "/v1/page/chat") as answer:
        page.get_by_role("button", name="Continue").click()
    assert answer.value.request.post_data_json["prefill"] == "28 29 30"
    page.get_by_role("button", name="Accept all").click()
    expect(paper).to_have_value(COUNTED)


def test_template(visitor: Visitor) -> None:
    page = visitor.open("template")
    with posted(page, "/v1/page/template") as answer:
        page.get_by_role("button", name="Fill", exact=True).click()
    assert told(answer.value)[-1]["values"] == {"row": "461532", "cell": "4"}
    expect(page.get_by_label("row", exact=True)).to_have_value("461532")
    visitor.picture("template")
    page.get_by_label("cell", exact=True).fill("6")
    with posted(page, "/v1/page/template") as answer:
        page.get_by_role("button", name="Fill row again").press("Enter")
    assert answer.value.request.post_data_json["keep"] == {"cell": "6"}
    expect(page.get_by_label("cell", exact=True)).to_have_value("6")
    page.get_by_role("textbox", name="Template").fill("no slot {")
    page.get_by_role("button", name="Fill", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("'{' without '}'")
    visitor.errors.clear()  # Chromium logs the 400


def test_decide(visitor: Visitor) -> None:
    page = visitor.open("decide")
    with posted(page, "/v1/decisions") as answer:
        page.get_by_role("button", name="Decide", exact=True).click()
    found = answer.value.json()["answers"]["cell"]
    assert found["choice"] == "2"
    bars = page.locator(".answer .bar")
    expect(bars).to_have_count(3)
    percent = f"{found['probabilities']['2'] * 100:.1f}%"
    expect(page.locator(".bar.best")).to_contain_text(percent)
    expect(page.locator(".bar.best")).to_contain_text("±")
    visitor.picture("decide")
    page.get_by_role("button", name="Add a question").press("Enter")
    page.get_by_label("Statement").fill("The state is a sudoku.")
    page.get_by_label("The whole answer").fill("")
    with posted(page, "/v1/decisions") as answer:
        page.get_by_label("Statement").press("Enter")
    assert set(answer.value.json()["answers"]) == {"cell", "question 2"}
    expect(bars).to_have_count(5)
    page.get_by_role("button", name="Remove question 2").click()
    expect(page.get_by_label("Statement")).to_have_count(0)
