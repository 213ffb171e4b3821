"""What is measured: formats, sizes and ranks, and the resumes that are compared."""

from __future__ import annotations

from dataclasses import dataclass

STOCK, KEEP, VERIFIED, RESCALE, RESET, RESET_V, PATTERN = (
    "stock",
    "keep",
    "keep, verified",
    "rescale",
    "reset",
    "reset v",
    "by pattern",
)
#: Ends the name of a variant that is another one with a cold cache.
COLD = ", cold"
STOCK_COLD, KEEP_COLD, RESET_COLD = STOCK + COLD, KEEP + COLD, RESET + COLD


@dataclass(frozen=True)
class Variant:
    """One way to resume.

    Args:
        name: Of the row.
        policy: Of SelectiveAdam, in YAML; None for stock.
        cold: Whether the files are dropped from the page cache before they are read.
        moments: What exp_avg and exp_avg_sq are multiplied by, for the check of the result.
        only: The parameters that this is done to; all where empty.
        often: Whether its time has a target, so that every repeat is needed.
        verify: Whether the CRC32 of everything that is read is compared.
    """

    name: str
    policy: str | None
    cold: bool = False
    moments: tuple[float, float] = (1.0, 1.0)
    only: str = ""
    often: bool = False
    verify: bool = False


VARIANTS = (
    Variant(STOCK, None, often=True),
    Variant(KEEP, "{}", often=True),
    Variant(VERIFIED, "{}", verify=True),
    Variant(
        RESCALE,
        "moments: [{match: '*', exp_avg: scale 0.5, exp_avg_sq: scale 0.25}]",
        moments=(0.5, 0.25),
        often=True,
    ),
    Variant(RESET, "preset: reset", moments=(0.0, 0.0)),
    Variant(
        RESET_V, "moments: [{match: '*', exp_avg: keep, exp_avg_sq: reset}]", moments=(1.0, 0.0)
    ),
    Variant(
        PATTERN,
        "moments: [{match: 'decoder.layers.0.*', exp_avg: reset, exp_avg_sq: reset}]",
        moments=(0.0, 0.0),
        only="decoder.layers.0.",
    ),
    Variant(STOCK_COLD, None, cold=True),
    Variant(KEEP_COLD, "{}", cold=True),
    Variant(RESET_COLD, "preset: reset", cold=True, moments=(0.0, 0.0)),
)

#: Million parameters, about -> hidden size and layers.
SIZES = {
    1: (128, 5),
    10: (256, 12),
    30: (512, 9),
    100: (768, 14),
    300: (1024, 24),
    1000: (2048, 20),
}
FORMATS = ("dp_reshardable", "fully_reshardable", "torch")


@dataclass(frozen=True)
class Case:
    """One series of resumes.

    Args:
        format: The sharding type of torch_dist, or ``torch`` (legacy).
        size: Key of `SIZES`.
        ranks: Data-parallel ranks.
        repeats: How often each variant is measured, in turn with the others; those without a
            target for their time no more than `FEW` times.
        dtype: Of the weights: ``bf16`` (fp32 master weights) or ``fp32``.
        parallel_load: As ``--ckpt-fully-parallel-load``.
    """

    format: str
    size: int
    ranks: int
    repeats: int
    dtype: str = "bf16"
    parallel_load: bool = False

    def __str__(self) -> str:
        """As a row is called."""
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"
        parallel = ", fully parallel load" if self.parallel_load else ""
        return f"{self.format}, {self.dtype}, {self.size}M, {ranks}{parallel}"

    @property
    def bytes_per_parameter(self) -> int:
        """What stock reads: weights, fp32 master weights and two fp32 moments."""
        return (2 if self.dtype == "bf16" else 4) + 12


#: Repeats of a variant without a target for its time.
FEW = 2
QUICK = tuple(Case(f, 1, 1, 2) for f in FORMATS)
#: Nine minutes on two cores.
DEFAULT = (
    *(Case(f, 10, 1, 20) for f in FORMATS),
    Case("dp_reshardable", 30, 1, 2),
    Case("dp_reshardable", 100, 1, 1),
    Case("dp_reshardable", 10, 2, 1, parallel_load=True),
)
#: Enough repeats for the targets of a large model too, and more ranks.
PUBLISHED = (
    *(Case(f, 10, 1, 20) for f in FORMATS),
    Case("dp_reshardable", 100, 1, 20),
    Case("dp_reshardable", 30, 1, 6),
    Case("fully_reshardable", 100, 1, 3),
    # Stock cannot load fp32 from dp_reshardable (core/optimizer/distrib_optimizer.py:1225, 0.19.2).
    Case("fully_reshardable", 10, 1, 3, dtype="fp32"),
    Case("dp_reshardable", 10, 2, 6, parallel_load=True),
    Case("fully_reshardable", 10, 2, 3, parallel_load=True),
    Case("dp_reshardable", 10, 4, 2, parallel_load=True),
)
FULL = tuple(
    Case(f, size, ranks, 20, parallel_load=ranks > 1 and f != "torch")
    for size in (10, 30, 100, 300)
    for ranks in (1, 2, 4)
    for f in FORMATS
)
