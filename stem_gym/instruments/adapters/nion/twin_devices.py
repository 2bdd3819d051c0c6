"""The twin's devices for Nion's registry: controls, instrument controller and scan unit. Imports Nion's kit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from nion.device_kit import InstrumentDevice, ScanDevice
from nion.instrumentation import scan_base
from nion.usim_device import InstrumentDevice as UsimInstrumentDevice
from nion.usim_device import ScanDevice as UsimScanDevice
from nion.utils import Geometry, Registry

from stem_gym.core.errors import InstructionError, StemGymError
from stem_gym.core.instructions import MoveStage, Read, Set
from stem_gym.core.units import ANG_PER_NM
from stem_gym.instruments.adapters.nion.column import BLANKER, CONTROLS, M_PER_ANG, STAGE
from stem_gym.instruments.adapters.nion.twin import ROW, TwinSample

_STEM_ID, _SCAN_ID = "stem_gym_stem_controller", "stem_gym_scan_device"
_OURS = {control.vendor: name for name, control in CONTROLS.items()}


class TwinControls:
    """The simulated microscope's controls under Nion's names and in its units; setting an unknown one gives False."""

    def __init__(self, sample: TwinSample) -> None:
        config = sample.microscope.config
        self._sample = sample
        self._stage_m = Geometry.FloatPoint()
        self._values = dict.fromkeys(sample.microscope.capabilities.settable, 0.0)
        self._values |= {"current_pa": config.current_pa, "defocus_ang": config.probe.defocus_ang}
        self._fixed = {
            "energy_kev": config.probe.energy_kev,
            "convergence_mrad": config.probe.convergence_mrad,
            "haadf_counts_per_electron": config.detector.gain,
            "haadf_counts_offset": config.detector.offset,
        }
        sample.on_reset.append(self._follow)

    def get_value(self, name: str) -> float | None:
        if name == BLANKER:
            return 0.0 if self._sample.beam_open else 1.0
        value = (self._values | self._fixed).get(_OURS.get(name, ""))
        return None if value is None else value / CONTROLS[_OURS[name]].scale

    def set_value(self, name: str, value: float) -> bool:
        if name == BLANKER:
            self._sample.open_beam(value == 0.0)
            return True
        ours = _OURS.get(name, "")
        if ours not in self._values:
            return False
        wanted = value * CONTROLS[ours].scale
        try:
            self._sample.ask(Set(ROW, ours, torch.tensor([wanted])))
        except StemGymError:
            return False
        self._values[ours] = wanted
        return True

    def inform_value(self, name: str, value: float) -> bool:
        return self.set_value(name, value)

    def get_value_2d(self, s: str, default_value: Any = None, **_: Any) -> Any:
        return self._stage_m if s == STAGE else default_value or Geometry.FloatPoint()

    def set_value_2d(self, s: str, value: Any, **_: Any) -> bool:
        if s != STAGE:
            return False
        step = (value - self._stage_m) / M_PER_ANG
        self._sample.ask(MoveStage(ROW, torch.tensor([step.x]), torch.tensor([step.y])))
        self._stage_m = value
        return True

    def inform_control_2d(self, s: str, value: Any, **how: Any) -> bool:
        return self.set_value_2d(s, value, **how)

    def get_reference_setting_index(self, settings_control: str) -> int:
        return 0

    def _follow(self) -> None:
        """A new specimen comes with settings of its own."""
        self._stage_m = Geometry.FloatPoint()
        for name in self._values:
            self._values[name] = float(self._sample.ask(Read(ROW, name)).data["value"])


class TwinInstrument(InstrumentDevice.Instrument):
    """Nion's instrument controller; tells the sample where the probe is parked."""

    def __init__(self, sample: TwinSample) -> None:
        super().__init__(_STEM_ID, TwinControls(sample), UsimInstrumentDevice.AxisManager())
        self._sample = sample
        self._told: Any = None

    def _set_scan_context_probe_position(self, scan_context: Any, probe_position: Any) -> None:
        super()._set_scan_context_probe_position(scan_context, probe_position)
        if probe_position is not None and probe_position != self._told:  # Nion repeats itself around every frame
            fov_ang = scan_context.fov_nm * ANG_PER_NM
            self._sample.park((probe_position.x - 0.5) * fov_ang, (probe_position.y - 0.5) * fov_ang)
        self._told = probe_position


class TwinFrames:
    """Answers the scan unit's question for the data of a frame."""

    def __init__(self, sample: TwinSample) -> None:
        self._sample = sample
        self.fault: BaseException | None = None

    def generate_scan_data(self, instrument: Any, scan_frame_parameters: Any) -> np.ndarray:
        """Counts (H, W). What goes wrong is kept for the caller: Nion's thread would print it and go on."""
        parameters = scan_frame_parameters
        shape = tuple(parameters.size)
        try:
            if parameters.rotation_rad != 0.0:
                raise InstructionError(f"The twin's scan does not rotate; given {parameters.rotation_rad} rad.")
            return self._sample.frame(
                fov_ang=instrument.scan_context.fov_nm * ANG_PER_NM,
                centre=(parameters.center_nm.x * ANG_PER_NM, parameters.center_nm.y * ANG_PER_NM),
                size=(parameters.fov_size_nm.width * ANG_PER_NM, parameters.fov_size_nm.height * ANG_PER_NM),
                shape=shape,
                dwell_s=parameters.pixel_time_us * 1e-6 / self._sample.meter.time_scale,
            )
        except Exception as error:
            self.fault = error
            return np.zeros(shape, dtype=np.float32)


class TwinScanModule(scan_base.ScanModule):
    """What registers the scan unit with Nion's instrumentation kit."""

    def __init__(self, device: ScanDevice.Device) -> None:
        frame = ScanDevice.ScanFrameParameters(pixel_size=(64, 64), pixel_time_us=10.0, fov_nm=2.4)
        mode = scan_base.ScanSettingsMode("Frame", "frame", frame)
        self.stem_controller_id = _STEM_ID
        self.device = device
        self.settings = scan_base.ScanSettings(
            device.scan_device_id, (mode,), lambda values: ScanDevice.ScanFrameParameters(values), 0, 0
        )


class TwinDevices:
    """The instrument controller and the scan unit that a session registers."""

    scan_device_id = _SCAN_ID
    camera_device_id: str | None = None

    def __init__(self, sample: TwinSample) -> None:
        self.instrument = TwinInstrument(sample)
        self._frames = TwinFrames(sample)
        scan_box = UsimScanDevice.ScanBoxSimulator(self._frames)
        self._module = TwinScanModule(ScanDevice.Device(_SCAN_ID, "stem_gym scan", self.instrument, scan_box))

    def run(self) -> None:
        Registry.register_component(self.instrument, {"instrument_controller", "stem_controller"})
        Registry.register_component(self._module, {"scan_module"})

    def stop(self) -> None:
        Registry.unregister_component(self._module, {"scan_module"})
        Registry.unregister_component(self.instrument, {"instrument_controller", "stem_controller"})

    def take_fault(self) -> BaseException | None:
        fault, self._frames.fault = self._frames.fault, None
        return fault
