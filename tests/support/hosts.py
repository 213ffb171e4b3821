"""Where Megatron is run, and the tests of each place; `docs/compatibility.md` has this table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """A program that calls Megatron.

    Args:
        name: Its name.
        version: The version that the tests install, or whose source was read.
        way_in: The lines that a user needs.
        tests: The tests that run it, or something with its order of imports and its calls.
        runs: Whether they run the host itself.
    """

    name: str
    version: str
    way_in: str
    tests: tuple[str, ...] = ()
    runs: bool = False


_LOOP = "tests/hooks/test_own_loops.py"
_LOADS = "tests/hooks/test_enable.py"

HOSTS = (
    Host(
        "Megatron's own loop, unmodified script",
        "the versions above",
        "`-m megatron_ext.launch`",
        ("tests/hooks/test_launch.py", "tests/hooks/test_which_megatron.py"),
        runs=True,
    ),
    Host(
        "a checkout of Megatron-LM",
        "any; main of 2026-08 by hand",
        "`-m megatron_ext.launch`",
        ("tests/hooks/test_which_megatron.py", "tests/hooks/test_two_phases.py"),
        runs=True,
    ),
    Host(
        "a script with Megatron's parser",
        "the versions above",
        "`megatron_ext.add_arguments`",
        ("tests/hooks/test_launch.py::test_other_ways_in",),
        runs=True,
    ),
    Host(
        "Megatron-Bridge",
        "0.6.2",
        "`megatron_ext.bridge.resume_with`",
        ("tests/bridge/test_resume_with.py",),
        runs=True,
    ),
    Host(
        "slime",
        "0.3.1",
        "`megatron_ext.enable`",
        (f"{_LOOP}::test_functions_that_were_bound_before_enable_resume",),
    ),
    Host(
        "miles",
        "2026-08",
        "`megatron_ext.enable`",
        (f"{_LOOP}::test_the_guard_is_in_the_optimizers_own_step",),
    ),
    Host(
        "verl",
        "0.10",
        "`megatron_ext.autoenable`",
        (f"{_LOADS}::test_a_scheduler_that_is_not_restored_is_said_with_its_learning_rate",),
    ),
    Host(
        "ms-swift",
        "4.5",
        "`megatron_ext.enable`",
        (f"{_LOADS}::test_a_builder_that_was_bound_before_resumes_as_stock_corrected_by_hand",),
    ),
    Host("NeMo-RL", "0.6", "`megatron_ext.enable`"),
    Host(
        "Primus",
        "26.5",
        "`megatron_ext.enable`",
        (f"{_LOOP}::test_megatrons_own_loop_takes_the_counters",),
    ),
    Host("MindSpeed-LLM", "core 0.12.1", "none: megatron-core is older than 0.16.1, and refused"),
)
