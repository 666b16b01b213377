"""The command as a process: streams that fail, faults of the machine, bugs, files that shrink."""

import errno
import io
import mmap
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_chameleon.cli import main as cli
from megatron_chameleon.cli.console import EXIT_OUTPUT_CLOSED
from megatron_chameleon.cli.outside_faults import outside_fault
from megatron_chameleon.errors import DataError

CRASH_AT_EXIT = 120
"""The interpreter's exit code when it cannot flush the standard output."""


class Command:
    """Runs ``chameleon`` in forks of this process, whose interpreter has started already."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch

    def run(
        self,
        work: Callable[[], None] | None = None,
        words: tuple[str, ...] = ("doctor",),
        stdout: int | None = None,
        stderr: int | None = None,
        closed: tuple[int, ...] = (),
        encoding: str = "utf-8",
    ) -> tuple[int, str, str]:
        """Run ``work`` as the verb ``doctor``, or the words themselves.

        Returns:
            The exit code, and what was printed on both streams.
        """
        if work is not None:
            self.monkeypatch.setattr("megatron_chameleon.cli.doctor.run", lambda args: work())
        paths = [self.folder / name for name in ("stdout", "stderr")]
        child = os.fork()
        if not child:
            code = 99
            try:
                for number, given, path in zip((1, 2), (stdout, stderr), paths, strict=True):
                    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                    os.dup2(os.open(path, flags) if given is None else given, number)
                sys.stdout = io.TextIOWrapper(io.FileIO(1, "wb", closefd=False), encoding)
                sys.stderr = io.TextIOWrapper(io.FileIO(2, "wb", closefd=False), encoding)
                for number in closed:
                    os.close(number)
                code = self._as_the_interpreter_does(words)
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        shown = [path.read_text() if path.exists() else "" for path in paths]
        return code, shown[0], shown[1]

    @staticmethod
    def _as_the_interpreter_does(words: tuple[str, ...]) -> int:
        sys.argv = ["chameleon", *words]
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        try:
            sys.stdout.flush()
        except BaseException:
            return CRASH_AT_EXIT
        return code


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(tmp_path, monkeypatch)


def print_lines() -> None:
    for number in range(100_000):
        print(f"line {number}")


@pytest.mark.parametrize("work", [print_lines, None])
def test_a_reader_that_has_gone_ends_the_command_quietly(
    command: Command, work: Callable[[], None] | None
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    words = ("doctor",) if work else ("train", "--help")
    code, _, stderr = command.run(work, words, stdout=writer)
    os.close(writer)
    assert (code, stderr) == (EXIT_OUTPUT_CLOSED, "")


@pytest.mark.parametrize("work", [print_lines, lambda: print("result")])
@pytest.mark.parametrize("words", [("--help",), ("--version",), ("plan", "--help"), ("doctor",)])
def test_a_full_standard_output_is_one_line(
    command: Command, words: tuple[str, ...], work: Callable[[], None]
) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    code, _, stderr = command.run(work, words, stdout=full)
    os.close(full)
    assert code == 2
    assert stderr == (
        "error: standard output: cannot be written (No space left on device). "
        "Make room on the disk and run the same command again.\n"
    )


def test_closed_streams_are_not_taken_by_the_next_files(command: Command, tmp_path: Path) -> None:
    def work() -> None:
        with (tmp_path / "file").open("w") as file:
            assert file.fileno() > 2
            print("result")
            os.write(1, b"from a library")
            print("progress", file=sys.stderr)

    code, _, _ = command.run(work, closed=(0, 1, 2))
    assert code == 0
    assert (tmp_path / "file").read_text() == ""


def test_a_full_standard_error_does_not_end_the_work(command: Command) -> None:
    def work() -> None:
        print("progress", file=sys.stderr, flush=True)
        print("result")

    full = os.open("/dev/full", os.O_WRONLY)
    code, stdout, _ = command.run(work, stderr=full)
    os.close(full)
    assert (code, stdout) == (0, "result\n")


def test_characters_that_the_locale_does_not_have_are_escaped(command: Command) -> None:
    def work() -> None:
        print("größe 中 \udcff")
        raise DataError("a·b", "ü", "x")

    code, stdout, stderr = command.run(work, encoding="ascii")
    assert code == 2
    assert stdout == "gr\\xf6\\xdfe \\u4e2d \\udcff\n"
    assert stderr == "error: a\\xb7b: \\xfc. x.\n"


def test_a_bug_is_one_line_that_names_its_place_and_keeps_the_traceback(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("RANK", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    code, _, stderr = command.run(lambda: {}["missing"])
    (kept,) = tmp_path.glob("chameleon-bug-*.txt")
    assert code == 1
    start = "error: chameleon doctor: KeyError: 'missing' (cli/main.py:"
    assert stderr.startswith(start) and stderr.count("\n") == 1
    assert f"Please report it with its traceback, which is in {kept}.\n" in stderr
    assert "Traceback (most recent call last)" in kept.read_text()
    monkeypatch.setenv("RANK", "0")
    assert "Traceback" in command.run(lambda: {}["missing"])[2]


def fault(error: BaseException) -> str:
    return str(outside_fault(error, "train"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "train: cannot be written (No space"),
        (OSError(errno.EROFS, "Read-only", "/a/b"), "/a/b: cannot be written (Read-only)"),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "/a"),
            "/a: no such file. Check the path.",
        ),
        (PermissionError(errno.EACCES, "Permission denied", b"/a"), "/a: cannot be read (Perm"),
        (OSError(errno.EMFILE, "Too many open files"), "this process may have"),
        (RuntimeError("unable to open shared memory object </torch_1>"), "/dev/shm: no shared"),
        (RuntimeError("Symlink loop from '/a'"), "/a: cannot be read (Too many levels of symb"),
        (MemoryError(), "chameleon train: out of memory. Free memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "out of memory (Def"),
        (RuntimeError("can't start new thread"), "no further thread or process can be started"),
        (OSError(errno.ENOENT, "No usable temporary directory found"), "TMPDIR: there is"),
        (RuntimeError("failed to listen. port: 29501, EADDRINUSE"), "port 29501 is already in use"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "another process of this"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal"), "another process"),
    ],
)
def test_a_fault_of_the_machine_is_named(error: Exception, message: str) -> None:
    assert message in fault(error)


def test_only_the_loss_of_another_process_lets_a_job_restart() -> None:
    """The job scripts restart no job that ends with 2."""
    lost = outside_fault(ConnectionResetError(errno.ECONNRESET, "reset"), "train")
    full = outside_fault(OSError(errno.ENOSPC, "No space left on device", "/a"), "train")
    assert lost is not None and lost.exit_code == 1
    assert full is not None and full.exit_code == 2


@pytest.mark.parametrize(
    "error",
    [
        *(
            KeyError("a"),
            ValueError("out of memory"),
            TypeError("x"),
            RuntimeError("shapes differ"),
        ),
        *(AssertionError("x"), RecursionError("x"), OSError("no number"), EOFError("x")),
    ],
)
def test_anything_else_is_a_bug(error: Exception) -> None:
    assert outside_fault(error, "train") is None


def test_only_stated_causes_count() -> None:
    disk = OSError(errno.ENOSPC, "No space left on device")
    stated, other = RuntimeError("writing failed"), KeyError("a")
    stated.__cause__, other.__context__ = disk, disk
    assert "No space left" in fault(stated)
    assert outside_fault(other, "train") is None


def test_a_limit_of_the_address_space_is_named(command: Command) -> None:
    def work() -> None:
        limit = 1 << 34
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        bytearray(1 << 36)

    code, _, stderr = command.run(work)
    assert code == 2
    assert "the address space is limited to 16.0 GiB (ulimit -v)" in stderr
    assert "Raise the limit with `ulimit -v unlimited`." in stderr


def test_a_mapped_file_that_has_become_shorter_is_named(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "a file.bin"
    path.write_bytes(bytes(2 * mmap.PAGESIZE))

    def work() -> None:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        os.truncate(path, 0)
        print(mapped[mmap.PAGESIZE])

    code, _, stderr = command.run(work)
    assert code == 2
    assert stderr.startswith(f"error: {path}: cannot be read: it has become shorter")
    assert stderr.count("\n") == 1
