"""The forms for issues are what GitHub takes for such, and ask for what the program prints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from mlx_diffgemma.cli.main import COMMANDS
from mlx_diffgemma.survey.pieces import PARTS

FOLDER = Path(__file__).parents[1] / ".github" / "ISSUE_TEMPLATE"
TEXT = {"type": "string", "minLength": 1}


def element(kind: str, required: list[str], **attributes: Any) -> dict[str, Any]:
    """The schema of one kind of element."""
    known = {"type": {"const": kind}, "attributes": {
        "type": "object", "required": required, "properties": attributes,
        "additionalProperties": False,
    }}  # fmt: skip
    needed = ["type", "attributes"]
    if kind != "markdown":
        known |= {
            "id": {"type": "string", "pattern": "^[A-Za-z0-9_-]+$"},
            "validations": {
                "type": "object", "properties": {"required": {"type": "boolean"}},
                "additionalProperties": False,
            },
        }  # fmt: skip
        needed.append("id")
    return {"type": "object", "properties": known, "required": needed,
            "additionalProperties": False}  # fmt: skip


LABELLED = {"label": TEXT, "description": TEXT}
TYPED = LABELLED | {"placeholder": TEXT, "value": TEXT}
OPTIONS = {"type": "array", "minItems": 1, "uniqueItems": True, "items": TEXT}
FORM = {
    "type": "object",
    "required": ["name", "description", "body"],
    "additionalProperties": False,
    "properties": {
        "name": TEXT,
        "description": TEXT,
        "title": TEXT,
        "labels": {"type": "array", "items": TEXT},
        "body": {
            "type": "array",
            "minItems": 1,
            "items": {
                "oneOf": [
                    element("markdown", ["value"], value=TEXT),
                    element("input", ["label"], **TYPED),
                    element("textarea", ["label"], **TYPED, render=TEXT),
                    element(
                        "dropdown", ["label", "options"], **LABELLED, options=OPTIONS,
                        multiple={"type": "boolean"}, default={"type": "integer", "minimum": 0},
                    ),
                ]
            },
        },
    },
}  # fmt: skip
"""What GitHub's documentation says of a form, as far as ours go."""
CONFIG = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"blank_issues_enabled": {"type": "boolean"}},
}
FORMS = sorted(path.name for path in FOLDER.glob("*.yml") if path.name != "config.yml")


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_one(name):
    form = read(name)
    jsonschema.validate(form, FORM, jsonschema.Draft202012Validator)
    asked = [each for each in form["body"] if each["type"] != "markdown"]
    for key in (lambda each: each["id"], lambda each: each["attributes"]["label"]):
        assert len({key(each) for each in asked}) == len(asked)
    assert any(each["validations"]["required"] for each in asked)


def test_the_choice_of_forms_is_one():
    jsonschema.validate(read("config.yml"), CONFIG, jsonschema.Draft202012Validator)
    assert {"bug.yml", "report.yml"} <= set(FORMS)


def test_forms_ask_for_commands_and_parts_that_there_are():
    text = "".join((FOLDER / name).read_text(encoding="utf-8") for name in FORMS)
    commands = set(re.findall(r"mlx-diffgemma ([a-z]+)", text))
    assert "report" in commands and commands <= set(COMMANDS)
    assert set(re.findall(r"--part (\w+)", text)) <= set(PARTS)


def test_the_command_names_its_form():
    source = (FOLDER.parents[1] / "mlx_diffgemma" / "cli" / "report.py").read_text()
    assert f"the form '{read('report.yml')['name']}'" in source


@pytest.mark.parametrize(
    "spoilt",
    [
        {"body": []},
        {"name": ""},
        {"body": [{"type": "text", "id": "a", "attributes": {"label": "b"}}]},
        {"body": [{"type": "input", "id": "a b", "attributes": {"label": "b"}}]},
        {"body": [{"type": "dropdown", "id": "a", "attributes": {"label": "b", "options": []}}]},
    ],
)
def test_the_schema_refuses_what_github_would(spoilt):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(read("bug.yml") | spoilt, FORM, jsonschema.Draft202012Validator)
