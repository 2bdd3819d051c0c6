"""Pictures of an episode: the frame with probe, dwells and targets, the dose map, and the ledger.

Pillow draws and pygame shows; both come with the extra `viz` and are imported when the first picture is asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from stem_gym.core.errors import missing_extra

if TYPE_CHECKING:
    from stem_gym.envs.batch import BatchEnv

FRAME_PIXELS = 448
SIDE_PIXELS = 208
MARGIN_PIXELS = 16
PICTURE_SHAPE = (FRAME_PIXELS + 2 * MARGIN_PIXELS, FRAME_PIXELS + SIDE_PIXELS + 3 * MARGIN_PIXELS, 3)
_FULL = 0.999  # a region of at least this width and height is the whole frame
_WHITE_PERCENT = 99.5  # of a full frame's pixels are darker than white: some atoms saturate, the others are seen
_OLD_LIGHT = 0.7  # an old frame is shown so much darker than the partial one on it
_RING_PIXELS = 12  # radius about a target, and the gap of the probe's cross: what is served stays in sight
_DOSE_DECADES = 4.0

_PAPER = (18, 20, 24)
_TEXT = (214, 218, 224)
_FAINT = (120, 126, 136)
_PROBE = (255, 92, 92)
_DWELL = (255, 190, 80)
_TARGET = (96, 214, 255)
_WHITE, _SHADOW = (255, 255, 255), (0, 0, 0)
_BARS = ((96, 170, 255), (150, 220, 130), (255, 170, 90))
# Dark blue over red to pale yellow: lightness rises evenly, so that more dose always looks brighter.
_HEAT = np.array([(6, 6, 20), (58, 14, 92), (140, 30, 104), (212, 72, 68), (248, 150, 40), (252, 246, 180)])


class Painter:
    """Draws rows of a BatchEnv; each row's last full frame is the ground of later partial frames."""

    def __init__(self) -> None:
        self._ground: np.ndarray | None = None  # (B, H, W) uint8, dark where no full frame was seen
        self._ground_s: np.ndarray | None = None  # (B,) microscope time at which it was seen
        self._screen: Any = None

    def watch(self, batch: BatchEnv) -> None:
        """Remember the frames of the rows whose last one was full; to be called after every step and reset."""
        marks = batch.marks()
        grey, now_s = _grey(marks.frame), _numbers(batch.ledger.seconds)
        if self._ground is None or self._ground_s is None:
            self._ground, self._ground_s = np.zeros_like(grey), now_s.copy()
        full = np.all(_numbers(marks.region)[:, 2:] > _FULL, axis=1)
        new = full & (grey != self._ground).any((1, 2))
        self._ground = np.where(new[:, None, None], grey, self._ground)
        self._ground_s = np.where(new, now_s, self._ground_s)

    def paint(self, batch: BatchEnv, row: int) -> np.ndarray:
        """The picture of one row: uint8 of PICTURE_SHAPE. Raises MissingExtraError without Pillow."""
        image_module, draw_module = _pillow("Image"), _pillow("ImageDraw")
        marks, truth = batch.marks(), batch.instrument.truth()
        picture = image_module.new("RGB", (PICTURE_SHAPE[1], PICTURE_SHAPE[0]), _PAPER)
        frame, region = _grey(marks.frame[row]), _numbers(marks.region[row])
        fov_ang = float(truth["fov_ang"][row]) if "fov_ang" in truth else getattr(batch.task.config, "fov_ang", None)
        picture.paste(self._framed(frame, region, row), (MARGIN_PIXELS, MARGIN_PIXELS))
        draw = draw_module.Draw(picture)
        if fov_ang is not None:
            _draw_scale(draw, (MARGIN_PIXELS, MARGIN_PIXELS + FRAME_PIXELS), FRAME_PIXELS / fov_ang, 0.25 * fov_ang)
        _draw_region(draw, region)
        _draw_marks(draw, _numbers(marks.dwells[row]), _numbers(marks.targets[row]), _numbers(marks.probe[row]))
        left, top = FRAME_PIXELS + 2 * MARGIN_PIXELS, MARGIN_PIXELS
        if "dose_map" in truth:
            _draw_dose(picture, {name: _numbers(value[row]) for name, value in truth.items()}, (left, top))
            top += SIDE_PIXELS + 28
        elif marks.beside is not None:
            top = _draw_map(picture, _numbers(marks.beside[row]), marks.beside_title, (left, top))
        top = _draw_ledger(draw, batch, row, (left, top))
        _draw_legend(draw, self._age(batch, row), (left, top))
        return np.asarray(picture)

    def show(self, picture: np.ndarray, fps: int) -> None:
        """Put the picture into a window. Raises MissingExtraError without pygame."""
        try:
            pygame = importlib.import_module("pygame")
        except ImportError as error:
            raise missing_extra('render_mode="human"', "viz") from error
        if self._screen is None:
            pygame.init()
            self._screen = pygame.display.set_mode((picture.shape[1], picture.shape[0]))
            pygame.display.set_caption("stem_gym")
        pygame.event.pump()
        pygame.surfarray.blit_array(self._screen, picture.swapaxes(0, 1))
        pygame.display.flip()
        pygame.time.wait(1000 // fps)

    def close(self) -> None:
        """Close the window, if there is one."""
        if self._screen is not None:
            importlib.import_module("pygame").quit()
            self._screen = None

    def _age(self, batch: BatchEnv, row: int) -> str:
        """How old the ground of the picture is."""
        if self._ground is None or self._ground_s is None or not self._ground[row].any():
            return "no full frame yet"
        return f"full frame  {float(batch.ledger.seconds[row]) - self._ground_s[row]:.1f} s old"

    def _framed(self, frame: np.ndarray, region: np.ndarray, row: int) -> Any:
        """The last frame in its place on the last full frame, both on the grey scale of the full one."""
        full = bool((region[2:] > _FULL).all())
        ground = frame if full or self._ground is None else self._ground[row]
        white = max(1.0, float(np.percentile(ground if ground.any() else frame, _WHITE_PERCENT)))
        canvas = _tile(_stretched(ground, white / (1.0 if full else _OLD_LIGHT)), FRAME_PIXELS, FRAME_PIXELS)
        if not full:
            left, top, width, height = (round(float(v) * FRAME_PIXELS) for v in region)
            canvas.paste(_tile(_stretched(frame, white), max(1, width), max(1, height)), (left, top))
        return canvas.convert("RGB")


@functools.cache
def _font() -> Any:
    """DejaVu Sans as it comes with matplotlib, which has Å; else Pillow's own."""
    font_module, found = _pillow("ImageFont"), importlib.util.find_spec("matplotlib")
    if found is not None and found.origin is not None:
        path = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return font_module.truetype(str(path), 11)
    return font_module.load_default()


def _pillow(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"PIL.{module}")
    except ImportError as error:
        raise missing_extra("Rendering", "viz") from error


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _grey(frame: Tensor) -> np.ndarray:
    """Frames (…, H, W) of 0…1 as uint8."""
    return (255.0 * np.clip(_numbers(frame), 0.0, 1.0)).round().astype(np.uint8)


def _stretched(grey: np.ndarray, white: float) -> np.ndarray:
    return (255.0 * np.clip(grey / white, 0.0, 1.0)).astype(np.uint8)


def _tile(pixels: np.ndarray, width: int, height: int) -> Any:
    """The picture of an array, every pixel a rectangle."""
    image_module = _pillow("Image")
    return image_module.fromarray(pixels).resize((width, height), image_module.Resampling.NEAREST)


def _pixel(place: np.ndarray) -> tuple[float, float]:
    return MARGIN_PIXELS + float(place[0]) * FRAME_PIXELS, MARGIN_PIXELS + float(place[1]) * FRAME_PIXELS


def _inside(place: np.ndarray) -> bool:
    return bool(np.isfinite(place).all() and (place >= 0.0).all() and (place <= 1.0).all())


def _draw_region(draw: Any, region: np.ndarray) -> None:
    start, end = _pixel(region[:2]), _pixel(region[:2] + region[2:])
    draw.rectangle((*start, *end), outline=_FAINT)


def _draw_marks(draw: Any, dwells: np.ndarray, targets: np.ndarray, probe: np.ndarray) -> None:
    """Rings and an open cross: nothing covers the atom that they are about."""
    for x, y in (_pixel(place) for place in targets if _inside(place)):
        r = _RING_PIXELS
        draw.ellipse((x - r, y - r, x + r, y + r), outline=_TARGET, width=2)
    for x, y in (_pixel(place) for place in dwells if _inside(place)):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), outline=_DWELL)
    x, y = _pixel(probe)
    for along_x, along_y in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        near, far = _RING_PIXELS + 2, _RING_PIXELS + 12
        draw.line((x + near * along_x, y + near * along_y, x + far * along_x, y + far * along_y), fill=_PROBE, width=2)


def _draw_scale(draw: Any, corner: tuple[float, float], pixels_per_ang: float, longest_ang: float) -> None:
    """A bar of a round length above the lower left `corner`, at most `longest_ang` long."""
    decade = 10.0 ** np.floor(np.log10(longest_ang))
    length_ang = max(step * decade for step in (1.0, 2.0, 5.0) if step * decade <= longest_ang)
    left, bottom = corner[0] + 8, corner[1] - 8
    bar = (left, bottom - 3, left + length_ang * pixels_per_ang, bottom)
    draw.rectangle((bar[0] - 1, bar[1] - 1, bar[2] + 1, bar[3] + 1), fill=_SHADOW)
    draw.rectangle(bar, fill=_WHITE)
    for shift, colour in ((1, _SHADOW), (0, _WHITE)):
        draw.text((left + shift, bottom - 18 + shift), f"{length_ang:g} Å", fill=colour, font=_font())


def _draw_dose(picture: Any, truth: Mapping[str, np.ndarray], corner: tuple[int, int]) -> None:
    """The dose map on a logarithmic scale, with the outline of the frame where it lies now, and a key."""
    draw_module = _pillow("ImageDraw")
    dose, cell_ang = truth["dose_map"], truth["cell_ang"]
    peak = max(float(dose.max()), 1.0)
    level = np.clip(1.0 + np.log10(np.maximum(dose, 1e-12) / peak) / _DOSE_DECADES, 0.0, 1.0)
    # The map's origin is the optical axis; roll it to the middle, where the frame has it.
    tile = _tile(np.roll(_heat(level), (dose.shape[0] // 2, dose.shape[1] // 2), axis=(0, 1)), SIDE_PIXELS, SIDE_PIXELS)
    draw = draw_module.Draw(tile)
    centre = (truth["frame_centre_ang"] / cell_ang + 0.5) % 1.0
    half = 0.5 * float(truth["fov_ang"]) / cell_ang
    for turn in np.ndindex(3, 3):  # the specimen repeats: what leaves on one side comes back on the other
        start, end = ((centre + turn - 1.0 + sign * half) * SIDE_PIXELS for sign in (-1.0, 1.0))
        draw.rectangle((*start, *end), outline=_FAINT)
    _draw_scale(draw, (0, SIDE_PIXELS), SIDE_PIXELS / float(cell_ang[0]), 0.25 * float(cell_ang[0]))
    picture.paste(tile, corner)
    left, top = corner[0], corner[1] + SIDE_PIXELS + 6
    picture.paste(_tile(_heat(np.linspace(0.0, 1.0, 32)[None]), 32, 10), (left, top))
    text = f"dose  {peak / 10.0**_DOSE_DECADES:.1g} to {peak:.2g} e/Å²"
    draw_module.Draw(picture).text((left + 40, top - 2), text, fill=_FAINT, font=_font())


def _draw_map(picture: Any, level: np.ndarray, title: str, corner: tuple[int, int]) -> int:
    """A map of 0…1, dark where nothing is known, with its title; gives where the next line may begin."""
    colours = np.where(np.isnan(level)[..., None], _PAPER, _heat(np.nan_to_num(level))).astype(np.uint8)
    height = min(SIDE_PIXELS, round(SIDE_PIXELS * level.shape[0] / level.shape[1]))
    picture.paste(_tile(colours, SIDE_PIXELS, height), corner)
    draw, (left, top) = _pillow("ImageDraw").Draw(picture), corner
    draw.rectangle((left, top, left + SIDE_PIXELS, top + height), outline=_FAINT)
    draw.text((left, top + height + 4), title, fill=_FAINT, font=_font())
    return top + height + 28


def _heat(level: np.ndarray) -> np.ndarray:
    """Levels (H, W) of 0…1 as colours (H, W, 3)."""
    at = level * (len(_HEAT) - 1)
    below = np.minimum(at.astype(int), len(_HEAT) - 2)
    share = (at - below)[..., None]
    return (_HEAT[below] * (1.0 - share) + _HEAT[below + 1] * share).astype(np.uint8)


def _draw_ledger(draw: Any, batch: BatchEnv, row: int, corner: tuple[int, int]) -> int:
    """What was spent of the budget, as bars with numbers, and the return; gives where the next line may begin."""
    ledger, budget = batch.ledger, batch.budget
    left, top = corner
    spent = (
        ("steps", float(ledger.steps[row]), budget.steps, "{:.0f}"),
        ("seconds", float(ledger.seconds[row]), budget.seconds, "{:.1f}"),
        ("electrons", float(ledger.electrons[row]), budget.electrons, "{:.2g}"),
    )
    for colour, (name, used, limit, form) in zip(_BARS, spent, strict=True):
        draw.text((left, top), f"{name}  {form.format(used)} of {form.format(limit)}", fill=_TEXT, font=_font())
        draw.rectangle((left, top + 16, left + SIDE_PIXELS, top + 22), outline=_FAINT)
        draw.rectangle((left, top + 16, left + SIDE_PIXELS * min(1.0, used / limit), top + 22), fill=colour)
        top += 34
    draw.text((left, top + 4), f"return  {float(ledger.episode_return[row]):+.2f}", fill=_TEXT, font=_font())
    return top + 22


def _draw_legend(draw: Any, age: str, corner: tuple[int, int]) -> None:
    """How old the ground is, and what the marks mean, each drawn as it is."""
    left, top = corner
    draw.text((left, top), age, fill=_TEXT, font=_font())
    middle = top + 27
    draw.ellipse((left, middle - 6, left + 12, middle + 6), outline=_TARGET, width=2)
    draw.ellipse((left + 74, middle - 3, left + 80, middle + 3), outline=_DWELL)
    for x0, y0, x1, y1 in ((-7, 0, -3, 0), (3, 0, 7, 0), (0, -7, 0, -3), (0, 3, 0, 7)):
        draw.line((left + 145 + x0, middle + y0, left + 145 + x1, middle + y1), fill=_PROBE, width=2)
    for x, name in ((18, "target"), (86, "dwell"), (157, "probe")):
        draw.text((left + x, middle - 7), name, fill=_TEXT, font=_font())
