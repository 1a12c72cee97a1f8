"""Warnings that a command gives once, however often it reads the file that they are about."""

from __future__ import annotations

import functools
import logging


@functools.cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning, unless the same one was logged before in this process."""
    logger.warning(message)
