"""What a training prints while it runs."""

from __future__ import annotations

import time

__all__ = ["Progress"]


class Progress:
    """Prints the running loss, the rate and the time left every so often."""

    def __init__(self, steps: int, every: int = 50) -> None:
        self.steps, self.every = steps, every
        self.start, self.recent = time.monotonic(), 0.0

    def __call__(self, step: int, value: float) -> None:
        self.recent = value if step == 0 else 0.98 * self.recent + 0.02 * value
        done = step + 1
        if done % self.every == 0 or done == self.steps:
            rate = done / (time.monotonic() - self.start)
            left_min = (self.steps - done) / rate / 60
            line = f"step {done}/{self.steps}  loss {self.recent:.5f}  {rate:.2f} steps/s  {left_min:.1f} min left"
            print(line, flush=True)
