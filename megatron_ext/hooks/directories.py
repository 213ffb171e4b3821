"""Set ``--load`` from ``--selective-from`` when the arguments are parsed."""

from __future__ import annotations

import argparse
from typing import Any

from ..checkpoint import directories
from ..errors import MegatronExtError
from ..policy.flags import GROUP, flag_of, given_without_class, without_class


def choose_directories(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Set ``--load`` from ``--selective-from`` when the arguments are parsed.

    Args:
        parser: The parser. Its ``parse_known_args``, which ``parse_args`` calls too, is replaced.
            The namespace then has the directory to load from as ``load``, and its role as
            ``selective_where``.
    """
    parse = parser.parse_known_args
    if hasattr(parse, "chooses_directories"):
        return parser  # the launcher and a script with `add_arguments` both call this function
    # Flags of the same name that a fork of Megatron defines are not refused.
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
                return namespace, rest  # the preflight reports it together with other problems
            namespace.load, namespace.selective_where = str(chosen.load), chosen.where
            if chosen.where == "own":
                # The step says where the phase starts. A restart loads the newest checkpoint.
                namespace.selective_start_step = getattr(namespace, "ckpt_step", None)
                namespace.ckpt_step = None
        return namespace, rest

    parse_known_args.chooses_directories = True  # type: ignore[attr-defined]
    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]
    return parser
