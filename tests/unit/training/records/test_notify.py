"""Events go to a command or a webhook, and whatever that does, the run goes on."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_chameleon.config.schema import LoggingConfig
from megatron_chameleon.training.records import delivery
from megatron_chameleon.training.records.notify import MOST_IN_FLIGHT, Notifier, receiver_warning

EVENT = {
    "time": "2026-11-28T21:40:07.123+00:00",
    "event": "alarm",
    "step": 12,
    "host": "node1",
    "text": 'a "b" $(touch harm) `touch harm` ; touch harm\\n é',
}


class Server(BaseHTTPRequestHandler):
    """Answers by the path: /500, /redirect, /slow, /endless, or 204."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, dict(self.headers), body))  # type: ignore
        match self.path.strip("/").split("/")[0]:
            case "slow":
                time.sleep(3)
            case "500":
                self.send_error(500, "broken\x1b[31m")
            case "redirect":
                self.send_response(302)
                self.send_header("Location", "http://elsewhere.example/x?token=secret")
                self.end_headers()
            case "endless":
                self.send_response(200)
                self.end_headers()
                for _ in range(10**6):
                    self.wfile.write(b"x" * 65536)
            case "nothing":
                self.connection.close()
            case _:
                self.send_response(204)
                self.end_headers()

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    found = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    found.daemon_threads = True
    found.received = []  # type: ignore
    found.handle_error = lambda *_: None  # type: ignore
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def send(
    target: str, folder: Path, limit: float = 20, wait: float = 20, times: int = 1
) -> Notifier:
    notifier = Notifier(LoggingConfig(on_event=target), folder, limit)
    for _ in range(times):
        notifier.send(EVENT)
    notifier.close(wait)
    return notifier


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def script(folder: Path, text: str) -> str:
    path = folder / "a program.sh"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return f"'{path}' 'first word' second"


def test_a_command_gets_the_event(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    command = script(tmp_path, f'cat > "{out}"; echo "$#:$1:$2" >> "{out}"; env >> "{out}"')
    send(command, tmp_path / "run")
    first, words, *variables = out.read_text().splitlines()
    assert json.loads(first) == {**EVENT, "run": str(tmp_path / "run")}
    assert words == "2:first word:second"
    found = dict(line.partition("=")[::2] for line in variables)
    assert found["CHAMELEON_EVENT"] == "alarm" and found["CHAMELEON_EVENT_STEP"] == "12"
    assert found["CHAMELEON_EVENT_TEXT"] == EVENT["text"]
    assert found["CHAMELEON_EVENT_HOST"] == "node1"
    assert found["CHAMELEON_EVENT_TIME"] == EVENT["time"]
    assert found["CHAMELEON_RUN"] == str(tmp_path / "run")
    assert json.loads(found["CHAMELEON_EVENT_JSON"])["text"] == EVENT["text"]
    assert not list(tmp_path.rglob("harm")) and not Path("harm").exists()
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo no such channel >&2; exit 3", "ended with exit code 3: no such channel"),
        ("kill -9 $$", "ended with signal 9"),
        ("exec 0<&- 1>&- 2>&-; exit 1", "ended with exit code 1"),
        ("printf 'a\\033[31mb\\n' >&2; exit 4", "ended with exit code 4: a\\x1b[31mb"),
        ("yes | head -c 30000000 >&2; echo end >&2; exit 5", "ended with exit code 5: end"),
        ("yes | head -c 30000000; exit 0", ""),
        ("sleep 60 & exit 0", ""),  # what it leaves running holds its standard error
    ],
)
def test_commands_that_fail_or_print_much(
    text: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = time.monotonic()
    send(script(tmp_path, text), tmp_path)
    assert time.monotonic() - start < 15
    program = tmp_path / "a program.sh"
    wanted = [f"logging.on_event: the alarm was not sent: {program} {words}"] if words else []
    assert warnings(caplog) == wanted


def test_a_command_that_hangs_is_ended_with_its_children(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pids = tmp_path / "pids"
    command = script(tmp_path, f"sleep 60 & echo $! $$ > '{pids}'; wait")
    send(command, tmp_path, limit=1)
    assert warnings(caplog) == [
        f"logging.on_event: the alarm was not sent: {tmp_path / 'a program.sh'} was ended after 1 s"
    ]
    for pid in pids.read_text().split():
        assert has_ended(int(pid))


def test_the_end_of_a_run_waits_only_a_little(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, server: ThreadingHTTPServer
) -> None:
    pids = tmp_path / "pids"
    start = time.monotonic()
    command = script(tmp_path, f"echo $$ > '{pids}'; exec sleep 60")
    send(command, tmp_path, wait=0.5)
    send(address(server, "/slow"), tmp_path, wait=0.1)
    assert time.monotonic() - start < 3
    assert has_ended(int(pids.read_text()))
    end = "s this is not sent: alarm"
    late = [f"logging.on_event: the run ends, and after {wait} {end}" for wait in ("0.5", "0.1")]
    assert warnings(caplog) == late


def has_ended(pid: int) -> bool:
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_few_are_under_way_at_a_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = threading.active_count()
    notifier = Notifier(LoggingConfig(on_event="sleep 60"), tmp_path)
    for _ in range(20):
        notifier.send(EVENT)
        assert threading.active_count() <= before + MOST_IN_FLIGHT
    notifier.close(0)
    full, end = warnings(caplog)
    assert full.startswith("logging.on_event: 4 deliveries are still under way, so events such as")
    assert end.endswith("after 0 s this is not sent: alarm, alarm, alarm, alarm")


def test_only_the_events_of_the_list(tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = LoggingConfig(on_event=script(tmp_path, f"cat >> '{out}'"), on_event_kinds=["stop"])
    notifier = Notifier(config, tmp_path)
    notifier.send(EVENT)
    notifier.send({**EVENT, "event": "stop"})
    notifier.close(20)
    (line,) = out.read_text().splitlines()
    assert json.loads(line)["event"] == "stop"


def test_a_program_that_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = LoggingConfig(on_event=str(tmp_path / "nothing --x"))
    assert f"this machine has no program '{tmp_path}/nothing'" in str(receiver_warning(config))
    send(config.on_event or "", tmp_path)
    (warning,) = warnings(caplog)
    assert "nothing cannot be started ([Errno 2]" in warning
    assert receiver_warning(LoggingConfig()) is None
    assert receiver_warning(LoggingConfig(on_event="https://host/x")) is None
    assert receiver_warning(LoggingConfig(on_event="sh -c true")) is None


def test_an_address_whose_secret_is_masked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = LoggingConfig(on_event="https://no-such-host.invalid/***")
    words = "logging.on_event: the secret of https://no-such-host.invalid/*** is masked, as in the"
    assert str(receiver_warning(config)).startswith(words)
    send(config.on_event or "", tmp_path)
    assert warnings(caplog) == []


def test_a_folder_and_a_file_that_cannot_be_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "plain").write_text("")
    for name in ("plain", "."):
        send(str(tmp_path / name), tmp_path)
    assert all("cannot be started ([Errno 13]" in line for line in warnings(caplog))
    assert len(warnings(caplog)) == 2


def address(server: ThreadingHTTPServer, path: str) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}{path}"


def test_a_webhook_gets_a_post(
    server: ThreadingHTTPServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    received: list = []
    server.received = received  # type: ignore
    url = address(server, "/services/T0/secret?x=1").replace("//", "//me:p%40w@")
    send(url, tmp_path)
    ((path, headers, body),) = received
    assert path == "/services/T0/secret?x=1"
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert headers["Authorization"] == "Basic bWU6cEB3"  # me:p@w
    assert json.loads(body) == {**EVENT, "run": str(tmp_path)}
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/500", "answered 500 broken\\x1b[31m"),
        ("/redirect", "answered 302 Found to http://elsewhere.example/***; give that address"),
        ("/slow/secret", "did not answer in time"),
        ("/nothing/secret", "cannot be reached (Remote end closed connection without response)"),
        ("/endless", ""),
    ],
)
def test_servers_that_fail(
    path: str,
    words: str,
    server: ThreadingHTTPServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    received: list = []
    server.received = received  # type: ignore
    send(address(server, path), tmp_path, limit=0.5)
    host = f"http://127.0.0.1:{server.server_address[1]}/***"
    wanted = [f"logging.on_event: the alarm was not sent: {host} {words}"] if words else []
    assert warnings(caplog) == wanted
    assert len(received) == 1  # a redirect is not followed


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/secret",
        "http://no-such-host.invalid/secret",
        "https://127.0.0.1:1/secret",
        "http://[::1]:1/secret",
    ],
)
def test_a_server_that_is_not_there(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    send(url, tmp_path)
    (warning,) = warnings(caplog)
    assert "/*** cannot be reached (" in warning and "secret" not in warning


def test_a_fault_of_ours_is_a_warning_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(delivery, "event_variables", fail)
    send("true", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        send("true", tmp_path)
    assert len(warnings(caplog)) == 2
    assert all(line.endswith("can't start new thread") for line in warnings(caplog))
    assert all(record.levelno == logging.WARNING for record in caplog.records)
