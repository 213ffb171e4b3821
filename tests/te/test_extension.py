"""What stands in for Transformer Engine's compiled module: Adam's update, against float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.pool import RankPool

pytestmark = pytest.mark.ranks

HYPER = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEPS = 5
SHAPES = ((40, 7), (13,))
#: dtype of a moment -> largest error of all steps' rounding, relative to the largest element.
MOMENT_ERRORS = {
    torch.float32: 2e-6,
    torch.bfloat16: STEPS * 2.0**-9,
    torch.float16: STEPS * 2.0**-12,
    torch.uint8: STEPS * 2.0**-4,  # E4M3 has 3 bits of mantissa
}
MASTERS: dict[str, dict[str, Any]] = {
    "fp32 masters": {},
    "fp16 masters": {"master_weight_dtype": torch.float16},
    "remainders": {"store_param_remainders": True},
}


def adam(w: np.ndarray, gradients: list[np.ndarray], decoupled: bool) -> list[np.ndarray]:
    """Adam in float64 (Kingma and Ba, algorithm 1; decay of Loshchilov and Hutter)."""
    (b1, b2), lr, decay = HYPER["betas"], HYPER["lr"], HYPER["weight_decay"]  # type: ignore[misc]
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        g = g if decoupled else g + decay * w
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        step = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + HYPER["eps"])
        w = w - lr * (step + (decay * w if decoupled else 0))
    return [w, m, v]


def inputs() -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Weights that bf16 has exactly, and gradients of each step."""
    draw = np.random.default_rng(5)
    weights = [
        torch.from_numpy(draw.normal(size=s).astype(np.float32)).bfloat16().float().numpy()
        for s in SHAPES
    ]
    gradients = [[draw.normal(size=s).astype(np.float32) for s in SHAPES] for _ in range(STEPS)]
    return weights, gradients


@pytest.mark.parametrize("masters", MASTERS)
@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "L2"])
def test_every_dtype_of_moments_and_masters_is_adam(
    masters: str, decoupled: bool, stock: RankPool
) -> None:
    weights, gradients = inputs()
    for m_dtype, v_dtype in itertools.product(MOMENT_ERRORS, MOMENT_ERRORS):
        kinds = {"exp_avg_dtype": m_dtype, "exp_avg_sq_dtype": v_dtype, **MASTERS[masters]}
        (found,) = stock.run(
            "tests.support.te_cases:steps",
            1,
            weights=weights,
            gradients=gradients,
            hyper={**HYPER, "adam_w_mode": decoupled},
            **kinds,
        )
        for i, (weight, ours) in enumerate(zip(weights, found, strict=True)):
            w, m, v = adam(
                weight.astype(np.float64), [g[i].astype(np.float64) for g in gradients], decoupled
            )
            for wanted, key, dtype in ((m, "exp_avg", m_dtype), (v, "exp_avg_sq", v_dtype)):
                error = MOMENT_ERRORS[dtype] + (0.0 if decoupled else 1e-3)  # by the weights
                largest = np.abs(wanted).max()
                np.testing.assert_allclose(ours[key], wanted, rtol=0.0, atol=error * largest)
            exact = m_dtype == v_dtype == torch.float32 and masters != "fp16 masters"
            # A step moves a weight by lr; its direction is as exact as the moments are.
            bound = 2e-6 if exact else STEPS * HYPER["lr"] * 0.5 + STEPS * 2.0**-11
            np.testing.assert_allclose(ours["param"], w, rtol=1e-6, atol=bound)
            rounded = torch.from_numpy(ours["param"]).bfloat16().float().numpy()
            unit = np.abs(ours["param"]) * (2.0**-7 if masters == "fp16 masters" else 0.0)
            assert (np.abs(ours["weight"] - rounded) <= unit).all()


def test_a_master_weight_in_two_halves_is_itself(stock: RankPool) -> None:
    masters = np.random.default_rng(1).normal(size=20_000).astype(np.float32)
    special = [0.0, -0.0, 1.0, -1.0, 1e-40, -1e-38, 3e38, np.float32(1) + np.float32(2**-23)]
    masters[: len(special)] = special
    ((high, joined),) = stock.run("tests.support.te_cases:round_trip", 1, masters=masters)
    np.testing.assert_array_equal(joined.view(np.uint32), masters.view(np.uint32))
    nearest = torch.from_numpy(masters).bfloat16().float().numpy()
    ties = (masters.view(np.uint32) & 0xFFFF) == 0x8000
    np.testing.assert_array_equal(high[~ties], nearest[~ties])
    assert (high != masters).mean() > 0.9
