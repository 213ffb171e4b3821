"""The names of Megatron that this package uses, and the versions it is tested with."""

from __future__ import annotations

import dis
import functools
import importlib
import importlib.util
import inspect
import platform
import warnings
from dataclasses import dataclass
from types import CodeType
from typing import Any

from packaging.version import Version

from ..errors import HostError
from . import megatron

#: The versions that the tests run with. Outside of [first, last minor] a warning is given once.
TESTED = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")

CORE = "megatron.core.optimizer"

TRAINING = "megatron.training"


@dataclass(frozen=True)
class HostName:
    """One name of Megatron that this package uses.

    Args:
        module: The module that has the name.
        attribute: The name in the module; dotted for a class attribute.
        parameters: Parameters that its signature must have.
        rebound: Whether `install` replaces it.
        instance: Whether it is an attribute of instances, which methods of the class assign.
        since: First megatron-core version that has the name.
        reference: File and line in megatron-core 0.19.2, and why the name is needed.
    """

    module: str
    attribute: str
    parameters: tuple[str, ...] = ()
    rebound: bool = False
    instance: bool = False
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
    HostName(CORE, "Adam", reference="core/optimizer/__init__.py:14; which one it is (env)"),
    HostName(CORE, "DistributedOptimizer", reference="core/optimizer/__init__.py:54"),
    HostName(CORE, "Float16OptimizerWithFloat16Params", reference="core/optimizer/__init__.py:64"),
    HostName(CORE, "FP32Optimizer", reference="core/optimizer/__init__.py:65"),
    HostName(
        CORE,
        "_get_param_groups",
        ("model_chunks", "config", "config_overrides"),
        reference="core/optimizer/__init__.py:299; the param_groups that plan shows",
    ),
    HostName(
        CORE,
        "get_standard_config_overrides",
        ("config",),
        reference="core/optimizer/__init__.py:92; what plan makes param_groups with",
    ),
    HostName(
        CORE,
        "get_mup_config_overrides",
        ("config", "mup_width_mult", "optimizer_type"),
        since="0.17.0",
        reference="core/optimizer/__init__.py:130; the same with --use-mup",
    ),
    HostName(CORE, "OptimizerConfig", ("lr",), reference="core/optimizer/__init__.py:75; the same"),
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
        "MegatronOptimizer",
        reference="core/optimizer/optimizer.py:196; whether an optimizer was built before enable",
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
        "megatron.core.optimizer_param_scheduler",
        "OptimizerParamScheduler.__init__",
        ("optimizer", "init_lr", "lr_warmup_steps", "wsd_decay_steps", "lr_wsd_decay_style"),
        reference="core/optimizer_param_scheduler.py:110; run without an optimizer, for curves",
    ),
    HostName(
        "megatron.core.dist_checkpointing",
        "load",
        ("sharded_state_dict", "checkpoint_dir"),
        rebound=True,
        reference="core/dist_checkpointing/serialization.py:69; explains shards that do not fit",
    ),
    HostName(
        "megatron.core.dist_checkpointing.validation",
        "validate_sharding_integrity",
        ("global_metadata",),
        reference="core/dist_checkpointing/validation.py:363; checks a request before moments that "
        "are overwritten are left out of it (sharded.py)",
    ),
    HostName(
        "megatron.core.dist_checkpointing.validation",
        "determine_global_metadata",
        ("sharded_state_dict",),
        reference="core/dist_checkpointing/validation.py:478; the request of all ranks",
    ),
    HostName(
        "megatron.core.dist_checkpointing.validation",
        "StrictHandling.requires_global_app_metadata",
        ("val",),
        reference="core/dist_checkpointing/validation.py:92; whether what is left out counts as "
        "missing",
    ),
    HostName(
        "megatron.core.dist_checkpointing.validation",
        "parse_strict_flag",
        ("strict",),
        reference="core/dist_checkpointing/validation.py:103; --dist-ckpt-strictness",
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
        "megatron.core.distributed.param_and_grad_buffer",
        "_ParamAndGradBucket.__init__",
        ("offset", "numel_unpadded"),
        reference="core/distributed/param_and_grad_buffer.py:112; where a bucket lies in its "
        "buffer, whose param_index_map says where the parameters are (saving.py)",
    ),
    HostName(
        f"{CORE}.optimizer",
        "MixedPrecisionOptimizer.step_with_ready_grads",
        reference="core/optimizer/optimizer.py:777; overridden, also in FP32Optimizer (:1285) and "
        "DistributedOptimizer: the first step is checked",
    ),
    HostName(
        f"{CORE}.optimizer",
        "FP32Optimizer.step_with_ready_grads",
        reference="core/optimizer/optimizer.py:1285; the same",
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
        reference="training/arguments.py:121; adds this package's flags",
    ),
    HostName(
        f"{TRAINING}.checkpointing",
        "load_checkpoint",
        ("ddp_model", "optimizer", "opt_param_scheduler"),
        rebound=True,
        reference="training/checkpointing.py:2066; bound in training/training.py too",
    ),
    HostName(
        f"{TRAINING}.checkpointing",
        "check_checkpoint_args",
        ("checkpoint_args",),
        rebound=True,
        reference="training/checkpointing.py:143; reads the saved arguments",
    ),
    HostName(
        f"{TRAINING}.checkpointing",
        "_load_base_checkpoint",
        ("load_dir", "args", "rank0"),
        rebound=True,
        reference="training/checkpointing.py:1633; the counters and the phase, before "
        "Megatron applies them",
    ),
    HostName(
        f"{TRAINING}.global_vars",
        "get_tensorboard_writer",
        reference="training/global_vars.py:42; scalars and the plan of a resume (writers.py)",
    ),
    HostName(
        f"{TRAINING}.global_vars",
        "get_wandb_writer",
        reference="training/global_vars.py:48; the wandb module itself, on the last rank",
    ),
    HostName(
        f"{TRAINING}.training",
        "build_train_valid_test_data_loaders",
        ("build_train_valid_test_datasets_provider",),
        rebound=True,
        reference="training/training.py:4510; recomputes a data position of 0 (line 4523)",
    ),
    HostName(
        f"{TRAINING}.training",
        "get_train_valid_test_num_samples",
        rebound=True,
        reference="training/training.py:4466; how much data the run needs",
    ),
    HostName(
        f"{TRAINING}.training",
        "train",
        rebound=True,
        reference="training/training.py:3342; a dry run ends before it",
    ),
    HostName(
        f"{CORE}.layer_wise_optimizer",
        "LayerWiseDistributedOptimizer",
        since="0.18.0",
        reference="core/optimizer/layer_wise_optimizer.py:167; the optimizer of whole parameters",
    ),
    HostName(
        f"{CORE}.layer_wise_optimizer",
        "LayerWiseDistributedOptimizer.sharded_state_dict",
        ("model_sharded_state_dict", "is_loading"),
        since="0.18.0",
        reference="core/optimizer/layer_wise_optimizer.py:926; overridden",
    ),
    HostName(
        f"{CORE}.layer_wise_optimizer",
        "Float16OptimizerWithFloat16Params",
        since="0.18.0",
        reference="core/optimizer/layer_wise_optimizer.py:20; what it wraps its parts in",
    ),
    HostName(
        f"{CORE}.distrib_optimizer",
        "DistributedOptimizer.optimizer_state_keys",
        since="0.19.0",
        reference="core/optimizer/distrib_optimizer.py:805; the state that a load allocates; "
        "overridden",
    ),
    HostName(
        f"{CORE}.optimizer",
        "MegatronOptimizer.init_state_fn",
        instance=True,
        reference="core/optimizer/optimizer.py:214; allocates the state for a load; set for SGD",
    ),
    HostName(
        f"{CORE}.distrib_optimizer",
        "DistributedOptimizer.buffers",
        instance=True,
        reference="core/optimizer/distrib_optimizer.py:710; the buffers whose buckets hold the "
        "parameters",
    ),
    HostName(
        f"{CORE}.distrib_optimizer",
        "DistributedOptimizer.data_parallel_group",
        instance=True,
        reference="core/optimizer/distrib_optimizer.py:712; which rank reads a legacy file",
    ),
    HostName(
        f"{CORE}.distrib_optimizer",
        "DistributedOptimizer.gbuf_ranges",
        instance=True,
        reference="core/optimizer/distrib_optimizer.py:727; which part of each bucket this "
        "rank holds "
        "core/optimizer/distrib_optimizer.py:727; which part of each bucket this rank holds",
    ),
    HostName(
        f"{CORE}.distrib_optimizer",
        "DistributedOptimizer.model_chunks",
        instance=True,
        reference="core/optimizer/distrib_optimizer.py:682; the model, for the names of its "
        "parameters "
        "core/optimizer/distrib_optimizer.py:682; the model, for the names of its parameters",
    ),
    HostName(
        f"{CORE}.distrib_optimizer",
        "DistributedOptimizer.model_param_gbuf_map",
        instance=True,
        reference="core/optimizer/distrib_optimizer.py:747; the parameters that this rank holds",
    ),
    HostName(
        f"{CORE}.cpu_offloading.hybrid_optimizer",
        "HybridDeviceOptimizer.dummy_step",
        reference="core/optimizer/cpu_offloading/hybrid_optimizer.py:453; makes its state",
    ),
    HostName(
        f"{CORE}.cpu_offloading.hybrid_optimizer",
        "HybridDeviceOptimizer.param_to_inner_param",
        instance=True,
        reference="core/optimizer/cpu_offloading/hybrid_optimizer.py:189; its copies of weights",
    ),
    HostName(
        f"{CORE}.cpu_offloading.hybrid_optimizer",
        "HybridDeviceOptimizer.sub_optimizers",
        reference="core/optimizer/cpu_offloading/hybrid_optimizer.py:466; the optimizers inside",
    ),
    HostName(
        f"{CORE}.cpu_offloading.hybrid_optimizer",
        "HybridDeviceOptimizer._sync_hdo_state_to_sub_optimizers",
        reference="core/optimizer/cpu_offloading/hybrid_optimizer.py:323; gives them the state",
    ),
    HostName(
        f"{CORE}.distrib_optimizer",
        "DistributedOptimizer.model_param_group_index_map",
        instance=True,
        reference="core/optimizer/distrib_optimizer.py:657; the param_group of a parameter",
    ),
    HostName(
        f"{CORE}.distrib_optimizer",
        "DistributedOptimizer.is_stub_optimizer",
        instance=True,
        reference="core/optimizer/distrib_optimizer.py:700; a rank without parameters",
    ),
    HostName(
        f"{CORE}.distrib_optimizer",
        "Range.start",
        instance=True,
        reference="core/optimizer/distrib_optimizer.py:89; the shard of a parameter",
    ),
    HostName(
        f"{CORE}.distrib_optimizer",
        "Range.end",
        instance=True,
        reference="core/optimizer/distrib_optimizer.py:90; the shard of a parameter",
    ),
    HostName(
        f"{CORE}.optimizer",
        "MegatronOptimizer.optimizer",
        instance=True,
        reference="core/optimizer/optimizer.py:207; the torch optimizer inside",
    ),
    HostName(
        f"{CORE}.optimizer",
        "MegatronOptimizer.config",
        instance=True,
        reference="core/optimizer/optimizer.py:213; clip_grad, decoupled_weight_decay and "
        "main_params_dtype",
    ),
    HostName(
        f"{CORE}.optimizer",
        "MixedPrecisionOptimizer.grad_scaler",
        instance=True,
        reference="core/optimizer/optimizer.py:679; fp16's loss scale",
    ),
    HostName(
        f"{CORE}.optimizer",
        "Float16OptimizerWithFloat16Params.float16_groups",
        instance=True,
        reference="core/optimizer/optimizer.py:995; the model parameters, in the order of "
        "their masters "
        "core/optimizer/optimizer.py:995; the model parameters, in the order of their masters",
    ),
    HostName(
        f"{CORE}.optimizer",
        "Float16OptimizerWithFloat16Params.fp32_from_float16_groups",
        instance=True,
        reference="core/optimizer/optimizer.py:996; their fp32 master weights",
    ),
    HostName(
        f"{CORE}.optimizer",
        "ChainedOptimizer.chained_optimizers",
        instance=True,
        reference="core/optimizer/optimizer.py:1448; the members of a chain",
    ),
    HostName(
        "megatron.core.distributed.param_and_grad_buffer",
        "_ParamAndGradBuffer.param_index_map",
        instance=True,
        reference="core/distributed/param_and_grad_buffer.py:1072; where a parameter lies in "
        "its buffer "
        "core/distributed/param_and_grad_buffer.py:1072; where a parameter lies in its buffer",
    ),
    HostName(
        "megatron.core.distributed.param_and_grad_buffer",
        "_ParamAndGradBuffer.buckets",
        instance=True,
        reference="core/distributed/param_and_grad_buffer.py:217; the buckets of a buffer",
    ),
    HostName(
        "megatron.core.distributed.param_and_grad_buffer",
        "_ParamAndGradBuffer.numel_unpadded",
        instance=True,
        reference="core/distributed/param_and_grad_buffer.py:1109; whether a legacy file fits",
    ),
    HostName(
        "megatron.core.distributed.param_and_grad_buffer",
        "_ParamAndGradBucket.offset",
        instance=True,
        reference="core/distributed/param_and_grad_buffer.py:132; where a bucket begins",
    ),
    HostName(
        "megatron.core.distributed.param_and_grad_buffer",
        "_ParamAndGradBucket.numel_unpadded",
        instance=True,
        reference="core/distributed/param_and_grad_buffer.py:133; the elements of a bucket",
    ),
    HostName(
        "megatron.core.distributed.param_and_grad_buffer",
        "_ParamAndGradBucket.grad_data",
        instance=True,
        reference="core/distributed/param_and_grad_buffer.py:129; a bucket with its padding",
    ),
    HostName(
        "megatron.core.dist_checkpointing.mapping",
        "ShardedTensor.key",
        instance=True,
        reference="core/dist_checkpointing/mapping.py:81; what is asked of storage, and where it "
        "belongs",
    ),
    HostName(
        "megatron.core.dist_checkpointing.mapping",
        "ShardedTensor.data",
        instance=True,
        reference="core/dist_checkpointing/mapping.py:82; what is asked of storage, and where it "
        "belongs",
    ),
    HostName(
        "megatron.core.dist_checkpointing.mapping",
        "ShardedTensor.local_shape",
        instance=True,
        reference="core/dist_checkpointing/mapping.py:84; what is asked of storage, and where it "
        "belongs",
    ),
    HostName(
        "megatron.core.dist_checkpointing.mapping",
        "ShardedTensor.global_shape",
        instance=True,
        reference="core/dist_checkpointing/mapping.py:85; what is asked of storage, and where it "
        "belongs",
    ),
    HostName(
        "megatron.core.dist_checkpointing.mapping",
        "ShardedTensor.global_offset",
        instance=True,
        reference="core/dist_checkpointing/mapping.py:86; what is asked of storage, and where it "
        "belongs",
    ),
    HostName(
        "megatron.core.dist_checkpointing.mapping",
        "ShardedTensor.prepend_axis_num",
        instance=True,
        reference="core/dist_checkpointing/mapping.py:89; what is asked of storage, and where it "
        "belongs",
    ),
    HostName(
        "megatron.core.dist_checkpointing.mapping",
        "ShardedObject.unique_key",
        reference="core/dist_checkpointing/mapping.py:397; the key of an object",
    ),
    HostName(
        "megatron.core.dist_checkpointing.mapping",
        "ShardedTensorFactory.build",
        reference="core/dist_checkpointing/mapping.py:471; what a factory asks for",
    ),
    HostName(
        "megatron.core.dist_checkpointing.dict_utils",
        "nested_values",
        ("x",),
        reference="core/dist_checkpointing/dict_utils.py:166; all entries of a sharded state dict",
    ),
    HostName(
        "megatron.core.dist_checkpointing.validation",
        "StrictHandling.ASSUME_OK_UNEXPECTED",
        reference="core/dist_checkpointing/validation.py:65; the default of --dist-ckpt-strictness",
    ),
    HostName(
        "megatron.core.parallel_state",
        "get_data_parallel_rank",
        reference="core/parallel_state.py:2147; which rank has a legacy file",
    ),
    HostName(
        "megatron.core.parallel_state",
        "get_pipeline_model_parallel_world_size",
        reference="core/parallel_state.py:1958; whether a stage has no vocabulary",
    ),
    HostName(
        "megatron.core.optimizer_param_scheduler",
        "OptimizerParamScheduler.step",
        ("increment",),
        reference="core/optimizer_param_scheduler.py:284; sets lr and weight decay of the "
        "param_groups "
        "core/optimizer_param_scheduler.py:284; sets lr and weight decay of the param_groups",
    ),
    HostName(
        "megatron.core.optimizer_param_scheduler",
        "OptimizerParamScheduler.num_steps",
        instance=True,
        reference="core/optimizer_param_scheduler.py:155; set during its load",
    ),
    HostName(
        "megatron.core.optimizer_param_scheduler",
        "OptimizerParamScheduler.override_opt_param_scheduler",
        instance=True,
        reference="core/optimizer_param_scheduler.py:173; set during its load",
    ),
    HostName(
        "megatron.core.optimizer_param_scheduler",
        "OptimizerParamScheduler.use_checkpoint_opt_param_scheduler",
        instance=True,
        reference="core/optimizer_param_scheduler.py:174; set during its load",
    ),
    HostName(
        f"{TRAINING}.checkpointing",
        "get_checkpoint_name",
        reference="training/checkpointing.py:195; the files of a legacy checkpoint",
    ),
    HostName(
        f"{TRAINING}.checkpointing",
        "checkpoint_exists",
        reference="training/checkpointing.py:346; whether --pretrained-checkpoint is loaded",
    ),
    HostName(
        f"{TRAINING}.checkpointing",
        "get_checkpoint_tracker_filename",
        reference="training/checkpointing.py:340; the iteration of a legacy checkpoint",
    ),
    HostName(
        f"{TRAINING}.checkpointing",
        "get_distributed_optimizer_checkpoint_name",
        reference="training/checkpointing.py:261; the file of all parameter state",
    ),
    HostName(
        f"{TRAINING}.checkpointing",
        "get_loaded_iteration",
        reference="training/checkpointing.py:137; whether a checkpoint was loaded",
    ),
    HostName(
        f"{TRAINING}.arguments",
        "parse_args",
        ("ignore_unknown_args",),
        reference="training/arguments.py:116; its own parsing of a command line",
    ),
    HostName(
        f"{TRAINING}.global_vars",
        "_GLOBAL_ARGS",
        reference="training/global_vars.py:20; the parsed arguments, None before",
    ),
    HostName(
        f"{TRAINING}.training",
        "setup_model_and_optimizer",
        rebound=True,
        reference="training/training.py:2017; all ranks agree on the preflight before a model "
        "is built "
        "training/training.py:2017; all ranks agree on the preflight before a model is built",
    ),
    HostName(
        f"{TRAINING}.training",
        "load_checkpoint",
        ("ddp_model", "optimizer", "opt_param_scheduler"),
        rebound=True,
        reference="training/training.py; bound there at import",
    ),
    HostName(
        "torch.distributed.checkpoint.filesystem",
        "FileSystemReader.read_data",
        ("plan", "planner"),
        reference="torch 2.15, torch/distributed/checkpoint/filesystem.py:869; rebound for "
        "the time of "
        "a load (direct_read.py)",
    ),
    HostName(
        "torch.distributed.checkpoint.filesystem",
        "FileSystemReader.read_metadata",
        reference="torch 2.15, torch/distributed/checkpoint/filesystem.py; rebound for the "
        "time of a "
        "load, to read an index once (sharded.py)",
    ),
    HostName(
        "torch.distributed.checkpoint.api",
        "CheckpointException",
        reference="torch/distributed/checkpoint/api.py; is no Exception",
    ),
    HostName(
        "megatron.core.package_info",
        "__version__",
        reference="core/package_info.py:18; the version that is imported",
    ),
    HostName(
        "megatron.core.distributed.distributed_data_parallel",
        "DistributedDataParallel.ddp_config",
        instance=True,
        reference="core/distributed/distributed_data_parallel.py; whether Megatron-FSDP is used",
    ),
    HostName(
        "megatron.core.dist_checkpointing.mapping",
        "ShardedTensor.axis_fragmentations",
        instance=True,
        reference="core/dist_checkpointing/mapping.py:87; what a mapped tensor requests",
    ),
    HostName(
        "megatron.core.dist_checkpointing.mapping",
        "ShardedTensor.replica_id",
        instance=True,
        reference="core/dist_checkpointing/mapping.py:88; which rank stands for a shard",
    ),
    HostName(
        "megatron.core.dist_checkpointing.mapping",
        "ShardedObject",
        reference="core/dist_checkpointing/mapping.py:360; the extra state of a module",
    ),
    HostName(
        "megatron.core.dist_checkpointing.mapping",
        "ShardedTensorFactory.merge_fn",
        instance=True,
        reference="core/dist_checkpointing/mapping.py:467; joins a gated layer",
    ),
    HostName(
        "megatron.core.dist_checkpointing.mapping",
        "LocalNonpersistentObject",
        ("obj",),
        reference="core/dist_checkpointing/mapping.py:342; what is not requested",
    ),
    HostName(
        "megatron.core.dist_checkpointing.mapping",
        "is_main_replica",
        ("replica_id",),
        reference="core/dist_checkpointing/mapping.py:322; which rank stands for a shard",
    ),
    HostName(
        "megatron.core.dist_checkpointing",
        "load_content_metadata",
        ("checkpoint_dir",),
        rebound=True,
        reference="core/dist_checkpointing/serialization.py:322; a checkpoint without a sharding",
    ),
    HostName(
        f"{TRAINING}.checkpointing",
        "_build_sharded_state_dict_metadata",
        ("args",),
        rebound=True,
        reference="training/checkpointing.py:468; how a save stores layers",
    ),
    HostName(
        f"{CORE}.distrib_optimizer",
        "DistributedOptimizer.sharded_param_state_fully_reshardable",
        ("model_sharded_state_dict", "is_loading", "metadata"),
        reference="core/optimizer/distrib_optimizer.py:1690; overridden",
    ),
    HostName(
        f"{CORE}.distrib_optimizer",
        "DistributedOptimizer.get_parameter_state_dp_zero",
        reference="core/optimizer/distrib_optimizer.py:1262; overridden",
    ),
    HostName(
        "megatron.core.dist_checkpointing.mapping",
        "ShardedTensorFactory.build_fn",
        instance=True,
        reference="core/dist_checkpointing/mapping.py:466; how a gated layer is cut",
    ),
)


def megatron_version() -> str:
    """Return the version of the megatron-core that is imported, without its local part.

    Raises:
        HostError: There is none.
    """
    return str(megatron.find().version)


def require_megatron() -> megatron.Megatron:
    """Find the Megatron of this process and refuse what cannot be served. Imports nothing of it.

    Raises:
        HostError: There is none, it is older than the first tested version, or two are mixed.
    """
    found = megatron.find()
    if found.version < Version(TESTED[0]):
        raise HostError(
            f"megatron-core {found.version} from {found.root} is too old: megatron_ext needs "
            f"{TESTED[0]} or later (tested: {', '.join(TESTED)}). Use a newer one, such as "
            f"megatron-core=={TESTED[-1]}, or run without --optimizer-class"
        )
    megatron.require_one_copy()
    return found


def check_contract() -> None:
    """Compare `CONTRACT` with the installed Megatron.

    Raises:
        HostError: As for `require_megatron`, or a name or one of its parameters is missing. The
            message has both versions.
    """
    found = require_megatron()
    if problems := contract_problems():
        raise HostError(
            f"megatron_ext works with megatron-core {TESTED[0]} to {TESTED[-1]}; the "
            f"megatron-core {found.version} from {found.root} lacks names that megatron_ext uses:\n"
            + "\n".join(f"  {p}" for p in problems)
            + f"\nUse megatron-core=={TESTED[-1]}, or run without --optimizer-class"
        )
    _warn_if_untested(found.version)


def is_rebound() -> bool:
    """Whether `megatron_ext.hooks.installing.install` has rebound Megatron in this process."""
    module = importlib.import_module("megatron.core.optimizer_param_scheduler")
    load = module.OptimizerParamScheduler.load_state_dict
    return hasattr(load, "__megatron_ext_original__")


def contract_problems() -> list[str]:
    """List the names of `CONTRACT` that the installed Megatron lacks. Imports their modules."""
    found = Version(megatron_version())
    names = (name for name in CONTRACT if found >= Version(name.since))
    return [p for name in names if (p := problem_of(name))]


def in_tested_range(version: str | Version) -> bool:
    """Whether a megatron-core version lies between the first and the last tested one."""
    found = Version(str(version))
    return Version(TESTED[0]) <= found and found.release[:2] <= Version(TESTED[-1]).release[:2]


def inner_adam() -> str:
    """Name the class that Megatron uses for Adam: a FusedAdam, or torch's AdamW as a fallback."""
    adam = importlib.import_module(CORE).Adam
    return f"{adam.__module__}.{adam.__qualname__}"


def has_training() -> bool:
    """Whether Megatron has its training loop (the wheel from 0.17 on, with its extra installed)."""
    return not training_problem()


@functools.cache
def training_problem() -> str:
    """Import Megatron's training loop; return the error, or nothing if there is none."""
    try:
        importlib.import_module(f"{TRAINING}.arguments")
        importlib.import_module(f"{TRAINING}.checkpointing")
    except ImportError as e:
        return _described(e)
    return ""


def _described(error: ImportError) -> str:
    return f"{type(error).__name__}: {error}"


def require_training() -> None:
    """Refuse a Megatron without its training loop. Imports nothing of it.

    Raises:
        HostError: As for `require_megatron`, or there is no training loop.
    """
    require_megatron()
    if missing := _missing_training():
        raise HostError(missing)


def _missing_training() -> str:
    """Say that this copy of Megatron comes without its training loop; empty if it has one."""
    if importlib.util.find_spec(TRAINING) is not None:
        return ""
    found = megatron.find()
    return (
        f"megatron-core {found.version} from {found.root} comes without the training loop "
        f"{TRAINING}. Wheels have it from 0.17 on, for Python 3.12 or later (this is "
        f"{platform.python_version()}): install megatron-core[training] there, or put a checkout "
        "of Megatron-LM on the path (PYTHONPATH=/path/to/Megatron-LM)"
    )


def explain_import(error: ImportError) -> HostError | None:
    """Explain why a script could not import Megatron, where there is no training loop.

    Args:
        error: What the script raised.

    Returns:
        The error for the user; None if the script failed to import something else.
    """
    problem = training_problem()
    name = error.name or ""
    if not problem or not (name.startswith("megatron.") or problem == _described(error)):
        return None
    found = megatron.find()
    if missing := _missing_training():
        return HostError(f"the script imports {name}. {missing}")
    return HostError(
        f"the script imports {TRAINING}, and that of megatron-core {found.version} from "
        f"{found.root} cannot be imported: {problem}. Install what it needs: pip install "
        f"'megatron-core[training]=={found.version}'"
    )


def problem_of(name: HostName) -> str | None:
    """Return what is wrong with a name of the installed host; None if nothing is.

    Args:
        name: The name. Its module is imported.
    """
    if name.module.startswith(TRAINING) and not has_training():
        return None
    where = f"{name.module}.{name.attribute}"
    try:
        target: Any = importlib.import_module(name.module)
        *owners, last = name.attribute.split(".")
        for part in owners:
            target = getattr(target, part)
        if name.instance and last in _assigned(target):
            return None
        target = getattr(target, last)
    except (ImportError, AttributeError) as e:
        return f"{where} is gone ({e}); needed for: {name.reference}"
    target = getattr(target, "__megatron_ext_original__", target)
    if name.parameters:
        has = inspect.signature(target).parameters
        missing = [p for p in name.parameters if p not in has]
        if missing:
            return f"{where} has no parameter {', '.join(missing)}; needed for: {name.reference}"
    return None


@functools.cache
def _assigned(cls: type) -> frozenset[str]:
    """Collect the attributes that a class, its bases and their methods assign.

    It reads the compiled methods: parsing the sources takes 2 s at the start of every rank.
    """
    found: set[str] = set()
    for base in cls.__mro__[:-1]:
        found |= vars(base).keys() | inspect.get_annotations(base).keys()
        for member in vars(base).values():
            function = inspect.unwrap(getattr(member, "fget", None) or member)
            if code := getattr(function, "__code__", None):
                found |= _stored(code)
    return frozenset(found)


def _stored(code: CodeType) -> set[str]:
    """Collect the attributes that a function and the functions inside it assign."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_ATTR"}
    return found.union(*(_stored(c) for c in code.co_consts if isinstance(c, CodeType)))


@functools.cache
def _warn_if_untested(found: Version) -> None:
    """Warn once per process if the version is outside the tested range."""
    last = Version(TESTED[-1])
    if not in_tested_range(found):
        warnings.warn(
            f"megatron-core {found} is outside the range megatron_ext is tested with "
            f"({TESTED[0]} to {last.major}.{last.minor}.x); every name that megatron_ext "
            "uses is there",
            stacklevel=3,
        )
