"""The demo's training script with a model that changes between the phases.

Environment: ``TRAINED`` is a regular expression of the parameters that are trained, ``HYBRID``
turns the GPT into a HybridModel. On one rank, the state before and after the training is written
beside --tensorboard-dir.
"""

import functools
import os
import re
import runpy
from pathlib import Path

import torch

import megatron_ext


def dump(model, optimizer, name):
    """Write weights, master weights and moments by parameter, of a run on one rank."""
    from tests.support.unsharded import _held

    state = {}
    names = {id(p): n for c in model for n, p in c.module.module.named_parameters()}
    weights = {n: p.detach().float() for c in model for n, p in c.module.module.named_parameters()}
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for parameter, main, _, _ in _held(one):
            held = {"param": main, **one.optimizer.state[main]}
            state[names[id(parameter)]] = {
                k: v.detach().float().flatten().clone()
                for k, v in held.items()
                if k in ("param", "exp_avg", "exp_avg_sq")
            }
    from megatron.training import get_args

    directory = Path(get_args().tensorboard_dir).parent
    torch.save({"state": state, "weights": weights}, directory / f"{name}.pt")


def dumped(original):
    @functools.wraps(original)
    def train(forward_step, model, optimizer, *args, **kwargs):
        if torch.distributed.get_world_size() > 1:
            return original(forward_step, model, optimizer, *args, **kwargs)
        dump(model, optimizer, "before")
        result = original(forward_step, model, optimizer, *args, **kwargs)
        dump(model, optimizer, "after")
        return result

    return train


def hybrid(config, vocab_size, max_sequence_length, **kwargs):
    """A model with attention, MLP and new layers; an MLP stands for Mamba, which needs a GPU."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import attention
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )
    from megatron.training import get_args

    class Fresh(MLPLayer):
        def __init__(self, *args, pp_layer_offset=None, **kwargs):
            super().__init__(*args, **kwargs)

    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=WrappedTorchNorm,
        mlp=functools.partial(MLP.as_mlp_submodule, submodules=linear),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
    )
    of_attention = attention.SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=DotProductAttention,
        linear_proj=RowParallelLinear,
    )
    attending = TransformerLayerSubmodules(
        input_layernorm=WrappedTorchNorm,
        self_attention=ModuleSpec(
            module=attention.SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=of_attention,
        ),
        self_attn_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    )
    stack = HybridStackSubmodules(
        mamba_layer=ModuleSpec(module=Fresh, submodules=mlp),
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attending),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
    )
    if hasattr(hybrid_block, "TENorm"):
        hybrid_block.TENorm = WrappedTorchNorm
    known = ("pre_process", "post_process", "share_embeddings_and_output_weights", "vp_stage")
    known += ("position_embedding_type", "pg_collection")
    return HybridModel(
        config=config,
        hybrid_stack_spec=ModuleSpec(module=HybridStack, submodules=stack),
        vocab_size=vocab_size,
        max_sequence_length=max_sequence_length,
        hybrid_layer_pattern=get_args().hybrid_layer_pattern,
        **{key: kwargs[key] for key in known if key in kwargs},
    )


def built(original):
    @functools.wraps(original)
    def make(*args, **kwargs):
        model = hybrid(**kwargs) if os.environ.get("HYBRID") else original(*args, **kwargs)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(re.search(os.environ.get("TRAINED", ""), name) is not None)
        return model

    return make


if __name__ == "__main__":
    from megatron.core.models import gpt
    from megatron.training import training

    gpt.GPTModel = built(gpt.GPTModel)
    training.train = dumped(training.train)
    script = Path(megatron_ext.__file__).parent / "demo" / "pretrain_gpt.py"
    runpy.run_path(str(script), run_name="__main__")
