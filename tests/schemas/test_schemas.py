"""The JSON schemas in the package are those that the types of the documents give."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

import megatron_ext
from megatron_ext import schemas

DIRECTORY = Path(megatron_ext.__file__).parent / "schemas"


def test_there_is_a_file_for_each_schema_and_no_other() -> None:
    assert {p.name for p in DIRECTORY.glob("*.json")} == set(schemas.generated())


@pytest.mark.parametrize("name", schemas.generated())
def test_a_schema_is_as_it_is_generated(name: str) -> None:
    generated = schemas.generated()[name]
    assert (DIRECTORY / name).read_text(encoding="utf-8") == generated, (
        f"{name} is not what the types of its document give; run: make schemas"
    )
    jsonschema.Draft202012Validator.check_schema(json.loads(generated))
