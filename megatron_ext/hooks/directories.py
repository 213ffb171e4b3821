"""Let ``--selective-from`` decide what ``--load`` is, as soon as the arguments are parsed."""

from __future__ import annotations

import argparse
from typing import Any

from ..checkpoint import directories
from ..errors import MegatronExtError
from ..policy.flags import GROUP, flag_of, given_without_class, without_class


def choose_directories(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Let ``--selective-from`` decide what ``--load`` is, as soon as the arguments are parsed.

    Args:
        parser: Changed: its ``parse_known_args`` (which ``parse_args`` calls too) then gives a
            namespace whose ``load`` is the directory to load from, and ``selective_where``.
    """
    parse = parser.parse_known_args
    if hasattr(parse, "chooses_directories"):
        return parser  # the launcher has been here, and then a script with `add_arguments`
    # A fork's own flags of the same name are not ours to refuse.
    groups = (g for g in parser._action_groups if g.title == GROUP)
    own = {flag_of(action.dest) for group in groups for action in group._group_actions}

    def parse_known_args(*args: Any, **kwargs: Any) -> Any:
        namespace, rest = parse(*args, **kwargs)
        if unheard := own & set(given_without_class(namespace)):
            parser.exit(2, f"{parser.prog}: error: {without_class(sorted(unheard))}\n")
        given = {
            name: getattr(namespace, name, None)
            for name in ("load", "save", "selective_from", "non_persistent_global_ckpt_dir")
        }
        if given["selective_from"] is not None:
            try:
                chosen = directories.choose(*given.values())
            except MegatronExtError:
                return namespace, rest  # the preflight says so, beside whatever else is wrong
            namespace.load, namespace.selective_where = str(chosen.load), chosen.where
            if chosen.where == "own":
                # It has said where the phase starts; a restart goes on from the newest.
                namespace.selective_start_step = getattr(namespace, "ckpt_step", None)
                namespace.ckpt_step = None
        return namespace, rest

    parse_known_args.chooses_directories = True  # type: ignore[attr-defined]
    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]
    return parser
