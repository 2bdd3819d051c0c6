"""Torch physics of the microscope and its specimen: pure functions, batch first, differentiable."""
