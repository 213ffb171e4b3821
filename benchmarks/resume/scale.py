"""Planning and merging for one rank of 16,384 of a mixture of experts of a trillion parameters.

No tensor is made: the parameters' names and shapes, and the param_groups, are what planning sees.
"""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.moe import Experts
from megatron_ext.base import ranks
from megatron_ext.checkpoint.state import SavedOptimizer
from megatron_ext.plan.decisions import Circumstances, ResumePlan
from megatron_ext.plan.hyperparameters import plan_resume
from megatron_ext.plan.moments import plan_moments
from megatron_ext.plan.parameters import Parameter
from megatron_ext.policy.match import Match, MomentRule
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.resume.merge import merge_distributed
from megatron_ext.rules.elementwise import Scale


@dataclass(frozen=True)
class Moe(Experts):
    """A mixture of experts.

    Args:
        vocabulary: Rows of the embedding, and of the output layer.
    """

    vocabulary: int = 131072

    @property
    def elements(self) -> int:
        """Of the whole model, by the closed form."""
        h = self.hidden
        rest = self.experts * h + 4 * h * h + 2 * h
        return self.expert_elements + self.layers * rest + 2 * self.vocabulary * h + h

    def parameters(self, stage: int, expert_rank: int) -> list[Parameter]:
        """What the ranks of a pipeline stage and an expert-parallel rank hold, whole."""
        h = self.hidden
        per_stage, local = self.layers // self.pipeline, self.experts // self.expert
        out = []
        if stage == 0:
            out.append(Parameter("embedding.word_embeddings.weight", (self.vocabulary, h), 0))
        for layer in range(stage * per_stage, (stage + 1) * per_stage):
            at = f"decoder.layers.{layer}"
            out += [
                Parameter(f"{at}.input_layernorm.weight", (h,), 1),
                Parameter(f"{at}.self_attention.linear_qkv.weight", (3 * h, h), 0),
                Parameter(f"{at}.self_attention.linear_proj.weight", (h, h), 0),
                Parameter(f"{at}.pre_mlp_layernorm.weight", (h,), 1),
                Parameter(f"{at}.mlp.router.weight", (self.experts, h), 0),
            ]
            for expert in range(expert_rank * local, (expert_rank + 1) * local):
                name = f"{at}.mlp.experts.local_experts.{expert}"
                out += [Parameter(f"{name}.{m}.weight", s, 2) for m, s in self.shapes.items()]
        if stage == self.pipeline - 1:
            out.append(Parameter("decoder.final_layernorm.weight", (h,), 1))
            out.append(Parameter("output_layer.weight", (self.vocabulary, h), 0))
        return out


def simulate(moe: Moe | None = None) -> dict[str, Any]:
    """One rank's plan and merge, and a count over all ranks.

    Returns:
        Seconds and bytes (of Python's allocator) of one rank's view; elements by the plans of all
        ranks and by the closed form; bytes of the plan's digest, and of the agreement for a rank.
    """
    moe = moe or Moe()
    tracemalloc.start()
    begin = time.perf_counter()
    elements, plan = _one_rank(moe, 0, 0)
    seconds = time.perf_counter() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    dense, experts = _planned(moe)
    return {
        "parameters": moe.elements,
        "ranks": moe.ranks,
        "seconds": seconds,
        "bytes": peak,
        "elements on this rank": elements,
        "planned": dense + experts,
        "of experts": experts,
        "of experts, closed form": moe.expert_elements,
        "of experts, twice as many": _planned(replace(moe, experts=2 * moe.experts))[1],
        "digest": len(plan.digest()) // 2,
        "agreement": ranks.BYTES_PER_RANK,
    }


def _planned(moe: Moe) -> tuple[int, int]:
    """Elements that all ranks' plans cover together, not counting copies: dense, and experts."""
    dense = experts = 0
    for stage in range(moe.pipeline):
        for expert_rank in range(moe.expert):
            plans = _plans(moe, stage, expert_rank)
            here = sum(n for name, n in plans.items() if ".local_experts." in name)
            experts += here
            if expert_rank == 0:
                dense += sum(plans.values()) - here
    return dense, experts


def _plans(moe: Moe, stage: int, expert_rank: int) -> dict[str, int]:
    saved, groups = _groups()
    plan = _plan(saved, groups)
    plans = plan_moments(plan, moe.parameters(stage, expert_rank), saved.groups, groups)
    return {
        p.parameter.name: sum((r.last - r.first) * p.parameter.row_elements for r in p.rows)
        for p in plans
    }


def _one_rank(moe: Moe, stage: int, expert_rank: int) -> tuple[int, ResumePlan]:
    saved, groups = _groups()
    plan = _plan(saved, groups)
    plans = plan_moments(plan, moe.parameters(stage, expert_rank), saved.groups, groups)
    state = {"optimizer": {"param_groups": [dict(g, step=saved.step) for g in saved.groups]}}
    merge_distributed(plan, state, groups)
    elements = sum((r.last - r.first) * p.parameter.row_elements for p in plans for r in p.rows)
    return elements, plan


def _plan(saved: SavedOptimizer, groups: list[dict[str, Any]]) -> ResumePlan:
    rules = (
        MomentRule(Match("*.local_experts.*"), Scale(0.5), Scale(0.25)),
        MomentRule(Match("re:.*(layernorm|router).*"), Scale(0.9), Scale(0.81)),
    )
    circumstances = Circumstances(clip_grad=1.0, global_batch_size=(2048, 4096))
    return plan_resume(ResumePolicy(rules=rules), saved, groups, circumstances)


def _groups() -> tuple[SavedOptimizer, list[dict[str, Any]]]:
    """Dense, without weight decay, experts: saved, and current with another lr."""

    def group(wd_mult: float, expert: bool, lr: float) -> dict[str, Any]:
        return {
            "wd_mult": wd_mult,
            "lr_mult": 1.0,
            "is_expert_parallel": expert,
            "is_decoupled_lr": False,
            "lr": lr,
            "max_lr": lr,
            "min_lr": lr / 10,
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "weight_decay": 0.1,
            "bias_correction": True,
        }

    kinds = ((1.0, False), (0.0, False), (1.0, True))
    saved = tuple(group(*kind, 3e-4) for kind in kinds)
    current = [{**group(*kind, 3e-5), "params": []} for kind in kinds]
    return SavedOptimizer(groups=saved, step=100_000), current
