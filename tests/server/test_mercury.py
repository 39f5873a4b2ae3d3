"""Mercury's routes, as editors call them."""

from __future__ import annotations

import httpx
import pytest

from mlx_diffgemma.server.mercury import read_region

EDIT = """<|recently_viewed_code_snippets|>
<|/recently_viewed_code_snippets|>
<|current_file_content|>
current_file_path: sums.py
1 2 3
<|code_to_edit|>
4 5<|cursor|>
<|/code_to_edit|>
7 8 9
<|/current_file_content|>
<|edit_diff_history|>
<|/edit_diff_history|>"""


def post(url: str, path: str, content: str, status: int = 200, **more):
    told = {"model": "mercury-edit-2", "messages": [{"role": "user", "content": content}], **more}
    response = httpx.post(f"{url}{path}", json=told, timeout=60)
    assert response.status_code == status, response.text
    return response.json()


@pytest.mark.parametrize(
    ("message", "around", "text"),
    [
        (EDIT, ("1 2 3\n", "\n7 8 9\n"), "4 5"),
        (EDIT.replace("4 5<|cursor|>\n", "<|cursor|>\n"), ("1 2 3\n", "\n7 8 9\n"), ""),
        (
            "<|current_file_content|>\na\nb\nc\n<|/current_file_content|>"
            "<|code_to_edit|>\nb<|cursor|>\n<|/code_to_edit|>",
            ("a\n", "\nc"), "b",
        ),
        ("<|code_to_edit|>é`<|cursor|>x<|/code_to_edit|>", ("", ""), "é`x"),
    ],
)  # fmt: skip
def test_the_region_is_read_byte_for_byte(message, around, text):
    region = read_region(message)
    assert ((region.before, region.after), region.text) == (around, text)
    assert region.file == ("sums.py" if "sums.py" in message else "a file")


def test_an_edit_comes_in_one_fence_and_none_as_none(demo_url, calling_url):
    found = post(demo_url, "/v1/edit/completions", EDIT, seed=1)
    assert found["object"] == "edit.completion"
    content = found["choices"][0]["message"]["content"]
    assert content == "None" or (content.startswith("```\n") and content.endswith("\n```"))
    again = post(demo_url, "/v1/edit/completions", EDIT, seed=1)
    assert again["choices"][0]["message"]["content"] == content
    region = content.removeprefix("```\n").removesuffix("\n```")
    same = EDIT.replace("4 5<|cursor|>", region)
    if content != "None":
        assert "```" not in region and same != EDIT


def test_an_update_is_merged_by_the_text_in_the_fence(calling_url, script, ids):
    message = "<|original_code|>\na\n<|/original_code|>\n<|update_snippet|>\nb\n<|/update_snippet|>"
    for said, expected in (("Yes.\n```py\na\nb\n```\nDone.<turn|>", "a\nb\n"), ("a<turn|>", "a")):
        script.canvases = [ids(said)]
        found = post(calling_url, "/v1/apply/completions", message)
        assert found["choices"][0]["message"]["content"] == expected
        assert found["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("content", "more", "named"),
    [
        ("no marks", {}, "messages.0.content"),
        (EDIT, {"stream": True}, "stream"),
        (EDIT.replace("4 5", "4 5 " * 40), {}, None),
    ],
)
def test_what_cannot_be_edited_is_refused(demo_url, content, more, named):
    error = post(demo_url, "/v1/edit/completions", content, 400, **more)["error"]
    assert error["param"] == named
