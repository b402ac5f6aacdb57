"""The GPU that Triton compiles for and launches on, as its driver describes it.

Launchers ask here and not torch, so that all they decide by is what the driver says: another that stands in
for it (engine/absent_gpu.py) gets the very launches that a GPU would.
"""

import functools

import torch
import triton
from triton.runtime import driver

LIKE_ARCHITECTURE = 90  # of the interpreter, which has none: any will do


def architecture() -> int:
    """Ten times the compute capability: 80, 90, 100."""
    if triton.knobs.runtime.interpret:
        return LIKE_ARCHITECTURE
    return int(driver.active.get_current_target().arch)


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of this device."""
    if triton.knobs.runtime.interpret:
        return 1
    return int(driver.active.utils.get_device_properties(device.index or 0)["multiprocessor_count"])
