"""The part of a policy's JSON schema that is made from the catalogue of presets."""

from __future__ import annotations

from typing import Any

from ..rules.form import DECIMAL
from .presets import CATALOGUE


def presets() -> list[dict[str, Any]]:
    """The preset as a text, then each as a mapping."""
    number = DECIMAL.pattern
    texts = (" +".join([name, *(number for _ in e.arguments)]) for name, e in CATALOGUE.items())
    out: list[dict[str, Any]] = [
        {
            "description": "A name and its numbers, as in --selective-preset.",
            "type": "string",
            "pattern": f"^ *({'|'.join(texts)}) *$",
        }
    ]
    for name, entry in CATALOGUE.items():
        properties: dict[str, Any] = {"name": {"description": "Which preset.", "const": name}}
        for letter in entry.arguments:
            properties[letter.lower()] = {
                "description": f'{letter}; a text such as "1e-3" is read as a number.',
                "type": ["number", "string"],
                "pattern": f"^{number}$",
                **dict(entry.bounds),
            }
        required = list(properties)
        if entry.declinable:
            properties["decline"] = {
                "description": "Parts that are left out.",
                "type": "array",
                "items": {"enum": list(entry.declinable)},
                "uniqueItems": True,
            }
        out.append(
            {
                "description": f"{entry.what} ({entry.source}).",
                "type": "object",
                "additionalProperties": False,
                "required": required,
                "properties": properties,
            }
        )
    return out
