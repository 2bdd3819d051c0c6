"""What every test starts from: one thread, no window, the ids registered."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

import torch

import stem_gym  # noqa: F401 – registers the ids

torch.set_num_threads(1)  # two threads on a busy machine wait for one another
