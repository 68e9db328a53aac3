"""What a run gave W&B, by W&B's own reader."""

import time
from pathlib import Path

import compare


def whole(file: Path) -> list[dict]:
    """A transaction log once it has its end, which W&B's server may write after the run is over."""
    records, deadline = [], time.monotonic() + 30
    while not any(record["type"] == "exit" for record in records):
        assert time.monotonic() < deadline, f"{file} has no end"
        records = compare.inspect(file)
    return records


def config_and_rows(run_dir: Path) -> tuple[dict, list[dict]]:
    (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    bodies = [(record["type"], record.get(record["type"])) for record in whole(file)]
    config = next(body["config"]["update"] for kind, body in bodies if kind == "run")
    return config, [body["item"] for kind, body in bodies if kind == "history"]
