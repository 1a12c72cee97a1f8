"""Weights as stored: the types in which plugins take the bytes of a checkpoint. Standard library only.

An operator that reads such weights has the attributes ``weight_format`` and ``scale_format``. They say what its tensors of
the types "weight" and "scale" hold (operators.py). A weight without scales has one block, whose scale is 1.

Codes are int8, never an FP8 or FP4 type. TensorRT-RTX 1.7.1 refuses FP8 tensors of plugins for sm80 and sm86, and, if a
plugin also has int8 tensors (exponents), for every GPU. It gives int8 tensors to a plugin as they are, whether they are
inputs of the graph or initializers: no layer of the plan converts or copies them.
"""

from __future__ import annotations

from collections.abc import Mapping

#: The role of routed experts in a segment, or what their roles begin with.
EXPERTS = "ffn.experts"
#: Attributes of operators that read weights as stored.
WEIGHT_FORMAT, SCALE_FORMAT = "weight_format", "scale_format"
#: Formats of weights: e4m3 codes; e2m1 codes, two in a byte, the first in the low bits; plain values.
E4M3, E2M1, BFLOAT16, FLOAT32 = "e4m3", "e2m1", "bfloat16", "float32"
#: Formats of scales: e8m0 bytes, which are exponents; or FLOAT32.
EXPONENT = "exponent"
#: Formats of weights whose elements are the values.
PLAIN_FORMATS = (BFLOAT16, FLOAT32)
#: The type of a tensor by its format, and how many values one element of a weight's last axis holds.
WEIGHT_TYPES: Mapping[str, str] = {E4M3: "int8", E2M1: "int8", BFLOAT16: "bfloat16", FLOAT32: "float32"}
SCALE_TYPES: Mapping[str, str] = {EXPONENT: "int8", FLOAT32: "float32"}
VALUES_PER_ELEMENT: Mapping[str, int] = {E4M3: 1, E2M1: 2, BFLOAT16: 1, FLOAT32: 1}
