"""The Dockerfiles and compose.yaml, as far as no Docker daemon is needed to check them."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_chameleon.cli.main import build_parser
from places import REPOSITORY

DOCKERFILES = [REPOSITORY / "Dockerfile", REPOSITORY / "docker" / "nvidia.Dockerfile"]
KEEP_INSTALLED = REPOSITORY / "docker" / "keep_installed.py"
SERVICE_KEYS = {
    *("image", "build", "command", "user", "environment", "ports", "volumes", "tmpfs", "deploy"),
    *("healthcheck", "cap_drop", "security_opt", "restart", "profiles", "shm_size"),
}
NO_UNSET = re.compile(r"\$\{(\w+)(:[-?][^}]*)?\}")


def instructions(path: Path) -> list[tuple[str, str]]:
    """Each instruction's name and its arguments, with continued lines joined."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [
        (name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined) if name
    ]


def reaches_the_builder(name: str) -> bool:
    """Whether .dockerignore lets a path through: the last pattern that fits it decides."""
    is_kept = True
    for pattern in (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").split("\n"):
        bare = pattern.lstrip("!")
        if pattern and pattern[0] != "#" and (bare == "*" or f"{name}/".startswith(f"{bare}/")):
            is_kept = pattern.startswith("!")
    return is_kept


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_a_dockerfile_copies_is_there_and_reaches_the_builder(path: Path) -> None:
    copied = [
        word
        for name, rest in instructions(path)
        if name == "COPY" and "--from" not in rest
        for word in rest.split()[:-1]
    ]
    assert {"setup.py", "megatron_chameleon", "examples"} <= set(copied)
    for name in copied:
        assert (REPOSITORY / name).exists(), name
        assert reaches_the_builder(name), name
    assert not reaches_the_builder("runs") and not reaches_the_builder(".git")
    # setup.py reads its description from the README, so all that it opens has to be copied
    assert {"README.md", "LICENSE", "pyproject.toml"} <= set(copied)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_container_runs_the_command_without_privileges(path: Path) -> None:
    found = instructions(path)
    names = {"FROM", "ARG", "COPY", "RUN", "WORKDIR", "ENV", "USER", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in found} <= names
    users = [rest for name, rest in found if name == "USER"]
    assert users == ["chameleon"]
    assert found[-2:] == [("ENTRYPOINT", '["chameleon"]'), ("CMD", '["--help"]')]
    for name, rest in found:
        if name == "RUN":
            result = subprocess.run(["sh", "-n", "-c", rest], capture_output=True, text=True)
            assert result.returncode == 0, result.stderr


def services() -> dict[str, Any]:
    loaded = yaml.safe_load((REPOSITORY / "compose.yaml").read_text(encoding="utf-8"))
    assert set(loaded) == {"x-page", "services"}
    found: dict[str, Any] = loaded["services"]
    return found


@pytest.mark.parametrize("name", ["page", "page-gpu"])
def test_a_service_serves_a_run(name: str) -> None:
    service = services()[name]
    assert set(service) <= SERVICE_KEYS
    words = [NO_UNSET.sub("digits", word) for word in service["command"]]
    args = build_parser("serve").parse_args(words)
    assert args.checkpoint == "runs/digits" and args.host == "0.0.0.0"
    (port,) = service["ports"]
    assert port.startswith("127.0.0.1:") and port.endswith(f":{args.port}")
    assert f":{args.port}/health" in service["healthcheck"]["test"][-1]
    compile(service["healthcheck"]["test"][-1], "healthcheck", "exec")
    assert service["volumes"][0].endswith(":/work/runs:ro")
    dockerfile = service["build"].get("dockerfile", "Dockerfile")
    assert (REPOSITORY / dockerfile) in DOCKERFILES


def test_each_variable_of_compose_has_a_default_or_is_asked_for() -> None:
    text = (REPOSITORY / "compose.yaml").read_text(encoding="utf-8")
    variables = {match[1]: match[2] for match in NO_UNSET.finditer(text)}
    assert len(variables) >= 7 and all(variables.values())
    page = (REPOSITORY / "docs" / "docker.md").read_text(encoding="utf-8")
    assert [name for name in variables if f"`{name}`" not in page] == []


def test_the_builds_of_an_image_are_pinned_and_compared(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(KEEP_INSTALLED), *words]
        return subprocess.run(command, capture_output=True, text=True)

    pinned = run().stdout.split()
    names = {line.split("==")[0] for line in pinned}
    assert {"torch", "numpy"} <= names and not names & {"transformers", "pillow", "torchmetrics"}
    kept = tmp_path / "kept.txt"
    kept.write_text("\n".join(pinned))
    assert run("--compare", str(kept)).returncode == 0
    kept.write_text("\n".join([*pinned, "torch==2.99.0a0+nv26.8"]))
    result = run("--compare", str(kept))
    assert result.returncode == 1
    assert result.stderr == "error: torch==2.99.0a0+nv26.8 of the image was replaced or removed.\n"


@pytest.mark.parametrize(
    ("name", "is_kept"),
    [
        *((name, True) for name in ("torch", "torchvision", "pytorch-triton", "torch_tensorrt")),
        *((name, True) for name in ("transformer_engine_torch", "flash-attn", "nvidia-cudnn-cu13")),
        *((name, False) for name in ("transformers", "torchmetrics", "tritonclient", "numpydoc")),
    ],
)
def test_the_names_that_are_pinned(name: str, is_kept: bool) -> None:
    spec = importlib.util.spec_from_file_location("keep_installed", KEEP_INSTALLED)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert bool(module.KEPT.fullmatch(name)) == is_kept
