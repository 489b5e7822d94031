"""Sections of a recipe that say what a process of a role asks of the cluster, and how a learner trains."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_serializer, model_validator

from protocol.section import Decay, NonNegativeFloat, PositiveFloat, PositiveInt, Section

MAX_ACTORS = 1024
"""Of one role: what is above is a slip of the hand."""


class Placement(Section):
    """What one process of a role asks of the cluster."""

    num_cpus: NonNegativeFloat = 1.0
    """Ray CPUs each process reserves."""
    num_gpus: NonNegativeFloat = 0.0
    """Ray GPUs each process reserves, such as 0.5 for two on one GPU; above 0 its tensors live on the GPU."""
    resources: dict[str, float] = Field(default={})
    """Custom Ray resources, such as {rollout: 1} on nodes of that type."""
    threads: PositiveInt = 1
    """CPU threads each process computes with. Part of the numerics: 2 threads change last bits."""

    @field_validator("num_gpus")
    @classmethod
    def _is_a_part_or_whole(cls, num_gpus: float) -> float:
        if num_gpus > 1 and num_gpus != int(num_gpus):
            raise ValueError("num_gpus above 1 must be a whole number: a process has one part of a GPU, or whole ones")
        return num_gpus


class AsIs(Section):
    """Scores are added up as they are."""

    how: Literal["none"] = "none"
    """No normalisation."""


class Fixed(Section):
    """(score - mean) / std with numbers that stay."""

    how: Literal["fixed"]
    """Normalisation by given numbers."""
    mean: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """What is subtracted."""
    std: PositiveFloat
    """What is divided by."""


class Running(Section):
    """(score - mean) / std over all scores so far, this round's included, in ticket order."""

    how: Literal["running"]
    """Normalisation by the run's own scores."""


class Rollouts(Section):
    """How many rollout actors a run has: `rollouts: 4`, or `rollouts: {min: 1, max: 16}`, between which it scales by
    itself (cluster/controller.py). With a minimum of 0 the learner's ranks sample too (learner/turns.py)."""

    min: Annotated[int, Field(ge=0, le=MAX_ACTORS)] = 1
    """The fewest. A run starts with these; with 0 it can do without any."""
    max: Annotated[int, Field(ge=0, le=MAX_ACTORS)]
    """The most."""

    @model_validator(mode="before")
    @classmethod
    def _of_a_number(cls, given: Any) -> Any:
        if isinstance(given, int) and not isinstance(given, bool):
            return {"min": given, "max": given}
        if not isinstance(given, dict | cls):
            raise ValueError(f"expected a number, or {{min: 1, max: 16}}. Got: {given!r}")
        return given

    @model_validator(mode="after")
    def _min_is_not_above_max(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self

    @model_serializer(mode="plain")
    def _as_written(self) -> int | dict[str, int]:
        return self.min if self.min == self.max else {"min": self.min, "max": self.max}

    def __str__(self) -> str:
        return str(self.min) if self.min == self.max else f"{self.min} to {self.max}"


class Reward(Placement):
    """One reward: what scores an image, its weight in the sum, and its pool of actors."""

    name: str
    """A built-in reward's name, `./file.py:Name`, or a dotted path `package.module:Name`."""
    called: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,64}$")] | None = None
    """Its name in metrics; null: the last part of `name`. Tells two of one kind apart."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Factor in the weighted sum that is trained on; 0 only reports it."""
    kwargs: dict[str, Any] = Field(default={})
    """Keyword arguments of the reward's class or function."""
    pins: tuple[str, ...] | None = None
    """Packages of the reward's own environment, as pip names them; null: those that its file declares."""
    normalise: Annotated[AsIs | Fixed | Running, Field(discriminator="how")] = AsIs()
    """What is done to the scores before they are weighted and added up."""
    required: bool = True
    """`false`: where this reward fails on a group for good, the whole round is trained without it, instead of the run
    being stopped."""
    replicas: PositiveInt = 1
    """Actors in the pool."""
    timeout_s: PositiveFloat = 300.0
    """Longest time that scoring one group may take, not counting its wait for a free actor."""
    max_attempts: PositiveInt = 3
    """How often scoring one group is tried before the reward has failed on it."""

    @property
    def label(self) -> str:
        """The reward's name in metrics and group fields: a path's last part, in letters and digits."""
        tail = self.called or self.name.rsplit(":", 1)[-1].rsplit(".", 1)[-1]
        return "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in tail)


LAYOUT = ("world_size", "zero_stage", "offload_optimizer", "offload_parameters")
"""What fixes how the learner's state is spread over ranks."""


class Average(Section):
    """An exponential moving average of the trained weights, fp32, beside the fp32 masters and sharded like them."""

    decay: Decay = 0.999
    """Share of the old average that a step keeps; at the n-th step at most (1 + n) / (10 + n), as in diffusers."""


class Learner(Placement):
    """The DeepSpeed gang that applies updates. Placement is that of one rank."""

    world_size: PositiveInt = 1
    """R: ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage: what is sharded over ranks (1 optimizer, 2 gradients, 3 parameters)."""
    offload_optimizer: bool = False
    """Keep AdamW's masters and moments in the CPU's memory and step there; needs zero_stage 1 or more."""
    offload_parameters: bool = False
    """Keep the parameters that are not in use in the CPU's memory; needs zero_stage 3."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Compute dtype of policy, reference and rollouts; master weights and gradient sums are fp32 always. In fp16 losses
    are scaled, as far as gradients allow; a step whose gradients overflow is skipped and the scale halved."""
    gradient_checkpointing: bool = False
    """Forget activations inside the U-Net's blocks and compute them again in the backward pass: less memory, about a
    third more time, the same weights."""
    micro_batch_size: PositiveInt = 64
    """(trajectory, step) items in one forward and backward pass; bounds activation memory."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """torch's AdamW; or that of bitsandbytes, whose moments take 8 bits each (`pip install sfumato[optimizer-8bit]`). A
    run with it is resumed with the layout that it had."""
    learning_rate: PositiveFloat = 1e-4
    """AdamW's learning rate, once warm."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps in which the learning rate rises from 0, linearly."""
    decay: Literal["constant", "linear"] = "constant"
    """`linear`: after the warm-up it falls, to 0 just after the last step of the run, or of the self-play iteration."""
    weight_decay: NonNegativeFloat = 1e-4
    """AdamW's decoupled weight decay."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's moment decays."""
    adam_eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global norm."""
    ema: Average | None = None
    """A moving average of the weights, which is what is then evaluated and exported; rollouts sample with the weights
    themselves. null: none."""
    num_parity_probes: PositiveInt = 2
    """Micro-batches each rank recomputes each round to compare with the rollout's log-probabilities."""
    parity_tolerance: PositiveFloat | None = None
    """Largest latent_mean difference of a recomputed log-probability; above it the run stops.
    Default: a tenth of the algorithm's window in latent_mean units, or 1e-5 without one."""

    @property
    def sharded_stage(self) -> int:
        """The stage that DeepSpeed runs: in half precision it keeps fp32 sums of gradients from stage 1 on only."""
        return self.zero_stage if self.precision == "fp32" else max(self.zero_stage, 1)

    @model_validator(mode="after")
    def _offload_has_shards(self) -> Self:
        if self.offload_optimizer and self.sharded_stage == 0:
            raise ValueError(
                "learner.offload_optimizer: true needs learner.zero_stage 1, 2 or 3, but it is 0; "
                "stage 1 costs nothing on one rank"
            )
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(
                f"learner.offload_parameters: true needs learner.zero_stage 3, but it is {self.zero_stage}: only stage "
                "3 parts parameters, so that the others need not be on the GPU"
            )
        return self
