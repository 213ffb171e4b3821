"""Read and write a `ResumePolicy` as YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import PolicyError
from .document import from_dict, to_dict
from .policy import ResumePolicy


def read(path: str | Path) -> ResumePolicy:
    """Read a policy file.

    Args:
        path: The YAML file.

    Raises:
        PolicyError: The file cannot be read, is not YAML, or is not a policy. The error names the
            file and the place in it.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise PolicyError(f"--selective-policy {path}: cannot be read: {e}") from None
    try:
        return loads(text)
    except PolicyError as e:
        raise PolicyError(f"--selective-policy {path}: {e}") from None


def loads(text: str) -> ResumePolicy:
    """Parse a policy from YAML text.

    Raises:
        PolicyError: See `read`.
    """
    try:
        content = yaml.load(text, _Loader)
    except PolicyError:
        raise
    except (yaml.YAMLError, ValueError) as e:
        raise PolicyError(
            f"not YAML: {' '.join(str(e).split())}. Text that begins with * or ends with : needs "
            "quotes"
        ) from None
    return from_dict({} if content is None else content)


def dumps(policy: ResumePolicy) -> str:
    """Write a policy as YAML text for `loads`; defaults are left out."""
    content = to_dict(policy)
    return yaml.safe_dump(content, sort_keys=False, width=96) if content else "{}\n"


class _Loader(yaml.SafeLoader):
    """Loader that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping; two equal keys are an error, unlike in SafeLoader."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise PolicyError(f"line {line}: {key.value!r} is given twice; expected once")
                seen.add(key.value)
        return super().construct_mapping(node, deep)
