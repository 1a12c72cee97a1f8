"""What goes wrong with a request, as OpenAI's clients read it: a status, and a body with message, type, param and code."""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import CapacityError, GrammarError, InputError, MissingDependencyError, QueueFullError

_log = logging.getLogger(__name__)
#: Seconds after which a client that was sent away may ask again.
AGAIN = 1
#: The type of OpenAI's errors, by status; other statuses from 500 are errors of the server, from 400 of the request.
_TYPES = {429: "rate_limit_error", 503: "service_unavailable_error", 504: "timeout_error"}
#: Messages of foldkv begin with what is wrong: ``messages[2].role is ...``, ``temperature must be ...``.
_PLACE = re.compile(r"[a-z_]+(?=[\[ .])(?:\[\d+\]|\.[a-z_]+)*")


@dataclass(eq=False)
class Problem(Exception):
    """Why a request gets no answer.

    Attributes:
        status: of HTTP.
        message: what was wrong and what to do, for people.
        param: the field of the body that is wrong, if it is one.
        code: a name for programs.
        headers: further ones of the answer.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def facts(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def problem_of(error: BaseException, request: str, fields: frozenset[str] = frozenset()) -> Problem:
    """The problem that an error is for the client: a wrong request in the error's own words, or a failure of the server.

    Of a failure the client learns nothing but a number, under which the log has the rest.

    Args:
        error: what was raised.
        request: the id of the request, for the log.
        fields: names that the body can have, to say which one is wrong.
    """
    if isinstance(error, Problem):
        return error
    if isinstance(error, QueueFullError):
        return Problem(429, str(error), code="queue_full", headers={"retry-after": str(AGAIN)})
    if isinstance(error, CapacityError):
        return Problem(400, str(error), code="context_length_exceeded")
    if isinstance(error, GrammarError):
        return Problem(400, str(error), code="grammar_failed")
    if isinstance(error, InputError):
        place = _PLACE.match(str(error))
        named = place is not None and re.split(r"[\[.]", place[0])[0] in fields
        return Problem(400, str(error), param=place[0] if place and named else None, code="invalid_value")
    if isinstance(error, MissingDependencyError):
        return Problem(400, str(error), code="not_available")
    number = secrets.token_hex(6)
    _log.error("%s failed, error %s", request, number, exc_info=error)
    return Problem(500, f"The server failed; its log says why under error {number}.", code="internal_error")


def stopping() -> Problem:
    """The server takes no more requests."""
    return Problem(503, "The server is stopping.", code="stopping", headers={"retry-after": str(AGAIN)})


def too_many(what: str) -> Problem:
    """Nothing more fits now; ``what`` begins the sentence."""
    return Problem(
        429, f"{what}, as many as may. Try again later.", code="queue_full", headers={"retry-after": str(AGAIN)}
    )


def to_json(facts: Any) -> bytes:
    """JSON in UTF-8. Half characters, which a client may have sent, are written as escapes."""
    try:
        return json.dumps(facts, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(facts, separators=(",", ":")).encode()
