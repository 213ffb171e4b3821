"""Flags and commands, from the argparse parsers that read them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

from docutils import nodes
from sphinx import addnodes
from sphinx.util.docutils import SphinxDirective

from megatron_ext.policy.flags import add_flags

from . import trees

#: Defaults that need no words.
_NOTHING = (None, False, True, [], argparse.SUPPRESS)


class Flags(SphinxDirective):
    """Every flag that is added to Megatron's parser."""

    def run(self) -> list[nodes.Node]:
        """One description a flag."""
        return list(_options(self, None, flags()))


class Launcher(SphinxDirective):
    """Usage and own options of the launcher."""

    def run(self) -> list[nodes.Node]:
        """Those that are no flags of the script."""
        from megatron_ext.policy.launch_line import launcher_parser

        parser = launcher_parser()
        shared = {option for action in flags() for option in action.option_strings}
        own = [a for a in parser._actions if not shared & set(a.option_strings)]
        usage = f"usage: {parser.prog} [--cpu] [--cpu-adam ...] SCRIPT.py [Megatron arguments]"
        return [trees.preformatted(usage), *_options(self, parser.prog, own)]


class Commands(SphinxDirective):
    """Every command of ``python -m megatron_ext``."""

    def run(self) -> list[nodes.Node]:
        """One section a command."""
        labels = self.env.domains.standard_domain
        for name in commands():
            label = trees.anchor("command", name)
            labels.labels[label] = (self.env.docname, label, name)
            labels.anonlabels[label] = (self.env.docname, label)
        return [
            trees.section(
                name,
                trees.anchor("command", name),
                trees.paragraph(parser.description or ""),
                trees.preformatted(parser.format_usage().strip()),
                *_options(self, parser.prog, parser._actions),
            )
            for name, parser in commands().items()
        ]


def flags() -> list[argparse.Action]:
    """What `megatron_ext.policy.flags.add_flags` adds."""
    pass

    return add_flags(argparse.ArgumentParser(add_help=False))._actions


def commands() -> dict[str, argparse.ArgumentParser]:
    """Command -> its parser, as `megatron_ext.cli.main` has them."""
    from megatron_ext import cli

    actions = cli.command_line()._actions
    (subparsers,) = (a for a in actions if isinstance(a, argparse._SubParsersAction))
    return dict(subparsers.choices)


def _options(
    directive: SphinxDirective, program: str | None, actions: Iterable[argparse.Action]
) -> Iterator[nodes.Node]:
    """One description an option or argument, with an anchor, found by the role ``option``."""
    env = directive.env
    standard = env.domains.standard_domain
    for action in actions:
        if isinstance(action, argparse._HelpAction):
            continue
        names = action.option_strings or [action.dest]
        anchor = trees.anchor(*([program] if program else []), names[0])
        signature = addnodes.desc_signature(
            "", "", ids=[anchor], classes=["sig", "sig-object", "std"]
        )
        values = _values(action)
        for number, name in enumerate(names):
            signature += addnodes.desc_name(text=name if number == 0 else f", {name}")
            standard.add_program_option(program, name, env.docname, anchor)
        if values:
            signature += addnodes.desc_addname(text=f" {values}")
        content = addnodes.desc_content("", trees.paragraph(_help(action)))
        yield addnodes.desc(
            "", signature, content, domain="std", objtype="option", classes=["std", "option"]
        )


def _values(action: argparse.Action) -> str:
    """What follows the flag, as argparse writes it."""
    formatter = argparse.HelpFormatter("")
    if not action.option_strings:
        return "" if action.choices is None else "{" + ",".join(map(str, action.choices)) + "}"
    if action.nargs == 0:
        return ""
    return formatter._format_args(action, action.dest.upper())


def _help(action: argparse.Action) -> str:
    text = argparse.HelpFormatter("")._expand_help(action)
    hidden = action.default in _NOTHING or "efault" in text
    if hidden:
        return text
    default = action.default
    return f"{text} Default: {' '.join(default) if isinstance(default, list) else default}."
