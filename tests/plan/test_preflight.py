"""Everything that is wrong with a resume, found before a model is built and told at once."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.directories import name_of
from megatron_ext.checkpoint.store import TRACKER
from megatron_ext.checkpoint.stored import open_checkpoint
from megatron_ext.errors import CheckpointError, HostError, MegatronExtError, PlanError, PolicyError
from megatron_ext.hooks import directories
from megatron_ext.plan import preflight
from megatron_ext.policy.counters import Counters
from megatron_ext.policy.flags import add_flags
from megatron_ext.policy.phase import Mark, digest_of, identity
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.policy.presets import Preset
from tests.support import inspected, specimens
from tests.support.checkpoints import DEFAULTS, checkpoint, checksums

RESET = ResumePolicy(preset=Preset("reset"))
CLASS = "--optimizer-class megatron_ext.SelectiveAdam"


def assert_nothing_found(args: argparse.Namespace) -> None:
    assert [str(e) for e in preflight.examine(args).errors] == []


@dataclass
class Place:
    """Directories of a case, and the command lines that name them."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name

    def parse(self, flags: str, **of_megatron: Any) -> argparse.Namespace:
        """Flags of this package, and Megatron's as attributes; ``{a}`` is a directory."""
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--load")
        parser.add_argument("--save")
        parser.add_argument("--ckpt-step", type=int)
        directories.choose_directories(add_flags(parser))
        words = f"{CLASS} {flags}".format_map(_Names(self.root)).split()
        return parser.parse_args(words, argparse.Namespace(**{**DEFAULTS, **of_megatron}))

    def check(self, flags: str, **of_megatron: Any) -> None:
        if (error := preflight.examine(self.parse(flags, **of_megatron)).error) is not None:
            raise error

    def assert_legal(self, flags: str, **of_megatron: Any) -> None:
        """Fails with the refusal where there is one."""
        assert_nothing_found(self.parse(flags, **of_megatron))

    def refusal(self, flags: str, **of_megatron: Any) -> MegatronExtError:
        with pytest.raises(MegatronExtError) as caught:
            self.check(flags, **of_megatron)
        return caught.value

    def source(self, root: Path, iteration: int | None = None) -> str:
        """The identity of a checkpoint, as the training loop finds it."""
        found = open_checkpoint(root, iteration)
        first = found.optimizers[0]
        return identity(name_of(root), found.iteration, found.args, first.groups, first.step)

    def begun(self, policy: ResumePolicy, start: Path, root: Path, iteration: int = 12) -> Path:
        """A checkpoint of a phase that was begun with a policy."""
        source, digest = self.source(start), digest_of(policy)
        mark = Mark(policy.phase, source, digest, done=policy.operations)
        return checkpoint(root, iteration, mark=mark)


class _Names(dict[str, Path]):
    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, name: str) -> Path:
        return self.root / name


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """With a checkpoint of phase 1 at iteration 10; the test has to leave all files as they are."""
    place = Place(tmp_path)
    checkpoint(place.one, 10)
    yield place
    for line in place.root.rglob("*"):
        assert "resume-report" not in line.name


@pytest.fixture
def unchanged(place: Place) -> Iterator[Callable[[], None]]:
    """Call it when the files are written: none of them may change until the test's end."""
    before: list[dict[str, str]] = []
    yield lambda: before.append(checksums(place.root))
    assert [checksums(place.root)] == before


# --- what is right

#: Megatron's flag of that name.
FROM_CHECKPOINT = {"use_checkpoint_opt_param_scheduler": True}

#: Flags and Megatron's arguments of runs that stock Megatron starts, and this package with it.
LEGAL: dict[str, tuple[str, dict[str, Any]]] = {
    "no directory": ("", {}),
    "no directory but a save": ("--save {new}", {}),
    "a resume": ("--load {one}", {}),
    "the same directory": ("--load {one} --save {one}", {}),
    "the same directory, empty at first": ("--load {new} --save {new}", {}),
    "an empty directory that is there": ("--load {empty} --save {empty}", {}),
    "exit on a missing checkpoint": ("--load {new}", {"exit_on_missing_checkpoint": True}),
    "a file in place of a directory": ("--load {file}", {}),
    "hyperparameters from a checkpoint that is not there yet": (
        "--load {new} --save {new} --selective-keep-hyperparameters eps",
        {},
    ),
    "weights alone": ("--load {new} --save {new}", {"pretrained_checkpoint": "somewhere"}),
    "an iteration by name": ("--load {one}", {"ckpt_step": 10}),
    "iteration 0, which stock takes for none": ("--load {one}", {"ckpt_step": 0}),
    "no optimizer wanted": ("--load {one}", {"no_load_optim": True}),
    "no optimizer wanted, none there": ("--load {bare}", {"no_load_optim": True}),
    "finetune from a release": ("--load {release}", {"finetune": True}),
    "finetune from a format that is not read": ("--load {dcp}", {"finetune": True}),
    "finetune into another layout": (
        "--load {dist}",
        {"finetune": True, "tensor_model_parallel_size": 2},
    ),
    "no training": ("--load {bare}", {"skip_train": True}),
    "a checkpoint without arguments": ("--load {argless}", {}),
    "async save": ("--load {one} --save {one}", {"async_save": True}),
    "non-persistent, none there yet": ("--load {one}", {"non_persistent_ckpt_type": "global"}),
    "non-persistent that is damaged and not looked at": ("--load {damaged}", {}),
    "Muon without the distributed optimizer": (
        "--load {muon}",
        {"optimizer": "muon", "use_distributed_optimizer": False},
    ),
    "a layer-wise optimizer as it was": (
        "--load {layer_wise}",
        {"optimizer": "muon", "use_distributed_optimizer": True, "ckpt_format": "torch_dist"},
    ),
    "a layer-wise optimizer under its old name": (
        "--load {layer_wise}",
        {"optimizer": "dist_muon", "use_distributed_optimizer": False, "ckpt_format": "torch_dist"},
    ),
    "SGD": ("--load {muon}", {"optimizer": "sgd", "use_distributed_optimizer": False}),
    "CPU offload": ("--load {one}", {"optimizer_cpu_offload": True}),
    "arguments from the checkpoint": (
        "--load {wide}",
        {"use_checkpoint_args": True, "use_mp_args_from_checkpoint_args": True},
    ),
    "the vocabulary from the checkpoint": (
        "--load {one}",
        {"use_checkpoint_args": True, "tokenizer_type": "NullTokenizer", "vocab_size": 1000},
    ),
    "a tokenizer with a vocabulary of its own": (
        "--load {one}",
        {"tokenizer_type": "HuggingFaceTokenizer", "vocab_size": 1000},
    ),
    "a vocabulary that may or may not fit": (
        "--load {one}",
        {"tokenizer_type": "NullTokenizer", "vocab_size": 128},
    ),
    "another layout of a reshardable checkpoint": (
        "--load {reshardable}",
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    ),
    "a remote storage": ("--load msc://bucket/one --save msc://bucket/two", {}),
    "moments changed in a remote storage": (
        "--load msc://bucket/one --save msc://bucket/two --selective-preset reset",
        {},
    ),
    "samples": (
        "--load {one}",
        {"train_iters": None, "lr_decay_iters": None, "train_samples": 160},
    ),
    "no length yet": ("--load {one}", {"train_iters": None, "lr_decay_iters": None}),
    "a warm-up": ("--load {one} --selective-schedule restart", {"lr_warmup_iters": 39}),
    "a fraction": ("--load {one} --selective-schedule restart", {"lr_warmup_fraction": 0.5}),
    "moments changed": ("--load {one} --save {new} --selective-preset reset", {}),
    "moments changed in one directory": ("--load {one} --save {one} --selective-preset reset", {}),
    "a phase begins": ("--selective-from {one} --load {new} --save {new} --reset-iteration", {}),
    "a phase goes on": (
        "--selective-from {one} --load {two} --save {two} --selective-preset reset",
        {},
    ),
    "a phase goes on from --load": ("--load {two} --save {two} --selective-preset reset", {}),
    "hyperparameters at a restart": (
        "--selective-from {one} --load {two} --save {two} --selective-preset reset "
        "--selective-keep-hyperparameters eps",
        {},
    ),
    "a third phase": (
        "--selective-from {two} --load {new} --save {new} --selective-preset reset",
        {},
    ),
    "the way out of a directory of one iteration": (
        "--load {one} --save {new} --selective-preset reset",
        {"ckpt_step": 10},
    ),
    "a first save that was not finished": ("--load {torn} --save {torn}", {}),
    "a first save of a phase that was not finished": (
        "--selective-from {one} --load {torn} --save {torn} --selective-preset reset",
        {},
    ),
    "an iteration by name, without a tracker": ("--load {untracked}", {"ckpt_step": 10}),
    "an overridden iteration": (
        "--load {one} --save {new} --selective-preset reset",
        {"override_ckpt_iteration": 4, "train_iters": 10},
    ),
    "WSD from the checkpoint, with what it does not have": (
        "--load {wsd}",
        {**FROM_CHECKPOINT, "lr_wsd_decay_iters": 20, "lr_wsd_decay_style": "linear"},
    ),
    "WSD from the checkpoint with the length in iterations of another batch": (
        "--load {wsd}",
        {
            **FROM_CHECKPOINT,
            "lr_wsd_decay_iters": 10,
            "lr_wsd_decay_style": "linear",
            "global_batch_size": 16,
        },
    ),
    "WSD from a checkpoint without arguments": (
        "--load {wsd_only}",
        {**FROM_CHECKPOINT, "lr_wsd_decay_iters": 7, "lr_wsd_decay_style": "cosine"},
    ),
    "WSD from the arguments": ("--load {wsd}", {"lr_wsd_decay_iters": 7}),
    "another schedule from the checkpoint": ("--load {one}", FROM_CHECKPOINT),
    "the rate before a warm-up that is over": (
        "--load {wsd}",
        {
            **FROM_CHECKPOINT,
            "lr_wsd_decay_iters": 20,
            "lr_wsd_decay_style": "linear",
            "lr_warmup_init": 0.0,
        },
    ),
    "both counters and a ramp": (
        "--load {one} --save {new} --reset-iteration --reset-dataloader",
        {"rampup_batch_size": ["4", "2", "40"]},
    ),
    "a ramp and no reset": ("--load {one}", {"rampup_batch_size": ["4", "2", "40"]}),
}


@pytest.fixture
def many(place: Place) -> Place:
    """Checkpoints of every kind."""
    place.empty.mkdir()
    place.file.write_text("")
    checkpoint(place.bare, optimizer=False)
    checkpoint(place.release, release=True, optimizer=False)
    checkpoint(place.argless, args=False)
    checkpoint(place.dist, format="torch_dist")
    checkpoint(place.reshardable, format="torch_dist", sharding="fully_reshardable")
    checkpoint(place.muon, changes={"optimizer": "muon", "use_distributed_optimizer": False})
    checkpoint(place.wide, changes={"tensor_model_parallel_size": 2})
    checkpoint(place.damaged)
    checkpoint(place.damaged / "non_persistent", 12)
    (place.damaged / "non_persistent/iter_0000012/mp_rank_00/model_optim_rng.pt").write_bytes(b"x")
    (place.dcp / "iter_0000010").mkdir(parents=True)
    (place.dcp / "iter_0000010" / ".metadata").write_bytes(b"")
    (place.dcp / "latest_checkpointed_iteration.txt").write_text("10")
    checkpoint(
        place.wsd,
        scheduler={"lr_decay_style": "WSD", "lr_warmup_steps": 16},
        changes={"lr_wsd_decay_iters": 20, "lr_wsd_decay_style": "linear", "lr_warmup_init": 1e-6},
    )
    checkpoint(place.wsd_only, scheduler={"lr_decay_style": "WSD"}, args=False)
    (place.root / "from-checkpoint.yaml").write_text("schedule: checkpoint\n")
    for root in (place.torn, place.untracked):
        (checkpoint(root) / TRACKER).unlink()
    file = place.torn / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:200])
    (place.torn / "iter_0000020").mkdir()
    place.begun(RESET, place.one, place.two)
    checkpoint(place.old, 40)
    return place


@pytest.mark.parametrize("missing", [False, True], ids=["0.19.2", "0.18.2"])
@pytest.mark.parametrize("case", LEGAL)
def test_what_is_right_is_not_refused(
    case: str, missing: bool, many: Place, unchanged: Callable[[], None]
) -> None:
    unchanged()
    flags, of_megatron = LEGAL[case]
    newer = {} if missing else {"override_ckpt_iteration": None}
    many.assert_legal(flags, **{**newer, **of_megatron})


def test_a_namespace_without_optional_arguments_is_enough(place: Place) -> None:
    args = place.parse("--load {one} --save {one}")
    needed = ("load", "save", "use_distributed_optimizer", "optimizer_class")
    assert_nothing_found(argparse.Namespace(**{n: getattr(args, n) for n in needed}))


# --- what is wrong


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, and what the error has to say about it."""

    kind: type[MegatronExtError]
    flags: str
    words: tuple[str, ...]
    of_megatron: dict[str, Any]


def fault(kind: type[MegatronExtError], flags: str, *words: str, **of_megatron: Any) -> Fault:
    return Fault(kind, flags, words, of_megatron)


#: Each with the flag, what was found, what was expected and the way out.
FAULTS = {
    "class": fault(
        HostError,
        "--optimizer-class megatron_ext.NoSuch --load {one}",
        *("--optimizer-class megatron_ext.NoSuch", "cannot be imported", "installed"),
    ),
    "a layer-wise optimizer": fault(
        HostError,
        "--load {layer_wise}",
        *("--optimizer muon and --ckpt-format torch", "layer-wise", "a file of each rank"),
        "Use --ckpt-format torch_dist",
        optimizer="muon",
        ckpt_format="torch",
    ),
    "a layer-wise optimizer's checkpoint": fault(
        CheckpointError,
        "--load {layer_wise}",
        *("{layer_wise}", "with Megatron's layer-wise distributed optimizer"),
        "Give --optimizer and --use-distributed-optimizer as they were",
        optimizer="muon",
        use_distributed_optimizer=False,
    ),
    "a layer-wise optimizer for another's checkpoint": fault(
        CheckpointError,
        "--load {muon}",
        *("{muon}", "without Megatron's layer-wise distributed optimizer"),
        "Give --optimizer and --use-distributed-optimizer as they were",
        optimizer="dist_muon",
        use_distributed_optimizer=False,
        ckpt_format="torch_dist",
    ),
    "policy": fault(
        PolicyError,
        "--selective-preset rest --load {one}",
        *("unknown preset 'rest'", "did you mean 'reset'?"),
    ),
    "policy file": fault(
        PolicyError,
        "--selective-policy {nothing}.yaml --load {one}",
        *("--selective-policy", "nothing.yaml", "cannot be read"),
    ),
    "optimizer": fault(
        HostError,
        "--load {one}",
        *(
            "--optimizer sgd and --use-distributed-optimizer",
            "Leave --use-distributed-optimizer out",
        ),
        optimizer="sgd",
    ),
    "FSDP": fault(HostError, "--load {one}", "--use-megatron-fsdp", use_megatron_fsdp=True),
    "FSDP2": fault(HostError, "--load {one}", "--use-torch-fsdp2", use_torch_fsdp2=True),
    "local checkpoints": fault(
        HostError,
        "--load {one}",
        *("--non-persistent-ckpt-type local", "takes precedence", "ckpt-type global, or none"),
        non_persistent_ckpt_type="local",
    ),
    "two directories": fault(
        PolicyError,
        "--selective-from {one} --load {a} --save {b}",
        *("--selective-from {one}", "--load {a}", "--save {b}", "expected one directory"),
    ),
    "start and own": fault(
        PolicyError, "--selective-from {one} --save {one}", "{one}", "another one", "leave"
    ),
    "no checkpoint to start from": fault(
        CheckpointError,
        "--selective-from {nothing} --load {new} --save {new}",
        *(
            "--selective-from {nothing}",
            "there is no checkpoint",
            "--save directory of the earlier",
        ),
    ),
    "nothing in --load": fault(
        CheckpointError,
        "--load {nothing} --selective-preset reset",
        *("preset reset", "--load {nothing} holds no checkpoint", "--selective-from"),
    ),
    "another phase's directory": fault(
        HostError,
        "--load {one} --save {old} --selective-preset reset",
        *("--save {old}", "of another phase", "begins at iteration 10", "overwrite", "an empty"),
    ),
    "another start, without the iteration": fault(
        CheckpointError,
        "--selective-from {gone} --load {two} --save {two} --selective-preset reset",
        *("--selective-from {gone}", "was started from", "no iteration 10", "out to go on"),
    ),
    "an iteration that the phase did not start at": fault(
        CheckpointError,
        "--selective-from {one} --load {two} --save {two} --selective-preset reset --ckpt-step 12",
        *("--ckpt-step 12", "started at iteration 10", "--load {two} --save {two} --ckpt-step 12"),
    ),
    "nothing left to train": fault(
        HostError,
        "--load {one} --save {new} --selective-preset reset",
        *("--train-iters 10", "begins at iteration 10", "nothing left", "--reset-iteration"),
        train_iters=10,
    ),
    "pretrained": fault(
        CheckpointError,
        "--load {nothing} --selective-preset reset",
        *("--pretrained-checkpoint somewhere", "without its optimizer", "--selective-from"),
        pretrained_checkpoint="somewhere",
    ),
    "no --load": fault(
        CheckpointError,
        "--reset-dataloader",
        *("data position reset", "there is no --load", "--selective-from"),
    ),
    "no optimizer": fault(
        CheckpointError,
        "--load {bare}",
        *("{bare}", "no optimizer state", "--no-save-optim", "--no-load-optim"),
    ),
    "a start without optimizer": fault(
        CheckpointError,
        "--selective-from {bare} --load {new} --save {new}",
        *("{bare}", "no optimizer state"),
    ),
    "another iteration": fault(
        CheckpointError,
        "--load {one}",
        *("iter_0000011 does not exist", "found iter_0000010", "--ckpt-step"),
        ckpt_step=11,
    ),
    "a damaged file": fault(
        CheckpointError, "--load {torn}", "cannot read {torn}", "truncated or damaged", "restore"
    ),
    "a file that is too short": fault(
        CheckpointError, "--load {short}", "__0_0.distcp: expected at least", "as .metadata says"
    ),
    "a damaged tracker": fault(
        CheckpointError,
        "--load {tracker}",
        *("latest_checkpointed_iteration.txt", "found 'ten'", "expected an iteration's number"),
    ),
    "a file in place of an iteration": fault(
        CheckpointError, "--load {flat}", "iter_0000010 does not exist", "Restore it"
    ),
    "a format that is not read": fault(
        CheckpointError, "--load {dcp}", "{dcp}", "torch_dcp", "--ckpt-format torch_dist"
    ),
    "a damaged mark": fault(
        CheckpointError, "--load {marked}", "megatron_ext_phase", "'second'", "edited"
    ),
    "not distributed": fault(
        CheckpointError,
        "--load {one}",
        *("with --use-distributed-optimizer", "without it", "Give the flag as it was"),
        use_distributed_optimizer=False,
    ),
    "tensor parallel size": fault(
        CheckpointError,
        "--load {dist}",
        *("--tensor-model-parallel-size 1 -> 2", "dp_reshardable", "{dist}"),
        "--dist-ckpt-optim-fully-reshardable",
        tensor_model_parallel_size=2,
    ),
    "all sizes of a legacy checkpoint": fault(
        CheckpointError,
        "--load {one}",
        *("--tensor-model-parallel-size 1 -> 4", "--pipeline-model-parallel-size 1 -> 2"),
        *("--expert-model-parallel-size 1 -> 8", "a torch checkpoint", "as it was saved"),
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=8,
    ),
    "vocabulary": fault(
        CheckpointError,
        "--load {dist}",
        "padded vocabulary 128 -> 256",
        tokenizer_type="NullTokenizer",
        vocab_size=200,
    ),
    "no-load-optim": fault(
        HostError,
        "--load {one} --selective-preset reset",
        *("--no-load-optim with preset reset", "needs the checkpoint's optimizer", "Leave one"),
        no_load_optim=True,
    ),
    "finetune": fault(
        HostError,
        "--load {one} --save {new} --reset-iteration",
        *("--finetune with iteration reset", "keep the optimizer", "Leave one"),
        finetune=True,
    ),
    "finetune and the schedule": fault(
        HostError,
        "--load {one} --selective-schedule continue",
        *("--finetune with schedule continue: this needs", "--reset-iteration", "Leave one"),
        finetune=True,
    ),
    "no-load-optim and the schedule": fault(
        HostError,
        "--load {one} --selective-schedule continue",
        *("--no-load-optim with schedule continue", "the scheduler is loaded with it", "Leave one"),
        no_load_optim=True,
    ),
    "finetune and kept keys": fault(
        HostError,
        "--load {one} --selective-keep-hyperparameters eps",
        *("--finetune with hyperparameters from the checkpoint", "Leave one"),
        finetune=True,
    ),
    "no-load-optim and a start": fault(
        HostError,
        "--selective-from {one} --load {new} --save {new}",
        *("--no-load-optim with --selective-from {one}", "starts with the checkpoint's optimizer"),
        "Leave one of the two out",
        no_load_optim=True,
    ),
    "no training": fault(
        HostError,
        "--load {one} --selective-preset reset",
        "--skip-train with preset reset",
        skip_train=True,
    ),
    "override-ckpt-iteration": fault(
        HostError,
        "--load {one} --reset-dataloader",
        *("--reset-dataloader with --override-ckpt-iteration 2", "Leave one"),
        override_ckpt_iteration=2,
    ),
    "override-ckpt-iteration and another batch size": fault(
        CheckpointError,
        "--load {one}",
        *("--override-ckpt-iteration 2 with --global-batch-size 16", "checkpoint's is 8"),
        "Leave one of the two out",
        override_ckpt_iteration=2,
        global_batch_size=16,
    ),
    "nothing left to train after an overridden iteration": fault(
        HostError,
        "--load {one} --save {new} --selective-preset reset",
        *("--train-iters 20", "begins at iteration 30", "nothing left"),
        override_ckpt_iteration=30,
    ),
    "the length of WSD's decay": fault(
        HostError,
        "--load {wsd}",
        *("--use-checkpoint-opt_param-scheduler", "is WSD", "no checkpoint's scheduler has"),
        *("Give --lr-wsd-decay-iters", "20 iters of 8 samples", "give the whole schedule"),
        **FROM_CHECKPOINT,
        lr_wsd_decay_style="linear",
    ),
    "the length of WSD's decay, by a policy file": fault(
        HostError,
        "--load {wsd_only} --selective-policy {from-checkpoint}.yaml",
        *("schedule: checkpoint: the checkpoint's schedule is WSD", "Give --lr-wsd-decay-iters"),
        "expected that of the checkpoint's run. Or",
    ),
    "another length of WSD's decay": fault(
        HostError,
        "--load {wsd}",
        *("--use-checkpoint-opt_param-scheduler with --lr-wsd-decay-iters 5", "no checkpoint's"),
        *("20 iters of 8 samples", "would jump", "Correct it"),
        **FROM_CHECKPOINT,
        lr_wsd_decay_iters=5,
        lr_wsd_decay_style="linear",
    ),
    "another form of WSD's decay": fault(
        HostError,
        "--load {wsd}",
        *("--lr-wsd-decay-style exponential", "expected --lr-wsd-decay-style linear", "Give it"),
        **FROM_CHECKPOINT,
        lr_wsd_decay_iters=20,
        lr_wsd_decay_style="exponential",
    ),
    "another rate before the warm-up": fault(
        HostError,
        "--load {wsd} --selective-schedule restart",
        *("--lr-warmup-init 0.0", "at which the warm-up starts", "expected --lr-warmup-init 1e-06"),
        **FROM_CHECKPOINT,
        lr_wsd_decay_iters=20,
        lr_wsd_decay_style="linear",
        lr_warmup_init=0.0,
    ),
    **{
        f"a lost tracker, {name}": fault(
            CheckpointError,
            flags,
            *("{lost}/iter_0000010 is there", "no latest_checkpointed_iteration.txt"),
            *("Write 10 into {lost}/latest_checkpointed_iteration.txt", "not finished, remove"),
            **of_megatron,
        )
        for name, flags, of_megatron in (
            ("a resume", "--load {lost}", {}),
            ("a resume in one directory", "--load {lost} --save {lost}", {}),
            ("a transition", "--load {lost} --save {new} --selective-preset reset", {}),
            ("finetune", "--load {lost}", {"finetune": True}),
            ("no-load-optim", "--load {lost}", {"no_load_optim": True}),
            ("a start", "--selective-from {lost} --load {new} --save {new}", {}),
        )
    },
    "a lost tracker, torch_dist": fault(
        CheckpointError, "--load {lost_dist}", "{lost_dist}/iter_0000010 is there", "Write 10"
    ),
    "a lost tracker in the phase's own directory": fault(
        CheckpointError,
        "--selective-from {one} --load {lost_own} --save {lost_own} --selective-preset reset",
        *("{lost_own}/iter_0000012 is there", "Write 12 into {lost_own}/latest"),
    ),
    "a lost tracker in --save": fault(
        CheckpointError,
        "--load {one} --save {lost_own} --selective-preset reset",
        *("{lost_own}/iter_0000012 is there", "Write 12 into {lost_own}/latest"),
    ),
    "the directory of one iteration": fault(
        CheckpointError,
        "--load {one}/iter_0000010",
        *("--load {one}/iter_0000010 is one iteration", "Give --load {one} --ckpt-step 10"),
    ),
    "the directory of one iteration, to start from": fault(
        CheckpointError,
        "--selective-from {one}/iter_0000010 --load {new} --save {new}",
        *("--selective-from {one}/iter_0000010", "Give --selective-from {one} --ckpt-step 10"),
    ),
    "the directory of one iteration without a tracker": fault(
        CheckpointError,
        "--load {lost}/iter_0000010",
        *("Write 10 into {lost}/latest_checkpointed_iteration.txt", "give --load {lost}"),
    ),
    "phase transitions": fault(
        HostError,
        "--load {one} --save {new} --reset-iteration --reset-dataloader",
        *("--reset-iteration and --reset-dataloader with --phase-transition-iterations", "Leave"),
        phase_transition_iterations=[12],
    ),
    "a ramp": fault(
        HostError,
        "--load {one} --reset-dataloader",
        *("--reset-dataloader with --rampup-batch-size", "together", "Add the other flag"),
        rampup_batch_size=["4", "2", "40"],
    ),
    "steps of the batch size": fault(
        HostError,
        "--load {one} --save {new} --reset-iteration",
        *("--reset-iteration with --step-batch-size-schedule", "together"),
        step_batch_size_schedule="0:4 40:8",
    ),
    "external data": fault(
        HostError,
        "--load {one} --reset-dataloader",
        *("--dataloader-type external", "places its own data loader", "Reset it there"),
        dataloader_type="external",
    ),
    "warm-up": fault(
        HostError,
        "--load {one} --selective-schedule restart",
        *("--lr-warmup-iters 40", "decay of 40 iters", "longer or the warm-up shorter"),
        lr_warmup_iters=40,
    ),
    "warm-up as long as the run": fault(
        HostError,
        "--load {one} --save {new} --reset-iteration",
        *("--lr-warmup-iters 20", "decay of 20 iters", "--train-iters"),
        lr_warmup_iters=20,
        lr_decay_iters=None,
    ),
    "warm-up in samples": fault(
        HostError,
        "--load {one}",
        *("--lr-warmup-samples 200", "decay of 160 samples"),
        lr_warmup_samples=200,
        train_samples=160,
        train_iters=None,
        lr_decay_iters=None,
    ),
    "warm-up as a fraction": fault(
        HostError, "--load {one}", "--lr-warmup-fraction 1", "below 1", lr_warmup_fraction=1.0
    ),
    "save into a file": fault(
        HostError, "--load {one} --save {file}", "--save {file}", "is a file", "Name another one"
    ),
    "save below a file": fault(
        HostError, "--load {one} --save {file}/two", "--save {file}/two", "{file} is a file"
    ),
    "over another phase": fault(
        HostError,
        "--load {one} --save {one} --reset-iteration",
        *("--reset-iteration with --save {one}", "up to iteration 10 of another phase"),
        *("overwrite", "directory of its own", "{one} in --selective-from"),
    ),
    "over a third phase": fault(
        HostError,
        "--load {one} --save {old} --reset-iteration",
        *("--save {old}", "up to iteration 40", "--selective-from"),
    ),
    "over what is not persistent": fault(
        HostError,
        "--load {one} --save {fleeting} --reset-iteration",
        *("--save {fleeting}", "up to iteration 12"),
    ),
    "not persistent and not looked for": fault(
        CheckpointError,
        "--selective-from {one} --load {fleeting} --save {fleeting} --selective-preset reset",
        *("--load {fleeting} holds non-persistent checkpoints only", "ckpt-type global"),
    ),
    "begun before": fault(
        HostError,
        "--load {one} --save {two} --selective-preset reset",
        *("--load {one}", "has been started", "reached iteration 12 in {two}", "overwrite"),
        *("--selective-from {one} --load {two} --save {two}", "empty the directory"),
    ),
    "begun before in one directory": fault(
        HostError,
        "--load {both} --save {both} --selective-preset reset",
        *("has been started", "iteration 12", "leave --ckpt-step out", "another --selective-phase"),
        ckpt_step=10,
    ),
    "another policy in its own directory": fault(
        PlanError,
        "--selective-from {one} --load {two} --save {two} --selective-preset relora 0.5",
        *("a checkpoint of another phase", "preset reset", "preset relora 0.5", "an empty one"),
    ),
    "no mark in its own directory": fault(
        PlanError,
        "--selective-from {one} --load {old} --save {old} --selective-preset reset",
        *("no mark of a phase", "preset reset", "an empty one"),
    ),
    "the same name": fault(
        PlanError,
        "--load {named} --selective-phase b --selective-preset relora 0.5",
        *("--selective-phase b", "phase 'b'", "preset relora 0.5", "another name"),
    ),
    "started elsewhere": fault(
        CheckpointError,
        "--selective-from {other} --load {two} --save {two} --selective-preset reset",
        *("--selective-from {other}", "/one@10#", "expected the same checkpoint"),
        "Name the one it was started from",
    ),
}


@pytest.fixture
def faulty(many: Place) -> Place:
    """What is damaged, beside the rest."""
    short = specimens.specimen("common.pt", many.short) / "__0_0.distcp"
    short.write_bytes(short.read_bytes()[:-1])
    shutil.rmtree(many.torn)
    checkpoint(many.torn)
    file = many.torn / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:200])
    checkpoint(many.tracker)
    (many.tracker / "latest_checkpointed_iteration.txt").write_text("ten")
    many.flat.mkdir()
    (many.flat / "iter_0000010").write_text("")
    (many.flat / "latest_checkpointed_iteration.txt").write_text("10")
    for name, form in (("lost", "torch"), ("lost_dist", "torch_dist")):
        (checkpoint(many.root / name, format=form) / TRACKER).unlink()
    many.begun(RESET, many.one, many.lost_own)
    (many.lost_own / TRACKER).unlink()
    checkpoint(many.marked, mark="second")
    many.begun(RESET, many.one, many.fleeting / "non_persistent")
    checkpoint(many.both, 10)
    many.begun(RESET, many.both, many.both, 12)
    many.begun(ResumePolicy(preset=Preset("reset"), phase="b"), many.one, many.named)
    checkpoint(many.other, changes={"seed": 2})
    # As Megatron's validation leaves the arguments.
    layer_wise = {"use_distributed_optimizer": False, "use_layer_wise_distributed_optimizer": True}
    checkpoint(many.layer_wise, changes={"optimizer": "muon", **layer_wise})
    return many


@pytest.mark.parametrize("case", FAULTS)
def test_one_error_says_what_is_wrong_and_the_way_out(
    case: str, faulty: Place, unchanged: Callable[[], None]
) -> None:
    unchanged()
    fault = FAULTS[case]
    error = faulty.refusal(fault.flags, **fault.of_megatron)
    assert type(error) is fault.kind
    assert "things are wrong" not in str(error)
    for word in fault.words:
        assert word.format_map(_Names(faulty.root)) in str(error)


def test_one_error_lists_everything(faulty: Place, unchanged: Callable[[], None]) -> None:
    unchanged()
    error = faulty.refusal(
        "--optimizer-class megatron_ext.NoSuch --load {dist} --save {old} --reset-iteration",
        use_torch_fsdp2=True,
        lr_warmup_iters=50,
        tensor_model_parallel_size=2,
    )
    assert type(error) is HostError
    first, *lines = str(error).splitlines()
    assert first == "5 things are wrong with this resume:"
    expected = [
        "--optimizer-class megatron_ext.NoSuch",
        "--use-torch-fsdp2",
        "--lr-warmup-iters 50",
        "--tensor-model-parallel-size 1 -> 2",
        f"--reset-iteration with --save {faulty.old}",
    ]
    assert len(lines) == 5
    for number, (line, word) in enumerate(zip(lines, expected, strict=True), 1):
        assert line.startswith(f"  {number}. ")
        assert word in line


def test_a_wrong_policy_does_not_hide_what_else_is_wrong(faulty: Place) -> None:
    error = faulty.refusal("--selective-preset rest --load {bare} --save {file}")
    assert str(error).startswith("3 things are wrong")
    for word in ("unknown preset 'rest'", "no optimizer state", "is a file"):
        assert word in str(error)


# --- a phase from its first start to its end


@pytest.mark.parametrize(
    ("flags", "root", "number"),
    [
        ("--load {lost} --save {lost} --selective-preset reset", "lost", 10),
        ("--load {lost_dist}", "lost_dist", 10),
        (
            "--selective-from {one} --load {lost_own} --save {lost_own} --selective-preset reset",
            "lost_own",
            12,
        ),
    ],
)
def test_a_tracker_that_is_written_again_is_the_way_out(
    flags: str, root: str, number: int, faulty: Place
) -> None:
    assert f"Write {number} into" in str(faulty.refusal(flags))
    (faulty.root / root / TRACKER).write_text(str(number))
    faulty.assert_legal(flags)


def test_the_same_command_line_at_every_restart(place: Place) -> None:
    flags = "--selective-from {one} --load {two} --save {two} --selective-preset reset"
    place.check(flags)
    place.begun(RESET, place.one, place.two, 12)
    place.check(flags)
    place.begun(RESET, place.one, place.two, 14)
    place.check(flags)
    args = place.parse(flags)
    assert (args.load, args.selective_where) == (str(place.two), "own")


def test_the_arguments_may_be_checked_again_when_the_optimizer_is_built(place: Place) -> None:
    """By then --load is where the phase starts, and Megatron has completed its arguments."""
    args = place.parse("--selective-from {one} --load {two} --save {two} --reset-iteration")
    assert_nothing_found(args)
    args.lr_decay_iters, args.iteration, args.padded_vocab_size = args.train_iters, 0, 128
    assert_nothing_found(args)


def test_a_non_persistent_checkpoint_counts_where_megatron_loads_it(place: Place) -> None:
    """Phase 2 in one directory, saved beside the persistent checkpoint of phase 1."""
    place.begun(RESET, place.one, place.one / "non_persistent", 12)
    flags = "--load {one} --save {one} --selective-phase b --selective-preset relora 0.5"
    place.check(flags)
    mark = Mark("b", place.source(place.one), digest_of(RESET))
    checkpoint(place.three, 10)
    checkpoint(place.three / "non_persistent", 12, mark=mark)
    flags = flags.replace("{one}", "{three}")
    place.check(flags)
    error = place.refusal(flags, non_persistent_ckpt_type="global")
    assert "--selective-phase b: the checkpoint belongs to phase 'b'" in str(error)


def test_the_training_loop_and_the_preflight_know_a_checkpoint_by_one_identity(
    place: Place,
) -> None:
    import torch

    from megatron_ext.hooks import counters
    from megatron_ext.resume.session import Resume

    file = place.one / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt"
    loaded = torch.load(file, weights_only=False)
    decided = counters._decide(Resume(RESET), str(place.one), None, loaded)
    assert decided is not None
    phase, mark, before, after = decided
    assert mark is None
    assert before == after == Counters(10, 80, 0, 0, 80)
    assert phase.mark is not None
    assert phase.mark.source == place.source(place.one)
    checkpoint(place.two, 12, mark=phase.mark)
    place.check("--selective-from {one} --load {two} --save {two} --selective-preset reset")


def test_a_start_that_is_gone_is_known_by_its_name(place: Place) -> None:
    place.begun(RESET, place.one, place.new)
    shutil.rmtree(place.one)
    place.assert_legal("--selective-from {one} --load {new} --save {new} --selective-preset reset")


#: Shapes in an index: homogeneous layers, a gated layer's halves, and a norm that is trained.
NAMED = {
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (2, 4),
    "decoder.layers.mlp.linear_fc1.weight_w": (2, 8, 4),
    "decoder.layers.mlp.linear_fc1.weight_v": (2, 8, 4),
}
RULES = [
    # Rule's pattern, its rule for exp_avg, more flags, words of the refusal.
    ("decoder.layers.7.*", "reset", "", ["1 of 1 rules match no parameter that holds moments"]),
    ("frozen.weight", "reset", "", ["Names look like decoder.layers.0.mlp.linear_fc1.weight,"]),
    ("decoder.layers.1.mlp.*", "fill_mean-of_*.qknorm", "", ["fill mean-of *.qknorm for exp_avg"]),
    ("decoder.layers.1.*", "reset", "", []),
    ("*.linear_fc1.weight[4:]", "fill_mean-of_*.layer_norm_weight", "", []),
    # A model without Transformer Engine names the same parameter so.
    ("decoder.layers.0.input_layernorm.weight", "reset", "", []),
    ("decoder.layers.7.*", "reset", "--no-selective-strict", []),
    ("decoder.layers.7.*", "reset", "--selective-new-parameters decoder.layers.7.*", []),
]


@pytest.mark.parametrize(("pattern", "rule", "flags", "words"), RULES)
def test_a_rule_that_names_no_stored_parameter(
    pattern: str, rule: str, flags: str, words: list[str], place: Place
) -> None:
    root = checkpoint(place.named, format="torch_dist", sharding="fully_reshardable")
    kinds = ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")
    tensors = {k + key: torch.zeros(shape) for k in kinds for key, shape in NAMED.items()}
    tensors["frozen.weight"] = torch.zeros(4)
    made = inspected.store(place.index, tensors)
    for name in (".metadata", "__0_0.distcp"):
        shutil.copy(made / name, root / "iter_0000010")
    args = place.parse(f"--load {root} --selective-rule {pattern} {rule} keep {flags}")
    args.selective_rule[0][1] = rule.replace("fill_mean-of_", "fill mean-of ")
    found = preflight.examine(args).errors
    assert len(found) == bool(words), found
    for word in words:
        assert word in str(found[0])


def test_a_policy_that_cannot_be_read_accuses_no_checkpoint(place: Place) -> None:
    error = place.refusal(
        "--selective-from {one} --load {two} --save {two} --selective-preset rest"
    )
    assert isinstance(error, PolicyError)
    error = place.refusal(
        "--load {one} --selective-preset rest --reset-iteration", finetune=True, lr_warmup_iters=99
    )
    for word in ("3 things", "unknown preset 'rest'", "--finetune with", "--lr-warmup-iters 99"):
        assert word in str(error)
