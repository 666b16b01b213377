"""The DeepSpeed engine: the same model and loss, with ZeRO in place of megatron-core's optimizer.

Over the data-parallel ranks, ZeRO splits the optimizer state (stage 1), also the gradients (stage
2), and also the weights (stage 3). Tensor parallelism is megatron-core's; DeepSpeed gets its
groups.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from megatron.core import parallel_state
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor, nn

from megatron_chameleon.checkpoint.formats.base import CheckpointReader
from megatron_chameleon.checkpoint.loading.model import build_first_model
from megatron_chameleon.checkpoint.names.adapters import is_adapter
from megatron_chameleon.checkpoint.state.deepspeed_state import (
    DeepSpeedSnapshot,
    ShardedState,
    update_weights,
    updated_tensors,
)
from megatron_chameleon.checkpoint.state.reader import TrainingCheckpoint
from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.model.fp8 import kept_fp8_scales
from megatron_chameleon.model.initialization import named_global_parameters
from megatron_chameleon.model.tuning.selection import select_trained
from megatron_chameleon.model.tuning.trainable import set_trainable
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.random_streams import seed_random
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.schedules.learning_rate import LearningRate, StepScheduler
from megatron_chameleon.training.engines.ema import WeightAverage
from megatron_chameleon.training.engines.inputs import micro_batch_shape, own_part, run_model
from megatron_chameleon.training.engines.objective import (
    Measurement,
    held_out_measurement,
    loss_count,
    summed_loss,
)
from megatron_chameleon.training.engines.optimizer import build_torch_adamw
from megatron_chameleon.training.metrics.step_metrics import StepMonitor
from megatron_chameleon.training.metrics.stragglers import StepClock
from megatron_chameleon.training.run.skipped_steps import count_updates

BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default; it allocates whole buckets


class DeepSpeedEngine:
    """This rank's share of the training state. Its arguments are those of ``build_engine``."""

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        topology: Topology,
        learning_rate: LearningRate | None = None,
        image_ids: Sequence[int] = (),
        weights: CheckpointReader | None = None,
    ) -> None:
        self.config = config
        self.topology = topology
        (self.model,) = build_first_model(config, vocab_size, topology, weights)
        self.selection = select_trained(config, vocab_size, image_ids)
        set_trainable(self.selection, [self.model], topology.tensor_rank)
        self.monitor = StepMonitor([self.model], topology.tensor_size)
        self.clock = StepClock()
        # ZeRO 3 takes the weights apart, so their shapes are noted first.
        # Beside an adapter, the frozen weights are neither saved nor loaded.
        is_kept = is_adapter if config.adapter.rank else None
        self._state = ShardedState(self.model, self.selection.split_stacks, is_kept)
        _sum_shared_gradients(self.model, config)
        self.engine, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=build_torch_adamw(config, self.model),
            config=deepspeed_config(config, self.model),
            mpu=_ModelParallelUnit(),
        )
        rate = learning_rate or LearningRate.of(config)
        self.scheduler = StepScheduler(self.engine.optimizer, rate, config.optimizer.weight_decay)
        self.average = WeightAverage(
            config.training.ema_decay,
            tensors=lambda: updated_tensors(self.engine.optimizer),
            publish=lambda: update_weights(self.engine.optimizer),
        )

    @property
    def parts(self) -> list[nn.Module]:
        """The model, which has one part."""
        return [self.model]

    def train_step(
        self, step: int, micro_batches: Sequence[Batch], *, update: bool = True
    ) -> dict[str, Any]:
        """Do one step; see ``TrainingEngine``."""
        start = time.perf_counter()
        grad_norm, updated, metrics = self._pass(step, micro_batches, update=update)
        metrics["grad_norm"] = grad_norm
        if updated:
            self.average.update()
        else:
            metrics["skipped"] = True
        metrics["learning_rate"] = float(self.engine.optimizer.param_groups[0]["lr"])
        self.scheduler.step(1)
        metrics["step_seconds"] = time.perf_counter() - start
        return metrics

    def repeat_pass(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """Repeat a step's passes; see ``TrainingEngine``."""
        self._pass(step, micro_batches, update=False)

    @torch.no_grad()
    def evaluate(
        self, micro_batches: Sequence[Batch], measurement: Measurement | None = None
    ) -> Tensor:
        """Numbers of micro-batches that are not trained; see ``TrainingEngine``."""
        taken = measurement or held_out_measurement(self.config)
        shape = micro_batch_shape(self.config, micro_batches)
        sums: list[Tensor] = []
        self.engine.eval()
        try:
            with kept_fp8_scales(self.parts):
                for whole_batch in micro_batches:
                    batch, documents = own_part(whole_batch, shape)
                    sums.append(taken.values(batch, run_model(self.engine, batch, documents)))
        finally:
            self.engine.train()
        return torch.stack(sums)

    def _pass(
        self, step: int, micro_batches: Sequence[Batch], *, update: bool
    ) -> tuple[float, bool, dict[str, Any]]:
        """Compute the gradients and update the weights.

        Every ZeRO stage drops gradients whose norm is not finite before it changes anything. So a
        loss that is not finite is made to give such gradients, and a step that is to make no
        update gets one.

        Returns:
            The norm of the gradients, whether the weights were updated, and the other metrics.
        """
        training = self.config.training
        self._expect(len(micro_batches))
        self.engine.train()
        # DeepSpeed averages over the data-parallel ranks; the loss is a mean over all unmasked
        # tokens.
        scale = self.topology.data_size / self._count_tokens(micro_batches)
        trained = next(p for p in self.model.parameters() if p.requires_grad)
        nan_hook = trained.register_hook(_make_nan) if not update else None
        norm, updated, metrics = 0.0, False, {}
        numbers = self.topology.micro_batch_numbers(len(micro_batches))
        shape = micro_batch_shape(self.config, micro_batches)
        for number, whole_batch in zip(numbers, micro_batches, strict=True):
            seed_random(training.seed, step - 1, number, self.topology)
            batch, documents = own_part(whole_batch, shape)
            self.clock.start()
            output = run_model(self.engine, batch, documents)
            loss = summed_loss(batch, output, training.z_loss, self.monitor, self.config.dpo)
            # ZeRO reduces gradients during the backward pass, so the clock stops before it.
            self.clock.stop("backward, gradient reduction and update")
            scale_or_nan = scale + 0 * loss.detach()  # NaN if the loss is infinite or NaN
            self.engine.backward(scale_or_nan * loss, scale_wrt_gas=False)
            if self.engine.is_gradient_accumulation_boundary():
                metrics = self.monitor.finish_step(training.z_loss).values()
            norm, updated = self._step()
        if nan_hook is not None:
            nan_hook.remove()
        return norm, updated, metrics

    def _expect(self, micro_batches: int) -> None:
        """Tell DeepSpeed how many micro-batches the step has, which a batch-size warm-up changes.

        DeepSpeed takes its count of all micro-batches so far for the place in the step. After a
        change that would end a step too early or too late, so its count begins again.
        """
        if micro_batches != self.engine.gradient_accumulation_steps():
            size = micro_batches * self.config.training.micro_batch_size * self.topology.data_size
            self.engine.set_train_batch_size(size)
            self.engine.micro_steps = 0

    def _step(self) -> tuple[float, bool]:
        """Let DeepSpeed count the micro-batch, and update after the last one.

        Returns:
            The norm of the gradients, and whether the weights were updated.
        """
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
            return 0.0, False
        if self.config.engine.zero_stage:
            self.engine.step()
            return float(self.engine.get_global_grad_norm()), self.engine.was_step_applied()
        norm = self._clip_gradients()
        is_finite = math.isfinite(norm)
        if not is_finite:  # AdamW does not touch parameters without a gradient
            for parameter in self.model.parameters():
                parameter.grad = None
        self.engine.step()
        return norm, is_finite

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of the parameters; see ``TrainingEngine``."""
        for name, parameter in named_global_parameters(self.model):
            yield name, _own_part(parameter)

    def _count_tokens(self, micro_batches: Sequence[Batch]) -> float:
        """Unmasked tokens, or pairs, of the whole global batch, at least 1."""
        tokens = torch.zeros(1, dtype=torch.float64, device=platform.device())
        for batch in micro_batches:
            tokens += loss_count(batch).to(tokens.device)
        torch.distributed.all_reduce(tokens, group=parallel_state.get_data_parallel_group())
        return max(tokens.item(), 1.0)

    def _clip_gradients(self) -> float:
        """Clip as DeepSpeed does without ZeRO, where it does not report the norm; returns it."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        own = [p.grad for p in parameters if param_is_not_tensor_parallel_duplicate(p)]
        norm = get_grad_norm_fp32(
            own, grad_stats_parallel_group=parallel_state.get_model_parallel_group()
        )
        if self.config.optimizer.clip_grad:
            clip_grad_by_total_norm_fp32(parameters, self.config.optimizer.clip_grad, norm)
        return norm

    def ema_weights(self) -> AbstractContextManager[None]:
        """Compute with the average of the weights; see ``TrainingEngine``."""
        return self.average.in_use()

    def complete_weights(self) -> None:
        """Nothing: DeepSpeed gathers updated weights at once, or (ZeRO 3) never keeps them."""

    def snapshot(self) -> DeepSpeedSnapshot:
        """The state to save."""
        return self._state.snapshot(self.engine.optimizer)

    def restore(self, checkpoint: Path, step: int) -> None:
        """Load the state of a checkpoint; see ``TrainingEngine``."""
        updates = count_updates(checkpoint, step)
        average = self.average.begin_restore(checkpoint, TrainingCheckpoint(checkpoint).names)
        self._state.restore(checkpoint, self.engine.optimizer, updates, average=average)
        self.scheduler.continue_after(step)

    def restore_weights(self, checkpoint: Path) -> None:
        """Load the weights only; see ``TrainingEngine``."""
        self.average.forget()
        self._state.restore_weights(checkpoint, self.engine.optimizer)

    def close(self) -> None:
        """Remove ZeRO's hooks on gradients, which keep the model alive; see ``TrainingEngine``.

        ZeRO 3 has others, which DeepSpeed 0.19 cannot remove.
        """
        self.engine.destroy()


def _own_part(parameter: Any) -> Tensor:
    """This rank's part of a parameter; under ZeRO 3 without the padding, which is never set."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    size = parameter.ds_tensor.numel()
    left = parameter.ds_numel - parallel_state.get_data_parallel_rank() * size
    return parameter.ds_tensor.narrow(0, 0, min(max(left, 0), size))


def deepspeed_config(config: Config, model: nn.Module) -> dict[str, Any]:
    """The configuration that ``deepspeed.initialize`` expects.

    Args:
        config: A checked config.
        model: This rank's part of the model, before ZeRO splits it.
    """
    training, engine = config.training, config.engine
    parameters = sum(parameter.numel() for parameter in model.parameters())
    offload = {"device": "cpu", "pin_memory": platform.has_gpu()}
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "reduce_bucket_size": min(BUCKET_ELEMENTS, parameters),
    }
    if engine.offload_optimizer:
        zero["offload_optimizer"] = offload
    if engine.offload_param:
        zero["offload_param"] = offload
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "train_batch_size": training.global_batch_size,
        "gradient_clipping": config.optimizer.clip_grad if engine.zero_stage else 0.0,
        "steps_per_print": None,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW on CPUs too: nothing to compile
        "zero_allow_untested_optimizer": True,
    }
    if training.dtype == "bf16":
        values["bf16"] = {"enabled": True}
        # As in the megatron-core engine, sums over micro-batches and ranks are in fp32.
        values["data_types"] = {"grad_accum_dtype": "fp32"}
        values["communication_data_type"] = "fp32"
    return values


class _ModelParallelUnit:
    """megatron-core's groups under the names that DeepSpeed asks for.

    "Model parallel" means tensor parallel here, because this engine has no pipeline.
    """

    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(
        parallel_state.get_tensor_model_parallel_world_size
    )
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_src_rank = get_model_parallel_src_rank
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)


def _sum_shared_gradients(model: nn.Module, config: Config) -> None:
    """Sum gradients over the tensor-parallel ranks where each rank computes only a part of them.

    These are the gradients of the norms if sequences are split, and those of the QK-norms always,
    since each rank sees only its own heads. The megatron-core engine sums them in
    ``finalize_model_grads``. Here it happens before a gradient is accumulated, so that every ZeRO
    stage sees the sum.
    """
    if config.parallel.tensor_model_parallel_size == 1:
        return
    group = parallel_state.get_tensor_model_parallel_group()
    for name, parameter in model.named_parameters():
        is_qk_norm = "q_layernorm" in name or "k_layernorm" in name
        if not parameter.requires_grad:
            continue
        if is_qk_norm or getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(partial(_sum_over, group))


def _make_nan(gradient: Tensor) -> Tensor:
    return gradient * math.nan


def _sum_over(group: torch.distributed.ProcessGroup, gradient: Tensor) -> Tensor:
    total = gradient.float().contiguous()
    torch.distributed.all_reduce(total, group=group)
    return total.to(gradient.dtype)
