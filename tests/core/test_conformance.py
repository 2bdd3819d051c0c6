"""The public checks see what they are there to see: one fault is planted at a time, and each is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from stem_gym.core.batch import names_every
from stem_gym.core.conformance import check_instrument, check_vector_env
from stem_gym.core.errors import CapabilityError, ConformanceError, InstructionError
from stem_gym.core.instructions import Acquire, Blank, Dwell, Instruction, Park, Read, Reading, Scan, Set, Wait, no_dose
from stem_gym.core.instrument import Capabilities, Instrument, Limits, check_instruction
from stem_gym.core.streams import Streams, row_seeds

# An instrument of a few lines: a counter of electrons with one control, whose faults can be chosen.


class Bench(Instrument):
    """Counts electrons; knows its own dose. `fault` names the rule that it breaks."""

    def __init__(self, rows: int = 2, fault: str = "", simulated: bool = True) -> None:
        self.rows, self.device, self.fault = rows, torch.device("cpu"), fault
        verbs = {"Scan", "Park", "Dwell", "Set", "Blank", "Wait", "Read"}
        limits = {"Dwell.time_s": Limits(0.0, 10.0)}
        controls = {"current_pa": Limits(1.0, 100.0)}
        if fault == "claims what it can not":
            verbs |= {"Pulse"}
        if fault == "limits of nothing":
            limits["Dwell.length_s"] = Limits(0.0, 1.0)
        if fault == "limits the wrong way round":
            controls["current_pa"] = Limits(100.0, 1.0)
        readable = frozenset({"blanked"})
        self.capabilities = Capabilities(
            frozenset(verbs), frozenset({"haadf"}), controls, readable, limits, None, simulated
        )
        self.closed = 0

    def reset(self, streams: Streams, rows: Tensor, options: Mapping[str, Any] | None = None) -> None:
        if self.fault == "resets every row" or len(rows) == self.rows:
            self.dose = torch.zeros(self.rows)
            self.current = torch.full((self.rows,), 10.0)
            self.blanked = torch.ones(self.rows)
        self.dose[rows] = streams.uniform(rows)  # a world of its own
        self.streams = streams

    def truth(self) -> Mapping[str, Tensor]:
        if self.fault == "truth of one row":
            return {"dose": self.dose[:1]}
        return {"dose": self.dose} if self.capabilities.simulated != (self.fault == "truth where there is none") else {}

    def execute(self, instruction: Instruction) -> Reading:
        if self.fault == "acts before it checks":
            self.dose += 1.0
        if self.fault == "clips" and isinstance(instruction, Dwell):
            instruction = replace(instruction, time_s=instruction.time_s.nan_to_num(0.0).clamp(0.0, 10.0))
        if (
            self.fault == "the wrong error"
            and isinstance(instruction, Wait)
            and not instruction.time_s.isfinite().all()
        ):
            raise OSError("not a number")
        known = self.capabilities
        if self.fault == "does what it never claimed":
            known = replace(known, verbs=known.verbs | {"MoveStage"})
        if self.fault != "checks nothing":
            check_instruction(instruction, known, self.rows)
        reading = self._do(instruction)
        if self.fault == "rows the wrong way round":
            reading = replace(reading, rows=reading.rows.flip(0))
        if self.fault == "a ledger of nan":
            reading = replace(reading, seconds=reading.seconds * torch.nan)
        if self.fault == "another verb":
            reading = replace(reading, verb="Map")
        return reading

    def _do(self, it: Any) -> Reading:
        n, rows, one = len(it.rows), it.rows, torch.ones(len(it.rows))
        if isinstance(it, Set):
            self.current[rows] = it.value if self.fault != "sets half" else 0.5 * it.value + 0.5
            return no_dose(it, 0 * one, {it.name: self.current[rows].clone()} if self.fault != "sets silently" else {})
        if isinstance(it, Blank):
            self.blanked[rows] = it.on.float()
        if isinstance(it, Read):
            value = {"current_pa": self.current, "blanked": self.blanked}[it.name][rows].clone()
            return no_dose(it, 0 * one, {} if self.fault == "answers nothing" else {"value": value})
        if isinstance(it, Park):
            return no_dose(it, 0 * one, {"place": torch.stack((it.x, it.y), 1)})
        if isinstance(it, Wait):
            return no_dose(it, it.time_s * (0.5 if self.fault == "is early" else 1.0))
        if not isinstance(it, (Scan, Dwell)):
            return no_dose(it, 0 * one)
        touched = slice(None) if self.fault == "touches every row" else rows
        time_s = it.dwell_s * it.shape[0] * it.shape[1] if isinstance(it, Scan) else it.time_s
        electrons = 6.24e6 * self.current[rows] * time_s
        self.dose[touched] += electrons if self.fault != "touches every row" else electrons.mean()
        noise = self.streams.uniform(torch.arange(self.rows))[rows] if self.fault == "one stream" else 0.0
        noise = self.streams.uniform(rows) if self.fault != "one stream" else noise
        each = {"counts_per_electron": one, "counts_offset": 0 * one}
        if isinstance(it, Scan):
            shape = (n, 1, *it.shape) if self.fault != "images without channels" else (n, *it.shape)
            images = noise.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
            calibration = each | ({} if self.fault == "not calibrated" else {"electrons_per_pixel": electrons})
            return Reading("Scan", rows, time_s, electrons, one, {"images": images}, calibration)
        if self.fault == "quicker where all rows are known" and names_every(rows, self.rows):
            electrons = electrons * 1.01
        if self.fault == "hands out its buffer" and n == self.rows:
            electrons = self.dose
        data = {"place": torch.zeros(n, 2), "trace": noise[:, None].expand(n, it.trace)}
        return Reading("Dwell", rows, time_s, electrons, one, data, each | {"electrons_per_sample": electrons})

    def abort(self) -> None:
        if self.fault != "does not abort":
            self.blanked[:] = 1.0

    def close(self) -> None:
        self.closed += 1
        if self.fault == "closes once" and self.closed > 1:
            raise ConformanceError("Closing twice does no harm", "a second close failed", "nothing happens")


@pytest.mark.parametrize("rows", [1, 3])
def test_an_instrument_that_keeps_the_rules_passes(rows):
    bench = Bench(rows)
    check_instrument(bench)
    assert bench.closed == 2
    check_instrument(Bench(rows, simulated=False), Streams([7] * rows), frame_shape=(4, 6))


INSTRUMENT_FAULTS = {
    "claims what it can not": "Set goes with|Pulse",
    "limits of nothing": "limits are named verb.field.*Dwell.length_s",
    "limits the wrong way round": "limits of current_pa are two ordered numbers",
    "truth where there is none": r"truth\(\) is for simulators alone",
    "truth of one row": "an entry for each row",
    "resets every row": "reset of row 0 leaves the other rows alone",
    "acts before it checks": "refused .* changes nothing",
    "clips": "Dwell must be refused: time_s = nan",
    "checks nothing": "must be refused",
    "the wrong error": "Wait must be refused: .*OSError",
    "does what it never claimed": "MoveStage must be refused: the verb is not claimed.*answered",
    "rows the wrong way round": "is for the rows that were asked",
    "a ledger of nan": "ledger seconds",
    "another verb": "names its verb",
    "sets half": "current_pa reads back as it was set",
    "answers nothing": "Read answers value",
    "is early": "Wait takes the time",
    "touches every row": "on row 0 leaves the other rows alone",
    "one stream": "whatever other rows do",
    "quicker where all rows are known": "known to be all rows does what the same rows listed do",
    "hands out its buffer": "stays as it was given",
    "images without channels": "images of Scan",
    "not calibrated": "Scan is calibrated by electrons_per_pixel",
    "does not abort": "An abort blanks the beam",
    "closes once": "Closing twice",
}


@pytest.mark.parametrize("fault", INSTRUMENT_FAULTS)
def test_every_fault_of_an_instrument_is_seen(fault):
    bench = Bench(fault=fault)
    if fault == "claims what it can not":
        bench._do = _without_pulse(bench._do)
    if fault == "does not abort":
        execute = bench.execute
        bench.execute = lambda it: _leave_open(bench, execute(it))
    with pytest.raises(ConformanceError, match=INSTRUMENT_FAULTS[fault]) as caught:
        check_instrument(bench)
    assert "Seen: " in str(caught.value) and "Right: " in str(caught.value)


def _without_pulse(do: Any) -> Any:
    def refuse(it: Any) -> Reading:
        if type(it).__name__ == "Pulse":
            raise CapabilityError("There is no pulser.")
        return do(it)

    return refuse


def _leave_open(bench: Bench, reading: Reading) -> Reading:
    if reading.verb == "Wait":
        bench.blanked[:] = 0.0
    return reading


# A vector env of a few lines: every row counts to a length drawn from its seed.


class Spectrometer(Bench):
    """A bench with a detector of eight channels on a grid; `fault` names the rule that it breaks."""

    def __init__(self, rows: int = 2, fault: str = "", side: int = 0) -> None:
        super().__init__(rows)
        known, self.fault, self.side = self.capabilities, fault, side
        axis = torch.zeros(side * side, 2) if side else torch.linspace(0.0, 7.0, 8)
        axes = {"absent" if fault == "an axis of nothing" else "camera": axis}
        verbs, detectors = known.verbs | {"Acquire"}, known.detectors | {"camera"}
        self.capabilities = replace(known, verbs=verbs, detectors=detectors, grid=(3, 5), axes=axes)

    def execute(self, instruction: Instruction) -> Reading:
        if isinstance(instruction, Scan) and tuple(instruction.shape) not in ((3, 5), (0, 4)):
            raise InstructionError("A frame is the grid.")
        camera = isinstance(instruction, Acquire) and instruction.detector != "haadf"
        if isinstance(instruction, Acquire) and not camera and self.fault != "takes an image for a spectrum":
            check_instruction(instruction, self.capabilities, self.rows)
            raise CapabilityError("That one makes images.")
        return super().execute(instruction)

    def _do(self, it: Any) -> Reading:
        if not isinstance(it, Acquire):
            return super()._do(it)
        n, one = len(it.rows), torch.ones(len(it.rows))
        count = 7 if self.fault == "a channel less" else 8
        data = {"pattern": torch.zeros(n, self.side, self.side)} if self.side else {"spectrum": torch.zeros(n, count)}
        if self.fault == "a spectrum of a pattern":
            data = {"spectrum": torch.zeros(n, self.side**2)}
        if self.fault != "at no place":
            data["place"] = torch.zeros(n, 2)
        told = {"exposure_s": it.exposure_s, "counts_per_electron": one, "counts_offset": 0 * one}
        if self.fault == "an uncalibrated spectrum":
            del told["counts_per_electron"]
        seconds = it.exposure_s * (0.5 if self.fault == "is early" else 1.0)
        spent = 0 * one if self.fault == "without electrons" else one
        return Reading("Acquire", it.rows, seconds, spent, one, data, told)


@pytest.mark.parametrize("side", [0, 4])
def test_a_spectrometer_that_keeps_the_rules_passes(side):
    check_instrument(Spectrometer(side=side))


SPECTROMETER_FAULTS = {
    "an axis of nothing": "axes are channels of detectors",
    "a channel less": "as many numbers as its detector has channels",
    "a spectrum of a pattern": "as many numbers as its detector has channels",
    "at no place": "as many numbers as its detector has channels",
    "an uncalibrated spectrum": "Acquire is calibrated by counts_per_electron",
    "is early": "Acquire takes the time it was asked for",
    "without electrons": "Acquire delivers electrons",
    "takes an image for a spectrum": "a detector without channels",
}


@pytest.mark.parametrize("fault", SPECTROMETER_FAULTS)
def test_every_fault_of_a_spectrometer_is_seen(fault):
    side = 4 if fault == "a spectrum of a pattern" else 0
    with pytest.raises(ConformanceError, match=SPECTROMETER_FAULTS[fault]):
        check_instrument(Spectrometer(fault=fault, side=side))


class Count(gymnasium.vector.VectorEnv[Any, Any, Any]):
    """Observation: steps done and the row's secret. `fault` names the rule that it breaks."""

    def __init__(self, num_envs: int, autoreset_mode: AutoresetMode, fault: str = "") -> None:
        self.num_envs, self.autoreset_mode, self.fault = num_envs, autoreset_mode, fault
        self.metadata = {"autoreset_mode": autoreset_mode}
        if fault == "says another mode":
            self.metadata = {"autoreset_mode": AutoresetMode.DISABLED}
        self.single_observation_space = spaces.Dict({"at": spaces.Box(0.0, 1e9, (2,), np.float32)})
        self.single_action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs + (fault == "an action space of more rows"))
        self.at = np.zeros((num_envs, 2), np.float32)
        self.length, self.over = np.zeros(num_envs, int), np.zeros(num_envs, bool)
        self.rng: list[np.random.Generator] = [np.random.default_rng(0)] * num_envs

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        if self.fault == "a mask that resets all":
            mask = np.ones(self.num_envs, bool)
        if seed is not None:
            seeds = row_seeds(seed, self.num_envs) if isinstance(seed, int) else list(seed)
            if self.fault == "seed plus row":
                first = seed if isinstance(seed, int) else seeds[0]
                seeds = [first + row for row in range(self.num_envs)]
            if self.fault == "one seed for all":
                seeds = [1] * self.num_envs
            self.rng = [np.random.default_rng(one) for one in seeds]
            if self.fault == "does not seed":
                self.rng = [np.random.default_rng() for _ in seeds]
        for row in np.flatnonzero(mask):
            shared = self.rng[0] if self.fault == "a shared stream" else self.rng[row]
            self.at[row] = 0.0, shared.uniform(1.0, 1e6)
            self.length[row] = 1 if self.fault == "all end together" else shared.integers(2, 6)
        self.over &= ~mask
        return self._look(), {}

    def step(self, actions: Any) -> Any:
        actions = np.asarray(actions)
        usable = actions.shape == (self.num_envs, 2) and (np.abs(actions) <= 1.0).all()
        if not usable and self.fault != "takes anything":
            raise ValueError("no such action")
        resets = self.over if self.autoreset_mode is AutoresetMode.NEXT_STEP else np.zeros(self.num_envs, bool)
        neighbour = 1e-3 * self.num_envs if self.fault == "counts its neighbours" else 0.0
        self.at[~resets, 0] += 1.0 + np.abs(actions[:, 0])[~resets] + neighbour
        over = (self.at[:, 0] >= self.length) & ~resets
        reward = np.where(resets, 1.0 if self.fault == "pays for a reset" else 0.0, self.at[:, 0]).astype(np.float64)
        if self.fault == "spoils the action":
            actions[:] = 0.0
        info: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.NEXT_STEP:
            self.over = over
            if resets.any():
                self.reset(options={"reset_mask": resets})
                self.over = over
        elif self.autoreset_mode is AutoresetMode.SAME_STEP and over.any():
            if self.fault != "no final observation":
                info = {"final_obs": self._look(), "_final_obs": over.copy()}
            if self.fault == "a mask of all":
                info["_final_obs"] = np.ones(self.num_envs, bool)
            self.reset(options={"reset_mask": over})
        if self.fault == "a reward of nan":
            reward = reward * np.nan
        ends = over.astype(np.int64) if self.fault == "ends that are numbers" else over
        return self._look(), reward, ends, np.zeros(self.num_envs, bool), info

    def _look(self) -> dict[str, np.ndarray]:
        at = self.at if self.fault == "a reused buffer" else self.at.copy()
        return {"at": at.astype(np.float64) if self.fault == "of another type" else at}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "at": self.at * (self.fault != "forgets when pickled")}


class One(gymnasium.Env[Any, Any]):
    """The single env of Count."""

    def __init__(self, fault: str = "") -> None:
        self._count = Count(1, AutoresetMode.DISABLED)
        self._fault = fault
        self.observation_space = self._count.single_observation_space
        self.action_space = self._count.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        observation, info = self._count.reset(seed=None if seed is None else [seed + (self._fault == "another world")])
        return {"at": observation["at"][0]}, info

    def step(self, action: Any) -> Any:
        observation, reward, over, short, info = self._count.step(action[None])
        return {"at": observation["at"][0]}, float(reward[0]), bool(over[0]), bool(short[0]), info


def test_a_vector_env_that_keeps_the_rules_passes():
    check_vector_env(Count, One)


def test_a_vector_env_of_gymnasium_passes():
    """Gymnasium's own SyncVectorEnv over a single env that keeps the rules, in the modes that it has."""

    def make(num_envs: int, autoreset_mode: AutoresetMode) -> Any:
        return gymnasium.vector.SyncVectorEnv([One] * num_envs, autoreset_mode=autoreset_mode)

    with pytest.raises(ConformanceError, match="first rows|Row 0 of 3 equals"):
        check_vector_env(make, One)  # which seeds row i with seed + i


VECTOR_FAULTS = {
    "says another mode": "states its autoreset mode",
    "an action space of more rows": "action_space is single_action_space batched",
    "does not seed": "The same seed gives the same episodes",
    "one seed for all": "Another seed|Rows end at different times|equals",
    "seed plus row": "Row 0 of 3 equals a batch of one",
    "a shared stream": "equals|same story|ends? at",
    "all end together": "Rows end at different times",
    "a mask that resets all": "masked reset leaves the other rows alone",
    "takes anything": r"unusable action is refused.*step\(\) took",
    "counts its neighbours": "equals a batch of one",
    "pays for a reset": "only resets the row",
    "spoils the action": "does not change the action",
    "no final observation": "info holds final_obs",
    "a mask of all": "mask _final_obs",
    "a reward of nan": "gives a reward for each row|reward, terminated, truncated = .nan",
    "ends that are numbers": "gives a terminated for each row",
    "a reused buffer": "not reused buffers",
    "of another type": "lie in their space.*float64",
    "forgets when pickled": "pickled copy goes on",
}


@pytest.mark.parametrize("fault", VECTOR_FAULTS)
def test_every_fault_of_a_vector_env_is_seen(fault):
    with pytest.raises(ConformanceError, match=VECTOR_FAULTS[fault]):
        check_vector_env(lambda **kw: Count(**kw, fault=fault))


def test_a_single_env_of_another_world_is_seen():
    with pytest.raises(ConformanceError, match="Row 0 equals the single env"):
        check_vector_env(Count, lambda: One("another world"))


def test_a_refusal_that_comes_too_late_is_seen():
    class Late(Count):
        def step(self, actions: Any) -> Any:
            self.at[:, 1] += 1.0 if np.shape(actions) != (self.num_envs, 2) else 0.0
            return super().step(actions)

    with pytest.raises(ConformanceError, match="A refused action changes nothing"):
        check_vector_env(Late)


def test_modes_that_tell_different_stories_are_seen():
    class Skips(Count):
        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            answer = super().reset(seed=seed, options=options)
            if self.autoreset_mode is AutoresetMode.SAME_STEP and options:
                for row in np.flatnonzero(options["reset_mask"]):
                    self.rng[row].uniform()  # a draw that the other modes do not make
            return answer

    with pytest.raises(ConformanceError, match="tells the same story"):
        check_vector_env(Skips)


def test_the_error_says_rule_seen_and_right_and_travels_between_processes():
    import pickle

    error = ConformanceError("A rule", "this", "that")
    assert str(error) == "A rule. Seen: this. Right: that."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert isinstance(error, AssertionError) and not isinstance(error, InstructionError)
