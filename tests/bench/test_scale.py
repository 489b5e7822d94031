"""The measurement of the plumbing runs, with real actors, streams and a server: a small one here."""

from __future__ import annotations

from bench.scale import measure


def test_the_plumbing_is_measured_with_and_without_a_pace() -> None:
    measured = measure(counts=(1, 2), shape=(2, 3, 4, 8, 8), paced_s=0.2)
    cases = [(point["actors"], point["compute_s"]) for point in measured["points"]]
    assert cases == [(1, 0), (1, 0.2), (2, 0), (2, 0.2)]
    for point in measured["points"]:
        assert 0 < point["groups_per_s"] <= point["actors"] / max(point["compute_s"], 1e-3)
        assert min(point[part] for part in ("latency_s", "workers_s", "server_s", "rank_s", "broadcast_s")) > 0
