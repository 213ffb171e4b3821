"""Pretrain a GPT: Megatron's pretrain_gpt.py, reduced to what a small run needs.

An ordinary training script for megatron-core 0.17 and later; it knows nothing of this repository::

    torchrun --nproc-per-node 2 pretrain_gpt.py --mock-data --tokenizer-type NullTokenizer ...

Every size comes from Megatron's own arguments, the data from ``--mock-data`` or ``--data-path``.
"""

from functools import partial

import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, pretrain, print_rank_0
from megatron.training.utils import (
    get_blend_and_blend_per_split,
    is_first_or_last_pipeline_stage,
)

try:
    from megatron.training.argument_utils import (
        core_transformer_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args
except ImportError:  # 0.17 parses the arguments in pretrain
    from megatron.training.arguments import core_transformer_config_from_args

    pretrain_cfg_container_from_args = None


def model_provider(
    pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None
):
    """Build this rank's part of the model, of modules that need no Transformer Engine."""
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    if args.num_experts:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp_stage)
    else:
        spec = get_gpt_layer_local_spec(
            qk_layernorm=args.qk_layernorm, normalization=args.normalization
        )
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )


def get_batch(data_iterator, vp_stage=None):
    """Return tokens, labels, loss mask and position ids, the same on all tensor-parallel ranks."""
    if not is_first_or_last_pipeline_stage(vp_stage):
        return None, None, None, None
    data = next(data_iterator) if mpu.get_tensor_model_parallel_rank() == 0 else None
    ids = tensor_parallel.broadcast_data(["tokens", "labels", "position_ids"], data, torch.int64)
    mask = tensor_parallel.broadcast_data(["loss_mask"], data, torch.float32)
    return ids["tokens"], ids["labels"], mask["loss_mask"], ids["position_ids"]


def loss_func(loss_mask, output_tensor):
    """Return the summed loss, the number of tokens, and both for the log."""
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(output_tensor.view(-1).float() * loss_mask)
    num_tokens = loss_mask.sum().clone().detach().to(torch.int)
    report = torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}


def forward_step(data_iterator, model):
    """Run one micro-batch; the attention makes its causal mask itself."""
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    tokens, labels, loss_mask, position_ids = get_batch(data_iterator, vp_stage)
    output = model(tokens, position_ids, None, labels=labels, loss_mask=loss_mask)
    return output, partial(loss_func, loss_mask)


def is_dataset_built_on_rank(vp_stage=None):
    """Whether this rank reads data: the first and last stages, one tensor-parallel rank each."""
    first_or_last = is_first_or_last_pipeline_stage(vp_stage)
    return first_or_last and mpu.get_tensor_model_parallel_rank() == 0


def train_valid_test_datasets_provider(train_val_test_num_samples, vp_stage=None):
    """Build the datasets of ``--mock-data``, or of the ``.bin``/``.idx`` files of --data-path."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    return BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        train_val_test_num_samples,
        partial(is_dataset_built_on_rank, vp_stage=vp_stage),
        config,
    ).build()


# Megatron asks for this mark: every rank that needs data builds its own.
train_valid_test_datasets_provider.is_distributed = True


if __name__ == "__main__":
    arguments = []
    if pretrain_cfg_container_from_args is not None:
        arguments.append(pretrain_cfg_container_from_args(parse_and_validate_args()))
    # All others by name: 0.19 moved model_provider behind the other positional arguments.
    pretrain(
        *arguments,
        train_valid_test_dataset_provider=train_valid_test_datasets_provider,
        model_provider=model_provider,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
    )
