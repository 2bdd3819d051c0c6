"""How long a decision between laws takes on one core: the referee, and what experiments tell, of 64 episodes.

python benchmarks/hypotheses_speed.py             # milliseconds; stores results/hypotheses_speed.json

With 16,384 particles of four laws and 120 designs, after five measurements, the same episodes one by one and side by
side. A decision is what an agent does between an observation and its action, but for its belief, which has taken in the
last measurement already and is told by itself; the forecast (values of some of the particles) is a part of it, and what
an experiment should tell as well. Each figure is the median of calls after a first one. Told is time of the processor
on one thread, which others at work on the machine disturb least; wall time is stored beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import torch
from gymnasium.vector import AutoresetMode

import agents
from benchmarks.throughput import machine
from stem_gym.core.batch import take_rows
from stem_gym.core.config import parse
from stem_gym.core.experiments import Experiment, History, Protocol, protocol_of
from stem_gym.simulator.laws import bind_set
from stem_gym.surrogates.gaussian_law import GaussianLaw
from stem_gym.surrogates.information import expected_information, information_bound
from stem_gym.surrogates.referee import Referee

RESULTS = Path(__file__).parent / "results"
FILE = "hypotheses_speed.json"
PARTICLES, MEASUREMENTS, TOGETHER = 16384, 5, 64
STD = {"laws": "domain_growth", "noise": {"absolute": 8.0, "relative": 0.08}, "measure_s": 16.0}
ID = "stem_gym/HypothesisDiscrimination-v0"  # as STD


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--draws", default="64,256,512", help="values of each law that an experiment is judged by")
    parser.add_argument("--runs", type=int, default=5, help="calls of each; the median is told")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    draws = [int(one) for one in given.draws.split(",")]
    experiment = parse(Experiment, STD, "benchmark")
    played = campaigns(experiment, TOGETHER)
    each = [parts(experiment, take_rows(played, torch.tensor([row])), draws) for row in range(TOGETHER)]
    many = parts(experiment, played, draws)
    timed = {what: ([one[what] for one in each], call) for what, call in many.items()} | decisions(draws)
    rows = []
    for what, (calls, call) in timed.items():
        alone, together = median_ms(partial(in_turn, calls), given.runs), median_ms(call, given.runs)
        row: dict[str, Any] = {"what": what, "one_ms": alone[0] / TOGETHER, "together_ms": together[0] / TOGETHER}
        row |= {"one_wall_ms": alone[1] / TOGETHER, "together_wall_ms": together[1] / TOGETHER}
        rows.append(row)
        print(
            f"{what:<36} {row['one_ms']:8.2f} ms one by one, {row['together_ms']:8.3f} ms side by side: "
            f"{row['one_ms'] / row['together_ms']:.1f} times less",
            flush=True,
        )
    given.out.mkdir(parents=True, exist_ok=True)
    sizes = {"particles": PARTICLES, "laws": 4, "designs": 120, "together": TOGETHER}
    (given.out / FILE).write_text(json.dumps({"machine": machine(), **sizes, "rows": rows}, indent=1) + "\n")


def parts(experiment: Experiment, history: History, every_draws: Sequence[int]) -> dict[str, Callable[[], object]]:
    """What a decision of episodes with such a history is made of, ready to be called."""
    rows, used = len(history.done), history.done.sum(1)
    designs, factor, none = Protocol(experiment).designs(), torch.ones(rows), GaussianLaw(experiment)
    referee = Referee(experiment, rows, PARTICLES)
    referee.update(history)
    probability = referee.probability[:, :-1]

    def again() -> None:
        referee.reset(torch.arange(rows))
        referee.update(history)

    found: dict[str, Callable[[], object]] = {}
    for draws in every_draws:
        look = partial(referee.forecast, designs, factor, draws)
        made = look()
        found |= {
            f"forecast, {draws} values": look,
            f"EIG of it, {draws} values": partial(expected_information, probability, made),
            f"bound of it, {draws} values": partial(information_bound, probability, made),
        }
    return found | {
        "evidence of none": partial(none.log_evidence, history, used),
        f"belief after {MEASUREMENTS} measurements": again,
    }


def decisions(every_draws: Sequence[int]) -> dict[str, tuple[list[Callable[[], object]], Callable[[], object]]]:
    """What an agent does of observations that it has taken in: each episode alone, and all of them at once."""
    env: Any = gymnasium.make_vec(ID, num_envs=TOGETHER, autoreset_mode=AutoresetMode.DISABLED)
    single = gymnasium.make_vec(ID, num_envs=1, autoreset_mode=AutoresetMode.DISABLED)
    observation, _ = env.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    protocol = protocol_of(env.unwrapped.task_config)
    for _ in range(MEASUREMENTS):
        chosen = protocol.designs()[torch.randint(0, 120, (TOGETHER,), generator=generator)]
        action = protocol.experiments(chosen, torch.zeros(TOGETHER, dtype=torch.int64))
        observation, *_ = env.step(action.numpy())

    def of(rows: slice, bound: bool, draws: int) -> Callable[[], object]:
        face = single if rows.stop - rows.start == 1 else env
        policy = agents.make("eig", face, particles=PARTICLES, draws=draws, bound=bound)
        return partial(policy.act, {key: value[rows] for key, value in observation.items()})

    alone, together = [slice(row, row + 1) for row in range(TOGETHER)], slice(0, TOGETHER)
    return {
        f"decision by {name}, {draws} values": ([of(row, bound, draws) for row in alone], of(together, bound, draws))
        for draws in every_draws
        for name, bound in (("EIG", False), ("the bound", True))
    }


def in_turn(calls: Sequence[Callable[[], object]]) -> None:
    """One call after the other."""
    for call in calls:
        call()


def campaigns(experiment: Experiment, rows: int, measurements: int = MEASUREMENTS) -> History:
    """Random experiments of worlds from the priors."""
    generator = torch.Generator().manual_seed(0)
    designs, laws = Protocol(experiment).designs(), list(bind_set(experiment.law_set).values())
    design = designs[torch.randint(0, len(designs), (rows, measurements), generator=generator)]
    z = torch.randn(rows, 1, max(len(law.parameters) for law in laws), generator=generator)
    said = torch.stack([law.mean(z[..., : len(law.parameters)], design) for law in laws], dim=1)
    value = said[torch.arange(rows), torch.arange(rows) % len(laws)]
    one = torch.ones_like(value)
    value = value + experiment.noise_sd(value, one) * torch.randn(value.shape, generator=generator)
    return History(one > 0, design, one.long() * 0, value, one, one > 0, one < 0)


def median_ms(call: Callable[[], object], runs: int) -> tuple[float, float]:
    """Median milliseconds of a call on the processor and on the wall, after one call that fills the caches."""
    spent, wall = [], []
    with torch.inference_mode():
        for _ in range(runs + 1):
            began, clock = time.process_time(), time.perf_counter()
            call()
            spent.append(1e3 * (time.process_time() - began))
            wall.append(1e3 * (time.perf_counter() - clock))
    return statistics.median(spent[1:]), statistics.median(wall[1:])


if __name__ == "__main__":
    main()
