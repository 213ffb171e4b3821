"""Where the weights of a model lie in buckets, from numbers alone."""

from __future__ import annotations

import enum
import io
import itertools
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.placeholders import Placeholder, TensorPlaceholder
from megatron_ext.checkpoint.store import Store
from megatron_ext.checkpoint.torch_file import load_torch
from megatron_ext.errors import CheckpointError
from megatron_ext.offline.bucket_edges import Edges
from megatron_ext.offline.bucket_order import Buffer, decide
from megatron_ext.offline.bucket_places import find
from megatron_ext.offline.bucket_proof import cut
from megatron_ext.offline.bucket_reading import Bucket, buckets_of
from megatron_ext.offline.bucket_weights import Weight, Weights, fingerprint
from megatron_ext.offline.common_state import plain, with_values

BF16 = torch.bfloat16


def weight(name: str, values: torch.Tensor, shard: int = 0) -> Weight:
    return Weight(
        name,
        (shard,),
        tuple(values.shape),
        name,
        (shard,),
        values.dtype,
        values.numel(),
        *fingerprint(values),
    )


def master(elements: int, seed: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Master weights that are not the weights: rounding matters."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(elements, generator=generator)
    assert dtype is torch.float32 or not torch.equal(values, values.to(dtype).float())
    return values


def laid_out(
    parameters: Sequence[Sequence[torch.Tensor]], ranks: int = 1, end: int = 0
) -> tuple[torch.Tensor, Edges]:
    """A bucket as Megatron lays it out, and the pieces that its ranks store."""
    out, bounds, done, padding = [], {0}, 0, []
    for parts in parameters:
        gap = -done % 64
        out.append(torch.full((gap,), 3.0))
        out += parts
        bounds |= {done, done + gap}
        padding += [done] * (gap > 0)
        done += gap + sum(map(len, parts))
        bounds.add(done)
    out.append(torch.full((end,), 3.0))
    padded = -(-(done + end) // 128) * 128
    begins = {padded // ranks * rank for rank in range(1, ranks + 1)}
    return torch.cat(out), Edges(bounds | begins, [p for p in padding if p not in begins])


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_weight_is_found_where_it_is(dtype: torch.dtype, ranks: int) -> None:
    sizes = [(12,), (64,), (1,), (30, 30), (200,), (16, 16), (15,), (64, 64), (7, 70)]
    parameters = [
        [master(n, 100 * i + j, dtype) for j, n in enumerate(parts)]
        for i, parts in enumerate(sizes)
    ]
    values, edges = laid_out(parameters, ranks, end=20)
    known = [weight("elsewhere", master(12, 99, dtype).to(dtype))]
    known += [
        weight(str(i), part.to(dtype), shard)
        for i, parts in enumerate(parameters)
        for shard, part in enumerate(parts)
    ]
    known.append(weight("other dtype", parameters[0][0].double()))
    found = cut(values, dtype, Weights(known), edges)
    assert (found.foreign, found.unclear) == ([], [])
    for slot, part in zip(found.slots, itertools.chain(*parameters), strict=True):
        assert torch.equal(values[slot.begin : slot.end], part)
    names = [[str(i)] for i, parts in enumerate(parameters) for _ in parts]
    assert [[w.name for w in s.candidates] for s in found.slots] == names
    assert all(s.begin % 64 == 0 for s in found.slots[:3])


@pytest.mark.parametrize("at", [0, 3, 15, 16, 40])
def test_one_flipped_bit_is_found(at: int) -> None:
    parameters = [[master(n, n)] for n in (20, 41, 130)]
    values, edges = laid_out(parameters)
    weights = Weights(weight(str(len(p)), p.to(BF16)) for (p,) in parameters)
    values[64:105].view(torch.int32)[at] ^= 1 << 17
    found = cut(values, BF16, weights, edges)
    assert found.foreign == [(64, 128)]
    assert [s.candidates[0].name for s in found.slots] == ["20", "130"]


def test_the_last_bit_of_a_weight_is_compared() -> None:
    values = master(40, 1)
    stored = values.to(BF16)
    stored.view(torch.int16)[39] ^= 1
    assert cut(values, BF16, Weights([weight("a", stored)]), Edges({0, 40})).foreign == [(0, 40)]
    # And the sign of a zero.
    zero = torch.zeros(40)
    negative = Weights([weight("a", -zero.to(BF16))])
    assert cut(zero, BF16, negative, Edges({0, 40})).foreign == [(0, 40)]


def test_equal_weights_of_one_length_are_all_candidates() -> None:
    ones = [torch.ones(16) + 1e-4, torch.ones(16) - 1e-4]
    values, edges = laid_out([[ones[0]], [ones[1]]])
    weights = [weight(name, torch.ones(16, dtype=BF16)) for name in ("a", "b", "c")]
    found = cut(values, BF16, Weights(weights), edges)
    assert [s.candidates for s in found.slots] == [tuple(weights)] * 2


def test_the_pieces_tell_weights_of_different_lengths_apart() -> None:
    zeros = [weight(str(n), torch.zeros(n, dtype=BF16)) for n in (20, 36, 64)]
    values, edges = laid_out([[torch.zeros(36)], [torch.zeros(20)], [torch.zeros(64)]])
    values[:] = 0.0  # the padding too
    found = cut(values, BF16, Weights(zeros), edges)
    assert [s.candidates[0].name for s in found.slots] == ["36", "20", "64"]
    assert found.unclear == []
    # Two halves, or one parameter.
    half = torch.zeros(32, dtype=BF16)
    halves = Weights([weight("half", half), weight("half", half, 32), *zeros])
    found = cut(torch.zeros(64), BF16, halves, Edges({0, 64}))
    assert [[w.name for w in u] for u in found.unclear] == [["half", "half", "64"]]
    # No two parameters: each of them begins at a multiple of 64.
    two = Weights([weight("one", half), weight("two", half), *zeros])
    found = cut(torch.zeros(64), BF16, two, Edges({0, 64}))
    assert [s.candidates[0].name for s in found.slots] == ["64"]


# The order of parameters.


def decided(*sequences: list[Any], owner: Any = None) -> list[list[str]]:
    """The candidates that are left of sequences of names and lists of names."""
    known: dict[str, Weight] = {}
    buffers = []
    for number, sequence in enumerate(sequences):
        listed = [[one] if isinstance(one, str) else one for one in sequence]
        for name in itertools.chain(*listed):
            known.setdefault(name, weight(name, torch.ones(4)))
        buffers.append(Buffer(owner or number, [[known[n] for n in one] for one in listed]))
    decide(buffers)
    return [["|".join(w.name for w in c) for c in b.candidates] for b in buffers]


def test_a_weight_lies_in_one_place_of_a_rank() -> None:
    assert decided(["a", ["a", "b"], ["a", "b", "c"]]) == [["a", "b", "c"]]
    assert decided(["a"], [["a", "b"]]) == [["a"], ["a|b"]]
    assert decided(["a"], [["a", "b"]], owner=1) == [["a"], ["b"]]


def test_later_layers_come_first() -> None:
    norms = [f"decoder.layers.{n}.norm" for n in range(3)]
    fc = [f"decoder.layers.{n}.fc" for n in range(3)]
    # Behind the last layer's weight is only its own norm, and so on upwards.
    assert decided([fc[2], norms, fc[1], norms, fc[0], norms]) == [
        [fc[2], norms[2], fc[1], norms[1], fc[0], norms[0]]
    ]
    # Without weights of layer 1 nothing is said of its norm, and an encoder is no decoder.
    other = "encoder.layers.9.norm"
    assert decided([fc[2], [*norms, other], fc[0]]) == [[fc[2], "|".join(norms), fc[0]]]


def test_nothing_else_lies_between_layers() -> None:
    names = ["final.norm", "decoder.layers.0.norm"]
    found = decided(["out", names, "decoder.layers.0.a", names, "decoder.layers.0.b"])
    assert found == [["out", names[0], "decoder.layers.0.a", names[1], "decoder.layers.0.b"]]


def test_the_order_within_a_layer_is_learned_from_another() -> None:
    layer = [[f"l.layers.{n}.{x}" for x in ("fc", "norm2", "qkv", "norm1")] for n in range(2)]
    fc, second, qkv, first = layer[0]
    open_ = [fc, [second, first], qkv, [second, first]]
    assert decided(open_)[0][1] == f"{second}|{first}"
    assert decided([*layer[1], *open_]) == [[*layer[1], *layer[0]]]
    # Also from another rank.
    assert decided(layer[1], open_)[1] == layer[0]
    # An order that two layers contradict is none.
    other = [layer[1][i] for i in (0, 3, 2, 1)]
    assert decided(layer[1], other, open_)[2][1] == f"{second}|{first}"


def test_megatrons_own_order_tells_where_no_layer_does() -> None:
    names = ("self_attention.k_layernorm.w", "self_attention.q_layernorm.w", "input_layernorm.w")
    fc, norm = "d.layers.0.mlp.linear_fc1.w", "d.layers.0.pre_mlp_layernorm.w"
    k, q, first = (f"d.layers.0.{n}" for n in names)
    qkv = "d.layers.0.self_attention.linear_qkv.w"
    alike = [norm, first]
    assert decided([fc, alike, qkv, alike])[0] == [fc, norm, qkv, first]
    # The names of a checkpoint, where linear layers have the norms before them.
    fused = [
        f"d.layers.0.{n}.layer_norm_w" for n in ("mlp.linear_fc1", "self_attention.linear_qkv")
    ]
    assert decided([fc, fused, qkv, fused])[0] == [fc, fused[0], qkv, fused[1]]
    # Between two layers, and where there is nothing before them.
    final, qkv = "decoder.final_layernorm.weight", f"{qkv}eight"
    every = [fused[1], final, fused[0]]
    found = decided([every, f"{fc}eight", every, qkv, every, "embedding"])
    assert found == [[final, f"{fc}eight", fused[0], qkv, fused[1], "embedding"]]
    # One of two is known by another weight, the other one by the order.
    assert decided([[k, q], q])[0] == [k, q]
    assert decided([[q, k], [q, k]])[0] == [k, q]
    # Also of several layers, but not with what is no part of a layer.
    norms = [norm.replace("layers.0", "layers.1"), norm, first]
    alike_too = [norms[1], norms[0], norms[2]]
    assert decided([alike_too] * 3)[0] == norms
    assert decided([[*alike_too, "final"]] * 4)[0][0] == "|".join([*alike_too, "final"])
    # What a layer shows comes first.
    other = [n.replace("layers.0", "layers.1") for n in (fc, first, qkv, norm)]
    assert decided([*other, fc, alike, qkv, alike])[0][4:] == [fc, first, qkv, norm]


# Among equal weights with equal states every choice is right.


class Buckets:
    """Reads buckets from memory."""

    def __init__(self, values: dict[str, torch.Tensor], edges: Edges) -> None:
        self._values, self._edges = values, edges

    def edges(self, key: str) -> Edges:
        return self._edges

    def read(self, key: str) -> torch.Tensor:
        return self._values[key]


@pytest.mark.parametrize("case", ["equal", "moments", "masters", "one is frozen", "one twice"])
def test_equal_states_need_no_choice(case: str) -> None:
    values, edges = laid_out([[torch.ones(16)], [torch.ones(16)]])
    moments = torch.zeros(len(values))
    if case == "masters":
        values[65] += 1e-5
    if case == "moments":
        moments[79] = 1.0
    bucket = Bucket(0, 0, 0, 0, BF16, {"param": "p", "exp_avg": "m"})
    names = {"one is frozen": "abc", "one twice": "a"}.get(case, "ab")
    weights = Weights(weight(n, torch.ones(16, dtype=BF16)) for n in names)
    reader: Any = Buckets({"p": values, "m": moments}, edges)
    args = (Store(Path("ck")), [bucket], reader, weights)
    if case == "equal":
        ((_, parts),) = find(*args)
        assert [(slot.begin, w.name) for slot, w in parts] == [(0, "a"), (64, "b")]
        return
    with pytest.raises(CheckpointError, match=r"ck: p: .* found equal weights: ") as caught:
        find(*args)
    assert ", ".join(names) in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "chained_1.optimizer.state.exp_avg.decoder.layers.0.weight",
        "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.uint8, torch.float32)."
        "bucket_idx_0.param",
        "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32)."
        "bucket_idx_0.exp_avg",
    ],
    ids=["by parameter", "fp8", "no master weights"],
)
def test_another_kind_of_state_is_refused(key: str) -> None:
    class Other(Store):
        def shapes(self) -> dict[str, tuple[int, ...] | None]:
            return {key: (64,), "decoder.weight": (64,)}

    with pytest.raises(CheckpointError, match=r"expected buckets of bfloat16, .* save it once mor"):
        buckets_of(Other(Path("ck")))


# The common state.


def test_values_are_set_and_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("made_up_for_this_test")
    module.Kind = enum.Enum("Kind", {"FLASH": 1}, module=module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    state = {"args": {"kind": module.Kind.FLASH, "t": torch.arange(3)}, "a": 1, "b": [2, "a"]}
    scaler = TensorPlaceholder()
    scaler.__setstate__({"shape": (1,), "dtype": torch.float32, "value": 65536.0})
    new = plain({"b": {"scale": scaler, "betas": (0.9, 0.99), "a": None}, "c": True}, "here")
    for wrapped in (False, True):
        file = io.BytesIO()
        torch.save([state] if wrapped else state, file)
        with monkeypatch.context() as without:
            without.delitem(sys.modules, module.__name__)
            made = with_values(file.getvalue(), new, "here")
            inert = load_torch(io.BytesIO(made))
        found = torch.load(io.BytesIO(made), weights_only=False)
        found, inert = (found[0], inert[0]) if wrapped else (found, inert)
        assert list(found) == list(inert) == ["args", "a", "b", "c"]
        assert found["args"]["kind"] is module.Kind.FLASH
        assert torch.equal(found["args"]["t"], state["args"]["t"])
        assert found["b"].pop("scale").tolist() == [65536.0]
        assert found["b"] == {"betas": (0.9, 0.99), "a": None}
        assert (found["a"], found["c"]) == (1, True)


def test_what_is_no_dict_or_no_plain_value_is_refused() -> None:
    file = io.BytesIO()
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match="here: expected a dict in a pickle of protocol 2"):
        with_values(file.getvalue(), {"a": 1}, "here")
    made_up = type("Made", (Placeholder,), {"placeholder_class": "up.Made"})
    with pytest.raises(CheckpointError, match=r"here: a: expected numbers, .* found up\.Made"):
        plain({"a": made_up()}, "here")
