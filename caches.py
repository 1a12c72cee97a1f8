"""What foldkv can make again and keeps to save time: one folder, shared by all commands of a user.

Whatever is kept there is written beside its place and moved there whole, so that processes can share the folder. A cache that
cannot be written is not used: nothing fails because of it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

#: Names the folder.
VARIABLE = "FOLDKV_CACHE"


def cache_folder() -> Path:
    """The folder: ``FOLDKV_CACHE``, or ~/.cache/foldkv. It need not exist."""
    return Path(os.environ.get(VARIABLE, Path.home() / ".cache" / "foldkv"))


def keep(file: Path, write: Callable[[Path], object]) -> bool:
    """Make a file of a cache whole or not at all.

    Args:
        file: where it belongs; its folder is made.
        write: writes the path that it is given.

    Returns:
        Whether it is there; False if the disk is full, the folder is not writable, and the like.
    """
    part = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        part.replace(file)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return True
