"""The files that ``chameleon init`` writes: they parse, quote, and say what is true."""

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from megatron_chameleon.cli.main import main
from megatron_chameleon.config.checks.check import check_config
from megatron_chameleon.config.explanations import explanations
from megatron_chameleon.config.load import load_config
from megatron_chameleon.config.schema import CheckpointConfig, ModelConfig
from megatron_chameleon.starter import project as projects
from megatron_chameleon.starter.looking.look import Looking
from megatron_chameleon.starter.measure import Machine, Speeds
from megatron_chameleon.starter.project import Project, Wanted, plan_project, write_project
from megatron_chameleon.starter.settings import RunLength
from megatron_chameleon.starter.summary import summary
from megatron_chameleon.tokenizer.image.config import load_image_config

HARD = 'it\'s "a" $HOME `b` & (c)'


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is not measured: two cores, no GPU."""
    machine = Machine(cores=2, memory_bytes=8 << 30, gpu=None, gpu_bytes=None, start_seconds=5.0)
    monkeypatch.setattr(projects, "find_machine", lambda: machine)
    monkeypatch.setattr(projects, "measure", lambda *_: Speeds(0.1, 0.1, 0.001))


def pictures(folder: Path, count: int = 12) -> Path:
    folder.mkdir(parents=True)
    for n in range(count):
        Image.new("RGB", (28, 28), (n * 9, 255 - n, n)).save(folder / f"cat {n}.png")
    return folder


def made(data: list[Path], output: Path, size: str | None = None) -> Project:
    project = plan_project(Wanted([str(path) for path in data], output, size, Looking()))
    write_project(project)
    return project


@pytest.mark.parametrize("size", ["tiny", "small", "7b", "34b"])
def test_the_configs_are_valid(size: str, tmp_path: Path) -> None:
    made([pictures(tmp_path / HARD)], tmp_path / "out", size)
    config = load_config(tmp_path / "out/train.yaml")
    world_size = {"7b": 64, "34b": 512}.get(size, 1)
    check_config(config, world_size)
    assert config.parallel.use_distributed_optimizer == (world_size > 1)
    assert config.checkpoint.keep_best and config.data.validation.sources
    image = load_image_config(tmp_path / "out/image.yaml")
    script = (tmp_path / "out/run.sh").read_text()
    assert f"--image-codes {image.model.codebook_size}" in script


def test_the_seed_is_that_of_all_trainings(tmp_path: Path) -> None:
    data = [str(pictures(tmp_path / "data"))]
    write_project(plan_project(Wanted(data, tmp_path / "out", seed=7)))
    assert load_config(tmp_path / "out/train.yaml").training.seed == 7
    assert " --seed 7 " in (tmp_path / "out/run.sh").read_text()


def test_the_script_is_quoted_and_parses(tmp_path: Path) -> None:
    made([pictures(tmp_path / HARD)], tmp_path / f"{HARD} out")
    script = tmp_path / f"{HARD} out/run.sh"
    subprocess.run(["bash", "-n", script], check=True)
    ended = subprocess.run(["bash", script, "no such"], capture_output=True, text=True)
    assert ended.returncode == 2 and "no step is called no such" in ended.stderr
    shown = subprocess.run(
        ["bash", "-c", f'chameleon() {{ printf "%s\\n" "$@"; }}; {_line(script, "collect")}'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path / HARD) in shown.stdout.splitlines()


def test_a_step_is_skipped_by_the_file_that_it_writes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a step that was killed between two files would count as finished."""
    data = pictures(tmp_path / "in", 3)
    (data / "story.txt").write_text("Once upon a time there was a cat. " * 50)
    made([data], tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    lines = [line.strip() for line in Path("run.sh").read_text().splitlines()]
    written: list[str] = []
    replace = Path.replace

    def noted(path: Path, target: Path) -> Path:
        written.append(str(target))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", noted)
    for step in ("data collect", "tokenizer text"):
        written.clear()
        number = next(n for n, line in enumerate(lines) if line.startswith(f"chameleon {step}"))
        main(shlex.split(lines[number])[1:])
        assert len(written) == 2 and f"[ -e {written[-1]} ]" in lines[number - 1]


def _line(script: Path, word: str) -> str:
    return next(line for line in script.read_text().splitlines() if f" {word} " in line)


def test_texts_alone_train_no_image_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for n in range(30):
        (tmp_path / f"in/{n}.txt").write_text(f"The story of number {n} begins. " * 20)
    project = made([tmp_path / "in"], tmp_path / "out")
    script = (tmp_path / "out/run.sh").read_text()
    assert "tokenizer image" not in script and "--image-codes 1\n" in script
    assert "--to megatron" in script
    assert not (tmp_path / "out/image.yaml").exists()
    assert "no image tokenizer" in summary(project, [])


def test_the_summary_says_what_was_sampled(tmp_path: Path) -> None:
    project = made([pictures(tmp_path / "in")], tmp_path / "out")
    assert "estimated" not in summary(project, [])
    (source,) = project.looked.sources
    source.is_complete, source.scale = False, 10.0
    text = summary(project, [])
    assert "about 120 documents" in text and "estimated from 12 documents" in text


def test_a_slow_machine_gets_fewer_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pictures(tmp_path / "in", 60)
    fast = plan_project(Wanted([str(data)], tmp_path / "out"))
    monkeypatch.setattr(projects, "measure", lambda *_: Speeds(4.0, 4.0, 0.1))
    slow = plan_project(Wanted([str(data)], tmp_path / "out"))
    assert slow.length.steps < fast.length.steps
    assert slow.image_steps < fast.image_steps


def test_few_documents_are_not_read_hundreds_of_times(tmp_path: Path) -> None:
    def length(size: str, letters: int) -> RunLength:
        folder = tmp_path / str(letters)
        folder.mkdir(exist_ok=True)
        (folder / "story.txt").write_text(("a cat " * letters)[:letters])
        return plan_project(Wanted([str(folder)], tmp_path / "out", size)).length

    few, some, more = (length("small", letters) for letters in (300, 200_000, 2_000_000))
    assert few.steps == 20  # as many as there are measurements
    assert 20 < some.steps < more.steps == 500
    assert some.epochs == pytest.approx(50, rel=0.05)
    assert length("7b", 300).steps == 20


def test_meanings_come_from_the_schema() -> None:
    assert explanations(ModelConfig)["norm_order"].startswith("pre:")
    assert "every_steps" in explanations(CheckpointConfig)
    assert replace(CheckpointConfig(), every_steps=3).every_steps == 3


def run_init(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    try:
        main(["init", *map(str, words)])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_an_output_that_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = pictures(tmp_path / "in"), tmp_path / "in/out"
    assert run_init(data, "--output", output, capsys=capsys)[0] == 0
    assert run_init(data, "--output", output, capsys=capsys)[0] == 0  # nothing has begun
    (output / "tokenizer").mkdir()
    code, text = run_init(data, "--output", output, capsys=capsys)
    assert code == 2 and "holds a project that has begun (tokenizer)" in text
    code, text = run_init(data, "--output", data, capsys=capsys)
    assert code == 2 and "is a folder with other files" in text
    code, text = run_init(data, "--output", data / "cat 1.png", capsys=capsys)
    assert code == 2 and "Not a directory" in text
