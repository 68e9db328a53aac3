# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = ["matplotlib==3.11.2", "numpy==2.4.6", "scipy==1.17.1", "tyro==1.0.17", "wandb==0.31.0"]
# ///
"""Figures and tables from the recorded runs of any number of scripts, environments and seeds.

    python compare.py runs                                    every run below runs/
    python compare.py runs --save results/cartpole.csv        the same, and keep the small numbers behind it
    python compare.py results/cartpole.csv --prefix cartpole  the same figures and tables from those numbers alone
    python compare.py my-team/my-project                      runs on W&B (needs `wandb login`; local runs do not)

A local run is read from its W&B record with W&B's own reader, `wandb leet inspect`. Whatever its source, a run is first
reduced to what --save writes: its config, a summary of all rows, and at most 100 rows, each the mean of a stretch of
training. Figures and tables see nothing else, so saved numbers give the same ones again.

Runs that share environment, script (`exp_name`) and framework count as seeds of one curve. Estimates over seeds are the
interquartile mean with a 95 % percentile bootstrap interval (Agarwal et al. 2021, arXiv 2108.13264).
"""

import csv
import itertools
import json
import math
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.stats import trim_mean


@dataclass(frozen=True)
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]] = ("runs",)  # folders with runs, CSVs of --save, entity/project[/group]
    output: Path = Path("figures")  # folder for the figures
    prefix: str = "compare"  # figures are named PREFIX_returns.png, PREFIX_times.png, ...
    title: str = ""  # heading of every figure, by default the environment
    save: Path | None = None  # CSV for the numbers behind it all; configs and summaries go to a .json beside it


# The order of panels, bars and columns; keys that are not listed follow by name. Colours are safe for colour-blind
# readers: Okabe-Ito for scripts (grey for its yellow, which is lost on white), Paul Tol's "muted" for phases.
SCRIPT_COLOURS = {
    "ppo_torch": "#D55E00",
    "ppo_jax": "#009E73",
    "ppo_mlx": "#0072B2",
    "ppo_lstm_jax": "#CC79A7",
    "sac_jax": "#56B4E9",
    "td3_jax": "#E69F00",
    "mpo_jax": "#000000",
    "vpg_torch": "#882255",
}
PHASE_COLOURS = {
    "forward": "#88CCEE",
    "step": "#332288",
    "sample": "#44AA99",
    "gae": "#117733",
    "shuffle": "#4477AA",
    "update": "#000000",
    "loss": "#CC6677",
    "kl": "#DDCC77",
    "weight_update": "#882255",
    "target_update": "#AA4499",
    "record": "#6F4E37",
    "other": "#BBBBBB",
}
SPARE_COLOURS = ["#661100", "#6699CC", "#AA4466", "#999933"]
TITLES = {
    **{f"times/{phase}": phase.replace("_", " ") for phase in PHASE_COLOURS},
    "times/step": "environment step",
    "times/gae": "GAE",
    "times/loss": "loss and gradient",
    "times/kl": "KL",
    "times/update": "fused update",
    "times/update/rollout": "rollout within update",
    "times/record": "recording",
    "times/loss/forward": "network within loss",
    "times/loss/policy": "policy loss",
    "times/loss/value": "value loss",
    "times/loss/critic": "critic loss",
    "times/loss/actor": "actor loss",
    "times/loss/alpha": "temperature loss",
    "times/loss/dual": "temperature dual",
    "losses/policy_loss": "policy loss",
    "losses/actor_loss": "actor loss",
    "losses/value_loss": "value loss",
    "losses/critic_loss": "critic loss",
    "losses/entropy": "entropy (nats)",
    "losses/approx_kl": "approximate KL, k3 (nats)",
    "losses/old_approx_kl": "approximate KL, k1 (nats)",
    "losses/clipfrac": "clipped fraction",
    "losses/explained_variance": "explained variance",
    "losses/grad_norm": "gradient norm",
    "charts/learning_rate": "learning rate",
}
OUTSIDE_ITERATIONS = {f"times/{name}" for name in ("evaluation", "checkpoint", "probe", "compile")}
SECTIONS = {"charts", "losses", "times", "histograms"}
RETURN, RETURNS, EVALUATION = "charts/episodic_return", "histograms/episodic_return", "charts/evaluation_return"
IDENTITY = ["run", "env_id", "script", "framework", "seed", "global_step"]
PRIVATE = {"_wandb", "run_dir", "resume", "resumed_at", "load_model", "wandb_mode", "wandb_project", "wandb_entity"}
SMOOTHING = 0.03  # of a run's steps


class BadInput(Exception):
    """One line that says what is wrong with the input and what would be right."""


class Histogram(NamedTuple):
    edges: np.ndarray  # (K + 1,)
    counts: np.ndarray  # (K,)

    def below(self, edges: np.ndarray) -> np.ndarray:
        """How many values lie below each of `edges`, those of a bin spread evenly over it."""
        return np.interp(edges, self.edges, np.concatenate([[0.0], np.cumsum(self.counts)]))


Row = dict[str, Any]  # "global_step", scalars under their keys, and sometimes a Histogram under RETURNS


@dataclass(frozen=True)
class Run:
    id: str
    config: dict[str, Any]
    summary: dict[str, float]
    rows: list[Row]

    @property
    def env_id(self) -> str:
        return self.config["env_id"]

    @property
    def framework(self) -> str:
        return self.config.get("framework", "")

    @property
    def script(self) -> str:
        name = self.config.get("exp_name", "run")
        return name if self.framework in name else f"{name} ({self.framework})"

    def has(self, key: str) -> bool:
        return any(is_drawn(row, key) for row in self.rows)

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values: a mean at the middle of the steps since the row before it, an evaluation at its own."""
        ends = [row["global_step"] for row in self.rows]
        places = ends if key == EVALUATION else [(a + b) / 2 for a, b in zip([0, *ends], ends, strict=False)]
        points = [(place, row[key]) for place, row in zip(places, self.rows, strict=True) if is_drawn(row, key)]
        steps, values = np.array(points, dtype=float).T
        return steps, values


def is_drawn(row: Row, key: str) -> bool:
    return key in row and not (key.startswith("times/") and row[key] == 0)  # which a log axis has no place for


# ------------------------------------------------------------------------------------------------------ record to Run


def read_item(item: dict[str, Any]) -> Row:
    """What is drawn of a history row of W&B, flat as on disk or nested as from its API."""
    row = {
        key: value
        for key, value in item.items()
        if key.split("/")[0] in SECTIONS and isinstance(value, int | float) and math.isfinite(value)
    }
    nested = item.get(RETURNS) or {}
    edges = item.get(f"{RETURNS}.bins", nested.get("bins"))
    if packed := nested.get("packedBins"):  # what W&B's server makes of edges that are evenly spaced
        edges = [packed["min"] + i * packed["size"] for i in range(packed["count"] + 1)]
    counts = item.get(f"{RETURNS}.values", nested.get("values"))
    if edges and counts:
        row[RETURNS] = Histogram(np.array(edges, dtype=float), np.array(counts, dtype=float))
    return row | {"global_step": int(item["global_step"])}


def join_segments(segments: Iterable[tuple[int, list[Row]]]) -> list[Row]:
    """Rows of a run from its (resumed_at, rows), oldest first. A resumed run repeats the steps after its checkpoint, so
    its rows replace the earlier ones there; within a segment the last value of a key at a step counts."""
    joined: dict[int, Row] = {}
    for resumed_at, rows in segments:
        joined = {step: row for step, row in joined.items() if step <= resumed_at}
        for row in rows:
            joined[row["global_step"]] = joined.get(row["global_step"], {}) | row
    return [joined[step] for step in sorted(joined)]


def split_where_steps_fall(rows: list[Row]) -> list[tuple[int, list[Row]]]:
    """Segments of a history that W&B has already strung together."""
    segments: list[tuple[int, list[Row]]] = []
    for row in rows:
        if not segments or row["global_step"] < segments[-1][1][-1]["global_step"]:
            segments.append((row["global_step"] - 1, []))
        segments[-1][1].append(row)
    return segments


def steps_since(rows: list[Row], start: int = 0) -> np.ndarray:
    """The steps that each row is the mean of, as weights"""
    return np.maximum(np.diff([row["global_step"] for row in rows], prepend=start), 1)


def summarise(rows: list[Row]) -> dict[str, float]:
    """The numbers of the tables. Phases are mean seconds of the iterations that ran phase by phase (timed/...), and of
    the others (fused/...); steps per second are all steps over all time, slow iterations included."""
    summary = {"steps": rows[-1]["global_step"]}
    for row in rows:
        for key in {"charts/return_last_100", EVALUATION} & row.keys():
            summary[key.removeprefix("charts/")] = row[key]
    evaluations = [row[EVALUATION] for row in rows if EVALUATION in row]
    if len(evaluations) >= 5:
        summary["evaluation_return_last_5"] = float(np.mean(evaluations[-5:]))
    steps = np.diff([row["global_step"] for row in rows], prepend=0)
    speeds = np.array([row.get("charts/SPS", 0.0) for row in rows])
    if np.any(speeds > 0):
        summary["steps_per_second"] = steps[speeds > 0].sum() / (steps[speeds > 0] / speeds[speeds > 0]).sum()
    is_timed = np.array(["times/loss" in row for row in rows])
    is_fused = np.array(["times/update" in row for row in rows]) & ~is_timed
    weights = steps_since(rows)
    for kind, chosen in (("timed", is_timed), ("fused", is_fused)):
        for key in {key for row in itertools.compress(rows, chosen) for key in row} - OUTSIDE_ITERATIONS:
            if key.startswith("times/"):
                seconds = np.array([row.get(key, 0.0) for row in rows])
                summary[key.replace("times", kind, 1)] = float(np.average(seconds[chosen], weights=weights[chosen]))
    return summary


def thin(rows: list[Row], at_most: int = 100) -> list[Row]:
    """At most `at_most` rows, each the mean of a stretch that ends at its step, where it can be with an evaluation"""
    merged, start, start_step = [], 0, 0
    for bound in np.linspace(0, len(rows) - 1, min(at_most, len(rows))).astype(int)[1:]:
        evaluated = [index for index in range(start, bound) if EVALUATION in rows[index]]
        end = evaluated[-1] + 1 if evaluated else bound
        merged.append(merge(rows[start:end], start_step))
        start, start_step = end, rows[end - 1]["global_step"]
    return [*merged, merge(rows[start:], start_step)]


def merge(rows: list[Row], start_step: int) -> Row:
    """Means over the steps since `start_step`; of evaluations the last"""
    merged: Row = {"global_step": rows[-1]["global_step"]}
    weights = steps_since(rows, start_step)
    for key in {key for row in rows for key in row} - {"global_step", RETURNS}:
        has_key = [key in row for row in rows]
        values = [row[key] for row in rows if key in row]
        mean = values[-1] if key == EVALUATION else np.average(values, weights=weights[has_key])
        merged[key] = float(f"{mean:.5g}")  # five digits are more than a figure shows, and keep saved files small
    histograms = [row[RETURNS] for row in rows if RETURNS in row]
    if histograms:
        edges = np.linspace(min(h.edges[0] for h in histograms), max(h.edges[-1] for h in histograms), 33)
        below = sum(histogram.below(edges) for histogram in histograms)
        merged[RETURNS] = Histogram(edges, np.diff(np.rint(below)))  # rounding the sum loses no episode
    return merged


def make_run(run_id: str, config: dict[str, Any], segments: list[tuple[int, list[Row]]], where: object) -> list[Run]:
    """One run, or none where nothing was recorded yet."""
    missing = {"env_id", "seed"} - config.keys()
    if segments and missing:
        raise BadInput(
            f"{where}: the recorded config lacks {' and '.join(sorted(missing))}; runs of these scripts have it"
        )
    rows = join_segments(segments)
    if not rows:
        print(f"note: {where} has recorded nothing yet and is left out", file=sys.stderr)
        return []
    kept = {key: value for key, value in config.items() if key not in PRIVATE}
    if config.get("load_model"):
        kept["load_model"] = True  # that there was a model tells runs apart; its path does not
    return [Run(run_id, kept, summarise(rows), thin(rows))]


# ------------------------------------------------------------------------------------------------------- reading runs


def read_runs(sources: Iterable[str]) -> list[Run]:
    runs: list[Run] = []
    directories: set[Path] = set()
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files = [file.resolve() for file in path.rglob("run-*.wandb")]
            found = {file.parents[2] for file in files if file.parents[1].name == "wandb"}
            if not found:
                raise BadInput(f"{source}: no recorded run in it; a run directory holds wandb/*run-*/run-*.wandb")
            directories |= found
        elif path.is_file() and path.suffix == ".csv":
            runs += read_csv(path)
        elif not path.exists() and "/" in source and source[:1] not in "./~" and path.suffix != ".csv":
            runs += read_project(*source.split("/", 2))  # a group may hold slashes: ALE/Pong-v5__ppo_torch
        else:
            raise BadInput(f"{source}: give a folder with runs, a CSV written by --save, or entity/project on W&B")
    with ThreadPoolExecutor() as pool:
        runs += [run for read in pool.map(read_directory, sorted(directories)) for run in read]
    if not runs:
        raise BadInput(f"{' '.join(sources)}: no run with a recorded row; give run directories, for example runs/")
    unique = {run.id: run for run in runs}.values()
    return sorted(unique, key=lambda run: (run.env_id, rank(SCRIPT_COLOURS, run.script), run.config["seed"], run.id))


def read_directory(directory: Path) -> list[Run]:
    """Its run, or several where a script keeps them all in one folder"""
    segments, is_damaged = defaultdict(list), False
    for file in directory.glob("wandb/*run-*/run-*.wandb"):
        identity, config, rows, has_end = {}, {}, [], False
        for record in inspect(file):
            has_end |= record["type"] == "exit"
            body = record.get(record["type"], {})
            if record["type"] == "run":
                identity = body
                config |= body.get("config", {}).get("update", {})
            elif record["type"] == "config":
                config |= body.get("update", {})
            elif record["type"] == "history" and "global_step" in body["item"]:
                rows.append(read_item(body["item"]))
        if identity:  # a run killed in its first second may leave an empty file
            order = config.get("segment", 0), identity["start_time"]  # the clock may have been set back
            segments[identity["run_id"]].append((order, config, rows, has_end))
        elif rows:
            is_damaged = True
            print(f"note: {file}: its beginning is damaged, so it is left out", file=sys.stderr)
    runs = []
    for run_id, of_run in (segments or ({} if is_damaged else {"": []})).items():
        of_run.sort(key=lambda segment: segment[0])
        config = of_run[-1][1] if of_run else {}
        if of_run and not of_run[-1][-1]:
            print(f"note: the record in {directory} has no end: its run was killed, or goes on", file=sys.stderr)
        runs += make_run(run_id, config, [(one.get("resumed_at", 0), rows) for _, one, rows, _ in of_run], directory)
    return runs


def inspect(file: Path) -> list[dict[str, Any]]:
    """Records of a W&B transaction log; those of a killed run up to the kill."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    result = subprocess.run(command, capture_output=True, text=True)
    complaint = " ".join(result.stderr.split())
    if result.returncode:
        raise BadInput(f"{file}: W&B cannot read this record; remove the run or copy it again ({complaint})")
    if "corrupt" in complaint:
        print(f"note: {file}: {complaint}", file=sys.stderr)
    return [json.loads(line) for line in result.stdout.splitlines()]


def read_project(entity: str, project: str, group: str | None = None) -> list[Run]:
    import wandb  # slow to import, and needed here only

    where, found = f"{entity}/{project}", []
    try:
        if not wandb.login(prompt=False):
            raise RuntimeError("log in with `wandb login`")
        for run in wandb.Api().runs(where, filters={"group": group} if group else {}):
            rows = [read_item(item) for item in run.scan_history() if "global_step" in item]
            found.append((run.id, dict(run.config), rows))
    except Exception as error:  # of any kind: W&B, the network and the login each have their own
        raise BadInput(f"{where}: no such folder here, and from W&B: {str(error).partition(chr(10))[0]}") from error
    runs = []
    for run_id, config, rows in found:
        runs += make_run(run_id, config, split_where_steps_fall(rows), f"{where}/{run_id}")
    return runs


# ------------------------------------------------------------------------------------------------------ saved numbers


def write_csv(runs: list[Run], path: Path) -> None:
    """One line for each row of a run, one column for each key; configs and summaries go to a .json beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = sorted({key for run in runs for row in run.rows for key in row} - {"global_step"})
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*IDENTITY, *keys])
        for run in runs:
            identity = [run.id, run.env_id, run.script, run.framework, run.config["seed"]]
            for row in run.rows:
                writer.writerow([*identity, row["global_step"], *(to_cell(row.get(key, "")) for key in keys)])
    about = {run.id: {"config": run.config, "summary": run.summary} for run in runs}
    path.with_suffix(".json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")


def to_cell(value: float | str | Histogram) -> float | str:
    """A histogram becomes its lowest edge, its highest edge and its counts."""
    if not isinstance(value, Histogram):
        return value
    return " ".join([repr(float(value.edges[0])), repr(float(value.edges[-1])), *(f"{n:.0f}" for n in value.counts)])


def from_cell(key: str, cell: str) -> float | Histogram:
    if key != RETURNS:
        return float(cell)
    low, high, *counts = map(float, cell.split())
    return Histogram(np.linspace(low, high, len(counts) + 1), np.array(counts))


def read_csv(path: Path) -> list[Run]:
    rows: dict[str, list[Row]] = {}
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        lines = list(csv.reader(path.read_text().splitlines()))
        columns = lines[0]
        if columns[: len(IDENTITY)] != IDENTITY or any(
            key.split("/")[0] not in SECTIONS for key in columns[len(IDENTITY) :]
        ):
            raise ValueError(f"columns {','.join(columns)}")
        for line in lines[1:]:
            cells = dict(zip(columns, line, strict=True))
            row = {key: from_cell(key, cells[key]) for key in columns[len(IDENTITY) :] if cells[key]}
            rows.setdefault(cells["run"], []).append(row | {"global_step": int(cells["global_step"])})
        runs = [Run(run_id, about[run_id]["config"], about[run_id]["summary"], rows[run_id]) for run_id in rows]
        _ = [(run.env_id, run.config["seed"], run.summary["steps"]) for run in runs]  # raises where one is missing
        return runs
    except (OSError, LookupError, TypeError, ValueError, csv.Error) as error:
        raise BadInput(f"{path}: this CSV and the .json beside it are not as --save wrote them ({error})") from error


# ------------------------------------------------------------------------------------------- statistics over seeds


def interquartile_mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    return trim_mean(values, 0.25, axis=axis)


def bootstrap_interval(values: np.ndarray, resamples: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile bootstrap interval of the interquartile mean over the seeds of (seeds, ...)."""
    draws = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(interquartile_mean(values[draws], axis=1), [2.5, 97.5], axis=0)
    return low, high


def smooth(steps: np.ndarray, values: np.ndarray, window: float) -> np.ndarray:
    """Mean of the values at most half a window away."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    first = np.searchsorted(steps, steps - window / 2, side="left")
    last = np.searchsorted(steps, steps + window / 2, side="right")
    return (total[last] - total[first]) / (last - first)


def on_common_grid(runs: list[Run], key: str, points: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all runs cover (points,), and each run's smoothed values there (runs, points)."""
    curves = [run.curve(key) for run in runs]
    start, end = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    grid = np.linspace(start, max(start, end), points)
    return grid, np.array([np.interp(grid, steps, smooth(steps, y, SMOOTHING * steps[-1])) for steps, y in curves])


def episode_shares(runs: list[Run], step_edges: np.ndarray, return_edges: np.ndarray) -> np.ndarray:
    """Share of the episodes of a stretch of training by return (returns, steps). A histogram holds the episodes since
    the one before it, so they are spread evenly over the steps between."""
    counts = np.zeros((len(return_edges) - 1, len(step_edges) - 1))
    for run in runs:
        before = 0
        for row in run.rows:
            if RETURNS in row:
                stretch = Histogram(np.array([before, row["global_step"]]), np.ones(1)).below(step_edges)
                counts += np.outer(np.diff(row[RETURNS].below(return_edges)), np.diff(stretch))
                before = row["global_step"]
    return counts / np.maximum(counts.sum(axis=0), 1e-9)


# ------------------------------------------------------------------------------------------------------------- tables


def rank(known: Iterable[str], key: str) -> tuple[int, str]:
    """Sorts known keys as they are listed, then all others by name."""
    known = list(known)
    return known.index(key) if key in known else len(known), key


def group(runs: Iterable[Run], *attributes: str) -> dict[Any, list[Run]]:
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(attrgetter(*attributes)(run), []).append(run)
    return groups


def pooling_notes(runs: list[Run]) -> list[str]:
    """What to know before taking pooled runs for the seeds of one experiment."""
    notes = []
    per_run = {"seed", "cpu", "device", "versions", "total_timesteps", "wandb_group", "segment"}
    for (env_id, script), pooled in group(runs, "env_id", "script").items():
        settings = sorted({key for run in pooled for key in run.config} - per_run)
        mixed = [key for key in settings if len({json.dumps(run.config.get(key)) for run in pooled}) > 1]
        steps = sorted(run.summary["steps"] for run in pooled)
        if mixed:
            notes.append(
                f"{script} on {env_id} pools runs that differ in {', '.join(mixed)} (--exp-name tells such apart)"
            )
        places = sorted({f"{run.config['cpu']} ({run.config.get('device')})" for run in pooled if "cpu" in run.config})
        if len(places) > 1:
            notes.append(f"{script} on {env_id} pools times of different machines: {' and '.join(places)}")
        if len({run.config["seed"] for run in pooled}) < len(pooled):
            notes.append(f"{script} on {env_id} has several runs of one seed, and each counts as a seed")
        if steps[0] < 0.98 * steps[-1]:
            notes.append(
                f"{script} on {env_id} has runs of {steps[0]:,} to {steps[-1]:,} steps; curves end with the shortest"
            )
    return notes


def number(value: float) -> str:
    return f"{value:,.{0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2}f}"


def estimate(runs: list[Run], key: str) -> str:
    """Interquartile mean and its interval, which of three or four seeds is their range; of fewer the values."""
    values = np.array([run.summary[key] for run in runs if key in run.summary])
    if len(values) == 0:
        return "–"
    text = " and ".join(number(value) for value in values)
    if len(values) >= 3:
        low, high = bootstrap_interval(values)
        text = f"{number(interquartile_mean(values))} [{number(low)}, {number(high)}]"
    return text + (f" ({len(values)} of {len(runs)} seeds)" if len(values) < len(runs) else "")


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def returns_table(runs: list[Run]) -> str:
    header = ["environment", "script", "seeds", "steps", "training return (last 100 episodes)"]
    header += ["evaluation return", "worst seed (last 100)", "steps/s (median)"]
    lines = []
    for (env_id, script), pooled in group(runs, "env_id", "script").items():
        steps = sorted(run.summary["steps"] for run in pooled)
        last = [run.summary["return_last_100"] for run in pooled if "return_last_100" in run.summary]
        speeds = [run.summary["steps_per_second"] for run in pooled if "steps_per_second" in run.summary]
        line = [env_id, script, str(len(pooled)), " to ".join(f"{count:,}" for count in sorted({steps[0], steps[-1]}))]
        line += [estimate(pooled, "return_last_100"), estimate(pooled, "evaluation_return")]
        lines.append([*line, number(min(last)) if last else "–", f"{np.median(speeds):,.0f}" if speeds else "–"])
    return markdown(header, lines)


def phase_milliseconds(runs: list[Run], kind: str) -> dict[str, float]:
    """Milliseconds of the phases of the timed or fused iterations: the mean over seeds, so that they add up."""
    measured = [run.summary for run in runs if f"{kind}/iteration" in run.summary]
    keys = {key for summary in measured for key in summary if key.startswith(f"{kind}/") and key.count("/") == 1}
    means = {key.removeprefix(f"{kind}/"): 1e3 * np.mean([one.get(key, 0.0) for one in measured]) for key in keys}
    return dict(sorted(means.items(), key=lambda item: rank(PHASE_COLOURS, item[0])))


def times_table(runs: list[Run]) -> str:
    known = [*PHASE_COLOURS, "iteration", "fused update", "fused iteration"]
    times = {}
    for name, pooled in group(runs, "env_id", "script").items():
        fused = {f"fused {part}": value for part, value in phase_milliseconds(pooled, "fused").items()}
        times[name] = phase_milliseconds(pooled, "timed") | {part: fused[part] for part in fused if part in known}
    phases = sorted({phase for one in times.values() for phase in one}, key=lambda phase: rank(known, phase))
    lines = [
        [*name, *(f"{one[phase]:.2f}" if phase in one else "–" for phase in phases)] for name, one in times.items()
    ]
    return markdown(["environment", "script", *(f"{phase} (ms)" for phase in phases)], lines) if phases else ""


def machines(runs: list[Run]) -> str:
    """Absolute times mean nothing without these."""
    places = set()
    for run in runs:
        version = run.config.get("versions", {}).get(run.framework, "")
        places.add(f"{run.framework} {version} on {run.config.get('device', 'unknown device')}")
    return " · ".join(sorted(places) + sorted({str(run.config["cpu"]) for run in runs if "cpu" in run.config}))


# ------------------------------------------------------------------------------------------------------------ figures

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "savefig.dpi": 200,  # 8 inches make 1600 pixels, to be read at half that size
}
PER_ITERATION = "ms per iteration"


def draw_all(runs: list[Run], config: Config) -> list[Path]:
    """Writes each figure whose keys were recorded: the learning curves together, the others for each environment."""
    environments = group(runs, "env_id")
    several = len(environments) > 1
    draws = {"times": draw_times, "phases": draw_phases, "losses": draw_losses, "density": draw_density}
    jobs = [("returns", draw_returns, runs, config.title or " and ".join(environments))]
    for env_id, here in environments.items():
        name = re.sub(r"[^\w.-]", "-", env_id) + "_" if several else ""
        heading = f"{config.title}: {env_id}" if config.title and several else config.title or env_id
        jobs += [(name + kind, draw, here, heading) for kind, draw in draws.items()]
    config.output.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, draw, chosen, title in jobs:
            path = config.output / f"{config.prefix}_{name}.png"
            figure = draw(chosen, title)
            if figure:
                figure.savefig(path)
                written.append(path)
            else:
                print(f"note: no {path.name}, because no run recorded what it shows", file=sys.stderr)
    return written


def new_figure(height: float, title: str, subtitle: str) -> Figure:
    figure = Figure(figsize=(8, height), layout="constrained")
    figure.suptitle(f"{title}\n{subtitle}", fontsize=9.5, wrap=True)
    return figure


def panels(figure: Any, contents: list[list[Run]], ylabel: str, sharey: bool = False) -> tuple[list[Axes], float]:
    """Axes over the steps of each of the lists of runs, and the unit of steps that their labels name."""
    count, width = len(contents), min(len(contents), 3)
    axes = list(figure.subplots(math.ceil(count / width), width, squeeze=False, sharey=sharey).flat)
    steps = [max(max(run.summary["steps"], run.config.get("total_timesteps", 0)) for run in runs) for runs in contents]
    most = max(steps)
    unit, name = (1e6, " (millions)") if most >= 1e6 else (1e3, " (thousands)") if most >= 2e3 else (1, "")
    for index, axis in enumerate(axes):
        axis.set_visible(index < count)
        axis.set_ylabel(ylabel if index % width == 0 else "")
        axis.set_xlabel(f"environment steps{name}" if index + width >= count else "")
    for axis, end in zip(axes, steps, strict=False):
        axis.set_xlim(0, max(end, 1) / unit)
    return axes[:count], unit


def seeds(runs: list[Run]) -> str:
    counts = sorted({len(pooled) for pooled in group(runs, "env_id", "script").values()})
    return "1 seed" if counts == [1] else f"{counts[0]} to {counts[-1]} seeds" if counts[1:] else f"{counts[0]} seeds"


def estimator(runs: list[Run]) -> str:
    counts = [len(pooled) for pooled in group(runs, "env_id", "script").values()]
    parts = [seeds(runs)]
    if max(counts) == 3:  # of three values nothing is trimmed
        parts.append("mean and range")
    elif max(counts) == 4:  # the 95 % interval of three or four values is their range
        parts.append("interquartile mean and range")
    elif max(counts) > 4:
        parts.append("interquartile mean, 95 % bootstrap interval")
        if {3, 4} & set(counts):
            parts.append("of 3 or 4 seeds their range")
    if min(counts) < 3 and max(counts) > 1:
        parts.append("one by one" if max(counts) == 2 else "1 or 2 seeds one by one")
    return "; ".join(parts)


def colours(runs: list[Run]) -> dict[str, str]:
    """A known script has one colour in every figure; the others share what is left, and then the spare ones."""
    scripts = list(group(runs, "script"))
    left = [colour for script, colour in SCRIPT_COLOURS.items() if script not in scripts]
    free = itertools.cycle([*left, *SPARE_COLOURS])
    return {script: SCRIPT_COLOURS.get(script) or next(free) for script in scripts}


def draw_curve(
    axis: Axes, runs: list[Run], key: str, colour: str, unit: float, scale: float = 1, each_seed: bool = False
) -> None:
    """Interquartile mean and interval over seeds, each seed as a thin line where asked for; of fewer than three these
    alone."""
    recorded = [run for run in runs if run.has(key)]
    if not recorded:
        return
    grid, values = on_common_grid(recorded, key)
    marker = "o" if grid[0] == grid[-1] else ""  # a line of one point would not show
    if len(recorded) < 3:
        axis.plot(grid / unit, scale * values.T, color=colour, linewidth=0.8, marker=marker, markersize=3)
        return
    low, high = bootstrap_interval(values)
    axis.plot(grid / unit, scale * interquartile_mean(values), color=colour, marker=marker, markersize=3)
    axis.fill_between(grid / unit, scale * low, scale * high, color=colour, alpha=0.2, linewidth=0)
    if each_seed:
        axis.plot(grid / unit, scale * values.T, color=colour, linewidth=0.6, alpha=0.6)


def logarithmic(axes: list[Axes]) -> None:
    """One log scale that begins and ends at a labelled 1, 2 or 5, so that even a narrow range shows its ticks."""
    grid = np.outer(10.0 ** np.arange(-6, 7), [1, 2, 5]).ravel()
    low = min(max(axis.dataLim.y0, axis.dataLim.minposy) for axis in axes)
    high = max(axis.dataLim.y1 for axis in axes)
    if high <= 0:
        return
    first, last = np.searchsorted(grid, [low, high], side="right")
    ticks = grid[max(first - 1, 0) : last + 1]
    for axis in axes:
        axis.set(yscale="log", ylim=(ticks[0], ticks[-1]))
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()


Panel = tuple[str, list[Run], str]  # title, runs, key


def draw_panels(
    title: str,
    contents: list[Panel],
    ylabel: str,
    height: float,
    milliseconds: bool = False,
    each_seed: bool = False,
    sharey: bool = False,
) -> Figure | None:
    """A panel for each of the contents, a curve for each script, and each seed."""
    if not contents:
        return None
    runs = list({run.id: run for _, here, _ in contents for run in here}.values())
    subtitle = f"{estimator(runs)}; smoothed over {100 * SMOOTHING:g} % of training"
    figure = new_figure(1.2 + height * math.ceil(len(contents) / 3), title, subtitle)
    axes, unit = panels(figure, [here for _, here, _ in contents], ylabel, sharey)
    for axis, (name, here, key) in zip(axes, contents, strict=True):
        for script, pooled in group(here, "script").items():
            draw_curve(axis, pooled, key, colours(runs)[script], unit, 1e3 if milliseconds else 1, each_seed)
        axis.set_title(name)
        if milliseconds:
            logarithmic([axis])
    handles = [Line2D([], [], color=colour, linewidth=2) for colour in colours(runs).values()]
    pools = group(runs, "script")
    most = {script: max(map(len, group(pooled, "env_id").values())) for script, pooled in pools.items()}
    drawn = {script: ", each drawn" * (count > 1 and (each_seed or count < 3)) for script, count in most.items()}
    texts = [f"{script} ({seeds(pooled)}{drawn[script]})" for script, pooled in pools.items()]
    figure.legend(handles, texts, loc="outside lower center", ncols=4)
    return figure


def draw_returns(runs: list[Run], title: str) -> Figure | None:
    environments = group([run for run in runs if run.has(RETURN)], "env_id")
    is_one = len(environments) == 1
    contents = [
        (kind if is_one else f"{env_id}\n{kind}", here, key)
        for kind, key in (("training", RETURN), ("evaluation, greedy", EVALUATION))
        for env_id, here in environments.items()
        if key == RETURN or max(sum(key in row for row in run.rows) for run in here) >= 5
    ]
    height, is_alone = 3.2 if len(contents) == 1 else 2.4, len(group(runs, "script")) == 1
    labels = f"{title}: return", contents, "return of an episode"
    return draw_panels(*labels, height, each_seed=is_alone, sharey=is_one)


def draw_phases(runs: list[Run], title: str) -> Figure | None:
    outside = OUTSIDE_ITERATIONS | {"times/other", "times/iteration"}
    contents = [(panel_title(key), runs, key) for key in recorded_keys(runs, "times/") if key not in outside]
    return draw_panels(f"{title}: time of each phase", contents, PER_ITERATION, 1.8, milliseconds=True)


def draw_losses(runs: list[Run], title: str) -> Figure | None:
    keys = recorded_keys(runs, "losses/") + recorded_keys(runs, "charts/learning_rate")
    contents = [(panel_title(key), runs, key) for key in keys]
    figure = draw_panels(f"{title}: losses and diagnostics", contents, "", 1.8)
    for axis, (_, _, key) in zip(figure.axes if figure else (), contents, strict=False):
        if key == "losses/explained_variance":
            axis.set_ylim(max(axis.get_ylim()[0], -1), 1)  # where returns hardly differ it has no lower bound
    return figure


def panel_title(key: str) -> str:
    return TITLES.get(key, key.partition("/")[2].replace("_", " "))


def recorded_keys(runs: list[Run], prefix: str) -> list[str]:
    keys = {key for run in runs for row in run.rows for key in row if key.startswith(prefix)}
    return sorted(keys, key=lambda key: rank(TITLES, key))


def draw_times(runs: list[Run], title: str) -> Figure | None:
    """Above, what an iteration consists of; below, its phases over training."""
    runs = [run for run in runs if "timed/iteration" in run.summary]
    if not runs:
        return None
    scripts = group(runs, "script")
    times = {script: phase_milliseconds(pooled, "timed") for script, pooled in scripts.items()}
    phases = sorted(
        {phase for bar in times.values() for phase in bar} - {"iteration"}, key=lambda p: rank(PHASE_COLOURS, p)
    )
    spare = itertools.cycle(SPARE_COLOURS)
    fused = ["update"] * any(run.has("times/update") for run in runs)
    colour = {phase: PHASE_COLOURS.get(phase) or next(spare) for phase in phases + fused}
    heights = [0.8 + 0.35 * len(scripts), 2.3 * math.ceil(len(scripts) / 3)]
    subtitle = f"above: iterations run phase by phase, mean of {seeds(runs)} (in brackets: iterations run fused)\n"
    subtitle += f"below: over training, {estimator(runs)}; smoothed, log scale\n{machines(runs)}"
    figure = new_figure(1.5 + sum(heights), f"{title}: time of an iteration", subtitle)
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    bars = above.subplots()
    longest = max(bar["iteration"] for bar in times.values())
    sizes = {script: iteration_steps(pooled[0]) for script, pooled in scripts.items()}
    for script, bar in times.items():
        label = script if len(set(sizes.values())) == 1 else f"{script}\n({sizes[script]:,} steps)"
        end = 0.0
        for phase in (phase for phase in phases if phase in bar):
            patch = bars.barh(
                label, bar[phase], left=end, color=colour[phase], height=0.7, edgecolor="white", linewidth=0.5
            )
            end += bar[phase]
            if bar[phase] > 0.05 * longest:
                dark = np.dot(to_rgb(colour[phase]), [0.3, 0.6, 0.1]) < 0.5
                bars.bar_label(
                    patch, [number(bar[phase])], label_type="center", fontsize=8, color="white" if dark else "black"
                )
        of_fused = phase_milliseconds(scripts[script], "fused").get("iteration")
        total = number(end) + (f" ({number(of_fused)})" if of_fused else "")
        bars.text(end + 0.01 * longest, label, total, va="center", fontsize=8, fontweight="bold")
    bars.set(xlabel=PER_ITERATION, xlim=(0, 1.25 * longest))
    bars.grid(axis="y", visible=False)
    bars.invert_yaxis()
    axes, unit = panels(below, [runs] * len(scripts), PER_ITERATION, sharey=True)
    for axis, (script, pooled) in zip(axes, scripts.items(), strict=True):
        for phase in (phase for phase in colour if phase != "other"):
            draw_curve(axis, pooled, f"times/{phase}", colour[phase], unit, scale=1e3)
        axis.set_title(script)
    logarithmic(axes)
    handles = [Patch(color=colour[phase], label=panel_title(f"times/{phase}")) for phase in colour]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def iteration_steps(run: Run) -> int:
    """Environment steps of an iteration, which differ between scripts"""
    config = run.config
    rollout = config.get("num_envs", 0) * config.get("num_steps", 0) * int(config.get("processes", 1))
    return config.get("log_interval", rollout)


def draw_density(runs: list[Run], title: str) -> Figure | None:
    runs = [run for run in runs if run.has(RETURNS)]
    if not runs:
        return None
    scripts = group(runs, "script")
    histograms = [row[RETURNS] for run in runs for row in run.rows if RETURNS in row]
    return_edges = np.linspace(min(h.edges[0] for h in histograms), max(h.edges[-1] for h in histograms), 41)
    step_edges = np.linspace(0, max(run.summary["steps"] for run in runs), 61)
    subtitle = f"all episodes of {seeds(runs)}; each column adds up to 1"
    figure = new_figure(
        1 + 2.4 * math.ceil(len(scripts) / 3), f"{title}: distribution of returns during training", subtitle
    )
    axes, unit = panels(figure, [runs] * len(scripts), "return of an episode", sharey=True)
    least = 0.003
    for axis, (script, pooled) in zip(axes, scripts.items(), strict=True):
        shares = np.maximum(episode_shares(pooled, step_edges, return_edges), least)
        image = axis.pcolormesh(step_edges / unit, return_edges, shares, norm=LogNorm(least, 1), cmap="viridis")
        axis.set_title(f"{script} ({seeds(pooled)})")
        axis.grid(visible=False)
    bar = figure.colorbar(image, ax=axes, label="share of episodes", ticks=[least, 0.01, 0.03, 0.1, 0.3, 1])
    bar.ax.set_yticklabels([f"≤ {100 * least:g} %", "1 %", "3 %", "10 %", "30 %", "100 %"])
    bar.minorticks_off()
    return figure


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    try:
        if config.save and config.save.suffix != ".csv":
            raise BadInput(f"--save {config.save}: must end in .csv; a .json of the same name goes beside it")
        runs = read_runs(config.runs)
        for note in pooling_notes(runs):
            print(f"note: {note}", file=sys.stderr)
        if config.save:
            write_csv(runs, config.save)
        written = draw_all(runs, config)
    except (BadInput, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(
        returns_table(runs),
        estimator(runs),
        times_table(runs),
        machines(runs),
        "\n".join(map(str, written)),
        sep="\n\n",
    )


if __name__ == "__main__":
    main()
