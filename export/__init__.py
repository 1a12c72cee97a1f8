"""From a checkpoint to an ONNX graph package with the compressed caches as explicit state."""
