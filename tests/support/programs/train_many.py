"""Train several configs one after the other in the processes of one launch, to save launches.

    torchrun --nproc-per-node 2 tests/support/programs/train_many.py CONFIG RUNS.json

RUNS.json maps a run folder to the overrides of its config; ``--resume`` or ``--start-from`` may be
one of them, followed by its folder.
"""

import json
import sys
from pathlib import Path

from megatron_chameleon.cli.logs import shown_logs
from megatron_chameleon.config.load import load_config
from megatron_chameleon.parallel.launch import find_launch, join_process_group, leave_process_group
from megatron_chameleon.parallel.megatron_setup import prepare_megatron
from megatron_chameleon.training.faults.signals import StopSignals
from megatron_chameleon.training.loop import train_joined
from megatron_chameleon.training.prepare import prepare_run
from megatron_chameleon.training.records.events import EventLog


def main() -> None:
    config_file, runs_file = sys.argv[1:]
    launch = find_launch()
    prepare_megatron()
    for run, words in json.loads(Path(runs_file).read_text(encoding="utf-8")).items():
        option = next((word for word in words if word in ("--resume", "--start-from")), None)
        resume = words.pop(words.index(option) + 1) if option else "auto"
        overrides = [word for word in words if word != option]
        config = load_config(config_file, [*overrides, f"logging.run_dir={run}"])
        inputs = prepare_run(
            config, launch.world_size, resume, weights_only=option == "--start-from"
        )
        # Each run joins anew: the groups of the one before keep 70 threads until then.
        join_process_group(launch)
        with shown_logs(), EventLog(config, launch.rank) as events:
            train_joined(inputs, StopSignals(), events)
        leave_process_group()


if __name__ == "__main__":
    main()
