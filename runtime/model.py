"""A model: a bundle opened on this machine, shared by any number of sessions.

A model has the loaded segments and the mapped weights. Each session has its own state and buffers. Sessions of one model can
run on several threads at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ..errors import InputError, short
from ..plugins.cuda import device_name
from ..progress import Say, silent
from .backend import Executor
from .buffers import Buffers, plan_bytes
from .bundle import Bundle, load_bundle, require_backend
from .wide import AUTO, MATRICES

if TYPE_CHECKING:
    from .chain import ChainModel


class Model:
    """A bundle, checked and opened. A context manager; ``close`` frees it.

    Attributes:
        bundle: the checked bundle.
    """

    def __init__(
        self,
        bundle: Path,
        *,
        threads: int | None = None,
        weights_from: Path | None = None,
        devices: Sequence[int] | None = None,
        context: int | None = None,
        batch: int = 1,
        verify: bool = False,
        place: bool = True,
        matrices: str = AUTO,
        signature: Path | None = None,
        public_key: Path | None = None,
        progress: Say = silent,
    ) -> None:
        """Check the bundle (sha256 of every file of its own), find and map the weights, load the segments.

        Layers are dealt out over several GPUs by the memory that their weights take and the state of ``batch`` sequences of
        ``context`` tokens. Sessions of other sizes can be opened as long as there is room.

        Args:
            bundle: the folder of one target, as ``foldkv build`` wrote it.
            threads: the most threads per operator; the default is 1 for a small model, else the processors that this process may use.
                Decode steps of a small model always take one.
            weights_from: folder with the checkpoint's weight files. Without it they are looked for where ``FOLDKV_WEIGHTS``
                says, in ``weights/`` of the bundle, and where the checkpoint was exported from.
            devices: for engines: numbers of the GPUs that share the layers; the default is the first GPU alone.
            context: tokens of a sequence for which there must be room on the GPUs of engines, whose largest is the default; on the cpu,
                matrices in float32 leave room for it.
            batch: sequences for which there must be room.
            verify: read the checkpoint's weight files whole, and refuse them if their sha256 is not what the lock says, or the Hugging
                Face cache that they lie in. Engines' files are hashed while they are copied. Without it names, sizes and headers
                are compared.
            place: for ONNX Runtime on the cpu: read experts in e2m1 in the order that suits it, and the e4m3 matrices of a large model
                in bfloat16. The first model that does so copies them to ``stacks/`` of ``FOLDKV_CACHE`` (small ones are copied in
                memory). Otherwise every step decodes the weights from the checkpoint's files, which takes many times as long and no room.
            matrices: for ONNX Runtime on the cpu: how to read the matrices of a large model: "float32", made in memory when the model is
                opened, twice the bytes and about four times as fast; "bfloat16", mapped from files; or "auto": float32 if it takes at
                most half of the free memory. The results differ in the order of sums.
            signature: a folder that ``foldkv evidence --key`` wrote. The model is opened only if it was signed with the key of ``public_key``
                and vouches for this bundle; nothing is deserialised before. It says what the weights should be, too: ``verify=True``
                compares them.
            public_key: of an elliptic curve, in PEM; for ``signature``.
            progress: called while weights are copied to GPUs or to the disk; a :class:`~foldkv.progress.Progress` learns more.

        Raises:
            ArtifactError: the bundle is damaged, incomplete, changed, of another version, or another one than that which was signed.
            InputError: an argument is wrong, weights are missing or are others, nobody says what their sha256 should be, the disk has
                no room for the copies, or the signature does not hold.
            MissingDependencyError: a package or a device that the bundle's backend needs is missing.
        """
        if threads is not None and (type(threads) is not int or threads < 1):
            raise InputError(f"threads must be an integer of 1 or more, got {threads!r}.")
        try:
            folder = Path(bundle)
            source = None if weights_from is None else Path(weights_from)
        except TypeError:
            name, wrong = ("weights_from", weights_from) if isinstance(bundle, str | Path) else ("bundle", bundle)
            raise InputError(f"{name} must be the path of a folder, got {short(wrong)}.") from None
        if matrices not in MATRICES:
            raise InputError(f"matrices must be one of {', '.join(map(repr, MATRICES))}; got {short(matrices)}.")
        if not place and matrices != AUTO:
            raise InputError(
                f"matrices in {matrices} are made from copies, and place=False (`--no-place`) makes none. Leave one of the two out."
            )
        if (signature is None) != (public_key is None):
            raise InputError(
                "signature and public_key belong together: the folder of evidence, and the key that one trusts."
            )
        self.bundle: Bundle = load_bundle(folder)
        if signature is not None and public_key is not None:
            from .signature import check_signature  # its packages are needed for nothing else

            check_signature(self.bundle, signature, public_key)
        require_backend(self.bundle)
        if matrices != AUTO and self.bundle.backend.gpu:
            raise InputError(f"matrices are for bundles of the target cpu; {folder} is for a GPU. Leave them out.")
        self._loaded: Any
        if self.bundle.backend.engine:
            from .engine_model import EngineModel

            self._loaded = EngineModel(
                self.bundle, weights_from=source, devices=(0,) if devices is None else devices, context=context,
                batch=batch, verify=verify, progress=progress,
            )  # fmt: skip
        elif devices is not None:
            raise InputError(
                f"devices are for bundles with engines; {folder} is for {self.bundle.backend.library}. Leave them out."
            )
        else:
            from .chain import ChainModel

            self._loaded = ChainModel(
                self.bundle, threads=threads, weights_from=source, verify=verify, place=place, matrices=matrices,
                reserve=sum(plan_bytes(self.bundle.state, context, batch).values()) if context else 0, progress=progress,
            )  # fmt: skip

    @property
    def chain(self) -> ChainModel | None:
        """The opened segments of a bundle of graphs, for tools that look inside; None for engines."""
        return None if self.bundle.backend.engine else self._loaded

    @property
    def matrices(self) -> str:
        """The type in which the matrices of a large model are read on the cpu: "float32" or "bfloat16"; else "auto", which stands for
        the only way there is."""
        return (self.chain.matrices if self.chain is not None else "") or AUTO

    def open(self, context: int, batch: int) -> tuple[Buffers, Executor]:
        """State for ``batch`` sequences of up to ``context`` tokens, and what runs chunks over it.

        Raises:
            InputError: the state does not fit into memory, or an engine was built for other sizes.
        """
        if self.bundle.backend.engine:
            from .engine import EngineExecutor

            engine = EngineExecutor(self._loaded, context=context, batch=batch)
            return engine.buffers, engine
        from .chain_executor import ChainExecutor

        chain = ChainExecutor(self._loaded, context, batch)
        return chain.buffers, chain

    def devices(self) -> tuple[str, ...]:
        """The GPUs that compute, by number and the driver's name; empty on the CPU."""
        if self.bundle.backend.engine:
            return tuple(f"GPU {part.device.ordinal} ({part.device.name()})" for part in self._loaded.parts)
        return (f"GPU 0 ({device_name()})",) if self.bundle.backend.gpu else ()

    def changes(self) -> tuple[str, ...]:
        """What happened to the bundle's files and to its weights since they were opened; empty if nothing did."""
        return self.bundle.opened.changes() + tuple(self._loaded.changes())

    def close(self) -> None:
        """Free segments and weights. Sessions of the model cannot be used any more."""
        self._loaded.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
