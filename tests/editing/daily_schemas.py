"""Forty JSON schemas of daily use: calls of tools, forms, answers of services."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
SWITCH: Schema = {"type": "boolean"}


def form(optional: tuple[str, ...] = (), **fields: Schema) -> Schema:
    """An object of just these fields."""
    required = [name for name in fields if name not in optional]
    closed = {"type": "object", "additionalProperties": False}
    return {**closed, "properties": fields, "required": required}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def text(**keywords: Any) -> Schema:
    return {"type": "string", **keywords}


def listing(items: Schema, **keywords: Any) -> Schema:
    return {"type": "array", "items": items, **keywords}


def call(name: str, **arguments: Schema) -> Schema:
    return form(name={"const": name}, arguments=form(**arguments))


EMAIL, DATE, MOMENT = text(format="email"), text(format="date"), text(format="date-time")
PLACE = form(street=TEXT, city=TEXT, code=text(pattern="^[0-9]{5}$"), country=one_of("DE", "FR"))
COMMENT = {
    "$defs": {
        "comment": form(
            author=TEXT, text=TEXT, answers=listing({"$ref": "#/$defs/comment"}, maxItems=2)
        )
    },
    "$ref": "#/$defs/comment",
}

SCHEMAS: dict[str, Schema] = {
    "text": TEXT,
    "whole number": WHOLE,
    "number": NUMBER,
    "list of texts": listing(TEXT),
    "any object": {"type": "object"},
    "anything": {},
    "sentiment": form(label=one_of("positive", "neutral", "negative"), confidence=NUMBER),
    "yes or no": form(answer=SWITCH, reason=text(maxLength=80)),
    "rating": form(stars={"type": "integer", "minimum": 1, "maximum": 5}, comment=TEXT),
    "summary": form(title=text(maxLength=60), points=listing(TEXT, minItems=3, maxItems=5)),
    "entities": listing(form(text=TEXT, kind=one_of("person", "place", "firm"), start=WHOLE)),
    "translation": form(source=text(pattern="^[a-z]{2}$"), target=TEXT),
    "quiz": form(question=TEXT, choices=listing(TEXT, minItems=4, maxItems=4), right=WHOLE),
    "tags": listing(one_of("news", "sport", "art", "work"), uniqueItems=True, maxItems=3),
    "keywords": listing(text(pattern="^[a-z]+$"), minItems=1, maxItems=6),
    "weather call": call("weather", city=TEXT, unit=one_of("celsius", "fahrenheit")),
    "search call": call("search", query=text(minLength=1), limit={"type": "integer", "minimum": 1}),
    "mail call": call("send_mail", to=listing(EMAIL, minItems=1), subject=TEXT, body=TEXT),
    "event call": call("add_event", title=TEXT, start=MOMENT, minutes=WHOLE),
    "shell call": call("run", command=TEXT, seconds={"type": "number", "maximum": 600}),
    "one of two calls": {
        "oneOf": [call("read", path=TEXT), call("write", path=TEXT, content=TEXT)]
    },
    "list of calls": listing(
        {"anyOf": [call("add", a=NUMBER, b=NUMBER), call("negate", a=NUMBER)]}, maxItems=3
    ),
    "email": EMAIL,
    "contact": form(name=TEXT, email=EMAIL, phone=text(pattern=r"^\+?[0-9 ]{6,15}$")),
    "address": PLACE,
    "person": form(first=TEXT, last=TEXT, born=DATE, home=PLACE),
    "sign-up": form(
        user=text(pattern="^[a-z][a-z0-9_]{2,15}$"), password=text(minLength=8), agreed=SWITCH
    ),
    "payment": form(
        amount={"type": "number", "minimum": 0, "multipleOf": 0.01},
        currency=text(pattern="^[A-Z]{3}$"),
        card=text(pattern="^[0-9]{4}( [0-9]{4}){3}$"),
    ),
    "booking": form(("note",), day=DATE, people={"type": "integer", "minimum": 1}, note=TEXT),
    "order": form(
        id=text(format="uuid"),
        lines=listing(form(product=TEXT, count=WHOLE, price=NUMBER), minItems=1),
        state=one_of("open", "paid", "sent"),
    ),
    "invoice": form(number=text(pattern="^R-[0-9]{6}$"), due=DATE, total=NUMBER, paid=SWITCH),
    "user of a service": form(id=WHOLE, login=TEXT, url=text(format="uri"), admin=SWITCH),
    "page of results": form(
        items=listing(form(id=WHOLE, name=TEXT)), next={"type": ["string", "null"]}
    ),
    "error": form(code=WHOLE, message=TEXT, details=listing(TEXT)),
    "position": form(
        lat={"type": "number", "minimum": -90, "maximum": 90},
        lon={"type": "number", "minimum": -180, "maximum": 180},
    ),
    "shape": form(type={"const": "Point"}, at=listing(NUMBER, minItems=2, maxItems=2)),
    "release": form(version=text(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$"), notes=TEXT, at=MOMENT),
    "server": form(
        host=text(format="ipv4"), port={"type": "integer", "minimum": 1, "maximum": 65535}
    ),
    "comments": COMMENT,
    "settings": {"type": "object", "additionalProperties": SWITCH, "maxProperties": 4},
}  # fmt: skip
