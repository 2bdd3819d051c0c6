"""What a policy keeps of the spectra it was shown."""

from __future__ import annotations

import numpy as np

from agents.engine.spectra_seen import SpectraSeen


def shown(cells: list[int | None], steps_left: list[int], value: float = 1.0) -> dict:
    """An observation of 3 × 4 cells whose last measurement was in these cells; None: nothing measured yet."""
    rows = len(cells)
    probe, measured = np.full((rows, 2), 0.5, np.float32), np.zeros((rows, 3, 4), np.uint8)
    for row, cell in enumerate(cells):
        if cell is not None:
            probe[row] = (cell % 4 + 0.5) / 4, (cell // 4 + 0.5) / 3
            measured[row, cell // 4, cell % 4] = 1
    spectrum = np.float32(value) * np.arange(1, 6, dtype=np.float32) * np.ones((rows, 1), np.float32)
    budget = np.array([[left, 0.5, 0.5] for left in steps_left], np.float32)
    return {"probe": probe, "measured": measured, "spectrum": spectrum, "budget": budget}


def exposures(*seconds: float) -> np.ndarray:
    return np.array(seconds)


def test_a_spectrum_is_kept_once_with_its_cell() -> None:
    seen = SpectraSeen(2, (3, 4), 5, most=4)
    assert not seen.take_in(shown([None, None], [9, 9]), exposures(1, 1)).any()  # nothing was measured yet
    first = shown([7, None], [8, 9])
    assert seen.take_in(first, exposures(0.5, 1)).tolist() == [True, False]
    assert seen.take_in(first, exposures(0.5, 1)).tolist() == [False, False]  # the same observation again
    assert seen.count.tolist() == [1, 0] and int(seen.cell[0, 0]) == 7
    assert seen.spectra[0, 0].tolist() == [1, 2, 3, 4, 5] and float(seen.exposure_s[0, 0]) == 0.5


def test_a_cell_measured_again_is_replaced_by_the_sum() -> None:
    seen = SpectraSeen(1, (3, 4), 5, most=4)
    for left, cell, value, seconds in ((9, 3, 1.0, 0.5), (8, 5, 2.0, 1.0), (7, 3, 4.0, 0.25)):
        seen.take_in(shown([cell], [left], value), exposures(seconds))
    assert seen.count.tolist() == [2]
    assert float(seen.spectra[0, 0, 0]) == 4.0 and float(seen.exposure_s[0, 0]) == 0.75
    assert float(seen.spectra[0, 1, 0]) == 2.0


def test_the_oldest_is_forgotten_when_memory_is_full() -> None:
    seen = SpectraSeen(1, (3, 4), 5, most=3)
    for step, cell in enumerate((0, 1, 2, 3)):
        seen.take_in(shown([cell], [9 - step]), exposures(1.0))
    assert sorted(seen.cell[0].tolist()) == [1, 2, 3]


def test_forgetting_one_row_leaves_the_others() -> None:
    seen = SpectraSeen(2, (3, 4), 5, most=3)
    seen.take_in(shown([2, 4], [9, 9]), exposures(1, 1))
    seen.forget(np.array([0]))
    assert seen.count.tolist() == [0, 1]
    assert seen.take_in(shown([6, 4], [9, 9]), exposures(1, 1)).tolist() == [True, False]
    assert int(seen.cell[0, 0]) == 6


def test_the_last_cell_of_the_field_is_the_last() -> None:
    seen = SpectraSeen(1, (3, 4), 5, most=3)
    observation = shown([11], [9]) | {"probe": np.array([[1.0, 1.0]], np.float32)}
    seen.take_in(observation, exposures(1.0))
    assert int(seen.cell[0, 0]) == 11
