"""The operators of the ``foldkv`` domain, one concept per file. Each has an eager definition in PyTorch and
the same function in standard ONNX operators; one registry lists both.

The eager bodies are the definition. The ONNX bodies are written independently and are compared
with them, so each tests the other.
"""
