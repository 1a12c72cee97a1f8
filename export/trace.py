"""From the decoder to an ONNX model: torch.export, with foldkv operators kept as nodes and their bodies as functions.

The graph's inputs and outputs, including every state tensor, have names (docs/artifacts.md lists them).
Batch, chunk length, number of logits and the capacity of the entries are dynamic.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from ..errors import FoldkvError
from .contract.geometry import CSA, ModelSpec
from .contract.operators import expected_operators
from .contract.state import state_tensors
from .model.decoder import CHOSEN, TAP, Decoder, new_state
from .operators.registry import DOMAIN, ONNX_OPSET, operators, translation_table

INPUTS = ("input_ids", "positions", "num_tokens", "active_context", "logit_indices")
LOGITS = "logits"
# Sizes of the traced example; all different, or two dynamic sizes would be taken for one.
_BATCH, _CHUNK, _KEPT, _CONTEXT = 2, 5, 3, 64


class _Flat(nn.Module):
    """The decoder with its state as separate arguments, because torch.export needs their names."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        num_tokens: Tensor,
        active_context: Tensor,
        logit_indices: Tensor,
        state: list[Tensor],
    ) -> list[Tensor]:
        logits, after, taps = self.decoder.run(input_ids, positions, num_tokens, active_context, logit_indices, state)
        return [logits, *after, *taps]


def onnx_from_decoder(decoder: Decoder) -> ir.Model:
    """The model as ONNX with its weights in memory, in an opset and IR version that every backend accepts.

    Raises:
        FoldkvError: an operator was lost on the way, which would be an internal fault.
    """
    tensors = state_tensors(decoder.spec)
    arguments, shapes = _example(decoder)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Flat(decoder),
            arguments,
            dynamo=True,
            dynamic_shapes=shapes,
            custom_translation_table=translation_table(),
            opset_version=ONNX_OPSET,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    model = program.model
    for value, name in zip(model.graph.inputs, [*INPUTS, *(t.input for t in tensors)], strict=True):
        value.name = name
    outputs = list(model.graph.outputs)
    taps = outputs[1 + len(tensors) :]
    del model.graph.outputs[1 + len(tensors) :]
    for value, name in zip(model.graph.outputs, [LOGITS, *(t.output for t in tensors)], strict=True):
        value.name = name
    for layer, value in enumerate(taps):
        value.name = TAP.format(layer=layer)
    sparse = (layer for layer, kind in enumerate(decoder.spec.layer_types) if kind == CSA)
    for node in model.graph:
        if node.op_type == "FoldkvIndexSelect":
            node.outputs[0].name = CHOSEN.format(layer=next(sparse))
    for name in list(model.graph.initializers):
        value = model.graph.initializers[name]
        value.name = name.removeprefix("decoder.")
    name_dimensions(model, decoder.spec)
    tidy(model)
    add_functions(model)
    _check_operators(model, decoder)
    return model


def _example(decoder: Decoder) -> tuple[tuple[object, ...], tuple[object, ...]]:
    batch = torch.export.Dim("batch", min=1, max=65536)
    chunk = torch.export.Dim("chunk", min=1, max=1 << 20)
    kept = torch.export.Dim("kept", min=1, max=1 << 20)
    capacities = {
        ratio: torch.export.Dim(f"entries_{ratio}", min=1, max=1 << 24) for ratio in set(decoder.spec.ratios) if ratio
    }
    arguments = (
        torch.zeros(_BATCH, _CHUNK, dtype=torch.int64),
        torch.zeros(_BATCH, dtype=torch.int32),
        torch.full((_BATCH,), _CHUNK, dtype=torch.int32),
        torch.tensor([_CHUNK]),
        torch.zeros(_BATCH, _KEPT, dtype=torch.int64),
        # Capacities must also differ between ratios, or torch would join their dimensions.
        new_state(decoder.spec, _CONTEXT * max(1, *decoder.spec.ratios) + 1, _BATCH),
    )
    state_shapes = [{0: batch, 1: capacities[t.ratio]} if t.ratio else {0: batch} for t in state_tensors(decoder.spec)]
    return arguments, ({0: batch, 1: chunk}, {0: batch}, {0: batch}, None, {0: batch, 1: kept}, state_shapes)


def name_dimensions(model: ir.Model, spec: ModelSpec) -> None:
    """Give dynamic sizes readable names instead of torch's."""
    tensors = state_tensors(spec)
    values = {value.name: value for value in [*model.graph.inputs, *model.graph.outputs]}
    for tensor in tensors:
        rows = f"entries_{tensor.ratio}" if tensor.ratio else tensor.rows
        for name in (tensor.input, tensor.output):
            values[name].shape = ir.Shape(["batch", rows, tensor.width])
    for name, shape in (
        ("input_ids", ["batch", "chunk"]),
        ("positions", ["batch"]),
        ("num_tokens", ["batch"]),
        ("active_context", [1]),
        ("logit_indices", ["batch", "kept"]),
        (LOGITS, ["batch", "kept", spec.vocab_size]),
    ):
        values[name].shape = ir.Shape(shape)


def tidy(model: ir.Model) -> None:
    """Remove leftovers of tracing: debug metadata, unused nodes and constants, repeated constants."""
    from onnx_ir.passes.common import (
        CommonSubexpressionEliminationPass,
        IdentityEliminationPass,
        LiftConstantsToInitializersPass,
        RemoveUnusedNodesPass,
    )

    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    # TensorRT needs axes and shapes as constants; weights of any size stay unchanged.
    onnxscript.optimizer.fold_constants(model, should_fold=_reads_no_weight)
    for step in (
        IdentityEliminationPass(),
        CommonSubexpressionEliminationPass(),
        LiftConstantsToInitializersPass(lift_all_constants=False),
        RemoveUnusedNodesPass(),
    ):
        step(model)
    model.metadata_props.clear()
    model.producer_name = "foldkv"
    model.graph.name = "decoder"


def _reads_no_weight(node: ir.Node) -> bool | None:
    """False if a weight would be folded into a constant of another name; None leaves it to the optimizer."""
    return False if any(value is not None and value.is_initializer() for value in node.inputs) else None


def add_functions(model: ir.Model) -> None:
    """Attach the bodies of all operators that the graph uses, and of the helpers that they call."""
    known = {}
    for operator in operators().values():
        for function in (operator.function, *_called(operator.function)):
            known[function.name] = function
    wanted = [node.op_type for node in model.graph if node.domain == DOMAIN]
    while wanted:
        name = wanted.pop()
        identifier = (DOMAIN, name, "")
        if identifier in model.functions:
            continue
        body = ir.serde.deserialize_function(known[name].to_function_proto())
        _give_loops_a_condition(body)
        model.functions[identifier] = body
        wanted += [node.op_type for node in body if node.domain == DOMAIN]
    model.opset_imports[DOMAIN] = 1


def _give_loops_a_condition(body: ir.Function) -> None:
    """Give counted loops a condition: TensorRT's parser needs one, though ONNX allows a loop without."""
    for node in [node for node in body if node.op_type == "Loop" and node.inputs[1] is None]:
        always = ir.node("Constant", [], attributes={"value": ir.tensor(True)}, name=f"{node.name}_always")
        always.outputs[0].name = f"{node.name}_always"
        body.insert_before(node, always)
        node.replace_input_with(1, always.outputs[0])


def _called(function: object) -> Iterator[object]:
    for called in function.function_ir.get_called_functions().values():  # type: ignore[attr-defined]
        yield called
        yield from _called(called)


def operator_counts(model: ir.Model) -> dict[str, int]:
    """How many nodes of each foldkv operator the graph has."""
    return dict(sorted(Counter(node.op_type for node in model.graph if node.domain == DOMAIN).items()))


def expected_counts(decoder: Decoder) -> dict[str, int]:
    """How many nodes of each operator a decoder must give."""
    return expected_operators(decoder.spec, decoder.profile)


def _check_operators(model: ir.Model, decoder: Decoder) -> None:
    found, expected = operator_counts(model), expected_counts(decoder)
    if found != expected:
        raise FoldkvError(
            f"the traced graph has operators {found}; expected {expected}. Report this as a fault of foldkv."
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's exporter, which prints its own progress and other projects' deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
