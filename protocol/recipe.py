"""The recipe: all that decides a run, typed, frozen, and checked before anything starts.

A field's description is the string under it. Units are in the names. Defaults are the vetted values; what a
paper publishes stands in `recipes/`. Derived numbers are properties here or in `protocol/derived.py`.
"""

from __future__ import annotations

from math import lcm
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from protocol import requirements
from protocol.algorithms import Algorithm, Content, Iteration, SourceKind, Spin, SpinExact
from protocol.datasets import Dataset
from protocol.firewall import Firewall
from protocol.prompt_sets import Prompts
from protocol.roles import LAYOUT, Learner, Placement, Reward, Rollouts
from protocol.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section
from protocol.starting_lora import StartingLora

RESERVED_LABELS = (
    "mean",
    "std_within_group",
    "std_between_groups",
    "version",
    "trained",
    "tripped",
    "reason",
    "missing",
)
"""Names that stand beside the rewards' own in metrics."""


class Lora(Section):
    """Low-rank adapters on the network; the reference is the same module with them switched off."""

    form: Literal["lora"] = "lora"
    """Training form."""
    rank: PositiveInt = 8
    """Rank of each adapter."""
    alpha: PositiveFloat = 8.0
    """Adapter scale; the update is multiplied by alpha / rank."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
    )
    """Endings of the names of the modules that get an adapter."""


class Full(Section):
    """All weights of the network; the reference is a frozen copy in the same dtype."""

    form: Literal["full"]
    """Training form."""


def _training_form(value: Any) -> Any:
    """The form of a `model.trainable`, which is lora where it does not say."""
    return value.get("form", "lora") if isinstance(value, dict) else getattr(value, "form", None)


Trainable = Annotated[Annotated[Lora, Tag("lora")] | Annotated[Full, Tag("full")], Discriminator(_training_form)]
"""What may be trained of a base model."""


class Model(Section):
    """The base model and what of it is trained."""

    path: str = "embedded"
    """A folder in diffusers layout, a hub id, or `embedded` for the digits model in assets/."""
    lora: StartingLora | None = None
    """A LoRA that is added into the base model first; null: none."""
    trainable: Trainable = Lora()
    """LoRA adapters or the full network (a U-Net, or a transformer)."""
    resolution: PositiveInt | None = None
    """Side of the images that are drawn and learnt from, in pixels; null: the model's own."""


class Batch(Section):
    """The size of a round."""

    num_groups: PositiveInt
    """P: prompts, and so groups, in a round."""
    group_size: PositiveInt
    """G: siblings sampled for each prompt."""

    @property
    def num_trajectories(self) -> int:
        """Trajectories in a round, P x G."""
        return self.num_groups * self.group_size


Kernel = Literal["ddim", "ddpm", "flow_grpo", "dance_grpo"]
"""What draws a step and scores it (algorithms.md 0.6)."""


class Sampler(Section):
    """How trajectories are drawn, and so how they are scored (algorithms.md 0.6)."""

    kernel: Kernel = "ddim"
    """Transition kernel: DDIM with eta, or DDPM ancestral with the posterior variance; for flow-matching models the SDE
    of Flow-GRPO or that of DanceGRPO."""
    num_steps: Annotated[int, Field(ge=1, le=1000)] = 20
    """T: denoising steps."""
    eta: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Noise level of DDIM, Flow-GRPO's a (0.7 there) or DanceGRPO's eta (0.3 there); 0 is deterministic and has no
    density. DDPM ancestral is eta 1."""
    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Classifier-free guidance; 1 is off and costs one evaluation a step instead of two. FLUX.1-dev is told it as a
    number, as its pipeline does, and always evaluated once."""
    last_step: Literal["unscored", "clamp"] = "unscored"
    """`unscored`: the last step lands on the clean latent, without noise or density. `clamp`: it stops at
    timestep 0 with noise and is scored, as ddpo-pytorch does."""
    share_initial_noise: bool = False
    """All siblings of a group start from one x_T."""
    wire_dtype: Literal["float16", "float32"] = "float32"
    """Each drawn latent is rounded to this dtype before it is scored, fed on and sent."""

    @model_validator(mode="after")
    def _kernel_has_its_settings(self) -> Self:
        if self.kernel == "ddpm" and self.eta != 1.0:
            raise ValueError("kernel ddpm is eta 1; remove eta or use kernel ddim")
        if self.is_flow and self.last_step == "clamp":
            raise ValueError(f"last_step: clamp is for ddim and ddpm; kernel {self.kernel} ends on the clean latent")
        return self

    @property
    def is_flow(self) -> bool:
        """Whether the kernel is for flow-matching models."""
        return self.kernel in ("flow_grpo", "dance_grpo")

    @property
    def num_scored_steps(self) -> int:
        """T_sc: steps with a density."""
        if self.eta == 0:
            return 0
        return self.num_steps - (self.last_step == "unscored")


class Follower(Section):
    """One more learner on the same groups, with an algorithm and an adapter of its own. Rollouts sample with the first
    learner's weights, so what it learns from is off-policy."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,32}$")]
    """Its name: its files are in learners/<name>/ in the run directory."""
    algorithm: Algorithm
    """Its update; one that needs samples of its own weights is refused."""
    learner: Learner = Learner()
    """Its DeepSpeed gang."""
    trainable: Trainable = Lora()
    """What it trains of the base model."""


class Redis(Section):
    """The trajectory buffer. It is disposable: whatever is lost in it is made again."""

    url: str | None = None
    """URL of a server to attach to: redis://, or rediss:// for TLS, whose CA is ?ssl_ca_certs=FILE; of a Redis Cluster:
    redis+cluster:// or rediss+cluster://; or `env:NAME`, the driver's environment variable that holds it. null starts
    an embedded one on loopback."""
    maxmemory_bytes: PositiveInt | None = None
    """Memory limit of the embedded server; null: four times what the recipe can have in flight."""
    num_shards: PositiveInt | None = None
    """Group streams; a multiple of learner.world_size, and best of a Redis Cluster's servers. null: one a rank."""
    claim_idle_s: PositiveFloat = 60.0
    """A ticket whose worker shows no progress for this long is given to another."""
    reissue_after_s: PositiveFloat = 10.0
    """A rank that sees no group arrive for this long, while no ticket is waiting or claimed, issues its
    missing tickets again."""
    timeout_s: PositiveFloat = 10.0
    """How long connecting, and each retry of a broken connection, may take."""


class Checkpoints(Section):
    """Durable state, under checkpoints/ in the run directory."""

    every_rounds: PositiveInt = 5
    """A checkpoint each so many rounds, and after the last."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept."""


class Evaluation(Section):
    """How `sfumato evaluate` and the sample grids draw images. Seeds are fixed, shared by all models."""

    images_per_prompt: PositiveInt = 4
    """Images drawn for each prompt."""
    max_prompts: PositiveInt | None = None
    """At most so many prompts of the file, spread evenly; null: all."""
    seed: int = 12345
    """Seed of the evaluation's noise."""
    rewards: tuple[Reward, ...] = ()
    """Rewards reported beside the trained ones, never trained on."""
    grid_prompts: PositiveInt = 6
    """Prompts in a sample grid."""
    grid_images: PositiveInt = 6
    """Images of each prompt in a sample grid."""


class Supervision(Section):
    """How the driver watches the roles."""

    start_timeout_s: PositiveFloat = 300.0
    """How long the processes of a run may take to start."""
    node_timeout_s: NonNegativeFloat = 0.0
    """How long a run may wait for nodes that an autoscaler starts for it; 0: what the roles ask for must be there."""
    stall_timeout_s: PositiveFloat = 1800.0
    """A learner rank or rollout actor without progress for this long is treated as dead."""
    answer_timeout_s: PositiveFloat = 60.0
    """A reward actor, weight store or embedded Redis that gives no answer for this long is started again."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Losses in a row of one role, without progress in between, that are made good; the next one ends the run."""


class Recipe(Section):
    """Everything a run is a function of, besides the code."""

    seed: int = 0
    """Seed of every random number of the run."""
    rounds: PositiveInt
    """Rounds to train: sample P groups, learn, publish."""
    lag: Annotated[int, Field(ge=0, le=16)] = 0
    """Round u is sampled with version max(0, u - lag): 0 alternates, 1 or more overlaps."""
    rollouts: Rollouts = Rollouts(max=1)
    """Rollout actors: a number, or {min: 1, max: 16}. 0, or a minimum of 0: the learner samples too, in turns with
    learning, so that one GPU is enough. Changes how fast a run goes, never where it ends."""
    model: Model = Model()
    """The base model."""
    prompts: Prompts = Prompts()
    """Prompt sets."""
    data: tuple[Dataset, ...] = ()
    """Datasets of real images, or of preference pairs. A ticket's source is drawn by the weights, its item by turns."""
    batch: Batch
    """The size of a round."""
    sampler: Sampler = Sampler()
    """How trajectories are drawn."""
    rewards: tuple[Reward, ...] = ()
    """What is maximised: the weighted sum of these. Methods that learn from data only need none."""
    algorithm: Algorithm
    """The update."""
    learner: Learner = Learner()
    """The learner."""
    followers: tuple[Follower, ...] = ()
    """More learners on the same groups, to compare methods at the price of one sampling."""
    behaviour: Literal["learner", "base"] = "learner"
    """Whose weights sample: the learner's newest, `lag` versions behind, or the base model's for ever."""
    rollout_worker: Placement = Placement()
    """What each rollout actor reserves."""
    firewall: Firewall | None = None
    """Held-out rewards that are looked at while training, against reward hacking; null: none."""
    redis: Redis = Redis()
    """The trajectory buffer."""
    checkpoints: Checkpoints = Checkpoints()
    """Durable state."""
    evaluation: Evaluation = Evaluation()
    """Evaluation and sample grids."""
    supervision: Supervision = Supervision()
    """Time-outs and restarts."""

    @model_validator(mode="after")
    def _reward_labels_are_distinct(self) -> Self:
        labels = [reward.label for reward in (*self.scored_rewards, *self.evaluation.rewards)]
        for label in labels:
            if label in RESERVED_LABELS:
                raise ValueError(f"rewards: {label} is a name that metrics use themselves; rename the reward")
            if labels.count(label) > 1:
                raise ValueError(
                    f"rewards: two rewards are called {label}; metrics could not tell them apart: give one another "
                    "name by `called`"
                )
            if not label:
                raise ValueError("rewards: a reward's name ends with a colon or a dot, and so names nothing")
        if self.rewards and all(reward.weight == 0 for reward in self.rewards):
            raise ValueError("rewards: every weight is 0, so nothing is trained on")
        if self.rewards and not any(reward.required and reward.weight for reward in self.rewards):
            raise ValueError(
                "rewards: all that count are optional, so that a round could be left without any; make one required"
            )
        return self

    @model_validator(mode="after")
    def _rounds_divide_evenly(self) -> Self:
        for learner, algorithm in zip(self.learners, self.algorithms, strict=True):
            parts = learner.world_size * algorithm.inner_minibatches
            if self.batch.num_groups % parts:
                raise ValueError(
                    f"batch.num_groups: {self.batch.num_groups} groups do not divide evenly into learner.world_size "
                    f"x algorithm.inner_minibatches = {learner.world_size} x {algorithm.inner_minibatches} parts; "
                    f"use a multiple of {parts}"
                )
            if self.num_shards % learner.world_size:
                raise ValueError(
                    f"redis.num_shards: {self.num_shards} is not a multiple of learner.world_size "
                    f"{learner.world_size}, so a rank could not tell which shards are its own"
                )
        return self

    @model_validator(mode="after")
    def _algorithm_can_learn(self) -> Self:
        for problem in (*requirements.problems(self), *requirements.colocation(self)):
            raise ValueError(problem)
        return self

    @property
    def scored_rewards(self) -> tuple[Reward, ...]:
        """The rewards that a run asks: those that it trains on, then those that its firewall holds out."""
        return (*self.rewards, *(self.firewall.rewards if self.firewall else ()))

    @property
    def is_colocated(self) -> bool:
        """True if the first learner's ranks answer tickets too, between updates, with the weights that they train."""
        return self.rollouts.min == 0

    @property
    def fewest_workers(self) -> int:
        """The fewest processes that answer tickets at any time."""
        return self.learner.world_size if self.is_colocated else self.rollouts.min

    @property
    def source_kinds(self) -> tuple[SourceKind, ...]:
        """What each source of tickets is: the prompts if there are any, then the datasets, in their order."""
        prompts: tuple[SourceKind, ...] = ("prompts",) if self.prompts.train is not None else ()
        return (*prompts, *(dataset.kind for dataset in self.data))

    @property
    def iterations(self) -> tuple[Iteration, ...]:
        """The iterations of self-play; none for other methods."""
        return self.algorithm.iterations if isinstance(self.algorithm, Spin | SpinExact) else ()

    @property
    def num_shards(self) -> int:
        """Group streams: each learner's ranks share them out evenly."""
        return self.redis.num_shards or lcm(*(learner.world_size for learner in self.learners))

    @property
    def learners(self) -> tuple[Learner, ...]:
        """The gangs: the first learner's, then the followers'."""
        return (self.learner, *(follower.learner for follower in self.followers))

    @property
    def algorithms(self) -> tuple[Algorithm, ...]:
        """All algorithms that learn from the groups."""
        return (self.algorithm, *(follower.algorithm for follower in self.followers))

    @property
    def content(self) -> Content:
        """What sampled groups carry: whole trajectories, whose ends are images, if one algorithm needs them."""
        contents = [algorithm.content for algorithm in self.algorithms]
        return "trajectories" if "trajectories" in contents else contents[0]

    def of_follower(self, name: str) -> Recipe:
        """Returns the recipe as a follower has it: its algorithm, its gang, its adapter."""
        follower = next(follower for follower in self.followers if follower.name == name)
        changes = {
            "algorithm": follower.algorithm,
            "learner": follower.learner,
            "model": self.model.model_copy(update={"trainable": follower.trainable}),
            "redis": self.redis.model_copy(update={"num_shards": self.num_shards}),
            "followers": (),
            "firewall": None,
        }
        return self.model_copy(update=changes)

    def identity(self) -> dict[str, Any]:
        """The part of the recipe that weights depend on: what a resumed run may not change.

        The learner's layout may: weights then differ in the last bits, which a resume says. So may the number of
        rounds, unless learning rates follow from it.
        """
        place = {"num_cpus", "resources"}
        of_rewards = {"__all__": {*place, "replicas", "timeout_s", "max_attempts"}}
        # What to do about a trip is for a person to decide, also in the middle of a run.
        decisions = dict.fromkeys(("on_trip", "margin", "max_roll_backs"), True)
        identity = self.model_dump(
            mode="json",
            exclude={
                **dict.fromkeys(("rollouts", "redis", "checkpoints", "evaluation", "supervision"), True),
                "prompts": {"held_out"},
                # A LoRA is what its file holds, wherever that is.
                "model": {"lora": {"path"}} if self.model.lora and self.model.lora.digest else {},
                "learner": {*place, *LAYOUT, "num_parity_probes", "parity_tolerance", "gradient_checkpointing"},
                "rollout_worker": place,
                "rewards": of_rewards,
                "firewall": {**decisions, "rewards": of_rewards},
            },
        )
        if not any(learner.decay == "linear" for learner in self.learners) and not self.iterations:
            del identity["rounds"]
        # The firewall's checks have the evaluation's seeds.
        return identity | ({"evaluation": {"seed": self.evaluation.seed}} if self.firewall else {})
