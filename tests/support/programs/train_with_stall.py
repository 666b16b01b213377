"""Run ``chameleon train ARGUMENTS`` with rank 1 slow in four steps, and stuck in the sixth."""

import sys
import time
from typing import Any

from megatron_chameleon.cli.main import main
from megatron_chameleon.training.engines.megatron import MegatronEngine

SLOW_SECONDS = 0.3  # per micro-batch, whose passes take some hundredths of a second


def plant_stall() -> None:
    forward_step = MegatronEngine._forward_step

    def stalling_forward_step(self: MegatronEngine, step: int, *rest: Any) -> Any:
        if self.topology.rank == 1:
            if step <= 4:
                time.sleep(SLOW_SECONDS)
            elif step == 6:
                stuck_in_the_model()
        return forward_step(self, step, *rest)

    MegatronEngine._forward_step = stalling_forward_step  # type: ignore[method-assign]


def stuck_in_the_model() -> None:
    time.sleep(10_000)


if __name__ == "__main__":
    plant_stall()
    main(["train", *sys.argv[1:]])
