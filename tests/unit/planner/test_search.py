"""The planner offers what the trainer accepts, ranks it, and says what is wrong with the rest."""

import dataclasses
import itertools
import json
import subprocess
import sys
import time

import pytest

from megatron_chameleon.cli.main import main
from megatron_chameleon.config.checks.check import check_config
from megatron_chameleon.config.load import load_config
from megatron_chameleon.config.names import PRESETS
from megatron_chameleon.config.parameters import count_parameters
from megatron_chameleon.config.schema import Config, SourceConfig, TokenizerConfig
from megatron_chameleon.errors import ChameleonError, ConfigError
from megatron_chameleon.model.tuning.selection import select_trained
from megatron_chameleon.planner.flops import training_flops_per_token
from megatron_chameleon.planner.gpus import GPUS, find_gpu
from megatron_chameleon.planner.memory import GIB
from megatron_chameleon.planner.report import as_json, as_text, check_any_fits
from megatron_chameleon.planner.search import LayoutSearchResult, PlanRequest, search_layouts
from megatron_chameleon.planner.time import predict_step
from megatron_chameleon.wording import format_count

VOCAB_SIZE = 65_536


def preset(name: str, *overrides: str) -> Config:
    config = load_config(PRESETS / f"chameleon_{name}.yaml", overrides)
    config.tokenizer = TokenizerConfig("later")
    config.data.stage1 = [SourceConfig("later")]
    return config


@pytest.fixture(scope="module")
def result() -> LayoutSearchResult:
    return search_layouts(PlanRequest(preset("34b"), VOCAB_SIZE, 64, GPUS["h100"]))


def test_the_trainer_accepts_every_plan(result: LayoutSearchResult) -> None:
    assert len(result.fitting) > 10
    for plan in result.fitting:
        check_config(plan.config, 64)


def test_every_plan_fits_and_the_fastest_is_first(result: LayoutSearchResult) -> None:
    assert all(plan.memory.total <= 79.1 * GIB for plan in result.fitting)
    speeds = [plan.speed for plan in result.fitting]
    assert all(later <= speed * 1.002 for speed, later in itertools.pairwise(speeds))
    assert all(plan.memory.total > 79.1 * GIB for plan in result.too_large)
    assert all(plan.speed > speeds[0] for plan in result.too_large)


def test_no_more_recomputation_than_is_needed_to_fit(result: LayoutSearchResult) -> None:
    recomputed = [p for p in result.fitting if p.config.parallel.recompute_granularity == "full"]
    assert recomputed
    for plan in recomputed[:3]:
        parallel = dataclasses.replace(plan.config.parallel, recompute_granularity=None)
        request = PlanRequest(
            dataclasses.replace(plan.config, parallel=parallel), VOCAB_SIZE, 64, GPUS["h100"]
        )
        own = search_layouts(request).own
        assert own is not None and not own.fits


def test_what_the_trainer_refuses_is_counted_with_its_words(result: LayoutSearchResult) -> None:
    assert result.refused == {
        "model.num_layers: 48 layers are not divisible by 32 pipeline stages": 10
    }


def test_days_and_gpu_hours_are_those_of_the_whole_run(result: LayoutSearchResult) -> None:
    best = result.fitting[0]
    seconds = preset("34b").training.steps * best.step.total
    assert best.days == pytest.approx(seconds / 86_400)
    assert best.gpu_hours == pytest.approx(64 * seconds / 3600)


def test_a_batch_size_warm_up_shortens_the_run(result: LayoutSearchResult) -> None:
    request, best = result.request, result.fitting[0]
    training = dataclasses.replace(best.config.training)
    training.rampup_batch_size = [training.global_batch_size // 2, training.global_batch_size // 2]
    training.rampup_batch_size.append(50 * training.global_batch_size)
    config = dataclasses.replace(best.config, training=training)
    shorter = dataclasses.replace(
        best, request=dataclasses.replace(request, config=config), config=config
    )
    # 100 steps of half the size
    batch = training.global_batch_size * config.model.seq_length
    assert request.tokens - shorter.request.tokens == 50 * batch
    saved = (best.days - shorter.days) * 86_400 / best.step.total
    assert 40 < saved < 50, "a small step takes longer per token"


def test_the_json_is_whole_and_its_overrides_give_the_plan(result: LayoutSearchResult) -> None:
    found = json.loads(json.dumps(as_json(result, top=3)))
    assert len(found["plans"]) == 3 and found["own_layout"]["fits"] is False
    first = found["plans"][0]
    parts = {k: v for k, v in first["memory_gib"].items() if k != "total"}
    assert sum(parts.values()) == pytest.approx(first["memory_gib"]["total"], abs=0.01)
    parts = {k: v for k, v in first["step_seconds"].items() if k != "total"}
    assert sum(parts.values()) == pytest.approx(first["step_seconds"]["total"], abs=0.01)
    config = preset("34b", *first["overrides"])
    assert config.parallel == result.fitting[0].config.parallel


def test_the_text_names_the_convention_the_split_and_what_does_not_fit(
    result: LayoutSearchResult,
) -> None:
    text = as_text(result, top=5, every=False)
    for words in (
        "attention over the full square",
        "34,293,522,432 parameters\n",
        "9.20T tokens in all",
        "The config's own layout, TP 1 x PP 1, micro-batch 1",
        "would be faster but do not fit",
        "The trainer refuses",
        "chameleon train CONFIG parallel.tensor_model_parallel_size=",
    ):
        assert words in text


def test_nothing_fits() -> None:
    result = search_layouts(PlanRequest(preset("34b"), VOCAB_SIZE, 4, GPUS["a100"]))
    with pytest.raises(ConfigError) as caught:
        check_any_fits(result)
    assert str(caught.value).startswith(
        "--gpus: no layout fits on 4 x a100: the smallest, TP 4 x PP 1, micro-batch 1, full "
        "recomputation, needs "
    )


def test_no_layout_passes_the_checks() -> None:
    with pytest.raises(ConfigError, match="no layout on 7 GPUs passes the trainer's checks"):
        check_any_fits(search_layouts(PlanRequest(preset("34b"), VOCAB_SIZE, 7, GPUS["h200"])))


@pytest.mark.parametrize(
    ("overrides", "gpu", "message"),
    [
        (
            ["engine.name=deepspeed"],
            "h100",
            "engine.name: is deepspeed, but the planner only knows the megatron engine",
        ),
        (["fp8.format=hybrid"], "a100", "fp8.format: is hybrid, but a100 has no FP8. Set"),
        (["model.num_layers=0"], "h100", "model.num_layers: 0 is not between 1 and 2,000"),
    ],
)
def test_what_cannot_be_planned(overrides: list[str], gpu: str, message: str) -> None:
    with pytest.raises(ChameleonError) as caught:
        search_layouts(PlanRequest(preset("7b", *overrides), VOCAB_SIZE, 8, GPUS[gpu]))
    assert message in str(caught.value)


def test_a_vocabulary_that_the_tensor_ranks_cannot_split() -> None:
    result = search_layouts(PlanRequest(preset("7b"), 65_537, 8, GPUS["h200"]))
    assert {plan.config.parallel.tensor_model_parallel_size for plan in result.fitting} == {1}
    assert any("its 65537 tokens are not divisible" in reason for reason in result.refused)


def test_flops_are_six_per_weight_and_the_full_square_of_attention() -> None:
    model = preset("7b").model
    looked_up = VOCAB_SIZE * model.hidden_size
    norms = count_parameters(model, 0) - 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    weights = count_parameters(model, VOCAB_SIZE) - looked_up - norms
    attention = 12 * 32 * 4096 * 4096
    assert training_flops_per_token(model, VOCAB_SIZE) == 6 * weights + attention


def test_more_of_everything_is_never_faster() -> None:
    """Bubbles, recomputation and messages cost time; FP8 and a newer GPU save time."""

    def seconds(*overrides: str, gpu: str = "h100", name: str = "7b") -> float:
        return predict_step(preset(name, *overrides), VOCAB_SIZE, 64, GPUS[gpu]).total

    plain = seconds()
    pipeline = "parallel.pipeline_model_parallel_size=4"
    assert seconds("parallel.recompute_granularity=full") > 1.2 * plain
    assert seconds("parallel.tensor_model_parallel_size=8") > plain
    assert seconds(pipeline) > seconds(pipeline, "parallel.virtual_pipeline_model_parallel_size=8")
    assert seconds("fp8.format=hybrid") < 0.8 * plain
    assert seconds(gpu="a100") > 2 * plain > 2 * seconds(gpu="h200")


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A100-SXM4-40GB", "a100"),  # whose peaks are those of the larger one
    ],
)
def test_gpus_by_their_names(name: str, gpu: str | None) -> None:
    found = find_gpu(name)
    assert (found.name if found else None) == gpu


def test_the_planner_needs_no_torch() -> None:
    words = ["chameleon", "plan", "chameleon_7b", "--gpus", "8", "--gpu", "h200"]
    code = (
        "import sys; from megatron_chameleon.cli.main import main\n"
        f"main({words[1:]!r}); assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "tokens/s/GPU" in result.stdout


@pytest.mark.parametrize("gpus", [720_720, 999_983, 1_000_000])
def test_any_number_of_gpus_is_answered_at_once(gpus: int) -> None:
    words = ["model.num_layers=1680", "training.global_batch_size=720720"]
    start = time.process_time()  # other programs may keep the cores busy
    result = search_layouts(PlanRequest(preset("7b", *words), VOCAB_SIZE, gpus, GPUS["h100"]))
    assert result.fitting or result.refused
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        *[(1, "1"), (999, "999"), (1000, "1.00k"), (4096, "4.10k"), (40_960, "41.0k")],
        *[(999_499, "999k"), (999_500, "1.00M"), (9_990_000_000, "9.99B"), (10**15, "1,000T")],
    ],
)
def test_the_number_of_tokens_has_a_unit_that_fits(tokens: int, words: str) -> None:
    assert format_count(tokens) == words


def test_a_small_run_is_not_counted_in_trillions() -> None:
    words = ["training.steps=1", "training.global_batch_size=1", "optimizer.lr_warmup_steps=0"]
    config = preset("7b", "adapter.rank=1", *words)
    text = as_text(search_layouts(PlanRequest(config, VOCAB_SIZE, 1, GPUS["h200"])), 1, False)
    assert "global batch 1 x 4,096, 4.10k tokens in all" in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter.rank=16"], ", frozen, and 39,976,960 of an adapter (LoRA, rank 16)"),
        (
            ["adapter.rank=16", "adapter.quantize=nf4", "adapter.dora=true"],
            ", frozen in nf4, and 41,336,832 of an adapter (DoRA, rank 16)",
        ),
        (["model.train=[lm_head]"], ", of which 268,435,456 have gradients and optimizer state"),
    ],
)
def test_the_text_says_what_is_trained(overrides: list[str], words: str) -> None:
    config = preset("7b", "training.dtype=bf16", "training.global_batch_size=8", *overrides)
    trained = select_trained(config, VOCAB_SIZE).with_gradient
    result = search_layouts(PlanRequest(config, VOCAB_SIZE, 1, GPUS["h200"], trained))
    assert as_text(result, 1, False).startswith(f"7,013,158,912 parameters{words}\n")
    assert ("1 x forward for frozen matrices" in as_text(result, 1, False)) == (trained is None)


@pytest.mark.parametrize(
    ("gpu", "overrides", "micro_batch", "recompute"),
    [
        ("rtx4090", ["adapter.rank=16"], 1, "full"),
        ("rtx4090", ["adapter.rank=16", "adapter.quantize=nf4"], 4, "full"),
        ("a100-40", ["adapter.rank=16", "adapter.quantize=nf4"], 1, None),
        ("a100", ["adapter.rank=16"], 1, None),
    ],
)
def test_adapters_of_the_7b_on_one_gpu(
    gpu: str, overrides: list[str], micro_batch: int, recompute: str | None
) -> None:
    config = preset("7b", "training.dtype=bf16", "training.global_batch_size=16", *overrides)
    best = search_layouts(PlanRequest(config, VOCAB_SIZE, 1, GPUS[gpu])).fitting[0].config
    found = best.training.micro_batch_size, best.parallel.recompute_granularity
    assert found == (micro_batch, recompute)


def test_the_memory_of_a_gpu_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "chameleon_7b", "--gpus", "1", "--gpu", "l40s", "adapter.rank=8"]
    words += ["training.global_batch_size=4"]
    main([*words, "--gpu-memory", "30.5"])
    assert "1 x l40s (30.5 GiB), bf16" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--gpu-memory", "8"])
    assert "of 8.0 GiB (weights 13.1" in capsys.readouterr().err
