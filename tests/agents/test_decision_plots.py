"""Figures of decisions: what is drawn, with which labels, in which places."""

from __future__ import annotations

import struct

import gymnasium
import numpy as np
import pytest

from agents.engine import decision_plots
from agents.engine.decision_log import DecisionLog
from agents.engine.decision_plots import draw_decision, draw_embedding, windows_of
from agents.engine.supervision import run_supervised
from stem_gym.core.errors import RecordError
from tests.agents.recorded import EDGE, quick_agent, search_env

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> DecisionLog:
    folder, env = tmp_path_factory.mktemp("plots"), search_env()
    run_supervised(quick_agent(env), env, None, folder, seed=3)
    return DecisionLog.read(folder)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written, as they were."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig

    def keep(self, path, **kwargs):
        figures.append(self)
        save(self, path, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def axes_of(figure) -> dict:
    """Panels by the letter of their title."""
    return {axis.get_title(loc="left")[:1]: axis for axis in figure.axes if axis.get_title(loc="left")}


def labels_of(figure) -> set[str]:
    return {text for axis in figure.axes for text in (axis.get_xlabel(), axis.get_ylabel()) if text}


def test_a_decision_is_drawn_with_units_and_places(log, drawn, tmp_path):
    path = draw_decision(log, tmp_path / "why.png")
    otherwise = draw_decision(log, tmp_path / "otherwise.png", otherwise={"another acquisition": 3, "other": 7})
    assert path.read_bytes() != otherwise.read_bytes(), "what would have been chosen is marked"
    data = path.read_bytes()
    assert data[:4] == b"\x89PNG" and struct.unpack(">II", data[16:24]) == (2200, 1000)
    panels, entry = axes_of(drawn[0]), log.row(0)[-1]
    assert set(panels) == set("abcdefg")
    assert {
        "x (nm)", "y (nm)", "measurement", "edge (electrons/s)", "ln expected improvement",
        "energy loss (eV)", "electrons/s and channel", "measurements", "embedding 1",
    } <= labels_of(drawn[0])  # fmt: skip
    shown = panels["b"].images[0]
    np.testing.assert_array_equal(shown.get_array(), entry.decision.mean[0])
    assert shown.get_extent() == [0.0, 60.0, 50.0, 0.0], "12 × 10 cells of 5 nm, y downwards"
    star = panels["d"].collections[0].get_offsets()[0]
    cell = int(entry.decision.chosen[0])
    np.testing.assert_allclose(star, ((cell % 12 + 0.5) * 5.0, (cell // 12 + 0.5) * 5.0))
    places = panels["a"].collections[0]
    assert places.get_array().tolist() == list(range(1, 9)), "numbered in their order"
    first = int(log.row(0)[0].decision.chosen[0])
    np.testing.assert_allclose(places.get_offsets()[0], ((first % 12 + 0.5) * 5.0, (first // 12 + 0.5) * 5.0))
    assert [patch.get_x() for patch in panels["e"].patches] == [596.0, 638.0]
    best = panels["f"].lines[1].get_ydata()
    assert len(best) == 8 and (np.diff(best) >= 0).all() and best[-1] == entry.observation["value"].max()


def test_where_nothing_is_believed_the_figure_says_so(log, drawn, tmp_path):
    draw_decision(log, tmp_path / "first.png", step=0)
    panels = axes_of(drawn[0])
    assert "g" not in panels and "random number" in labels_of(drawn[0])
    assert all("Nothing" in panels[letter].texts[0].get_text() for letter in "bce")


def test_the_embedding_is_drawn_by_itself(log, drawn, tmp_path):
    draw_embedding(log, tmp_path / "embedding.pdf")
    (axis,) = axes_of(drawn[0]).values()
    assert len(axis.collections[0].get_offsets()) == 120 and len(axis.collections[1].get_offsets()) == 8
    with pytest.raises(RecordError, match="has no embedding"):
        draw_embedding(log, tmp_path / "none.png", step=0)
    with pytest.raises(RecordError, match="asked for step 40"):
        draw_decision(log, tmp_path / "none.png", step=40)
    with pytest.raises(RecordError, match="Can not draw to .*none.xyz"):
        draw_decision(log, tmp_path / "none.xyz")
    with pytest.raises(RecordError, match="Can not draw to"):
        draw_decision(log, tmp_path / "no" / "folder.png")


def test_a_pattern_is_drawn_as_one(drawn, tmp_path):
    env = gymnasium.make("stem_gym/SpectrumSearch-fields-v0", task={"measurements": 3}, instrument={"shape": [8, 8]})
    run_supervised(quick_agent(env), env, None, tmp_path, seed=2)
    log = DecisionLog.read(tmp_path)
    draw_decision(log, tmp_path / "field.png")
    shown = axes_of(drawn[0])["e"].images[0]
    assert shown.get_array().shape == (16, 16)
    first, last = log.row(0)[-1].observation["axis"]
    half = 0.5 * (last - first) / 15
    np.testing.assert_allclose(shown.get_extent(), (first - half, last + half, last + half, first - half), rtol=1e-5)
    assert {"angle x (mrad)", "electrons/s and pixel", "deflection (mrad)"} <= labels_of(drawn[0])


def test_windows_are_found_in_composed_scalarizers():
    band = {"kind": "band_integral", "window": {"low_ev": 1.0, "high_ev": 2.0}}
    parts = {"kind": "sum", "parts": [{"kind": "scaled", "factor": 2.0, "of_what": EDGE}, band]}
    assert windows_of(parts) == [("background", 596.0, 632.0), ("signal", 638.0, 664.0), ("window", 1.0, 2.0)]


@pytest.mark.parametrize(
    ("measure", "detector", "unit"),
    [
        ({"kind": "band_integral"}, "eds", "X-rays/s"),
        ({"kind": "band_integral"}, "eels", "electrons/s"),
        ({"kind": "peak_ratio"}, "eels", ""),
        ({"kind": "centre_of_mass"}, "diffraction", "mrad"),
        ({"kind": "scaled", "of_what": {"kind": "peak_fit"}}, "eels", "eV"),
        ({"kind": "sum", "parts": [{"kind": "anomaly"}]}, "eels", ""),
    ],
)
def test_the_unit_of_a_value_is_that_of_its_scalarizer(measure, detector, unit):
    assert decision_plots._unit_of(measure, detector) == unit
