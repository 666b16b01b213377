"""Users' mistakes give one clear line, exit code 2, and no run folder or file that looks whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_chameleon.cli.main import main


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command in this process and returns the one line that it prints as an error."""

    def run(*words: object) -> str:
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        assert caught.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, lines
        return lines[0]

    return run


@pytest.fixture
def copy(tiny, tmp_path: Path) -> Path:
    """The tiny project's token files, to be damaged."""
    for suffix in (".bin", ".idx", ".documents", ".images", ".json"):
        shutil.copy(f"{tiny.tokens}{suffix}", tmp_path / f"tokens{suffix}")
    config = tiny.config.read_text().replace(str(tiny.tokens), str(tmp_path / "tokens"))
    config = config.replace("every_steps: 5", f"every_steps: 5, run_dir: {tmp_path / 'run'}")
    (tmp_path / "train.yaml").write_text(config)
    return tmp_path


@pytest.fixture
def documents(tiny, tmp_path: Path) -> Path:
    """The tiny project's documents with their images, to be damaged."""
    for image in tiny.folder.glob("*.png"):
        shutil.copy(image, tmp_path)
    return Path(shutil.copy(tiny.documents, tmp_path))


def damage(path: Path, edit: Callable[[bytes], bytes]) -> None:
    path.write_bytes(edit(path.read_bytes()))


def set_dtype(index: bytes) -> bytes:
    """Write int32 (4) where the files have uint16 (8): the byte after the magic and the version."""
    assert index[17] == 8
    return index[:17] + b"\x04" + index[18:]


@pytest.mark.parametrize(
    ("suffix", "edit", "message"),
    [
        (".bin", lambda content: content[:-10], "bytes"),
        (".bin", lambda content: b"", "bytes"),
        (".idx", lambda content: content[:-10], "tokens.idx"),
        (".idx", lambda content: b"not an index", "tokens.idx"),
        (".idx", set_dtype, "int32"),
        (".json", lambda content: b"{", "tokens.json"),
    ],
)
def test_damaged_token_files(copy: Path, refused, suffix: str, edit, message: str) -> None:
    damage(copy / f"tokens{suffix}", edit)
    # The second source is the same file and fails in the same way, so one line is enough.
    line = refused("train", copy / "train.yaml", "data.stage2=[]")
    assert message in line
    assert not (copy / "run").exists()


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_missing_token_files(copy: Path, refused, suffix: str) -> None:
    (copy / f"tokens{suffix}").unlink()
    line = refused("train", copy / "train.yaml", "data.stage2=[]")
    assert suffix in line
    assert "missing" in line


def test_token_files_of_another_tokenizer(copy: Path, refused) -> None:
    sidecar = json.loads((copy / "tokens.json").read_text())
    sidecar["tokenizer_fingerprint"] = "0" * 64
    (copy / "tokens.json").write_text(json.dumps(sidecar))
    line = refused("train", copy / "train.yaml", "data.stage2=[]")
    assert "tokenizer" in line
    assert not (copy / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.hiden_size=3"],
            "model.hiden_size=3: Unknown key. Did you mean `model.hidden_size`?",
        ),
        (["training.global_batch_size=7"], "7 is not divisible by micro_batch_size 2 x data"),
        (["tokenizer.path=/none"], "no such folder"),
        (["--resume", "/none"], "/none: no such folder. Give a folder such as runs/"),
        (["parallel.tensor_model_parallel_size=2"], "1 process cannot be laid out as tensor 2"),
    ],
)
def test_configs(copy: Path, refused, words: list[str], message: str) -> None:
    assert message in refused("train", copy / "train.yaml", *words)
    assert not (copy / "run").exists()


def test_a_resumed_run_without_a_tokenizer_is_told_of_the_checkpoints(copy: Path, refused) -> None:
    step = copy / "old" / "step_00000001"
    step.mkdir(parents=True)
    (step / "config.yaml").write_text("tokenizer: {path: data/mine}\n")
    (step / "state.json").write_text('{"step": 1}')
    words = ("--resume", step, "tokenizer.path=''")
    assert refused("train", copy / "train.yaml", *words) == (
        "error: tokenizer.path: not set, and --resume does not take it from the checkpoint. Set it "
        f"to the checkpoint's, data/mine, or begin at step 0 with --start-from {step}, which "
        "inherits it."
    )


def test_more_processes_than_the_layout_wants_say_so_once(tiny, chameleon, copy: Path) -> None:
    overrides = ["parallel.tensor_model_parallel_size=2", "training.global_batch_size=8"]
    result = chameleon(
        "train", copy / "train.yaml", *overrides, processes=3, succeeds=False, launched=True
    )
    assert result.stderr.count("error: parallel: 3 processes cannot be laid out as tensor 2") == 1
    assert "exitcode  : 2" in result.stderr  # torchrun's own report of its workers
    assert not (copy / "run").exists()


def test_dry_run_says_what_would_happen_and_writes_nothing(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    main(["train", str(copy / "train.yaml"), "--dry-run", *layout])
    text = capsys.readouterr().out
    assert "hidden_size: 32" in text
    assert "parameters; 512 tokens per step; 20 steps, 4 of them in stage 2" in text
    assert text.splitlines()[-2:] == [
        "Dry run passed: config, tokenizer, data and checkpoint are ready.",
        "Its next step was not tried: the layout needs 2 processes, and this is one; the same "
        "command under torchrun or srun tries it.",
    ]
    assert not (copy / "run").exists()


def test_what_the_paper_warns_of_is_said_before_training(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["model.norm_order=swin", "model.hidden_dropout=0.1"]
    main(["train", str(copy / "train.yaml"), "--dry-run", "--no-step", *overrides])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: model.hidden_dropout is 0.1 with model.norm_order swin")


@pytest.mark.parametrize("line", ["{broken", '{"id": "x", "content": [{"type": "sound"}]}'])
def test_broken_documents_are_listed_and_stop_the_run_on_demand(
    tiny, documents: Path, tmp_path: Path, refused, line: str
) -> None:
    documents.write_text(documents.read_text() + line + "\n")
    output = tmp_path / "tokens"
    words = ("preprocess", documents, "--tokenizer", tiny.tokenizer, "--output", output)
    assert f"1 broken document; {output}.partial/" in refused(*words, "--max-bad", 0.01)
    assert not (tmp_path / "tokens.json").exists()
    main([str(word) for word in words])
    (listed,) = (tmp_path / "tokens.dropped.jsonl").read_text().splitlines()
    assert json.loads(listed)["where"] == f"{documents}:61"
    assert json.loads((tmp_path / "tokens.json").read_text())["documents"] == 60


def test_corrupt_and_empty_images_drop_their_documents(
    tiny, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "3.png").write_bytes(b"")
    damage(tmp_path / "7.png", lambda content: content[:40])
    (tmp_path / "9.png").unlink()
    output = tmp_path / "tokens"
    words = ["preprocess", documents, "--tokenizer", tiny.tokenizer]
    main([str(word) for word in (*words, "--output", output)])
    assert json.loads((tmp_path / "tokens.json").read_text())["documents"] == 57
    report = (tmp_path / "tokens.dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in report] == ["3", "7", "9"]
    assert "3 dropped" in "".join(capsys.readouterr())


def test_a_loss_that_is_not_finite_stops_the_run(tiny) -> None:
    overrides = ["optimizer.lr=1e6", "optimizer.lr_warmup_steps=0", "checkpoint.every_steps=1"]
    result = tiny.train("diverged", *overrides, succeeds=False)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "Resume from the last checkpoint with a lower optimizer.lr" in line
    # The failed step leaves neither a checkpoint nor a line of metrics.
    steps = len(tiny.metrics("diverged"))
    assert line.startswith(f"error: step {steps + 1}: ")
    saved = [path.name for path in (tiny.folder / "diverged" / "checkpoints").iterdir()]
    assert max(saved, default="step_00000000") == f"step_{steps:08d}"


def test_a_run_folder_that_is_a_file(tiny, tmp_path: Path, refused) -> None:
    (tmp_path / "run").touch()
    line = refused("train", tiny.config, f"logging.run_dir={tmp_path / 'run'}")
    assert line.endswith("/run is a file. Choose another folder.")
