"""What every traced graph goes through: torch's exporter made quiet, leftovers removed, the operators' bodies attached."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer

from .operators.registry import DOMAIN, operators

INPUTS = ("input_ids", "positions", "num_tokens", "active_context", "logit_indices")
LOGITS = "logits"


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
    known = _bodies(tuple(operator.function for operator in operators().values()))
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


@functools.cache
def _bodies(functions: tuple[Any, ...]) -> dict[str, Any]:
    """The functions and all that they call, by name; finding these takes long."""
    return {found.name: found for function in functions for found in (function, *_called(function))}


def _give_loops_a_condition(body: ir.Function) -> None:
    """Give counted loops a condition: TensorRT's parser needs one, though ONNX allows a loop without."""
    for node in [node for node in body if node.op_type == "Loop" and node.inputs[1] is None]:
        always = ir.node("Constant", [], attributes={"value": ir.tensor(True)}, name=f"{node.name}_always")
        always.outputs[0].name = f"{node.name}_always"
        body.insert_before(node, always)
        node.replace_input_with(1, always.outputs[0])


def _called(function: Any) -> Iterator[Any]:
    for called in function.function_ir.get_called_functions().values():
        yield called
        yield from _called(called)


def operator_counts(model: ir.Model) -> dict[str, int]:
    """How many nodes of each foldkv operator the graph has."""
    return dict(sorted(Counter(node.op_type for node in model.graph if node.domain == DOMAIN).items()))


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


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Leave cycles of objects alone until the end."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
