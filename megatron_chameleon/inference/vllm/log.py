"""vLLM's log: a file, because hundreds of lines on the terminal hide the one that matters."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from megatron_chameleon.inference.vllm.plugins.registration import LOG_VARIABLE

CONFIG_VARIABLE, LEVEL_VARIABLE = "VLLM_LOGGING_CONFIG_PATH", "VLLM_LOGGING_LEVEL"

_ERROR = re.compile(r"(?:^|[\s\]])(?:\w+\.)*(\w+(?:Error|Exception)): (\S.*)$")
_CONSEQUENCES = ("initialization failed", "See root cause above", "Engine process failed to start")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class VllmLog:
    """The log of one start of vLLM.

    If the user sets a level or a config for vLLM's log, it stays on the terminal.
    """

    def __init__(self) -> None:
        self.file: Path | None = None
        is_ours = LOG_VARIABLE in os.environ  # of an earlier start in this process
        if os.environ.get(LEVEL_VARIABLE) or (os.environ.get(CONFIG_VARIABLE) and not is_ours):
            return
        folder = Path(tempfile.mkdtemp(prefix="chameleon-vllm-"))
        self.file = folder / "vllm.log"
        config = folder / "logging.json"
        config.write_text(json.dumps(_config(self.file)), encoding="utf-8")
        os.environ[CONFIG_VARIABLE] = str(config)
        os.environ[LOG_VARIABLE] = str(self.file)

    def cause(self) -> str | None:
        """The error in it that the others follow from, without the lines around it."""
        if self.file is None or not self.file.is_file():
            return None
        with self.file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                found = _ERROR.search(_COLOURS.sub("", line.rstrip()))
                if found and not any(each in found[2] for each in _CONSEQUENCES):
                    return found[2]
        return None

    def remove(self) -> None:
        """Remove the file, after an end without a fault."""
        if self.file is not None:
            shutil.rmtree(self.file.parent, ignore_errors=True)


def _config(file: Path) -> dict[str, object]:
    line = "%(asctime)s %(levelname)s %(processName)s[%(process)d] %(name)s: %(message)s"
    handler = {
        "class": "logging.FileHandler",
        "filename": str(file),
        "delay": True,
        "formatter": "line",
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": line}},
        "handlers": {"file": handler},
        "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
    }
