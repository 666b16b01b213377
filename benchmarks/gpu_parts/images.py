"""The image tokenizer: images a second, encoded and decoded, with random weights."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from gpu_parts.common import Context, Figures, median_and_spread, time_calls
from megatron_chameleon.parallel import platform
from megatron_chameleon.tokenizer.vqgan import Vqgan, VqganConfig

TINY = VqganConfig(
    resolution=16,
    base_channels=32,
    ch_mult=[1, 2],
    num_res_blocks=1,
    z_channels=32,
    embed_dim=32,
    codebook_size=64,
)


def run(context: Context) -> None:
    shape = TINY if context.tiny else VqganConfig()
    torch.manual_seed(1)
    model = Vqgan(shape).to(platform.device()).eval().requires_grad_(False)
    size = f"{shape.resolution}x{shape.resolution}"
    for batch in (1, 4 if context.tiny else 16):
        pixels = torch.rand(batch, 3, shape.resolution, shape.resolution).mul(2).sub(1)
        codes = torch.randint(shape.codebook_size, (batch, shape.codes_per_image))
        work: dict[str, tuple[Callable[[Any], Any], torch.Tensor]] = {
            "encode": (model.encode, pixels.to(platform.device())),
            "decode": (model.decode, codes.to(platform.device())),
        }
        for name, (call, argument) in work.items():
            for dtype in ("fp32", "bf16 autocast"):
                context.row(
                    f"{name} {size}, batch {batch}, {dtype}",
                    lambda call=call, argument=argument, dtype=dtype: figures_of(
                        context, call, argument, dtype == "bf16 autocast"
                    ),
                )


@torch.inference_mode()
def figures_of(
    context: Context, call: Callable[[Any], Any], argument: torch.Tensor, autocast: bool
) -> Figures:
    """fp32 convolutions use TF32, torch's default on a GPU."""
    kind = platform.device().type
    within = torch.autocast(kind, torch.bfloat16) if autocast else contextlib.nullcontext()
    with within:
        with FlopCounterMode(display=False) as counter:
            call(argument)
        times = time_calls(lambda: call(argument), repeats=3 if context.tiny else 10)
    seconds, spread = median_and_spread(times)
    rate = counter.get_total_flops() / seconds / 1e12
    figures: Figures = {
        "images/s": len(argument) / seconds,
        "ms": seconds * 1e3,
        "TFLOP/s": rate,
        "spread": spread,
    }
    if ceiling := context.ceiling("bf16 matmul", "TFLOP/s"):
        figures["of the bf16 matmul"] = rate / ceiling
    return figures
