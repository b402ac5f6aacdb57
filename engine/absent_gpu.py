"""AbsentGpu: stands in for Triton's driver where there is no GPU. Launches compile, and do nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from configs.errors import ConfigError

WARP = 32
MOST_THREADS = 1024  # of a program
# architecture -> multiprocessors, bytes of shared memory that one program may have: of the largest such GPU
GPUS = {
    80: (108, 163 << 10),  # A100
    86: (84, 99 << 10),  # A10, A40, RTX 30
    89: (142, 99 << 10),  # L4, L40S, RTX 40
    90: (132, 227 << 10),  # H100, H200
    100: (148, 227 << 10),  # B200
    103: (148, 227 << 10),  # B300
    120: (188, 99 << 10),  # RTX 50, RTX PRO
}


class AbsentGpu:
    """What Triton 3.6 to 3.9 asks of a driver, so that its own code finds, compiles and keeps a kernel.

    Compiled kernels are in TRITON_CACHE_DIR under the key that a GPU of this architecture looks for: the key
    is made by Triton, from the arguments that launchers pass. Pointers are those of tensors on a CPU, which
    are aligned as a GPU's are.
    """

    def __init__(self, architecture: int) -> None:
        if architecture not in GPUS:
            known = ", ".join(map(str, GPUS))
            raise ConfigError(f"architecture {architecture} is not known; {known} are")
        self.architecture = architecture
        self.kernels = 0  # compiled, or found in the cache
        self.utils = _Utils(self)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, WARP)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: None

    def __getattr__(self, name: str) -> Any:
        raise _moved(name)


@dataclass(frozen=True, slots=True)
class _Utils:
    """As `driver.utils`."""

    gpu: AbsentGpu

    def get_device_properties(self, device: int) -> dict[str, int]:
        processors, shared = GPUS[self.gpu.architecture]
        return {"multiprocessor_count": processors, "max_shared_mem": shared}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        """Module, function, registers, spilled registers, threads that a program may have."""
        self.gpu.kernels += 1
        return 1, 1, 0, 0, MOST_THREADS

    def unload_module(self, module: int) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        raise _moved(f"utils.{name}")


def _moved(name: str) -> AttributeError:
    return AttributeError(
        f"Triton {triton.__version__} asks its driver for {name}, which an absent GPU does not have:"
        " kernels cannot be compiled ahead; the first start with a GPU compiles them"
    )


def pretend(architecture: int) -> AbsentGpu:
    """From now on, this process launches on such a GPU. Not to be undone: what Triton asked is remembered."""
    if triton.knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    gpu = AbsentGpu(architecture)
    driver.set_active(gpu)
    return gpu
