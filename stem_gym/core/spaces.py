"""Spaces as plain data, for contracts of policies and for scripts."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from stem_gym.core.errors import ConfigError


def space_as_data(space: spaces.Space[Any]) -> Any:
    """A space as plain data; bounds that are all alike as one number. Raises ConfigError for other spaces."""
    if isinstance(space, spaces.Dict):
        return {"Dict": {key: space_as_data(part) for key, part in sorted(space.spaces.items())}}
    if isinstance(space, spaces.Box):
        return {
            "Box": {"shape": list(space.shape), "dtype": str(space.dtype)}
            | {"low": _bound(space.low), "high": _bound(space.high)}
        }
    if isinstance(space, spaces.MultiDiscrete):
        return {"MultiDiscrete": space.nvec.tolist()}
    if isinstance(space, spaces.Discrete):
        return {"Discrete": int(space.n)}
    raise ConfigError(f"The space {space} can not be written down: Box, Discrete, MultiDiscrete or Dict only.")


def space_from_data(data: Any) -> spaces.Space[Any]:
    """The space that `space_as_data` wrote down. Raises ConfigError for anything else."""
    try:
        ((kind, given),) = data.items()
        if kind == "Dict":
            return spaces.Dict({key: space_from_data(part) for key, part in given.items()})
        if kind == "Box":
            shape, dtype = tuple(given["shape"]), np.dtype(given["dtype"])
            ends = [np.asarray(given[end], dtype=np.float64).astype(dtype) for end in ("low", "high")]
            low, high = (np.full(shape, end) if end.ndim == 0 else end.reshape(shape) for end in ends)
            return spaces.Box(low, high, shape, dtype.type)
        if kind == "MultiDiscrete":
            return spaces.MultiDiscrete(given)
        if kind == "Discrete":
            return spaces.Discrete(given)
    except (AttributeError, KeyError, TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"Not a space that was written down: {error!r}; given {data!r:.80}.") from error
    raise ConfigError(f"A space is a Box, Discrete, MultiDiscrete or Dict; given {kind!r}.")


def _bound(values: np.ndarray) -> Any:
    """JSON knows no infinity: it is written as text."""
    data = [float(x) if np.isfinite(x) else str(float(x)) for x in values.ravel()]
    return data[0] if len(set(data)) == 1 else data
