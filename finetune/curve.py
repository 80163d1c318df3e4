"""The loss of a run, step by step: curve.csv while it trains, curve.png at its end."""

from __future__ import annotations

import csv
from pathlib import Path

from transformers import TrainerCallback

COLUMNS = ("step", "loss", "learning_rate", "grad_norm")


class Curve(TrainerCallback):
    """Writes the trainer's own log, which a resumed run takes over from its checkpoint."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_log(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            write_csv(self.folder / "curve.csv", state.log_history)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            draw(self.folder / "curve.png", state.log_history)


def rows_of(log: list[dict]) -> list[dict]:
    return [entry for entry in log if "loss" in entry]


def write_csv(path: Path, log: list[dict]) -> None:
    partial = path.with_suffix(".partial")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows_of(log))
    partial.replace(path)


def draw(path: Path, log: list[dict]) -> None:
    """Without matplotlib one line says so; the numbers are in curve.csv."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no curve.png: `pip install matplotlib` draws it from now on; curve.csv has the numbers")
        return
    rows = rows_of(log)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", title="training loss")
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows])
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
