"""Reports of whole runs and of odd ones."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_chameleon.reports.curves import stage2_step
from megatron_chameleon.reports.findings import held_out
from megatron_chameleon.reports.mixture import planned_sources
from megatron_chameleon.reports.report import report_page
from megatron_chameleon.reports.samples import SIDE
from megatron_chameleon.runs.metrics import metrics_of
from megatron_chameleon.runs.records import flatten, read_recorded_config
from page_origin import ORIGIN
from synthetic_run import write_run

HOSTILE = "</style></title><script>alert(1)</script><img src=x onerror='a()'>\"&\u202e\x1b[2J"


def plain(page: str) -> str:
    """The text of a page."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.partition("<body>")[2]))


def test_an_overfitting_run_says_so_at_its_top(tmp_path: Path) -> None:
    _, page = report_page(write_run(tmp_path / "run", turn=160), ORIGIN)
    text = plain(page)
    top = text[: text.index("Losses")]
    assert "Held-out loss is lowest at step 160 (1." in top
    assert re.search(
        r"and has risen since, to 1\.\d{4} at step 400, while training loss fell: since",
        top,
    )
    assert "1 divergence alarm, the last at step 300." in top
    assert "The run was restarted once." in top and "No held-out" not in top
    assert top.count("is lowest at step") == 1  # the modalities turned at the same step
    assert page.count('class="mark lowest"') >= 3 and 'class="mark stage"' in page
    assert all(f'class="mark {kind}"' in page for kind in ("restart", "alarm", "checkpoint"))


def test_a_run_that_still_learns_does_not(tmp_path: Path) -> None:
    text = plain(report_page(write_run(tmp_path / "run", turn=400), ORIGIN)[1])
    assert "risen" not in text[: text.index("Losses")]
    assert "at step 400, the lowest so far." in text


@pytest.mark.parametrize(
    ("values", "has_risen"),
    [
        ([3, 2, 1, 1.5, 2], True),
        ([3, 2, 1, 1.5], False),  # one measurement may be a wobble
        ([3, 2, 1, 1.001, 1.002], False),  # less than a hundredth
        ([1, 1, 1, 1], False),
        ([1, None, float("nan"), 2, 3], True),
        ([0, 1, 2], True),
        ([2], False),
    ],
)
def test_a_rise_is_large_and_lasts(values: list, has_risen: bool) -> None:
    records = ({"step": i, "validation/loss": value} for i, value in enumerate(values))
    found = held_out(metrics_of(records))
    assert found is not None and found.has_risen == has_risen
    assert held_out(metrics_of([{"step": 1}])) is None


def test_all_of_a_run_is_on_its_page(tmp_path: Path) -> None:
    run, page = report_page(write_run(tmp_path / "run"), ORIGIN)
    text = plain(page)
    assert run.problems == [] and len(page) < 700_000
    assert "a" * 40 in text and "changes that were not committed" in text
    assert "model.num_layers 2 4" in text and "data.stage1[0].weight 3.0 1.0" in text
    assert "started 2 times" in text and "2026-01-02 04:04:05 restart" in text
    assert "output norm from 10 at step 100 to 50" in text
    assert "nowhere/pairs 75.00% 37.50% – – –" in text.replace("  ", " ")
    assert "there is no token file nowhere/pairs and 2 more here" in text
    assert "prose 1.1" in text  # the lowest held-out loss of a source
    assert text.index("step 100 at 100") < text.index("step 200 at 200") < text.index("at 400 ")
    pictures = re.findall(r"data:image/(?:png|jpeg);base64,([^\"]+)", page)
    sizes = [Image.open(io.BytesIO(base64.b64decode(data))).size for data in pictures]
    assert sizes == [(SIDE, SIDE // 2)] * 3


def test_planned_shares_are_those_of_the_mixture(tmp_path: Path) -> None:
    from megatron_chameleon.data.mixture.phases import MixtureWeights, SourceWeight

    run = write_run(tmp_path / "run", steps=1)
    first = (SourceWeight("nowhere/pairs", 3.0), SourceWeight("prose", 1.0))
    weights = MixtureWeights(first, (SourceWeight("nowhere/quality", 1.0),), 0.5, 1, 0.002)
    found = planned_sources(read_recorded_config(run).values)
    for stage in (1, 2):
        shares = {s.name: s.shares[stage - 1] for s in found if s.shares[stage - 1] is not None}
        expected = {key: share for key, (share, _) in weights.of_stage(stage).items()}
        assert shares == pytest.approx(expected)


def test_stage_2_begins_where_the_checkpoint_says_else_where_the_config_does(
    tmp_path: Path,
) -> None:
    folder = write_run(tmp_path / "run")
    run, _ = report_page(folder, ORIGIN)
    assert stage2_step(run) == 301
    state = {"format": "megatron_chameleon.checkpoint/1", "step": 200, "vocab_size": 9}
    order = {"entries": [{"weights": {"stage1_samples": 800}}]}
    (folder / "checkpoints/step_00000200/state.json").write_text(
        json.dumps({**state, "data": order})
    )
    assert stage2_step(report_page(folder, ORIGIN)[0]) == 101  # 8 samples a step
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("  - {prefix: nowhere/quality}", "  []"))
    assert stage2_step(report_page(folder, ORIGIN)[0]) is None


def odd_runs() -> dict[str, str]:
    """Contents of ``metrics.jsonl`` that a report must survive."""
    keys = ("loss", "loss_text", "grad_norm", "validation/loss", "consumed_tokens", "mfu")
    one = json.dumps({"step": 1, **dict.fromkeys(keys, 1.0)})
    return {
        "no steps": "",
        "one step": one + "\n",
        "cut": one[:20],
        "nothing but null": json.dumps({"step": 1, **dict.fromkeys(keys)}) + "\n",
        "NaN": "\n".join(f'{{"step": {i}, "loss": NaN, "validation/loss": NaN}}' for i in range(9)),
        "infinity": '{"step": 1, "loss": Infinity}\n{"step": 2, "loss": -1e999}\n',
        "zeros": "\n".join(json.dumps({"step": i, **dict.fromkeys(keys, 0)}) for i in range(99)),
        "huge": '{"step": 1, "loss": 1e30}\n{"step": 999999999999999, "loss": -1e30}\n',
        "negative": "\n".join(json.dumps({"step": i, "loss": -i, "mfu": -1}) for i in range(99)),
        "hostile": json.dumps({"step": 1, f"validation/{HOSTILE}/loss": 1, HOSTILE: HOSTILE})
        + "\n",
        "many sources": json.dumps({"step": 1, **{f"validation/{i}/loss": i for i in range(3000)}}),
        "binary": "\0\1\2\xff" * 1000,
    }


@pytest.mark.parametrize("kind", odd_runs())
def test_an_odd_run_has_a_page(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / f"ü {HOSTILE.replace('/', '_')}"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(odd_runs()[kind])
    page = report_page(folder, ORIGIN)[1]
    assert "<script" not in page and "onerror='" not in page and "\u202e" not in page
    assert not re.search(r"\b(nan|inf)\b", page.partition("<body>")[2], re.IGNORECASE)
    assert len(page) < 300_000


def test_hostile_files_become_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=30)
    event = dict.fromkeys(("time", "event", "host", "text"), HOSTILE)
    lines = [json.dumps({**event, "step": i}) for i in range(12_000)]
    (folder / "events.jsonl").write_text("\n".join(lines))
    alarm = {"step": 5, "loss": HOSTILE, "output_norm": 10**400, "since_step": -(10**30)}
    (folder / "alarms.jsonl").write_text((json.dumps(alarm) + "\n") * 2000)
    (folder / "environment.json").write_text(json.dumps({HOSTILE: [HOSTILE, {HOSTILE: None}]}))
    (folder / "config.yaml").write_text(json.dumps({"a": HOSTILE, HOSTILE: 1, "data": 5}))
    sample = folder / "samples/step_00000100"
    parts = [{"type": "text", "text": HOSTILE * 99}, {"type": "image", "image": "0_0.png"}]
    line = {"prompt": {"text": HOSTILE, "image": HOSTILE}, "content": parts * 50}
    (sample / "samples.jsonl").write_text(json.dumps(line) + "\n")
    (sample / "0_0.png").write_bytes(b"<svg onload='x()'>")
    (folder / "checkpoints/branch_0001").mkdir()
    (folder / "checkpoints/branch_0001/branch.json").write_text(json.dumps({"since": HOSTILE}))
    run, page = report_page(folder, ORIGIN)
    assert "<script" not in page and "<svg onload" not in page and "\u202e" not in page
    assert len(page) < 1_500_000
    assert any("cannot be decoded" in problem for problem in run.problems)


def test_an_end_with_an_error_is_said_and_many_saves_do_not_hide_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=5)
    saves = [{"event": "save", "step": i, "text": "saved"} for i in range(500)]
    events = [
        *saves,
        {"event": "skip", "step": 3},
        {"event": "error", "step": 5, "text": "no disk"},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    text = plain(report_page(folder, ORIGIN)[1])
    assert "Its last event is an error: no disk" in text
    assert "The updates of 1 step were left out." in text
    assert "500 saved checkpoints are not listed here." in text and "5 – error no disk" in text


def test_secrets_are_masked(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    secret = "hf_" + "abcdefghijklmnopqrstuvwx"
    (folder / "config.yaml").write_text(f"x: {{api_key: {secret}, note: 'a {secret}'}}")
    (folder / "environment.json").write_text(json.dumps({"HF_TOKEN": secret, "a": secret}))
    (folder / "events.jsonl").write_text(json.dumps({"event": "x", "text": f"token {secret}"}))
    assert secret not in report_page(folder, ORIGIN)[1]


def test_smoothing_and_thinning_keep_a_page_small(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    values = np.random.default_rng(0).normal(size=(30_000, 3)) + 5
    lines = (
        f'{{"step": {i}, "loss": {a}, "loss_text": {b}, "grad_norm": {c}}}\n'
        for i, (a, b, c) in enumerate(values)
    )
    (folder / "metrics.jsonl").write_text("".join(lines))
    assert len(report_page(folder, ORIGIN)[1]) < 250_000


def test_the_defaults_of_entries_of_lists_are_known(tmp_path: Path) -> None:
    values = dict(flatten({"data": {"stage1": [{"prefix": "a", "weight": 1.0, "repeat": True}]}}))
    from megatron_chameleon.runs.records import RecordedConfig

    assert RecordedConfig(values, "").changed() == {"data.stage1[0].prefix": ("", "a")}


def test_a_collapse_stands_at_the_top_with_examples(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=30)
    check = folder / "modalities" / "step_00000030"
    check.mkdir(parents=True)
    given = {"text": 0, "one image": 16}
    counts = {"expected": "text", "prompts": "held-out", "given": given, "cut_off": 2}
    found = {"step": 30, "max_tokens": 64, "counts": [counts], "notes": [HOSTILE]}
    (check / "modalities.json").write_text(json.dumps(found))
    answer = {"expected": "text", "given": "one image", "prompt": HOSTILE, "cut_off": True}
    picture = {"type": "image", "image": "../../samples/step_00000100/0000-0.png"}
    lines = [json.dumps({**answer, "content": [{"type": "text", "text": HOSTILE}, picture]})] * 900
    (check / "samples.jsonl").write_text("\n".join(["{", *lines]))
    run, page = report_page(folder, ORIGIN)
    top, _, rest = page.partition("<h2>Losses")
    assert '<li class="bad">Text has collapsed: most text questions are not answered' in top
    assert "(text questions: 0 of 16 answered with text, 16 with one image; 2 cut off)" in top
    assert "Expected: text" in rest and rest.count("one image, cut off") == 4
    assert "<script" not in page and "\u202e" not in page
    assert "a picture that is not in the folder" in page  # it lies outside
    assert any("line 1, which is not valid JSON" in problem for problem in run.problems)
    (check / "modalities.json").write_text("[]")
    run, page = report_page(folder, ORIGIN)
    assert any("must hold a JSON object" in problem for problem in run.problems)
    assert "Nobody has looked." in plain(page)
