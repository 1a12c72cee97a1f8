"""Muon, the optimiser of the V4 report for matrices: momentum whose singular values are all made about 1."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

#: Coefficients of the quintic Newton-Schulz step, from Jordan et al., "Muon" (2024).
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices [n, rows, columns] with singular values near 1 and the same singular vectors."""
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """For parameters [..., rows, columns]; each matrix of a stack is taken alone.

    An update has the root mean square that AdamW's has (0.2), so that one learning rate serves both.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape[-2:]].append(parameter)
            for (rows, columns), parameters in shapes.items():
                moved = []
                for parameter in parameters:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(parameter.grad, 1 - group["momentum"])
                    moved.append(parameter.grad.lerp(momentum, group["momentum"]).view(-1, rows, columns))
                updates = orthogonal(torch.cat(moved)) * (0.2 * max(rows, columns) ** 0.5)
                for parameter, update in zip(parameters, updates.split([len(one) for one in moved]), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view_as(parameter), alpha=-group["lr"])
