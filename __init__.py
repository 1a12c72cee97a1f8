"""foldkv: DeepSeek-V4-class checkpoints to engines that keep the KV cache compressed."""

__version__ = "0.1.0"
