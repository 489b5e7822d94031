"""What Prometheus reads from Ray's agent is what roles, queues and rows say; the dashboard shows exactly that."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray.util.metrics import Counter, Histogram

from cluster.metrics import KINDS, TELL_EVERY_S, LastRow, Metrics, Reading, Rollouts, row_readings
from cluster.redis_server import free_port
from protocol.paths import ROOT
from protocol.stream import QueueDepth

DASHBOARD = json.loads((ROOT / "cluster" / "grafana.json").read_text())
ROW = {
    **{"round": 3, "staleness": 1, "time/learner_s": 2.5, "time/wait_s": 0.5, "loss": 7.0, "kl": None},
    **{"reward/mean": 0.75, "reward/digits": 0.25, "reward/std_within_group": 0.1, "reward/std_between_groups": 0.2},
    **{"weights/version": 3, "weights/size_bytes": 1000, "weights/publish_s": 0.02, "weights/num_fetches": 2},
}
LEARNER = {"role": "learner"}


def write(folder: Path, *rows: dict[str, Any], torn: str = "") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)


def test_a_row_tells_its_round_its_rewards_by_name_and_its_costs() -> None:
    assert list(row_readings("learner", ROW)) == [
        Reading("round", 4, LEARNER),
        Reading("staleness_versions", 1, LEARNER),
        Reading("learner_seconds", 2.5, LEARNER),
        Reading("wait_seconds", 0.5, LEARNER),
        Reading("weights_bytes", 1000, {}),
        Reading("weights_publish_seconds", 0.02, {}),
        Reading("reward", 0.75, {**LEARNER, "reward": "mean"}),
        Reading("reward", 0.25, {**LEARNER, "reward": "digits"}),
    ]


def test_a_followers_row_has_no_broadcast_and_one_without_scores_no_reward() -> None:
    row = {key: value for key, value in ROW.items() if not key.startswith(("weights/", "reward/"))}
    names = [reading.name for reading in row_readings("learner-dpo", row)]
    assert names == ["round", "staleness_versions", "learner_seconds", "wait_seconds"]


def test_a_row_that_is_still_being_written_is_not_told_and_one_that_was_cut_back_is(tmp_path: Path) -> None:
    last = LastRow(tmp_path / "metrics.jsonl")
    assert last.read() is None
    write(tmp_path, {"round": 0}, {"round": 1}, torn='{"round": 2')
    assert [last.read(), last.read()] == [{"round": 1}, {"round": 1}]
    write(tmp_path, {"round": 0})
    assert last.read() == {"round": 0}


def values(rollouts: Rollouts, name: str, **said: dict[str, Any]) -> list[float]:
    words = {role.replace("_", "/"): report for role, report in said.items()}
    return [reading.value for reading in rollouts.readings(words) if reading.name == name]


def test_images_add_up_to_what_was_delivered_also_by_an_actor_that_was_replaced() -> None:
    rollouts = Rollouts()
    told = [values(rollouts, "images", rollout_0={"images": num}) for num in (8, 8, 24, 0, 8)]
    assert told == [[8], [], [16], [], [8]]
    assert values(rollouts, "images", rollout_0={"images": 8}, rollout_1={"images": 4}, learner_0={"images": 9}) == [4]


def test_each_actors_fetch_of_each_version_counts_once() -> None:
    rollouts = Rollouts()
    fetches = [{}, {"version": 0, "fetch_s": 0.5}, {"version": 0, "fetch_s": 0.5}, {"version": 1, "fetch_s": 0.25}]
    assert [values(rollouts, "weights_fetch_seconds", rollout_0=fetch) for fetch in fetches] == [[], [0.5], [], [0.25]]


Series = dict[tuple[str, str, str], float]


class Scraped:
    """A driver whose node's agent is read as Prometheus reads it."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"

    def samples(self, run: str) -> Series:
        """Returns (name, role, reward) -> value of a run's series."""
        with urllib.request.urlopen(self._url, timeout=5) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        found = [sample for family in families for sample in family.samples if sample.labels.get("run") == run]
        return {(s.name, s.labels.get("role", ""), s.labels.get("reward", "")): s.value for s in found}

    def wait_for(self, run: str, wanted: Series, tell: Callable[[], None]) -> Series:
        """Tells again and again, as a driver does, until a run's series hold what is wanted; returns them, or what
        there is by then."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            tell()
            found = self.samples(run)
            if wanted.items() <= found.items():
                break
            time.sleep(0.2)
        return found


@pytest.fixture(scope="module")
def scraped() -> Iterator[Scraped]:
    port = free_port("127.0.0.1")
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 1000},
    )
    yield Scraped(port)
    ray.shutdown()


SAID = {
    "learner/0": {"busy_s": 3.0, "alive_s": 4.0},
    "rollout/0": {"busy_s": 1.0, "alive_s": 4.0, "images": 8, "version": 3, "fetch_s": 0.5},
    "rollout/1": {"busy_s": 3.0, "alive_s": 4.0, "images": 4, "version": 3, "fetch_s": 0.25},
    "reward/digits/0": {"busy_s": 0.0, "alive_s": 4.0},
}


def test_prometheus_reads_what_the_driver_knows(scraped: Scraped, tmp_path: Path) -> None:
    write(tmp_path / "first", ROW)
    write(tmp_path / "second", {"round": 2, "staleness": 0, "time/learner_s": 1.0, "time/wait_s": 0.0})
    metrics = Metrics("read", {"learner": tmp_path / "first", "learner-dpo": tmp_path / "second"})
    wanted = {
        **{("tickets_waiting", "", ""): 5.0, ("tickets_claimed", "", ""): 2.0, ("groups_waiting", "", ""): 3.0},
        **{("busy_share", "learner", ""): 0.75, ("busy_share", "rollout", ""): 0.5, ("restarts", "", ""): 1.0},
        **{("busy_share", "reward_digits", ""): 0.0, ("images_total", "", ""): 12.0},
        **{("round", "learner", ""): 4.0, ("round", "learner-dpo", ""): 3.0},
        **{("reward", "learner", "mean"): 0.75, ("reward", "learner", "digits"): 0.25},
        **{("staleness_versions", "learner", ""): 1.0, ("learner_seconds", "learner", ""): 2.5},
        **{("wait_seconds", "learner", ""): 0.5, ("weights_bytes", "", ""): 1000.0},
        **{("weights_publish_seconds", "", ""): 0.02},
        **{("weights_fetch_seconds_count", "", ""): 2.0},
    }
    wanted = {(f"ray_sfumato_{name}", *tags): value for (name, *tags), value in wanted.items()}
    tell = partial(metrics.tell, SAID, QueueDepth(waiting=5, claimed=2), num_groups=3, restarts=1)
    found = scraped.wait_for("read", wanted, tell)
    assert {key: found.get(key) for key in wanted} == wanted
    exported = {re.sub("_(total|sum|count|bucket)$", "", name) for name, _, _ in found}
    assert exported == {f"ray_sfumato_{name}" for name in KINDS}


@pytest.mark.usefixtures("scraped")
@pytest.mark.parametrize("row", ["not json\n", '{"no": "round"}\n', '{"round": 0, "staleness": "old"}\n'])
def test_a_row_that_cannot_be_told_does_not_end_a_run(tmp_path: Path, row: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(row)
    metrics = Metrics("torn", {"learner": tmp_path})
    metrics.tell(SAID, QueueDepth(0, 0), 0, 0)


@pytest.mark.usefixtures("scraped")
def test_nothing_is_told_more_often_than_it_can_be_gathered(tmp_path: Path) -> None:
    now = [100.0]
    metrics = Metrics("paced", {}, clock=lambda: now[0])
    assert metrics.is_due()
    metrics.tell({}, QueueDepth(0, 0), 0, 0)
    assert not metrics.is_due()
    now[0] += TELL_EVERY_S
    assert metrics.is_due()


def series(name: str) -> str:
    """What Prometheus calls a metric where the dashboard asks for it."""
    kind = KINDS[name][0]
    return f"ray_sfumato_{name}" + {Counter: "_total", Histogram: "_bucket"}.get(kind, "")


def test_the_dashboard_asks_for_every_metric_there_is_and_for_no_other() -> None:
    asked = {
        name for panel in DASHBOARD["panels"] for t in panel["targets"] for name in re.findall(r"ray_\w+", t["expr"])
    }
    assert asked == {series(name) for name in KINDS}
    listed = set(re.findall(r"ray_\w+", json.dumps(DASHBOARD["templating"])))
    assert listed <= asked


def test_the_dashboard_groups_only_by_tags_that_the_metrics_have() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            (metric,) = (name for name in KINDS if f"{series(name)}{{" in target["expr"])
            tags = {"run", *KINDS[metric][2]}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) == tags
            assert '{run=~"$run"}' in target["expr"]


def test_every_panel_has_what_grafana_needs() -> None:
    assert DASHBOARD["title"]
    assert DASHBOARD["schemaVersion"] >= 36
    kinds = {variable["name"]: variable["type"] for variable in DASHBOARD["templating"]["list"]}
    assert kinds == {"datasource": "datasource", "run": "query"}
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["type"] == "timeseries"
        assert panel["description"]
        assert {target["refId"] for target in panel["targets"]} == set("ABC"[: len(panel["targets"])])
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_no_panel_lies_over_another_or_out_of_grafanas_24_columns() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 and place["h"] > 0 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above
