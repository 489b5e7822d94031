"""A run's sizes while it goes on: asked for by `sfumato scale`, or followed from what the roles say of themselves.

.scale (a person) --+--> bounds --> decide <-- observations, a round each <-- progress, queue depth
recipe.rollouts  ---+                 |
                                      +--> Crew.resize, and a line with its reason in scaling.jsonl
.scale ------------------------------------> Pools.resize
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.controller import MEMORY, Observation, decide
from cluster.crew import Crew
from cluster.reward_pools import Pools
from cluster.wanted import read_wanted
from protocol.recipe import Recipe
from protocol.stream import QueueDepth

WINDOW_S = 10.0
"""The shortest time that is observed: several rounds, where they are short."""

LOG_FILE = "scaling.jsonl"


class Window:
    """Looks at the roles until rounds are over, then sums up what was seen."""

    def __init__(self, learner: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`learner` is the role whose rounds and waiting count."""
        self._learner, self._clock = learner, clock
        self._restart({})

    def _restart(self, said: Mapping[str, Mapping[str, Any]]) -> None:
        self._began, self._began_at = dict(said), self._clock()
        self._num_looks, self._num_queued = 0, 0

    def look(
        self, said: Mapping[str, Mapping[str, Any]], depth: QueueDepth, rollouts: Sequence[str]
    ) -> Observation | None:
        """Takes in what the roles say now; returns an observation where a round is over, and time enough has passed."""
        if self._learner not in said:
            return None
        if self._learner not in self._began:
            self._restart(said)
        for role, words in said.items():
            self._began.setdefault(role, words)
        self._num_looks += 1
        self._num_queued += depth.waiting > 0
        is_over = said[self._learner]["round"] > self._began[self._learner]["round"]
        if not is_over or self._clock() - self._began_at < WINDOW_S:
            return None
        at_work = [role for role in rollouts if said.get(role, {}).get("alive_s")]
        idle = [self._free_share(role, said[role]) for role in at_work]
        seen = Observation(
            size=len(rollouts),
            starting=len(rollouts) - len(at_work),
            learner_waits=self._free_share(self._learner, said[self._learner]),
            tickets_wait=self._num_queued / self._num_looks,
            rollouts_idle=sum(idle) / len(idle) if idle else 0.0,
        )
        self._restart(said)
        return seen

    def _free_share(self, role: str, now: Mapping[str, Any]) -> float:
        """Of the time since the window began; of a process that is new since then, of its own time."""
        before = self._began[role]
        if before["alive_s"] >= now["alive_s"]:
            before = {"busy_s": 0.0, "alive_s": 0.0}
        busy_s, alive_s = (now[name] - before[name] for name in ("busy_s", "alive_s"))
        return min(max(1 - busy_s / alive_s, 0.0), 1.0)


class Scaling:
    """Gives an attempt the sizes that are wanted."""

    def __init__(self, recipe: Recipe, run_dir: Path, learner: str, crew: Crew, pools: Pools) -> None:
        self._recipe, self._run_dir, self._crew, self._pools = recipe, run_dir, crew, pools
        self._window = Window(learner)
        self._observations: deque[Observation] = deque(maxlen=MEMORY)
        self.told = ""

    def look(self, said: Mapping[str, Mapping[str, Any]], depth: QueueDepth) -> None:
        """Takes in what the roles say."""
        seen = self._window.look(said, depth, [f"rollout/{name}" for name in self._crew.names])
        if seen:
            self._observations.append(seen)

    def turn(self) -> None:
        """Does what is due, and waits for nothing."""
        wanted, size = read_wanted(self._run_dir), len(self._crew.names)
        decision = decide(list(self._observations), size, wanted.rollouts or self._recipe.rollouts)
        if decision.num != size:
            self._crew.resize(decision.num)
            seen = asdict(self._observations[-1]) if self._observations else {}
            self._log("rollouts", size, decision.num, decision.reason, observation=seen)
        for label, replicas in wanted.replicas.items():
            num = self._pools.size(label)
            if self._pools.resize(label, replicas):
                self._log(f"reward {label}", num, replicas, f"asked for {replicas}")
        for label, problem in self._pools.look():
            self._log(f"reward {label}", wanted.replicas[label], self._pools.size(label), problem)

    def _log(self, what: str, before: int, after: int, reason: str, **more: object) -> None:
        self.told = f"{what} {before} -> {after}: {reason}"
        row = {"time": time.time(), "what": what, "from": before, "to": after, "reason": reason, **more}
        with (self._run_dir / LOG_FILE).open("a") as file:
            file.write(json.dumps(row) + "\n")
