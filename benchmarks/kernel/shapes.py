"""What is measured on: the moments that one rank of a real run holds, and two extremes.

A rank's tensors are laid out as Megatron's distributed optimizer does it: the parameters in reverse
order, closed into a bucket when it has `bucket_elements` elements, and every bucket cut into one
range for each data-parallel rank (megatron.core.distributed.param_and_grad_buffer; the padding of
at most 64 elements a parameter is left out). The tensors are those of data-parallel rank 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

SMALL_TENSORS = "10,000 small tensors"
HUGE_TENSOR = "one huge tensor"


@dataclass(frozen=True)
class Shape:
    """Tensors of exp_avg; exp_avg_sq has the same.

    Args:
        name: For the report.
        sizes: Elements of each tensor.
        layout: Which rank of which run.
        source: Where the numbers come from.
        whole: Elements before `cut`.
        dtype: Of both moments, as torch calls it.
    """

    name: str
    sizes: tuple[int, ...]
    layout: str
    source: str
    whole: int
    dtype: str = "float32"

    @property
    def elements(self) -> int:
        """Elements of exp_avg."""
        return sum(self.sizes)


def llama_3_8b() -> Shape:
    """Llama 3 8B; TP 1, PP 1, DP 8."""
    # hidden 4096, 32 layers, 32 heads, 8 KV heads, FFN 14336, vocabulary 128256: Llama 3 herd,
    # arXiv 2407.21783, table 3; config.json of meta-llama/Meta-Llama-3-8B.
    layers = _llama_layer(4096, 32, 8, 14336, tp=1) * 32
    parameters = [128256 * 4096, *layers, 4096, 128256 * 4096]
    return _shape(
        "Llama 3 8B",
        _shard(parameters, dp=8),
        "TP 1, PP 1, DP 8",
        "arXiv 2407.21783; config.json of meta-llama/Meta-Llama-3-8B",
    )


def llama_3_70b() -> Shape:
    """Llama 3 70B; TP 8, PP 4, DP 4, the first pipeline stage."""
    # hidden 8192, 80 layers, 64 heads, 8 KV heads, FFN 28672, vocabulary 128256: as above, 70B.
    # Megatron pads the vocabulary to a multiple of 128 * TP: 129024.
    layers = _llama_layer(8192, 64, 8, 28672, tp=8) * 20
    return _shape(
        "Llama 3 70B",
        _shard([129024 // 8 * 8192, *layers], dp=4),
        "TP 8, PP 4, DP 4; first pipeline stage",
        "arXiv 2407.21783; config.json of meta-llama/Meta-Llama-3-70B",
    )


def deepseek_v3() -> Shape:
    """Like DeepSeek-V3; PP 16, EP 64, DP 128: a pipeline stage of four MoE layers."""
    # hidden 7168, 128 heads, query rank 1536, KV rank 512, head 128 + 64 rotary, value head 128,
    # 256 routed experts and a shared one of FFN 2048; 2048 GPUs with PP 16, EP 64 and no TP:
    # arXiv 2412.19437, sections 3.2 and 4.2. So expert parameters have 2048 / 16 / 64 = 2
    # data-parallel ranks and a rank holds 256 / 64 = 4 experts a layer.
    hidden, heads, expert = 7168, 128, 2048
    attention = [
        hidden,  # norm
        1536 * hidden,
        1536,  # norm
        heads * (128 + 64) * 1536,
        (512 + 64) * hidden,
        512,  # norm
        heads * (128 + 128) * 512,
        hidden * heads * 128,
        hidden,  # norm
    ]
    mlp = [2 * expert * hidden, hidden * expert]
    dense = [*attention, 256 * hidden, *mlp] * 4
    sizes = [*_shard(dense, dp=128), *_shard(mlp * 4 * 4, dp=2, bucket_elements=128_000_000)]
    return _shape(
        "DeepSeek-V3-like MoE",
        sizes,
        "TP 1, PP 16, EP 64, DP 128, expert DP 2; a stage of 4 MoE layers",
        "arXiv 2412.19437, sections 3.2 and 4.2",
    )


def small_tensors(count: int = 10_000) -> Shape:
    """Many tensors that each are over before the next can be launched."""
    return _shape(SMALL_TENSORS, [1024] * count, "1,024 elements each", "made up")


def huge_tensor(elements: int) -> Shape:
    """One tensor that no cache holds."""
    return _shape(HUGE_TENSOR, [elements], "one tensor", "made up")


def in_dtype(shape: Shape, dtype: str) -> Shape:
    """The same tensors in another dtype."""
    return replace(shape, name=f"{shape.name}, {dtype}", dtype=dtype)


def single_tensor(elements: int) -> Shape:
    """One tensor, for what takes no list."""
    return _shape(f"one tensor of {elements:,}", [elements], "one tensor", "made up")


def cut(shape: Shape, most: int | None) -> Shape:
    """As many tensors in the same proportion, of about `most` elements in all at the most."""
    if most is None or shape.elements <= most:
        return shape
    sizes = tuple(max(1, size * most // shape.elements) for size in shape.sizes)
    return replace(shape, sizes=sizes)


def _shape(name: str, sizes: Sequence[int], layout: str, source: str) -> Shape:
    return Shape(name, tuple(sizes), layout, source, sum(sizes))


def _llama_layer(hidden: int, heads: int, kv_heads: int, ffn: int, tp: int) -> list[int]:
    """Norms, fused QKV, projection, fused gate and up projection, down projection."""
    head = hidden // heads
    shapes = [
        (hidden,),
        ((heads + 2 * kv_heads) * head // tp, hidden),
        (hidden, hidden // tp),
        (hidden,),
        (2 * ffn // tp, hidden),
        (hidden, ffn // tp),
    ]
    return [prod(shape) for shape in shapes]


def _shard(parameters: Sequence[int], dp: int, bucket_elements: int | None = None) -> list[int]:
    """The parts of some parameters that data-parallel rank 0 holds."""
    # Megatron's own default (megatron.core.distributed.distributed_data_parallel).
    most = bucket_elements or max(40_000_000, 1_000_000 * dp)
    return [size for bucket in _buckets(parameters, most) for size in _first(bucket, dp)]


def _buckets(parameters: Sequence[int], most: int) -> Iterator[list[int]]:
    bucket: list[int] = []
    for size in reversed(parameters):
        bucket.append(size)
        if sum(bucket) >= most:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _first(bucket: Sequence[int], dp: int) -> Iterator[int]:
    left = -(-sum(bucket) // dp)
    for size in bucket:
        if left > 0:
            yield min(size, left)
        left -= size
