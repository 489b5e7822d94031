"""Who still moves: roles are judged by what they say of themselves, which changes for as long as they live."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

HEALTH = "health"
"""The concurrency group of a service's `ping`: a thread that nothing else keeps busy."""


class Pulse:
    """Remembers when each role last said something new."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said: dict[str, object] = {}
        self._moved_at: dict[str, float] = {}

    def hear(self, said: Mapping[str, object]) -> None:
        """Takes note of every role's last words."""
        for role, words in said.items():
            if self._said.get(role) != words:
                self._said[role], self._moved_at[role] = words, self._clock()

    def silent_s(self, role: str) -> float:
        """Returns how long a role has said nothing new; a role first asked about starts at 0."""
        now = self._clock()
        return now - self._moved_at.setdefault(role, now)

    def still(self, roles: Collection[str], bound_s: float) -> list[str]:
        """Returns the roles that have said nothing new for longer than a bound, the longest silent first."""
        return sorted((role for role in roles if self.silent_s(role) > bound_s), key=self.silent_s, reverse=True)

    def forgive(self, role: str) -> None:
        """Starts a role's clock anew."""
        self._moved_at[role] = self._clock()

    def forgive_all(self) -> None:
        """Starts every clock anew: it is nobody's fault that nothing can be heard."""
        for role in self._moved_at:
            self.forgive(role)


@dataclass
class Service:
    """An actor that Ray restarts and that answers `ping` whatever else it does: a reward actor, the weight store."""

    name: str
    actor: Any
    ping: Any = None
    num_answers: int = 0
    words: dict[str, float] | None = None


class Services:
    """Asks services whether they are there, without ever waiting for the answer."""

    def __init__(self, actors: Mapping[str, Any]) -> None:
        self._services = [Service(name, actor) for name, actor in actors.items()]

    def answers(self) -> dict[str, int]:
        """Returns how often each service has answered so far, and asks those again that have."""
        for service in self._services:
            if service.ping is None or self._is_answered(service):
                service.ping = service.actor.ping.options(max_task_retries=0).remote()
        return {service.name: service.num_answers for service in self._services}

    def words(self) -> dict[str, dict[str, float]]:
        """Returns what services said when they last answered, of those that say anything."""
        return {service.name: service.words for service in self._services if service.words}

    def add(self, name: str, actor: Any) -> None:
        """Looks after one more."""
        self._services.append(Service(name, actor))

    def remove(self, name: str) -> None:
        """Looks no longer after one."""
        self._services = [service for service in self._services if service.name != name]

    def restart(self, names: Sequence[str]) -> None:
        """Kills services; Ray starts them again, and whoever waited for them asks again."""
        for service in self._services:
            if service.name in names:
                ray.kill(service.actor, no_restart=False)
                service.ping = None

    def _is_answered(self, service: Service) -> bool:
        done, _ = ray.wait([service.ping], timeout=0)
        if not done:
            return False
        with suppress(RayError):  # It is being restarted; if it never comes back, whoever needs it finds out.
            service.words = ray.get(service.ping)
        service.num_answers += 1
        return True
