"""Count what a model of examples/shapes/run.sh draws: grids, round trips, and what was asked for.

    python examples/shapes/measure.py runs/shapes

It draws a thousand pictures by their captions, and some of each caption's opposite shape with
``size``. It writes RUN/shapes.json with the counts, and RUN/shapes.html with pictures.
"""

import argparse
import base64
import io
import itertools
import json
import re
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from make_pictures import COLOURS, FORMS, RATIOS, caption
from PIL import Image

from megatron_chameleon.errors import DataError
from megatron_chameleon.images.png import png_bytes
from megatron_chameleon.inference.answers.answer import Answer
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.session import Session
from megatron_chameleon.masking import masked_command
from megatron_chameleon.pages.elements import heading, how, image, sample, samples, table
from megatron_chameleon.pages.page import Origin, page
from megatron_chameleon.tokenizer.common.grids import Grid
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary

SHOWN = 36


def grid_of(token_ids: list[int], vocabulary: Vocabulary) -> Grid | None:
    """The grid of an answer that is one image and nothing else, exactly as announced; else None.

    The image must also give the same tokens when its codes are laid out again.
    """
    first, *inside, last = token_ids
    if (first, last) != (vocabulary.begin_image, vocabulary.end_image):
        return None
    try:
        grid, codes = vocabulary.read_image(np.array(inside))
    except DataError:
        return None
    again = vocabulary.image_tokens(codes, grid).tolist()
    announced = vocabulary.grid_of_token(inside[0])
    return grid if again == inside and announced == grid else None


def colour_of(picture: Image.Image) -> str:
    """The colour that the pixels far from paper are nearest to, on average."""
    pixels = np.asarray(picture.convert("RGB"), np.float64).reshape(-1, 3)
    inked = pixels[pixels.min(axis=1) < 160]
    if not len(inked):
        return "none"
    mean = inked.mean(axis=0)
    return min(COLOURS, key=lambda name: float(np.square(mean - COLOURS[name]).sum()))


def measured(
    asked: list[tuple[str, str, str]], answers: list[Answer], session: Session, sizes: list[str]
) -> dict[str, Any]:
    """Counts over answers; ``sizes`` has the width:height that each should get."""
    vocabulary, form = session.tokenizer.vocabulary, session.image_form
    image_tokenizer = session.tokenizer.image
    assert image_tokenizer is not None
    counts: Counter[str] = Counter(pictures=len(answers))
    grids: Counter[str] = Counter()
    for (_, colour, _), answer, size in zip(asked, answers, sizes, strict=True):
        grid = grid_of(answer.token_ids, vocabulary)
        if grid is None:
            continue
        counts["whole, with the grid that it announces"] += 1
        grids[str(grid)] += 1
        (picture,) = answer.content
        assert isinstance(picture, Image.Image)
        edge = image_tokenizer.resolution // image_tokenizer.grid
        is_sized = picture.size == (grid.columns * edge, grid.rows * edge)
        counts["pixels of the size of the grid"] += is_sized
        counts["the grid that was asked for"] += grid == form.grid_of_size(size)
        counts["the colour that was asked for"] += colour_of(picture) == colour
    return {**counts, "grids": dict(grids.most_common())}


def on_page(html: str) -> list[tuple[bool, tuple[int, int]]]:
    """Whether width and height of each image of a page are those of its file, and the size."""
    found = []
    for tag in re.findall(r"<img[^>]*>", html):
        data = base64.b64decode(re.search(r"base64,([^\"]+)", tag)[1])  # type: ignore[index]
        size = Image.open(io.BytesIO(data)).size
        said = tuple(int(re.search(rf'{name}="(\d+)"', tag)[1]) for name in ("width", "height"))  # type: ignore[index]
        found.append((said == size, size))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=1000, help="pictures (default: 1000)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    session = Session.load(args.run)
    kinds = list(itertools.product(RATIOS, COLOURS, FORMS))
    asked = [kind for kind, _ in zip(itertools.cycle(kinds), range(args.count), strict=False)]
    options = GenerationOptions(
        force=Force.IMAGE, seed=args.seed, temperature=0.8, top_p=0.95, batch_size=32
    )
    texts = [caption(*kind) for kind in asked]
    free = session.generate([[text] for text in texts], options)
    named = ["{}:{}".format(*RATIOS[ratio]) for ratio, _, _ in asked]
    few = slice(max(1, args.count // 5))
    forced: dict[str, Any] = {}
    for size in ("2:1", "1:1", "1:2"):
        sized = GenerationOptions(**{**vars(options), "size": size})
        answers = session.generate([[text] for text in texts[few]], sized)
        forced[size] = measured(asked[few], answers, session, [size] * len(answers))
    result = {"by caption": measured(asked, free, session, named), "by size": forced}

    shown = [
        sample(image(png_bytes(part), text), text)
        for text, answer in zip(texts[:SHOWN], free, strict=False)
        for part in answer.content
        if isinstance(part, Image.Image)
    ]
    rows = [(name, count) for name, count in result["by caption"].items() if name != "grids"]
    body = [
        how("Pictures that were drawn by their captions, each in the grid that it announced."),
        table(["", "pictures"], rows),
        table(["grid", "pictures"], list(result["by caption"]["grids"].items())),
        heading("Pictures"),
        samples(shown),
    ]
    origin = Origin(masked_command(sys.argv), datetime.now(UTC), str(args.run), args.seed)
    html = page("Pictures of three shapes", body, origin)
    result["on the page"] = {
        "pictures": len(shown),
        "with their own width and height": sum(right for right, _ in on_page(html)),
    }
    (args.run / "shapes.html").write_text(html, encoding="utf-8")
    (args.run / "shapes.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
