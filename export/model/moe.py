"""The mixture of experts: routing by token id or by score, chosen experts, one shared expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..contract.geometry import ModelSpec
from ..contract.weights import FLOAT32
from ..operators.experts import routed_experts
from ..operators.route import route, route_hashed


class Gate(nn.Module):
    """Which experts a token goes to, and with what weight: hash layers look the experts up by token id, the others take the
    best scores (V4 report 2.1; export/operators/route.py)."""

    tid2eid: Tensor

    def __init__(self, spec: ModelSpec, *, hashed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))
        self.hashed, self.count, self.scaling = hashed, spec.experts_per_token, spec.routed_scaling_factor
        if hashed:
            self.register_buffer("tid2eid", torch.empty(spec.vocab_size, spec.experts_per_token, dtype=torch.int64))
        else:
            self.bias = nn.Parameter(torch.empty(spec.num_experts))

    def forward(self, x: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, C], input_ids [T] -> chosen [T, K] int64, weights [T, K] float32."""
        if self.hashed:
            chosen, weights = route_hashed(x, self.weight, self.tid2eid, input_ids, self.scaling, FLOAT32)
        else:
            chosen, weights = route(x, self.weight, self.bias, self.count, self.scaling, FLOAT32)
        return chosen, weights


class Experts(nn.Module):
    """The routed experts' weights, stacked: w13 [E, 2I, C] is gate over up, w2 [E, C, I] is down."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        inner = spec.moe_intermediate_size
        self.w13 = nn.Parameter(torch.empty(spec.num_experts, 2 * inner, spec.hidden_size))
        self.w2 = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size, inner))


class SharedExpert(nn.Module):
    """The expert that every token passes through: SwiGLU with both arms clamped."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.w1 = nn.Linear(spec.hidden_size, spec.moe_intermediate_size, bias=False)
        self.w2 = nn.Linear(spec.moe_intermediate_size, spec.hidden_size, bias=False)
        self.w3 = nn.Linear(spec.hidden_size, spec.moe_intermediate_size, bias=False)
        self.limit = spec.swiglu_limit

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        gate = self.w1(x).clamp(max=self.limit)
        out: Tensor = self.w2(gate * torch.sigmoid(gate) * self.w3(x).clamp(-self.limit, self.limit))
        return out


class MixtureOfExperts(nn.Module):
    """Routed plus shared experts."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.gate = Gate(spec, hashed=spec.hash_layers[layer])
        self.experts = Experts(spec)
        self.shared_experts = SharedExpert(spec)
        self.limit = spec.swiglu_limit

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """x [B, S, C], input_ids [B, S] -> [B, S, C]."""
        flat = x.flatten(0, 1)
        chosen, weights = self.gate(flat, input_ids.flatten())
        routed = routed_experts(flat, chosen, weights, self.experts.w13, self.experts.w2, self.limit)
        out: Tensor = routed.view_as(x) + self.shared_experts(x)
        return out
