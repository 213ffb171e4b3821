"""Layouts of a buffer, against Megatron's rule written down once more."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch

from megatron_ext.checkpoint.names import Style
from megatron_ext.offline.shifted_held import Held
from megatron_ext.offline.shifted_layout import Part, Place, divisors, layouts
from megatron_ext.offline.shifted_needle import shift_of
from megatron_ext.offline.shifted_order import in_order
from megatron_ext.offline.shifted_ranks import Ranks
from megatron_ext.offline.shifted_sources import gathered, sources
from tests.support.pool import RankPool


def laid_out(sizes: list[int], bucket_size: int, divisor: int, alone: set[int]) -> list[Place]:
    """Where a buffer has its parameters; those in `alone` are buckets of their own."""
    places, bucket, end, padding = [], 0, 0, 0
    for number, size in enumerate(sizes):
        begin = math.ceil(end / 64) * 64
        if number in alone and bucket < begin:
            end = begin
            bucket = begin = math.ceil(end / divisor) * divisor
            padding += begin - end
        end = begin + size
        places.append(Place(begin, end, padding))
        if end - bucket >= bucket_size or number in alone:
            bucket = math.ceil(end / divisor) * divisor
            padding += bucket - end
            end = bucket
    return places


@pytest.mark.parametrize("seed", range(60))
def test_the_layout_is_among_those_that_are_found(seed: int) -> None:
    chance = random.Random(seed)
    sizes = [chance.choice([12, 60, 64, 200, 1000, 4096]) for _ in range(chance.randint(2, 25))]
    ranks = chance.choice([1, 2, 3, 6, 48, 256])
    divisor = math.lcm(ranks, chance.choice([128, 1 << 16]))
    alone = {chance.choice([0, len(sizes) - 1])} if chance.random() < 0.4 else set()
    true = laid_out(sizes, chance.choice([100, 3000, 1 << 30]), divisor, alone)
    parts = [
        Part(size, p.shift if size - p.shift >= 200 else None, n in alone)
        for n, (size, p) in enumerate(zip(sizes, true, strict=True))
    ]
    assert divisor in divisors(None)
    assert divisor in divisors(ranks)
    found = list(layouts(parts, divisor, shared=bool(alone)))
    assert tuple(true) in found
    for one in found:
        for part, place in zip(parts, one, strict=True):
            assert part.shift is None or part.shift == place.shift
    # Nothing is known of what comes before: all but the first parameters, in the same distance.
    cut = next((n for n, p in enumerate(true) if p.shift > true[0].shift), 0)
    if any(part.shift is not None for part in parts[cut:]):
        rest = list(layouts(parts[cut:], divisor, shared=bool(alone), whole=False))
        moved = [Place(p.begin - true[cut].begin, p.end - true[cut].begin, p.shift) for p in true]
        assert tuple(moved[cut:]) in rest


@pytest.mark.parametrize("seed", range(5))
def test_the_bucket_size_is_one_number(seed: int) -> None:
    chance = random.Random(seed)
    sizes = [chance.choice([12, 64, 100, 200]) for _ in range(6)]
    of_every_size = {tuple(laid_out(sizes, size, 384, set())) for size in range(1, 2000)}
    assert set(layouts([Part(size) for size in sizes], 384)) == of_every_size
    assert len(of_every_size) > 2


@pytest.mark.parametrize("seed", range(20))
def test_the_sources_are_where_a_wrong_save_puts_the_elements(seed: int) -> None:
    chance = random.Random(seed)
    sizes = [chance.choice([12, 60, 64, 200, 300]) for _ in range(chance.randint(2, 20))]
    places = laid_out(sizes, 250, chance.choice([128, 384]), set())
    parts = [Part(size, stored=chance.random() < 0.9) for size in sizes]
    # Every element of the gathered buffer has a number, and padding between parameters 0.
    length = gathered(places)
    world, number = np.zeros(length, int), 1
    for place in places:
        size = place.end - place.begin
        world[place.begin - place.shift : place.end - place.shift] = range(number, number + size)
        number += size
    stored = [
        np.pad(world[p.begin : p.end], (0, p.end - p.begin - len(world[p.begin : p.end])))
        for p in places
    ]
    for place, mine in zip(places, sources(parts, places), strict=True):
        true = world[place.begin - place.shift : place.end - place.shift]
        found = np.zeros(len(true), int)
        for source in mine:
            here = stored[source.number][source.begin : source.begin + source.elements]
            found[source.first : source.first + source.elements] = here
        visible = np.concatenate([s for s, p in zip(stored, parts, strict=True) if p.stored])
        np.testing.assert_array_equal(found, np.where(np.isin(true, visible), true, 0))


def test_a_shift_is_told_by_elements_that_differ() -> None:
    weights = torch.arange(1000, dtype=torch.float32).mul(0.37).sin().view(torch.int32)
    behind = weights.flip(0)
    for shift in (0, 1, 63, 900):
        stored = torch.cat([weights[shift:], behind[:shift]])
        assert shift_of(stored, weights) == shift
        damaged = stored.clone()
        damaged[5] ^= 1
        assert shift_of(damaged, weights) == shift
    ones = torch.ones(1000).view(torch.int32)
    assert shift_of(ones, ones) is None
    assert shift_of(weights[:12], weights[:12]) is None
    assert shift_of(behind, weights) is None
    # Norms of which one element has moved: any other one may be taken for it.
    stored, norm = torch.ones(2, 1000)
    stored[24] = norm[508] = 0.996
    assert shift_of(stored.view(torch.int32), norm.view(torch.int32)) is None
    # Stored elements come late, not early.
    assert shift_of(torch.cat([behind[:900], weights[:100]]), weights) is None


#: tp, ep, pp, cp; ranks; whether the pipeline comes before data.
SIZES = [
    ((2, 1, 2, 1), 8, False),
    ((2, 2, 2, 1), 16, False),
    ((1, 4, 1, 2), 16, False),
    ((2, 2, 2, 2), 32, True),
    ((4, 1, 2, 1), 16, True),
]


@pytest.mark.ranks
def test_ranks_with_the_same_buffers_are_megatrons(stock: RankPool) -> None:
    cases, found = [], []
    for ((tensor, expert, pipeline, context), world, before), of_experts in itertools.product(
        SIZES, (False, True)
    ):
        args = {
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipeline,
            "context_parallel_size": context,
            "expert_model_parallel_size": expert,
            "world_size": world,
            "use_tp_pp_dp_mapping": before,
        }
        ranks, groups = Ranks(args), {}
        for rank in range(world):
            groups.setdefault(ranks.group_of(str(rank), of_experts), []).append(rank)
        found.append((ranks.data_parallel, sorted(groups.values())))
        apart = of_experts and expert > 1
        sizes = {"tp": tensor, "pp": pipeline, "ep": 1, "cp": context}
        if apart:
            sizes |= {"ep": expert, "cp": 1}
        order = "tp-cp-ep-pp-dp" if before else "tp-cp-ep-dp-pp"
        cases.append((world, sizes, order, "dp" if apart else "dp-cp"))
    expected = stock.run("tests.support.shifted_stock:groups", 1, cases=cases)[0]
    for (data_parallel, mine), of_megatron in zip(found, expected, strict=True):
        assert mine == sorted(map(sorted, of_megatron))
        assert len(of_megatron[0]) in data_parallel


def test_without_arguments_every_rank_has_its_own_buffers() -> None:
    assert [Ranks({}).group_of(str(rank), False) for rank in range(3)] == ["0", "1", "2"]
    assert Ranks({}).data_parallel == []
    assert Ranks({}).experts_apart is None


def held(key: str, *lead: int) -> Held:
    return Held(key, lead, f"{key}{lead}", (), torch.bfloat16)


LAYER = "decoder.layers."
#: The parameters of a model of TransformerEngine's modules, in the order of their registration.
DENSE = (
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)
#: With multi-latent attention.
LATENT = (
    DENSE[0],
    "self_attention.linear_q_down_proj.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.linear_q_up_proj.weight",
    "self_attention.linear_kv_down_proj.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight",
    "self_attention.linear_kv_up_proj.weight",
    *DENSE[3:],
)
#: The first ones, of the local modules.
LOCAL = (DENSE[1], DENSE[0], *DENSE[2:])
GROUPED = tuple(f"mlp.experts.experts.linear_fc{n}.weight" for n in (1, 2))
FIRST = ("embedding.word_embeddings.weight", "embedding.position_embeddings.weight")
LAST = ("decoder.final_layernorm.weight", "output_layer.weight")


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_is_the_reverse_of_the_registration(seed: int, local: bool) -> None:
    names = LOCAL if local else DENSE
    registered = [
        *map(held, FIRST),
        *(held(LAYER + name, layer) for layer in range(3) for name in names),
        *map(held, LAST),
    ]
    if not local:
        names = LATENT
        mtp = ("enorm.weight", "eh_proj.weight", "transformer_layer.mlp.linear_fc1.weight")
        layers = (held(LAYER + name, layer) for layer in range(3) for name in names)
        last = (held(f"mtp.layers.{name}", 0) for name in (*mtp, "final_layernorm.weight"))
        registered = [*map(held, FIRST), *layers, held(LAST[0]), *last, held(LAST[1])]
    listed = random.Random(seed).sample(registered, len(registered))
    # Several ranks have written it, in any order.
    assert in_order(listed, Style(local=local), False, Ranks({})) == registered[::-1]
    # One rank has: the order is that of the index, whatever it is in a layer.
    names = random.Random(seed).sample(DENSE, len(DENSE))
    buffer = [
        *map(held, LAST[::-1]),
        *(held(LAYER + name, layer) for layer in (2, 1, 0) for name in names),
        *map(held, FIRST[::-1]),
    ]
    by_key = sorted(buffer, key=lambda h: [b.key for b in buffer].index(h.key))
    assert in_order(by_key, Style(), True, Ranks({})) == buffer


@pytest.mark.parametrize("grouped", [False, True])
def test_experts_follow_each_other_in_their_module(grouped: bool) -> None:
    def experts(layer: int) -> list[Held]:
        pairs = itertools.product(GROUPED, (4, 5))
        ordered = sorted(pairs, key=lambda p: p if grouped else p[::-1])
        return [held(LAYER + name, layer, expert) for name, expert in ordered]

    dense = [held(LAYER + name, layer) for layer in (0, 1) for name in DENSE[:3]]
    registered = [*experts(0), *experts(1)]
    args = {"expert_model_parallel_size": 2}
    found = in_order([*registered, *dense], Style(grouped=grouped), False, Ranks(args))
    assert [h for h in found if h.buffer == (0, False)] != []
    mine = [h for h in found if h.buffer == (0, True)]
    assert [h.name for h in mine] == [h.name for h in registered[::-1]]
