"""The DeepSpeed engine: gradients over ranks and one optimizer step. The only home of `deepspeed`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from learner.average import Average
from protocol.errors import TrainingError
from protocol.roles import Learner

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = (MASTER, *MOMENTS)
LOSS_SCALER = "loss_scaler"
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
LOSS_SCALE = {"loss_scale": 0, "initial_scale_power": 16, "hysteresis": 1, "loss_scale_window": 2**62}
"""fp16: a scale that each overflow halves. DeepSpeed would double it before it divides that same step's gradients by
it, so that this is left to us."""
GROW_AFTER = 1000
"""Steps in a row without an overflow that double the loss scale."""
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


class Engine:
    """One rank of the gang: wraps a module whose trainable parameters have requires_grad set.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and DS_ACCELERATOR are in the environment. `denoiser` is
    what forward passes must go through, so that ZeRO-3 can gather parameters.
    """

    def __init__(self, module: nn.Module, settings: Learner, device: torch.device) -> None:
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        _silence_deepspeed()
        # A shared-memory collective that only inference uses; left on, it wants a C++ compiler at first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if device.type == "cpu":
            # torch computes in fp16 on any CPU, slowly; DeepSpeed asks whether oneDNN does.
            get_accelerator().is_fp16_supported = lambda: True
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, timeout=COLLECTIVE_TIMEOUT, verbose=False)
        self._settings, self._device = settings, device
        self._module = module
        self._engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=[p for _, p in self._trained()],
            optimizer=optimizer_8bit(settings) if settings.optimizer == "adamw_8bit" else None,
            config=deepspeed_config(settings),
        )
        self._engine.eval()
        self.average = Average(self, settings.ema.decay) if settings.ema else None

    @property
    def rank(self) -> int:
        """This process's place in the gang."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """R, the number of ranks."""
        return dist.get_world_size()

    @property
    def device(self) -> torch.device:
        """Where this rank's tensors live."""
        return self._device

    @property
    def denoiser(self) -> Callable[..., Any]:
        """The wrapped module, to be called like the module itself."""
        engine: Callable[..., Any] = self._engine
        return engine

    def apply(self, losses: Sequence[Callable[[], Tensor]]) -> float | None:
        """Adds up the gradients of the losses, over all ranks, and takes one optimizer step.

        Each loss is made and differentiated in turn, so memory holds one graph at a time. Every rank must bring
        the same number of losses. The gradient is of the *sum* over ranks. Returns its norm before clipping; None if
        no step was taken, since a gradient overflowed in fp16: the loss scale is then half of what it was. Raises
        TrainingError where gradients are not finite at any scale.
        """
        assert losses, "a rank without losses would leave the others waiting in a collective"
        with self._one_reduction():
            for number, loss in enumerate(losses, start=1):
                self._mark_boundary(number == len(losses))
                # DeepSpeed averages over ranks; the sum is meant.
                self._engine.backward(loss() * self.world_size, scale_wrt_gas=False)
        norm = self._stage0_grad_norm() if self._settings.sharded_stage == 0 else None
        self._engine.step()
        if self._has_overflowed:
            return None
        self._grow_loss_scale()
        if self.average:
            self.average.update()
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    @property
    def loss_scale(self) -> float | None:
        """What losses are multiplied by before they are differentiated; None but in fp16."""
        return None if self._loss_scaler is None else float(self._loss_scaler.cur_scale)

    def set_learning_rate(self, rate: float) -> None:
        """Sets AdamW's learning rate for the steps that follow."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    def start_afresh(self) -> None:
        """Makes moments and step count of AdamW 0 again, and the average the weights as they are. Every rank calls
        it."""
        if self.average:
            self.average.restart()
        if not self._has_moments:
            return
        if self._settings.optimizer == "adamw_8bit":
            # As before its first step, which makes them.
            self._base_optimizer.state.clear()
            return
        for _, parameter in self._trained():
            for part in MOMENTS:
                self._write_whole(parameter, part, torch.zeros_like(self._read_whole(parameter, part)))
        for state in self._base_optimizer.state.values():
            state["step"].zero_()

    def start_from_parameters(self) -> None:
        """Makes AdamW go on from the values that the module's parameters were given. Every rank calls it."""
        with self.gathered():
            values = {name: p.detach().to(torch.float32, copy=True) for name, p in self._trained()}
        self.write_masters(values)
        self.start_afresh()

    def master_shards(self) -> list[Tensor]:
        """Returns this rank's part of the fp32 masters, the live tensors: flat ones from ZeRO-1 on."""
        if self._settings.sharded_stage == 3:
            return [shard.data for shard in self._engine.optimizer.fp32_partitioned_groups_flat]
        return [shard.data for group in self._base_optimizer.param_groups for shard in group["params"]]

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every trained parameter's name and its fp32 master, whole. Every rank goes through all."""
        return ((name, self._read_whole(parameter, MASTER)) for name, parameter in self._trained())

    def write_masters(self, values: Mapping[str, Tensor]) -> None:
        """Writes the fp32 masters. Every rank calls it."""
        for name, parameter in self._trained():
            self._write_whole(parameter, MASTER, values[name].to(self._device))

    def sum(self, values: Tensor) -> Tensor:
        """Returns the elementwise sum over ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """Returns the elementwise maximum over ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's value on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self._device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Returns every rank's value, in the order of ranks."""
        box = [None] * self.world_size
        dist.all_gather_object(box, value)
        return list(box)

    def barrier(self) -> None:
        """Waits until every rank is here."""
        dist.barrier()

    def gathered(self) -> AbstractContextManager[Any]:
        """Within it every rank sees whole parameters: a no-op below ZeRO-3."""
        if self._settings.sharded_stage < 3:
            return nullcontext()
        import deepspeed

        parameters = [p for _, p in self._trained()]
        context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
        return context

    def save(self, folder: Path) -> None:
        """Writes DeepSpeed's own files: parameters, optimizer partitions, counters. Every rank calls it."""
        self._engine.save_checkpoint(str(folder), tag="state", exclude_frozen_parameters=True)

    def consolidated(self) -> dict[str, Tensor] | None:
        """Returns fp32 masters and AdamW's moments, whole and on the CPU, as `<part>/<parameter>`, and in fp16 the loss
        scaler's state; None but on rank 0. Of moments in 8 bits there are none: their blocks follow the layout.

        Unlike `save`'s files they fit any number of ranks and any stage. Every rank calls it.
        """
        whole: dict[str, Tensor] = {}
        if self._loss_scaler is not None:
            state = [float(getattr(self._loss_scaler, name)) for name in SCALER_STATE]
            whole[LOSS_SCALER] = torch.tensor(state, dtype=torch.float64)
        for name, parameter in self._trained():
            for part in PARTS if self._settings.optimizer == "adamw" else (MASTER,):
                tensor = self._read_whole(parameter, part)
                if self.rank == 0:
                    whole[f"{part}/{name}"] = tensor.detach().to("cpu", torch.float32, copy=True)
        return whole if self.rank == 0 else None

    def load_consolidated(self, whole: Mapping[str, Tensor], num_steps: int, reach_all: Callable[[], Tensor]) -> None:
        """Takes up what `consolidated` gave after `num_steps` optimizer steps. Every rank calls it.

        `reach_all` makes a graph that holds every trained parameter: the engine allocates its state in a first step,
        which is taken with gradients of 0 and then overwritten.
        """
        self.apply([lambda: reach_all() * 0.0])
        for name, parameter in self._trained():
            for part in PARTS:
                self._write_whole(parameter, part, whole[f"{part}/{name}"].to(self._device))
        # Masters are set; what forward passes use is rounded from them by the next step only.
        with self.gathered():
            for name, parameter in self._trained():
                parameter.data.copy_(whole[f"{MASTER}/{name}"])
        for state in self._base_optimizer.state.values():
            state["step"].fill_(num_steps)
        if self._loss_scaler is not None:
            for name, value in zip(SCALER_STATE, whole[LOSS_SCALER].tolist(), strict=True):
                setattr(self._loss_scaler, name, value if name == "cur_scale" else int(value))

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote, with the same world size and stage. Raises TrainingError."""
        path, _ = self._engine.load_checkpoint(str(folder), tag="state", load_module_strict=False)
        if path is None:
            raise TrainingError(f"the training state in {folder} cannot be read", do="resume an older checkpoint")
        self._engine.eval()

    def close(self) -> None:
        """Leaves the process group, without which the process ends with warnings and leaked sockets."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self._module.named_parameters() if p.requires_grad)

    @property
    def _loss_scaler(self) -> Any | None:
        """DeepSpeed's scaler of fp16 losses, which its own checkpoints hold too."""
        return self._engine.optimizer.loss_scaler if self._settings.precision == "fp16" else None

    @property
    def _has_overflowed(self) -> bool:
        """Whether the last step was skipped. Raises TrainingError once there is no smaller scale to try."""
        if self._loss_scaler is None or not self._engine.optimizer.overflow:
            return False
        if self._loss_scaler.cur_scale <= self._loss_scaler.min_scale:
            raise TrainingError(
                "gradients overflow in fp16 at any loss scale",
                value=f"loss scale {self._loss_scaler.cur_scale:g}",
                do="set learner.precision: bf16, or lower learner.learning_rate, and start again",
            )
        return True

    def _grow_loss_scale(self) -> None:
        scaler = self._loss_scaler
        if scaler is not None and (scaler.cur_iter - scaler.last_overflow_iter - 1) % GROW_AFTER == 0:
            scaler.cur_scale *= scaler.scale_factor

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        """torch's AdamW, below whatever shards it."""
        optimizer = self._engine.optimizer
        base: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        return base

    @property
    def _has_moments(self) -> bool:
        """False until AdamW's first step, which makes them."""
        return any(self._base_optimizer.state.values())

    def _read_whole(self, parameter: nn.Parameter, part: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if part in MOMENTS and not self._has_moments:
            return torch.zeros_like(self._read_whole(parameter, MASTER))
        if self._settings.sharded_stage == 0:
            return parameter.data if part == MASTER else self._base_optimizer.state[parameter][part]
        if part == MASTER:
            tensor: Tensor = safe_get_full_fp32_param(parameter)
        else:
            tensor = safe_get_full_optimizer_state(parameter, part)
        return tensor

    def _write_whole(self, parameter: nn.Parameter, part: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self._settings.sharded_stage == 0:
            self._read_whole(parameter, part).copy_(value)
        elif part == MASTER:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, part)

    def _reduce(self, values: Tensor, operation: Any) -> Tensor:
        result = values.detach().to(self._device).clone()
        dist.all_reduce(result, op=operation)
        return result.to(values.device)

    def _one_reduction(self) -> AbstractContextManager[Any]:
        if self._reduces_by_itself:
            return nullcontext()
        context: AbstractContextManager[Any] = self._engine.coalesce_grad_reduction()
        return context

    def _mark_boundary(self, last: bool) -> None:
        if self._reduces_by_itself:
            self._engine.set_gradient_accumulation_boundary(last)

    @property
    def _reduces_by_itself(self) -> bool:
        """Whether the backward pass reduces, told which one is the last; otherwise all is reduced once, at the end.

        Waiting for the end adds up in the parameters' dtype: in bf16 256 micro-batches then lose 1.2 % of the gradient.
        """
        return self._settings.sharded_stage == 0 or self._settings.precision != "fp32"

    def _stage0_grad_norm(self) -> float:
        """DeepSpeed reports no norm in stage 0. Gradients are already reduced there."""
        gradients = [p.grad for p in self._module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))


def deepspeed_config(settings: Learner) -> dict[str, Any]:
    """Returns DeepSpeed's configuration of a recipe's learner section."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "steps_per_print": 10**12,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": settings.sharded_stage, "overlap_comm": False},
    }
    if settings.optimizer == "adamw":
        # torch's own on every device: the fused and CPU variants round differently.
        config["optimizer"] = {"type": "AdamW", "params": {**adam_settings(settings), "torch_adam": True}}
    if settings.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if settings.offload_parameters:
        config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    if settings.precision != "fp32":
        config[settings.precision] = {"enabled": True} | (LOSS_SCALE if settings.precision == "fp16" else {})
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def adam_settings(settings: Learner) -> dict[str, Any]:
    """Returns what any AdamW is told."""
    return {
        "lr": settings.learning_rate,
        "betas": list(settings.adam_betas),
        "eps": settings.adam_eps,
        "weight_decay": settings.weight_decay,
    }


def optimizer_8bit(settings: Learner) -> Callable[..., torch.optim.Optimizer]:
    """Returns what makes an AdamW with moments of 8 bits in blocks of 256 (Dettmers et al., arXiv 2110.02861); those of
    fewer than 4096 elements stay in fp32. Raises TrainingError without bitsandbytes."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise TrainingError(
            "learner.optimizer: adamw_8bit needs bitsandbytes, which is not installed",
            do="pip install 'sfumato[optimizer-8bit]' where learners run, or set learner.optimizer: adamw",
        ) from error
    return functools.partial(AdamW8bit, **adam_settings(settings))


def _silence_deepspeed() -> None:
    """torch deprecates calls that DeepSpeed makes at each collective; a user can do nothing about them."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch\.distributed|deepspeed)\..*")
