"""The operators of the ``foldkv`` domain, one concept per file: an eager definition in PyTorch for each,
the same function in standard ONNX operators, and the count of both in one registry.

The eager bodies are the definition. The ONNX bodies are written independently of them and are compared
with them, so that each is a test of the other.
"""
