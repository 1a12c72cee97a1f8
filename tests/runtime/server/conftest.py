"""The model that the servers of this folder's tests share, and the server that most of them ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Running, answering, serving

from foldkv.runtime import Model
from foldkv.runtime.server.app import Limits


@pytest.fixture(scope="session")
def model(tiny_bundle: Path) -> Iterator[Model]:
    with Model(tiny_bundle, threads=1) as model:
        yield model


@pytest.fixture(scope="session")
def running(model: Model) -> Iterator[Running]:
    """It has no keys."""
    with (
        serving(model, prefixes=64 << 20) as service,
        answering(service, Limits(max_body=64 << 10, body_timeout=5)) as running,
    ):
        yield running
