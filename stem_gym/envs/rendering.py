"""Pictures of an episode: the frame with probe, dwells and targets, the dose map, and the ledger.

Pillow draws and pygame shows; both come with the extra `viz` and are imported when the first picture is asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
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

_PAPER = (18, 20, 24)
_TEXT = (214, 218, 224)
_FAINT = (120, 126, 136)
_PROBE = (255, 92, 92)
_DWELL = (255, 190, 80)
_TARGET = (96, 214, 255)
_BARS = ((96, 170, 255), (150, 220, 130), (255, 170, 90))
# Dark blue over red to pale yellow: lightness rises evenly, so that more dose always looks brighter.
_HEAT = np.array([(6, 6, 20), (58, 14, 92), (140, 30, 104), (212, 72, 68), (248, 150, 40), (252, 246, 180)])


class Painter:
    """Draws rows of a BatchEnv; each row's last full frame is the ground of later partial frames."""

    def __init__(self) -> None:
        self._ground: np.ndarray | None = None  # (B, H, W) uint8, dark where no full frame was seen
        self._screen: Any = None

    def watch(self, batch: BatchEnv) -> None:
        """Remember the frames of the rows whose last one was full; to be called after every step and reset."""
        marks = batch.marks()
        grey, region = _grey(marks.frame), _numbers(marks.region)
        full = np.all(region[:, 2:] > _FULL, axis=1, keepdims=True)[..., None]
        self._ground = np.where(full, grey, np.zeros_like(grey) if self._ground is None else self._ground)

    def paint(self, batch: BatchEnv, row: int) -> np.ndarray:
        """The picture of one row: uint8 of PICTURE_SHAPE. Raises MissingExtraError without Pillow."""
        image_module, draw_module = _pillow("Image"), _pillow("ImageDraw")
        marks, truth = batch.marks(), batch.instrument.truth()
        picture = image_module.new("RGB", (PICTURE_SHAPE[1], PICTURE_SHAPE[0]), _PAPER)
        frame, region = _grey(marks.frame[row]), _numbers(marks.region[row])
        picture.paste(self._framed(frame, region, row), (MARGIN_PIXELS, MARGIN_PIXELS))
        draw = draw_module.Draw(picture)
        _draw_region(draw, region)
        _draw_marks(draw, _numbers(marks.dwells[row]), _numbers(marks.targets[row]), _numbers(marks.probe[row]))
        left, top = FRAME_PIXELS + 2 * MARGIN_PIXELS, MARGIN_PIXELS
        if "dose_map" in truth:
            peak = self._draw_dose(picture, _numbers(truth["dose_map"][row]), (left, top))
            draw.text((left, top + SIDE_PIXELS + 4), f"dose map, to {peak:.2g} e/Å²", fill=_FAINT, font=_font())
            top += SIDE_PIXELS + 28
        _draw_ledger(draw, batch, row, (left, top))
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

    def _framed(self, frame: np.ndarray, region: np.ndarray, row: int) -> Any:
        """The last frame in its place on the last full frame."""
        image_module = _pillow("Image")
        full = bool((region[2:] > _FULL).all())
        ground = frame if full else np.zeros_like(frame) if self._ground is None else self._ground[row] // 2
        canvas = image_module.fromarray(ground).resize((FRAME_PIXELS, FRAME_PIXELS), image_module.Resampling.NEAREST)
        if not full:
            left, top, width, height = (round(float(v) * FRAME_PIXELS) for v in region)
            part = image_module.fromarray(frame).resize(
                (max(1, width), max(1, height)), image_module.Resampling.NEAREST
            )
            canvas.paste(part, (left, top))
        return canvas.convert("RGB")

    def _draw_dose(self, picture: Any, dose: np.ndarray, corner: tuple[int, int]) -> float:
        """The dose map on a logarithmic scale of four decades; gives its largest value."""
        image_module = _pillow("Image")
        peak = max(float(dose.max()), 1.0)
        level = np.clip(1.0 + np.log10(np.maximum(dose, 1e-12) / peak) / 4.0, 0.0, 1.0)
        at = level * (len(_HEAT) - 1)
        below = np.minimum(at.astype(int), len(_HEAT) - 2)
        share = (at - below)[..., None]
        colour = (_HEAT[below] * (1.0 - share) + _HEAT[below + 1] * share).astype(np.uint8)
        # The map's origin is the optical axis; roll it to the middle, where the frame has it.
        colour = np.roll(colour, (dose.shape[0] // 2, dose.shape[1] // 2), axis=(0, 1))
        tile = image_module.fromarray(colour).resize((SIDE_PIXELS, SIDE_PIXELS), image_module.Resampling.NEAREST)
        picture.paste(tile, corner)
        return peak


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
    """Frames (…, H, W) of 0…1 as uint8, a little brightened."""
    return (255.0 * np.clip(1.3 * _numbers(frame), 0.0, 1.0)).astype(np.uint8)


def _pixel(place: np.ndarray) -> tuple[float, float]:
    return MARGIN_PIXELS + float(place[0]) * FRAME_PIXELS, MARGIN_PIXELS + float(place[1]) * FRAME_PIXELS


def _inside(place: np.ndarray) -> bool:
    return bool(np.isfinite(place).all() and (place >= 0.0).all() and (place <= 1.0).all())


def _draw_region(draw: Any, region: np.ndarray) -> None:
    start, end = _pixel(region[:2]), _pixel(region[:2] + region[2:])
    draw.rectangle((*start, *end), outline=_FAINT)


def _draw_marks(draw: Any, dwells: np.ndarray, targets: np.ndarray, probe: np.ndarray) -> None:
    for x, y in (_pixel(place) for place in dwells if _inside(place)):
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=_DWELL)
    for x, y in (_pixel(place) for place in targets if _inside(place)):
        draw.ellipse((x - 10, y - 10, x + 10, y + 10), outline=_TARGET, width=2)
    x, y = _pixel(probe)
    draw.line((x - 8, y, x + 8, y), fill=_PROBE, width=2)
    draw.line((x, y - 8, x, y + 8), fill=_PROBE, width=2)


def _draw_ledger(draw: Any, batch: BatchEnv, row: int, corner: tuple[int, int]) -> None:
    """What was spent of the budget, as bars with numbers, and the return."""
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
    for colour, name in ((_TARGET, "target"), (_DWELL, "dwell"), (_PROBE, "probe")):
        top += 18
        draw.ellipse((left, top + 8, left + 8, top + 16), fill=colour)
        draw.text((left + 16, top + 6), name, fill=_TEXT, font=_font())
