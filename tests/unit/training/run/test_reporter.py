"""What a run reports after each step: speed, files, alarm, trackers."""

import errno
import io
import json
import logging
import os
import re
import struct
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_chameleon.cli.logs import shown_logs
from megatron_chameleon.config.checks.check import check_config
from megatron_chameleon.config.load import load_config
from megatron_chameleon.config.schema import (
    Config,
    SamplePromptConfig,
    SourceConfig,
    TokenizerConfig,
)
from megatron_chameleon.errors import ConfigError, ConfigErrors, TrainingError
from megatron_chameleon.parallel import platform
from megatron_chameleon.planner.flops import training_flops_per_token
from megatron_chameleon.training.metrics.profiler import StepProfiler
from megatron_chameleon.training.metrics.stragglers import StepClock
from megatron_chameleon.training.records.events import EventLog
from megatron_chameleon.training.run import trackers
from megatron_chameleon.training.run.console import BarConsole, LineConsole, open_console
from megatron_chameleon.training.run.reporter import Reporter, SpeedMeter
from megatron_chameleon.training.run.trackers import flat_numbers
from megatron_chameleon.training.samples.sampler import check_samples

MAIN_RANK: Any = SimpleNamespace(rank=0, world_size=1)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config(tokenizer=TokenizerConfig("later"))
    config.data.stage1 = [SourceConfig("later")]
    config.logging.run_dir = str(tmp_path / "run")
    return config


def metrics_of(step: int, norm: float = 1.0, loss: float = 2.0) -> dict[str, Any]:
    values = dict.fromkeys(("loss_text", "loss_image", "grad_norm", "learning_rate"), 1.0)
    return {**values, "step": step, "loss": loss, "output_norm": norm, "step_seconds": 0.5}


def report(config: Config, first: int, last: int, growth: float = 1.0) -> None:
    reporter = Reporter(config, 512, MAIN_RANK, first, EventLog(config, 0))
    for step in range(first + 1, last + 1):
        reporter.begin_step(step)
        metrics = reporter.complete(metrics_of(step, norm=growth**step), StepClock())
        reporter.end_step(step, metrics)
    reporter.close()


def read(config: Config, name: str) -> list[dict[str, Any]]:
    lines = (Path(config.logging.run_dir) / name).read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("device", "fp8", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", None, 989.4e12),
        ("NVIDIA H200", "hybrid", 1978.9e12),
        ("NVIDIA A100-SXM4-80GB", None, 312e12),
        ("NVIDIA RTX 6000", None, None),
        (None, None, None),
    ],
)
def test_mfu_and_tflops(
    config: Config, monkeypatch: Any, device: str | None, fp8: str | None, peak: float | None
) -> None:
    monkeypatch.setattr(platform, "device_name", lambda: device)
    config.training.dtype, config.fp8.format = "bf16", fp8
    config.training.global_batch_size = 8
    found = SpeedMeter(config, 512, world_size=4).metrics(seconds=0.5)
    tokens = 8 * config.model.seq_length
    rate = training_flops_per_token(config.model, 512) * tokens / 0.5 / 4
    assert found["tokens_per_second"] == 2 * tokens
    assert found["tflops"] == (pytest.approx(rate / 1e12) if device else None)
    assert found["mfu"] == (pytest.approx(rate / peak) if peak else None)
    half = SpeedMeter(config, 512, world_size=4).metrics(0.5, batch_size=4)  # a batch that grows
    assert half == {key: value if value is None else value / 2 for key, value in found.items()}


def test_the_documented_keys_come_first_and_others_follow(config: Config) -> None:
    reporter = Reporter(config, 512, MAIN_RANK, 0, EventLog(config, 0))
    more = {"layer_output_norms": [1.23456789, float("inf"), None], "grad_norm_mlp": float("nan")}
    reporter.end_step(1, reporter.complete({**metrics_of(1), **more}, StepClock()))
    reporter.close()
    (record,) = read(config, "metrics.jsonl")
    assert list(record)[:2] == ["step", "loss"] and record["mfu"] is None
    assert record["layer_output_norms"] == [1.23457, None, None]
    assert record["grad_norm_mlp"] is None


def test_an_alarm_is_shown_and_kept(config: Config, capsys: Any) -> None:
    config.model.qk_norm_groups = 0
    with shown_logs():
        report(config, 0, 200, growth=1.02)
    alarms = read(config, "alarms.jsonl")
    assert alarms and alarms[0]["step"] < 200
    events = read(config, "events.jsonl")
    assert [event["step"] for event in events] == [alarm["step"] for alarm in alarms]
    assert {event["event"] for event in events} == {"alarm"}
    (line, *_) = [ln for ln in capsys.readouterr().out.splitlines() if ln.startswith("warning: ")]
    assert line.startswith(f"warning: step {alarms[0]['step']}: the last layer's output norm grew")
    assert "model.qk_norm_groups is 0 (no QK-norm) and model.hidden_dropout is 0" in line
    assert line == f"warning: {events[0]['text']}"


def test_a_resumed_run_knows_what_was_before(config: Config) -> None:
    report(config, 0, 90, growth=1.02)
    assert read(config, "alarms.jsonl") == []
    report(config, 80, 200, growth=1.02)
    resumed = read(config, "alarms.jsonl")
    assert resumed
    report(config, 200, 210, growth=1.0)  # past alarms are found again and stay in the file
    assert read(config, "alarms.jsonl") == resumed


def test_tensorboard_has_every_number(config: Config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config.logging.tensorboard = True
    report(config, 0, 3)
    events = EventAccumulator(str(Path(config.logging.run_dir) / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert "tokens_per_second" in events.Tags()["scalars"]


def test_lists_become_numbered_names() -> None:
    metrics = {"step": 3, "loss": 1.5, "layer_output_norms": [1.0, None, 2.0], "mfu": None}
    expected = {"loss": 1.5, "layer_output_norms/0": 1.0, "layer_output_norms/2": 2.0}
    assert dict(flat_numbers(metrics)) == expected


@pytest.mark.parametrize(
    ("key", "value", "package"),
    [("tensorboard", True, "tensorboard"), ("wandb_project", "digits", "wandb")],
)
def test_a_missing_package(
    config: Config, monkeypatch: Any, key: str, value: Any, package: str
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    trackers.check_trackers(config)
    setattr(config.logging, key, value)
    with pytest.raises(ConfigError) as caught:
        trackers.check_trackers(config)
    assert str(caught.value) == (
        f"logging.{key}: it needs the package {package}, which is not installed. Run pip install "
        f"-c constraints.txt 'megatron_chameleon[{package}]'."
    )


@pytest.mark.parametrize(("key", "online"), [("WANDB_API_KEY", True), ("NETRC", False)])
def test_wandb_is_online_only_with_a_key(
    monkeypatch: Any, tmp_path: Path, key: str, online: bool
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(key, "k")
    assert trackers._has_key() is online
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password k\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert trackers._has_key() is True


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def use_console(file: io.StringIO) -> None:
    console = open_console(4, 10, file)
    console.say("starts [at] 4")
    console.step(5, "5/10", None)
    console.warn("slow")
    console.step(6, "6/10", "step 6")
    console.close()


def test_lines_in_a_log(capsys: Any) -> None:
    assert isinstance(open_console(0, 10, io.StringIO()), LineConsole)
    with shown_logs():
        use_console(io.StringIO())
    assert capsys.readouterr() == ("starts [at] 4\nwarning: slow\nstep 6\n", "")


def test_quiet_shows_warnings_only(capsys: Any) -> None:
    terminal = Terminal()
    with shown_logs(logging.WARNING):
        use_console(terminal)
    assert capsys.readouterr() == ("", "warning: slow\n")
    assert terminal.getvalue() == ""


def test_a_bar_on_a_terminal() -> None:
    terminal = Terminal()
    with shown_logs():
        assert isinstance(open_console(0, 10, Terminal()), BarConsole)
        use_console(terminal)
    shown = terminal.getvalue()
    assert "starts [at] 4\n" in shown and "step 6\n" in shown
    assert "warning: slow\n" in shown
    assert "5/10" in shown and "━" in shown
    assert "\x1b[?25h" in shown  # the cursor is back


def test_the_trace_covers_its_steps(config: Config) -> None:
    config.training.profile_steps = [2, 3]
    profiler = StepProfiler(config, rank=0)
    traces = []
    for step in range(1, 5):
        profiler.begin(step)
        traces.append(profiler.end(step))
    path = traces[2]
    assert traces[:2] == [None, None] and traces[3] is None and path is not None
    assert path.name == "rank00000_steps_2-3.json"
    assert json.loads(path.read_text())["traceEvents"]
    other = StepProfiler(config, rank=1)
    other.begin(2)
    assert other.end(3) is None
    config.training.profile_all_ranks = True
    other = StepProfiler(config, rank=1)
    other.begin(2)
    assert other.end(3) is not None


SAMPLES = {"logging.sample_every_steps": 5}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training.profile_steps": [5]}, "training.profile_steps: [5] is not a first and last"),
        ({"training.profile_steps": [5, 101]}, "is not a first and last step between 1 and"),
        ({"training.profile_steps": [3, 2]}, "Write, for example, [10, 12], or [] for no trace."),
        (SAMPLES, "logging.sample_every_steps: 5, but logging.sample_prompts is empty. List"),
        (
            {**SAMPLES, "parallel.pipeline_model_parallel_size": 2},
            "5 needs the whole model in one stage, but pipeline_model_parallel_size is 2. Set it",
        ),
        (
            {**SAMPLES, "engine.name": "deepspeed", "engine.zero_stage": 3},
            "5 needs whole weights, but ZeRO 3 splits them. Set it to 0",
        ),
        ({"logging.sample_max_tokens": 0}, "logging.sample_max_tokens: 0 is not between 1 and"),
        ({"logging.sample_every_steps": -1}, "logging.sample_every_steps: -1 is not between 0"),
    ],
)
def test_what_cannot_be_reported(config: Config, values: dict[str, Any], message: str) -> None:
    for key, value in values.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    with pytest.raises(ConfigErrors) as caught:
        check_config(config, config.parallel.pipeline_model_parallel_size)
    assert message in str(caught.value)


def test_a_force_that_does_not_exist(config: Config) -> None:
    config.logging.sample_every_steps = 1
    config.logging.sample_prompts = [
        SamplePromptConfig("a"),
        SamplePromptConfig("b", force="picture"),
    ]
    with pytest.raises(ConfigErrors, match=r"sample_prompts\[1\]\.force: 'picture' is not one of"):
        check_config(config, 1)


def test_prompts_are_read_and_their_images_are_checked(
    tmp_path: Path, tiny_tokenizer: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"tokenizer: {{path: {tiny_tokenizer}}}\n"
        "logging: {sample_every_steps: 5, sample_prompts: [{text: a cat, force: image}]}\n"
    )
    config = load_config(path)
    assert config.logging.sample_prompts == [SamplePromptConfig("a cat", None, "image")]
    check_samples(config)
    config.logging.sample_prompts[0].image = "nowhere.png"
    with pytest.raises(ConfigError) as caught:
        check_samples(config)
    assert str(caught.value).startswith(
        "logging.sample_prompts[0].image: no such image file: nowhere.png. Give"
    )


def test_wandb_that_cannot_start(config: Config, monkeypatch: Any) -> None:
    monkeypatch.setenv("WANDB_MODE", "sideways")
    config.logging.wandb_project = "digits"
    with pytest.raises(ConfigError, match=r"logging\.wandb_project: wandb cannot start \("):
        Reporter(config, 512, MAIN_RANK, 0, EventLog(config, 0))


def steps_for_sync(run: Path) -> list[int]:
    """The steps in the run that ``wandb sync`` would send.

    The file has LevelDB's log format behind 7 bytes of its own: in blocks of 32 KiB, pieces of
    records with a checksum (4 bytes), a length (2) and a kind (1: whole, 2: first, 4: last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (run / "wandb" / "latest-run").glob("*.wandb")
    content, place, record, steps = file.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if place % 32768 > 32768 - 7:
            place += 32768 - place % 32768
        length, kind = struct.unpack_from("<HB", content, place + 4)
        if place + 7 + length > len(content):
            break  # it is still being written
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            parsed, record = Record.FromString(record), b""
            if parsed.WhichOneof("record_type") == "history":
                steps.append(parsed.history.step.num)
    return steps


def test_wandb_offline_has_the_whole_run_after_a_restart(
    config: Config, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = Path(config.logging.run_dir)
    report(config, 0, 3)
    (run / "wandb_id.txt").write_text("\0")  # cut by a full disk
    config.logging.wandb_project = "digits"
    with shown_logs():
        report(config, 2, 4)
    # wandb's own process may still be writing the file when the run has been finished
    deadline = time.monotonic() + 30
    while steps_for_sync(run) != [1, 2, 3, 4] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert steps_for_sync(run) == [1, 2, 3, 4]
    assert re.fullmatch("[0-9a-f]{12}\n", (run / "wandb_id.txt").read_text())
    assert f"offline: `wandb sync {run}/wandb/latest-run` sends the" in capsys.readouterr().out


def test_tensorboard_hides_steps_that_are_done_again(config: Config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config.logging.tensorboard = True
    report(config, 0, 4, growth=1.5)
    report(config, 2, 3, growth=2.0)
    events = EventAccumulator(str(Path(config.logging.run_dir) / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("output_norm")]
    assert found == [(1, 1.5), (2, 2.25), (3, 8.0)]


def test_a_tracker_on_a_full_disk(config: Config, monkeypatch: Any) -> None:
    config.logging.tensorboard = True
    reporter = Reporter(config, 512, MAIN_RANK, 0, EventLog(config, 0))

    def refuse(descriptor: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", refuse)
    reporter.end_step(1, reporter.complete(metrics_of(1), StepClock()))
    assert "metrics.jsonl: cannot be written (No space left" in str(reporter.failure)
    with pytest.raises(TrainingError, match=r"tfevents\S+: cannot be written \(No space left"):
        reporter._trackers[0].record(1, {"loss": 1.0})
    reporter.close()


def test_a_trace_that_does_not_fit(config: Config, monkeypatch: Any) -> None:
    config.training.profile_steps = [2, 2]
    profiler = StepProfiler(config, rank=0)
    profiler.begin(2)
    monkeypatch.setattr(
        profiler._profile, "export_chrome_trace", lambda path: Path(path).write_text('{"trace')
    )
    with pytest.raises(TrainingError, match=r"steps_2-2\.json: cannot be written \(No space left"):
        profiler.end(2)
    assert list((Path(config.logging.run_dir) / "profile").iterdir()) == []
