"""Random JSON schemas: nested objects, arrays, enums, numbers, patterns, unions, recursion."""

from __future__ import annotations

from typing import Any

import numpy as np

_PATTERNS = ["^[a-z]{2,4}$", "^[0-9]{3}-[0-9]{2}$", "^(red|green)[0-9]?$", "^x*y$"]
_NAMES = ["a", "name", "id", "kind", "on", "é", "with space", 'q"']


def random_schema(rng: np.random.Generator, depth: int = 0) -> dict[str, Any]:
    kinds = ["string", "pattern", "integer", "number", "boolean", "null", "enum", "const"]
    if depth < 2:
        kinds += ["object", "object", "object", "array", "array", "anyOf", "recursion"]
    kind = rng.choice(kinds)
    if kind == "string":
        least = int(rng.integers(0, 3))
        return {"type": "string", "minLength": least, "maxLength": least + int(rng.integers(1, 6))}
    if kind == "pattern":
        return {"type": "string", "pattern": str(rng.choice(_PATTERNS))}
    if kind == "integer":
        least = int(rng.integers(-50, 50))
        return {"type": "integer", "minimum": least, "maximum": least + int(rng.integers(0, 200))}
    if kind == "number":
        return {"type": "number", "minimum": 0, "exclusiveMaximum": int(rng.integers(1, 9))}
    if kind in ("boolean", "null"):
        return {"type": str(kind)}
    if kind == "enum":
        values = ["red", "green", 3, 2.5, None, True, "é\n", [1, {"a": 2}]]
        chosen = rng.choice(len(values), int(rng.integers(1, 5)), replace=False)
        return {"enum": [values[int(place)] for place in chosen]}
    if kind == "const":
        return {"const": {"fixed": [1, "two", None]}}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.integers(2, 4))]}
    if kind == "array":
        least = int(rng.integers(0, 3))
        return {
            "type": "array",
            "items": random_schema(rng, depth + 1),
            "minItems": least,
            "maxItems": least + int(rng.integers(0, 3)),
        }
    if kind == "recursion":
        node = {
            "type": "object",
            "properties": {
                "v": {"type": "integer", "minimum": 0, "maximum": 9},
                "next": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["v"],
            "additionalProperties": False,
        }
        if depth:
            return {"type": "boolean"}
        return {"$defs": {"node": node}, "$ref": "#/$defs/node"}
    names = rng.choice(_NAMES, int(rng.integers(1, 4)), replace=False).tolist()
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth + 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }
