"""The parts of a layer that depend on the machine: matrix products, norms and core attention.

megatron-core calls such a selection a backend (``BackendSpecProvider``). Only ``select_backend``
chooses one. Dimension letters in tensor names: S sequence, B batch, N heads of this rank,
G key/value heads of this rank, D head size.
"""

from typing import Any

from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from megatron_chameleon.config.schema import Config, Fp8Config
from megatron_chameleon.errors import ConfigError, ConfigErrors
from megatron_chameleon.model.fp8_linear import (
    EmulatedColumnParallelLinear,
    EmulatedRowParallelLinear,
)
from megatron_chameleon.model.fusions import fusion_problems
from megatron_chameleon.model.isolation import IsolatedDocuments
from megatron_chameleon.model.quantized.linear import (
    QuantizedColumnParallelLinear,
    QuantizedRowParallelLinear,
    is_installed,
)
from megatron_chameleon.parallel import platform


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose gradient is summed over tensor-parallel ranks if they split the sequence."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ScaledDotProductAttention(MegatronModule):
    """Core attention by torch's fused kernel, for machines without Transformer Engine.

    megatron-core's own unfused attention writes out the S x S scores. On CPUs, torch's kernel makes
    the whole model about a tenth faster.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: None,
        *,
        packed_seq_params: IsolatedDocuments | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend causally, over each sequence or within each document; returns [S, B, N * D]."""
        assert attention_mask is None, "documents are isolated by their lengths"
        if packed_seq_params is not None:
            assert packed_seq_params.groups is not None, "torch's attention takes no packed tensors"
            attend = packed_seq_params.groups.attend
            return attend(self._causal, query_SBND, key_SBGD, value_SBGD).flatten(2)
        q_BNSD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        return self._causal(q_BNSD, k_BGSD, v_BGSD).permute(2, 0, 1, 3).flatten(2)

    def _causal(self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(
            q_BNSD,
            k_BGSD,
            v_BGSD,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            enable_gqa=q_BNSD.size(1) != k_BGSD.size(1),
        )


class LocalBackend(LocalSpecProvider):
    """megatron-core's own linear layers, torch's RMSNorm and torch's fused attention."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return ScaledDotProductAttention


class EmulatedFp8Backend(LocalBackend):
    """Linear layers that quantise as Transformer Engine's FP8 layers do.

    Args:
        fp8: The FP8 recipe.
    """

    def __init__(self, fp8: Fp8Config) -> None:
        self._params = {"fp8": fp8}

    def column_parallel_linear(self) -> ModuleSpec:
        return ModuleSpec(EmulatedColumnParallelLinear, params=self._params)

    def row_parallel_linear(self) -> ModuleSpec:
        return ModuleSpec(EmulatedRowParallelLinear, params=self._params)


class QuantizedBackend(LocalBackend):
    """Frozen linear layers in 4 bits."""

    def column_parallel_linear(self) -> type:
        return QuantizedColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return QuantizedRowParallelLinear


class TransformerEngineBackend(TESpecProvider):
    """Transformer Engine's linear layers, norms and attention.

    Norms remain modules of their own, so that names, checkpoints and norm orders are the same as
    with the other backends.

    Args:
        own_attention: Whether attention is Transformer Engine's too; otherwise it is torch's.
        is_quantized: Whether the linear layers are bitsandbytes' in 4 bits.
    """

    def __init__(self, own_attention: bool, is_quantized: bool = False) -> None:
        self._own_attention, self._is_quantized = own_attention, is_quantized

    def column_parallel_linear(self) -> type:
        own: type = super().column_parallel_linear()
        return QuantizedColumnParallelLinear if self._is_quantized else own

    def row_parallel_linear(self) -> type:
        own: type = super().row_parallel_linear()
        return QuantizedRowParallelLinear if self._is_quantized else own

    def fuse_layernorm_and_linear(self) -> bool:
        return False

    def core_attention(self) -> type:
        return super().core_attention() if self._own_attention else ScaledDotProductAttention


def select_backend(config: Config) -> BackendSpecProvider:
    """The backend for a config on this machine."""
    if config.fp8.format is not None and config.fp8.emulate:
        return EmulatedFp8Backend(config.fp8)
    if platform.has_transformer_engine():
        isolated = config.data.reset_attention
        own_attention = not isolated or packs_documents(config)
        return TransformerEngineBackend(own_attention, config.adapter.quantize != "none")
    return LocalBackend() if config.adapter.quantize == "none" else QuantizedBackend()


def packs_documents(config: Config) -> bool:
    """Whether isolated documents are computed as one packed sequence, by Transformer Engine.

    Its attention for packed sequences is for 16 bits. What it has for fp32 writes out the scores.
    """
    emulated = config.fp8.format is not None and config.fp8.emulate
    packable = config.training.dtype == "bf16" and not emulated
    isolated = bool(config.data.reset_attention)
    return isolated and packable and platform.has_transformer_engine()


def layer_backend(
    backend: BackendSpecProvider, config: TransformerConfig, layer: int
) -> BackendSpecProvider:
    """The backend of one layer: plain linear layers where the emulated recipe does not use FP8.

    With Transformer Engine, megatron-core itself keeps such layers out of its FP8 context.

    Args:
        backend: From ``select_backend``.
        config: megatron-core's config.
        layer: Number of the layer in the whole model, from 0.
    """
    if isinstance(backend, EmulatedFp8Backend) and is_first_last_bf16_layer(config, layer):
        return LocalBackend()
    return backend


def check_machine(config: Config) -> None:
    """Refuse to train what this machine cannot compute. It needs no process group.

    Raises:
        ConfigErrors: They say what the machine lacks.
    """
    if problems := machine_problems(config):
        raise ConfigErrors(problems)


def machine_problems(config: Config) -> list[ConfigError]:
    """Settings for which this machine lacks the hardware or a package."""
    problems = []
    fp8, cp = config.fp8, config.parallel.context_parallel_size
    if fp8.format is not None and not fp8.emulate and (obstacle := platform.fp8_obstacle()):
        remedy = (
            "Set fp8.emulate=true to see the recipe's effect, or run on H100/H200 with Transformer "
            "Engine"
        )
        problems.append(ConfigError("fp8.format", f"{fp8.format} {obstacle}", remedy))
    if cp > 1 and not platform.has_transformer_engine():
        what = f"{cp} needs a GPU with Transformer Engine, and this machine has none"
        remedy = "Set it to 1, and split sequences by tensor parallelism with sequence_parallel"
        problems.append(ConfigError("parallel.context_parallel_size", what, remedy))
    if config.adapter.quantize != "none" and not is_installed():
        what = f"{config.adapter.quantize} needs bitsandbytes, which is not installed"
        remedy = "Run pip install -c constraints.txt 'megatron_chameleon[qlora]', or set it to none"
        problems.append(ConfigError("adapter.quantize", what, remedy))
    return [*problems, *fusion_problems(config)]
