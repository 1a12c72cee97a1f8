"""A device of the GPU kit that is this process: kernels run in Triton's interpreter behind the stand-in of the driver."""

from __future__ import annotations

from device import Device
from driver import FakeDriver
from torch import Tensor

from foldkv.plugins.cuda import KernelImage, Launcher
from foldkv.plugins.plans import Plan


class StandIn(Device):
    """Takes the plans of compute capability ``sm``; nothing is compiled."""

    def __init__(self, sm: int = 90) -> None:
        super().__init__("cpu", sm, None)
        self.memory: list[Tensor] = []

    def load(self, plans: list[Plan]) -> Launcher:
        """As on a device; the bytes of a kernel are its name."""
        kernels = {one.kernel for steps in plans for one in steps.launches}
        driver = FakeDriver({kernel.name.encode(): kernel for kernel in kernels})
        driver.memory = self.memory
        images = [KernelImage(one.name, "entry", 32 * one.num_warps, 0, one.name.encode()) for one in kernels]
        return Launcher(images, driver=driver)

    def place(self, tensor: Tensor) -> Tensor:
        """A copy that kernels may touch."""
        copy = super().place(tensor)
        self.expose(copy)
        return copy

    def expose(self, tensor: Tensor) -> int:
        """The address, which kernels may touch from now on."""
        self.memory.append(tensor)
        return super().expose(tensor)
