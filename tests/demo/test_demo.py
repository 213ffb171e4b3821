"""The demo's pieces; the whole of it is `make demo`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_ext.demo import __main__ as demo
from megatron_ext.demo import plot, table
from megatron_ext.demo.runs import Point, Run, first_error, parse

LOG = """
> building train, validation, and test datasets for GPT ...
 [2026-11-24 00:48:44.404960] iteration        5/       8 | consumed samples:           40 | elapsed time per iteration (ms): 93.5 | learning rate: 2.750000E-05 | global batch size:     8 | lm loss: 4.809665E+00 | loss scale: 1.0 | grad norm: 1.041 |
 [2026-11-24 00:48:44.457220] iteration        6/       8 | consumed samples:           48 | elapsed time per iteration (ms): 72.0 | learning rate: 2.700000E-05 | global batch size:     8 | lm loss: 4.824479E+00 | loss scale: 1.0 | grad norm: 0.998 |
"""  # noqa: E501

FAILED = """
[rank0]: Traceback (most recent call last):
[rank0]: KeyError: (None, 3e-05, 2e-05, None, None, 1.0, 1.0, False, False)
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
"""


def _run(points: list[Point], error: str | None = None, command: list[str] | None = None) -> Run:
    return Run(
        "a run", command or [], int(error is not None), 1.0, Path("x.log"), points, error, None
    )


def test_a_log_is_read_as_megatron_writes_it() -> None:
    assert parse(LOG) == [Point(5, 2.75e-5, 4.809665), Point(6, 2.7e-5, 4.824479)]
    assert parse("nothing was trained") == []


def test_the_first_error_is_the_ranks_own() -> None:
    assert first_error(FAILED) == (
        "KeyError: (None, 3e-05, 2e-05, None, None, 1.0, 1.0, False, False)"
    )
    assert first_error(LOG) is None


def test_the_table_shows_what_the_runs_logged() -> None:
    points = [Point(i, 1e-4 * i, 3.0 - i / 10) for i in range(1, 13)]
    rows = table.rows(
        [_run(points), _run([], "KeyError: x"), _run(points, None, ["--selective-preset", "reset"])]
    )
    assert rows[1] == ("a run", "loaded", "1.000e-04", "2.9000", "2.0000", "1.8000")
    assert rows[2] == ("a run", "failed: KeyError: x", "-", "-", "-", "-")
    assert rows[3][1] == "moments reset"
    assert table.markdown([_run(points)]).count("\n| ") == 2


def test_without_matplotlib_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        demo.main()
    assert "pip install 'megatron_ext[report]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_directory_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "thesis.tex"
    mine.write_text("years of work")
    with pytest.raises(SystemExit, match="--out"):
        demo._empty(tmp_path)
    assert mine.read_text() == "years of work"


def test_an_earlier_output_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "table.md").write_text("old")
    demo._empty(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["logs"]


def test_a_column_shows_how_far_a_loss_is_from_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    first = _run([Point(i, 3e-3, 2.5) for i in range(1, 101)])
    old = _run([Point(i, 3e-3, 2.75) for i in range(101, 121)])
    ours = _run([Point(i, 1e-3, 2.5) for i in range(101, 121)])
    plot.curves(first, {"one": (old, ours), "two": (ours, ours)}, tmp_path / "x.png")
    (picture,) = drawn
    top, _, bottom, same = picture.axes
    assert [t.get_text() for t in top.texts] == ["0.003", "0.001"]
    assert bottom.lines[0].get_xdata().tolist() == list(range(101, 121))
    assert bottom.lines[0].get_ydata().tolist() == [0.25] * 20
    assert bottom.lines[1].get_ydata().tolist() == [0.0] * 20
    assert same.lines[0].get_ydata().tolist() == [0.0] * 20
    assert top.get_xlim() == (51, 120)
