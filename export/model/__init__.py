"""The V4 model as plain PyTorch functions, caches as tensors in and out: one concept per file."""
