"""A referee beside an instrument: what it writes down, what it costs, and that the sample does not know of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stem_gym.core.config import parse
from stem_gym.core.errors import CapabilityError, ConfigError, InstructionError
from stem_gym.core.instructions import Acquire, Park, Pulse, Reading, Set, Wait
from stem_gym.core.streams import Streams, row_seeds
from stem_gym.instruments.law import Config, LawInstrument, make
from stem_gym.instruments.refereed import BELIEF, Refereed
from stem_gym.surrogates.referee import Referee

NOISE = {"absolute": 8.0, "relative": 0.08}
EXPERIMENT: dict[str, Any] = {"laws": "domain_growth", "noise": NOISE, "measure_s": 16.0}
SITES: dict[str, Any] = {
    "sites": {"count": 3, "factor": 0.5, "remembers": True, "move_s": 180.0},
    "noise": {**NOISE, "growth_s": 900.0},
    "enabling": {
        "erase": {"does": "erase", "seconds": 60.0},
        "gauge": {"does": "calibrate", "seconds": 30.0},
        "tune": {"does": "tune", "seconds": 300.0},
    },
}
DAMAGE: dict[str, Any] = {"laws": "damage", "noise": {"absolute": 1.0}}


def settings(referee: Any, **changes: Any) -> dict[str, Any]:
    return {"kind": "law", "experiment": {**EXPERIMENT, **changes}, "referee": referee}


def begun(made: Any, seeds: list[int]) -> Any:
    streams, rows = Streams(seeds), torch.arange(made.rows)
    streams.next_episode(rows)
    made.reset(streams, rows)
    return made


def refereed(rows: int, seeds: list[int] | None = None, particles: int = 512, none: Any = None, **changes: Any) -> Any:
    given = settings({"particles": particles, "none": none}, **changes)
    return begun(make(given, rows, torch.device("cpu")), seeds or row_seeds(0, rows))


def each(rows: torch.Tensor, value: float) -> torch.Tensor:
    return torch.full((len(rows),), value)


def park(made: Any, x: float, rows: torch.Tensor) -> Reading:
    return made.execute(Park(rows, each(rows, x), each(rows, 0.5)))


def pulse(made: Any, bias_v: float, time_s: float, rows: torch.Tensor) -> Reading:
    return made.execute(Pulse(rows, each(rows, bias_v), each(rows, time_s)))


def measure(made: Any, rows: torch.Tensor) -> torch.Tensor:
    (quantity,) = made.capabilities.detectors - {BELIEF}
    return made.execute(Acquire(rows, quantity, each(rows, 16.0))).data[quantity]


def believed(made: Any, rows: torch.Tensor | None = None) -> torch.Tensor:
    asked = torch.arange(made.rows) if rows is None else rows
    return made.execute(Acquire(asked, BELIEF, each(asked, 0.0))).data[BELIEF]


def campaign(made: Any, rows: torch.Tensor, pulses: int = 6) -> list[torch.Tensor]:
    """Measurements after pulses of rising bias, each at a fresh place."""
    values = []
    for number in range(pulses):
        park(made, 0.5, rows)
        pulse(made, 1.0 + 2.0 * number, 10.0 ** (number % 3 - 1), rows)
        values.append(measure(made, rows))
    return values


def test_it_is_made_where_the_settings_ask_for_it_alone():
    device = torch.device("cpu")
    assert isinstance(make(settings(None), 1, device), LawInstrument)
    assert isinstance(make(settings({"particles": 64}), 1, device), Refereed)


def test_the_sample_is_the_same_as_without_it():
    """Bit for bit, though beliefs are asked for in between: the referee draws nothing from the sample's streams."""
    rows = torch.arange(5)
    alone = begun(LawInstrument(parse(Config, settings(None), "test"), 5), row_seeds(3, 5))
    watched = refereed(5, row_seeds(3, 5))
    for _ in range(3):
        for one, other in zip(campaign(alone, rows, 2), campaign(watched, rows, 2), strict=True):
            assert torch.equal(one, other)
        believed(watched)
    for name, value in alone.truth().items():
        assert torch.equal(value, watched.truth()[name])


def test_a_belief_is_even_at_first_and_then_follows_the_measurements():
    made = refereed(64, particles=2048)
    assert believed(made).tolist() == [pytest.approx([0.25, 0.25, 0.25, 0.25, 0.0])] * 64
    campaign(made, torch.arange(64), 10)
    belief, true = believed(made), made.truth()["answer"]
    torch.testing.assert_close(belief.sum(1), torch.ones(64), atol=3e-4, rtol=0.0)
    share = belief.gather(1, true.unsqueeze(1)).mean()
    # A calibrated belief holds the truth as probable as it expects to: Σp² on average.
    assert float(share) > 0.5
    assert float(share) == pytest.approx(float(belief.square().sum(1).mean()), abs=0.15)


def test_it_believes_what_a_referee_of_the_same_measurements_believes():
    """Another referee, with more particles and other draws, fed by hand."""
    made, rows = refereed(4, particles=4096), torch.arange(4)
    campaign(made, rows)
    judge = Referee(made._experiment, 4, 16384, seed=99)
    judge.update(made._book.history)
    torch.testing.assert_close(believed(made), judge.probability, atol=0.05, rtol=0.0)


def test_none_of_these_has_its_probability_before_anything_was_measured():
    assert believed(refereed(2, none=0.2)).tolist() == [pytest.approx([0.2] * 5, abs=1e-4)] * 2


def test_what_it_writes_down_by_hand():
    """Sites that remember, three routines, a move back: everything that the referee's likelihood depends on."""
    made, rows = refereed(1, **SITES), torch.arange(1)
    values = []

    def experiment(x: float, bias_v: float) -> None:
        park(made, x, rows)
        pulse(made, bias_v, 1.0, rows)
        values.append(float(measure(made, rows)))

    experiment(0.1, 5.0)
    experiment(0.9, 2.0)
    experiment(0.1, 8.0)
    made.execute(Set(rows, "gauge", each(rows, 1.0)))
    values.append(float(measure(made, rows)))  # the same domain again, free of the site's factor
    made.execute(Set(rows, "erase", each(rows, 1.0)))
    made.execute(Set(rows, "tune", each(rows, 1.0)))
    experiment(0.1, 3.0)
    history = made._book.history
    assert history.done[0].sum() == 5 and history.value[0, :5].tolist() == pytest.approx(values)
    assert history.design[0, :5, 0].tolist() == [5.0, 2.0, 8.0, 8.0, 3.0]
    assert history.site[0, :5].tolist() == [0, 2, 0, 0, 0]
    assert history.fresh[0, :5].tolist() == [True, True, False, False, True]
    assert history.calibrated[0, :5].tolist() == [False, False, False, True, True]
    # 1 s pulses, 16 s measurements; moves of 180 s to the third site and back; 30 s of calibration; then tuned.
    begun_s = [1.0, 198.0, 395.0, 441.0, 1.0]
    assert history.noise_factor[0, :5].log().mul(900.0).tolist() == pytest.approx(begun_s, abs=0.05)


def test_controls_that_are_set_belong_to_the_experiment():
    made, rows = refereed(2, **DAMAGE), torch.arange(2)
    first = made._book.control.clone()
    made.execute(Set(rows[1:], "energy_kev", each(rows[1:], 200.0)))
    measure(made, rows)
    design = made._book.history.design[:, 0]
    assert design[:, 0].tolist() == [60.0, 200.0] and torch.equal(design[:, 1:], first[:, 1:])


def test_waits_are_experiments_where_the_laws_name_them_and_nothing_else_is():
    made, rows = refereed(1, laws="coarsening", noise={"absolute": 0.2, "relative": 0.05}), torch.arange(1)
    park(made, 0.5, rows)
    measure(made, rows)
    assert made._book.count.tolist() == [0], "no anneal, nothing to learn from"
    made.execute(Wait(rows, each(rows, 600.0)))
    measure(made, rows)
    assert made._book.count.tolist() == [1] and 600.0 in made._book.history.design[0, 0].tolist()


def test_a_measurement_without_an_experiment_tells_nothing():
    made, rows = refereed(3), torch.arange(3)
    park(made, 0.5, rows)
    measure(made, rows)
    assert made._book.count.tolist() == [0, 0, 0] and float(believed(made)[:, :4].std()) == 0.0


def test_a_long_history_is_kept_whole():
    made, rows = refereed(2), torch.arange(2)
    values = campaign(made, rows[:1], 7) + campaign(made, rows[:1], 7) + campaign(made, rows[:1], 7)
    assert made._book.count.tolist() == [21, 0]
    assert made._book.history.value[0, :21].tolist() == pytest.approx([float(value) for value in values])
    assert not bool(made._book.history.done[1].any()) and believed(made)[1].tolist() == [0.25] * 4 + [0.0]


def test_a_row_depends_on_its_seed_alone():
    """Not on the number of rows, on what neighbours do, on when a belief is asked for or on partial resets."""
    seeds = row_seeds(7, 5)
    many, one = refereed(5, seeds), refereed(1, seeds[3:4])
    campaign(many, torch.tensor([0, 2]), 3)
    believed(many)
    for _ in range(6):
        campaign(many, torch.tensor([1, 3]), 1)
        believed(many, torch.tensor([3]))
    for _ in range(6):
        campaign(one, torch.arange(1), 1)
    assert torch.equal(believed(many)[3], believed(one)[0])


def test_a_new_episode_knows_nothing_and_draws_anew():
    streams, rows = Streams(row_seeds(1, 2)), torch.arange(2)
    made = make(settings({"particles": 512}), 2, torch.device("cpu"))
    keys = []
    for _ in range(2):
        streams.next_episode(rows)
        made.reset(streams, rows)
        keys.append(made._referee._streams.snapshot()[:, :2].tolist())
        assert believed(made)[0].tolist() == [0.25] * 4 + [0.0]
        campaign(made, rows)
        assert believed(made)[0].tolist() != [0.25] * 4 + [0.0]
    assert keys[0][0] != keys[1][0] != keys[1][1]


def test_a_moment_comes_back_with_what_was_believed():
    made, rows = refereed(2), torch.arange(2)
    campaign(made, rows, 4)
    before, streams = believed(made), made.instrument._streams
    moment, stand = made.snapshot(), streams.snapshot()
    futures = []
    for _ in range(2):
        futures.append((*campaign(made, rows, 3), believed(made)))
        streams.restore(stand)
        made.restore(moment, streams)
    assert torch.equal(believed(made), before)
    assert all(torch.equal(one, other) for one, other in zip(*futures, strict=True))


def test_a_pulse_on_one_that_was_not_measured_is_refused_where_sites_remember():
    made, rows = refereed(2, **SITES), torch.arange(2)
    park(made, 0.1, rows)
    pulse(made, 5.0, 1.0, rows[1:])
    before = made.instrument.snapshot()
    with pytest.raises(
        InstructionError, match=r"rows \[1\] remembers a pulse that was not measured; measure radius_nm"
    ):
        pulse(made, 6.0, 1.0, rows)
    assert torch.equal(made.instrument.snapshot().value, before.value), "nothing happened"
    pulse(made, 6.0, 1.0, rows[:1])
    park(made, 0.9, rows)
    pulse(made, 6.0, 1.0, rows)  # at another site
    park(made, 0.1, rows)
    made.execute(Set(rows, "erase", each(rows, 1.0)))
    pulse(made, 6.0, 1.0, rows)


def test_a_belief_takes_the_exposure_that_is_asked_for_and_no_electrons():
    made, rows = refereed(2), torch.arange(2)
    for exposure_s in (0.0, 3.0):
        reading = made.execute(Acquire(rows, BELIEF, each(rows, exposure_s)))
        assert reading.seconds.tolist() == [exposure_s] * 2 and not bool(reading.electrons.any())
    with pytest.raises(CapabilityError, match=r"no detector 'beliefs'; it has \['belief', 'radius_nm'\]"):
        made.execute(Acquire(rows, "beliefs", each(rows, 0.0)))
    with pytest.raises(InstructionError, match="exposure_s must be finite and within"):
        made.execute(Acquire(rows, "radius_nm", each(rows, 0.0)))


def test_an_instrument_that_pictures_domains_has_no_numbers_for_it():
    given = {**settings({"particles": 64}), "picture": {}}
    with pytest.raises(ConfigError, match=r"needs numbers of radius_nm, .* detectors phase"):
        make(given, 1, torch.device("cpu"))
