"""Keys: files that hold them, headers that have them, and who needs one."""

from __future__ import annotations

from pathlib import Path

import pytest

from foldkv.errors import InputError
from foldkv.runtime.server.keys import Keys
from foldkv.runtime.server.serve import Address, who_may_ask


def key_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_file_has_one_key_in_a_line(tmp_path: Path) -> None:
    keys = Keys.from_file(key_file(tmp_path, "# of the tests\n\n  first \nsecond#2\n"))
    assert keys.allow("Bearer first") and keys.allow("bearer second#2") and keys.allow("Bearer  first ")
    for header in (
        None, "", "first", "Bearer", "Bearer ", "Bearer firs", "Bearer first2", "Basic first", "Bearer # of the tests", "Bearer first second",
    ):  # fmt: skip
        assert not keys.allow(header), header


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        ("key\n", 0o604, "chmod 600"),
        ("key\n", 0o640, "chmod 600"),
        ("key\n", 0o610, "chmod 600"),
        ("key\n", 0o602, "chmod 600"),
        ("\n# none\n", 0o600, "no key"),
        ("good\nbad key\n", 0o600, "line 2"),
        ("k\u00e9y\n", 0o600, "ASCII"),
    ],
)
def test_a_file_that_is_open_to_others_or_has_no_keys_is_refused(
    tmp_path: Path, text: str, mode: int, says: str
) -> None:
    path = key_file(tmp_path, text, mode)
    with pytest.raises(InputError, match=says) as error:
        Keys.from_file(path)
    assert str(path) in str(error.value) and "good" not in str(error.value)


def test_no_file_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keys"):
        Keys.from_file(tmp_path / "keys")


def test_other_machines_need_a_key_unless_somebody_says_that_they_need_none(tmp_path: Path) -> None:
    keys = key_file(tmp_path, "key\n")
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert who_may_ask(Address(host), None, no_keys=False) is None
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.com"):
        with pytest.raises(InputError, match="--no-keys"):
            who_may_ask(Address(host), None, no_keys=False)
        assert who_may_ask(Address(host), None, no_keys=True) is None
        assert who_may_ask(Address(host), keys, no_keys=False) is not None
    with pytest.raises(InputError, match="exclude"):
        who_may_ask(Address(), keys, no_keys=True)
