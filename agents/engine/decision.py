"""Why an agent measures where it does, as plain arrays: to be looked at, stored and replayed."""

from __future__ import annotations

from dataclasses import dataclass

from agents.policy import Array


@dataclass(frozen=True)
class Decision:
    """One decision of B rows. A row that still takes its first places at random believes nothing: NaN.

    Mean and deviation are in the unit of the value that is wanted; the deviation is that of what a measurement would
    give, so that 90 % of them are to be expected within 1.645 deviations of the mean.
    """

    mean: Array  # (B, H, W) float32
    deviation: Array  # (B, H, W) float32
    acquisition: Array  # (B, H, W) float32 score; the highest that was allowed was chosen
    embedding: Array | None  # (B, H*W, d) float32, where the model places the cells
    chosen: Array  # (B,) int64 cell y·W + x
    seeding: Array  # (B,) bool, whether the place was drawn at random
