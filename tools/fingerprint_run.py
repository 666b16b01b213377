"""Print what a run computed, so that two versions of the code can be compared with ``diff``.

    make demo
    python tools/fingerprint_run.py runs/digits > before.txt
    # ... change the code, then the same again into after.txt ...
    diff before.txt after.txt

One line per token file, tokenizer file and exported file gives its SHA-256. One line per step gives
the losses, norms and learning rate with all their digits. Times and speeds are left out, because
they differ between two runs of the same code. A refactoring must change no line.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

MEASURED = (
    "loss",
    "loss_text",
    "loss_image",
    "z_loss",
    "grad_norm",
    "learning_rate",
    "consumed_samples",
    "consumed_tokens",
    "output_norm",
    "max_logit",
)
"""Keys of ``metrics.jsonl`` that depend on the computation alone."""

TOKEN_FILES = ("bin", "idx", "documents", "images")
PATTERNS = ("data/*", "tokenizer/**/*", *(f"tokens/*.{n}" for n in TOKEN_FILES), "exported/**/*")
"""Files whose bytes depend on the computation alone; the token files' ``.json`` names paths."""


def fingerprint(run: Path, steps: int) -> Iterator[str]:
    """The lines for one run folder.

    Args:
        run: A run folder of ``make demo``; what it lacks of the patterns is left out.
        steps: Steps of ``metrics.jsonl``, from the first.
    """
    for pattern in PATTERNS:
        for path in sorted(run.glob(pattern)):
            if path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                yield f"{path.relative_to(run)} {digest}"
    with (run / "metrics.jsonl").open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    for record in records[:steps]:
        values = {key: record.get(key) for key in MEASURED}
        yield f"step {record['step']} {json.dumps(values)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, such as runs/digits")
    parser.add_argument("--steps", type=int, default=100, help="steps to print (default: 100)")
    args = parser.parse_args()
    for line in fingerprint(args.run, args.steps):
        print(line)


if __name__ == "__main__":
    main()
