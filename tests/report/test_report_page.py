"""The page of a resume report: complete, escaped, without anything from elsewhere."""

from __future__ import annotations

import html
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.base.text import printable
from megatron_ext.checkpoint.state import SavedOptimizer
from megatron_ext.cli import main
from megatron_ext.errors import PlanError
from megatron_ext.plan.decisions import Circumstances
from megatron_ext.plan.hyperparameters import plan_resume
from megatron_ext.plan.resized import ResizedParameter
from megatron_ext.policy.counters import Counters
from megatron_ext.policy.phase import decide
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.policy.presets import Preset
from megatron_ext.report import files
from megatron_ext.report.model import MomentReport, RuleReport
from megatron_ext.report.page import html_page
from megatron_ext.report.plots import Plots, _moments_figure, curves_of, draw
from megatron_ext.report.resume_report import ResumeReport
from megatron_ext.report.scalars import scalars
from tests.support.groups import group
from tests.support.reports import CURRENT, LOADED, SAVED, optimizer_report, scheduler_section

VOID = {"meta", "br", "hr", "img", "input", "link", "col"}

POLICY = ResumePolicy(preset=Preset("gradient-scale", (2.0,)), step=7, phase="cool-down")
MOMENTS = MomentReport(
    rules=(
        RuleReport("'*.bias'", "reset", "fill 0.5", 1600, ("layers.0.bias", "layers.1.bias")),
        RuleReport("preset gradient-scale 2", "scale 2", "scale 4", 624),
    ),
    rms={"exp_avg": (None, 0.125), "exp_avg_sq": (float("inf"), 0.5)},
    changed={"exp_avg": 12, "exp_avg_sq": 16},
    nonfinite={"exp_avg": 0, "exp_avg_sq": 3},
    unread={"exp_avg": 64000},
    warnings=("1 of 2 rules match no parameter",),
)


def report(policy: ResumePolicy = POLICY) -> ResumeReport:
    """A transition with all there is to say, and an optimizer that is kept."""
    phase = decide(policy, None, "phase1@10#00ab")
    saved = SavedOptimizer(SAVED, 100)
    plan = plan_resume(policy, saved, CURRENT, Circumstances(clip_grad=1.0), phase)
    first = replace(
        optimizer_report(),
        loaded=replace(LOADED, elements={**LOADED.elements, "exp_avg": 64640}),
        plan=plan,
        moments=MOMENTS,
        notes=("3 elements were not finite",),
        loss_scale=(1024.0, 65536.0),
        resized=(ResizedParameter("embedding.weight", 64, 96),),
    )
    before = Counters(10, 80, 0, 40, 80)
    counters = (before, replace(before, iteration=2, num_steps=16))
    environment = {"python": "3.12.1", "torch": "2.15.0", "ranks": 2, "time": "2026-01-02T03:04"}
    found = ResumeReport(
        "0.19.2",
        [replace(first, parameters=(3, 4)), optimizer_report(step=None)],
        counters=counters,
        environment=environment,
    )
    found.scheduler = {**scheduler_section(), "num_steps": 16}
    return found


def document(policy: ResumePolicy = POLICY) -> dict[str, Any]:
    return json.loads(json.dumps(report(policy).to_json()))


class Parsed(HTMLParser):
    """What a page consists of.

    Every element has to be closed where it was opened; the text knows whether it is folded.
    """

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.pieces: list[tuple[str, bool]] = []
        self.declared = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_decl(self, decl: str) -> None:
        self.declared = decl

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self._open, tag
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "svg"} & set(self._open):
            self.pieces.append((data.strip(), "details" in self._open))

    @property
    def text(self) -> str:
        return "\n".join(piece for piece, _ in self.pieces)

    @property
    def folded(self) -> str:
        return "\n".join(piece for piece, inside in self.pieces if inside)

    @property
    def open(self) -> str:
        return "\n".join(piece for piece, inside in self.pieces if not inside)


def texts_of(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text of a document, but for the policy, which is shown as JSON."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key != "policy":
                yield from texts_of(inner, (*path, key))
    elif isinstance(value, list):
        for inner in value:
            yield from texts_of(inner, path)
    elif isinstance(value, str):
        yield path, value


#: Said in other words on the page.
REWORDED = {("phase", "state")}


def test_every_text_of_the_report_is_on_the_page() -> None:
    found = document()
    page = Parsed(html_page(found))
    texts = [text for path, text in texts_of(found) if path not in REWORDED]
    assert len(texts) > 150
    assert [t for t in texts if printable(t) not in page.text] == []
    for line in json.dumps(found["policy"], indent=2).splitlines():
        assert line.strip() in page.folded
    keys = {key for o in found["optimizers"] for g in o["groups"] for key in g["keys"]}
    assert [key for key in keys | set(found["scheduler"]["values"]) if key not in page.text] == []


def test_the_first_lines_say_what_happened() -> None:
    page = Parsed(html_page(document()))
    above = page.text[: page.text.index("Warnings and notes")]
    assert "Transition applied: phase cool-down" in above
    assert "Loaded phase1@10#00ab. A phase begins here with: preset gradient-scale 2" in above
    assert (
        "The run continues at iteration 2, sample 80, with learning rate 9.5e-05 to 0.00095 in the "
        "first step (max_lr 0.003 -> 0.001)." in above
    )
    warnings = document()["optimizers"][0]["warnings"]
    assert f"Moments were changed by rules. {len(warnings)} warnings: they are below." in above
    assert len(warnings) > 2


def test_a_resume_that_keeps_everything_says_so() -> None:
    plain = ResumeReport("0.19.2", [optimizer_report()]).to_json()
    page = Parsed(html_page(plain))
    assert "All moments are the checkpoint's. No warnings." in page.text
    assert "The moments are kept as they are in the checkpoint." in page.text
    assert "Warnings and notes" not in page.text


def test_a_continued_phase_is_no_transition() -> None:
    begun = decide(POLICY, None, "phase1@10#00ab")
    again = decide(POLICY, begun.mark, "phase2@14#77")
    one = replace(optimizer_report(), plan=replace(optimizer_report().plan, phase=again))
    page = Parsed(html_page(ResumeReport("0.19.2", [one]).to_json()))
    assert "Continued: phase cool-down" in page.text
    assert "Loaded phase2@14#77. The phase that started from phase1@10#00ab continues" in page.text


def test_changed_keys_stand_out_and_the_others_are_folded() -> None:
    one = ResumeReport("0.19.2", [optimizer_report(current=CURRENT[:1])]).to_json()
    page = Parsed(html_page(one))
    # max_lr is new, eps is kept by a flag, all else is as it was by default.
    assert "--selective-keep-hyperparameters eps" in page.open
    assert [k for k in ("betas", "wd_mult", "min_lr", "foreach") if k in page.open] == []
    assert [k for k in ("betas", "wd_mult", "min_lr", "foreach") if k not in page.folded] == []
    rows = re.findall(r'<tr class="changed">.*?</tr>', html_page(one), re.DOTALL)
    assert len(rows) == 1
    assert "max_lr" in rows[0]
    assert "0.003" in rows[0]
    assert "0.001" in rows[0]
    by_scheduler = ["lr", "0.002", "0", "set by the scheduler", "arguments", "default"]
    assert by_scheduler in rows_of(html_page(one))


def rows_of(page: str) -> list[list[str]]:
    """The cells of all tables, in order."""
    return [
        [
            " ".join(html.unescape(re.sub(r"<[^>]*>", "", cell)).split())
            for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        ]
        for row in re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.DOTALL)
    ]


def test_numbers_are_those_of_the_report() -> None:
    page = html_page(document())
    rows = rows_of(page)
    for row in (
        ["iteration changed", "10", "2"],
        ["consumed samples (data position)", "80", "80"],
        ["schedule position, in samples changed", "80", "16"],
        ["optimizer 0, param_group 1", "9.5e-05", "0"],
        ["max_lr changed", "0.003", "0.001", "0.001", "arguments"],
        ["start_wd", "0.1", "0.2", "0.1", "checkpoint"],
        ["last iteration", "none", "60", "60", "arguments"],
        ["exp_avg changed", "not read", "0.125", "12", "0", "64,000"],
        ["exp_avg_sq changed", "inf", "0.5", "16", "3", "0"],
        ["step changed", "100", "7", "from the policy"],
        ["loss scale changed", "1024", "65536", "grad scaler"],
        ["embedding.weight changed", "64", "96", "32", "0"],
        ["master weights", "4", "640"],
    ):
        assert row in rows
    (rule,) = (row for row in rows if row[0] == "'*.bias' changed")
    assert rule[1:] == ["reset", "fill 0.5", "1,600", "layers.0.bias, layers.1.bias"]
    (preset,) = (row for row in rows if row[0].startswith("preset gradient-scale 2 "))
    assert preset[-1] == "all that no rule names"
    assert "exp_avg: 64,000 elements, since they are overwritten" in Parsed(page).text


# --- what is not trusted

NAMES = {
    "script": "<script>alert(1)</script>",
    "attribute": '"><img src=x onerror=alert(1)>',
    "single": "' onmouseover='alert(1)",
    "comment": "--><!-- </style></pre></details>",
    "entity": "&lt;b&gt; &amp;amp;",
    "template": "{{ 7 * 7 }}{% raw %}{# #}",
    "formula": "$x$ $\\frac{1}{2}$ $unbalanced",
    "control": "a\x1b[31mb\x00c\r\nd\u202ee\u2028f",
    "surrogate": "a\ud800b",
    "url": "javascript:alert(1)",
}


def renamed(value: Any, name: str, path: tuple[str, ...] = ()) -> Any:
    """The document with a name in the place of each text that does not come from a fixed list."""
    fixed = {"schema", "state"}
    if isinstance(value, dict):
        inside_keys = path[-1:] in (("keys",), ("values",))
        out = {}
        for i, (key, inner) in enumerate(value.items()):
            keep = not inside_keys or key in ("max_lr", "min_lr", "lr_decay_steps", "betas", "lr")
            new = key if keep else f"{name}{i}"
            fix = key == "policy" or (key in fixed and isinstance(inner, str))
            out[new] = inner if fix else renamed(inner, name, (*path, key))
        return out
    if isinstance(value, list):
        return [renamed(inner, name, path) for inner in value]
    return name if isinstance(value, str) and value else value


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_is_text_wherever_it_stands(name: str) -> None:
    benign = Parsed(html_page(renamed(document(), "name")))
    found = renamed(document(), name)
    page = html_page(found)
    parsed = Parsed(page)
    assert parsed.tags == benign.tags
    assert parsed.attributes == benign.attributes
    assert parsed.text.count(printable(name)) == benign.text.count("name") - _own(benign)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e\u2028\ud800-\udfff]", page)
    page.encode("utf-8")


def _own(benign: Parsed) -> int:
    """How often the page's own words hold the benign name."""
    return Parsed(html_page(renamed(document(), "@@"))).text.count("name")


def test_a_name_in_the_policy_is_text_too() -> None:
    found = document()
    found["policy"] = {"phase": '</pre><script>"\ud800'}
    page = Parsed(html_page(found))
    assert "script" not in page.tags
    assert "</pre><script>" in page.folded


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = html_page(document(), draw(document()))
    assert page.count("<svg") == 2
    assert "<!--" not in page
    assert "<metadata" not in page
    parsed = Parsed(page)
    assert parsed.declared == "doctype html"
    assert not re.search(r"https?:|//[a-z]|@import|\burl\((?!#)", page)
    forbidden = {"script", "link", "iframe", "object", "embed", "base", "form", "img", "image"}
    assert forbidden & set(parsed.tags) == set()
    names = {name for name, _ in parsed.attributes}
    assert [n for n in names if n.startswith("on") or n in ("src", "srcset", "action")] == []
    links = [v for n, v in parsed.attributes if n in ("href", "xlink:href")]
    assert [v for v in links if not str(v).startswith("#")] == []
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in parsed.attributes
    assert parsed.attributes.index(("http-equiv", "Content-Security-Policy")) < 10
    ids = [v for n, v in parsed.attributes if n == "id"]
    assert len(ids) == len(set(ids)) > 10
    assert {v[1:] for v in map(str, links)} <= set(ids)


DOCUMENTS = {
    "full": document,
    "nothing": lambda: ResumeReport("0.19.2").to_json(),
    "live": lambda: ResumeReport("", [optimizer_report()]).to_json(),
    "no groups": lambda: ResumeReport("0", [optimizer_report(current=())]).to_json(),
    "not adam": lambda: ResumeReport(
        "0", [replace(optimizer_report(), loaded=replace(LOADED, tensors={}, elements={}))]
    ).to_json(),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_page_is_well_formed_and_always_the_same(name: str) -> None:
    found = DOCUMENTS[name]()
    page = html_page(found, draw(found))
    assert {"html", "head", "title", "body", "main"} <= set(Parsed(page).tags)
    again = json.loads(json.dumps(found))
    assert html_page(again, draw(again)) == page


def test_a_report_of_an_earlier_version_has_a_page() -> None:
    old = document()
    for rule in old["optimizers"][0]["moments"]["rules"]:
        del rule["examples"]
    del old["environment"], old["phase"]["checkpoint"]
    del old["scheduler"]["train_iters"], old["scheduler"]["global_batch_size"]
    plots = draw(old)
    page = Parsed(html_page(old, plots))
    assert len(plots.absent) == 1
    assert "no plot of the schedule: the batch size ramps up, or the run's length" in page.text


# --- plots


def cosine(position: float, low: float, high: float, begin: int = 24, end: int = 480) -> float:
    if position <= begin:
        return high * position / begin
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * (position - begin) / (end - begin)))


def test_the_curves_are_those_of_both_schedules() -> None:
    """Against the schedule's formula: 24 samples of warm-up, cosine to 480, batches of 8."""
    curves = curves_of(document())
    old = [c for c in curves if c.phase == 1]
    new = [c for c in curves if c.phase == 2]
    assert [(c.optimizer, c.group) for c in old] == [(0, 0), (1, 0)]
    assert [(c.optimizer, c.group) for c in new] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert (old[0].iterations[0], old[0].iterations[-1]) == (0, 10)
    assert old[0].samples == tuple(8 * i for i in old[0].iterations)
    assert (new[0].iterations[0], new[0].iterations[-1]) == (2, 60)
    assert new[0].samples == tuple(16 + 8 * (i - 2) for i in new[0].iterations)
    # Group 0 has bounds of its own: 3e-3 to 3e-4 in the checkpoint, 1e-3 to 3e-4 now.
    assert old[0].lr == pytest.approx([cosine(s, 3e-4, 3e-3) for s in old[0].samples])
    assert new[0].lr == pytest.approx([cosine(s, 3e-4, 1e-3) for s in new[0].samples])
    assert set(new[0].weight_decay) == {0.1}


def test_a_group_goes_on_in_its_own_colour() -> None:
    """The old curve has the number of the current group, whatever stands before it."""
    added, kept = group(is_expert_parallel=True), group()
    one = optimizer_report(current=(added, kept))
    assert [g.saved_index for g in one.plan.groups] == [None, 0]
    full = report()
    full.optimizers = [one]
    curves = curves_of(full.to_json())
    assert [(c.phase, c.group) for c in curves] == [(1, 1), (2, 0), (2, 1)]


def test_what_has_no_schedule_says_why() -> None:
    def why(**changes: Any) -> str:
        found = document()
        found["scheduler"].update(changes)
        with pytest.raises(PlanError) as e:
            curves_of(found)
        return str(e.value)

    assert "ramps up" in why(global_batch_size={"checkpoint": 8, "value": None})
    assert "not known" in why(train_iters=None)
    assert "ends at iteration 2" in why(train_iters=2)
    bare = ResumeReport("0.19.2", [optimizer_report()]).to_json()
    plots = draw(bare)
    assert (plots.schedule, plots.moments) == ("", "")
    assert plots.absent == (
        "no plot of the schedule: Megatron's training loop and scheduler have not loaded the "
        "checkpoint",
    )


def test_without_the_old_schedule_the_new_one_is_drawn() -> None:
    found = document()
    for value in found["scheduler"]["values"].values():
        value["checkpoint"] = None
    assert {c.phase for c in curves_of(found)} == {2}
    # Of a checkpoint whose values Megatron's scheduler would refuse.
    found = document()
    found["scheduler"]["values"]["lr_decay_style"]["checkpoint"] = "no such style"
    assert {c.phase for c in curves_of(found)} == {2}


def test_the_bars_are_the_moments() -> None:
    states = [(0, document()["optimizers"][0]["moments"]["state"])]
    first, second = _moments_figure(states).axes
    assert [p.get_width() for p in first.patches] == [0.0, 0.125]
    assert [t.get_text() for t in first.texts] == ["not read", "0.125"]
    assert [p.get_width() for p in second.patches] == [0.0, 0.5]
    assert [t.get_text() for t in second.texts] == ["inf", "0.5"]
    assert first.get_xlim()[1] > 0.125


def test_a_figure_that_fails_is_told_and_the_other_one_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("megatron_ext.report.figures.curves_figure", fail)
    plots = draw(document())
    assert plots.schedule == ""
    assert plots.moments.startswith("<svg")
    assert plots.absent == ("no plot of the schedule: RuntimeError: no font",)


def test_the_page_says_when_the_resume_was() -> None:
    page = html_page(document())
    assert "<title>Transition applied: phase cool-down - resume report of 2026-01-02T03:04<" in page
    assert (
        Parsed(page).open.splitlines()[1:].index("megatron_ext resume report of 2026-01-02T03:04")
    )
    unknown = {**document(), "environment": None}
    assert "resume report of" not in Parsed(html_page(unknown)).text


# --- the files of a run


def test_an_older_page_does_not_stand_beside_a_newer_report(tmp_path: Path) -> None:
    stems = ("resume-report", "transition-report-10")
    others = ["transition-report-4.html", "notes.html"]
    for name in [*(f"{stem}.html" for stem in stems), *others]:
        (tmp_path / name).write_text("an older page")
    written = files.write(report(), tmp_path)
    names = {f"{stem}{suffix}" for stem in stems for suffix in (".json", ".txt")}
    assert {p.name for p in tmp_path.iterdir()} == {*names, *others}
    assert {f.name for f in written} == names
    assert written[0].name == "resume-report.json"


def test_the_line_for_the_log_names_the_files_and_the_command(tmp_path: Path) -> None:
    directory = tmp_path / "of phase 2"
    assert files.writer(directory)(report()) == (
        f"megatron_ext: resume report written to {directory}/resume-report.json, "
        "resume-report.txt, transition-report-10.json, transition-report-10.txt; "
        f"page: python -m megatron_ext report '{directory}'"
    )
    assert (directory / "resume-report.json").is_file()


def test_the_text_is_the_log(tmp_path: Path) -> None:
    one = report()
    files.write(one, tmp_path)
    text = (tmp_path / "resume-report.txt").read_text().splitlines()
    assert text == [*one.lines(), *one.scheduler_lines()]
    assert "first resumed step, optimizer 0 group 1: learning rate 9.500000E-05" in text[-1]


def test_the_text_escapes_what_is_not_printable(tmp_path: Path) -> None:
    one = replace(optimizer_report(), notes=("a\x1b[31m\ud800",))
    files.write(ResumeReport("0.19.2", [one]), tmp_path)
    assert " > WARNING: a\\x1b[31m\\ud800\n" in (tmp_path / "resume-report.txt").read_text()


# --- python -m megatron_ext report


def test_the_command_makes_the_pages_of_a_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files.write(report(), tmp_path)
    kept = ResumeReport("0.19.2", [optimizer_report()])
    files.write(kept, tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    absent = (
        "no plot of the schedule: Megatron's training loop and scheduler have not loaded the "
        "checkpoint"
    )
    assert capsys.readouterr().out.splitlines() == [
        f"resume-report.html: {absent}",
        f"{tmp_path}/resume-report.html: written from resume-report.json",
        f"{tmp_path}/transition-report-10.html: written from transition-report-10.json",
    ]
    for name, of in (("resume-report", kept), ("transition-report-10", report())):
        found = json.loads(json.dumps(of.to_json()))
        page = html_page(found, draw(found))
        assert (tmp_path / f"{name}.html").read_text() == page + "\n"


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_package_that_is_missing_is_named_with_the_remedy(
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files.write(report(), tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["report", str(tmp_path)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(
        f"error: the page of a resume report needs the package {package}, which cannot be imported:"
    )
    assert error.endswith("Install it with pip install 'megatron_ext[report]'")
    assert list(tmp_path.glob("*.html")) == []


FOREIGN = {
    "another schema": json.dumps({**document(), "schema": "megatron_ext/resume-report/9"}),
    "a list": "[]",
    "not JSON": "{",
    "not text": "\udcff",
    "deep": "[" * 100_000,
    "cut": json.dumps({"schema": "megatron_ext/resume-report/1"}),
    "of other types": json.dumps({**document(), "optimizers": 3}),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_is_no_report_is_refused(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "resume-report.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"error: {file} is no resume report of this version: " in error
    assert "Give a directory that --selective-report of this version wrote to" in error
    assert list(tmp_path.glob("*.html")) == []


@pytest.mark.parametrize("what", ["an empty directory", "nothing", "a file"])
def test_a_directory_without_reports_is_refused(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "reports"
    if what == "an empty directory":
        directory.mkdir()
    elif what == "a file":
        directory.write_text(json.dumps(document()))
    assert main(["report", str(directory)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {directory} holds no resume report: found neither ")
    assert error.endswith("Give the directory that --selective-report named")


# --- scalars


def test_the_scalars_are_the_reports_numbers() -> None:
    found = scalars(document())
    expected = {
        "counter/iteration": 2,
        "counter/consumed_train_samples": 80,
        "counter/num_steps": 16,
        "optimizer_0/step": 7,
        "optimizer_0/loss_scale": 65536,
        "optimizer_0/clip_grad": 2,
        "optimizer_0/exp_avg/loaded_elements": 640,
        "optimizer_0/exp_avg/rms_after": 0.125,
        "optimizer_0/exp_avg/changed": 12,
        "optimizer_0/exp_avg/unread": 64000,
        "optimizer_0/exp_avg_sq/rms_before": math.inf,
        "optimizer_0/exp_avg_sq/nonfinite": 3,
        "optimizer_0/group_0/lr": 9.5e-4,
        "optimizer_0/group_1/lr": 9.5e-5,
        "optimizer_0/group_1/weight_decay": 0,
        "optimizer_0/group_0/max_lr": 1e-3,
        "optimizer_0/group_0/min_lr": 3e-4,
        "optimizer_0/group_0/eps": 2e-6,
        "optimizer_0/group_0/beta1": 0.9,
        "optimizer_0/group_0/beta2": 0.95,
        "optimizer_1/group_0/eps": 1e-8,
        "warnings": len(document()["optimizers"][0]["warnings"]),
    }
    for name, value in expected.items():
        assert found[f"megatron_ext/{name}"] == pytest.approx(value), name
    assert "megatron_ext/optimizer_0/exp_avg/rms_before" not in found  # not read
    assert "megatron_ext/optimizer_1/step" not in found  # no step was taken
    assert all(name.startswith("megatron_ext/") for name in found)


def test_an_empty_report_has_a_number_of_warnings() -> None:
    assert scalars(ResumeReport("0.19.2").to_json()) == {"megatron_ext/warnings": 0.0}


def test_plots_are_taken_as_they_are_and_reasons_are_text() -> None:
    page = html_page(document(), Plots("<svg></svg>", absent=("<b>no</b>",)))
    assert "<figure><svg></svg><figcaption>" in page
    assert "&lt;b&gt;no&lt;/b&gt;" in page
