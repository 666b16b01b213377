"""The entry point ``vllm.general_plugins``: tells vLLM where our model is.

vLLM calls ``register`` in every process that it starts, for models that are not ours too, and
perhaps twice. So it imports nothing but vLLM's registry.
"""

import os
import select
import signal
import threading
from contextlib import suppress

ARCHITECTURE = "ChameleonForConditionalGeneration"
MODEL = "megatron_chameleon.inference.vllm.plugins.model:ChameleonForConditionalGeneration"
SERVER_VARIABLE = "CHAMELEON_SERVER_PID"
"""The process of ``chameleon serve``, in the environment of what its vLLM starts."""
LOG_VARIABLE = "CHAMELEON_VLLM_LOG"
"""The file that takes the output of these processes."""


def register() -> None:
    """Register the model, as text: vLLM imports it where it is needed."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, MODEL)
    server = os.environ.get(SERVER_VARIABLE, "")
    if server not in ("", str(os.getpid())):
        _belong_to(int(server))


def _belong_to(server: int) -> None:
    """What vLLM's processes do only if ``chameleon serve`` started them."""
    if log := os.environ.get(LOG_VARIABLE):
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        for output in (1, 2):
            os.dup2(descriptor, output)
        os.close(descriptor)
    # vLLM's workers end with its engine process, but that one outlives a server that was killed
    if os.getppid() == server:
        threading.Thread(target=_end_after, args=(server,), daemon=True).start()


def _end_after(pid: int) -> None:
    """Wait for the end of a process, then ask this one to end."""
    with suppress(ProcessLookupError):
        select.select([os.pidfd_open(pid)], [], [])
    os.kill(os.getpid(), signal.SIGTERM)
