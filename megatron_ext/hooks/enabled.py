"""Enable selective resumes in a host with its own script, and give its loop the counters."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import sys

from ..base import ranks
from ..errors import HostError
from ..host import classes
from ..host.arguments import global_args
from ..host.contract import CORE
from ..policy.counters import Counters
from ..policy.request import Request
from ..report.resume_report import ResumeReport
from ..resume.session import Resume, current
from . import installing, session


class Enabled:
    """The answers for a host whose training loop is its own; made by `megatron_ext.enable`."""

    def counters(
        self,
        *,
        iteration: int,
        consumed_train_samples: int,
        skipped_train_samples: int = 0,
        consumed_valid_samples: int = 0,
    ) -> Counters:
        """Return the counters with which the run goes on.

        A loop of your own calls this on every rank after it has loaded a checkpoint and before it
        makes its data iterators. Collective over the default process group (40 bytes per rank).
        Without a loaded optimizer, and in a restart, the counters are the given ones.

        Args:
            iteration: The training iterations that the checkpoint has done.
            consumed_train_samples: Its position in the training data.
            skipped_train_samples: How many of these samples were skipped.
            consumed_valid_samples: Its position in the validation data.

        Raises:
            AgreementError: The ranks have different counters.
        """
        before = Counters(
            iteration, consumed_train_samples, skipped_train_samples, consumed_valid_samples
        )
        facts = {name: str(value) for name, value in dataclasses.asdict(before).items()}
        ranks.agree_on("the counters", facts)
        resume = _resume()
        return before if resume is None else resume.count_from(before)

    @property
    def report(self) -> ResumeReport | None:
        """The report of the last complete load; None before it."""
        resume = _resume()
        return None if resume is None else resume.report


def enable(request: Request) -> Enabled:
    """Install the wrappers and set the request of this process.

    Raises:
        HostError: See `megatron_ext.enable`.
    """
    if current.launched is not None:
        if current.launched != request:
            raise HostError(_twice(current.launched, request))
        return Enabled()
    if getattr(global_args(), "optimizer_class", None) is not None:
        raise HostError(
            "megatron_ext.enable with --optimizer-class: the flags on the command line make the "
            "policy of this run already. Leave one of the two out"
        )
    if _is_one_built():
        raise HostError(
            "megatron_ext.enable was called after an optimizer was built: expected the call before "
            "megatron.core.optimizer.get_megatron_optimizer. Call it first, for example where your "
            "script imports Megatron"
        )
    installing.install()
    classes.resolve_class(request.optimizer_class)
    session.launch_request(request)
    return Enabled()


def _resume() -> Resume | None:
    return None if current.member is None else current.member.resume


def _is_one_built() -> bool:
    """Whether there is an optimizer of Megatron's in this process."""
    if current.built:
        return True
    if CORE not in sys.modules:
        return False
    base = importlib.import_module(f"{CORE}.optimizer").MegatronOptimizer
    gc.collect()
    # isinstance would ask an object for __class__, which imports something in lazy modules.
    return any(issubclass(type(one), base) for one in gc.get_objects())


def _twice(first: Request, second: Request) -> str:
    """Describe how the requests of two calls differ."""
    asked = [_facts(request) for request in (first, second)]
    lines = [
        f"{name} is {asked[0][name]} and then {value}"
        for name, value in asked[1].items()
        if asked[0][name] != value
    ]
    return (
        f"megatron_ext.enable was called twice with different requests: {'; '.join(lines)}. "
        "A process has one policy: make it in one place"
    )


def _facts(request: Request) -> dict[str, str]:
    own = {f.name: getattr(request, f.name) for f in dataclasses.fields(request)}
    del own["policy"]
    return {name: str(value) for name, value in {**own, **request.policy.facts()}.items()}
