"""The live display: one line a role, reward with its trend, and how long it will still take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from cluster.attempt import Show, Status
from learner.company import FIRST
from protocol.log import LOG, is_json
from protocol.recipe import Recipe
from protocol.shares import bottleneck, busy_shares

BARS = "▁▂▃▄▅▆▇█"
TREND_LENGTH = 40
NUM_REMARKS = 2
SHARES = {"clip_fraction": "clip", "pairs/accuracy": "pairs won"}
"""What is shown of an algorithm's own metrics, where it has them."""


@contextmanager
def display(recipe: Recipe, run_dir: Path) -> Iterator[Show]:
    """Yields what the driver calls with its status: a live table on a terminal, log lines elsewhere."""
    console = Console()
    history = History(run_dir / "metrics.jsonl")
    if is_json() or not console.is_terminal:
        yield PlainLines(recipe, history).show
        return
    with Live(console=console, refresh_per_second=4) as live:
        yield lambda status: live.update(panel(recipe, history.read(), status))


class History:
    """The rounds that metrics.jsonl holds by now."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[dict[str, Any]]:
        """Returns all complete rows; the file of a run is small beside its checkpoints."""
        if not self._path.exists():
            return []
        lines = self._path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


class PlainLines:
    """A line when the phase changes and a line a round, for logs: the first learner's, whatever ranks it has."""

    def __init__(self, recipe: Recipe, history: History) -> None:
        self._recipe, self._history = recipe, history
        self._phase, self._scaling, self._num_shown = "", "", len(history.read())

    def show(self, status: Status) -> None:
        """Prints what is new."""
        if status.phase != self._phase:
            self._phase = status.phase
            LOG.info(status.phase)
        if status.scaling != self._scaling:
            self._scaling = status.scaling
            LOG.info(status.scaling)
        rows = self._history.read()
        # A restarted learner goes back to its checkpoint; its rounds are told again.
        self._num_shown = min(self._num_shown, len(rows))
        for position in range(self._num_shown, len(rows)):
            line = round_line(self._recipe, rows[: position + 1], status)
            LOG.info(line, extra={"role": FIRST, "round": rows[position]["round"]})
        self._num_shown = len(rows)


def round_line(recipe: Recipe, rows: list[dict[str, Any]], status: Status) -> str:
    """Returns a round in one line."""
    row = rows[-1]
    reward = f"reward {row['reward/mean']:.3f}  " if "reward/mean" in row else ""
    share = "".join(f"{name} {row[key]:.2f}  " for key, name in SHARES.items() if key in row)
    told = "".join(f"\n{words}" for words in remarks(row))
    return (
        f"round {row['round'] + 1}/{recipe.rounds}  {reward}loss {row['loss']:.3g}  "
        f"{share}learner {row['time/learner_s']:.1f} s  wait {row['time/wait_s']:.1f} s  "
        f"{busy(status)}  ETA {duration(eta_s(recipe, rows))}{told}"
    )


def remarks(row: dict[str, Any]) -> list[str]:
    """Returns what a person should know of a round."""
    left_out = [name.removeprefix("left_out/") for name in row if name.startswith("left_out/")]
    remarks = [f"the optional reward {label} failed: this round is trained without it" for label in left_out]
    if "firewall/reason" in row:
        remarks.append(f"FIREWALL: {row['firewall/reason']}")
    return remarks


def panel(recipe: Recipe, rows: list[dict[str, Any]], status: Status) -> Group:
    """Returns the live display."""
    table = Table.grid(padding=(0, 2))
    attempt = f", attempt {status.attempt + 1}, {status.restarts} restarts" if status.attempt else ""
    table.add_row("phase", status.phase + attempt)
    table.add_row("round", f"{len(rows)} of {recipe.rounds}")
    if rows:
        name = "reward/mean" if any("reward/mean" in row for row in rows) else "loss"
        values = [row[name] for row in rows if name in row]
        table.add_row(name.split("/")[0], f"{values[-1]:.3f}  {trend(values)}  (first {values[0]:.3f})")
        for key, words in SHARES.items():
            if key in rows[-1]:
                table.add_row(words, f"{rows[-1][key]:.2f}")
        for words in [words for past in rows for words in remarks(past)][-NUM_REMARKS:]:
            table.add_row("remark", words)
        table.add_row("ETA", duration(eta_s(recipe, rows)))
    table.add_row("busy", busy(status))
    table.add_row("tickets", status.queue)
    if status.scaling:
        table.add_row("scaling", status.scaling)
    return Group(table, ProgressBar(total=recipe.rounds, completed=len(rows), width=60))


def trend(values: list[float]) -> str:
    """Returns the last values as a row of bars."""
    shown = values[-TREND_LENGTH:]
    low, high = min(shown), max(shown)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in shown)


def busy(status: Status) -> str:
    """Returns each role's share of time spent working, and what to raise if one reward holds up all others."""
    shares = busy_shares(status.progress)
    hint = bottleneck(shares)
    return "  ".join(f"{role} {100 * share:.0f} %" for role, share in shares.items()) + (f"  ({hint})" if hint else "")


def eta_s(recipe: Recipe, rows: list[dict[str, Any]]) -> float:
    """Returns the time left if rounds go on as the last few did."""
    recent = rows[-5:]
    mean_s = sum(row["time/learner_s"] + row["time/wait_s"] for row in recent) / len(recent)
    return mean_s * (recipe.rounds - len(rows))


def duration(seconds: float) -> str:
    """Returns a time as people read it."""
    minutes, rest_s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{rest_s:02d}" if hours else f"{minutes:02d}:{rest_s:02d}"
