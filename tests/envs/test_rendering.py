"""Pictures: what they show, in a video and on a screen."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

from stem_gym.core.errors import MissingExtraError
from stem_gym.envs import rendering
from stem_gym.envs.registration import variant_files

pytest.importorskip("PIL")
IDS = sorted(variant_files())
FRAME = slice(rendering.MARGIN_PIXELS, rendering.MARGIN_PIXELS + rendering.FRAME_PIXELS)
DWELL = np.array([-1.0, 0.3, -0.2, 0.0, 1.0], np.float32)
SMALL_SCAN = np.array([1.0, 0.4, 0.4, -1.0, 0.0], np.float32)


def make(id: str = "stem_gym/AtomTargeting-v0", mode: str = "rgb_array", **overrides: Any) -> gymnasium.Env:
    return gymnasium.make(id, render_mode=mode, disable_env_checker=True, **overrides)


def count(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((picture == np.array(colour, np.uint8)).all(-1).sum())


@pytest.mark.parametrize("id", IDS)
def test_every_id_draws_a_picture_that_changes(id):
    env = make(id)
    env.reset(seed=1)
    first = env.render()
    assert first.shape == rendering.PICTURE_SHAPE and first.dtype == np.uint8
    assert len(np.unique(first)) > 50
    env.step(env.action_space.sample())
    assert not np.array_equal(env.render(), first)


def test_the_frame_is_where_the_detector_saw_it():
    """The picture's frame, shrunk to its pixels, is the image of the observation: neither flipped nor transposed."""
    env = make()
    observation, _ = env.reset(seed=2)
    frame = env.render()[FRAME, FRAME].mean(-1)
    small = frame.reshape(64, 7, 64, 7).mean((1, 3))
    image = observation["image"][0].astype(float)

    def alike(turned: np.ndarray) -> float:
        return float(np.corrcoef(small.ravel(), turned.ravel())[0, 1])

    assert alike(image) > 0.8  # marks and the grid of the frame's edge lie on top
    assert alike(image) > 0.3 + max(alike(image.T), alike(image[::-1]), alike(image[:, ::-1]))


def test_probe_dwell_and_targets_are_marked_where_they_are():
    env = make()
    env.reset(seed=2)
    before = env.render()
    assert count(before[FRAME, FRAME], rendering._TARGET) > 100, "three circles, from truth"
    env.step(DWELL)
    after = env.render()
    assert count(after[FRAME, FRAME], rendering._DWELL) > count(before[FRAME, FRAME], rendering._DWELL) == 0
    rows, columns = np.nonzero((after[FRAME, FRAME] == np.array(rendering._PROBE)).all(-1))
    place = (DWELL[1:3] + 1.0) / 2.0 * rendering.FRAME_PIXELS
    assert abs(columns.mean() - place[0]) < 2 and abs(rows.mean() - place[1]) < 2


def frame_of(env: gymnasium.Env) -> np.ndarray:
    """The picture's frame, one value for each of its 64 × 64 pixels."""
    return env.render()[FRAME, FRAME].mean(-1).reshape(64, 7, 64, 7)[:, 3, :, 3]


@pytest.mark.parametrize("id", IDS)
def test_a_frame_is_stretched_until_its_brightest_pixels_are_white(id):
    env = make(id)
    env.reset(seed=1)
    batch = env.unwrapped.batch
    if "Scan" not in batch.instrument.capabilities.verbs:
        pytest.skip("Nothing is imaged: the picture is a plot of numbers.")
    if not bool(batch.marks().frame.any()):  # nothing was there to be imaged yet
        env.step(np.zeros(env.action_space.shape, env.action_space.dtype))
    side = rendering.FRAME_PIXELS
    grey = env.render()[FRAME, FRAME][: side - 40].mean(-1)  # without the scale bar
    assert 0.001 < (grey == 255).mean() < 0.05
    assert grey.mean() > 15


def test_an_old_frame_keeps_its_light_and_tells_its_age():
    env = make()
    env.reset(seed=2)
    before, painter, batch = frame_of(env), env.unwrapped._painter, env.unwrapped.batch
    assert painter._age(batch, 0) == "full frame  0.0 s old"
    begun_s = float(batch.ledger.seconds[0])
    env.step(SMALL_SCAN)
    away = np.s_[:32, :32]  # far from the partial frame and from the marks on it
    assert frame_of(env)[away].mean() > 0.6 * before[away].mean()
    env.step(DWELL)
    assert painter._age(batch, 0) == f"full frame  {float(batch.ledger.seconds[0]) - begun_s:.1f} s old"


def test_nothing_covers_the_atom_that_is_served():
    """Probe, target and dwell at one place: within half a ring of it all stays as it was but the dwell's thin ring."""
    pillow = pytest.importorskip("PIL.Image")
    from PIL import ImageDraw

    picture = pillow.new("RGB", rendering.PICTURE_SHAPE[1::-1], (99, 99, 99))
    place = np.array([0.5, 0.5])
    rendering._draw_marks(ImageDraw.Draw(picture), place[None], place[None], place)
    x, y = (round(v) for v in rendering._pixel(place))
    around = np.asarray(picture)[y - 6 : y + 7, x - 6 : x + 7]
    assert count(around, rendering._DWELL) <= 24 and count(around, (99, 99, 99)) >= 13 * 13 - 24


def test_the_dose_map_shows_where_the_frame_lies():
    """A narrow frame on the axis of a cell of 20 × 40 Å: half and a quarter of the map, in its middle."""
    pillow = pytest.importorskip("PIL.Image")
    truth = {
        "dose_map": np.zeros((8, 8)), "cell_ang": np.array([20.0, 40.0]), "fov_ang": np.array(10.0),
        "frame_centre_ang": np.zeros(2),
    }  # fmt: skip
    side = rendering.SIDE_PIXELS
    picture = pillow.new("RGB", (side + 60, side + 60))
    rendering._draw_dose(picture, truth, (0, 0))
    rows, columns = np.nonzero((np.asarray(picture)[:side, :side] == np.array(rendering._FAINT)).all(-1))
    assert (columns.min(), columns.max()) == pytest.approx((side / 4, 3 * side / 4), abs=1)
    assert (rows.min(), rows.max()) == pytest.approx((3 * side / 8, 5 * side / 8), abs=1)


@pytest.mark.parametrize(("longest_ang", "length_ang"), [(6.0, 5.0), (5.0, 5.0), (4.9, 2.0), (50.0, 50.0), (0.19, 0.1)])
def test_the_scale_bar_has_a_round_length(longest_ang, length_ang):
    pillow = pytest.importorskip("PIL.Image")
    from PIL import ImageDraw

    picture = pillow.new("RGB", (500, 60))
    rendering._draw_scale(ImageDraw.Draw(picture), (0, 60), 400.0 / longest_ang, longest_ang)
    bar = (np.asarray(picture)[50] == 255).all(-1)
    assert bar.sum() == pytest.approx(400.0 * length_ang / longest_ang, abs=2)


def test_a_partial_frame_lies_in_its_place():
    env = make()
    env.reset(seed=2)
    before = env.render()
    env.step(SMALL_SCAN)
    changed = np.argwhere((env.render()[FRAME, FRAME] == np.array(rendering._FAINT)).all(-1))
    assert before.shape == rendering.PICTURE_SHAPE
    # A frame of 4 Å of 24 about (0.7, 0.7): its outline.
    low, high = (0.7 - 2.0 / 24.0) * rendering.FRAME_PIXELS, (0.7 + 2.0 / 24.0) * rendering.FRAME_PIXELS
    assert changed.min() == pytest.approx(low, abs=2) and changed.max() == pytest.approx(high, abs=2)


def test_the_ground_of_a_partial_frame_is_the_episodes_own_full_frame():
    seen, unseen = make(), make()
    seen.reset(seed=1), unseen.reset(seed=1)
    seen.render(), unseen.render()
    seen.reset(seed=2), unseen.reset(seed=2)
    seen.render()  # the other one's first frame is never drawn by itself
    seen.step(SMALL_SCAN), unseen.step(SMALL_SCAN)
    assert np.array_equal(seen.render(), unseen.render())


def test_the_ledger_and_the_dose_map_grow():
    env = make()
    env.reset(seed=2)
    pictures = [env.render()]
    for _ in range(2):
        env.step(DWELL)
        pictures.append(env.render())
    side = slice(rendering.FRAME_PIXELS + 2 * rendering.MARGIN_PIXELS, None)
    bars = [sum(count(picture[:, side], colour) for colour in rendering._BARS) for picture in pictures]
    assert bars == sorted(bars) and bars[2] > bars[0]
    dose = slice(rendering.MARGIN_PIXELS, rendering.MARGIN_PIXELS + rendering.SIDE_PIXELS)
    assert not np.array_equal(pictures[0][dose, side], pictures[1][dose, side])


def test_a_vector_env_draws_every_row():
    env = gymnasium.make_vec(IDS[0], num_envs=2, render_mode="rgb_array")
    env.reset(seed=1)
    pictures = env.render()
    assert len(pictures) == 2 and not np.array_equal(*pictures)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_record_video_works(tmp_path):
    pytest.importorskip("moviepy")
    env = make(budget={"steps": 3})
    env = gymnasium.wrappers.RecordVideo(
        env, str(tmp_path / "new"), episode_trigger=lambda _: True, disable_logger=True
    )
    env.reset(seed=1)
    while not env.step(SMALL_SCAN)[2]:
        pass
    env.close()
    videos = list(tmp_path.glob("new/*.mp4"))
    assert len(videos) == 1 and videos[0].stat().st_size > 1000


def test_a_window_shows_the_picture():
    pygame = pytest.importorskip("pygame")
    env = make(mode="human")
    env.reset(seed=1)
    env.step(SMALL_SCAN)
    shown = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
    expected = make()
    expected.reset(seed=1)
    expected.render()
    expected.step(SMALL_SCAN)
    assert np.array_equal(shown, expected.render())
    assert env.render() is None
    env.close()
    assert not pygame.get_init()


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    def missing(name: str) -> Any:
        raise ImportError(name)

    env = make()
    env.reset(seed=1)
    monkeypatch.setattr(rendering.importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r'Rendering needs the extra .viz.*pip install "stem-gym\[viz\]"'):
        env.render()
