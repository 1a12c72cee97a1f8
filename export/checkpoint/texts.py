"""The tokenizer of a checkpoint in one file, as transformers uses it.

tokenizer.json, tokenizer_config.json, special_tokens_map.json and the tokenizer's class determine what ``AutoTokenizer`` does
with a text. This module writes the result to one file, so a service only needs the package ``tokenizers``, and no rule of
transformers is written twice.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ...packages import require

TOKENIZER = "tokenizer.json"
#: How a checkpoint says how it reads conversations: a Jinja template, or DeepSeek-V4's encoding as Python.
TEMPLATE, ENCODING = "chat_template.jinja", "encoding/encoding_dsv4.py"
#: Files of a checkpoint that define how its texts begin, end and are read.
TEXT_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    TEMPLATE,
    ENCODING,
)
#: Texts whose ids are compared; special tokens are added.
_PROBES = ("", "a", " The quick\n\tfox's 12345 é 中文 😀  ")
_log = logging.getLogger(__name__)


def tokenizer_json(folder: Path) -> str | None:
    """The content of a tokenizer.json that encodes like ``AutoTokenizer.from_pretrained(folder)``; None without a tokenizer.

    Warns if transformers cannot load the tokenizer, or encodes differently from its own file.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    if not (folder / TOKENIZER).is_file():
        return None
    require("export")
    from transformers import AutoTokenizer

    try:
        # A checkpoint's own code is never run.
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        content = str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # noqa: BLE001 - transformers raises all kinds
        reason = " ".join(str(error).split())[:200]
        _log.warning(
            "transformers cannot load the tokenizer of %s (%s: %s). tokenizer.json is used unchanged; special tokens that other "
            "files ask for are not added.", folder, type(error).__name__, reason,
        )  # fmt: skip
        return (folder / TOKENIZER).read_text(encoding="utf-8")
    if differing := _first_difference(tokenizer, content):
        _log.warning(
            "the bundle's tokenizer encodes %r differently from AutoTokenizer.from_pretrained(%r). Compare their ids, "
            "or encode with transformers and give token ids.", differing, str(folder),
        )  # fmt: skip
    return content


def _first_difference(tokenizer: Any, content: str) -> str | None:
    """A text that transformers and its tokenizer's file encode to different ids, or None."""
    from tokenizers import Tokenizer

    plain: Any = Tokenizer.from_str(content)
    plain.no_truncation()
    plain.no_padding()
    for text in (*_PROBES, "".join(tokenizer.all_special_tokens)):
        if tokenizer(text)["input_ids"] != plain.encode(text).ids:
            return str(text)
    return None
