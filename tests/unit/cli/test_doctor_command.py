"""The doctor on this machine, and on machines that lack something."""

import argparse
import importlib.metadata
import json
from collections.abc import Callable
from typing import Any

import pytest

from megatron_chameleon.cli import doctor


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
    assert "CPU demo: yes" in output
    for name in ("Python", "torch", "megatron-core", "psutil", "/dev/shm", "NCCL", "SLURM sbatch"):
        assert name in output


def test_json_has_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    output, code = examine(True, capsys)
    report = json.loads(output)
    assert code == 0
    assert report["cpu_ok"] is True
    assert {check["status"] for check in report["checks"]} <= {"ok", "warn", "missing"}
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
    monkeypatch.setattr(doctor, "_importable", lambda name: name in importable)
    check = doctor._apex()
    assert (check.status, check.found) == (status, found)


def test_the_verdict_for_the_7b_names_the_reason() -> None:
    def check(name: str, status: str = "ok", required: bool = False) -> doctor.Check:
        return doctor.Check(name, status, "", "", "", required)

    whole = [check("torch", required=True), check("GPU"), check("GPU memory"), check("NCCL")]
    assert doctor.missing_for_7b(whole) == []
    assert doctor.missing_for_7b([*whole[:2], check("GPU memory", "missing"), whole[3]]) == [
        "too little GPU memory"
    ]
    no_gpu = [whole[0], *(check(name, "missing") for name in ("GPU", "GPU memory", "NCCL"))]
    assert doctor.missing_for_7b(no_gpu) == ["no GPU"]
