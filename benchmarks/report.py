"""Makes table and plot from measurements: `python -m benchmarks.report RESULTS.json`.

A figure is the median over the rounds, a ratio the median of the ratios within the rounds.
"""

import json
from pathlib import Path
from statistics import median
from typing import Any
from typing import NamedTuple

import typer

OURS, MACHINE, LOOP = "keras_mamba2", "machine", "loop"
MARKERS = ("<!-- {0}: begin -->", "<!-- {0}: end -->")


class Row(NamedTuple):
    """A line of the table: what the subjects report under `key`, or its share of a ceiling."""

    label: str
    key: str
    direction: int = 0  # 1 where more is better, -1 where less is, 0 where nothing is compared
    ceiling: str | None = None  # a figure of the machine


def main(path: Path):
    """Adds a summary to the results, plots it beside them, and puts the table in the README."""
    results = json.loads(path.read_text())
    results["summary"] = summarize(results)
    path.write_text(json.dumps(results, indent=2) + "\n")
    plot(results, path.with_suffix(".png"))
    write_table(table(results), path.parents[1] / "README.md")


def subjects(results: dict[str, Any]) -> list[str]:
    """The models, ours first."""
    return [name for name in results["rounds"][0] if not name.startswith((MACHINE, LOOP))]


def rows(results: dict[str, Any]) -> list[Row]:
    workload, batch_sizes = results["workload"], results["batch_sizes"]
    lengths, long = workload["prefill_tokens"], workload["long_prompt_tokens"]
    # A GPU's bandwidth is what a copy reaches, as its makers and users count.
    bandwidth = {"cpu": "read_gb_per_s", "gpu": "copy_gb_per_s"}[workload["platform"]]
    rate = "matmul_gflop_per_s"
    return [
        *(Row(f"decode, batch {b}, ms/token", f"decode_ms_{b}", -1) for b in batch_sizes),
        *(Row(f"prefill {t}, tokens/s", f"prefill_tokens_per_s_{t}", 1) for t in lengths),
        Row("peak memory after imports, MB", "peak_mb_import"),
        Row("peak memory after decoding, MB", "peak_mb_decode", -1),
        Row("peak memory after prefill, MB", "peak_mb_prefill", -1),
        *(
            Row(f"decode, batch {b}, of the bandwidth", f"decode_gb_per_s_{b}", ceiling=bandwidth)
            for b in batch_sizes
        ),
        *(
            Row(f"prefill {t}, of the matrix rate", f"prefill_gflop_per_s_{t}", ceiling=rate)
            for t in lengths
        ),
        *(
            Row(
                f"decode, batch {b}, after {long:,} tokens / after {workload['prompt_tokens']}",
                f"long_context_{b}",
            )
            for b in workload["long_batch_sizes"]
        ),
    ]


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """For each subject and key the median, and how many times better ours is."""
    rounds = [r for r in results["rounds"] if "read_gb_per_s" in r.get(MACHINE, {})]
    summary = {MACHINE: {k: median(r[MACHINE][k] for r in rounds) for k in rounds[0][MACHINE]}}
    for subject in subjects(results):
        summary[subject] = {}
        for _, key, direction, ceiling in rows(results):
            found = [r for r in rounds if key in r.get(subject, {})]
            figures = [r[subject][key] / (r[MACHINE][ceiling] if ceiling else 1) for r in found]
            ratios = [
                (r[OURS][key] / r[subject][key]) ** direction
                for r in found
                if key in r.get(OURS, {})
            ]
            if figures:
                better = median(ratios) if ratios and direction and subject != OURS else None
                summary[subject][key] = {"median": median(figures), "times_better": better}
    return summary


def write_table(table: str, readme: Path, name: str = "table") -> None:
    """Replaces what is between two markers; the rest of the page is written by hand."""
    begin, end = (marker.format(name) for marker in MARKERS)
    text = readme.read_text() if readme.exists() else f"{begin}\n{end}\n"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    readme.write_text(f"{before}{begin}\n{table}\n{end}{after}")


def table(results: dict[str, Any]) -> str:
    names = subjects(results)
    lines = [f"| | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for row in rows(results):
        cells = [cell(results, subject, row) for subject in names]
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n" + caption(results)


def caption(results: dict[str, Any]) -> str:
    machine, ceilings, workload = (
        results["machine"],
        results["summary"][MACHINE],
        results["workload"],
    )
    speed = f"reads {ceilings['read_gb_per_s']:.1f} GB/s"
    if workload["platform"] == "gpu":
        speed = f"{machine['gpu']}: copies {ceilings['copy_gb_per_s']:.0f} GB/s"
    versions = ", ".join(f"{package} {v}" for package, v in results["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores: {speed}, {workload['dtype']} matrix products "
        f"{ceilings['matmul_gflop_per_s']:,.0f} GFLOP/s. Load average before the run: "
        f"{machine['load_before']:.1f}. `{results['command']}` on {results['date'][:10]} at commit "
        f"{results['commit']}; {versions}."
    )


def cell(results: dict[str, Any], subject: str, row: Row) -> str:
    found = results["summary"][subject].get(row.key)
    if found is None:
        states = {state for r in results["rounds"] for state in r.get(subject, {})}
        return next((state for state in ("failed", "absent") if state in states), "")
    text = f"{found['median']:.0%}" if row.ceiling else number(found["median"])
    return text + (f" ({number(found['times_better'])}x)" if found["times_better"] else "")


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def plot(results: dict[str, Any], path: Path) -> None:
    """The first row of each kind: decoding, prefill, and the last of peak memory."""
    from matplotlib.figure import Figure

    names = subjects(results)
    by_kind = {row.label.split()[0]: row for row in reversed(rows(results)) if row.direction}
    figure = Figure(figsize=(10, 2.2), layout="constrained")
    panels = figure.subplots(1, len(by_kind), sharey=True)
    for panel, row in zip(panels, reversed(by_kind.values()), strict=True):
        found = [results["summary"][subject].get(row.key) for subject in names]
        values = [f["median"] if f else 0 for f in found]
        bars = panel.barh(names, values, color=["tab:orange"] + ["silver"] * (len(names) - 1))
        panel.bar_label(bars, [number(v) if v else "" for v in values], padding=3)
        panel.set_title(row.label, fontsize=10)
        panel.margins(x=0.2)
        panel.set_xticks([])
        panel.spines[["top", "right", "bottom"]].set_visible(False)
    panel.invert_yaxis()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    typer.run(main)
