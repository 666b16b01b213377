"""The parts of a layer that depend on the machine: matrix products, norms and core attention.

megatron-core calls such a choice a backend (``BackendSpecProvider``); ``select_backend`` is the one
place that chooses. Dimension letters in tensor names: S sequence, B batch, N heads of this rank,
G key/value heads of this rank, D head size.
"""

from typing import Any

from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from megatron_chameleon.config.schema import Config


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose gradient is summed over the tensor-parallel ranks where sequences are split."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ScaledDotProductAttention(MegatronModule):
    """Core attention by torch's fused kernel, for machines without Transformer Engine.

    megatron-core's own unfused attention writes the S x S scores out; on CPUs this is about a tenth
    faster for the whole model.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        mask_B1SS: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend causally, or where ``mask_B1SS`` is False; returns [S, B, N * D]."""
        q_BNSD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        out_BNSD = functional.scaled_dot_product_attention(
            q_BNSD,
            k_BGSD,
            v_BGSD,
            dropout_p=self.dropout if self.training else 0.0,
            attn_mask=None if mask_B1SS is None else ~mask_B1SS,
            is_causal=mask_B1SS is None,
            enable_gqa=q_BNSD.size(1) != k_BGSD.size(1),
        )
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)


class LocalBackend(LocalSpecProvider):
    """megatron-core's own linear layers, torch's RMSNorm and torch's fused attention."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return ScaledDotProductAttention


def select_backend(config: Config) -> BackendSpecProvider:
    """The backend of this machine for a config."""
    return LocalBackend()
