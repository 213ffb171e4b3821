"""A real Megatron training run of a few thousand parameters, on the ranks of the current process
group: build, train, save, load. Stock Megatron only; this package is never imported here.

Works with megatron-core 0.14.0, 0.15.3, 0.16.1, 0.17.1, 0.18.2 and 0.19.2.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import offload, te_extension

VOCAB, SEQUENCE, GLOBAL_BATCH, MICRO_BATCH = 64, 8, 8, 2

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

#: How --use-precision-aware-optimizer stores the state, which needs Transformer Engine's FusedAdam.
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16 exp_avg": {"exp_avg_dtype": torch.bfloat16},
    "bf16": {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16},
    "fp16": {"exp_avg_dtype": torch.float16, "exp_avg_sq_dtype": torch.float16},
    "fp8 and fp16": {"exp_avg_dtype": torch.uint8, "exp_avg_sq_dtype": torch.float16},
    "fp16 masters": {"main_params_dtype": torch.float16},
    "remainders": {"store_param_remainders": True},
}


@dataclass(frozen=True)
class Hyper:
    """The arguments a phase change changes."""

    lr: float = 3e-3
    min_lr: float = 3e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    train_iters: int = 40
    warmup_iters: int = 2
    decay_style: str = "cosine"
    decoupled_lr: float | None = None
    decoupled_min_lr: float | None = None
    clip_grad: float = 1.0
    start_wd: float | None = None
    end_wd: float | None = None
    wd_incr_style: str = "constant"
    extra_group: bool = False
    loss_factor: float = 1.0
    loss_scale: float = 2.0**16


@dataclass(frozen=True)
class Layout:
    """How the model is spread and how it is saved."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    experts: int | None = None
    dtype: str = "bf16"
    distributed: bool = True
    format: str = "dp_reshardable"  # or fully_reshardable, torch
    adam: str = "fused"  # or torch, offload, overlapped offload
    instances: int = 1
    overlap: bool = False
    hidden: int = 16
    layers: int | None = None
    gated: bool = False
    optimizer: str = "adam"
    vocab: int = VOCAB
    tied: bool = False
    parallel_load: bool = False
    trained: str = ""  # a regular expression of names; other parameters are frozen
    qk_norm: bool = False
    mtp: int | None = None
    rope: bool = False
    bias: bool = True
    by_layer: bool = False  # layers are stored separately
    precision: str = ""  # of PRECISIONS
    scalar: str = "adam"  # what Muon leaves to another optimizer
    layer_wise: bool = False  # whole parameters on each rank
    momentum: float = 0.9  # of SGD


@dataclass
class Run:
    """One built run."""

    layout: Layout
    hyper: Hyper
    model: list[Any]
    optimizer: Any
    scheduler: Any
    iteration: int = 0
    losses: list[float] = field(default_factory=list)
    lrs: list[list[float]] = field(default_factory=list)
    wds: list[list[float]] = field(default_factory=list)


def build(
    layout: Layout,
    hyper: Hyper,
    get_optimizer: Callable[..., Any] | None = None,
    *,
    override: bool = True,
    use_checkpoint: bool = False,
) -> Run:
    """Build model, optimizer and scheduler like megatron.training does, from one seed."""
    from megatron.core import tensor_parallel
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    if layout.vpp is not None:
        _make_groups.cache_clear()  # Megatron's state of virtual stages begins anew too
    _make_groups(layout.tp, layout.pp, layout.vpp, layout.ep, layout.instances)
    torch.manual_seed(1234)
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    # Every rank builds a model from its own place in the layout, so parameters are set by name.
    model = _model(layout)
    config = _optimizer_config(layout, hyper)
    with inner_adam(layout.adam), _lion_by_the_library(layout):
        optimizer = (get_optimizer or get_megatron_optimizer)(
            config, model, **_overrides(config, hyper)
        )
    if layout.dtype == "fp16":
        for chunk in model:
            chunk.config.grad_scale_func = optimizer.scale_loss
    per_step = GLOBAL_BATCH
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=hyper.lr,
        min_lr=hyper.min_lr,
        lr_warmup_steps=hyper.warmup_iters * per_step,
        lr_decay_steps=hyper.train_iters * per_step,
        lr_decay_style=hyper.decay_style,
        start_wd=hyper.weight_decay if hyper.start_wd is None else hyper.start_wd,
        end_wd=hyper.weight_decay if hyper.end_wd is None else hyper.end_wd,
        wd_incr_steps=hyper.train_iters * per_step,
        wd_incr_style=hyper.wd_incr_style,
        override_opt_param_scheduler=override,
        use_checkpoint_opt_param_scheduler=use_checkpoint,
    )
    return Run(layout, hyper, model, optimizer, scheduler)


@functools.lru_cache(maxsize=1)
def _make_groups(tp: int, pp: int, vpp: int | None, ep: int, instances: int) -> None:
    """Make Megatron's process groups, unless they are those of the last call.

    The threads of the 23 groups stay for as long as the process does.
    """
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        expert_model_parallel_size=ep,
        num_distributed_optimizer_instances=instances,
        create_gloo_process_groups=True,
    )


def train(run: Run, steps: int) -> None:
    """Train; the global batch depends on the iteration only, not on the layout."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    data_parallel = parallel_state.get_data_parallel_world_size()
    microbatches = GLOBAL_BATCH // MICRO_BATCH // data_parallel
    schedule = get_forward_backward_func()
    with inner_adam(run.layout.adam):
        for _ in range(steps):
            run.lrs.append([float(g["lr"]) for g in run.optimizer.param_groups])
            run.wds.append([float(g["weight_decay"]) for g in run.optimizer.param_groups])
            for chunk in run.model:
                chunk.zero_grad_buffer()
            run.optimizer.zero_grad()
            iterators = [_batches(run.iteration, microbatches, run.layout.vocab) for _ in run.model]
            reduced = schedule(
                forward_step_func=functools.partial(_forward_step, run.hyper.loss_factor),
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=run.model if len(run.model) > 1 else run.model[0],
                num_microbatches=microbatches,
                seq_length=SEQUENCE,
                micro_batch_size=MICRO_BATCH,
                forward_only=False,
            )
            run.optimizer.step()
            run.scheduler.step(increment=GLOBAL_BATCH)
            run.iteration += 1
            run.losses.append(_global_loss(reduced))


def save(run: Run, directory: str, **extra: Any) -> None:
    """Write a checkpoint as megatron.training does, in the layout's format."""
    if run.layout.overlap:
        # The last step's weights are gathered only by the next forward pass.
        for chunk in run.model:
            chunk.disable_forward_pre_hook(param_sync=True)
            chunk.enable_forward_pre_hook()
    with inner_adam(run.layout.adam):
        if run.layout.format == "torch":
            _save_legacy(run, Path(directory))
            return
        from megatron.core import dist_checkpointing

        metadata = _metadata(run.layout)
        state = {
            "args": argparse.Namespace(iteration=run.iteration),
            "iteration": run.iteration,
            "opt_param_scheduler": run.scheduler.state_dict(),
            **_model_sd(run.model, metadata),
            **extra,
        }
        state["optimizer"] = run.optimizer.sharded_state_dict(
            {k: v for k, v in state.items() if k.startswith("model")}, metadata=metadata
        )
        if dist.get_rank() == 0:
            Path(directory).mkdir(parents=True, exist_ok=True)
        dist.barrier()
        kwargs = {"content_metadata": {k: v for k, v in metadata.items() if k != "dp_cp_group"}}
        dist_checkpointing.save(state, directory, **kwargs)
        dist.barrier()


def load(run: Run, directory: str, *, scheduler: bool = True) -> None:
    """Read a checkpoint as megatron.training.checkpointing.load_checkpoint does."""
    with inner_adam(run.layout.adam):
        if run.layout.format == "torch":
            state = _load_legacy(run, Path(directory))
        else:
            from megatron.core import dist_checkpointing

            metadata = _metadata(run.layout)
            request = _model_sd(run.model, metadata)
            request["optimizer"] = run.optimizer.sharded_state_dict(
                dict(request), is_loading=True, metadata=metadata
            )
            state = dist_checkpointing.load(request, directory, *_load_strategy(run.layout))
            for chunk, key in zip(run.model, _model_keys(run.model), strict=True):
                chunk.load_state_dict(state[key])
            run.optimizer.load_state_dict(state["optimizer"])
        if scheduler:
            run.scheduler.load_state_dict(state["opt_param_scheduler"])
        run.iteration = state["iteration"]


def _load_strategy(layout: Layout) -> tuple[Any, ...]:
    """As --ckpt-fully-parallel-load: data-parallel ranks read parts and exchange them."""
    if not layout.parallel_load:
        return ()
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelLoadStrategyWrapper,
    )
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return (FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group),)


def snapshot(run: Run) -> dict[str, Any]:
    """This rank's optimizer: hyperparameters, step and every shard, as plain arrays."""
    shards, steps = [], set()
    for inner in inner_optimizers(run.optimizer):
        for group in inner.param_groups:
            if group.get("step") is not None and group["params"]:
                steps.add(int(group["step"]))
            for param in group["params"]:
                state = inner.state.get(param, {})
                if "step" in state:
                    steps.add(int(state["step"]))
                shard = values_of(inner, param)
                shards.append({k: v.detach().float().clone().numpy() for k, v in shard.items()})
    weights = [
        p.detach().float().clone().numpy() for chunk in run.model for p in chunk.parameters()
    ]
    groups = snapshot_groups(run)
    return {"groups": groups, "shards": shards, "steps": sorted(steps), "weights": weights}


def values_of(inner: Any, param: torch.Tensor) -> dict[str, torch.Tensor]:
    """Master weights and moments of a key of the state, as values, however they are stored."""
    state = inner.state.get(param, {})
    keys = [k for k in ("exp_avg", "exp_avg_sq", "master_param") if k in state]
    read = getattr(inner, "get_unscaled_state", None)
    found = {k: state[k] if read is None else read(param, k) for k in keys}
    master = found.pop("master_param", param)
    if master.dtype == torch.int16:
        master = te_extension.joined(param, master)
    return {**found, "param": master}


def snapshot_groups(run: Run) -> list[dict[str, Any]]:
    """The hyperparameters of every group, without parameters and step."""
    return [
        {k: _plain(v) for k, v in group.items() if k not in ("params", "step")}
        for inner in inner_optimizers(run.optimizer)
        for group in inner.param_groups
    ]


def inner_optimizers(optimizer: Any) -> list[Any]:
    """The torch optimizers inside a Megatron optimizer."""
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    return [o.optimizer for o in chain]


@contextlib.contextmanager
def inner_adam(kind: str) -> Iterator[None]:
    """Let Megatron see torch's AdamW (its own fallback) instead of a FusedAdam, or offload."""
    core = importlib.import_module("megatron.core.optimizer")
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    if kind == "fused":
        yield
        return
    if "offload" in kind:
        with offload.emulated():
            yield
        return
    changes = [
        (core, "USING_PYTORCH_OPTIMIZER", True),
        (distributed, "HAVE_APEX_OR_TE", False),
        (distributed, "USING_APEX_OPTIMIZER", False),
        (distributed, "Adam", torch.optim.Adam),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextlib.contextmanager
def _lion_by_the_library(layout: Layout) -> Iterator[None]:
    """Build one DistributedOptimizer over Lion, as a caller of Megatron's function can.

    `get_megatron_optimizer` itself chains a Lion with an Adam, neither of them distributed.
    """
    core = importlib.import_module("megatron.core.optimizer")
    if layout.optimizer != "lion" or not layout.distributed:
        yield
        return

    def build(config: Any, model_chunks: Any, config_overrides: Any, **_: Any) -> Any:
        from megatron.core import parallel_state

        groups, buffers = core._get_param_groups_and_buffers(
            model_chunks, 0, config, config_overrides, lambda group: True, "buffers"
        )
        return core._get_megatron_optimizer_based_on_param_groups(
            config=config,
            model_chunks=model_chunks,
            param_groups=groups,
            per_model_buffers=buffers,
            model_parallel_group=parallel_state.get_model_parallel_group(),
            data_parallel_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            data_parallel_group_gloo=parallel_state.get_data_parallel_group_gloo(
                with_context_parallel=True
            ),
            data_parallel_group_idx=0,
            intra_dist_opt_group=parallel_state.get_intra_distributed_optimizer_instance_group(),
        )

    stock = core._get_megatron_emerging_optimizer
    core._get_megatron_emerging_optimizer = build
    try:
        yield
    finally:
        core._get_megatron_emerging_optimizer = stock


def scheduler_for(run: Run, hyper: Hyper) -> Any:
    """A scheduler of another phase on the same optimizer, at the same position."""
    position = run.scheduler.num_steps
    other = build_scheduler_like(run, hyper)
    other.step(increment=position)
    return other


def build_scheduler_like(run: Run, hyper: Hyper) -> Any:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        run.optimizer,
        init_lr=0.0,
        max_lr=hyper.lr,
        min_lr=hyper.min_lr,
        lr_warmup_steps=hyper.warmup_iters * GLOBAL_BATCH,
        lr_decay_steps=hyper.train_iters * GLOBAL_BATCH,
        lr_decay_style=hyper.decay_style,
        start_wd=hyper.weight_decay if hyper.start_wd is None else hyper.start_wd,
        end_wd=hyper.weight_decay if hyper.end_wd is None else hyper.end_wd,
        wd_incr_steps=hyper.train_iters * GLOBAL_BATCH,
        wd_incr_style=hyper.wd_incr_style,
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )


def _model(layout: Layout) -> list[Any]:
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    layers = layout.layers or (2 * layout.pp * (layout.vpp or 1) if layout.pp > 1 else 2)
    half = _DTYPES[layout.dtype]
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=layout.hidden,
        num_attention_heads=4,
        ffn_hidden_size=2 * layout.hidden,
        add_bias_linear=layout.bias and not layout.experts,
        gated_linear_unit=bool(layout.experts) or layout.gated,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        expert_model_parallel_size=layout.ep,
        num_moe_experts=layout.experts,
        moe_token_dispatcher_type="allgather",
        moe_router_topk=2,
        bf16=half is torch.bfloat16,
        fp16=half is torch.float16,
        params_dtype=half,
        pipeline_dtype=half,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        deterministic_mode=False,
        use_cpu_initialization=True,
        init_method_std=0.1,
        qk_layernorm=layout.qk_norm,
        mtp_num_layers=layout.mtp,
    )
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=layout.distributed,
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap and layout.distributed,
        grad_reduce_in_fp32=True,
        num_distributed_optimizer_instances=layout.instances,
        bucket_size=600 if layout.overlap else None,
    )
    chunks = []
    for stage in range(layout.vpp or 1):
        if layout.vpp and hasattr(parallel_state, "set_virtual_pipeline_model_parallel_rank"):
            parallel_state.set_virtual_pipeline_model_parallel_rank(stage)
        first: dict[str, Any] = {"vp_stage": stage} if layout.vpp else {}
        flags = {} if not layout.vpp else {"ignore_virtual": False, "vp_stage": stage}
        spec = get_gpt_layer_local_spec(
            num_experts=layout.experts, moe_grouped_gemm=False, qk_layernorm=layout.qk_norm
        )
        if layout.mtp:
            first["mtp_block_spec"] = get_gpt_mtp_block_spec(
                config, spec, use_transformer_engine=False
            )
        if layout.mtp or layout.rope:
            first["position_embedding_type"] = "rope"  # MTP needs it
        chunk: Any = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=layout.vocab,
            max_sequence_length=SEQUENCE,
            pre_process=parallel_state.is_pipeline_first_stage(**flags),
            post_process=parallel_state.is_pipeline_last_stage(**flags),
            share_embeddings_and_output_weights=layout.tied,
            **first,
        )
        if half is not torch.float32:
            chunk = Float16Module(config, chunk)
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(re.search(layout.trained, name) is not None)
        chunks.append(
            DistributedDataParallel(
                config=config, ddp_config=ddp, module=chunk, disable_bucketing=stage > 0
            )
        )
    for chunk in chunks:
        chunk.broadcast_params()
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = None
    if layout.overlap:
        config.no_sync_func = [c.no_sync for c in chunks]
        config.no_sync_func = config.no_sync_func[0] if len(chunks) == 1 else config.no_sync_func
    return chunks


def _optimizer_config(layout: Layout, hyper: Hyper) -> Any:
    from megatron.core.optimizer import OptimizerConfig

    half = _DTYPES[layout.dtype]
    known = inspect.signature(OptimizerConfig).parameters
    wanted = dict(
        optimizer=layout.optimizer,
        lr=hyper.lr,
        min_lr=hyper.min_lr,
        decoupled_lr=hyper.decoupled_lr,
        decoupled_min_lr=hyper.decoupled_min_lr,
        weight_decay=hyper.weight_decay,
        adam_beta1=hyper.betas[0],
        adam_beta2=hyper.betas[1],
        adam_eps=hyper.eps,
        clip_grad=hyper.clip_grad,
        bf16=half is torch.bfloat16,
        fp16=half is torch.float16,
        initial_loss_scale=hyper.loss_scale,
        params_dtype=half,
        use_distributed_optimizer=layout.distributed,
        overlap_param_gather=layout.overlap and layout.distributed,
        optimizer_cpu_offload="offload" in layout.adam,
        optimizer_offload_fraction=0.5,
        overlap_cpu_optimizer_d2h_h2d=layout.adam == "overlapped offload",
        muon_scalar_optimizer=layout.scalar,
        sgd_momentum=layout.momentum,
        use_layer_wise_distributed_optimizer=layout.layer_wise,
        use_precision_aware_optimizer="offload" in layout.adam or bool(layout.precision),
    )
    if layout.precision:
        wanted |= {"store_param_remainders": False, **PRECISIONS[layout.precision]}
    return OptimizerConfig(**{k: v for k, v in wanted.items() if k in known})


def _overrides(config: Any, hyper: Hyper) -> dict[str, Any]:
    """Megatron's standard groups, and one more where the phase asks for it."""
    core = importlib.import_module("megatron.core.optimizer")
    if not hasattr(core, "get_standard_config_overrides"):
        assert not hyper.extra_group
        return {}  # before 0.16 those are the only groups
    overrides = dict(core.get_standard_config_overrides(config))
    if hyper.extra_group:
        overrides[core.ParamKey(name="*linear_fc2.weight")] = {
            "max_lr": hyper.lr / 2,
            "min_lr": hyper.min_lr / 2,
        }
    return {"config_overrides": overrides}


def _forward_step(factor: float, data_iterator: Any, model: Any) -> tuple[Any, Callable[..., Any]]:
    tokens, labels, positions, mask = next(data_iterator)
    output = model(tokens, positions, mask, labels=labels)

    def loss_of(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = output.float().mean() * factor
        return loss, {"loss": loss.detach().clone()}

    return output, loss_of


def _batches(iteration: int, microbatches: int, vocab: int) -> Iterator[tuple[torch.Tensor, ...]]:
    from megatron.core import parallel_state

    first = parallel_state.get_data_parallel_rank() * microbatches
    for batch in range(first, first + microbatches):
        generator = torch.Generator().manual_seed(iteration * GLOBAL_BATCH + batch)
        # A skewed distribution: something to learn, so that moments differ between parameters.
        shape = (MICRO_BATCH, SEQUENCE + 1)
        text = torch.randint(0, vocab, shape, generator=generator) ** 2 % vocab
        positions = torch.arange(SEQUENCE).expand(MICRO_BATCH, -1)
        mask = torch.ones(1, 1, SEQUENCE, SEQUENCE).tril() < 0.5
        yield text[:, :-1].contiguous(), text[:, 1:].contiguous(), positions, mask


def _global_loss(reduced: list[dict[str, torch.Tensor]]) -> float:
    """The mean loss of the global batch, the same number on every rank."""
    total = torch.zeros(2, dtype=torch.float64)
    for entry in reduced:
        total += torch.tensor([float(entry["loss"]), 1.0], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total[0] / total[1])


def _metadata(layout: Layout) -> dict[str, Any]:
    from megatron.core import parallel_state

    metadata: dict[str, Any] = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    if layout.by_layer:
        metadata["non_homogeneous_layers"] = True
    if layout.distributed:
        metadata["distrib_optim_sharding_type"] = layout.format
    return metadata


def _model_keys(model: list[Any]) -> list[str]:
    return ["model"] if len(model) == 1 else [f"model{i}" for i in range(len(model))]


def _model_sd(model: list[Any], metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        key: unwrapped(chunk).sharded_state_dict(metadata=dict(metadata))
        for key, chunk in zip(_model_keys(model), model, strict=True)
    }


def unwrapped(chunk: Any) -> Any:
    """The model without its wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _legacy_files(directory: Path) -> tuple[Path, Path]:
    from megatron.core import parallel_state

    tp = parallel_state.get_tensor_model_parallel_rank()
    pp = parallel_state.get_pipeline_model_parallel_rank()
    ep = parallel_state.get_expert_model_parallel_rank()
    base = directory / f"mp_rank_{tp:02d}_{pp:03d}_{ep:03d}"
    return base / "model_optim_rng.pt", base / "distrib_optim.pt"


def _save_legacy(run: Run, directory: Path) -> None:
    from megatron.core import parallel_state

    model_file, optimizer_file = _legacy_files(directory)
    writes = parallel_state.get_data_parallel_rank() == 0 or run.layout.ep > 1
    if writes:
        model_file.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "iteration": run.iteration,
            "optimizer": run.optimizer.state_dict(),
            "opt_param_scheduler": run.scheduler.state_dict(),
        }
        for key, chunk in zip(_model_keys(run.model), run.model, strict=True):
            state[key] = unwrapped(chunk).state_dict_for_save_checkpoint()
        torch.save(state, model_file)
    dist.barrier()
    if run.layout.distributed:
        run.optimizer.save_parameter_state(str(optimizer_file))
    dist.barrier()


def _load_legacy(run: Run, directory: Path) -> dict[str, Any]:
    model_file, optimizer_file = _legacy_files(directory)
    state = torch.load(model_file, weights_only=False)
    for chunk, key in zip(run.model, _model_keys(run.model), strict=True):
        chunk.load_state_dict(state[key])
    run.optimizer.load_state_dict(copy.copy(state["optimizer"]))
    if run.layout.distributed:
        run.optimizer.load_parameter_state(str(optimizer_file))
    return state


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def changed(hyper: Hyper, **changes: Any) -> Hyper:
    """Another phase's arguments."""
    return replace(hyper, **changes)
