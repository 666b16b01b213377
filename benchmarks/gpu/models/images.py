"""The image tokenizer: images per second, encoded and decoded, with random weights.

By torch's counter the paper's network takes 0.554 TFLOP to encode an image of 512 x 512 pixels and
1.005 TFLOP to decode one, so 500 images per second are 277 and 502 TFLOP/s.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.common import Context, Figures, median_and_spread, time_calls
from megatron_chameleon.parallel import platform
from megatron_chameleon.tokenizer.image.tokenizer import ImageTokenizer
from megatron_chameleon.tokenizer.image.vqgan import Vqgan, VqganConfig

TINY = VqganConfig(
    resolution=16,
    base_channels=32,
    ch_mult=[1, 2],
    num_res_blocks=1,
    z_channels=32,
    embed_dim=32,
    codebook_size=64,
)


@dataclass(frozen=True)
class Mode:
    """How the network runs."""

    dtype: torch.dtype
    channels_last: bool = False
    compiler: str | None = None

    def build(self, model: Vqgan) -> Vqgan:
        """Copy the network and set the copy to this mode."""
        order = torch.channels_last if self.channels_last else torch.contiguous_format
        built = deepcopy(model).convolve_in(self.dtype, order)
        return built if self.compiler is None else built.compile_networks(self.compiler)


def run(context: Context) -> None:
    shape = TINY if context.tiny else VqganConfig()
    torch.manual_seed(1)
    model = Vqgan(shape).to(platform.device()).eval().requires_grad_(False)
    compiler = "inductor" if platform.has_gpu() else "aot_eager"
    modes = {
        "fp32": Mode(torch.float32),
        "bf16": Mode(torch.bfloat16),
        "bf16, channels last": Mode(torch.bfloat16, True),
        f"bf16, channels last, compiled by {compiler}": Mode(torch.bfloat16, True, compiler),
    }
    codes = measure_codes(model, context.tiny)
    for name, mode in modes.items():
        built: list[Vqgan] = []
        batches = (4, 2) if context.tiny else (32, 8, 1)
        for batch in batches[: 1 if mode.compiler else None]:  # each takes a minute to compile
            for what in ("encode", "decode"):
                context.row(
                    f"{what} {shape.resolution}x{shape.resolution}, batch {batch}, {name}",
                    lambda batch=batch, what=what, mode=mode, built=built: figures_of(
                        context, one_of(built, mode, model), what, batch
                    ),
                )
        context.row(
            f"codes of fp32, {name}",
            lambda mode=mode, built=built: codes(one_of(built, mode, model)),
            "random weights, smooth random images",
        )
    context.row(
        "tokenizer, PIL images in, codes out",
        lambda: tokenizer_figures(context, model),
        "one process prepares the images",
    )


def one_of(built: list[Vqgan], mode: Mode, model: Vqgan) -> Vqgan:
    if not built:
        built.append(mode.build(model))
    return built[0]


def measure_codes(model: Vqgan, tiny: bool) -> Callable[[Vqgan], Figures]:
    """Return a function that gives the share of codes equal to those of fp32 without TF32.

    The codebook of the model is spread like its latents, so that many codes are chosen.
    """
    device, shape = platform.device(), model.config
    size, count = shape.resolution, 2 if tiny else 8
    draws = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, 3, shape.grid, shape.grid, generator=draws)
    pixels = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    pixels = pixels.clamp(-1, 1).to(device)
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        flat = model.latents(pixels).movedim(1, 3).flatten(0, 2)
        spread = torch.randn(model.quantize.embedding.weight.shape, generator=draws).to(device)
        model.quantize.embedding.weight.copy_(flat.mean(dim=0) + spread * flat.std(dim=0))
        expected = model.encode(pixels)

    @torch.inference_mode()
    def share(other: Vqgan) -> Figures:
        same = (other.encode(pixels) == expected).float().mean()
        return {"same codes": float(same), "codes in use": len(expected.unique())}

    return share


@torch.inference_mode()
def figures_of(context: Context, model: Vqgan, what: str, batch: int) -> Figures:
    """Measure one direction. fp32 convolutions use TF32, torch's default on a GPU."""
    shape, device = model.config, platform.device()
    if what == "encode":
        size = (batch, shape.in_channels, shape.resolution, shape.resolution)
        argument = torch.rand(size, device=device).mul(2).sub(1)
        argument = argument.to(memory_format=torch.channels_last)
    else:
        argument = torch.randint(shape.codebook_size, (batch, shape.codes_per_image), device=device)
    call: Callable[[Any], Any] = getattr(model, what)
    with torch.device("meta"):
        plain = Vqgan(shape)
    with FlopCounterMode(display=False) as counter:
        getattr(plain, what)(torch.empty_like(argument, device="meta"))
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


def tokenizer_figures(context: Context, model: Vqgan) -> Figures:
    """Measure ``ImageTokenizer``: resizing on the host, and copies to and from the device."""
    import numpy as np
    from PIL import Image

    tokenizer = ImageTokenizer(deepcopy(model), platform.device(), torch.bfloat16)
    rng, count = np.random.default_rng(1), 2 if context.tiny else 64
    size = (model.config.resolution * 5 // 4, model.config.resolution, 3)
    images = [Image.fromarray(rng.integers(256, size=size, dtype=np.uint8)) for _ in range(count)]
    seconds, spread = median_and_spread(
        time_calls(lambda: tokenizer.encode(images), repeats=3, warmup=1)
    )
    return {"images/s": count / seconds, "ms": seconds * 1e3, "spread": spread}
