"""Markdown tables and a plot from the figures of speed.py.

python benchmarks/speed_report.py bench_data/results/speed-28.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

LAYERS = 28
GB = 1e9
LINES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))  # of one colour


class Figures:
    """Medians of speed.py's JSON, scaled to 28 layers where fewer were measured."""

    def __init__(self, figures: dict):
        self.figures = figures

    def models(self, kind: str) -> list[tuple[str, str]]:
        """(group, name) of all that have figures of this kind."""
        groups = self.figures["values"]
        pairs = [(group, name) for group, names in self.figures["groups"].items() for name in names if group in groups]
        return [pair for pair in pairs if any(f": {kind} " in cell for cell in groups[pair[0]].get(pair[1], {}))]

    def runs(self, group: str, name: str, cell: str) -> list[float]:
        return self.figures["values"][group].get(name, {}).get(cell, [])

    def value(self, group: str, name: str, cell: str, layers: int) -> float | None:
        """The median; with fewer layers, medians scaled by the layer's own time."""
        runs = self.runs(group, name, f"{layers}: {cell}")
        if not runs or layers >= LAYERS:
            return median(runs) if runs else None
        one = self.runs(group, name, f"1: {cell}")
        if not one:
            return None
        return median(one) + (LAYERS - 1) / (layers - 1) * (median(runs) - median(one))

    def decode(self, group: str, name: str, context: int) -> float | None:
        """Seconds a token."""
        return self.value(group, name, f"decode {context}", self.figures["layers"])

    def prefill(self, group: str, name: str, tokens: int) -> float | None:
        return self.value(group, name, f"prefill {tokens}", self.figures["few"])

    def cells(self, kind: str) -> list[int]:
        """Contexts or prompt lengths that were measured."""
        found = set()
        for models in self.figures["values"].values():
            for cells in models.values():
                found |= {int(cell.split()[-1]) for cell in cells if f": {kind} " in cell}
        return sorted(found)

    def bandwidth(self, group: str) -> float:
        return median(self.figures["bandwidth"][group])

    def peer(self, group: str) -> str | None:
        return next((name for name in self.figures["groups"][group] if is_peer(name)), None)

    def peers(self) -> str:
        """What ours are compared with, for the heads of columns."""
        return ", ".join(
            sorted({name.split()[0] for names in self.figures["groups"].values() for name in names if is_peer(name)})
        )

    def bytes(self, name: str, context: int) -> float:
        return self.figures["bytes_per_token"][name] + context * self.figures["cache_bytes_per_token"]


def is_peer(name: str) -> bool:
    return not name.startswith("ours")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def ratio(ours: float | None, other: float | None) -> str:
    """How many times faster than `other` seconds `ours` is."""
    return "–" if not ours or not other else f"{other / ours:.2f} ×"


def decode_table(figures: Figures) -> str:
    contexts = [c for c in figures.cells("decode") if c != 100]
    shown = [c for c in contexts if c in (128, 1024)]
    head = ["decode", *(f"tokens/s at {c}" for c in contexts), *(f"/ {figures.peers()} at {c}" for c in shown)]
    head += ["GB a token at 128", "read bandwidth GB/s", "share of it"]
    rows = []
    for group, name in figures.models("decode"):
        times = {c: figures.decode(group, name, c) for c in contexts}
        peer = figures.peer(group)
        against = [figures.decode(group, peer, c) if peer and peer != name else None for c in shown]
        read, bandwidth = figures.bytes(name, 128), figures.bandwidth(group)
        share = read / times[128] / bandwidth if times.get(128) else None
        rows.append(
            [name, *(number(1 / t if t else None) for t in times.values())]
            + [ratio(times[c], other) for c, other in zip(shown, against)]
            + [number(read / GB), number(bandwidth / GB, 1), "–" if share is None else f"{share:.0%}"]
        )
    return table(head, rows)


def prefill_table(figures: Figures) -> str:
    prompts, layers = figures.cells("prefill"), figures.figures["layers"]
    head = ["prefill", *(f"tokens/s, {p} tokens" for p in prompts), *(f"/ {figures.peers()}, {p}" for p in prompts)]
    head += ["all 28 layers, 128 tokens"] if layers >= LAYERS else []
    rows = []
    for group, name in figures.models("prefill"):
        times = {p: figures.prefill(group, name, p) for p in prompts}
        peer = figures.peer(group)
        against = [figures.prefill(group, peer, p) if peer and peer != name else None for p in prompts]
        row = [name, *(number(p / t if t else None, 1) for p, t in times.items())]
        row += [ratio(times[p], other) for p, other in zip(prompts, against)]
        full = figures.value(group, name, "prefill 128", layers) if layers >= LAYERS else None
        rows.append(row + ([number(128 / full if full else None, 1)] if layers >= LAYERS else []))
    return table(head, rows)


def context_table(figures: Figures) -> str:
    head = ["longer context", "ms a token at 100", "at 2000", "extra", "reading the cache", "extra / reading"]
    rows = []
    for group, name in figures.models("decode"):
        near, far = figures.decode(group, name, 100), figures.decode(group, name, 2000)
        if near is None or far is None:
            continue
        reading = 1900 * figures.figures["cache_bytes_per_token"] / figures.bandwidth(group)
        times = [number(1e3 * t, 1) for t in (near, far, far - near, reading)]
        rows.append([name, *times, number((far - near) / reading)])
    return table(head, rows)


def load_table(figures: Figures) -> str:
    layers = figures.figures["layers"]
    head = ["load", "s to first token, cold", "reading the files, cold", "ratio"]
    head += ["s to first token, warm", "reading, warm", "ratio", "peak memory GB"]
    rows = []
    for group, name in figures.models("peak"):
        row = [name]
        for how in ("cold", "warm"):
            times = [figures.runs(group, name, f"{layers}: {how} {what}") for what in ("first token", "read")]
            first, read = (median(runs) if runs else None for runs in times)
            row += [number(first), number(read), number(first / read if first and read else None)]
        peak = figures.runs(group, name, f"{layers}: peak GB")
        rows.append([*row, number(max(peak) if peak else None)])
    return table(head, rows)


def markdown(figures: Figures) -> str:
    data = figures.figures
    where, load = data["machine"], data["load_average"]
    runs = max(len(runs) for models in data["values"].values() for cells in models.values() for runs in cells.values())
    scaled = f"decode and memory with {data['layers']} layers; prefill with {data['few']}"
    return "\n\n".join(
        [
            f"`{data['command']}`",
            f"{where['processor']}, {where['threads']} threads, {where['memory_gib']} GiB, torch {where['torch']}, "
            f"{where['system']}. {scaled}; times of fewer than 28 layers are scaled. Medians of up to {runs} runs; "
            f"load average {load[0]:.1f} to {load[2]:.1f}, median {load[1]:.1f}; {data['seconds'] / 60:.0f} minutes.",
            decode_table(figures),
            context_table(figures),
            prefill_table(figures),
            load_table(figures),
        ]
    )


def plot(figures: Figures, file: Path) -> bool:
    """Tokens a second against context; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5), layout="constrained")
    colours = dict(zip(figures.figures["groups"], pyplot.rcParams["axes.prop_cycle"].by_key()["color"]))
    drawn: dict[str, int] = {}
    for group, name in figures.models("decode"):
        times = {c: figures.decode(group, name, c) for c in figures.cells("decode")}
        points = [(c, 1 / t) for c, t in times.items() if t and t > 0]
        peer = is_peer(name)
        style = ":" if peer else LINES[drawn.get(group, 0)]
        drawn[group] = drawn.get(group, 0) + (not peer)
        axes.plot(*zip(*points), linestyle=style, color=colours[group], marker="s" if peer else "o", label=name)
    axes.set(xlabel="context, tokens", ylabel="decode, tokens/s", xlim=0, ylim=0)
    axes.set_title(
        f"ChatGLM-6B, {figures.figures['machine']['processor'].split(' (')[0]}, "
        f"{figures.figures['machine']['threads']} threads"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(file, dpi=120)
    return True


def write_report(data: dict, file: Path) -> str:
    """Writes the table and the plot beside the JSON file; returns the table."""
    figures = Figures(data)
    text = markdown(figures)
    file.with_suffix(".md").write_text(text + "\n")
    if not plot(figures, file.with_suffix(".png")):
        print("no plot: pip install matplotlib", file=sys.stderr)
    return text


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(write_report(json.loads(Path(argument).read_text()), Path(argument)))
