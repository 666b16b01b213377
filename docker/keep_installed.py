"""Pin what an image brings along for its GPUs, so that pip does not replace it.

python keep_installed.py > kept.txt               # constraints for pip
python keep_installed.py --compare kept.txt       # exit code 1 if one has changed
"""

import importlib.metadata
import re
import sys
from pathlib import Path

KEPT = re.compile(
    r"(pytorch[-_])?(torch|triton)([-_].*)?|torch(vision|audio|ao)|numpy|apex|flash[-_]attn.*"
    r"|transformer[-_]engine.*|nvidia[-_].*|cuda[-_].*|deepspeed|xformers",
    re.IGNORECASE,
)


def installed() -> list[str]:
    """``name==version`` of each distribution that has to stay as it is."""
    found = {
        str(package.metadata["Name"]): package.version
        for package in importlib.metadata.distributions()
        if package.metadata["Name"] and KEPT.fullmatch(package.metadata["Name"])
    }
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def main(words: list[str]) -> int:
    """Print the constraints, or compare them with those of a file."""
    now = installed()
    if not words:
        print("\n".join(now))
        return 0
    gone = [line for line in Path(words[1]).read_text(encoding="utf-8").split() if line not in now]
    for line in gone:
        print(f"error: {line} of the image was replaced or removed.", file=sys.stderr)
    return 1 if gone else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
