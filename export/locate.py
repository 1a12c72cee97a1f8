"""Find the weights of an artifact on this machine, and notice that they are not those that it was made with.

Standard library only: the runtime uses it too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from ..artifact import sha256_json
from ..errors import InputError, system_failure
from ..inputs import file_identity
from ..manifests import CheckpointFacts
from .contract.lock import WeightsLock, weight_folders


def find_weights(
    artifact: Path, lock: WeightsLock, made: CheckpointFacts, given: Path | None = None, *,
    wanted: Collection[str] | None = None,
) -> dict[str, Path]:  # fmt: skip
    """The path of every file of a lock, or of the wanted ones.

    A file is recognised by its name, size and header. Where the weights lie where the artifact was made with them, it is
    also checked that nobody has written them since: other values under the same names, shapes and sizes have the same header.
    For weights anywhere else, `foldkv verify` reads them whole.

    Args:
        artifact: folder of the package or bundle.
        lock: its lock.
        made: what its manifest says of the checkpoint.
        given: folder that the caller names; see :func:`~foldkv.export.contract.lock.weight_folders`.
        wanted: names of files; all by default.

    Raises:
        InputError: files are missing, are others, or were written since the artifact was made; all are listed.
    """
    files = lock.files if wanted is None else {name: file for name, file in lock.files.items() if name in wanted}
    found = WeightsLock(files, {}, lock.source).find(weight_folders(artifact, given, made.path))
    here = {name: Path(made.path) / name for name in lock.files}
    if made.files is not None and found and all(path == here[name] for name, path in found.items()):
        try:
            now = files_identity(here)
        except OSError as error:
            raise system_failure(error, Path(made.path)) from None
        if now != made.files:
            raise InputError(
                f"weight files in {made.path} were written again or replaced since {artifact} was made. Export the checkpoint "
                "again; if they were only copied or touched, name their folder with --weights-from."
            )
    return found


def files_identity(files: Mapping[str, Path]) -> str:
    """sha256 over who files are (inputs.py), by name. No content is read.

    Raises:
        OSError: a file is gone.
    """
    return sha256_json({name: file_identity(path).facts(links_change=True) for name, path in sorted(files.items())})
