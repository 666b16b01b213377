"""The doctor on this machine, and on machines that lack something."""

import argparse
import builtins
import importlib.metadata
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_chameleon.cli import doctor, examination
from megatron_chameleon.cli.examination import CLUSTERS, DEMO, GPUS, Check


def examine(as_json: bool, capsys: pytest.CaptureFixture[str]) -> tuple[str, int]:
    code = 0
    try:
        doctor.run(argparse.Namespace(json=as_json))
    except SystemExit as end:
        code = int(end.code or 0)
    return capsys.readouterr().out, code


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions that the doctor finds in place of the installed ones; None hides a package."""
    changed: dict[str, str | None] = {}
    real: Callable[[str], str] = importlib.metadata.version

    def version(name: str) -> str:
        if name not in changed:
            return real(name)
        found = changed[name]
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    return changed


def row(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(check for check in report["checks"] if check["name"] == name)


def test_this_machine_runs_the_cpu_demo(capsys: pytest.CaptureFixture[str]) -> None:
    output, code = examine(False, capsys)
    assert code == 0
    assert output.startswith("Fine for the demo: `make demo` runs it")
    for name in ("Python", "torch", "megatron-core", "psutil", "/dev/shm", "NCCL", "SLURM sbatch"):
        assert name in output


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_without_a_gpu_no_row_of_the_other_groups_reads_as_a_fault(
    no_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    output, code = examine(False, capsys)
    first, *_, gpus, clusters = output.split("\n\n")
    assert "There is no GPU here: the paper's sizes need other machines." in first
    assert "missing" not in first + gpus + clusters
    assert gpus.startswith("Training on GPUs would need\n")
    assert re.search(r"GPU memory +needed +0 GiB", gpus)
    assert code == 0


def test_what_is_missing_for_the_demo_comes_first(
    versions: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    versions["psutil"] = None
    output, code = examine(False, capsys)
    assert output.splitlines()[:2] == [
        "Not ready for the demo yet. 1 to do:",
        "  psutil: -. pip install psutil",
    ]
    assert code == 2


@pytest.mark.parametrize(
    ("name", "found", "remedy"),
    [
        ("pillow", None, "pip install 'pillow'"),
        ("gigatoken", "0.9.3", "pip install 'gigatoken~=0.10.0'"),
    ],
)
def test_a_package_of_another_version_is_named(
    name: str, found: str | None, remedy: str, versions: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    versions[name] = found
    report = json.loads(examine(True, capsys)[0])
    assert row(report, "Requirements")["found"] == f"{name} {found or 'is missing'}"
    assert row(report, "Requirements")["remedy"] == remedy
    assert report["cpu_ok"] is False


def test_a_version_that_fits_and_was_not_tested_is_named(
    versions: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    versions["orjson"] = "99.0"
    output, code = examine(True, capsys)
    found = row(json.loads(output), "Tested versions")
    assert (found["status"], code) == ("warn", 0)
    assert found["found"].startswith("orjson 99.0 (tested: 3.")


def test_a_wheel_has_no_list_of_tested_versions(
    tmp_path: Path,
    versions: dict,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    versions["torch"] = "2.13.0+cpu"
    monkeypatch.setattr(examination, "CONSTRAINTS", tmp_path / "constraints.txt")
    output, code = examine(True, capsys)
    names = [check["name"] for check in json.loads(output)["checks"]]
    assert "Requirements" in names and "Tested versions" not in names
    assert code == 0


def test_a_package_whose_files_are_gone_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = examination._importable
    monkeypatch.setattr(examination, "_importable", lambda name: name != "omegaconf" and real(name))
    check = next(c for c in examination._packages() if c.name == "omegaconf")
    assert check.status == "missing" and check.found.endswith(", but its files are missing")
    assert check.remedy == "pip install --force-reinstall --no-deps omegaconf"


def test_a_torch_that_cannot_be_loaded_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def broken(name: str, *more: Any) -> Any:
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file\nand more")
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", broken)
    checks = list(examination._torch())
    assert checks[0].found == ("cannot be loaded: libcudart.so.13: cannot open shared object file")
    assert doctor.missing_for_demo(checks) == ["torch", "gloo"]
    assert {check.name for check in checks if check.group == GPUS} == {
        *("GPU", "GPU memory", "FP8", "NCCL")
    }


def test_a_command_that_a_shell_does_not_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, other = tmp_path / "venv" / "bin", tmp_path / "other"
    for folder in (here, other):
        folder.mkdir(parents=True)
        (folder / "chameleon").touch(mode=0o755)
    (here / "activate").touch()
    monkeypatch.setattr("sys.executable", str(here / "python"))
    monkeypatch.setenv("PATH", "/usr/bin")
    check = examination._command()
    assert (check.status, check.found) == ("warn", f"not on the PATH, but in {here}")
    assert check.remedy == f"source {here}/activate"
    monkeypatch.setenv("PATH", str(other))
    check = examination._command()
    assert check.found == f"{other}/chameleon, of another environment than {here}/python"
    monkeypatch.setenv("PATH", str(here))
    assert examination._command().status == "ok"


def test_a_command_beside_a_python_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, local, home = (tmp_path / name for name in ("usr/bin", "usr/local/bin", "home/bin"))
    folders = {"default": local, "user": home}
    for folder in (system, local, home):
        folder.mkdir(parents=True)
    monkeypatch.setattr("sys.executable", str(system / "python3"))
    monkeypatch.setattr("sysconfig.get_preferred_scheme", lambda kind: kind)
    monkeypatch.setattr("sysconfig.get_path", lambda _, scheme="default": str(folders[scheme]))
    monkeypatch.setattr("site.ENABLE_USER_SITE", True)
    monkeypatch.setenv("PATH", str(local))
    assert examination._command().remedy.startswith("python -m pip install")
    (home / "chameleon").touch(mode=0o755)
    check = examination._command()
    assert check.found == f"not on the PATH, but in {home}"
    assert check.remedy == f'export PATH="{home}:$PATH"'
    for folder in (home, local):
        (folder / "chameleon").touch(mode=0o755)
        monkeypatch.setenv("PATH", str(folder))
        assert (examination._command().status, examination._command().found) == (
            "ok",
            str(folder / "chameleon"),
        )


@pytest.mark.parametrize(
    ("free_gib", "memory_gib", "lacking"),
    [(0.2, 8, ["Disk"]), (1, 3, []), (50, 1.5, ["Memory"])],
)
def test_a_small_machine(
    free_gib: float, memory_gib: float, lacking: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gib = examination.GIB
    usage = SimpleNamespace(free=free_gib * gib)
    monkeypatch.setattr(examination.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(examination, "machine_memory", lambda: memory_gib * gib)
    monkeypatch.setattr(examination, "_cpu_quota", lambda: 0.5)
    checks = {check.name: check for check in examination._machine()}
    assert doctor.missing_for_demo(list(checks.values())) == lacking
    assert checks["CPU cores"].status == "warn"
    assert checks["CPU cores"].found.endswith(" of which this container may use 0.5")


def test_json_has_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    output, code = examine(True, capsys)
    report = json.loads(output)
    assert code == 0
    assert report["cpu_ok"] is True
    assert {check["status"] for check in report["checks"]} <= {"ok", "warn", "missing"}
    assert {check["group"] for check in report["checks"]} == {DEMO, GPUS, CLUSTERS}
    assert report["summary"][0].startswith("Fine for the demo")
    assert all(check["purpose"] for check in report["checks"])
    assert all(check["remedy"] for check in report["checks"] if check["status"] != "ok")


@pytest.mark.parametrize(
    ("name", "found"), [("psutil", None), ("megatron-core", "0.15.0"), ("sentencepiece", None)]
)
def test_what_the_demo_lacks_is_reported(
    name: str, found: str | None, versions: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    versions[name] = found
    output, code = examine(True, capsys)
    report = json.loads(output)
    assert code == 2
    assert row(report, name)["status"] == "missing"
    assert report["verdict"]["cpu_demo"] == f"CPU demo: no, because of: {name}"


def test_another_megatron_core_is_named_with_the_supported_one(
    versions: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    versions["megatron-core"] = "0.15.0"
    report = json.loads(examine(True, capsys)[0])
    assert row(report, "megatron-core")["found"] == "0.15.0, but 0.16.x is needed"
    assert "0.16" in row(report, "megatron-core")["remedy"]


@pytest.mark.parametrize(
    ("importable", "status", "found"),
    [
        (set(), "missing", "-"),
        ({"apex"}, "warn", "a different project of that name"),
        ({"apex", "apex.optimizers"}, "ok", "NVIDIA's"),
    ],
)
def test_the_other_apex_is_told_from_nvidias(
    importable: set[str], status: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examination, "_importable", lambda name: name in importable)
    check = examination._apex()
    assert (check.status, check.found) == (status, found)


def test_the_verdict_for_the_7b_names_the_reason() -> None:
    def check(name: str, status: str = "ok", required: bool = False) -> Check:
        return Check(name, status, "", "", required=required)

    whole = [check("torch", required=True), check("GPU"), check("GPU memory"), check("NCCL")]
    assert doctor.missing_for_7b(whole) == []
    assert doctor.missing_for_7b([*whole[:2], check("GPU memory", "missing"), whole[3]]) == [
        "too little GPU memory"
    ]
    no_gpu = [whole[0], *(check(name, "missing") for name in ("GPU", "GPU memory", "NCCL"))]
    assert doctor.missing_for_7b(no_gpu) == ["no GPU"]
