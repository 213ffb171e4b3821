"""Where a phase loads from: where it starts, or its own directory once it holds a checkpoint."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from megatron_ext.checkpoint import directories
from megatron_ext.checkpoint.directories import NON_PERSISTENT, Directories, choose, newest
from megatron_ext.errors import CheckpointError, PolicyError
from megatron_ext.hooks.directories import choose_directories
from megatron_ext.policy import flags, from_flags
from tests.support.checkpoints import checkpoint


@pytest.fixture
def phase_1(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "phase1", 10)


def test_without_a_start_the_directories_are_megatrons() -> None:
    assert choose("a", "b", None) == Directories(Path("a"), Path("b"), "load", None)
    assert choose(None, None, None) == Directories(None, None, "load", None)
    assert choose("msc://a/b", None, None, "c").where == "load"


@pytest.mark.parametrize("given", [("load", "save"), ("load",), ("save",), ()])
def test_a_phase_begins_where_it_starts_and_goes_on_in_its_own(
    given: tuple[str, ...], phase_1: Path, tmp_path: Path
) -> None:
    own = tmp_path / "phase2"
    load, save = (str(own) if name in given else None for name in ("load", "save"))
    saved = own if "save" in given else None
    begins = Directories(phase_1, saved, "start", phase_1)
    assert choose(load, save, str(phase_1)) == begins
    own.mkdir()
    (own / "iter_0000012").mkdir()  # a save that was not finished
    assert choose(load, save, str(phase_1)) == begins
    checkpoint(own, 14)
    goes_on = Directories(own, saved, "own", phase_1) if given else begins
    assert choose(load, save, str(phase_1)) == goes_on


def test_a_non_persistent_checkpoint_is_the_phases_own(phase_1: Path, tmp_path: Path) -> None:
    own = tmp_path / "phase2"
    checkpoint(own / NON_PERSISTENT, 12)
    assert choose(str(own), str(own), str(phase_1)).where == "own"


def test_one_directory_may_be_written_in_two_ways(phase_1: Path, tmp_path: Path) -> None:
    own = checkpoint(tmp_path / "phase2", 12)
    (tmp_path / "link").symlink_to(own)
    assert choose(str(own), f"{tmp_path}/link/", str(phase_1)).where == "own"
    with pytest.raises(PolicyError, match="is also the directory of --load or --save"):
        choose(None, f"{own}/../link", str(own))


@pytest.mark.parametrize(
    ("load", "save", "start", "elsewhere", "words"),
    [
        ("a", "b", "c", None, ["--selective-from c", "--load a", "--save b", "one directory"]),
        ("a", "a", "a", None, ["--selective-from a", "another one", "leave --selective-from out"]),
        (None, "a", "./a", None, ["--selective-from ./a is also the directory"]),
        (
            *("a", "a", "c", "d"),
            ["--selective-from c", "--non-persistent-global-ckpt-dir d", "Leave the second"],
        ),
        ("a", "a", "msc://c", None, ["msc://c is in a remote storage", "of a file system"]),
        ("msc://a", "msc://a", "c", None, ["msc://a is in a remote storage"]),
    ],
)
def test_directories_that_contradict_each_other_are_refused_with_the_way_out(
    load: str | None, save: str | None, start: str, elsewhere: str | None, words: list[str]
) -> None:
    with pytest.raises(PolicyError) as caught:
        choose(load, save, start, elsewhere)
    for word in words:
        assert word in str(caught.value)


def test_a_file_in_place_of_a_directory_holds_nothing(phase_1: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert choose(str(file), str(file), str(phase_1)).where == "start"
    assert newest(file) is None


def test_a_directory_that_may_not_be_read_is_an_error_of_the_package(
    phase_1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> bool:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(directories, "open_checkpoint", refuse)
        with pytest.raises(CheckpointError, match=re.escape(f"{phase_1} cannot be looked into")):
            newest(phase_1)
    monkeypatch.setattr(directories, "holds_checkpoint", refuse)
    for call in (
        lambda: newest(phase_1),
        lambda: choose(str(tmp_path / "own"), None, str(phase_1)),
    ):
        with pytest.raises(CheckpointError, match=r"PermissionError.*Correct its permissions"):
            call()


# --- which checkpoint of a directory


@pytest.mark.parametrize(
    ("persistent", "other", "looks", "expected"),
    [
        (10, None, True, 10),
        (10, 14, True, 14),
        (10, 14, False, 10),
        (14, 10, True, 14),
        (10, 10, True, 10),
        (None, 14, True, 14),
        (None, 14, False, None),
        (None, None, True, None),
    ],
)
def test_the_newest_is_the_one_that_megatron_loads(
    tmp_path: Path, persistent: int | None, other: int | None, looks: bool, expected: int | None
) -> None:
    for root, iteration in ((tmp_path, persistent), (tmp_path / NON_PERSISTENT, other)):
        if iteration is not None:
            checkpoint(root, iteration)
    found = newest(tmp_path, non_persistent=tmp_path / NON_PERSISTENT if looks else None)
    assert (None if found is None else found.iteration) == expected
    if persistent == other == 10:
        assert found is not None
        assert found.root == tmp_path / NON_PERSISTENT


def test_an_iteration_that_is_named_is_taken_unless_a_newer_one_is_not_persistent(
    tmp_path: Path,
) -> None:
    for iteration in (10, 12):
        checkpoint(tmp_path, iteration)
    checkpoint(tmp_path / NON_PERSISTENT, 11)
    named = [newest(tmp_path, i, tmp_path / NON_PERSISTENT) for i in (10, 12)]
    assert [None if c is None else c.iteration for c in named] == [11, 12]
    found = newest(tmp_path, 10)
    assert found is not None
    assert found.iteration == 10
    with pytest.raises(CheckpointError, match="iter_0000011 does not exist"):
        newest(tmp_path, 11)


# --- while the arguments are parsed


def parser(*, megatrons: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    if megatrons:
        for flag in ("--load", "--save", "--non-persistent-global-ckpt-dir"):
            parser.add_argument(flag)
        parser.add_argument("--ckpt-step", type=int)
    choose_directories(flags.add_flags(parser))
    parser.set_defaults(optimizer_class="a.B")
    return parser


def test_the_directory_to_load_is_chosen_while_the_arguments_are_parsed(
    phase_1: Path, tmp_path: Path
) -> None:
    own = tmp_path / "phase2"
    words = f"--selective-from {phase_1} --load {own} --save {own}".split()
    first = parser().parse_args(words)
    assert (first.load, first.save, first.selective_where) == (str(phase_1), str(own), "start")
    assert from_flags.request_from_args(first).where == "start"
    checkpoint(own, 12)
    again = parser().parse_args(words)
    assert (again.load, again.save, again.selective_where) == (str(own), str(own), "own")
    assert from_flags.request_from_args(again).where == "own"
    plain = parser().parse_args(["--load", str(own)])
    assert plain.load == str(own)
    assert not hasattr(plain, "selective_where")
    assert from_flags.request_from_args(plain).where == "load"


def test_a_parser_that_is_prepared_twice_chooses_once(phase_1: Path, tmp_path: Path) -> None:
    """The launcher prepares Megatron's parser, and then the script's `add_arguments` does."""
    twice = choose_directories(parser())
    own = tmp_path / "phase2"
    found = twice.parse_args(f"--selective-from {phase_1} --load {own} --save {own}".split())
    assert (found.load, found.selective_where) == (str(phase_1), "start")


def test_a_parser_without_megatrons_flags_is_served_too(phase_1: Path) -> None:
    found = parser(megatrons=False).parse_args(["--selective-from", str(phase_1)])
    assert (found.load, found.selective_where) == (str(phase_1), "start")


def test_an_iteration_that_is_named_is_one_of_the_start(phase_1: Path, tmp_path: Path) -> None:
    """The same command line restarts the phase: from its newest checkpoint."""
    own = tmp_path / "phase2"
    words = f"--selective-from {phase_1} --load {own} --save {own} --ckpt-step 10".split()
    assert parser().parse_args(words).ckpt_step == 10
    checkpoint(own, 10)
    checkpoint(own, 12)
    assert parser().parse_args(words).ckpt_step is None
    assert parser().parse_args(f"--load {own} --ckpt-step 10".split()).ckpt_step == 10


@pytest.mark.parametrize("more", ["--load a --save b", "--non-persistent-global-ckpt-dir c"])
def test_a_contradiction_is_left_to_the_preflight(phase_1: Path, more: str) -> None:
    found = parser().parse_args(f"--selective-from {phase_1} {more}".split())
    assert found.load == ("a" if "--load" in more else None)
    assert not hasattr(found, "selective_where")


def test_flags_without_the_class_are_refused_in_a_script_of_ones_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    without = parser()
    without.set_defaults(optimizer_class=None)
    with pytest.raises(SystemExit) as caught:
        without.parse_args("--selective-from a --load b --reset-iteration".split())
    assert caught.value.code == 2
    message = capsys.readouterr().err
    for word in (
        "--selective-from",
        "--reset-iteration",
        "--optimizer-class",
        "it would have no effect",
    ):
        assert word in message
    assert without.parse_args(["--load", "b"]).load == "b"


def test_a_forks_flag_of_the_same_name_is_not_ours_to_refuse() -> None:
    fork = argparse.ArgumentParser()
    fork.add_argument("--load")
    fork.add_argument("--save")
    fork.add_argument("--reset-iteration", action="store_true")
    choose_directories(flags.add_flags(fork))
    assert fork.parse_args(["--reset-iteration"]).reset_iteration
