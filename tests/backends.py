"""The implementations of the three operators, all of which run the same tests.

cpu        the compiled operators on CPU tensors
cuda       the same on a GPU; skipped, visibly, without one
emulated   the CUDA kernels' own sources on the CPU, in several schedules
checked    the same with every access of the kernels checked: races, bounds, memory never written
"""
import dataclasses
import functools

import emulator
import pytest
import torch

from abba_ext import ops

HALF = (torch.bfloat16, torch.float16)  # what the CUDA kernels take
NAMES = ("cpu", "cuda", "emulated", "checked")


@dataclasses.dataclass(frozen=True)
class Device:
    """The registered operators on copies of the arguments on a device; results come back to the CPU."""

    device: str

    def project(self, *tensors):
        return ops.project(*self._move(tensors)).cpu()

    def expand_(self, y, u, f1, f2, s):
        moved = self._move((y, u, f1, f2))
        ops.expand_(*moved, s)
        y.copy_(moved[0])

    def factor_grad(self, x, v, f1, f2, s):
        return tuple(self._strided(grad, "cpu") for grad in ops.factor_grad(*self._move((x, v, f1, f2)), s))

    def _move(self, tensors):
        return tensors if self.device == "cpu" else [self._strided(t, self.device) for t in tensors]

    @staticmethod
    def _strided(t, device):
        """On the device with the strides it has, gaps and all."""
        if t.numel() == 0:
            return t.to(device)
        storage = t.as_strided((sum((n - 1) * step for n, step in zip(t.shape, t.stride())) + 1,), (1,))
        return storage.to(device).as_strided(t.shape, t.stride())


class Emulated:
    """The emulated kernels; each call takes the next schedule."""

    def __init__(self, mode: str, num_sms: int = 4):
        self.backends = [emulator.Backend(_module(mode), schedule, num_sms) for schedule in emulator.SCHEDULES]
        self.calls = 0

    def __getattr__(self, name):
        self.calls += 1
        return getattr(self.backends[self.calls % len(self.backends)], name)


@functools.cache
def _module(mode):
    return emulator.build(mode="fast" if mode == "emulated" else mode)


def get(name: str):
    """The backend, or a skip that says why it cannot be had."""
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if name in ("cpu", "cuda"):
        return Device(name)
    if reason := emulator.unavailable():
        pytest.skip(reason)
    return Emulated(name)


def cases(dtypes) -> list:
    """(backend name, dtype) wherever the backend's own code takes the dtype, as pytest parameters."""
    return [pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}") for name in NAMES for dtype in dtypes
            if name in ("cpu", "cuda") or dtype in HALF]
