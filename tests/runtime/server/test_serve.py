"""The command: what it refuses before it opens a model, and how it starts and stops."""

from __future__ import annotations

import logging
import re
import signal
import socket
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from command import start
from openai import InternalServerError, OpenAI

from foldkv import packages
from foldkv.cli import main
from foldkv.errors import InputError
from foldkv.runtime import load_bundle
from foldkv.runtime.server.serve import Address, Prefixes, Sizes, _logging, find_chat, model_name


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["serve", *map(str, arguments)], standalone_mode=False)


def test_what_is_wrong_is_told_before_a_model_is_opened(tmp_path: Path) -> None:
    nowhere = tmp_path / "none"
    assert "--no-keys" in str(run(nowhere, "--host", "0.0.0.0").exception)
    assert "keys" in str(run(nowhere, "--api-keys", tmp_path / "keys").exception)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        error = run(nowhere, "--port", taken.getsockname()[1]).exception
        assert isinstance(error, InputError) and "in use" in str(error)
    assert "not a number of bytes" in str(run(nowhere, "--max-body", "much").exception)
    assert isinstance(run(nowhere, "--port", 0).exception, InputError)


def test_the_prefix_index_needs_a_folder_for_room_on_disk() -> None:
    with pytest.raises(InputError, match="--prefix-folder"):
        Prefixes(disk=1 << 20)
    with pytest.raises(InputError, match="--prefix-memory"):
        Prefixes(exact=False)
    with pytest.raises(InputError, match=r"--prefix-memory 4 is 4 B, which keeps no state.*such as 4GiB"):
        Prefixes(memory=4)
    assert Prefixes().open(None, 1) is None  # type: ignore[arg-type]


def test_a_bundle_without_an_encoding_is_served_without_chat(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle, verify=False)
    assert find_chat(bundle, None)[0] is None and "--chat-format" in find_chat(bundle, None)[1]
    chat, why = find_chat(bundle, "v4")
    assert chat is not None and chat.name == "v4" and not why
    with pytest.raises(InputError, match="v4-0731"):
        find_chat(bundle, "v4-073")
    assert model_name(bundle) == "tiny-v4"
    assert Sizes().context_of(bundle) == 32 << 10 and Sizes(context=100).context_of(bundle) == 100


def test_an_address_is_bound_and_nobody_waits_at_it_yet() -> None:
    with Address(port=0).socket() as bound, socket.socket() as client:
        assert client.connect_ex(bound.getsockname()) != 0
    with pytest.raises(InputError):
        Address("256.256.256.256.invalid").socket()


def refused(client: OpenAI) -> None:
    schema = {"allOf": [{"type": "string", "pattern": f"a.{{{n}}}b"} for n in range(5, 40)]}
    with pytest.raises(InternalServerError, match="stopping"):
        client.completions.create(model="mine", prompt="x", extra_body={"structured_outputs": {"json": schema}})


def test_every_part_of_a_server_logs_with_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    with _logging():
        for name in ("foldkv.serving", "foldkv.runtime.serving.prefix_files", "uvicorn.error"):
            logging.getLogger(name).warning("from %s", name)
    logging.getLogger("foldkv.serving").warning("after it")
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d [\d:,]+ WARNING ", "", line) for line in lines[:3]] == [
        "from foldkv.serving", "from foldkv.runtime.serving.prefix_files", "from uvicorn.error",
    ]  # fmt: skip
    assert not [line for line in lines[3:] if " WARNING " in line]


@pytest.mark.slow
def test_the_command_answers_until_a_signal_and_lets_the_last_answer_end(tiny_bundle: Path) -> None:
    options = (
        "--port",
        0,
        "--context",
        512,
        "--slots",
        2,
        "--threads",
        1,
        "--model-name",
        "mine",
        "--prefix-memory",
        "16MiB",
    )
    needed = {*packages.FEATURES["serve"].modules, "onnxruntime", "llguidance"}
    hide = [name.split(".")[0] for name in packages.modules() if name not in needed]
    with start("serve", tiny_bundle, *options, hide=hide) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"mine is served at (http://127\.0\.0\.1:\d+) \(context 512, 2 slots\)\n", line)
        assert found, (line, process.stderr and process.stderr.read())
        with OpenAI(base_url=f"{found[1]}/v1", api_key="-", max_retries=0, timeout=60) as client:
            stream = client.completions.create(model="mine", prompt="def f(", max_tokens=80, temperature=0, stream=True)
            first = next(stream)
            text = first.choices[0].text
            hostile = threading.Thread(target=refused, args=(client,))  # it took for ever, and the end waited for it
            hostile.start()
            process.send_signal(signal.SIGTERM)
            text += "".join(chunk.choices[0].text for chunk in stream)
            hostile.join(30)
        out, err = process.communicate(timeout=60)
    assert len(text) == 80 and process.returncode == 0 and out == ""
    # One line of the server and one of the engine, both with the id that the client has.
    head = r"^\d{4}-\d\d-\d\d [\d:,]+ INFO "
    what = (
        rf"req-\w+ 127\.0\.0\.1 POST '/v1/completions' 200 [\d.]+ s {first.id} 6 tokens \(0 cached\) \+ 80 new, length"
    )
    assert re.search(f"{head}{what}$", err, re.MULTILINE), err
    assert re.search(f"{head}request {first.id}: 6 prompt tokens, .*", err, re.MULTILINE), err
    assert "Traceback" not in err and "error" not in err.lower()
