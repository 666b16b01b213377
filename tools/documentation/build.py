"""Build the documentation into ``site/``.

    make docs    # or python -m tools.documentation.build

The pages are collected in ``build/docs``, Zensical makes HTML of them and fails at any warning, and
``site_links.py`` follows every link and picture of the result.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from tools.documentation.navigation import names_in, site_config
from tools.documentation.site_links import broken_links, foreign_sources
from tools.documentation.staging import REPOSITORY, stage

BUILD = REPOSITORY / "build"
SITE = REPOSITORY / "site"


def build() -> list[str]:
    """Build the site. Returns what is wrong with it, one line each."""
    settings = site_config()
    stage(BUILD / "docs", dict(names_in(settings["nav"])))
    config = BUILD / "mkdocs.yml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    for old in (SITE, BUILD / "site"):
        shutil.rmtree(old, ignore_errors=True)
    made = subprocess.run(
        [Path(sys.executable).with_name("zensical"), "build", "--strict", "--clean", "-f", config],
        cwd=REPOSITORY,
        env=os.environ | {"NO_COLOR": "1"},
    )
    if made.returncode:
        return ["zensical has found what is listed above"]
    shutil.move(BUILD / "site", SITE)  # Zensical writes below its config's folder only
    return [*broken_links(SITE), *foreign_sources(SITE)]


if __name__ == "__main__":
    problems = build()
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)
    print(f"{sum(1 for _ in SITE.rglob('*.html'))} pages: open {SITE / 'index.html'}")
    print(f"The search needs a server: python -m http.server --directory {SITE}")
