"""The bodies beside the operator's own: the definition's result, and no weight of what was not chosen."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from foldkv.export.operators.experts import bounded_body, grouped_body, routed_experts
from foldkv.export.operators.registry import DOMAIN, ONNX_OPSET

_HIDDEN, _INNER, _EXPERTS, _CHOSEN, _LIMIT = 12, 10, 6, 3, 0.4


@pytest.fixture(
    scope="module", params=[grouped_body(), *(bounded_body(tokens) for tokens in (1, 2, 4, 9, 100))],
    ids=["grouped", "1 at a time", "2 at a time", "4 at a time", "9 at a time", "all at once"],
)  # fmt: skip
def session(request: pytest.FixtureRequest) -> onnxruntime.InferenceSession:
    shapes = {
        "x": ["T", _HIDDEN], "chosen": ["T", _CHOSEN], "weights": ["T", _CHOSEN], "w13": [_EXPERTS, 2 * _INNER, _HIDDEN],
        "w2": [_EXPERTS, _HIDDEN, _INNER],
    }  # fmt: skip
    dtypes = dict.fromkeys(shapes, TensorProto.FLOAT) | {"chosen": TensorProto.INT64}
    graph = helper.make_graph(
        [helper.make_node("FoldkvRoutedExperts", list(shapes), ["y"], domain=DOMAIN, limit=_LIMIT)], "experts",
        [helper.make_tensor_value_info(name, dtypes[name], shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", _HIDDEN])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[request.param], ir_version=10)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString())


@pytest.mark.parametrize("count", [1, 2, 9])
def test_it_is_the_definition(session: onnxruntime.InferenceSession, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    chosen = torch.stack([torch.randperm(_EXPERTS - 1, generator=generator)[:_CHOSEN] for _ in range(count)])
    chosen[count // 2] = chosen[count // 2, 0]  # a table by token id may name an expert twice
    x, weights = (torch.randn(count, size, generator=generator) for size in (_HIDDEN, _CHOSEN))
    w13 = torch.randn(_EXPERTS, 2 * _INNER, _HIDDEN, generator=generator) * 0.3
    w2 = torch.randn(_EXPERTS, _HIDDEN, _INNER, generator=generator)
    w13[-1], w2[-1] = torch.nan, torch.nan  # the last is never chosen
    feeds = {"x": x, "chosen": chosen, "weights": weights, "w13": w13, "w2": w2}
    found = session.run(None, {name: value.numpy() for name, value in feeds.items()})[0]
    torch.testing.assert_close(torch.from_numpy(found), routed_experts(x, chosen, weights, w13, w2, _LIMIT))
