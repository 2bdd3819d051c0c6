"""Identify: which laws of a set can be told apart at all, before anyone spends time at the microscope?

In worlds drawn from the priors, every law is fitted to what every other one gives without noise in all experiments of
the design space. How badly it fits, χ² a measurement, says how much each experiment tells on average; Laplace's
evidence of the fits, which counts what a law pays for its freedom, says what a number of them is expected to tell: the
logarithm of the Bayes factor. Experiments are spread evenly; those that an agent chooses tell more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from stem_gym.core.config import parse, read_yaml
from stem_gym.core.errors import ConfigError
from stem_gym.core.experiments import Experiment
from stem_gym.core.hypotheses import LawSet, law_set_files, read_law_set
from stem_gym.core.streams import Streams, row_seeds
from stem_gym.envs.registration import variant_files
from stem_gym.envs.variants import load_variant
from stem_gym.jobs.roster import check_id
from stem_gym.simulator.law_fit import LawFit, fit_law
from stem_gym.simulator.laws import BoundLaw, bind_set

TOLD_APART = math.log(20.0)  # a Bayes factor of 20, "strong" (Kass and Raftery, J. Am. Stat. Assoc. 90, 773, 1995);
# between two laws that were alike before, it is a claim at 0.95
_MOSTLY, _SOMETIMES = 0.5, 0.05  # shares of the worlds from which on a pair is named
_TASK = "hypothesis_discrimination"

Watch = Callable[[str, float, float | None], None]  # what, how far, of how much


@dataclass(frozen=True)
class IdentifyJob:
    """What to look at. What is not given comes from the environment, or from the first that uses the set."""

    laws: str  # an environment id, the name of a set, or a YAML file
    experiments: int | None = None
    noise_absolute: float | None = None
    noise_relative: float | None = None
    worlds: int = 32  # of each law
    seed: int = 0


@dataclass(frozen=True)
class Pair:
    """How one law fits what another one gives."""

    truth: str
    rival: str
    chi2: float  # a measurement, median of the worlds
    log_factor: float  # logarithm of the Bayes factor for the truth, median of the worlds
    alike: float  # share of the worlds in which it stays below TOLD_APART


@dataclass(frozen=True)
class Identified:
    """All ordered pairs of a set."""

    laws: str
    quantity: str
    source: str  # of what was not given
    experiments: int
    noise_absolute: float
    noise_relative: float
    worlds: int
    pairs: tuple[Pair, ...]

    def as_data(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "told_apart": TOLD_APART, "sentences": self.sentences()}

    def table(self) -> Table:
        """The pairs."""
        noise = f"{self.noise_absolute:g} + {self.noise_relative:.0%}"
        table = Table(
            title=f"{self.laws}: {self.experiments} experiments spread evenly, noise {noise} of {self.quantity} "
            f"({self.source}), {self.worlds} worlds of each law"
        )
        for head in ("true law", "rival"):
            table.add_column(head, no_wrap=True)
        for head in ("χ² a measurement", "ln Bayes factor", "not told apart"):
            table.add_column(head, justify="right")
        for pair in self.pairs:
            numbers = f"{pair.chi2:.3g}", f"{pair.log_factor:.1f}", f"{pair.alike:.0%}"
            table.add_row(pair.truth, pair.rival, *numbers, style="red" if pair.alike > _MOSTLY else "")
        return table

    def sentences(self) -> list[str]:
        """Which laws can not be told apart, in words."""
        said = []
        for pair in sorted(self.pairs, key=lambda pair: -pair.alike):
            if pair.alike > _MOSTLY:
                start = f"{pair.truth} can not be told from {pair.rival}"
            elif pair.alike > _SOMETIMES:
                start = f"{pair.truth} is not always told from {pair.rival}"
            else:
                continue
            said.append(
                f"{start}: in {pair.alike:.0%} of the worlds {self.experiments} experiments are not expected to make "
                "it 20 times as probable."
            )
        return said or [f"Every law can be told from every other one in {self.experiments} experiments."]


def identify(job: IdentifyJob, watch: Watch | None = None) -> Identified:
    """Every ordered pair of a set; `watch` is told after each.

    Sites count as fresh and calibrated, and the noise as just tuned. Raises UnknownNameError for a set or an id that
    does not exist, ConfigError for a set that makes none and where noise or the number of experiments is missing.
    """
    if job.worlds < 1 or (job.experiments is not None and job.experiments < 1):
        raise ConfigError(f"Give at least one world and one experiment; given {job.worlds} and {job.experiments}.")
    experiment, count, source = _experiment(job)
    laws = experiment.law_set
    bound = bind_set(laws)
    design = torch.cartesian_prod(*(axis.grid() for axis in laws.axes)).reshape(-1, len(laws.axes)).double()
    pairs: list[Pair] = []
    for truth, law in bound.items():
        value = law.mean(_worlds(law, job.worlds, job.seed).unsqueeze(1), design)  # (W, E)
        sd = experiment.noise_sd(value, torch.ones(()))
        own = fit_law(law, design, value, sd, count)
        for rival in bound:
            if rival != truth:
                pairs.append(_pair(truth, rival, own, fit_law(bound[rival], design, value, sd, count)))
                if watch is not None:
                    watch("pairs", len(pairs), len(bound) * (len(bound) - 1))
    noise = experiment.noise
    return Identified(laws.name, laws.quantity, source, count, noise.absolute, noise.relative, job.worlds, tuple(pairs))


def _pair(truth: str, rival: str, own: LawFit, other: LawFit) -> Pair:
    log_factor = own.log_evidence - other.log_evidence
    alike = (log_factor < TOLD_APART).double().mean()
    return Pair(truth, rival, float(other.chi2.quantile(0.5)), float(log_factor.quantile(0.5)), float(alike))


def _worlds(law: BoundLaw, worlds: int, seed: int) -> Tensor:
    """Standard normal numbers (W, P) of the law's parameters."""
    streams = Streams(row_seeds(seed, worlds))
    streams.next_episode(torch.arange(worlds))
    return streams.normal(torch.arange(worlds), (len(law.parameters),)).double()


def _experiment(job: IdentifyJob) -> tuple[Experiment, int, str]:
    """The laws with the noise, the number of experiments, and a word on where these come from."""
    id = job.laws if _is_id(job.laws) else _first_id(job.laws)
    told: dict[str, Any] = {}
    if id is not None:
        task = load_variant(check_id(id)).variant.task
        if task.get("kind") != _TASK:
            raise ConfigError(f"{id} has no laws to tell apart; it is a task of the kind {task.get('kind')!r}.")
        section = parse(Experiment, task["experiment"], f"{id}, task.experiment")
        told = {
            "laws": section.law_set,
            "absolute": section.noise.absolute,
            "relative": section.noise.relative,
            "experiments": task["experiments"],
        }
    laws: LawSet = told.get("laws") or read_law_set(job.laws)
    absolute = told.get("absolute") if job.noise_absolute is None else job.noise_absolute
    relative = told.get("relative", 0.0) if job.noise_relative is None else job.noise_relative
    count = told.get("experiments") if job.experiments is None else job.experiments
    if absolute is None or count is None:
        raise ConfigError(
            f"No environment uses {job.laws}, so give its noise and a number: --noise-absolute, in {laws.quantity}, "
            "and --experiments."
        )
    made = parse(
        Experiment,
        {"laws": laws, "noise": {"absolute": absolute, "relative": relative}, "measure_s": 1.0},
        "experiment",
    )
    made.check()
    given = (job.experiments, job.noise_absolute, job.noise_relative)
    source = "as given" if id is None else f"of {id}" + (", changed" if any(one is not None for one in given) else "")
    return made, count, source


def _is_id(name: str) -> bool:
    return "/" in name and not name.endswith((".yaml", ".yml"))


def _first_id(laws: str) -> str | None:
    """The environment with the shortest id that uses a set which ships."""
    if laws not in law_set_files():
        return None
    users = []
    for id, path in variant_files().items():
        task = read_yaml(path).get("task", {})
        if task.get("kind") == _TASK and task["experiment"]["laws"] == laws:
            users.append(id)
    return min(users, key=lambda id: (len(id), id), default=None)
