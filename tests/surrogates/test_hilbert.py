"""The curve that puts particles in order: it goes through every cell, from neighbour to neighbour."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stem_gym.surrogates.hilbert import curve_order, curve_places


@pytest.mark.parametrize(("dimensions", "bits"), [(1, 15), (2, 7), (3, 5), (4, 3), (5, 3)])
def test_it_goes_through_every_cell_once_from_neighbour_to_neighbour(dimensions, bits):
    place = curve_places(dimensions, bits)
    order = np.argsort(place)
    assert (place[order] == np.arange(2 ** (dimensions * bits))).all()
    cell = np.stack(np.unravel_index(order, (2**bits,) * dimensions), axis=1)
    assert (np.abs(np.diff(cell, axis=0)).sum(1) == 1).all()


def test_it_begins_as_hilberts_own_figure_does():
    cell = np.stack(np.unravel_index(np.argsort(curve_places(2, 1)), (2, 2)), axis=1)
    assert cell.tolist() == [[0, 0], [0, 1], [1, 1], [1, 0]]


@pytest.mark.parametrize("dimensions", [1, 2, 3, 5, 7])
def test_points_next_to_each_other_in_the_order_are_close(dimensions):
    points = torch.randn(3, 2, 4000, dimensions, generator=torch.Generator().manual_seed(0))
    order = curve_order(points)
    assert order.shape == (3, 2, 4000) and (order.sort(2).values == torch.arange(4000)).all()
    along = points.gather(2, order.unsqueeze(3).expand_as(points))[..., :5]
    step, any_two = along.diff(dim=2).norm(dim=3).mean(), (along[:, :, 2000:] - along[:, :, :2000]).norm(dim=3).mean()
    assert step < (0.01 if dimensions == 1 else 0.6) * any_two


def test_points_outside_count_as_those_at_the_edge_and_keep_their_order():
    points = torch.tensor([9.0, -4.0, 0.0, 5.0, -torch.inf]).unsqueeze(1)
    assert curve_order(points).tolist() == [1, 4, 2, 0, 3]
