"""What the page withstands: hostile text, long text, a server that goes away, and every visitor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="the tests of the page need the extra 'browser'")

from axe_playwright_python.sync_playwright import Axe
from browsing import Served, Visitor, posted, told
from playwright.sync_api import Browser, expect

pytestmark = [pytest.mark.browser, pytest.mark.slow]

VIEWS = ("sudoku", "canvas", "chat", "document", "template", "decide")
HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\n"
    "مرحبا שלום \u202eesrever 😀👩‍👩‍👧 [x](javascript:hacked) `</code><script>`\n"
)


def test_no_view_has_a_serious_fault_for_readers_of_screens(visitor: Visitor) -> None:
    axe = Axe()
    found = []
    for theme in ("light", "dark"):
        visitor.page.emulate_media(color_scheme=theme)
        for view in VIEWS:
            page = visitor.open(view)
            if view in ("sudoku", "canvas") and theme == "light":
                page.get_by_label("Slowly").uncheck()
                name = "Solve" if view == "sudoku" else "Form"
                page.get_by_role("button", name=name, exact=True).click()
                said = "Solved in" if view == "sudoku" else "Done"
                expect(page.get_by_role("status")).to_contain_text(said)
            if view == "canvas":
                page.locator("[data-place='2']").hover()
                expect(page.locator(".option").first).to_be_visible()
            results = axe.run(page, options={"resultTypes": ["violations"]})
            found += [
                (
                    theme,
                    view,
                    each["id"],
                    each["nodes"][0]["html"][:160],
                    each["nodes"][0].get("failureSummary"),
                )
                for each in results.response["violations"]
                if each["impact"] in ("serious", "critical")
            ]
    visitor.errors[:] = [error for error in visitor.errors if "axe" not in error]
    assert found == []


def test_a_phone_holds_every_view(browser: Browser, served: Served) -> None:
    visitor = Visitor(
        browser, served.url, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True
    )
    for view in VIEWS:
        page = visitor.open(view)
        if view == "sudoku":
            page.get_by_role("button", name="Solve").tap()
            expect(page.get_by_role("status")).to_contain_text("Solved in")
            visitor.picture("phone")
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{view} is {wide} pixels too wide"
    visitor.context.close()
    assert visitor.errors == []


def test_dark_by_hand_stays_over_a_reload(visitor: Visitor) -> None:
    page = visitor.open("canvas")
    light = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    page.get_by_role("button", name="Colours").press("Enter")
    page.get_by_role("button", name="Colours").press("Enter")
    expect(page.locator("html")).not_to_have_css("background-color", light)
    dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    page.reload()
    expect(page.get_by_role("button", name="Colours: dark")).to_be_visible()
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == dark
    page.get_by_label("Slowly").uncheck()
    page.get_by_role("button", name="Form", exact=True).click()
    expect(page.get_by_role("status")).to_contain_text("Done after")
    visitor.picture("dark")


def test_hostile_text_is_text(visitor: Visitor) -> None:
    page = visitor.open("chat")
    page.get_by_role("textbox", name="Message").fill(HOSTILE)
    with posted(page, "/v1/page/chat") as answer:
        page.get_by_role("button", name="Send").click()
    told(answer.value)
    assert page.locator(".message.user .said").inner_text().strip() == HOSTILE.strip()

    # The same from a model: an answer that is kept is shown as Markdown.
    code = (
        "```\n"
        + HOSTILE
        + "```\n**bold** [evil](javascript:alert(1)) [fine](https://example.org/)\n"
        + HOSTILE
    )
    page.goto(f"{visitor.url}/health")  # the page keeps what it has when it is left
    page.evaluate(
        "said => localStorage.setItem('mlx-diffgemma chat messages', said)",
        json.dumps([{"role": "assistant", "content": code, "thought": "first " + HOSTILE}]),
    )
    page = visitor.open("chat")
    expect(page.locator(".markdown strong")).to_have_text("bold")
    assert page.locator(".markdown a").evaluate_all("all => all.map(a => a.href)") == [
        "https://example.org/"
    ]
    expect(page.locator(".markdown script, .markdown img")).to_have_count(0)
    expect(page.locator(".markdown pre")).to_contain_text("<script>window.hacked = 1</script>")

    thought = page.get_by_text("first <script>")
    expect(thought).to_be_hidden()
    page.locator("summary", has_text="Thought").press("Enter")
    expect(thought).to_be_visible()

    page = visitor.open("template")
    page.get_by_role("textbox", name="Template").fill(HOSTILE + "{a:one|two}")
    page.get_by_role("button", name="Fill", exact=True).click()
    expect(page.locator(".fault, [data-filled]").first).to_be_visible()
    page = visitor.open("canvas")
    page.get_by_label("Prompt").fill(HOSTILE)
    page.get_by_label("Slowly").uncheck()
    page.get_by_role("button", name="Form", exact=True).click()
    expect(page.get_by_role("status")).to_contain_text("Done after")
    assert page.evaluate("window.hacked") is None
    visitor.errors[:] = [
        error for error in visitor.errors if "400" not in error and "favicon" not in error
    ]


def test_a_document_of_ten_thousand_lines_is_changed_where_it_is_meant_to_be(
    visitor: Visitor,
) -> None:
    page = visitor.open("document")
    filler = [f"line {n} <b>שלום</b> 😀" if n % 97 == 0 else f"line {n}" for n in range(5000)]
    grid = ["532461", "456132", "146253", "253146", "314625", "625314"]
    lines = [*filler, *grid, *filler]
    paper = page.get_by_role("textbox", name="Text", exact=True)
    content = "\r\n".join(lines).encode()
    page.get_by_label("Open a file").set_input_files(
        {"name": "long.txt", "mimeType": "text/plain", "buffer": content}
    )
    expect(paper).to_have_value("\n".join(lines))
    start = len("\n".join(filler).encode("utf-16-le")) // 2 + 1 + 7
    paper.evaluate(f"element => element.setSelectionRange({start}, {start + 6})")
    paper.press("Shift")
    expect(page.get_by_label("Rewrite line 5002")).to_be_visible()
    with posted(page, "/v1/page/rewrite") as answer:
        page.get_by_role("button", name="Rewrite").click()
    found = told(answer.value)[-1]
    assert found["before"] == "456132"
    if found["after"] != found["before"]:
        page.get_by_role("button", name="Accept all").click()
    lines[5001] = found["after"]
    expect(paper).to_have_value("\n".join(lines))
    page.reload()
    expect(paper).to_have_value("\n".join(lines))
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save").click()
    assert Path(saved.value.path()).read_bytes() == "\r\n".join(lines).encode()


def test_a_connection_that_is_cut_in_mid_canvas_is_said_and_taken_up_again(
    visitor: Visitor, served: Served
) -> None:
    page = visitor.open("canvas")
    page.get_by_label("Slowly").check()
    page.get_by_label("Prompt").fill("count\n5 9")
    page.get_by_role("button", name="Form", exact=True).click()
    page.locator("[data-place='0']").wait_for()
    try:
        served.stop()
        expect(page.get_by_role("alert")).to_contain_text("does not answer")
        expect(page.get_by_role("status")).to_contain_text("cut")
        assert page.locator(".token").count() == 64
    finally:
        served.start()
    expect(page.get_by_role("status")).to_contain_text("Done after")
    expect(page.get_by_role("alert")).to_have_count(0)
    text = "".join(page.locator(".token:not(.special)").all_inner_texts())
    assert text == "5 6 7 8 9"

    # The same for a document: nothing has changed, and that is said.
    page = visitor.open("document")
    paper = page.get_by_role("textbox", name="Text", exact=True)
    before = paper.input_value()
    try:
        served.stop()
        page.get_by_role("button", name="Rewrite").click()
        expect(page.get_by_role("alert").first).to_contain_text("does not answer")
        expect(paper).to_have_value(before)
    finally:
        served.start()
    page.get_by_role("button", name="Rewrite").click()
    expect(page.get_by_role("button", name="Accept all")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
    visitor.errors[:] = [error for error in visitor.errors if "Failed to load" not in error]


def test_a_canvas_that_the_server_forgot_goes_on_from_what_is_here(
    visitor: Visitor, served: Served
) -> None:
    page = visitor.open("canvas")
    page.get_by_label("Slowly").uncheck()
    page.get_by_label("Prompt").fill("count\n28 41")
    page.get_by_role("button", name="Form", exact=True).click()
    expect(page.get_by_role("status")).to_contain_text("Done after")
    served.stop()
    served.start()
    page.locator("[data-place='1']").click()
    with posted(page, "/v1/page/canvases"):
        page.get_by_role("button", name="Re-form around pins").click()
    expect(page.get_by_role("status")).to_contain_text("Done after")
    expect(page.locator("[data-place='1']")).to_have_text("8")
    visitor.errors[:] = [error for error in visitor.errors if "404" not in error]


def test_the_page_asks_for_the_key_of_its_server(visitor: Visitor, served: Served) -> None:
    served.stop()
    served.start(api_key="secret")
    try:
        page = visitor.page
        page.goto(visitor.url)
        page.get_by_label("This server asks for its key").fill("secret")
        page.get_by_role("button", name="Enter").click()
        expect(page.locator("h1")).to_have_text("Sudoku")
        page.goto("about:blank")
    finally:
        served.stop()
        served.start()
    visitor.errors[:] = [error for error in visitor.errors if "401" not in error]


def test_thirty_steps_a_second_are_followed_in_order(visitor: Visitor) -> None:
    """A canvas of 256 tokens, 90 steps of it at 30 a second, told by a script in the page."""
    page = visitor.page
    frames = [
        {
            "at": at,
            "ids": [(at + n) % 90 + 8 for n in range(256)],
            "nats": [(at * n) % 250 for n in range(256)],
            "pins": [],
            "step": at,
            "total": 90,
            "done": at == 89,
            "words": {} if at else {str(n): chr(n + 25) for n in range(8, 98)},
        }
        for at in range(90)
    ]
    script = (Path(__file__).parent / "telling.js").read_text()
    page.add_init_script(script.replace("FRAMES", json.dumps(frames)))
    visitor.open("canvas")
    page.get_by_label("Slowly").uncheck()
    page.get_by_role("button", name="Form", exact=True).click()
    expect(page.get_by_role("status")).to_contain_text("Done after 89 steps")
    seen = page.evaluate("window.seen")
    assert seen == sorted(seen) and seen[-1] == 89
    assert page.evaluate("window.drawn - window.told") < 1000, "the last step was drawn late"
    assert len(seen) >= 20
