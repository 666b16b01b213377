"""Pictures per second of ``ImageTokenizer.encode``, against transformers on the same CPU.

    python -W ignore -m benchmarks.data.image_tokenizer           # 128 x 128 pixels, half a minute
    python -W ignore -m benchmarks.data.image_tokenizer --quick   # tiny sizes, as a check

Both get the same JPEG files and the same random weights, and run in one process with one thread.
Theirs is ``ChameleonImageProcessor`` and ``ChameleonVQVAE.encode``. The codes of the same pixels
are compared before anything is timed. Times are CPU seconds, the best of repeats that alternate;
the shares of decoding and resizing are measured apart from the network.
"""

import argparse
import io
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_chameleon.checkpoint.formats.hf_config import vq_config
from megatron_chameleon.tokenizer.image.shape import VqganConfig
from megatron_chameleon.tokenizer.image.tokenizer import ImageTokenizer, prepare_image, to_pixels
from megatron_chameleon.tokenizer.image.vqgan import Vqgan


def main(words: Sequence[str] | None = None) -> None:
    """Compare, then time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    resolution = 32 if args.quick else args.resolution
    width = 32 if args.quick else 128
    config = VqganConfig(resolution=resolution, base_channels=width)
    model = Vqgan(config, has_decoder=False)
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.05)
    network, theirs = _transformers(config, model)
    ours = ImageTokenizer(model)
    files = _files(args.pictures, 3 * resolution)
    fitting = [Image.fromarray(prepare_image(_opened(file), resolution)) for file in files]
    pixels = to_pixels(np.stack([np.asarray(image) for image in fitting]))
    with torch.inference_mode():
        expected = network.encode(pixels).image_tokens.view(len(fitting), -1).numpy()
    agreeing = float((ours.encode(fitting) == expected).mean())
    print(f"{agreeing:.2%} of the codes of the same pixels are equal")
    if agreeing < 0.99:
        raise SystemExit("the codes differ")
    ways: dict[str, Callable[[], object]] = {
        "transformers, files to codes": lambda: theirs([_opened(file) for file in files]),
        "ours, files to codes": lambda: ours.encode([_opened(file) for file in files]),
        "decoding JPEG": lambda: [_opened(file).load() for file in files],
        "decoding and resizing, ours": lambda: [
            prepare_image(_opened(file), resolution) for file in files
        ],
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(1 if args.quick else args.repeats):
        for name, way in ways.items():
            start = time.process_time()
            way()
            best[name] = min(best[name], time.process_time() - start)
    for name, seconds in best.items():
        print(f"{name:32} {args.pictures / seconds:8.2f} pictures/s")
    whole = best["ours, files to codes"]
    print(f"ours / transformers: {best['transformers, files to codes'] / whole:.2f}x")
    print(f"share of decoding JPEG: {best['decoding JPEG'] / whole:.1%}")
    print(f"share of decoding and resizing: {best['decoding and resizing, ours'] / whole:.1%}")


def _files(count: int, side: int) -> list[bytes]:
    """JPEGs of noise that is smooth as photographs are."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (side // 8, side // 6, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def _opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


Encoder = Callable[[list[Image.Image]], np.ndarray]


def _transformers(config: VqganConfig, model: Vqgan) -> tuple[Any, Encoder]:
    """Their network, and from pictures to codes, all in one batch, as their documentation does it.

    Their processor multiplies by 0.0078 and not by 2 / 255, so a code in twenty is another one.
    """
    from transformers import ChameleonImageProcessor
    from transformers.models.chameleon.modeling_chameleon import (
        ChameleonVQVAE,
        ChameleonVQVAEConfig,
    )

    network = ChameleonVQVAE(ChameleonVQVAEConfig(**vq_config(config))).eval()
    network.load_state_dict(model.state_dict())
    side = config.resolution
    processor = ChameleonImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )

    @torch.inference_mode()
    def encode(images: list[Image.Image]) -> np.ndarray:
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return network.encode(pixels).image_tokens.view(len(images), -1).numpy()

    return network, encode


if __name__ == "__main__":
    main()
