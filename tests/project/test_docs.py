"""The documentation: it builds, and what it says of flags, commands, files and lines is so."""

from __future__ import annotations

import argparse
import ast
import html.parser
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomllib

import megatron_ext
from megatron_ext import cli
from megatron_ext.host.contract import CONTRACT, TESTED
from megatron_ext.policy import from_flags, yaml_file
from megatron_ext.policy.flags import add_flags
from megatron_ext.policy.launch_line import launcher_parser
from megatron_ext.policy.presets import forms
from megatron_ext.rules import GRAMMAR
from tests.support import reference
from tests.support.hosts import HOSTS, Host

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)
SOURCES = [ROOT / "README.md", *PAGES]
GUIDE = [p for p in PAGES if p.parent.name == "guide" and p.name != "index.md"]
SCHEMAS = sorted((ROOT / "megatron_ext" / "schemas").glob("*.json"))

#: What a page of the guide has to decide, in this order.
STATE = [
    "weights",
    "master weights",
    "`exp_avg`",
    "`exp_avg_sq`",
    "`step`",
    "`max_lr`, `min_lr`, `lr`",
    "`weight_decay`, `start_wd`, `end_wd`, `wd_mult`",
    "`betas`, `eps`, `bias_correction`",
    "other keys of a param_group",
    "`clip_grad`",
    "scheduler values",
    "scheduler position",
    "iteration",
    "data position",
    "loss scale",
    "RNG",
    "vocabulary rows",
]

#: Line of megatron-core 0.19.2 -> what is there.
UPSTREAM = {
    "core/dist_checkpointing/mapping.py:134": "flattened_range is not supported",
    "core/dist_checkpointing/strategies/common.py:50": "Common file",
    "core/dist_checkpointing/strategies/torch.py:290": "sh_ten.data.zero_()",
    "core/dist_checkpointing/validation.py:309": "Unexpected keys",
    "core/distributed/param_and_grad_buffer.py:352": "found NaN in local grad norm",
    "core/optimizer/cpu_offloading/hybrid_optimizer.py:160": "_sync_hdo_param_groups_to_sub",
    "core/optimizer/distrib_optimizer.py:839": "assert len(steps) == 1",
    "core/optimizer/distrib_optimizer.py:964": "param_groups_map[needed_groups] = param_group",
    "core/optimizer/distrib_optimizer.py:970": "**param_groups_map[needed_groups]",
    "core/optimizer/distrib_optimizer.py:2069": "Number of unpadded elements",
    "core/optimizer/optimizer.py:139": "param_group_identifier_keys = (",
    "core/optimizer/optimizer.py:641": "Could not find parameter group",
    "core/optimizer_param_scheduler.py:226": "max_lr = param_group.get('max_lr', self.max_lr)",
    "core/optimizer_param_scheduler.py:299": "param_group['lr'] = self.get_lr(param_group)",
    "core/optimizer_param_scheduler.py:329": "overriding {name} value to",
    "core/optimizer_param_scheduler.py:334": "class input value",
    "core/optimizer_param_scheduler.py:341": "def load_state_dict(self, state_dict: dict)",
    "training/checkpointing.py:1691": "will start from random",
    "training/checkpointing.py:2555": "not args.no_load_optim:",
    "training/checkpointing.py:2605": "Unable to load optimizer",
    "training/checkpointing.py:2616": "optimizer.reload_model_params()",
    "training/training.py:1547": "args.train_samples // args.global_batch_size",
    "training/training.py:1914": "lr_decay_steps = args.lr_decay_iters * args.global_batch_size",
    "training/training.py:4528": "consumed_train_samples = args.iteration * args.global_batch_size",
}


# --- what the sources hold


def blocks(path: Path, language: str) -> list[str]:
    """The fenced code of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


def inline(path: Path) -> list[str]:
    """The code in a page's sentences and tables."""
    prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


_ARRAY = re.compile(r"^(\w+)=\(([^()]*)\)", re.MULTILINE)


def commands_of(path: Path) -> Iterator[list[str]]:
    """The words of every command in a page's shell blocks, its arrays put in."""
    shell = blocks(path, "bash")
    arrays = {
        name: shlex.split(words, comments=True)
        for text in shell
        for name, words in _ARRAY.findall(text)
    }
    for text in shell:
        for line in _ARRAY.sub("", text.replace("\\\n", " ")).splitlines():
            line = re.sub(r"\[[^][]* arguments\]", "", line)
            words = []
            for word in shlex.split(line, comments=True):
                array = re.fullmatch(r"\$\{(\w+)\[@\]\}", word)
                words += arrays.get(array[1], []) if array else [word]
            while words and re.match(r"\w+=", words[0]):  # a variable of this command
                del words[0]
            if words:
                yield words


def own_commands(path: Path) -> Iterator[list[str]]:
    """The words after ``python -m megatron_ext``, of shell blocks and of sentences."""
    lines = [*commands_of(path), *(i.split() for i in inline(path) if "megatron_ext " in f"{i} ")]
    for words in lines:
        for start in (["python", "-m", "megatron_ext"], ["megatron-ext"]):
            if words[: len(start)] == start and len(words) > len(start):
                yield words[len(start) :]


def parses(parser: argparse.ArgumentParser, words: list[str], *, all_known: bool = True) -> Any:
    """What a parser makes of the words.

    Raises:
        AssertionError: It refuses them.
    """
    try:
        options, rest = parser.parse_known_args(words)
    except SystemExit as e:
        raise AssertionError(f"refused: {shlex.join(words)}") from e
    assert not (rest and all_known), f"unknown: {rest} in {shlex.join(words)}"
    return options


def flags_parser() -> argparse.ArgumentParser:
    return add_flags(argparse.ArgumentParser(add_help=False, allow_abbrev=False))


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def subcommands() -> dict[str, argparse.ArgumentParser]:
    actions = cli.command_line()._actions
    (found,) = (a.choices for a in actions if isinstance(a, argparse._SubParsersAction))
    return found


# --- what a page says


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_flag_is_one_of_the_programs(path: Path) -> None:
    known = options_of(flags_parser())
    own = re.compile(r"(?<![\w-])--(?:no-)?(?:selective|reset-[id]|optimizer-class)[a-z-]*")
    wildcard = "--selective-"  # `--selective-...` in a sentence
    found = set(own.findall(path.read_text())) - {wildcard}
    assert found - known == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_command_is_one(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `megatron_ext` by its parser; those of a run by the launcher's and the policy."""
    for text in blocks(path, "yaml"):
        if name := re.match(r"# (\w+\.yaml)\b", text):
            (tmp_path / name[1]).write_text(text)
    monkeypatch.chdir(tmp_path)
    checked = 0
    for words in own_commands(path):
        if words[0] == "plan":
            from_flags.request_from_args(parses(flags_parser(), words, all_known=False))
        parses(cli.command_line(), words, all_known=words[0] != "plan")
        # argparse takes an abbreviation for a flag.
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert words[0] == "plan" or flags <= options_of(subcommands()[words[0]])
        checked += 1
    for words in commands_of(path):
        if "megatron_ext.launch" in words:
            parses(launcher_parser(), words[words.index("megatron_ext.launch") + 1 :])
        if "--optimizer-class" in words:
            given = parses(flags_parser(), words, all_known=False)
            request = from_flags.request_from_args(given)
            assert request.optimizer_class == "megatron_ext.SelectiveAdam"
            checked += 1
    assert checked or path.parent.name not in ("guide", "reference") or path.name in UNCHECKED


#: Pages whose commands are of another kind, or which have none.
UNCHECKED = ("api.md", "schemas.md", "flags.md", "faults.md", "rl-weight-sync.md")


def test_a_command_that_is_wrong_is_noticed() -> None:
    parses(cli.command_line(), ["diff", "a", "b", "--moments"])
    with pytest.raises(AssertionError, match="refused"):
        parses(cli.command_line(), ["diff", "a"])
    with pytest.raises(AssertionError, match="unknown"):
        parses(flags_parser(), ["--selective-prest", "reset"])


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_block_is_of_its_language(path: Path) -> None:
    for text in blocks(path, "yaml"):
        assert yaml_file.loads(text) is not None
    for text in blocks(path, "python"):
        compile(text, str(path), "exec")
    for text in blocks(path, "bash"):
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr}\n{text}"
    if path in PAGES:  # a fence without a language would escape all of this
        fences = re.findall(r"^```(.*)$", path.read_text(), re.MULTILINE)
        assert all(opening for opening in fences[::2])
        # A forge shows Markdown: what Sphinx alone understands is for its tables of contents.
        assert {o for o in fences if o.startswith("{")} <= {"{toctree}", "{eval-rst}"}
        roles = r"\{(py:\w+|option|ref|doc|math|download)\}`|^\([\w-]+\)=$"
        assert not re.search(roles, path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(DOCS).as_posix())
def test_every_file_and_test_is_there(path: Path) -> None:
    for code in inline(path):
        found = re.fullmatch(
            r"((?:tests|megatron_ext|benchmarks|docs|csrc)/[\w./-]+)(::\w+)?", code
        )
        if found is None or re.fullmatch(r"megatron_ext/[a-z-]+/\d+", code):  # or a format's name
            continue
        file = ROOT / found[1]
        assert file.exists(), code
        if found[2]:
            tree = ast.parse(file.read_text())
            names = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
            assert found[2][2:] in names, code


def test_every_line_of_megatron_is_the_one_that_is_meant() -> None:
    (megatron,) = importlib.util.find_spec("megatron").submodule_search_locations
    line = re.compile(r"(?:core|training)/[\w/]+\.py:\d+")
    # The lines of the generated list are those of `host/contract.py`.
    written = "".join(reference.PART.sub("", path.read_text()) for path in PAGES)
    assert set(line.findall(written)) == set(UPSTREAM)
    for place, wanted in UPSTREAM.items():
        file, _, number = place.partition(":")
        lines = (Path(megatron) / file).read_text().splitlines()
        assert wanted in lines[int(number) - 1], place


TROUBLE = DOCS / "troubleshooting.md"


def texts_of(file: Path) -> str:
    """The texts in a file's code, whitespace made single, without what is put into them."""
    tree = ast.parse(file.read_text())
    docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [] if id(node) in docstrings else [node.value]
    return " ".join("\1".join(found).split())


def quoted(section: str) -> list[str]:
    """The pieces of the messages that a section of the page quotes."""
    lines = [
        line
        for text in re.findall(r"^```text\n(.*?)^```$", section, re.M | re.S)
        for line in text.splitlines()
    ]
    # What Python itself prints, and values, are in no file.
    said = [re.sub(r"^\w+Error: |[(].*[)]$|[\d.]+e-\d+", "...", line) for line in lines]
    return [piece for line in said for p in line.split("...") if len(piece := p.strip(" ,;:.")) > 3]


def test_every_message_of_the_troubleshooting_is_in_the_code() -> None:
    _, stock, ours = re.split(r"^## .*$", TROUBLE.read_text(), flags=re.MULTILINE)
    own = "\1".join(map(texts_of, (ROOT / "megatron_ext").rglob("*.py")))
    pieces = quoted(ours)
    assert len(pieces) > 30
    assert [piece for piece in pieces if piece not in own] == []
    (megatron,) = importlib.util.find_spec("megatron").submodule_search_locations
    (torch,) = importlib.util.find_spec("torch").submodule_search_locations
    for entry in stock.split("\n### ")[1:]:
        places = re.findall(r"`((?:core|training|torch)/[\w/]+\.py)(?::\d+)?`", entry)
        roots = [Path(torch).parent if p.startswith("torch/") else Path(megatron) for p in places]
        files = [root / place for root, place in zip(roots, places, strict=True)]
        # A message may also be a line of the code.
        theirs = "\1".join(texts_of(file) + file.read_text() for file in files)
        assert [piece for piece in quoted(entry) if piece not in theirs] == [], entry
        assert places or "```text" not in entry


@pytest.mark.parametrize("host", HOSTS, ids=lambda h: h.name)
def test_the_tests_of_every_host_are_there_and_are_run(host: Host) -> None:
    assert not host.runs or host.tests
    for place in host.tests:
        file, _, name = place.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        of_host = [n for n in found if n.name == name or (not name and n.name.startswith("test_"))]
        assert of_host, place
        marks = {ast.unparse(d) for n in of_host for d in n.decorator_list}
        assert "pytest.mark.all" not in marks, place


#: States of the line below a guide's table; the longest first, as some begin like others.
_STATES = "|".join(re.escape(state) for state in sorted(STATE, key=len, reverse=True))
_SAME = re.compile(rf"((?:(?:{_STATES})(?:, )?)+) \(([^;]+)\)")


@pytest.mark.parametrize("path", GUIDE, ids=lambda p: p.stem)
def test_a_page_of_the_guide_says_what_becomes_of_everything(path: Path) -> None:
    """The rows of the table differ from column to column; the line below it has the others."""
    text = path.read_text()
    (table,) = re.findall(r"^\| state \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [[cell.strip("| ") for cell in row.split(" | ")] for row in table.splitlines()]
    assert len({len(row) for row in rows}) == 1
    assert all(cell for row in rows for cell in row)
    assert all(len(set(row[1:])) > 1 for row in rows)
    (line,) = re.findall(r"^The same in every column: (.*?)\.\n\n", text, re.MULTILINE | re.DOTALL)
    groups = [_SAME.fullmatch(group) for group in " ".join(line.split()).split("; ")]
    assert all(groups), line
    same = [state for group in groups if group for state in re.findall(_STATES, group[1])]
    different = [row[0] for row in rows]
    assert sorted([*different, *same]) == sorted(STATE)
    assert different == [state for state in STATE if state in different]
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert {"What becomes of everything", "How to check", "What stock does"} <= set(titles)
    assert f"\n{path.stem}\n" in (path.parent / "index.md").read_text()


def test_the_generated_parts_are_those_of_the_code() -> None:
    pages = reference.regenerated()
    written = [name for text in pages.values() for name, _ in reference.PART.findall(text)]
    assert {part.split()[0] for part in written} == set(reference.PARTS)
    for path, text in pages.items():
        # Versions of argparse break usage lines at other places.
        assert text.split() == path.read_text().split(), f"{path}: run `make reference`"


# --- what is built


class Text(html.parser.HTMLParser):
    """The text of a page, its ids, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._parts: list[str] = []
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.feed(path.read_text())
        self.text = " ".join("".join(self._parts).split())

    def handle_data(self, data: str) -> None:
        self._parts.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if "id" in given:
            self.ids.add(given["id"] or "")
        if tag in ("script", "img", "link", "iframe"):
            self.loads += [v for k in ("src", "href") if (v := given.get(k))]
        if tag == "a":
            self.links.append(given.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages. A warning is an error, and so is a reference that leads nowhere."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q"]
    done = subprocess.run(
        [*command, "-d", str(out / ".doctrees"), str(DOCS), str(out / "html")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return out / "html"


#: Sphinx, in a Python that lacks what docs/requirements.txt does not have.
WITHOUT_TORCH = """
import importlib.util, sys
missing = ("torch", "megatron", "numpy", "rich")
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in missing else real(name, *a)
sys.modules.update(dict.fromkeys(missing))
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_pages_can_be_built_without_torch(tmp_path: Path, site: Path) -> None:
    needed = (DOCS / "requirements.txt").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert needed == project["optional-dependencies"]["docs"]
    command = [sys.executable, "-c", WITHOUT_TORCH, "-W", "-n", "-q", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for path in PAGES:
        page = Text(tmp_path / path.relative_to(DOCS).with_suffix(".html"))
        whole = Text(site / path.relative_to(DOCS).with_suffix(".html"))
        assert page.text == whole.text or path.name == "api.md"
    assert "megatron_ext.SelectiveAdam" in Text(tmp_path / "reference" / "api.html").text


def test_every_page_is_built_and_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in PAGES:
        page = Text(site / path.relative_to(DOCS).with_suffix(".html"))
        assert [url for url in page.loads if "//" in url] == [], path
        assert page.text


def test_formulas_are_mathml(site: Path) -> None:
    for name in ("formulas.html", "reference/api.html"):
        text = (site / name).read_text()
        assert "<math" in text
        assert "\\frac" not in text
        assert "MathJax" not in text


def test_every_flag_is_in_the_reference_with_its_help(site: Path) -> None:
    page = Text(site / "reference" / "flags.html")
    formatter = argparse.HelpFormatter("")
    actions = [*flags_parser()._actions, *launcher_parser()._actions]
    assert len(actions) > 20
    for action in actions:
        if isinstance(action, argparse._HelpAction):
            continue
        said = " ".join(formatter._expand_help(action).split()).replace("`", "")
        assert said in page.text, action.dest
        for option in action.option_strings:
            assert option in page.text


def test_every_command_is_in_the_reference_with_its_options(site: Path) -> None:
    page = Text(site / "reference" / "commands.html")
    assert {"inspect", "diff", "edit", "convert", "env"} <= set(subcommands())
    for name, parser in subcommands().items():
        assert name in page.ids
        parts = page.text.split(f"usage: python -m megatron_ext {name} ", 1)
        assert len(parts) == 2, name
        usage = " ".join(parser.format_usage().split()).removeprefix(f"usage: {parser.prog} ")
        said = parts[1].split("usage: ")[0]
        assert said.startswith(usage)
        said = said.removeprefix(usage)
        for option in options_of(parser) - {"-h", "--help"}:
            assert option in said, f"{name} {option}"


def test_every_preset_and_operation_is_in_the_reference(site: Path) -> None:
    page = Text(site / "reference" / "policy.html")
    for written in (*forms(), *GRAMMAR):
        assert written in page.text
    for what in GRAMMAR.values():
        assert what in page.text
    formulas = Text(site / "formulas.html").text
    assert [form for form in GRAMMAR if form not in formulas] == []


def test_every_environment_variable_is_in_the_reference(site: Path) -> None:
    page = Text(site / "reference" / "environment.html")
    read = re.compile(r"environ(?:\.\w+)?[(\[]\s*\"([A-Z_]+)\"|\b(MEGATRON_EXT_[A-Z_]*[A-Z])\b")
    files = [ROOT / "setup.py", *(ROOT / "megatron_ext").rglob("*.py")]
    names = {a or b for file in files for a, b in read.findall(file.read_text())}
    assert {"MEGATRON_EXT_KERNEL", "MEGATRON_EXT_BUILD_CUDA", "CUDA_HOME"} <= names
    assert {name for name in names if name not in page.text} == set()


def described(schema: Any) -> Iterator[str]:
    """Every key and description of a schema, at any depth."""
    if isinstance(schema, dict):
        yield from schema.get("properties", ())
        if isinstance(text := schema.get("description"), str):
            yield text
        for inner in schema.values():
            yield from described(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from described(inner)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda p: p.name.split(".")[0])
def test_every_schema_is_in_the_reference_and_can_be_downloaded(schema: Path, site: Path) -> None:
    page = Text(site / "reference" / "schemas.html")
    text = page.text + Text(site / "reference" / "policy.html").text
    said = list(described(json.loads(schema.read_text())))
    assert len(said) > 10
    for words in said:
        assert " ".join(words.replace("`", "").split()) in text
    (link,) = (link for link in page.links if link.endswith(f"/{schema.name}"))
    assert (site / "reference" / link).read_bytes() == schema.read_bytes()


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    page = Text(site / "reference" / "api.html")
    public = {f"megatron_ext.{name}" for name in megatron_ext.__all__ if name != "__version__"}
    assert public - page.ids == set()


def test_what_is_leaned_on_is_told(site: Path) -> None:
    page = Text(site / "how-it-gets-in.html")
    before, after = page.text.split("Called or overridden", 1)
    for name in CONTRACT:
        where = before if name.rebound else after
        assert f"{name.module}.{name.attribute}" in where
    versions = Text(site / "compatibility.html").text
    assert f"megatron-core, tested {', '.join(TESTED)} " in versions
    assert "--use-megatron-fsdp" in versions
