"""A run started by mpiexec or the deepspeed launcher gives the same numbers as by torchrun."""

import subprocess
import sys
from pathlib import Path

from command_server import free_port
from run_command import TIMEOUT_SECONDS, command, environment

BIN = Path(sys.executable).parent
SETTINGS = ("training.steps=6", "parallel.use_distributed_optimizer=true")
EXACT = ("step", "loss", "loss_text", "loss_image", "z_loss", "grad_norm", "learning_rate")


def launchers() -> dict[str, list[object]]:
    """The words before ``train`` for each launcher, with two processes."""
    port = free_port()
    module = ("-m", "megatron_chameleon")
    deepspeed = ("--num_gpus", 2, "--master_port", port, "--module", "megatron_chameleon")
    return {
        "torchrun": [*command(processes=2)],
        "mpiexec": [BIN / "mpiexec", "-n", 2, sys.executable, *module],
        "deepspeed": [sys.executable, BIN / "deepspeed", *deepspeed],
    }


def test_the_launcher_changes_nothing(tiny) -> None:
    processes = {}
    # All at once, since most of their time goes into starting Python.
    for name, start in launchers().items():
        words = (*start, "train", tiny.config, f"logging.run_dir={tiny.folder / name}", *SETTINGS)
        processes[name] = subprocess.Popen(
            list(map(str, words)),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    outputs = {name: p.communicate(timeout=TIMEOUT_SECONDS)[0] for name, p in processes.items()}
    for name, process in processes.items():
        assert process.returncode == 0, outputs[name]
        assert "2 processes: tensor 1 x pipeline 1 x data 2" in outputs[name]
    torchrun, *others = (
        [[record[key] for key in EXACT] for record in tiny.metrics(name)] for name in processes
    )
    assert len(torchrun) == 6
    assert all(other == torchrun for other in others)
