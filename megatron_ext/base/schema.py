"""What the types of a document say beside the type, for its JSON schema.

A document is declared as a TypedDict or a dataclass. The class's docstring describes each field
under ``Args:`` or ``Attributes:``, and `Keywords` in an `Annotated` type limit its values.
`megatron_ext.schemas` makes the schema from that.
"""

from __future__ import annotations

from typing import Annotated, Any, TypedDict


class Keywords:
    """Metadata of an `Annotated` type: what its schema has beside the type.

    Args:
        name: Makes the schema a part of ``$defs``.
        of: Another type, from which the schema is made instead.
        keywords: Of JSON schema.
    """

    def __init__(self, name: str = "", /, *, of: Any = None, **keywords: Any) -> None:
        self.name = name
        self.of = of
        self.keywords = keywords


#: In an `Annotated` type: the class is written where it is used, not as a part of ``$defs``.
INLINE = Keywords()
Count = Annotated[int, Keywords(minimum=0)]
#: A float as `megatron_ext.base.values.as_json` writes it.
Real = Annotated[
    float, Keywords("float", of=Any, oneOf=[{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}])
]


class Versioned(TypedDict):
    """What every document of a command or a run begins with.

    Attributes:
        schema: Name and version of this format. The number grows when a field is renamed, removed
            or given another meaning.
    """

    schema: str
