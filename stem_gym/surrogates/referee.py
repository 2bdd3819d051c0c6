"""The referee: how probable each law is after some measurements, by particles of every law in all rows at once.

Particles live in the space of standard normal numbers from which priors make parameters, one more for the factor of
each site. They are weighed by the likelihood of each new measurement, and where too few of a law still count, they are
drawn again and moved by a few steps of Metropolis with the likelihood of the whole history (Chopin, Biometrika 89, 539,
2002). The evidence of a law is the product of the mean weights. With a law "none of these" (`GaussianLaw`), the set is
open. Particles lie in the order of a Hilbert curve through their law's parameters, so that the few of them which a
forecast takes at even steps of the weight stand for all.

Prior particles are one scrambled Sobol sequence for all rows; resampling and moves draw from a stream of each row, so
that a row depends on its seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stem_gym.core.experiments import Experiment, History
from stem_gym.core.streams import Streams, row_seeds
from stem_gym.simulator.laws import BoundLaw, bind_set
from stem_gym.surrogates.gaussian_law import GaussianLaw
from stem_gym.surrogates.hilbert import curve_order
from stem_gym.surrogates.information import Forecast
from stem_gym.surrogates.particles import Cloud, gather, gaussian_of, systematic

_FEW = 0.3  # share of the particles below which their effective number calls for new ones
_MOVES = (0.8, 0.3)  # lengths of the Metropolis steps, in units of the best for a Gaussian
_WIDER = 1.2  # how much wider than the particles the Gaussian is, from which all are drawn anew once
_BEST_STEP = 2.38  # over the root of the dimension (Roberts, Gelman and Gilks, Ann. Appl. Probab. 7, 110, 1997)
_IN_CACHE = 2**18  # numbers in the particles of rows that are renewed together, at most
_HALF_LOG_TAU = 0.5 * math.log(2.0 * math.pi)

_Given = tuple[list[dict[str, Tensor]], Tensor, Tensor]  # parameters by law, factors of sites, values of sites


class Referee:
    """Beliefs of B rows about the laws of an experiment description. `none` adds the answer that it is none of them.

    In single precision the last digits of a likelihood, which differ between processors and numbers of rows, now and
    then decide otherwise on a particle's move; in double precision (`dtype`), at half the speed, they practically never
    do.
    """

    def __init__(
        self,
        experiment: Experiment,
        rows: int,
        particles: int = 16384,
        seed: int = 0,
        none: GaussianLaw | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.experiment, self.rows, self.particles, self.none = experiment, rows, particles, none
        self._dtype = dtype
        self._laws = list(bind_set(experiment.law_set).values())
        sites = experiment.sites
        self._grids = [axis.grid() for axis in experiment.law_set.axes]
        self._designs = torch.cartesian_prod(*self._grids).reshape(-1, len(self._grids))
        self._same = torch.stack([law.same_over_grid(self._grids) for law in self._laws])  # (L, E)
        self._sites = sites.count if sites else 1
        self._factor = sites.factor if sites else 0.0
        self._remembers = bool(sites and sites.remembers)
        self._parameters = max(len(law.parameters) for law in self._laws)
        self._width = self._parameters + (self._sites if self._factor > 0.0 else 0)
        even = _even_normal(particles, self._width, dtype).T.expand(1, len(self._laws), -1, -1)
        self._prior = gather(even, self._curve_order(even))  # (1, L, Q, N)
        self._streams = Streams(row_seeds(seed, rows))
        with torch.inference_mode():
            self._cloud = self._fresh(rows)
        self._log_evidence = torch.zeros(rows, len(self._laws), dtype=dtype)
        self._history: History | None = None
        self._used = torch.zeros(rows, dtype=torch.int64)

    @torch.inference_mode()
    def reset(self, rows: Tensor, seeds: Sequence[int] | None = None) -> None:
        """Back to the prior on `rows` (n,); with `seeds`, their draws depend on these alone."""
        if seeds is not None:
            self._streams.seed(rows, seeds)
        self._streams.next_episode(rows)
        self._cloud.put(rows, self._fresh(len(rows)))
        self._log_evidence[rows] = 0.0
        self._used[rows] = 0

    @property
    def log_evidence(self) -> Tensor:
        """Logarithm (B, L) of the probability density of all measurements under each law."""
        return self._log_evidence

    @property
    def probability(self) -> Tensor:
        """Of the answers (B, A): the laws, all alike at the start, then that it is none of them."""
        log = self._log_evidence - math.log(len(self._laws))
        if self.none is None or self._history is None:
            share = 0.0 if self.none is None else self.none.prior
            known = (1.0 - share) * torch.softmax(log, dim=1)
            return torch.cat((known, torch.full((self.rows, 1), share)), dim=1)
        other = self.none.log_evidence(self._seen(), self._used) + math.log(self.none.prior)
        return torch.softmax(torch.cat((log + math.log1p(-self.none.prior), other.unsqueeze(1)), dim=1), dim=1)

    @property
    def chi2(self) -> Tensor:
        """χ² a measurement (B,) of the best particle of the likeliest law: the alarm for a truth outside the set."""
        best = self._cloud.misfit.amin(2).gather(1, self._log_evidence.argmax(1, keepdim=True)).squeeze(1)
        return best / self._used.clamp(min=1)

    @torch.inference_mode()
    def update(self, history: History) -> None:
        """Take in what is new since the last call. A row whose history does not go on from there starts anew."""
        if bool((other := self._others(history)).any()):
            self.reset(other.nonzero().squeeze(1))
        self._history = history
        count = history.done.sum(1)
        while bool((self._used < count).any()):
            new = self._used < count
            self._weigh(self._used.clamp(max=history.done.shape[1] - 1), new)
            self._used = self._used + new
            self._renew(new)

    @torch.inference_mode()
    def forecast(
        self,
        design: Tensor,
        noise_factor: Tensor,
        draws: int = 64,
        site: Tensor | None = None,
        fresh: Tensor | None = None,
        calibrated: Tensor | None = None,
    ) -> Forecast:
        """What the laws say of experiments (E, D) at the site (B,) of each row; the last law is `none`, if given.

        They are asked by the parameters of `draws` particles, which follow each other along the curve at even steps of
        the weight. The curve does not follow the factors of sites: where there are such, more are needed.
        `site` counts where sites have a memory or a factor. Whether it is `fresh` and `calibrated` (B,) is taken from
        the history unless it is given, as it must be after an action that no measurement has followed yet. Without a
        site it is one of which nothing is known.
        """
        index = systematic(self._cloud.weight, draws, torch.full((self.rows, len(self._laws), 1), 0.5))
        z = gather(self._cloud.z, index)  # (B, L, Q, S)
        same = self._same if torch.equal(design, self._designs) else None
        value = self._over_grid(z) if same is not None else self._means(self._values(z.unsqueeze(4)), design)
        if site is not None and self._history is not None:
            fresh = self._last_at(site) < 0 if fresh is None else fresh
            calibrated = self._calibrated_at(site) if calibrated is None else calibrated
            value = self._at_site(value, z, index, (site, fresh, calibrated))
        elif self._factor > 0.0:
            unknown = _shuffled_normal(draws).to(value).unsqueeze(1)
            value = self._scaled(value, self._factor * unknown)
        if self.none is not None:
            others = self.none.forecast(self._seen(), self._used, design, draws)
            value = torch.cat((value.mT, others.mT.unsqueeze(1)), dim=1).mT
            same = None if same is None else torch.cat((same, torch.arange(len(design)).unsqueeze(0)))
        return Forecast(value, self.experiment.noise, noise_factor, same=same)

    def _at_site(self, value: Tensor, z: Tensor, index: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Values of experiments at sites (B,), of which some are fresh (B,) and some calibrated (B,)."""
        where, (fresh, known) = state[0], (one[:, None, None, None] for one in state[1:])
        row = torch.arange(len(where))
        if self._remembers:
            before = gather(self._cloud.site_value, index)[row, :, where].unsqueeze(3)
            value = torch.where(fresh, value, torch.maximum(before, value))
        if self._factor > 0.0:
            own = self._factor * z[row, :, self._parameters + where].unsqueeze(3)
            value = self._scaled(value, torch.where(known, torch.zeros_like(own), own))
        return value

    def _others(self, history: History) -> Tensor:
        """Rows (B,) of which a history is not the one so far, with or without more."""
        other = history.done.sum(1) < self._used
        if self._history is None:
            return other
        places = min(history.done.shape[1], self._history.done.shape[1])
        taken = torch.arange(places) < self._used.unsqueeze(1)
        new, old = history.value[:, :places], self._history.value[:, :places]
        return other | ((new != old) & taken).any(1)

    def _last_at(self, site: Tensor) -> Tensor:
        history = self._seen()
        own = history.done & (history.site == site.unsqueeze(1)) & (self._numbers() < self._used.unsqueeze(1))
        return torch.where(own, self._numbers(), -1).amax(1)

    def _calibrated_at(self, site: Tensor) -> Tensor:
        history = self._seen()
        return (history.done & history.calibrated & (history.site == site.unsqueeze(1))).any(1)

    def _numbers(self) -> Tensor:
        return torch.arange(self._seen().done.shape[1]).unsqueeze(0)

    def _seen(self) -> History:
        if self._history is None:
            nothing = torch.zeros(self.rows, 1)
            design = torch.stack([axis.grid()[0] for axis in self.experiment.law_set.axes]).expand(self.rows, 1, -1)
            whole = nothing.long()
            return History(whole.bool(), design, whole, nothing, nothing + 1.0, ~whole.bool(), whole.bool())
        return self._history

    def _fresh(self, rows: int) -> Cloud:
        laws, count = len(self._laws), self.particles
        kept = self._sites if self._remembers else 0
        zero = torch.zeros(rows, laws, count, dtype=self._dtype)
        return Cloud(
            z=self._prior.expand(rows, -1, -1, -1).clone(),
            weight=torch.full_like(zero, 1.0 / count),
            log_likelihood=zero,
            misfit=zero.clone(),
            site_value=torch.zeros(rows, laws, kept, count, dtype=self._dtype),
        )

    def _values(self, z: Tensor) -> list[dict[str, Tensor]]:
        """The parameters (B, …) of each law by name, for z (B, L, Q, …)."""
        return [law.values(z[:, i].movedim(1, -1)) for i, law in enumerate(self._laws)]

    def _means(self, values: list[dict[str, Tensor]], design: Tensor) -> Tensor:
        """What the laws say, (B, L, …), for their parameters and experiments that broadcast with these."""
        return torch.stack([law.of(mine, design) for law, mine in zip(self._laws, values, strict=True)], dim=1)

    def _over_grid(self, z: Tensor) -> Tensor:
        """What the laws say of the grid of all experiments, (B, L, S, E) with S innermost, for z (B, L, Q, S)."""
        return torch.stack([law.over_grid(z[:, i].mT, self._grids) for i, law in enumerate(self._laws)], dim=1).mT

    def _scaled(self, value: Tensor, factor: Tensor) -> Tensor:
        return value + factor if self.experiment.law_set.logarithmic else value * torch.exp(factor)

    def _judged(self, given: _Given, rows: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-likelihood and χ² (n, L, N) of measurement `number` (n,) of `rows`, and the sites' values after it."""
        history, (values, factors, site_value) = self._seen(), given

        def of(part: Tensor) -> Tensor:
            picked = part[rows, number]
            return picked.to(self._dtype) if picked.is_floating_point() else picked

        value = self._means(values, of(history.design).unsqueeze(1))  # (n, L, N)
        row, site = torch.arange(len(rows)), of(history.site)
        if self._remembers:
            largest = torch.maximum(site_value[row, :, site], value)
            value = torch.where(of(history.fresh)[:, None, None], value, largest)
            site_value = site_value.clone()
            site_value[row, :, site] = value
        if self._factor > 0.0:
            factor = self._factor * factors[row, :, site]
            free = of(history.calibrated)[:, None, None]
            value = self._scaled(value, torch.where(free, torch.zeros_like(factor), factor))
        deviation = self.experiment.noise_sd(value, of(history.noise_factor)[:, None, None])
        square = ((of(history.value)[:, None, None] - value) / deviation).square()
        return -0.5 * square - deviation.log() - _HALF_LOG_TAU, square, site_value

    def _weigh(self, number: Tensor, new: Tensor) -> None:
        """Take measurement `number` (B,) of the rows that have a `new` one into the weights."""
        rows = new.nonzero().squeeze(1)
        part = self._cloud.of(rows)
        given = self._values(part.z), part.z[:, :, self._parameters :], part.site_value
        log, square, site_value = self._judged(given, rows, number[rows])
        log_weight = part.weight.log() + log
        top = log_weight.amax(2, keepdim=True)
        lost = torch.isneginf(top)  # no particle of a law is near: it is out, and keeps its particles as they are
        weight = torch.exp(log_weight - top)
        total = weight.sum(2, keepdim=True)
        self._log_evidence[rows] += torch.where(lost, top, top + total.log()).squeeze(2)
        weight = torch.where(lost, part.weight, weight / total)
        likelihood, misfit = part.log_likelihood + log, part.misfit + square
        self._cloud.put(rows, Cloud(part.z, weight, likelihood, misfit, site_value))

    def _renew(self, new: Tensor) -> None:
        """Draw the particles again and move them, in the rows where those of any law that still counts are few."""
        few = self._cloud.weight.square().sum(2) > 1.0 / (_FEW * self.particles)
        counts = torch.softmax(self._log_evidence, dim=1) > 1e-6
        rows = (new & (few & counts).any(1)).nonzero().squeeze(1)
        if len(rows):
            for some in rows.split(max(1, _IN_CACHE // self._cloud.z[0].numel())):
                self._renew_rows(some)

    def _renew_rows(self, rows: Tensor) -> None:
        before = self._cloud.of(rows)
        offset = self._streams.uniform(rows, (len(self._laws), 1)).to(self._dtype)
        centre, step = gaussian_of(before.z, before.weight)
        cloud = before.picked(systematic(before.weight, self.particles, offset))
        cloud.weight = torch.full_like(cloud.weight, 1.0 / self.particles)
        cloud = self._moved(cloud, _WIDER * step, rows, centre)
        for length in _MOVES:
            cloud = self._moved(cloud, step * (length * _BEST_STEP / math.sqrt(self._width)), rows)
        even = torch.linalg.solve_triangular(step, cloud.z - centre, upper=False)
        self._cloud.put(rows, cloud.picked(self._curve_order(even)))

    def _curve_order(self, even: Tensor) -> Tensor:
        """Indices (n, L, N) that put particles, in units of their spread (n, L, Q, N), along the curve of each law."""
        counts = [len(law.parameters) for law in self._laws]
        return torch.stack([curve_order(even[:, i, :count].mT) for i, count in enumerate(counts)], dim=1)

    def _moved(self, cloud: Cloud, step: Tensor, rows: Tensor, centre: Tensor | None = None) -> Cloud:
        """One step of Metropolis and Hastings for each particle, by a Gaussian of a given factor (n, L, Q, Q).

        It lies around the particle, or around a `centre` (n, L, Q, 1) that all have in common.
        """
        normal = self._streams.normal(rows, cloud.z.shape[1:]).to(self._dtype)
        proposed = (cloud.z if centre is None else centre) + step @ normal
        odds = torch.zeros_like(cloud.log_likelihood)  # of proposing the way back over the way there
        if centre is not None:
            back = torch.linalg.solve_triangular(step, cloud.z - centre, upper=False)
            odds = 0.5 * (normal.square().sum(2) - back.square().sum(2))
        values, factors = self._values(proposed), proposed[:, :, self._parameters :]
        site_value = torch.zeros_like(cloud.site_value)
        likelihood, misfit = torch.zeros_like(cloud.log_likelihood), torch.zeros_like(cloud.misfit)
        used = self._used[rows]
        everywhere = int(used.min())
        for number in range(int(used.max())):
            log, square, after = self._judged((values, factors, site_value), rows, torch.full_like(rows, number))
            if number >= everywhere:
                there = (number < used)[:, None, None]
                log, square = log.masked_fill_(~there, 0.0), square.masked_fill_(~there, 0.0)
                after = torch.where(there.unsqueeze(2), after, site_value)
            likelihood, misfit, site_value = likelihood.add_(log), misfit.add_(square), after
        gain = likelihood - cloud.log_likelihood - 0.5 * (proposed.square().sum(2) - cloud.z.square().sum(2))
        gain = gain + odds
        taken = self._streams.uniform(rows, gain.shape[1:]).to(self._dtype).log() < gain
        fresh = Cloud(proposed, cloud.weight, likelihood, misfit, site_value)
        return cloud.replaced(taken, fresh)


def prior_particles(experiment: Experiment, particles: int, extra: int) -> tuple[list[BoundLaw], Tensor]:
    """The laws, and standard normal numbers (L, N, P + extra) that fill their parameters evenly, with some more."""
    laws = list(bind_set(experiment.law_set).values())
    width = max(len(law.parameters) for law in laws) + extra
    return laws, _even_normal(particles, width, torch.float32).expand(len(laws), -1, -1)


def _even_normal(count: int, width: int, dtype: torch.dtype) -> Tensor:
    engine = torch.quasirandom.SobolEngine(width, scramble=True, seed=0)
    part = engine.draw(count, dtype=torch.float64).clamp(1e-7, 1.0 - 1e-7)
    return torch.special.ndtri(part).to(dtype)


def _shuffled_normal(count: int) -> Tensor:
    """Quantiles (count,) of a standard normal number, in the same order at every call, that of no particles."""
    part = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return torch.special.ndtri(part)[order].float()
