"""The displacement surrogate: probabilities, symmetry, slopes, range, and molecular dynamics beside it."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from stem_gym.core.errors import ConfigError, UnknownNameError, ValidRangeError
from stem_gym.datasets import recoil_thresholds
from stem_gym.datasets.recoil_shards import OUTCOMES, SITES
from stem_gym.datasets.recoil_thresholds import find_thresholds
from stem_gym.datasets.recoil_trajectories import make_shard
from stem_gym.simulator.event_rates import KineticsModel, from_thresholds
from stem_gym.surrogates.displacement import DisplacementSurrogate, recoil_direction, site_index
from stem_gym.surrogates.displacement_card import Recoils, calibration_error, held_out_scores
from stem_gym.surrogates.displacement_rates import from_surrogate
from stem_gym.surrogates.surrogate import UncertaintyWarning

SURROGATE = DisplacementSurrogate.load()
ALONG = torch.tensor([0.0, 0.0, 1.0])


def recoils(count: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    tilt, azimuth = rng.uniform(0, 0.9, count), rng.uniform(0, 2 * np.pi, count)
    direction = recoil_direction(torch.tensor(tilt), torch.tensor(azimuth))
    transfer = torch.tensor(rng.uniform(6, 29, count))
    return transfer.float(), direction.float(), torch.tensor(rng.integers(0, len(SITES), count))


def test_probabilities_of_a_batch_are_those_of_its_rows() -> None:
    transfer, direction, site = recoils()
    given = SURROGATE.outcome_probabilities(transfer, direction, site)
    assert given.shape == (32, len(OUTCOMES))
    assert torch.allclose(given.sum(-1), torch.ones(32), atol=1e-6) and bool((given >= 0).all())
    for row in (0, 13, 31):
        alone = SURROGATE.outcome_probabilities(transfer[row], direction[row], site[row])
        assert torch.allclose(alone, given[row], atol=1e-6)


def test_shapes_broadcast() -> None:
    transfer, direction, _ = recoils(6)
    given = SURROGATE.outcome_probabilities(transfer[:, None, None], direction[:5, None], torch.tensor([0, 2]))
    assert given.shape == (6, 5, 2, len(OUTCOMES))
    one = SURROGATE.outcome_probabilities(transfer[4], direction[3], torch.tensor(2))
    assert torch.allclose(given[4, 3, 1], one, atol=1e-6)


def test_a_mirror_through_beam_and_partner_changes_nothing() -> None:
    transfer, direction, site = recoils()
    given = SURROGATE.outcome_probabilities(transfer, direction, site)
    mirrored = SURROGATE.outcome_probabilities(transfer, direction * torch.tensor([1.0, -1.0, 1.0]), site)
    assert torch.allclose(given, mirrored, atol=1e-6)
    turned = SURROGATE.outcome_probabilities(transfer, direction * torch.tensor([-1.0, 1.0, 1.0]), site)
    assert float((given - turned).abs().max()) > 0.05


def test_pristine_graphene_looks_the_same_after_a_third_of_a_turn() -> None:
    tilt, azimuth = torch.linspace(0.1, 0.8, 8), torch.linspace(0.0, 3.0, 8)
    third, sixth = 2 * math.pi / 3, math.pi / 3
    site = torch.full((8,), site_index("pristine"))

    def given(turn: float) -> torch.Tensor:
        return SURROGATE.outcome_probabilities(torch.tensor(22.0), recoil_direction(tilt, azimuth + turn), site)

    assert torch.allclose(given(0.0), given(third), atol=1e-5)
    assert float((given(0.0) - given(sixth)).abs().max()) > 0.05


def test_the_length_of_a_direction_does_not_matter() -> None:
    transfer, direction, site = recoils()
    one, other = (SURROGATE.outcome_probabilities(transfer, f * direction, site) for f in (1.0, 7.0))
    assert torch.allclose(one, other, atol=1e-5)


def test_slopes_are_those_of_finite_differences() -> None:
    surrogate = DisplacementSurrogate.load()
    surrogate.network.double()
    transfer, direction, site = (t.double() if t.is_floating_point() else t for t in recoils(5))
    transfer.requires_grad_(True)
    direction.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda t, d: surrogate.outcome_probabilities(t, d, site), (transfer, direction), eps=1e-6, atol=1e-5
    )


def test_slopes_are_finite_along_the_beam() -> None:
    direction = ALONG.clone().requires_grad_(True)
    SURROGATE.outcome_probabilities(torch.tensor(14.0), direction, torch.tensor(0))[1].backward()
    assert direction.grad is not None and bool(torch.isfinite(direction.grad).all())


@pytest.mark.parametrize("site", range(len(SITES)))
def test_far_below_every_threshold_nothing_happens(site: int) -> None:
    transfer = torch.tensor([0.0, 3.0, 5.0, 8.0])
    given = SURROGATE.outcome_probabilities(transfer, ALONG, torch.tensor(site))
    assert bool((given[:, 0] > 0.99).all())


# --- against molecular dynamics ---


def test_thresholds_along_the_beam_are_the_references_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bisected here and now; only a span around it is scanned, to save time."""
    monkeypatch.setattr(recoil_thresholds, "SPAN_EV", (13.0, 15.0))
    reference = {t.event: t.transfer_ev for t in find_thresholds("silicon_ahead", 0.0, 0.0)}["exchange"]
    found = SURROGATE.threshold_ev(ALONG[None], torch.tensor([site_index("silicon_ahead")]), ("exchange",))
    assert float(found) == pytest.approx(reference, abs=0.5)


def test_new_recoils_are_told_as_well_as_the_card_says() -> None:
    scores = held_out_scores(SURROGATE, Recoils.of(make_shard(seed=99, number=8, count=30)))
    claimed = SURROGATE.card.held_out["accuracy"]
    assert scores["accuracy"] > claimed - 3 * math.sqrt(claimed * (1 - claimed) / 30)


def test_the_card_keeps_what_was_promised() -> None:
    held = SURROGATE.card.held_out
    assert held["expected_calibration_error"] <= 0.03
    assert held["accuracy"] > 0.9 > held["accuracy_of_a_constant_guess"]
    assert held["recoils"] > 1000


def test_an_event_that_never_happens_has_no_threshold() -> None:
    found = SURROGATE.threshold_ev(ALONG.expand(2, 3), torch.tensor([2, 0]), ("exchange",))
    assert math.isnan(float(found[0])) and 12.0 < float(found[1]) < 16.0


# --- range and refusal ---


def test_rows_outside_the_valid_range_are_flagged_or_refused() -> None:
    transfer = torch.tensor([10.0, 40.0, 20.0, 20.0])
    direction = recoil_direction(torch.tensor([0.0, 0.0, 1.2, 0.5]), torch.zeros(4))
    site = torch.zeros(4, dtype=torch.int64)
    with pytest.warns(UncertaintyWarning, match=r"transfer_ev from 10 to 40 .*; tilt_deg from 0 to 68\.75"):
        given = SURROGATE.estimate(transfer, direction, site)
    assert given.inside.tolist() == [True, False, False, True]
    assert bool((given.std[1:3] == 0.5).all()) and bool((given.std[3] < 0.5).all())
    assert SURROGATE.inside(transfer, direction).tolist() == given.inside.tolist()
    with pytest.raises(ValidRangeError, match="transfer_ev"):
        SURROGATE.estimate(transfer, direction, site, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SURROGATE.estimate(transfer[[0, 3]], direction[[0, 3]], site[:2])


def test_the_standard_deviation_is_that_of_an_outcome() -> None:
    transfer, direction, site = recoils()
    given = SURROGATE.estimate(transfer, direction, site)
    assert torch.allclose(given.std**2, given.mean * (1 - given.mean), atol=1e-6)


@pytest.mark.parametrize(
    ("transfer", "direction", "site", "told"),
    [
        (torch.tensor(15.0), torch.zeros(3), torch.tensor(0), "longer than zero"),
        (torch.tensor(-1.0), ALONG, torch.tensor(0), "at least 0 eV"),
        (torch.tensor(math.nan), ALONG, torch.tensor(0), "finite"),
        (torch.tensor(15.0), ALONG, torch.tensor(4), "given 4 to 4"),
        (torch.tensor(15.0), ALONG, torch.tensor(-1), "given -1 to -1"),
        (torch.tensor(15.0), ALONG, torch.tensor(0.0), "integer type; given torch.float32"),
        (torch.tensor(15.0), ALONG[:2], torch.tensor(0), r"shape \(…, 3\); given shape \(2,\)"),
        (torch.ones(2), ALONG.expand(3, 3), torch.tensor(0), "must broadcast"),
    ],
)
def test_input_that_makes_no_sense_is_refused(
    transfer: torch.Tensor, direction: torch.Tensor, site: torch.Tensor, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        SURROGATE.outcome_probabilities(transfer, direction, site)


def test_unknown_names_are_told() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'silicon_ahead'"):
        site_index("silicon_ahed")
    with pytest.raises(UnknownNameError, match="Did you mean 'ejected'"):
        SURROGATE.threshold_ev(ALONG[None], torch.tensor([0]), ("eject",))


def test_calibration_error_of_a_hand_made_case() -> None:
    probability = np.array([[0.92, 0.08], [0.92, 0.08], [0.3, 0.7], [0.3, 0.7]])
    # Confidence 0.92 with one of two right, 0.7 with both: (2 × 0.42 + 2 × 0.3) / 4.
    assert calibration_error(probability, np.array([0, 1, 1, 1])) == pytest.approx(0.36)


def test_cross_sections_lie_beside_those_of_thresholds_and_end_where_the_surrogate_does() -> None:
    """Along the beam the thresholds agree to 0.2 eV; far above them that is worth less than a factor of three."""
    model = KineticsModel()
    learned, calibrated = from_surrogate(model, 100.0), from_thresholds(model, 100.0)
    for name in ("edge_barn", "pristine_barn"):
        assert 1 / 3 < getattr(learned, name) / getattr(calibrated, name) < 3
    assert from_surrogate(model, 80.0).exchange_barn > 10.0 * from_surrogate(model, 60.0).exchange_barn
    assert from_surrogate(KineticsModel(damage=None), 80.0).ejection_barn == 0.0
    with pytest.raises(ConfigError, match=r"knows recoils to 30 eV; at 200 keV [\d.]+% of them are harder"):
        from_surrogate(model, 200.0)
