"""foldkv turns DeepSeek-V4-class checkpoints into engines that keep the KV cache compressed."""

import logging

__version__ = "0.1.0"

# A library prints nothing by itself; to see its warnings, give the logger `foldkv` a handler.
logging.getLogger("foldkv").addHandler(logging.NullHandler())
