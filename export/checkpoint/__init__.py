"""Checkpoints as they lie on disk: config.json, headers of safetensors, formats of weights, tokenizers."""
