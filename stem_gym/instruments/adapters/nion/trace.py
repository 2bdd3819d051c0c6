"""When a live trace has said enough."""

from __future__ import annotations

from collections.abc import Sequence

from stem_gym.core.instructions import TraceRule


def samples_until(trace: Sequence[float], rule: TraceRule) -> int | None:
    """Samples after which the rule stops this trace, or None while it does not.

    The running mean of `window_samples` is compared with the mean of the first `baseline_samples`; windows that end
    inside the baseline say nothing.
    """
    baseline = sum(trace[: rule.baseline_samples]) / rule.baseline_samples
    for end in range(max(rule.baseline_samples + 1, rule.window_samples), len(trace) + 1):
        running = sum(trace[end - rule.window_samples : end]) / rule.window_samples
        rose = rule.rise is not None and running >= baseline * (1.0 + rule.rise)
        fell = rule.fall is not None and running <= baseline * (1.0 - rule.fall)
        if rose or fell:
            return end
    return None
