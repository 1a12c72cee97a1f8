"""What a bundle says of its chat: which encoding its model was trained with. Standard library only.

Export writes ``chat.json``, and the runtime reads it. A checkpoint of DeepSeek-V4 has its own encoding, in revisions that the tokenizer
does not tell apart; other checkpoints have a Jinja template.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import ArtifactError

CHAT = "chat.json"
VERSION = 1
#: Values of ``encoding``.
DEEPSEEK, JINJA = "deepseek", "jinja"
#: Values of ``revision``: V4-Flash and V4-Pro as first released; those from V4-Flash-0731 on; V4.1.
V4, V4_0731, V41 = "v4", "v4-0731", "v4.1"
REVISIONS = (V4, V4_0731, V41)
_AGAIN = "Export the checkpoint and build the bundle again."


@dataclass(frozen=True)
class ChatFile:
    """The content of ``chat.json``.

    Attributes:
        encoding: "deepseek" or "jinja".
        revision: of the encoding "deepseek"; else "".
        template: the Jinja template of the encoding "jinja"; else "".
        tokens: the texts that a template knows by name, such as ``bos_token``.
    """

    encoding: str
    revision: str = ""
    template: str = ""
    tokens: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        content = {"version": VERSION, **dataclasses.asdict(self)}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> ChatFile:
        """Read and check it.

        Raises:
            ArtifactError: the file is missing, damaged or of another version.
        """
        try:
            content = json.loads(path.read_bytes())
            version = content.pop("version")
            found = cls(**content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path} cannot be read ({type(error).__name__}: {error}). {_AGAIN}") from None
        texts = [found.encoding, found.revision, found.template]
        if version != VERSION or not all(isinstance(text, str) for text in texts) or not isinstance(found.tokens, dict):
            raise ArtifactError(f"{path} has version {version!r} or values of other types. {_AGAIN}")
        named = {DEEPSEEK: found.revision in REVISIONS, JINJA: bool(found.template)}
        if not named.get(found.encoding, False):
            raise ArtifactError(
                f"{path} names the encoding {found.encoding!r} with the revision {found.revision!r}; expected "
                f"{DEEPSEEK!r} with one of {', '.join(REVISIONS)}, or {JINJA!r} with a template. {_AGAIN}"
            )
        return found
