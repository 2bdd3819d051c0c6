"""Two thin faces of BatchEnv: `gymnasium.Env` of one row and `gymnasium.vector.VectorEnv` of B rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from stem_gym.core.batch import every_row, rows_where
from stem_gym.core.errors import ActionError, ConfigError, did_you_mean
from stem_gym.core.streams import row_seeds
from stem_gym.envs.batch import BatchEnv, Snapshot
from stem_gym.envs.rendering import Painter
from stem_gym.envs.variants import LoadedVariant, build, instrument_override, load_variant

RENDER_MODES = ("rgb_array", "human")
RENDER_FPS = 10
_AUTORESET = [mode.value for mode in AutoresetMode]
_SECTIONS = ("task", "instrument", "budget")
_RUNTIME = ("device", "fused")


def make_env(variant: str, render_mode: str | None = None, **overrides: Any) -> StemEnv:
    """What `gymnasium.make(id, …)` calls.

    Besides `render_mode` it takes `instrument` (a name such as "nion", or a mapping), `task` and `budget` (mappings
    merged into the YAML), `path` (of the file that the instrument replays), `device`, and `fused` (compile the noise;
    default: for 64 rows and more).
    """
    return StemEnv(*_load(variant, overrides), render_mode=render_mode)


def make_vector_env(
    variant: str,
    num_envs: int = 1,
    autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
    render_mode: str | None = None,
    **overrides: Any,
) -> StemVectorEnv:
    """What `gymnasium.make_vec(id, num_envs=…, …)` calls; overrides as in `make_env`."""
    loaded, runtime = _load(variant, overrides)
    try:
        mode = AutoresetMode(autoreset_mode)
    except ValueError as error:
        raise ConfigError(
            f"Unknown autoreset_mode {autoreset_mode!r}. {did_you_mean(str(autoreset_mode), _AUTORESET)}"
        ) from error
    return StemVectorEnv(loaded, runtime, num_envs, mode, render_mode)


def _load(variant: str, overrides: Mapping[str, Any]) -> tuple[LoadedVariant, dict[str, Any]]:
    runtime = {key: overrides[key] for key in _RUNTIME if key in overrides}
    sections = {key: value for key, value in overrides.items() if key not in (*runtime, "path")}
    for key in sections:
        if key not in _SECTIONS:
            raise ConfigError(
                f"{variant} takes no argument {key!r}. {did_you_mean(key, (*_SECTIONS, *_RUNTIME, 'path'))}"
            )
    if "instrument" in sections:
        sections["instrument"] = instrument_override(sections["instrument"])
    if "path" in overrides:
        sections["instrument"] = {**sections.get("instrument", {}), "path": str(overrides["path"])}
    if not isinstance(runtime.get("fused"), bool | None):
        raise ConfigError(f"fused must be True, False or None; given {runtime['fused']!r}.")
    return load_variant(variant, sections), runtime


class _Face:
    """What both faces share: the batch, the variant it came from, and pictures."""

    def __init__(self, loaded: LoadedVariant, runtime: Mapping[str, Any], rows: int, render_mode: str | None) -> None:
        if render_mode not in (None, *RENDER_MODES):
            raise ConfigError(f"render_mode must be one of {RENDER_MODES} or None; given {render_mode!r}.")
        self.batch: BatchEnv = build(loaded, rows, **runtime)
        self.render_mode = render_mode
        self.metadata = {"render_modes": list(RENDER_MODES), "render_fps": RENDER_FPS}
        self._origin = (loaded, dict(runtime))
        self._painter = Painter()

    @property
    def config(self) -> Mapping[str, Any]:
        """The merged configuration, as plain data."""
        return self._origin[0].data

    @property
    def config_hash(self) -> str:
        """Hash of the merged configuration."""
        return self._origin[0].hash

    @property
    def task_config(self) -> dict[str, Any]:
        """The task's settings, as plain data: what an agent may know of its task."""
        config: dict[str, Any] = self.batch.task.config.model_dump(mode="json")
        return config

    def tell(self, **wishes: Any) -> Any:
        """Ask for something else in mid-episode, such as another scalarizer; gives the observation as it is then."""
        return self._converted(self.batch.tell(wishes))

    def clone_state(self) -> Snapshot:
        """Everything needed to come back to this moment."""
        return self.batch.snapshot()

    def restore_state(self, snapshot: Snapshot) -> None:
        """Go back to a moment that `clone_state` kept; the same actions then give the same episode."""
        self.batch.restore(snapshot)

    def _converted(self, observation: Any) -> Any:
        """The observation as this face gives it."""
        raise NotImplementedError

    def _show(self) -> None:
        """After every step and reset: the painter sees the frames, and a window its first row."""
        if self.render_mode is not None:
            self._painter.watch(self.batch)
        if self.render_mode == "human":
            self._painter.show(self._painter.paint(self.batch, 0), RENDER_FPS)

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: value for key, value in vars(self).items() if key not in {"batch", "_painter"}}
        started = self.batch.started
        return {**kept, "rows": self.batch.rows, "snapshot": self.batch.snapshot() if started else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows, snapshot = state.pop("rows"), state.pop("snapshot")
        vars(self).update(state)
        loaded, runtime = self._origin
        self.batch = build(loaded, rows, **runtime)
        self._painter = Painter()
        if snapshot is not None:
            self.batch.restore(snapshot)


class StemEnv(_Face, gymnasium.Env[Any, Any]):
    """One episode at a time. The manual of a task is the docstring of its class, and `stem-gym show ID`."""

    def __init__(self, loaded: LoadedVariant, runtime: Mapping[str, Any], render_mode: str | None = None) -> None:
        super().__init__(loaded, runtime, 1, render_mode)
        self.observation_space = self.batch.observation_space
        self.action_space = self.batch.action_space
        self._row = every_row(1, self.batch.device)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """A new episode: of this seed, or the next of the stream that the last seed began."""
        gymnasium.Env.reset(self, seed=seed)
        if seed is None and not self.batch.started:
            seed = int(self.np_random.integers(2**62))
        seeds = None if seed is None else [seed]
        observation, metrics = self.batch.reset(self._row, seeds, _options(options))
        self._show()
        return _first_row(observation), _first_numbers(metrics)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """One action; never truncated, since the budget is part of the task."""
        step = self.batch.step(_as_tensor(action, self.batch, one=True))
        self._show()
        ended = bool(step.terminated.item())
        return _first_row(step.observation), step.reward.item(), ended, False, _first_numbers(step.metrics)

    def _converted(self, observation: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        return _first_row(observation)

    def render(self) -> np.ndarray | None:
        """The picture of this moment, (H, W, 3) uint8, in mode "rgb_array"."""
        if self.render_mode is None:
            gymnasium.logger.warn('render() needs render_mode="rgb_array" or "human".')
            return None
        return self._painter.paint(self.batch, 0) if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        """Let go of the instrument and of the window."""
        self._painter.close()
        self.batch.close()


class StemVectorEnv(_Face, gymnasium.vector.VectorEnv[Any, Any, Any]):
    """B episodes side by side, batched in the simulator: no processes, no loop over rows.

    SAME_STEP resets a row in the step that ends it (`final_obs` and `final_info` hold the end), NEXT_STEP in the next
    step, whose action for that row is ignored, and DISABLED leaves it to `reset(options={"reset_mask": …})`.
    On a GPU, observations and rewards are torch tensors there; else they are numpy arrays.
    """

    def __init__(
        self,
        loaded: LoadedVariant,
        runtime: Mapping[str, Any],
        num_envs: int,
        autoreset_mode: AutoresetMode,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(loaded, runtime, num_envs, render_mode)
        self.num_envs = num_envs
        self.autoreset_mode = autoreset_mode
        self.metadata["autoreset_mode"] = autoreset_mode
        self.single_observation_space = self.batch.observation_space
        self.single_action_space = self.batch.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._all = every_row(num_envs, self.batch.device)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """New episodes on all rows, or on those of `options["reset_mask"]` (B,) bool.

        One `seed` seeds row i with `row_seeds(seed, num_envs)[i]`; a sequence seeds row by row.
        """
        rest = _options(options)
        mask = _reset_mask(rest.pop("reset_mask", None), self.num_envs)
        rows = self._all if mask is None else rows_where(torch.as_tensor(mask, device=self.batch.device))
        if seed is None and not self.batch.started:
            seed = int(self.np_random.integers(2**62))
        seeds = _seeds_of_rows(seed, self.num_envs, rows)
        observation, metrics = self.batch.reset(rows, seeds, rest)
        self._show()
        return self._out(observation), _info(metrics, None, self._out)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One action for each row, (B, …)."""
        action = _as_tensor(actions, self.batch)
        if self.autoreset_mode is AutoresetMode.NEXT_STEP and bool(self.batch.ended.any()):
            return self._step_and_reset(action, rows_where(self.batch.ended))
        step = self.batch.step(action)
        observation, metrics = step.observation, step.metrics
        final: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP and bool(step.terminated.any()):
            final["final_obs"], final["final_info"] = self._out(observation), _info(metrics, step.terminated, self._out)
            final["_final_obs"] = final["_final_info"] = step.terminated.cpu().numpy()
            observation, metrics = self.batch.reset(rows_where(step.terminated))
        return self._answer(observation, step.reward, step.terminated, _info(metrics, None, self._out) | final)

    def _step_and_reset(self, action: Tensor, again: Tensor) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """A step in which the rows that had ended are reset instead, as Gymnasium's NEXT_STEP asks."""
        rows = rows_where(~self.batch.ended)
        reward, terminated = torch.zeros(self.num_envs, device=self.batch.device), torch.zeros_like(self.batch.ended)
        if len(rows):
            step = self.batch.step(action, rows)
            reward, terminated = step.reward, step.terminated
        observation, metrics = self.batch.reset(again)
        return self._answer(observation, reward, terminated, _info(metrics, None, self._out))

    def render(self) -> tuple[np.ndarray, ...] | None:
        """The pictures of all rows, in mode "rgb_array"."""
        if self.render_mode != "rgb_array":
            return None
        return tuple(self._painter.paint(self.batch, row) for row in range(self.num_envs))

    def close(self, **kwargs: Any) -> None:
        """Let go of the instrument and of the window."""
        if not self.closed:
            self._painter.close()
            self.batch.close()
            self.closed = True

    def _answer(self, observation: Any, reward: Tensor, terminated: Tensor, info: dict[str, Any]) -> Any:
        self._show()
        truncated = torch.zeros_like(terminated)
        return self._out(observation), self._out(reward), self._out(terminated), self._out(truncated), info

    def _converted(self, observation: Any) -> Any:
        return self._out(observation)

    def _out(self, value: Any) -> Any:
        """Numpy on a CPU, tensors elsewhere; dictionaries entry by entry; always a copy of its own."""
        if isinstance(value, Mapping):
            return {key: self._out(item) for key, item in value.items()}
        return value.clone() if value.device.type != "cpu" else value.numpy().copy()


def _as_tensor(action: Any, batch: BatchEnv, one: bool = False) -> Tensor:
    """The action as a tensor on the batch's device. Raises ActionError for what is no array of numbers."""
    try:
        array = action if isinstance(action, Tensor) else torch.from_numpy(np.asarray(action))
        if array.is_complex() or (array.is_floating_point() and not batch.action_dtype.is_floating_point):
            raise TypeError(f"{array.dtype} is no {batch.action_dtype}")
        tensor = array.to(dtype=batch.action_dtype, device=batch.device)
    except (TypeError, ValueError) as error:
        raise ActionError(
            f"An action must be an array of numbers like {batch.action_space}; given {action!r}."
        ) from error
    if one and tuple(tensor.shape) != batch.action_space.shape:
        raise ActionError(f"An action must have shape {batch.action_space.shape}; given {tuple(tensor.shape)}.")
    return tensor.unsqueeze(0) if one else tensor


def _options(options: Any) -> dict[str, Any]:
    if not isinstance(options, Mapping | None):
        raise ConfigError(f"Reset options must be a mapping or None; given {options!r:.80}.")
    return dict(options or {})


def _reset_mask(mask: Any, rows: int) -> np.ndarray | None:
    if mask is None:
        return None
    array = np.asarray(mask)
    if array.shape != (rows,) or array.dtype != np.bool_ or not array.any():
        raise ConfigError(
            f"reset_mask must be ({rows},) bool with at least one True; "
            f"given {array.shape} {array.dtype}, {np.count_nonzero(array)} set."
        )
    return array


def _seeds_of_rows(seed: int | Sequence[int | None] | None, total: int, rows: Tensor) -> list[int] | None:
    if seed is None:
        return None
    if isinstance(seed, (int, np.integer)):
        every = row_seeds(int(seed), total)
        return [every[row] for row in rows.tolist()]
    given = list(seed) if isinstance(seed, Sequence | np.ndarray) and not isinstance(seed, str) else []
    if len(given) == total:
        given = [given[row] for row in rows.tolist()]
    if len(given) != len(rows) or not all(isinstance(value, (int, np.integer)) and value >= 0 for value in given):
        raise ConfigError(f"Give one non-negative whole seed, or one for each of the {total} rows; given {seed!r:.80}.")
    return [int(value) for value in given if value is not None]


def _first_row(observation: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {key: (value if value.is_cpu else value.cpu()).numpy()[0].copy() for key, value in observation.items()}


def _first_numbers(metrics: Mapping[str, Tensor]) -> dict[str, Any]:
    """What is known of the one row; NaN stands for what is not, such as a mean over nothing."""
    numbers = {key: value.item() for key, value in metrics.items()}
    return {key: value for key, value in numbers.items() if value == value}


def _info(metrics: Mapping[str, Tensor], mask: Tensor | None, out: Any) -> dict[str, Any]:
    """Gymnasium's vector form: each value (B,) with a mask of the rows it holds for; NaN is no value."""
    info: dict[str, Any] = {}
    wanted = None if mask is None else out(mask)
    for key, value in metrics.items():
        info[key] = shown = out(value)
        known = shown == shown
        known = known if wanted is None else known & wanted
        info[f"_{key}"] = known if isinstance(known, np.ndarray) else known.cpu().numpy()
    return info
