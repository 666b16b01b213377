"""How a micro-batch gets to its device."""

import pytest
import torch
from torch import Tensor

from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.parallel import platform
from megatron_chameleon.training.engines import objective


def test_a_gpu_gets_its_batch_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        assert 0 not in tensor.stride()  # torch refuses to pin an expanded tensor
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(platform, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(objective, "get_batch_on_this_cp_rank", lambda tensors: tensors)
    ids, positions = torch.arange(8).view(2, 4), torch.arange(4).expand(2, -1)
    batch = Batch(ids, ids + 1, torch.ones(2, 4), ids < 4, positions)
    assert torch.equal(objective.own_part(batch).position_ids, positions)
    assert not pinned  # a CPU needs no pinned memory
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    found = objective.own_part(batch)
    assert len(pinned) == 5 and found.attention_mask is None
    for name, tensor in vars(found).items():
        assert tensor is None or torch.equal(tensor, getattr(batch, name)), name
