"""The V4 model as plain PyTorch functions, with caches as tensors in and out; one concept per file."""
