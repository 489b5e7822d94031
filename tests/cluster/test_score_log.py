"""The score log: what is written first stays, whoever writes at the same time and whatever is killed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cluster.score_log import Entry, ScoreLog, score_key

IMAGES = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)


def test_scores_come_back_bit_for_bit(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).standard_normal(100).astype(np.float32) * np.float32(1e-7)
    log = ScoreLog(tmp_path, "votes")
    log.write("a", Entry(scores))
    found = ScoreLog(tmp_path, "votes").read("a")
    assert found is not None
    assert found.scores is not None
    assert found.scores.tobytes() == scores.tobytes()


def test_a_failure_comes_back_with_its_reason(tmp_path: Path) -> None:
    ScoreLog(tmp_path, "votes").write("a", Entry(None, "no answer"))
    assert ScoreLog(tmp_path, "votes").read("a") == Entry(None, "no answer")


def test_of_many_who_write_at_once_all_get_what_one_has_written(tmp_path: Path) -> None:
    log = ScoreLog(tmp_path, "votes")
    with ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(lambda n: log.write("a", Entry(np.float32([n]))).scores.tolist(), range(40)))
    assert len({tuple(scores) for scores in kept}) == 1
    assert [file.name for file in (tmp_path / "scores" / "votes").iterdir()] == ["a.json"]


def test_what_a_killed_writer_leaves_behind_is_no_entry(tmp_path: Path) -> None:
    folder = tmp_path / "scores" / "votes"
    folder.mkdir(parents=True)
    (folder / ".half").write_text('{"sco')
    assert ScoreLog(tmp_path, "votes").read("a") is None


def test_rewards_are_kept_apart(tmp_path: Path) -> None:
    ScoreLog(tmp_path, "votes").write("a", Entry(np.float32([1])))
    assert ScoreLog(tmp_path, "other").read("a") is None
    assert not ScoreLog(tmp_path, "other").exists()


def test_a_key_depends_on_ticket_images_and_prompt() -> None:
    keys = [
        score_key("000000-0000", IMAGES, "p"),
        score_key("000000-0001", IMAGES, "p"),
        score_key("000000-0000", IMAGES + 1, "p"),
        score_key("000000-0000", IMAGES, "q"),
        score_key("000000-0000", IMAGES.reshape(1, 2, 8, 3), "p"),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == score_key("000000-0000", IMAGES.copy(), "p")
