"""Which chat encoding a checkpoint has.

DeepSeek-V4 ships its encoding as Python, ``encoding/encoding_dsv4.py``, and no template. That file is searched for the texts that tell its
revisions apart, never run. Other checkpoints have a Jinja template, as transformers finds it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, short
from ..contract.chat import DEEPSEEK, JINJA, V4, V4_0731, ChatFile
from .texts import ENCODING, TEMPLATE, TOKENIZER

#: Tokens that only DeepSeek-V4's tokenizers have, all of them.
_OWN_TOKENS = ("｜DSML｜", "<｜latest_reminder｜>")
#: The effort "max" of the encodings from V4-Flash-0731 on; the keys of config.json that came with it.
_LATER_EFFORT, _LATER_KEYS = "Reasoning Effort: Beyond maximum", "dspark_"
_log = logging.getLogger(__name__)


def chat_file(folder: Path, config: Mapping[str, Any]) -> ChatFile | None:
    """The chat encoding of the checkpoint in ``folder`` with this config.json; None if it has none.

    A template that somebody added to DeepSeek-V4's own encoding is not taken, with a warning.

    Raises:
        CheckpointError: a file of the tokenizer is not JSON of the usual form.
    """
    template, encoding = _template(folder), folder / ENCODING
    if encoding.is_file() or (template is None and _has_own_tokens(folder)):
        if template is not None:
            _log.warning("%s has its own chat encoding and a chat template. The encoding is used.", folder)
        return ChatFile(DEEPSEEK, revision=_revision(encoding, config))
    return ChatFile(JINJA, template=template, tokens=_tokens(folder)) if template else None


def _revision(encoding: Path, config: Mapping[str, Any]) -> str:
    if encoding.is_file():
        return V4_0731 if _LATER_EFFORT in encoding.read_text(encoding="utf-8", errors="replace") else V4
    return V4_0731 if any(key.startswith(_LATER_KEYS) for key in config) else V4


def _has_own_tokens(folder: Path) -> bool:
    added = _table(folder / TOKENIZER).get("added_tokens", [])
    texts = {token.get("content") for token in added if isinstance(token, dict)} if isinstance(added, list) else set()
    return texts.issuperset(_OWN_TOKENS)


def _template(folder: Path) -> str | None:
    """The default template, where transformers looks for it and in that order."""
    path = folder / TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8") or None
    found = _table(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    if found is not None and not isinstance(found, str):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: chat_template is {short(found)}; expected a text, or a list of templates with "
            "their names."
        )
    return found or None


def _tokens(folder: Path) -> dict[str, str]:
    """Texts by name, such as ``bos_token``, of which templates make use."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in _table(folder / name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                found[key] = text
    return found


def _table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Download it again.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is {short(found)}; expected a table. Download it again.")
    return found
