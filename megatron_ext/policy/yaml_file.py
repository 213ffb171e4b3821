"""Read and write a `ResumePolicy` as YAML."""

from __future__ import annotations

import io
from pathlib import Path

import yaml

from ..base.files import open_regular
from ..errors import PolicyError
from .document import from_dict, to_dict
from .policy import ResumePolicy
from .yaml_loader import MAX_SIZE, load


def read(path: str | Path, name: str = "--selective-policy") -> ResumePolicy:
    """Read a policy file.

    Args:
        path: The YAML file.
        name: The flag or argument that names the file, for errors.

    Raises:
        PolicyError: The file cannot be read, is not YAML, or is not a policy. The error names the
            file and the place in it.
    """
    try:
        with open_regular(Path(path)) as file, io.TextIOWrapper(file, encoding="utf-8") as lines:
            text = lines.read(MAX_SIZE + 1)
    except (OSError, UnicodeDecodeError) as e:
        raise PolicyError(f"{name} {path}: cannot be read: {e}") from None
    try:
        return loads(text)
    except PolicyError as e:
        raise PolicyError(f"{name} {path}: {e}") from None


def loads(text: str) -> ResumePolicy:
    """Parse a policy from YAML text.

    Raises:
        PolicyError: See `read`.
    """
    try:
        content = load(text)
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
