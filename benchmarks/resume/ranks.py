"""One rank of a series: train a step, save, then resume in turn and check every result.

Started by torchrun; rank 0 writes the samples.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import random
import sys
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext import cpu

from .cases import FEW, KEEP, SIZES, STOCK, VARIANTS, Case, Variant
from .probes import Sample, drop_from_cache, reads, timed

_SEQUENCE, _VOCAB = 16, 512
_MOMENTS = ("exp_avg", "exp_avg_sq")
_ALL = frozenset(v.name for v in VARIANTS if v.often)
_FOR_MEMORY = frozenset({STOCK, KEEP})


def main(case: Case, what: str, output: Path) -> None:
    """Measure a series and write what was found."""
    cpu.install()
    dist.init_process_group("nccl" if torch.cuda.is_available() and not cpu.active() else "gloo")
    torch.set_num_threads(max(1, torch.get_num_threads() // dist.get_world_size()))
    with _directory() as directory:
        series = Series(case, directory)
        samples = series.run(*((_ALL, FEW) if what == "times" else (_FOR_MEMORY, 1)))
    if dist.get_rank() == 0:
        content = {
            "parameters": series.parameters,
            "samples": samples,
            "step": series.structure,
            "collectives": series.collectives,
        }
        output.write_text(json.dumps(content))
    dist.destroy_process_group()


class Series:
    """A model, its checkpoint, and resumes from it."""

    def __init__(self, case: Case, directory: Path) -> None:
        """Build the model, make moments by one step, and save."""
        self.case, self.directory = case, directory
        self.model = _model(case)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.structure: dict[str, Any] = {}
        self.collectives: dict[str, Any] = {}
        optimizer = self._optimizer(VARIANTS[0])
        _step(self.model, optimizer)
        _step(self.model, optimizer)
        self._save(optimizer)
        # The values of before the resume, to compare with.
        self.saved = [
            {k: v.clone() for k, v in tensors.items()} for tensors in _state(optimizer).values()
        ]

    def run(self, often: Container[str], few: int) -> list[dict[str, Any]]:
        """All variants in turn, in another order each time, some in the first turns only.

        The first turn warms up, and counts the collectives: to count takes time. A cold cache
        needs neither: its collectives are those of the warm one.
        """
        samples = []
        order = random.Random(0)
        for repeat in range(self.case.repeats + 1):
            due = [
                v for v in VARIANTS if v.name in often or (repeat <= few and (repeat or not v.cold))
            ]
            for variant in order.sample(due, len(due)):
                sample = self._resume(variant, count=not repeat)
                everyone: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(everyone, sample.plain())
                if repeat:
                    samples.append(
                        {"variant": variant.name, "repeat": repeat, **_over_ranks(everyone)}
                    )
        return samples

    def _resume(self, variant: Variant, *, count: bool) -> Sample:
        if variant.cold and dist.get_rank() == 0:
            drop_from_cache(self.directory)
        sample = Sample(count=count)
        dist.barrier()
        sample.begin()
        with sample.part("build"):
            optimizer = self._optimizer(variant)
        with contextlib.ExitStack() as stack:
            stack.enter_context(reads(sample))
            if variant.policy is not None:
                from megatron_ext.resume import apply_rules

                stack.enter_context(timed(apply_rules, "apply_rules", sample, "transform"))
            if self.case.format == "torch":
                self._load_legacy(optimizer, sample)
            else:
                self._load(optimizer, sample, stock=variant.policy is None)
        self._check(optimizer, variant)
        with sample.part("first step"):
            _step(self.model, optimizer)
        if count:
            self.collectives[variant.name] = sample.collectives
            self.structure[variant.name] = {
                "function": f"{type(_only(optimizer)).step.__qualname__}",
                "collectives": sample.collectives["first step"],
            }
        return sample

    def _load(self, optimizer: Any, sample: Sample, *, stock: bool) -> None:
        from megatron.core import dist_checkpointing

        load = dist_checkpointing.load
        if stock:  # without what this package has put around it
            load = inspect.unwrap(load)
        metadata = _metadata(self.case)
        with sample.part("sharded_state_dict"):
            request = {"model": _bare(self.model).sharded_state_dict(metadata=dict(metadata))}
            request["optimizer"] = optimizer.sharded_state_dict(
                {"model": request["model"]}, is_loading=True, metadata=metadata
            )
        with sample.part("read"):
            state = load(request, str(self.directory / "dist"), *_strategy(self.case))
        del request
        with sample.part("load_state_dict"):
            _bare(self.model).load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])

    def _load_legacy(self, optimizer: Any, sample: Sample) -> None:
        with sample.part("load_state_dict"), timed(torch, "load", sample, "read"):
            state = torch.load(str(self.directory / "model.pt"), weights_only=False)
            _bare(self.model).load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            del state
            optimizer.load_parameter_state(str(self.directory / "optimizer.pt"))
        sample.seconds["load_state_dict"] -= sample.seconds["read"]

    def _save(self, optimizer: Any) -> None:
        from megatron.core import dist_checkpointing

        if self.case.format == "torch":
            if dist.get_rank() == 0:
                state = {
                    "model": _bare(self.model).state_dict_for_save_checkpoint(),
                    "optimizer": optimizer.state_dict(),
                }
                torch.save(state, self.directory / "model.pt")
            optimizer.save_parameter_state(str(self.directory / "optimizer.pt"))
        else:
            metadata = _metadata(self.case)
            state = {"model": _bare(self.model).sharded_state_dict(metadata=dict(metadata))}
            state["optimizer"] = optimizer.sharded_state_dict(dict(state), metadata=metadata)
            if dist.get_rank() == 0:
                (self.directory / "dist").mkdir()
            dist.barrier()
            plain = {k: v for k, v in metadata.items() if k != "dp_cp_group"}
            dist_checkpointing.save(state, str(self.directory / "dist"), content_metadata=plain)
        dist.barrier()

    def _optimizer(self, variant: Variant) -> Any:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        bf16 = self.case.dtype == "bf16"
        config = OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            min_lr=1e-4,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=True,
        )
        if variant.policy is None:
            return get_megatron_optimizer(config, [self.model])
        import megatron_ext
        from megatron_ext.policy import yaml_file

        return megatron_ext.get_megatron_optimizer(
            config, [self.model], policy=yaml_file.loads(variant.policy), verify=variant.verify
        )

    def _check(self, optimizer: Any, variant: Variant) -> None:
        """Every element of the state, bit for bit.

        Raises:
            AssertionError: A resume that does not give what it should.
        """
        factors = dict(zip(_MOMENTS, variant.moments, strict=True))
        for (name, found), saved in zip(_state(optimizer).items(), self.saved, strict=True):
            chosen = variant.only in name
            for key, value in saved.items():
                wanted = value * factors[key] if chosen and key in factors else value
                if not torch.equal(found[key], wanted):
                    raise AssertionError(f"{self.case}, {variant.name}: {key} of {name} is wrong")


def _state(optimizer: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Name of a parameter -> this rank's master weights and moments of it."""
    member = _only(optimizer)
    names = {id(p): n for chunk in member.model_chunks for n, p in chunk.named_parameters()}
    out = {}
    for model_param in member.model_param_gbuf_map:
        group, order = member.model_param_group_index_map[model_param]
        main = member.optimizer.param_groups[group]["params"][order]
        moments = {k: member.optimizer.state[main][k] for k in _MOMENTS}
        out[names[id(model_param)].replace("module.", "")] = {"param": main.detach(), **moments}
    return out


def _only(optimizer: Any) -> Any:
    (member,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return member


def _step(model: Any, optimizer: Any) -> None:
    """One update with gradients that need no forward pass, the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    for buffer in model.buffers:
        data = buffer.grad_data
        noise = torch.randn(min(data.numel(), 4099), generator=generator) * 1e-2
        data.copy_(noise.repeat(-(-data.numel() // len(noise)))[: data.numel()])
    optimizer.step()


def _model(case: Case) -> Any:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    parallel_state.initialize_model_parallel(create_gloo_process_groups=True)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    hidden, layers = SIZES[case.size]
    bf16 = case.dtype == "bf16"
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=hidden // 64,
        ffn_hidden_size=4 * hidden,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=True,
    )
    model: Any = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=_VOCAB,
        max_sequence_length=_SEQUENCE,
    )
    if torch.cuda.is_available() and not cpu.active():
        model = model.cuda()
    if bf16:
        model = Float16Module(config, model)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    return DistributedDataParallel(config=config, ddp_config=ddp, module=model)


def _bare(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model


def _metadata(case: Case) -> dict[str, Any]:
    from megatron.core import parallel_state

    return {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": case.format,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _strategy(case: Case) -> tuple[Any, ...]:
    if not case.parallel_load:
        return ()
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelLoadStrategyWrapper,
    )
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return (FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group),)


def _over_ranks(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The slowest rank's seconds, the largest peak, the sum of what is read."""

    def most(key: str) -> dict[str, Any]:
        return {k: max(s[key][k] for s in samples) for k in samples[0][key]}

    return {
        "seconds": most("seconds"),
        "peak": most("peak"),
        "device_peak": most("device_peak"),
        "payload": sum(s["payload"] for s in samples),
        "stored": sum(s["stored"] for s in samples),
    }


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """One directory for all ranks."""
    made = tempfile.TemporaryDirectory() if dist.get_rank() == 0 else contextlib.nullcontext("")
    with made as name:
        shared = [name]
        dist.broadcast_object_list(shared, 0)
        yield Path(shared[0])
        dist.barrier()


if __name__ == "__main__":
    main(Case(**json.loads(sys.argv[1])), sys.argv[2], Path(sys.argv[3]))
