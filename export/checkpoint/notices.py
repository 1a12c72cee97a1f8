"""Warnings that a command gives only once, even if it reads the file again."""

from __future__ import annotations

import functools
import logging


@functools.cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning, unless the same one was logged before in this process."""
    logger.warning(message)
