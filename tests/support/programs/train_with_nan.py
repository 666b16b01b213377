"""Run ``chameleon train ARGUMENTS`` with a NaN planted in a weight of rank 1 before step 3."""

import sys
from collections.abc import Sequence

import torch

from megatron_chameleon.cli.main import main
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.training.engines.megatron import MegatronEngine

WEIGHT = "decoder.layers.1.mlp.linear_fc2.weight"


def plant_nan() -> None:
    train_step = MegatronEngine.train_step

    def train_step_with_nan(
        self: MegatronEngine, step: int, micro_batches: Sequence[Batch], **options: bool
    ) -> dict[str, float | None]:
        if step == 3 and self.topology.rank == 1:
            with torch.no_grad():
                self.parts[0].get_parameter(WEIGHT)[3, 5] = torch.nan
        return train_step(self, step, micro_batches, **options)

    MegatronEngine.train_step = train_step_with_nan  # type: ignore[method-assign]


if __name__ == "__main__":
    plant_nan()
    main(["train", *sys.argv[1:]])
