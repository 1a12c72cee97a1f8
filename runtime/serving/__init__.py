"""Many requests over one model: who runs next, what is reused, and what an answer must keep to.

``Engine`` answers ``Request``s in text or tokens, from any thread or event loop; ``PrefixIndex`` keeps states for prompts that begin
alike. The HTTP server in :mod:`foldkv.runtime.server` is a layer above.
"""

from .engine import Engine, Generation, Stats
from .prefixes import PrefixIndex, PrefixStats
from .request import Request

__all__ = ["Engine", "Generation", "PrefixIndex", "PrefixStats", "Request", "Stats"]
