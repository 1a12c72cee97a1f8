"""A case on a device: its tensors there, its kernels loaded, its outputs back on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import kit
import torch
from cases import Case
from torch import Tensor

from foldkv.plugins.cuda import Launcher, cuda_driver, device_capability
from foldkv.plugins.plans import Plan


class Device:
    """Where torch keeps tensors, and what launches kernels over them."""

    def __init__(self, torch_device: str, sm: int, driver: Any) -> None:
        """``torch_device`` is torch's name of it, ``sm`` its compute capability, ``driver`` the driver API."""
        self.torch_device, self.sm, self.driver = torch_device, sm, driver
        self._launchers: dict[frozenset[str], Launcher] = {}

    def load(self, plans: list[Plan]) -> Launcher:
        """The kernels of these plans, loaded once."""
        key = frozenset(one.kernel.name for steps in plans for one in steps.launches)
        if key not in self._launchers:
            self._launchers[key] = Launcher(kit.images(plans, self.sm), driver=self.driver)
        return self._launchers[key]

    @property
    def stream(self) -> int:
        """Handle of torch's current stream."""
        return torch.cuda.current_stream().cuda_stream if self.torch_device == "cuda" else 0

    def place(self, tensor: Tensor) -> Tensor:
        """A contiguous copy there."""
        return tensor.contiguous().to(self.torch_device, copy=True)

    def expose(self, tensor: Tensor) -> int:
        """The address of a tensor that is there already."""
        return tensor.data_ptr()

    def wait(self) -> None:
        """Wait until everything that was enqueued has run; an error of a kernel is raised here."""
        if self.torch_device == "cuda":
            torch.cuda.synchronize()


def gpu() -> Device:
    """The first GPU, with torch's context current.

    Raises:
        MissingDependencyError: there is no driver or no GPU.
    """
    driver = cuda_driver()
    torch.zeros(1, device="cuda")  # makes the context that kernels are loaded into
    sm = device_capability()
    assert sm is not None
    return Device("cuda", sm, driver)


class Placed:
    """A call's tensors on a device, poisoned outputs and workspace included."""

    def __init__(self, device: Device, case: Case, steps: Plan) -> None:
        """Copy everything there; what is in place stays so."""
        self._device, self.steps = device, steps
        inputs, outputs = case.outputs()
        placed = {id(tensor): device.place(tensor) for tensor in (*inputs, *outputs)}
        self.inputs = [placed[id(tensor)] for tensor in inputs]
        self.outputs = [placed[id(tensor)] for tensor in outputs]
        self.workspace = device.place(torch.full((1 + steps.workspace // 4,), torch.nan))
        self._addresses = [tensor.data_ptr() for tensor in self.inputs], [tensor.data_ptr() for tensor in self.outputs]

    def launch(self, launcher: Launcher) -> None:
        """Enqueue the call on torch's current stream."""
        launcher.launch(self.steps, *self._addresses, workspace=self.workspace.data_ptr(), stream=self._device.stream)

    def host(self) -> list[Tensor]:
        """The outputs after everything has run."""
        self._device.wait()
        return [tensor.cpu() for tensor in self.outputs]


def run(device: Device, launcher: Launcher, case: Case, steps: Plan) -> list[Tensor]:
    """The outputs of one call."""
    placed = Placed(device, case, steps)
    placed.launch(launcher)
    return placed.host()


def same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether outputs are equal bit by bit, NaN included."""
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )
