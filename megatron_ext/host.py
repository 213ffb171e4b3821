"""Everything that depends on Megatron's private names and versions, in one place.

`install` rebinds a few module attributes of the installed, unmodified megatron-core; each is listed
in `CONTRACT` with the upstream file. The replacements do nothing unless a request is active: the
launcher's, a library call's, or ``--optimizer-class`` among Megatron's parsed arguments.
Megatron's own files are never edited or copied.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from packaging.version import Version

from . import agree, checkpoint, loop, vocabulary
from .errors import CheckpointError, HostError, MegatronExtError
from .log import say
from .phase import Where
from .policy import ResumePolicy
from .resume import Resume
from .steps import is_adam, is_hybrid

#: Versions the tests run against; outside of [first, last minor] a warning is given once.
TESTED = ("0.16.1", "0.18.2", "0.19.2")

DEFAULT_CLASS = "megatron_ext.SelectiveAdam"

CORE = "megatron.core.optimizer"
TRAINING = "megatron.training"


@dataclass(frozen=True)
class HostName:
    """One name of Megatron that this package leans on.

    Args:
        module: Where it lives.
        attribute: Its name there; dotted for a class attribute.
        parameters: Parameters that have to be in its signature.
        rebound: Whether `install` puts something in its place.
        since: First megatron-core version that has it.
        reference: File and line in megatron-core 0.19.2, and why it is needed.
    """

    module: str
    attribute: str
    parameters: tuple[str, ...] = ()
    rebound: bool = False
    since: str = "0.16.1"
    reference: str = ""


CONTRACT = (
    HostName(
        CORE,
        "_get_megatron_optimizer_based_on_param_groups",
        ("config", "model_chunks"),
        rebound=True,
        reference="core/optimizer/__init__.py:484; the only place that builds optimizers",
    ),
    HostName(CORE, "DistributedOptimizer", reference="core/optimizer/__init__.py:54"),
    HostName(CORE, "Float16OptimizerWithFloat16Params", reference="core/optimizer/__init__.py:64"),
    HostName(CORE, "FP32Optimizer", reference="core/optimizer/__init__.py:65"),
    HostName(CORE, "get_megatron_optimizer", ("config", "model_chunks"), reference=":992"),
    HostName(
        CORE,
        "_get_megatron_emerging_optimizer",
        ("config",),
        rebound=True,
        since="0.18.0",
        reference="core/optimizer/__init__.py:725; Muon and others, chained with Adam",
    ),
    HostName(
        f"{CORE}.optimizer",
        "ChainedOptimizer.__init__",
        ("chained_optimizers",),
        rebound=True,
        reference="core/optimizer/optimizer.py:1429; the members of one chain share one resume",
    ),
    HostName(
        "megatron.core.optimizer_param_scheduler",
        "OptimizerParamScheduler.load_state_dict",
        ("state_dict",),
        rebound=True,
        reference="core/optimizer_param_scheduler.py:341; follows the optimizer's policy",
    ),
    HostName(
        "megatron.core.dist_checkpointing",
        "load",
        ("sharded_state_dict", "checkpoint_dir"),
        rebound=True,
        reference="core/dist_checkpointing/serialization.py:69; explains shards that do not fit",
    ),
    HostName(
        f"{CORE}.distrib_optimizer",
        "DistributedOptimizer._set_main_param_and_optimizer_states",
        ("model_param", "tensors"),
        reference="core/optimizer/distrib_optimizer.py:1191; overridden",
    ),
    HostName(
        f"{CORE}.distrib_optimizer",
        "DistributedOptimizer._get_main_param_and_optimizer_states",
        ("model_param",),
        reference="core/optimizer/distrib_optimizer.py:1077; overridden",
    ),
    HostName(
        f"{CORE}.distrib_optimizer",
        "DistributedOptimizer.sharded_state_dict",
        ("model_sharded_state_dict", "is_loading"),
        reference="core/optimizer/distrib_optimizer.py:1460; overridden (self-load)",
    ),
    HostName(
        "megatron.core.dist_checkpointing.mapping",
        "ShardedTensor.from_rank_offsets",
        ("key", "data"),
        reference="core/dist_checkpointing/mapping.py:181; its global shape, offset and prepended "
        "axes say where a shard lies (parameters.py)",
    ),
    HostName(
        "megatron.core.dist_checkpointing.mapping",
        "ShardedTensor.allow_shape_mismatch",
        reference="core/dist_checkpointing/mapping.py:90; set to zero before a load, so that new "
        "rows of the vocabulary are put back (vocabulary.py)",
    ),
    HostName(
        f"{CORE}.distrib_optimizer",
        "DistributedOptimizer.load_parameter_state_from_dp_zero",
        ("state_dict", "update_legacy_format"),
        reference="core/optimizer/distrib_optimizer.py:2225; overridden",
    ),
    HostName(
        f"{CORE}.distrib_optimizer",
        "DistributedOptimizer._get_model_param_range_map",
        ("param",),
        reference="core/optimizer/distrib_optimizer.py:786; the shard of a parameter",
    ),
    HostName(
        f"{CORE}.optimizer",
        "FP32Optimizer._filter_and_reorder_param_groups",
        ("current_groups", "state_dict_groups"),
        reference="core/optimizer/optimizer.py:594; overridden",
    ),
    HostName(
        f"{TRAINING}.arguments",
        "add_megatron_arguments",
        ("parser",),
        rebound=True,
        since="0.18.0",
        reference="training/arguments.py:121; adds this package's flags",
    ),
    HostName(
        f"{TRAINING}.checkpointing",
        "load_checkpoint",
        ("ddp_model", "optimizer", "opt_param_scheduler"),
        rebound=True,
        since="0.18.0",
        reference="training/checkpointing.py:2066; bound in training/training.py too",
    ),
    HostName(
        f"{TRAINING}.checkpointing",
        "check_checkpoint_args",
        ("checkpoint_args",),
        rebound=True,
        since="0.18.0",
        reference="training/checkpointing.py:143; sees the saved arguments",
    ),
    HostName(
        f"{TRAINING}.checkpointing",
        "_load_base_checkpoint",
        ("load_dir", "args", "rank0"),
        rebound=True,
        since="0.18.0",
        reference="training/checkpointing.py:1633; the counters and the phase, before they count",
    ),
    HostName(
        f"{TRAINING}.training",
        "build_train_valid_test_data_loaders",
        ("build_train_valid_test_datasets_provider",),
        rebound=True,
        since="0.18.0",
        reference="training/training.py:4510; recomputes a data position of 0 (line 4523)",
    ),
    HostName(
        f"{TRAINING}.training",
        "get_train_valid_test_num_samples",
        rebound=True,
        since="0.18.0",
        reference="training/training.py:4466; how much data the run needs",
    ),
)


@dataclass(frozen=True)
class Request:
    """That optimizers are to be built with a class of the user's choice.

    Args:
        optimizer_class: Dotted path to a `DistributedOptimizer` subclass.
        policy: What to take from where, for `SelectiveAdam` and its subclasses.
        report_dir: Where the JSON report goes, or None.
        where: What the directory of ``--load`` is to the phase.
    """

    optimizer_class: str = DEFAULT_CLASS
    policy: ResumePolicy = field(default_factory=ResumePolicy)
    report_dir: Path | None = None
    where: Where = "load"

    def resume(self) -> Resume:
        """A resume to be shared by the optimizers of a chain."""
        return Resume(self.policy, self.report_dir, megatron_version(), where=self.where)


#: In every checkpoint key of an optimizer's entries (`chained_<i>.` may stand before it).
_OPTIMIZER_PREFIX = "optimizer."

_scoped: contextvars.ContextVar[Request | None] = contextvars.ContextVar("request", default=None)
_launched: Request | None = None
_built = 0
#: The resume whose checkpoint Megatron is loading.
_loading: Resume | None = None
#: The same, where the optimizer is loaded too; afterwards that of the running training.
_resumed: Resume | None = None
_warned_version = False


def megatron_version() -> str:
    """Version of the megatron-core that is imported (`megatron.core.package_info`).

    Without the local part: upstream appends the commit of whatever repository the run starts in.
    """
    core = importlib.import_module("megatron.core")
    version = getattr(core, "__version__", None) or importlib.metadata.version("megatron-core")
    return Version(version).public


def check_contract() -> None:
    """Compare `CONTRACT` with the installed Megatron.

    Raises:
        HostError: A name is gone or has lost a parameter; names both versions.
    """
    found = Version(megatron_version())
    problems = [p for name in CONTRACT if (p := _problem(name, found))]
    if problems:
        raise HostError(
            f"megatron_ext works with megatron-core {TESTED[0]} to {TESTED[-1]}; the installed "
            f"megatron-core {found} has moved what it leans on:\n"
            + "\n".join(f"  {p}" for p in problems)
            + f"\nInstall megatron-core=={TESTED[-1]}, or run without --optimizer-class"
        )
    _warn_if_untested(found)


def install(*, arguments: bool = False) -> None:
    """Rebind the names of `CONTRACT` that are marked; safe to call again.

    Args:
        arguments: Also add this package's flags to Megatron's own parser (the launcher; scripts
            that pass `add_arguments` as ``extra_args_provider`` do not need it).

    Raises:
        HostError: See `check_contract`.
    """
    check_contract()
    core = importlib.import_module(CORE)
    _rebind(core, "_get_megatron_optimizer_based_on_param_groups", _build_optimizer)
    if hasattr(core, "_get_megatron_emerging_optimizer"):
        _rebind(core, "_get_megatron_emerging_optimizer", _build_emerging)
    chained = importlib.import_module(f"{CORE}.optimizer").ChainedOptimizer
    _rebind(chained, "__init__", _chain)
    scheduler = importlib.import_module("megatron.core.optimizer_param_scheduler")
    _rebind(scheduler.OptimizerParamScheduler, "load_state_dict", _load_scheduler)
    _rebind(importlib.import_module("megatron.core.dist_checkpointing"), "load", _load_sharded)
    if not has_training():
        return
    if arguments:
        _rebind(
            importlib.import_module(f"{TRAINING}.arguments"),
            "add_megatron_arguments",
            _add_arguments_too,
        )
    checkpointing = importlib.import_module(f"{TRAINING}.checkpointing")
    _rebind(checkpointing, "load_checkpoint", _load_checkpoint)
    _rebind(checkpointing, "check_checkpoint_args", _check_checkpoint_args)
    _rebind(checkpointing, "_load_base_checkpoint", _load_base_checkpoint)
    training = importlib.import_module(f"{TRAINING}.training")
    _rebind(training, "load_checkpoint", _load_checkpoint)
    loaders = loop.around_loaders(lambda: _resumed)
    _rebind(training, "build_train_valid_test_data_loaders", loaders)
    _rebind(
        training, "get_train_valid_test_num_samples", loop.around_sample_counts(lambda: _resumed)
    )


def resolve_class(path: str) -> type:
    """Import the class ``--optimizer-class`` names.

    Args:
        path: ``package.module.Class``.

    Raises:
        HostError: It cannot be imported or is no `DistributedOptimizer` subclass.
    """
    base = importlib.import_module(f"{CORE}.distrib_optimizer").DistributedOptimizer
    module, _, name = path.rpartition(".")
    if not module:
        raise HostError(
            f"--optimizer-class {path}: expected a dotted path such as {DEFAULT_CLASS}, found a "
            "name without a module"
        )
    try:
        cls = getattr(importlib.import_module(module), name)
    except Exception as e:  # a user's module may fail to import in any way
        raise HostError(
            f"--optimizer-class {path}: cannot be imported: {type(e).__name__}: {e}. Is {module} "
            "installed in this environment, on every node?"
        ) from e
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise HostError(
            f"--optimizer-class {path}: expected a subclass of {base.__module__}.{base.__name__}, "
            f"found {cls!r}"
        )
    return cls


def launch_request(request: Request | None) -> None:
    """Set the request of the whole process (the launcher's)."""
    global _launched
    _launched = request


@contextlib.contextmanager
def requested(request: Request) -> Iterator[None]:
    """Make a request active for the calls inside (a library call's)."""
    token = _scoped.set(request)
    try:
        yield
    finally:
        _scoped.reset(token)


def active_request() -> Request | None:
    """The request in force: a library call's, else Megatron's arguments, else the launcher's."""
    return _scoped.get() or _request_from_megatron_args() or _launched


def members_of(optimizer: Any) -> list[Any]:
    """The optimizers of this package inside a Megatron optimizer (itself, or a chain's)."""
    chain = getattr(optimizer, "chained_optimizers", None)
    if chain is not None:
        return [m for o in chain for m in members_of(o)]
    return [optimizer] if isinstance(getattr(optimizer, "resume", None), Resume) else []


def adam_optimizers(optimizer: Any) -> list[Any]:
    """The Megatron optimizers whose moments can be reached, ours or stock: itself, or a chain's.

    Raises:
        HostError: One of them keeps its state elsewhere; named.
    """
    chain = getattr(optimizer, "chained_optimizers", None)
    if chain is not None:
        return [m for o in chain for m in adam_optimizers(o)]
    core = importlib.import_module(CORE)
    known = ("DistributedOptimizer", "Float16OptimizerWithFloat16Params", "FP32Optimizer")
    torch_optimizer = getattr(optimizer, "optimizer", None)
    inner = type(torch_optimizer).__name__
    if not isinstance(optimizer, tuple(getattr(core, name) for name in known)):
        raise HostError(
            f"cannot reach the moments of {type(optimizer).__name__} over {inner}; expected "
            f"{', '.join(known)} or a ChainedOptimizer of these"
        )
    if is_hybrid(torch_optimizer):
        raise HostError(
            f"cannot reach the moments of {inner} (CPU offload): it keeps them in several "
            "optimizers. Leave --optimizer-cpu-offload out"
        )
    return [optimizer]


def parse_arguments(argv: list[str]) -> Any:
    """Megatron's own parsing of a command line, before its validation; flags it lacks are ignored.

    Args:
        argv: The script's name and its arguments.

    Raises:
        SystemExit: argparse refuses them, as it would in the script.
    """
    module = importlib.import_module(f"{TRAINING}.arguments")
    before, sys.argv = sys.argv, argv
    try:
        return module.parse_args(ignore_unknown_args=True)
    finally:
        sys.argv = before


def require_built() -> None:
    """Raise if a class was asked for and nothing was built with it.

    Raises:
        HostError: The script built no optimizer through Megatron, or not with this class.
    """
    request = active_request()
    if request is not None and not _built:
        raise HostError(
            f"--optimizer-class {request.optimizer_class}: no optimizer was built with it. The "
            "script has to build its optimizer with megatron.core.optimizer.get_megatron_optimizer "
            "(as megatron.training does), and --skip-train builds none"
        )


# What takes the place of Megatron's own. Each factory gets the original.


def _build_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around `_get_megatron_optimizer_based_on_param_groups`."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        request = active_request()
        if request is None:
            return original(*args, **kwargs)
        global _built
        _check_arguments(request)
        cls = resolve_class(request.optimizer_class)
        call = signature.bind(*args, **kwargs).arguments
        _refuse_unsupported(request, call["config"], call["model_chunks"])
        with _substituted(cls):
            optimizer = original(*args, **kwargs)
        _check_built(request, cls, optimizer, call["model_chunks"])
        _built += 1
        return optimizer

    return build


def _build_emerging(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around `_get_megatron_emerging_optimizer`: Muon and others, which chain an Adam."""

    @functools.wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        if (request := active_request()) is None:
            return original(*args, **kwargs)
        call = inspect.signature(original).bind(*args, **kwargs).arguments
        config, chosen = call["config"], request.optimizer_class
        by_layer = getattr(config, "use_layer_wise_distributed_optimizer", False)
        if by_layer or config.optimizer.startswith("dist_"):
            raise HostError(
                f"--optimizer-class {chosen} with --optimizer {config.optimizer} and a layer-wise "
                "distributed optimizer: it keeps its state in a layout of its own. Leave "
                "--use-layer-wise-distributed-optimizer out"
            )
        cls = resolve_class(chosen)
        with _substituted(cls):
            optimizer = original(*args, **kwargs)
        _join_emerging(request, optimizer, call["model_chunks"])
        return optimizer

    return build


def _chain(original: Callable[..., None]) -> Callable[..., None]:
    """Around `ChainedOptimizer.__init__`: one resume, one report for the chain."""

    @functools.wraps(original)
    def init(self: Any, chained_optimizers: list[Any]) -> None:
        original(self, chained_optimizers)
        members = members_of(self)
        if len(members) > 1:
            shared = members[0].resume
            for member in members[1:]:
                member.join(shared)

    return init


def _load_scheduler(original: Callable[..., None]) -> Callable[..., None]:
    """Around `OptimizerParamScheduler.load_state_dict`: the same decision as the groups'."""

    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Mapping[str, Any]) -> None:
        members = members_of(self.optimizer)
        if not members:
            original(self, state_dict)
            return
        policy = members[0].resume.policy
        flags = (self.override_opt_param_scheduler, self.use_checkpoint_opt_param_scheduler)
        from_checkpoint = policy.schedule == "checkpoint"
        self.override_opt_param_scheduler = not from_checkpoint
        self.use_checkpoint_opt_param_scheduler = from_checkpoint
        arguments = _scheduler_values(self)
        try:
            original(self, state_dict)
        finally:
            self.override_opt_param_scheduler, self.use_checkpoint_opt_param_scheduler = flags
        for name in policy.kept_scheduler_attributes:
            if name in state_dict:
                setattr(self, name, state_dict[name])
        phase = members[0].resume.phase
        if phase is not None and phase.policy.restarts_schedule:
            self.num_steps = 0
        # Stock computes the first step's weight decay before it has restored start_wd and end_wd
        # (core/optimizer_param_scheduler.py:341, 0.19.2).
        self.step(0)
        members[0].resume.scheduler_loaded(_scheduler_section(self, state_dict, arguments, members))

    return load_state_dict


def _load_sharded(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around `dist_checkpointing.load`: say what does not fit, in the user's words."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        if not _built:
            return original(*args, **kwargs)
        call = signature.bind(*args, **kwargs).arguments
        # Loading takes the sharded entries out of the dict: look before.
        requested = _optimizer_entries(call["sharded_state_dict"])
        # torch's CheckpointException is no Exception (torch/distributed/checkpoint/api.py).
        dcp = importlib.import_module("torch.distributed.checkpoint.api")
        resized = _resized(call["sharded_state_dict"], call["checkpoint_dir"], requested)
        if not requested:
            say(resized.lines())  # no optimizer is loaded that would report them
            resized.forget()
        try:
            loaded = original(*args, **kwargs)
            # With some values of `strict` also which keys did not fit.
            resized.put_back(loaded[0] if isinstance(loaded, tuple) else loaded)
            return loaded
        except (Exception, dcp.CheckpointException) as e:
            resized.forget()
            stored = _stored_entries(call["checkpoint_dir"])
            lines = checkpoint.misfits(requested, stored)
            if not lines:
                raise
            if not any(_OPTIMIZER_PREFIX in key for key in stored):
                raise _no_optimizer_state(call["checkpoint_dir"]) from e
            raise checkpoint.does_not_fit([f"in {call['checkpoint_dir']}:", *lines]) from e

    return load


def _add_arguments_too(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around `add_megatron_arguments`."""

    @functools.wraps(original)
    def add_megatron_arguments(parser: Any) -> Any:
        from .arguments import add_flags, choose_directories

        return choose_directories(add_flags(original(parser)))

    return add_megatron_arguments


def _load_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around `megatron.training.checkpointing.load_checkpoint`."""

    @functools.wraps(original)
    def load_checkpoint(
        ddp_model: Any, optimizer: Any, opt_param_scheduler: Any, *args: Any, **kwargs: Any
    ) -> Any:
        members = members_of(optimizer)
        if not members:
            if optimizer is not None:
                require_built()
            return original(ddp_model, optimizer, opt_param_scheduler, *args, **kwargs)
        megatron_args = _global_args()
        dropped = _why_moments_are_dropped(megatron_args)
        global _loading, _resumed
        resume = members[0].resume
        resume.begin_load()
        if dropped and resume.policy.needs_optimizer:
            raise needs_optimizer(dropped, resume.policy)
        if dropped:
            say(f"megatron_ext: {dropped}: the checkpoint's Adam moments are dropped")
        else:
            _require_legacy_files(megatron_args, kwargs.get("load_arg", "load"))
        _loading, _resumed = resume, None if dropped else resume
        try:
            result = original(ddp_model, optimizer, opt_param_scheduler, *args, **kwargs)
        except KeyError as e:
            if e.args != ("optimizer",):
                raise
            _raise_no_optimizer_state(getattr(megatron_args, kwargs.get("load_arg", "load")), e)
        finally:
            _loading = None
        if not dropped and _loaded_iteration() > 0 and not resume.complete:
            raise CheckpointError(
                f"a checkpoint was loaded from {megatron_args.load}, but no optimizer state came "
                "with it and the moments were to be kept. A release checkpoint or one written "
                "with --no-save-optim has none: pass --no-load-optim to start with a new "
                "optimizer"
            )
        # Of a legacy checkpoint stock reads the iteration once more from the tracker's file
        # (training/checkpointing.py:2587, 0.19.2).
        iteration = None if dropped else loop.after_the_load(resume, megatron_args)
        return result if iteration is None else (iteration, *result[1:])

    return load_checkpoint


def _load_base_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around `_load_base_checkpoint`, which reads the checkpoint, after a look at its head."""

    @functools.wraps(original)
    def load(load_dir: Any, args: Any, rank0: bool = False, *rest: Any, **kwargs: Any) -> Any:
        result = original(load_dir, args, rank0, *rest, **kwargs)
        if _loading is not None and _resumed is not None and not rank0:
            loop.before_the_load(_resumed, load_dir, result[0])
        return result

    return load


def _check_checkpoint_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around `check_checkpoint_args`: the saved arguments, before the optimizer is loaded."""

    @functools.wraps(original)
    def check_checkpoint_args(checkpoint_args: Any, *args: Any, **kwargs: Any) -> Any:
        saved = getattr(checkpoint_args, "global_batch_size", None)
        current = getattr(_global_args(), "global_batch_size", None)
        if _loading is not None and saved and current:
            _loading.global_batch_size = (int(saved), int(current))
        if _loading is not None:
            _refuse_resized_legacy(checkpoint_args, _global_args())
        return original(checkpoint_args, *args, **kwargs)

    return check_checkpoint_args


# Helpers of the above.


def _problem(name: HostName, found: Version) -> str | None:
    if found < Version(name.since):
        return None
    if name.module.startswith(TRAINING) and not has_training():
        return None
    where = f"{name.module}.{name.attribute}"
    try:
        target: Any = importlib.import_module(name.module)
        for part in name.attribute.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as e:
        return f"{where} is gone ({e}); needed for: {name.reference}"
    target = getattr(target, "__megatron_ext_original__", target)
    if name.parameters:
        has = inspect.signature(target).parameters
        missing = [p for p in name.parameters if p not in has]
        if missing:
            return f"{where} has no parameter {', '.join(missing)}; needed for: {name.reference}"
    return None


def _warn_if_untested(found: Version) -> None:
    global _warned_version
    last = Version(TESTED[-1])
    inside = Version(TESTED[0]) <= found and found.release[:2] <= last.release[:2]
    if not inside and not _warned_version:
        _warned_version = True
        warnings.warn(
            f"megatron-core {found} is outside the range megatron_ext is tested with "
            f"({TESTED[0]} to {last.major}.{last.minor}.x); every name it leans on is there",
            stacklevel=3,
        )


@functools.cache
def has_training() -> bool:
    """Whether the wheel ships the training loop (0.18 and later, with its extra installed)."""
    try:
        importlib.import_module(f"{TRAINING}.arguments")
        importlib.import_module(f"{TRAINING}.checkpointing")
    except ImportError:
        return False
    return True


def _rebind(owner: ModuleType | type, name: str, wrap: Callable[[Any], Any]) -> None:
    current = getattr(owner, name)
    if hasattr(current, "__megatron_ext_original__"):
        return
    wrapped = wrap(current)
    wrapped.__megatron_ext_original__ = current
    setattr(owner, name, wrapped)


def _request_from_megatron_args() -> Request | None:
    args = _global_args()
    if getattr(args, "optimizer_class", None) is None:
        return None
    from .arguments import request_from_args

    return request_from_args(args)


def _global_args() -> Any:
    """Megatron's parsed arguments, or None (also where megatron.training is not used)."""
    module = sys.modules.get(f"{TRAINING}.global_vars")
    return getattr(module, "_GLOBAL_ARGS", None)


def _refuse_unsupported(request: Request, config: Any, model_chunks: Any) -> None:
    if config.optimizer != "adam":
        raise _not_adam(request, config.optimizer)
    if config.overlap_param_gather_with_optimizer_step:
        raise HostError(
            f"--optimizer-class {request.optimizer_class} with "
            "--overlap-param-gather-with-optimizer-step: Megatron then splits the dense parameters "
            "into two chained optimizers by model chunk, which is not tested with a selective "
            "resume. Leave the flag out for this run"
        )
    if getattr(config, "optimizer_cpu_offload", False) and request.policy.changes_moments:
        raise HostError(
            f"--optimizer-class {request.optimizer_class} with --optimizer-cpu-offload and rules "
            "for moments: HybridDeviceOptimizer keeps them in several optimizers. Leave the rules "
            "or the offload out"
        )
    ddp_config = getattr(model_chunks[0], "ddp_config", None)
    if getattr(ddp_config, "use_megatron_fsdp", False):
        raise HostError(
            f"--optimizer-class {request.optimizer_class} with --use-megatron-fsdp: Megatron-FSDP "
            "keeps its optimizer state in its own layout and does not load through "
            "DistributedOptimizer. Use --use-distributed-optimizer without it"
        )
    args = _global_args()
    if getattr(args, "use_torch_fsdp2", False):
        raise HostError(
            f"--optimizer-class {request.optimizer_class} with --use-torch-fsdp2: torch FSDP2 "
            "loads in place and bypasses the optimizer's load_state_dict"
        )
    if getattr(args, "non_persistent_ckpt_type", None) == "local":
        raise HostError(
            f"--optimizer-class {request.optimizer_class} with --non-persistent-ckpt-type local: "
            "a local checkpoint takes precedence over --load and is not tested with a selective "
            "resume. Use --non-persistent-ckpt-type global, or none for the first resume"
        )


def _join_emerging(request: Request, optimizer: Any, model_chunks: Any) -> None:
    """Make the members of a chain that Muon and Adam share one resume."""
    global _built
    members = members_of(optimizer)
    if not any(is_adam(m.optimizer) for m in members):
        raise HostError(
            f"--optimizer-class {request.optimizer_class}: no Adam in {type(optimizer).__name__}, "
            "so there are no moments to keep. Leave --optimizer-class out"
        )
    resume = request.resume()
    for member in members:
        member.resume_chunks = model_chunks
        member.join(resume)
        if not is_adam(member.optimizer):
            inner = type(member.optimizer).__name__
            say(f"megatron_ext: {inner} is not Adam: its state is kept, moment rules do not apply")
    _built += 1


def _not_adam(request: Request, optimizer: str) -> HostError:
    return HostError(
        f"--optimizer-class {request.optimizer_class} with --optimizer {optimizer}: only Adam is "
        f"supported (its state is exp_avg and exp_avg_sq); '{optimizer}' and chains that contain "
        "it are not. Use --optimizer adam, or leave --optimizer-class out"
    )


@contextlib.contextmanager
def _substituted(cls: type) -> Iterator[None]:
    """Let the construction site find our classes, and nobody else."""
    from . import optimizer as ours

    core = importlib.import_module(CORE)
    replacements = {"DistributedOptimizer": cls}
    if issubclass(cls, ours.SelectiveAdam):
        replacements["Float16OptimizerWithFloat16Params"] = ours.SelectiveFloat16Optimizer
        replacements["FP32Optimizer"] = ours.SelectiveFP32Optimizer
    originals = {name: getattr(core, name) for name in replacements}
    for name, replacement in replacements.items():
        setattr(core, name, replacement)
    try:
        yield
    finally:
        for name, stock in originals.items():
            setattr(core, name, stock)


def _check_arguments(request: Request) -> None:
    """Find what is wrong before anything is built, and the same on every rank; collective."""
    error = None
    args = _global_args()
    if getattr(args, "optimizer_class", None) is not None:
        from . import preflight

        try:
            preflight.check(args)
        except MegatronExtError as e:
            error = e
    agree.agree("the policy", _digest(request), error)


def _digest(request: Request) -> str:
    return hashlib.sha256(
        repr((request.optimizer_class, request.policy, request.where)).encode()
    ).hexdigest()


def _check_built(request: Request, cls: type, optimizer: Any, model_chunks: Any) -> None:
    inner = type(getattr(optimizer, "optimizer", None)).__name__
    if members_of(optimizer):
        optimizer.resume_chunks = model_chunks
        optimizer.join(request.resume())
    if isinstance(optimizer, cls):
        say(f"megatron_ext: {cls.__name__} in place of DistributedOptimizer, over {inner}")
        return
    if not members_of(optimizer):
        raise HostError(
            f"--optimizer-class {request.optimizer_class}: it takes the place of "
            f"DistributedOptimizer, but {type(optimizer).__name__} was built. Add "
            "--use-distributed-optimizer"
        )
    say(
        f"megatron_ext: without --use-distributed-optimizer there is no DistributedOptimizer for "
        f"{cls.__name__} to replace; {type(optimizer).__name__} over {inner} resumes by the same "
        "rules"
    )


_SCHEDULER_VALUES = (
    "max_lr",
    "min_lr",
    "lr_warmup_steps",
    "lr_decay_steps",
    "lr_decay_style",
    "start_wd",
    "end_wd",
    "wd_incr_steps",
    "wd_incr_style",
)


def _scheduler_values(scheduler: Any) -> dict[str, Any]:
    return {name: getattr(scheduler, name) for name in _SCHEDULER_VALUES}


def _scheduler_section(
    scheduler: Any,
    state_dict: Mapping[str, Any],
    arguments: Mapping[str, Any],
    members: list[Any],
) -> dict[str, Any]:
    """The scheduler's part of the report."""
    policy = members[0].resume.policy
    kept = set(policy.kept_scheduler_attributes)
    everything = policy.schedule == "checkpoint"
    values = {
        name: {
            "checkpoint": state_dict.get(name),
            "argument": arguments[name],
            "value": value,
            "taken": "checkpoint" if everything or name in kept else "arguments",
        }
        for name, value in _scheduler_values(scheduler).items()
    }
    first = [
        {
            "optimizer": number,
            "group": index,
            "lr": float(group["lr"]),
            "weight_decay": float(group["weight_decay"]),
        }
        for number, member in enumerate(members)
        for index, group in enumerate(member.optimizer.param_groups)
    ]
    return {"num_steps": scheduler.num_steps, "values": values, "first_step": first}


def _resized(state_dict: Any, directory: Any, requested: Mapping[str, Any]) -> vocabulary.Resized:
    """What of a resume has another number of rows than the checkpoint.

    Raises:
        CheckpointError: The optimizer state is stored for the old number only; on every rank.
    """
    if not requested and _loading is None:
        return vocabulary.Resized()
    mapping = importlib.import_module("megatron.core.dist_checkpointing.mapping")

    def stored() -> Mapping[str, tuple[int, ...] | None]:
        try:
            return _stored_entries(directory)
        except Exception:  # no torch_dist checkpoint, or damaged: the load itself says so
            return {}

    resized = vocabulary.look(state_dict, mapping.ShardedTensor, _OPTIMIZER_PREFIX, stored)
    error = vocabulary.unsupported(resized, requested)
    if error is not None:
        resized.forget()
    if vocabulary.by_bucket(requested) and _has_stages_without_vocabulary():
        agree.agree("looking at the vocabulary", "0" * 32, error)
    elif error is not None:
        raise error
    return resized


def _has_stages_without_vocabulary() -> bool:
    """Whether a pipeline stage has neither embedding nor output layer to tell the size by."""
    parallel_state = importlib.import_module("megatron.core.parallel_state")
    return int(parallel_state.get_pipeline_model_parallel_world_size()) > 2


def _optimizer_entries(state_dict: Any) -> dict[str, Any]:
    """Checkpoint keys of the optimizer's entries in a sharded state dict -> global shape."""
    mapping = importlib.import_module("megatron.core.dist_checkpointing.mapping")
    utils = importlib.import_module("megatron.core.dist_checkpointing.dict_utils")
    entries: dict[str, Any] = {}
    for entry in utils.nested_values(state_dict):
        if isinstance(entry, mapping.ShardedTensorFactory):
            # A gated fc1 is stored as two halves along a new or split axis; only the key is sure.
            entries[entry.key] = None
        elif isinstance(entry, mapping.ShardedTensor):
            entries[entry.key] = None if entry.allow_shape_mismatch else entry.global_shape
        elif isinstance(entry, mapping.ShardedObject):
            entries[entry.unique_key] = None
    return {key: shape for key, shape in entries.items() if _OPTIMIZER_PREFIX in key}


def _stored_entries(directory: str | Path) -> dict[str, tuple[int, ...] | None]:
    """Keys of a torch_dist checkpoint and their global shapes, from its ``.metadata`` file alone.

    Megatron's own `load_tensors_metadata` fails with torch 2.15, whose tensor properties have a
    field that `torch.empty` does not take (core/dist_checkpointing/strategies/torch.py:1022,
    0.19.2).

    Args:
        directory: The iteration's directory.

    Returns:
        Checkpoint key -> global shape in elements, or None for an object that is no tensor.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    entries = FileSystemReader(directory).read_metadata().state_dict_metadata
    return {
        key: tuple(entry.size) if hasattr(entry, "size") else None for key, entry in entries.items()
    }


def _no_optimizer_state(where: Any) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint in {where} holds no optimizer state (a release checkpoint, or written "
        "with --no-save-optim), but the moments were to be kept. Pass --no-load-optim to start "
        "with a new optimizer"
    )


def _raise_no_optimizer_state(where: Any, cause: KeyError) -> None:
    """Tell the ranks that are about to plan, then raise."""
    error = _no_optimizer_state(where)
    try:
        agree.agree("resume", "", error)
    except MegatronExtError as e:
        raise e from cause


def needs_optimizer(flag: str, policy: ResumePolicy) -> HostError:
    """The error for a policy without the optimizer it needs."""
    asked = ", ".join(policy.operations) or "hyperparameters from the checkpoint"
    instead = (
        "--reset-iteration and --reset-dataloader do what it does to the counters, and keep the "
        "optimizer"
        if flag == "--finetune"
        else "without the optimizer's state there is nothing to do them to"
    )
    return HostError(
        f"{flag} with {asked}: this needs the checkpoint's optimizer, which {flag} drops; "
        f"{instead}. Leave one of the two out"
    )


def _why_moments_are_dropped(args: Any) -> str | None:
    for flag in ("no_load_optim", "finetune"):
        if getattr(args, flag, False):
            return f"--{flag.replace('_', '-')}"
    return None


def _loaded_iteration() -> int:
    checkpointing = importlib.import_module(f"{TRAINING}.checkpointing")
    getter = getattr(checkpointing, "get_loaded_iteration", None)
    return (getter() if getter else None) or 0


def _require_legacy_files(args: Any, load_arg: str) -> None:
    """Raise on every rank if a legacy torch checkpoint lacks one rank's file.

    Stock leaves that rank with exit code 0 and the others waiting
    (training/checkpointing.py:1751-1754, 0.19.2).
    """
    checkpointing = importlib.import_module(f"{TRAINING}.checkpointing")
    load_dir = getattr(args, load_arg, None)
    error = None
    try:
        missing = _missing_legacy_files(checkpointing, args, load_dir)
        if missing:
            error = CheckpointError(
                f"the checkpoint in {load_dir} is not complete: {missing[0]} does not exist. "
                "Restore it; if only the optimizer's file is lost, --no-load-optim starts with a "
                "new optimizer (the Adam moments are then lost)"
            )
    except OSError as e:
        error = CheckpointError(f"the checkpoint in {load_dir} cannot be read: {e}")
    agree.agree("looking for the checkpoint's files", "0" * 32, error)


def _missing_legacy_files(checkpointing: Any, args: Any, load_dir: Any) -> list[str]:
    if (iteration := _legacy_iteration(checkpointing, args, load_dir)) is None:
        return []
    model = checkpointing.get_checkpoint_name(load_dir, iteration, False)
    files = [model]
    if args.use_distributed_optimizer and _writes_optimizer_file():
        files.append(checkpointing.get_distributed_optimizer_checkpoint_name(model))
    return [f for f in files if not os.path.isfile(f)]


def _legacy_iteration(checkpointing: Any, args: Any, load_dir: Any) -> int | None:
    """The iteration of a legacy torch checkpoint; None where there is none in the directory."""
    if load_dir is None:
        return None
    tracker = checkpointing.get_checkpoint_tracker_filename(load_dir)
    if not os.path.isfile(tracker):
        return None
    # `read_metadata` reduces over the ranks; the file itself is enough here.
    text = Path(tracker).read_text().strip()
    iteration = getattr(args, "ckpt_step", None) or (int(text) if text.isdigit() else None)
    if iteration is None:
        return None
    base = checkpointing.get_checkpoint_name(load_dir, iteration, False, return_base_dir=True)
    is_legacy = os.path.isdir(base) and any(n.startswith("mp_rank_") for n in os.listdir(base))
    return iteration if is_legacy else None


def _refuse_resized_legacy(saved: Any, args: Any) -> None:
    """Raise if the vocabulary of a legacy torch checkpoint is of another size; on every rank alike.

    Raises:
        CheckpointError: Its optimizer file has the buffers of the old size.
    """
    before, now = (getattr(a, "padded_vocab_size", None) for a in (saved, args))
    if before is None or now is None or before == now or _why_moments_are_dropped(args):
        return
    checkpointing = importlib.import_module(f"{TRAINING}.checkpointing")
    if _legacy_iteration(checkpointing, args, args.load) is not None:
        change = vocabulary.RowChange("padded_vocab_size", int(before), int(now), 0)
        raise vocabulary.refusal(change, "legacy torch")


def _writes_optimizer_file() -> bool:
    parallel_state = importlib.import_module("megatron.core.parallel_state")
    return int(parallel_state.get_data_parallel_rank()) == 0
