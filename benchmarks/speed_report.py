"""Markdown tables and a plot from the figures of speed.py.

python benchmarks/speed_report.py bench_data/results/speed-28.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

LAYERS = 28
GB = 1e9
LINES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))  # of one colour


class Figures:
    """The rounds of speed.py's JSON, scaled to 28 layers where fewer were measured."""

    def __init__(self, figures: dict):
        self.figures = figures

    def models(self, kind: str) -> list[tuple[str, str]]:
        """(group, name) of all that have figures of this kind."""
        groups = self.figures["values"]
        pairs = [(group, name) for group, names in self.figures["groups"].items() for name in names if group in groups]
        return [pair for pair in pairs if any(f": {kind} " in cell for cell in groups[pair[0]].get(pair[1], {}))]

    def runs(self, group: str, name: str | None, cell: str) -> list[float]:
        return self.figures["values"][group].get(name or "", {}).get(cell, [])

    def times(self, group: str, name: str | None, cell: str, layers: int) -> list[float]:
        """Seconds of each round; with fewer than 28 layers scaled by the layer's own time."""
        runs = self.runs(group, name, f"{layers}: {cell}")
        if layers >= LAYERS:
            return runs
        ones = self.runs(group, name, f"1: {cell}")
        return [one + (LAYERS - 1) / (layers - 1) * (run - one) for run, one in zip(runs, ones)]

    def decode(self, group: str, name: str | None, context: int) -> list[float]:
        """Seconds a token."""
        return self.times(group, name, f"decode {context}", self.figures["layers"])

    def batch(self, group: str, name: str | None, sequences: int) -> list[float]:
        """Seconds a step of all sequences."""
        return self.times(group, name, f"batch {sequences}", self.figures["layers"])

    def prefill(self, group: str, name: str | None, tokens: int) -> list[float]:
        return self.times(group, name, f"prefill {tokens}", self.figures["few"])

    def bandwidth(self, group: str, name: str, context: int) -> list[float]:
        """Bytes a second that memory gave before each of `decode`."""
        return self.runs(group, name, f"{self.figures['layers']}: bandwidth decode {context}")

    def cells(self, kind: str) -> list[int]:
        """Contexts or prompt lengths that were measured."""
        found = set()
        for models in self.figures["values"].values():
            for cells in models.values():
                found |= {int(cell.split()[-1]) for cell in cells if f": {kind} " in cell}
        return sorted(found)

    def peers(self) -> list[tuple[str, str]]:
        """(group, name) of all that ours are compared with."""
        values = self.figures["values"]
        pairs = [(group, name) for group, names in self.figures["groups"].items() for name in names if is_peer(name)]
        return [(group, name) for group, name in pairs if values.get(group, {}).get(name)]

    def bytes(self, name: str, context: int) -> float | None:
        weights = self.figures["bytes_per_token"][name]
        return None if weights is None else weights + context * self.figures["cache_bytes_per_token"]


def is_peer(name: str) -> bool:
    return not name.startswith("ours")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def middle(values) -> float | None:
    values = list(values)
    return median(values) if values else None


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def rate(count: int, seconds: list[float], digits: int = 2) -> str:
    return number(middle(count / t for t in seconds), digits)


def ratio(ours: list[float], others: list[float]) -> str:
    """How many times faster than `others` (seconds) `ours` are, the median over the rounds."""
    faster = middle(other / mine for mine, other in zip(ours, others))
    return "–" if faster is None else f"{faster:.2f} ×"


def decode_table(figures: Figures) -> str:
    contexts = [c for c in figures.cells("decode") if c != 100]
    batches = figures.cells("batch")
    head = ["decode", *(f"tokens/s at {c}" for c in contexts), *(f"{b} sequences together" for b in batches)]
    head += ["GB a token at 128", "read bandwidth GB/s", "share of it"]
    rows = []
    for group, name in dict.fromkeys(figures.models("decode") + figures.models("batch")):
        times = {c: figures.decode(group, name, c) for c in contexts}
        read, bandwidths = figures.bytes(name, 128), figures.bandwidth(group, name, 128)
        share = middle(read / t / b for t, b in zip(times.get(128, []), bandwidths) if read)
        rows.append(
            [name, *(rate(1, seconds) for seconds in times.values())]
            + [rate(b, figures.batch(group, name, b)) for b in batches]
            + [number(read and read / GB), number(middle(b / GB for b in bandwidths), 1)]
            + ["–" if share is None else f"{share:.0%}"]
        )
    return table(head, rows)


def prefill_table(figures: Figures) -> str:
    prompts, layers = figures.cells("prefill"), figures.figures["layers"]
    scaled = layers >= LAYERS > figures.figures["few"]
    head = ["prefill", *(f"tokens/s, {p} tokens" for p in prompts)] + ["all 28 layers, 128 tokens"] * scaled
    rows = []
    for group, name in figures.models("prefill"):
        row = [name, *(rate(p, figures.prefill(group, name, p), 1) for p in prompts)]
        rows.append(row + [rate(128, figures.times(group, name, "prefill 128", LAYERS), 1)] * scaled)
    return table(head, rows)


def peer_table(figures: Figures, group: str, peer: str) -> str:
    """How many times faster than this peer ours are, each cell the median over the rounds."""
    kinds = {"decode": figures.decode, "batch": figures.batch, "prefill": figures.prefill}
    cells = [(kind, c) for kind in kinds for c in figures.cells(kind) if kinds[kind](group, peer, c)]
    layers = figures.figures["layers"]
    head = [
        f"times as fast as {peer}",
        *(f"{kind} {c}" for kind, c in cells),
        "first token, warm",
        "cold",
        "peak memory",
    ]
    rows = []
    for name in (name for name in figures.figures["groups"][group] if not is_peer(name)):
        row = [ratio(kinds[kind](group, name, c), kinds[kind](group, peer, c)) for kind, c in cells]
        for how in ("warm", "cold"):
            row.append(ratio(*(figures.runs(group, one, f"{layers}: {how} first token") for one in (name, peer))))
        peaks = [figures.runs(group, one, f"{layers}: peak GB") for one in (name, peer)]
        row.append(f"{max(peaks[0]) / max(peaks[1]):.2f} of its" if all(peaks) else "–")
        if set(row) != {"–"}:
            rows.append([name, *row])
    return table(head, rows)


def context_table(figures: Figures) -> str:
    head = ["longer context", "ms a token at 100", "at 2000", "extra", "reading the cache", "extra / reading"]
    rows = []
    for group, name in figures.models("decode"):
        near, far = figures.decode(group, name, 100), figures.decode(group, name, 2000)
        if not near or not far:
            continue
        extra = [b - a for a, b in zip(near, far)]
        cache = 1900 * figures.figures["cache_bytes_per_token"]
        reading = [cache / bandwidth for bandwidth in figures.bandwidth(group, name, 2000)]
        times = [number(1e3 * median(values), 1) for values in (near, far, extra, reading)]
        rows.append([name, *times, number(median(e / r for e, r in zip(extra, reading)))])
    return table(head, rows)


def load_table(figures: Figures) -> str:
    layers = figures.figures["layers"]
    head = ["load", "s to first token, cold", "reading the files, cold", "ratio"]
    head += ["s to first token, warm", "reading, warm", "ratio", "peak memory until then, GB"]
    rows = []
    for group, name in figures.models("peak"):
        row = [name]
        for how in ("cold", "warm"):
            first, read = (figures.runs(group, name, f"{layers}: {how} {what}") for what in ("first token", "read"))
            row += [number(middle(first)), number(middle(read))]
            row += [number(middle(one / other for one, other in zip(first, read)))]
        peak = figures.runs(group, name, f"{layers}: peak GB")
        rows.append([*row, number(max(peak) if peak else None)])
    return table(head, rows)


def markdown(figures: Figures) -> str:
    data = figures.figures
    where, load = data["machine"], data["load"] or [0.0]
    runs = max(len(runs) for models in data["values"].values() for cells in models.values() for runs in cells.values())
    scaled = f"decode and memory with {data['layers']} layers; prefill with {data['few']}"
    notes = [f"{name}: {version}" for name, version in data["versions"].items()]
    notes += [f"{name} is left out: {error}" for name, error in data["failed"].items()]
    return "\n\n".join(
        [
            "\n".join(f"    {command}" for command in data["commands"]),
            f"{where['processor']}, {where['threads']} threads, {where['memory_gib']} GiB, torch {where['torch']}, "
            f"{where['system']}. {scaled}; times of fewer than 28 layers are scaled. Medians of up to {runs} rounds; "
            "ratios and shares are medians of what stood side by side in each; "
            f"load average {min(load):.1f} to {max(load):.1f}, median {median(load):.1f}; "
            f"{data['seconds'] / 60:.0f} minutes.",
            *["\n".join(f"* {note}" for note in notes)] * bool(notes),
            decode_table(figures),
            context_table(figures),
            prefill_table(figures),
            load_table(figures),
            *(peer_table(figures, group, peer) for group, peer in figures.peers()),
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
        points = [(c, median(1 / t for t in seconds)) for c, seconds in times.items() if seconds]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("figures", nargs="+", type=Path, metavar="FILE.json", help="figures of speed.py")
    for file in parser.parse_args().figures:
        print(write_report(json.loads(file.read_text()), file))


if __name__ == "__main__":
    main()
