"""The chosen experts one after the other, each once with all of its tokens. Both forms of the weights share this.

Work and memory depend on the experts that a chunk chooses and on their tokens: a long chunk reads no weight twice, and only
one expert's weights are in memory at a time. This needs an operator whose sizes depend on values (NonZero), which
ONNX Runtime has. TensorRT also reads the body of FoldkvRoutedExperts, so that body does not use it (operators/experts.py).
The experts that a chunk chose are marked in a table of all experts: Unique would find them too, but has no kernel for GPUs.
"""

from __future__ import annotations

import numpy as np

#: Name of the body of the loop, by which passes find it after operators were inlined.
ONE_EXPERT = "one_expert"
#: Values that the statements use.
CONSTANTS = {
    "first": np.array([0]), "second": np.array([1]), "flat": np.array([-1]), "zero": np.array(0),
}  # fmt: skip


def clamped_swiglu(own: str = "") -> str:
    """Statements from ``gate`` and ``up`` and the scalars ``limit`` and ``low`` = -limit to ``hidden``, all of one shape.

    ``own`` is a prefix for every name except the scalars, for bodies that use this twice.
    """
    return f"""
            {own}clamped = Min ({own}gate, limit)
            {own}sigmoid = Sigmoid ({own}clamped)
            {own}silu = Mul ({own}clamped, {own}sigmoid)
            {own}top = Min ({own}up, limit)
            {own}bounded = Max ({own}top, low)
            {own}hidden = Mul ({own}silu, {own}bounded)
    """


def grouped_experts(gate_and_up: str, down: str, *, table: str, name: str = "y") -> str:
    """Statements from x [T, C], chosen [T, K], weights [T, K] and the scalars ``limit`` and ``low`` = -limit to y [T, C].

    Args:
        gate_and_up: statements from ``columns`` [C, n], an expert's tokens, to ``gate`` and ``up`` [I, n]. They can use
            ``expert``, its number as a scalar.
        down: statements from ``hidden`` [I, n] to ``down`` [C, n].
        table: an input with a row for each expert.
        name: of the result.
    """
    return f"""
        always = Constant <value = bool {{1}}> ()
        listed = Reshape (chosen, flat)
        number_listed = Shape (listed)
        marks = ConstantOfShape <value = int64[1] {{1}}> (number_listed)
        number_of_experts = Shape <start = 0, end = 1> ({table})
        unmarked = ConstantOfShape <value = int64[1] {{0}}> (number_of_experts)
        marked = ScatterElements <axis = 0> (unmarked, listed, marks)
        found = NonZero (marked)
        wanted = Reshape (found, flat)
        sizes = Shape (wanted)
        count = Squeeze (sizes, first)
        shape = Shape (x)
        none = ConstantOfShape (shape)
        {name} = Loop (count, always, none) <body = {ONE_EXPERT} (int64 number, bool go, float[T, C] before)
            => (bool more, float[T, C] after) {{
            more = Identity (go)
            expert = Gather <axis = 0> (wanted, number)
            is_mine = Equal (chosen, expert)
            mine = NonZero (is_mine)
            at = Transpose <perm = [1, 0]> (mine)
            share = GatherND (weights, at)
            tokens = Gather <axis = 0> (mine, zero)
            input = Gather <axis = 0> (x, tokens)
            columns = Transpose <perm = [1, 0]> (input)
            {gate_and_up}
            {clamped_swiglu()}
            {down}
            weighted = Mul (down, share)
            rows = Transpose <perm = [1, 0]> (weighted)
            target = Unsqueeze (tokens, second)
            after = ScatterND <reduction = "add"> (before, target, rows)
        }}>
    """
