"""Both directions of the table of tensor names."""

import pytest
import torch
from torch import Tensor

from megatron_chameleon.checkpoint.names.mappings import Dimensions
from megatron_chameleon.checkpoint.names.norm_groups import norm_groups
from megatron_chameleon.checkpoint.names.tensor_rows import TensorRow, tensor_rows
from megatron_chameleon.errors import CheckpointError
from tiny_model import PADDED_VOCAB_SIZE, VOCAB_SIZE, model_config, random_tensors


def all_rows(norm_order: str = "pre", groups: int = 2) -> list[TensorRow]:
    model = model_config(norm_order, groups)
    return list(tensor_rows(Dimensions.of(model, VOCAB_SIZE, groups, min(groups, 2))))


def row_of(name: str, layer: int | None = 1) -> TensorRow:
    return next(p for p in all_rows() if p.megatron_name.endswith(name) and p.layer == layer)


def read(tensors: dict[str, Tensor], row: TensorRow) -> Tensor:
    tensor = tensors[row.megatron_name]
    return tensor if row.layer is None else tensor[row.layer]


@pytest.mark.parametrize("norm_order", ["pre", "swin"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_there_and_back_is_bit_for_bit(norm_order: str, groups: int) -> None:
    model = model_config(norm_order, groups)
    tensors = random_tensors(model, PADDED_VOCAB_SIZE)
    seen = set()
    for row in all_rows(norm_order, groups):
        original = read(tensors, row)
        again = row.to_megatron(row.to_hf(original))
        assert again.shape == row.shape
        assert torch.equal(again, original[: row.shape[0]])
        seen.add(row.megatron_name)
    assert seen == set(tensors)


def test_every_hf_name_occurs_once_and_the_set_is_that_of_the_hf_model() -> None:
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    from megatron_chameleon.checkpoint.formats.hf import VQ_PREFIX

    names = [name for row in all_rows() for name in row.hf_names]
    with torch.device("meta"):
        model = ChameleonForConditionalGeneration(
            ChameleonConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=48,
                intermediate_size=40,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocabulary_map={"<image>": 3},
            )
        )
    expected = {n: t.shape for n, t in model.state_dict().items() if not n.startswith(VQ_PREFIX)}
    assert len(names) == len(set(names))
    assert set(names) == set(expected)
    tensors = random_tensors(model_config(), PADDED_VOCAB_SIZE)
    for row in all_rows():
        for name, tensor in row.to_hf(read(tensors, row)).items():
            assert tensor.shape == expected[name], name


def test_fused_qkv_is_laid_out_query_group_by_query_group() -> None:
    """Each row contains its head's number: in group 0, query heads 0 and 1, key 100, value 200."""
    heads = torch.tensor([0, 1, 100, 200, 2, 3, 101, 201])
    fused = heads.repeat_interleave(12)[:, None].expand(-1, 48)
    q, k, v = row_of("linear_qkv.weight").to_hf(fused).values()
    assert q[::12, 0].tolist() == [0, 1, 2, 3]
    assert k[::12, 0].tolist() == [100, 101]
    assert v[::12, 0].tolist() == [200, 201]


def test_gate_comes_before_up() -> None:
    fused = torch.cat([torch.zeros(40, 48), torch.ones(40, 48)])
    tensors = row_of("linear_fc1.weight").to_hf(fused)
    assert tensors["model.layers.1.mlp.gate_proj.weight"].sum() == 0
    assert tensors["model.layers.1.mlp.up_proj.weight"].min() == 1


def test_neighbouring_heads_share_a_norm() -> None:
    shared = torch.tensor([1.0, 2.0])[:, None].expand(2, 12)
    (per_head,) = row_of("q_layernorm.weight").to_hf(shared).values()
    assert per_head[:, 0].tolist() == [1, 1, 2, 2]


def test_padding_rows_are_cut() -> None:
    rows = torch.arange(PADDED_VOCAB_SIZE)[:, None].expand(-1, 48)
    (cut,) = row_of("output_layer.weight", None).to_hf(rows).values()
    assert cut[:, 0].tolist() == list(range(VOCAB_SIZE))


def test_norms_that_differ_within_a_group_are_refused() -> None:
    row = row_of("q_layernorm.weight")
    per_head = torch.arange(4.0)[:, None].expand(4, 12)
    with pytest.raises(CheckpointError, match="heads differ within the 2 groups"):
        row.to_megatron({row.hf_names[0]: per_head})


@pytest.mark.parametrize(
    ("heads", "groups"),
    [([1, 1, 1, 1], 1), ([1, 1, 2, 2], 2), ([1, 2, 1, 2], 4), ([1, 2, 2, 1], 4), ([1, 2, 3, 4], 4)],
)
def test_norm_groups_are_found_in_the_tensors(heads: list[int], groups: int) -> None:
    weight = torch.tensor(heads)[:, None].expand(4, 12)
    assert norm_groups([torch.ones(4, 12), weight]) == groups
