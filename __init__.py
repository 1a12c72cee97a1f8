"""foldkv: DeepSeek-V4-class checkpoints to engines that keep the KV cache compressed."""

import logging

__version__ = "0.1.0"

# A library prints nothing by itself; who wants its warnings gives the logger `foldkv` a handler.
logging.getLogger("foldkv").addHandler(logging.NullHandler())
