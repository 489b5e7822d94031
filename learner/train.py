"""The learner's loop: take a round's groups, learn from them, publish the next version."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from diffusion.chain import Chain
from diffusion.weights import unpack, weights_digest
from learner import checkpoint
from learner.checkpoint import Meta
from learner.collect import Collected, Collector, Counts
from learner.company import Company, Said, role_of
from learner.composition import Composition
from learner.contact import Contact, StopAsked
from learner.engine import Engine
from learner.firewall import Verdict, Watchman
from learner.restore import check_restored, restore_engine, save_engine
from learner.scribe import Round, Scribe
from learner.turns import MakeWorker, Turns
from learner.update import Tools, UpdateReport, open_policy
from learner.updaters import make_updater
from learner.versions import Versions, VersionStore, copy_state
from protocol.errors import RedisError, SfumatoError, TrainingError
from protocol.recipe import Recipe
from protocol.stream import GroupReader, Streams
from protocol.tickets import Ticket, TicketPlan

REPUBLISH_EVERY_S = 5.0
COMPANY_POLL_S = 0.05
ALONE = Company(None, {})


class LearnerRank:
    """One rank of the learner. Rank 0 also issues tickets, publishes versions and writes the run directory."""

    def __init__(
        self,
        recipe: Recipe,
        plan: TicketPlan,
        run_dir: Path,
        streams: Streams,
        store: VersionStore,
        device: torch.device,
        company: Company = ALONE,
        resume_round: int | None = None,
        make_worker: MakeWorker | None = None,
    ) -> None:
        """`recipe` is this learner's own. With `resume_round` it goes on from the checkpoint of that round, or from the
        start for 0; without, from the newest. With `make_worker` it samples too."""
        self._company, self._resume_round = company, resume_round
        torch.set_num_threads(recipe.learner.threads)
        self._recipe, self._plan, self._run_dir = recipe, plan, run_dir
        self._streams, self._store, self._device = streams, store, device
        self._policy = open_policy(recipe, device, with_decoder=make_worker is not None)
        self._engine = Engine(self._policy.denoiser, recipe.learner, device)
        self._chain = Chain(self._policy, recipe.sampler)
        self._contact = Contact(streams, self._role)
        after_pass = functools.partial(self._report_progress, "learning")
        self._tools = Tools(recipe, self._chain, self._engine, after_pass, follows=company.name is not None)
        self._updater = make_updater(self._tools)
        self._versions = Versions(plan)
        self._composition = Composition(recipe.rewards, self._engine.gather)
        self._watchman = Watchman(recipe.firewall, recipe.rewards, self._engine.gather)
        self._scribe = Scribe(recipe, plan, run_dir, self._engine, streams, follows=company.name is not None)
        self._issued = 0
        self._round, self._step, self._skipped = 0, 0, 0
        self._checked_store_at = 0.0
        self._collector = self._make_collector()
        self._turns: Turns | None = None
        self._failure: SfumatoError | None = None
        if make_worker:
            self._turns = Turns(make_worker, self._chain, self._versions, self._after_sampling_step)

    def train(self) -> None:
        """Runs the rounds that are left, from the newest checkpoint if there is one."""
        self._begin()
        while self._round < self._recipe.rounds:
            collected = self._collect()
            if collected is None:
                self._stop_early()
                return
            looked = self._look(collected)
            scored = self._composition.compose(collected.without_checks(self._plan.num_groups))
            report, learner_s = self._learn(scored)
            if looked.action == "roll_back":
                self._roll_back()
            self._keep_version(self._round + 1)
            self._write(scored, report, looked, learner_s)
            self._round += 1
            if looked.action == "stop":
                self._checkpoint()
                self._stop_for(looked.reasons)
            self._checkpoint_if_due()
            self._publish(self._round)
            self._issue_due()
        self._finish(self._engine.average.whole() if self._engine.average else None)

    def _begin(self) -> None:
        self._restore(checkpoint.newest_up_to(self._run_dir, self._resume_round))
        if reasons := self._watchman.still_stopped():
            self._stop_for(reasons)
        self._scribe.open(first_round=self._round)
        if self._is_first_rank and not self._follows:
            self._streams.open()
        for version in sorted(self._versions.states):
            self._publish(version)
        self._issued = self._round
        self._issue_due()

    def _restore(self, found: checkpoint.Checkpoint | None) -> None:
        if found is None:
            self._keep_version(0)
            return
        meta = found.meta
        restore_engine(self._engine, self._recipe.learner, found, self._tools.reach_all)
        self._round, self._step, self._skipped = meta.round, meta.step, meta.skipped_updates
        self._updater.load_state(meta.algorithm_state)
        self._composition.load_state(meta.reward_state)
        self._watchman.load_state(meta.firewall_state)
        if self._recipe.firewall:
            self._versions.pin(self._watchman.good)
        for version in sorted(map(int, meta.digests)):
            self._versions.keep(version, unpack(found.version_bytes(version)))
        with self._engine.gathered():
            now = weights_digest(self._policy.trainable_state())
        check_restored(meta, {**self._versions.digests, meta.round: now})

    def _collect(self) -> Collected | None:
        """Returns this rank's part of the round, or None if the driver has asked all to stop before it was whole."""
        with self._contact.waiting():
            collected = self._collect_unless_stopped()
            # Every rank is asked, but some may hold their part already: either all go on, or none.
            if self._engine.max(torch.tensor(float(collected is None))):
                return None
            with suppress(RedisError):  # What is not trimmed now is trimmed with the next round.
                if not self._follows:
                    self._collector.trim()
        return collected

    def _collect_unless_stopped(self) -> Collected | None:
        try:
            if self._follows:
                self._wait_until(self._company.first_has_begun)
            if self._turns:
                self._engine.barrier()  # Whoever came before the first rank has issued would find no ticket.
            self._sample()
            collected = self._collector.collect(self._round)
            self._report_progress("learning", at_once=True)
            with suppress(RedisError):
                if self._follows:
                    self._collector.report()
                else:
                    self._wait_for_followers()
        except StopAsked:
            return None
        return collected

    def _wait_until(self, holds: Callable[[int, Said], bool]) -> None:
        """Waits until something holds of this round, by what the learners say of themselves."""
        while True:
            with suppress(RedisError):  # While the server is away, nobody says anything.
                if holds(self._round, self._streams.progress()):
                    return
            time.sleep(COMPANY_POLL_S)
            self._while_waiting()

    def _wait_for_followers(self) -> None:
        """The first rank waits until every follower has collected the round, and makes good what was lost before."""
        if not self._company.followers or not self._is_first_rank:
            return
        round_ = self._round
        tickets = self._tickets(round_)
        self._collector.make_good(tickets, lambda: self._company.all_have(round_, self._streams.progress()))

    def _learn(self, collected: Collected) -> tuple[UpdateReport, float]:
        started = time.monotonic()
        version = self._plan.version_of(self._round)
        # An opponent stays what it was while a round's steps change the weights that were it.
        is_current = version == self._round and not self._recipe.iterations
        behaviour = None if is_current or self._follows else lambda: self._holding(version)
        if self._recipe.iterations and self._round in self._plan.iteration_starts[1:]:
            self._engine.start_afresh()
        report = self._updater.learn(collected.groups, self._round, behaviour)
        self._step += len(report.loss) - report.skipped
        self._skipped += report.skipped
        return report, time.monotonic() - started

    @contextmanager
    def _holding(self, version: int) -> Iterator[None]:
        """Puts an earlier version's weights into the module for a while, and then the very same bits back."""
        with self._engine.gathered():
            current = copy_state(self._policy.trainable_state())
        self._put_in(version)
        try:
            yield
        finally:
            with self._engine.gathered():
                self._policy.load_trainable_state(current)

    def _keep_version(self, version: int) -> None:
        with self._engine.gathered():
            self._versions.keep(version, self._policy.trainable_state())

    def _publish(self, version: int) -> None:
        if self._is_first_rank and not self._follows:
            self._versions.publish(version, self._store)
            with suppress(RedisError):  # Announced for people to see; workers go by their tickets.
                self._streams.announce_version(version, self._versions.digests[version])

    def _issue_due(self) -> None:
        """Issues the rounds that pace and published versions allow: lag rounds ahead, of weights that there are."""
        while self._issued < min(self._round + self._recipe.lag + 1, self._recipe.rounds):
            if self._plan.version_of(self._issued) > self._round:
                return
            self._issue(self._issued)
            self._issued += 1

    def _issue(self, round_: int) -> None:
        """Issues a round's tickets; every rank notes those that it is to collect."""
        tickets = self._tickets(round_)
        rank, world_size = self._engine.rank, self._engine.world_size
        self._collector.expect(round_, [t for t in tickets if t.index % world_size == rank])
        if self._is_first_rank and not self._follows:
            with suppress(RedisError):  # The collector issues again what never went out.
                self._streams.issue(tickets)

    def _tickets(self, round_: int) -> list[Ticket]:
        """Returns a round's tickets, and those of the firewall's check."""
        # A follower learns from the groups which weights the first learner's version has.
        digest = "" if self._follows else self._versions.digests[self._plan.version_of(round_)]
        return [*self._plan.round(round_, digest), *self._plan.check_tickets(round_, digest)]

    def _look(self, collected: Collected) -> Verdict:
        """Lets the firewall judge the version that sampled the round, if a check was due."""
        if self._recipe.firewall is None or not self._plan.check_tickets(self._round, ""):
            return Verdict()
        version = self._plan.version_of(self._round)
        verdict = self._watchman.look(collected.checks(self._plan.num_groups), version)
        if self._watchman.good == version:
            self._versions.pin(version)
        return verdict

    def _roll_back(self) -> None:
        """Goes on from the weights of the last good check, whatever this round's update made of those it had."""
        self._put_in(self._watchman.roll_back(self._round + 1))
        self._engine.start_from_parameters()

    def _stop_for(self, reasons: Sequence[str]) -> None:
        """Ends the run as the firewall says, also one that is resumed as it was: what is exported is the last good
        version."""
        self._put_in(self._watchman.good)
        self._finish()
        raise TrainingError(
            f"the firewall stopped the run after round {self._round}: {'; '.join(reasons)}",
            do=f"look at the images; export/ holds version {self._watchman.good}, the last good one. To go on all the "
            "same, set firewall.on_trip=warn or raise firewall.margin, and resume",
        )

    def _put_in(self, version: int) -> None:
        with self._engine.gathered():
            self._policy.load_trainable_state(self._versions.states[version])

    def _stop_early(self) -> None:
        """Leaves a checkpoint of all that was learnt."""
        found = checkpoint.latest_checkpoint(self._run_dir)
        is_new = found is None or found.meta.round < self._round
        if self._engine.broadcast(is_new and self._round > 0):
            self._checkpoint()
        self._report_progress("done", at_once=True)
        self._engine.close()
        if self._failure:
            raise self._failure

    def _checkpoint_if_due(self) -> None:
        """Before the version is published: whoever resumes must be able to answer the tickets that follow."""
        if self._round == self._recipe.rounds or self._round % self._recipe.checkpoints.every_rounds == 0:
            self._checkpoint()

    def _checkpoint(self) -> None:
        folder = checkpoint.begin(self._run_dir, self._round) if self._is_first_rank else None
        folder = self._engine.broadcast(folder)
        average_digest = save_engine(self._engine, folder)
        if self._is_first_rank:
            keep_last = self._recipe.checkpoints.keep_last
            checkpoint.commit(folder, self._meta(average_digest), self._versions.packed(), keep_last)
        self._engine.barrier()

    def _meta(self, average_digest: str | None) -> Meta:
        learner = self._recipe.learner
        digests = {str(version): digest for version, digest in self._versions.digests.items()}
        return Meta(
            self._round,
            self._step,
            self._skipped,
            learner.world_size,
            learner.zero_stage,
            learner.precision,
            digests,
            self._updater.state(),
            self._composition.state(),
            self._watchman.state(),
            average_digest,
            self._engine.average.num_steps if self._engine.average else 0,
        )

    def _write(self, collected: Collected, report: UpdateReport, looked: Verdict, learner_s: float) -> None:
        done = Round(
            self._round,
            self._plan.version_of(self._round),
            self._step,
            self._skipped,
            self._versions.digests[self._round + 1],
            learner_s,
            self._contact.wait_s,
            self._composition.left_out,
            looked.metrics,
            self._versions.published,
        )
        counts, self._collector.counts = self._collector.counts, Counts()
        self._scribe.write(done, collected, report, counts, self._updater.costs)

    def _finish(self, average: Mapping[str, Tensor] | None = None) -> None:
        """Exports the weights, or their average, which rank 0 has."""
        with self._engine.gathered():
            if self._is_first_rank:
                if average is not None:
                    self._policy.load_trainable_state(average)
                self._policy.export(self._run_dir / "export")
        # Whoever leaves with an error ends the run, and with it those who are not done.
        self._engine.barrier()
        self._report_progress("done", at_once=True)
        self._engine.close()

    def _make_collector(self) -> Collector:
        rank, world_size = self._engine.rank, self._engine.world_size
        shards = [shard for shard in range(self._recipe.num_shards) if shard % world_size == rank]
        return Collector(
            self._streams,
            GroupReader(self._streams, shards, self._role, [] if self._follows else self._company.others),
            issues=not self._follows,
            sampler=self._chain.description,
            reissue_after_s=self._recipe.redis.reissue_after_s,
            give_up_after_s=self._recipe.supervision.stall_timeout_s,
            while_waiting=self._while_waiting,
        )

    @property
    def _follows(self) -> bool:
        return self._company.name is not None

    @property
    def _role(self) -> str:
        return role_of(self._company.name, self._engine.rank)

    @property
    def _is_first_rank(self) -> bool:
        return self._engine.rank == 0

    def _while_waiting(self) -> None:
        """Publishes again what the weight store or Redis has lost, and samples what was issued again."""
        self._report_progress("waiting")
        self._contact.check_stop()
        self._sample()
        if self._follows or not self._is_first_rank or time.monotonic() - self._checked_store_at < REPUBLISH_EVERY_S:
            return
        self._checked_store_at = time.monotonic()
        self._versions.publish_lost(self._store)

    def _sample(self) -> None:
        """Has its turn as a rollout, if it has any. Where that fails for good, all ranks save what they have learnt."""
        if self._turns is None:
            return
        try:
            self._turns.sample(self._round)
        except SfumatoError as error:
            self._failure = error
            self._contact.ask_to_stop()
            raise StopAsked from error

    def _after_sampling_step(self) -> None:
        self._report_progress("sampling")
        self._contact.check_stop()

    def _report_progress(self, state: str, *, at_once: bool = False) -> None:
        self._contact.report(state, self._round, at_once=at_once)
