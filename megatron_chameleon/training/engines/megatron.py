"""The megatron-core engine: model, gradients, optimizer and schedule behind one ``train_step``."""

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron_chameleon.checkpoint.formats.base import CheckpointReader
from megatron_chameleon.checkpoint.loading.model import build_first_model
from megatron_chameleon.checkpoint.names.adapters import is_adapter
from megatron_chameleon.checkpoint.names.partial_state import split_in, weight_to_load
from megatron_chameleon.checkpoint.state.megatron_optimizer import load_optimizer, sharded_optimizer
from megatron_chameleon.checkpoint.state.reader import TrainingCheckpoint
from megatron_chameleon.checkpoint.state.torch_dist import ShardedSnapshot, load_sharded
from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.reader import Batch
from megatron_chameleon.model.chameleon import ChameleonModel
from megatron_chameleon.model.fp8 import kept_fp8_scales
from megatron_chameleon.model.fp8_linear import start_fp8_step
from megatron_chameleon.model.fusions import add_weight_gradients_in_products, select_fusions
from megatron_chameleon.model.initialization import named_global_parameters
from megatron_chameleon.model.tuning.selection import select_trained
from megatron_chameleon.model.tuning.trainable import set_trainable
from megatron_chameleon.parallel.random_streams import seed_random
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.schedules.learning_rate import LearningRate, StepScheduler
from megatron_chameleon.training.engines.ema import WeightAverage
from megatron_chameleon.training.engines.evaluation import evaluate_batches
from megatron_chameleon.training.engines.gradient_groups import GradientGroups
from megatron_chameleon.training.engines.inputs import (
    MicroBatchShape,
    micro_batch_shape,
    own_part,
    run_model,
)
from megatron_chameleon.training.engines.objective import Measurement, loss_count, summed_loss
from megatron_chameleon.training.engines.optimizer import build_optimizer
from megatron_chameleon.training.metrics.step_metrics import StepMonitor
from megatron_chameleon.training.metrics.stragglers import StepClock
from megatron_chameleon.training.run.skipped_steps import count_updates


class MegatronEngine:
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
        self.parts = build_first_model(config, vocab_size, topology, weights)
        self.selection = select_trained(config, vocab_size, image_ids)
        set_trainable(self.selection, self.parts, topology.tensor_rank)
        self.monitor = StepMonitor(self.parts, topology.tensor_size)
        self.clock = StepClock()
        transformer = self.parts[0].config
        self.chunks = [_wrap(config, transformer, part) for part in self.parts]
        self.optimizer = build_optimizer(config, self.chunks)
        rate = learning_rate or LearningRate.of(config)
        self.scheduler = StepScheduler(self.optimizer, rate, config.optimizer.weight_decay)
        self.average = WeightAverage(
            config.training.ema_decay, self._updated_tensors, self._publish_weights
        )
        self.gradients = GradientGroups(self.parts, self.optimizer)
        transformer.finalize_model_grads_func = self._finalize_gradients
        transformer.grad_scale_func = self.optimizer.scale_loss
        if config.parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            transformer.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self._forward_backward = get_forward_backward_func()

    def train_step(
        self, step: int, micro_batches: Sequence[Batch], *, update: bool = True
    ) -> dict[str, Any]:
        """Do one step; see ``TrainingEngine``."""
        start = time.perf_counter()
        self.compute_gradients(step, micro_batches)
        overflows, squares = self._measure_gradients()
        metrics = self.monitor.finish_step(self.config.training.z_loss).values()  # the host waits
        metrics["learning_rate"] = self._learning_rate()
        metrics["grad_norm"], of_groups = self.gradients.norms(squares)
        values = (metrics["loss"] or 0.0, metrics["grad_norm"])
        update = update and not overflows and all(map(math.isfinite, values))
        if update:
            self._update(metrics["grad_norm"])
        metrics |= of_groups if update else {"skipped": True}
        self.scheduler.step(1)
        metrics["step_seconds"] = time.perf_counter() - start
        return metrics

    def _learning_rate(self) -> float:
        """The learning rate of this step; a rank where everything is frozen has no group."""
        groups = self.optimizer.param_groups
        return float(groups[0]["lr"] if groups else self.scheduler.get_lr({}))

    @torch.no_grad()
    def _measure_gradients(self) -> tuple[bool, Tensor]:
        """Whether a scaled loss overflowed (fp16), and the gradients' squares on the device."""
        return self.optimizer.prepare_grads(), self.gradients.squares()

    @torch.no_grad()
    def _update(self, norm: float) -> None:
        """The rest of megatron-core's ``optimizer.step()``: clipping and the update.

        Unless the loss is scaled (fp16), megatron-core's own step updates whatever the norm is.
        Called in its parts, the step can stop before the update, which cannot be undone.

        Args:
            norm: Of all gradients.
        """
        limit = self.optimizer.config.clip_grad  # 0 or infinity: no clipping
        for member in self._members():
            if 0 < limit < math.inf and (parameters := member.get_parameters()):
                clip_grad_by_total_norm_fp32(parameters, limit, norm)
        self.optimizer.step_with_ready_grads()
        self.average.update()

    def _members(self) -> list[Any]:
        """The optimizers that megatron-core has chained, or the only one."""
        return getattr(self.optimizer, "chained_optimizers", [self.optimizer])

    def _updated_tensors(self) -> Iterator[tuple[Optimizer, Tensor]]:
        for member in self._members():
            for group in member.param_groups:
                for weight in group["params"]:
                    yield member.optimizer, weight

    def _publish_weights(self) -> None:
        """Copy the optimizer's main weights to the model's weights on all ranks."""
        for member in self._members():
            if hasattr(member, "_copy_main_params_to_model_params"):
                member._copy_main_params_to_model_params()
        if self.config.parallel.use_distributed_optimizer:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def ema_weights(self) -> AbstractContextManager[None]:
        """Compute with the average of the weights; see ``TrainingEngine``."""
        return self.average.in_use()

    def repeat_pass(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """Repeat a step's passes; see ``TrainingEngine``."""
        self.compute_gradients(step, micro_batches)
        self.monitor.finish_step(self.config.training.z_loss)

    def evaluate(
        self, micro_batches: Sequence[Batch], measurement: Measurement | None = None
    ) -> Tensor:
        """Numbers of micro-batches that are not trained; see ``TrainingEngine``."""
        with kept_fp8_scales(self.parts):
            return evaluate_batches(self.config, self.chunks, micro_batches, measurement)

    def compute_gradients(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """Run the forward and backward passes; gradients are then those of the whole run's loss."""
        numbers = self.topology.micro_batch_numbers(len(micro_batches))
        shape = micro_batch_shape(self.config, micro_batches)
        for part in self.parts:
            start_fp8_step(part)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.clock.start()
        self._forward_backward(
            forward_step_func=partial(self._forward_step, step, shape),
            data_iterator=[zip(numbers, micro_batches, strict=True) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(micro_batches),
            seq_length=shape.tokens,
            micro_batch_size=shape.samples,
            forward_only=False,
        )

    def _finalize_gradients(self, *args: Any, **kwargs: Any) -> None:
        """What megatron-core does after the last backward pass, where ranks wait for each other."""
        self.clock.stop()
        finalize_model_grads(*args, **kwargs)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters under their names in the whole model."""
        for part in self.parts:
            yield from named_global_parameters(part)

    def _forward_step(
        self,
        step: int,
        shape: MicroBatchShape,
        micro_batches: Iterator[tuple[int, Batch]],
        model: nn.Module,
    ) -> tuple[Any, Callable[[Any], tuple[Tensor, Tensor, dict]]]:
        number, whole_batch = next(micro_batches)
        seed_random(self.config.training.seed, step - 1, number, self.topology)
        batch, documents = own_part(whole_batch, shape)
        return run_model(model, batch, documents), partial(self._loss, batch)

    def _loss(
        self, batch: Batch, output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, dict]:
        """The sum over tokens or pairs; megatron-core divides it by the global batch's number."""
        z_loss, dpo = self.config.training.z_loss, self.config.dpo
        loss = summed_loss(batch, output, z_loss, self.monitor, dpo)
        return loss, loss_count(batch), {}

    def complete_weights(self) -> None:
        """Gather what the next forward pass would gather; see ``TrainingEngine``."""
        if self.config.parallel.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def snapshot(self) -> ShardedSnapshot:
        """The state to save."""
        self.complete_weights()
        model = self._sharded_model()
        split, metadata = self.selection.split_stacks, self._checkpoint_metadata()
        optimizer = sharded_optimizer(self.optimizer, model, metadata, split)
        return ShardedSnapshot({"model": model, "optimizer": optimizer})

    def restore(self, checkpoint: Path, step: int) -> None:
        """Load the state of a checkpoint; see ``TrainingEngine``."""
        stored = TrainingCheckpoint(checkpoint).names
        model, metadata = self._sharded_model(), self._checkpoint_metadata()
        updates = count_updates(checkpoint, step)
        average = self.average.begin_restore(checkpoint, stored)
        load_optimizer(
            *(self.optimizer, model, metadata, checkpoint, stored, updates),
            average=average,
            split=self.selection.split_stacks | split_in(stored),
        )
        self._load_weights(checkpoint, stored, fp8_state=True)
        self.scheduler.continue_after(step)

    def restore_weights(self, checkpoint: Path) -> None:
        """Load the weights only; see ``TrainingEngine``."""
        self.average.forget()
        self._load_weights(checkpoint, TrainingCheckpoint(checkpoint).names, fp8_state=False)
        self.optimizer.reload_model_params()  # the fp32 copies of bf16 weights

    def close(self) -> None:
        """Nothing outlives the engine; see ``TrainingEngine``."""

    def _load_weights(self, checkpoint: Path, stored: Collection[str], *, fp8_state: bool) -> None:
        model, split = self._sharded_model(), split_in(stored)
        for part in model.values():
            for name, value in list(part.items()):
                # These are Transformer Engine's scales; other engines' checkpoints have none.
                if name.endswith("_extra_state"):
                    if not fp8_state or getattr(value, "unique_key", "") not in stored:
                        del part[name]
                else:
                    part[name] = weight_to_load(value, value.data.dtype, stored, split)
        # Of some layers it may be the main weights that are read, and of others the weights.
        loaded = load_sharded(checkpoint, model, is_whole=not split)
        for i, part in enumerate(self.parts):
            part.load_state_dict(loaded[_part_key(i)], strict=False)  # no weight is missing

    def _sharded_model(self) -> dict[str, Any]:
        """The weights as megatron-core's sharded tensors, with their global positions.

        Beside an adapter, the frozen weights are neither saved nor loaded.
        """
        metadata = self._checkpoint_metadata()
        state = {
            _part_key(i): part.sharded_state_dict(metadata=metadata)
            for i, part in enumerate(self.parts)
        }
        if not self.config.adapter.rank:
            return state
        return {
            part: {name: value for name, value in values.items() if is_adapter(name)}
            for part, values in state.items()
        }

    def _checkpoint_metadata(self) -> dict[str, Any]:
        from megatron.core import parallel_state

        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return {"dp_cp_group": group}


def _wrap(
    config: Config, transformer: TransformerConfig, part: ChameleonModel
) -> DistributedDataParallel:
    """One part of the model with its gradient buffers."""
    if select_fusions(config).gradient_accumulation_fusion:
        add_weight_gradients_in_products(part)
    wrapped = Float16Module(transformer, part) if transformer.bf16 else part
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.training.dtype != "fp64",
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    # The backward pass starts at the last part, so only the first part's gradients are worth
    # reducing in several buckets. This is megatron-core's rule.
    later = part.vp_stage is not None and part.vp_stage > 0
    return DistributedDataParallel(transformer, ddp_config, wrapped, disable_bucketing=later)


def _part_key(index: int) -> str:
    return f"part{index}"
