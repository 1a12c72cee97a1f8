"""Decoding from a bundle: sessions, sampling, state. Needs neither torch nor onnx."""
