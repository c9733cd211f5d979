"""Makes tables and plots of what `python -m benchmarks` measured: `python -m benchmarks.report`.

A figure is the median over the rounds, with [least, most] where they differ; a ratio is the median
of the ratios within the rounds.
"""

import json
from pathlib import Path
from statistics import median
from typing import Annotated
from typing import Any
from typing import NamedTuple

import typer

from benchmarks.workload import SIZES

HERE = Path(__file__).parent
OURS, MACHINE, LOOP, COMPILER = "keras_mamba2", "machine", "loop", "compiler"
MARKERS = ("<!-- {0}: begin -->", "<!-- {0}: end -->")


class Row(NamedTuple):
    """A line of the table: what the subjects report under `key`, or its share of a ceiling."""

    label: str
    key: str
    direction: int = 0  # 1 where more is better, -1 where less is, 0 where nothing is compared
    ceiling: str | None = None  # a figure of the machine


def main(
    folder: Annotated[Path, typer.Argument()] = HERE,
    name: Annotated[str, typer.Argument()] = "cpu",
):
    """Puts the results `results/NAME_SIZE.json` of FOLDER into its README.md and a plot.

    The first size gets a table of everything, all sizes together one line each.
    """
    by_size = {}
    for size in SIZES:
        path = folder / "results" / f"{name}_{size}.json"
        if path.exists():
            results = by_size[size] = json.loads(path.read_text())
            results["summary"] = summarize(results)
            path.write_text(json.dumps(results, indent=2) + "\n")
    write_table(sizes_table(by_size), folder / "README.md", "sizes")
    if (first := next(iter(SIZES))) in by_size:
        write_table(table(by_size[first]), folder / "README.md")
        plot(by_size, folder / "results" / f"{name}.png")


def subjects(results: dict[str, Any]) -> list[str]:
    """The models, ours first."""
    return [n for n in results["rounds"][0] if not n.startswith((MACHINE, LOOP, COMPILER))]


def rows(results: dict[str, Any]) -> list[Row]:
    workload, batch_sizes = results["workload"], results["batch_sizes"]
    lengths, contexts = workload["prefill_tokens"], workload["long_contexts"]
    # A GPU's bandwidth is what a copy reaches, as its makers and users count.
    bandwidth = {"cpu": "read_gb_per_s", "gpu": "copy_gb_per_s"}[workload["platform"]]
    rate = "matmul_gflop_per_s"
    return [
        *(Row(f"decode, batch {b}, ms/step", f"decode_ms_{b}", -1) for b in batch_sizes),
        *(Row(f"prefill {t:,}, tokens/s", f"prefill_tokens_per_s_{t}", 1) for t in lengths),
        Row("import, s", "import_s", -1),
        Row("load from disk, s", "load_s", -1),
        Row("first prompt and token, s", "first_call_s", -1),
        Row("second, s", "second_call_s", -1),
        Row("peak memory after imports, MB", "peak_mb_import"),
        Row("peak memory after decoding, MB", "peak_mb_decode", -1),
        Row("peak memory after prefill, MB", "peak_mb_prefill", -1),
        *(
            Row(f"decode, batch {b}, of the bandwidth", f"decode_gb_per_s_{b}", ceiling=bandwidth)
            for b in batch_sizes
        ),
        *(
            Row(f"prefill {t:,}, of the matrix rate", f"prefill_gflop_per_s_{t}", ceiling=rate)
            for t in lengths
        ),
        *(
            Row(
                f"decode, batch {b}, after {context:,} tokens / after {workload['prompt_tokens']}",
                f"long_context_{b}_{context}",
            )
            for b in workload["long_batch_sizes"]
            for context in contexts
        ),
        Row("`generate` of one token / its compiled programs alone", "generate_of_programs"),
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
                summary[subject][key] = {
                    "median": median(figures),
                    "range": [min(figures), max(figures)],
                    "times_better": better,
                }
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
    text = share(found["median"]) if row.ceiling else number(found["median"])
    lowest, highest = map(share if row.ceiling else number, found["range"])
    text += f" [{lowest}, {highest}]" if lowest != highest else ""
    return text + (f" ({number(found['times_better'])}x)" if found["times_better"] else "")


def share(value: float) -> str:
    return f"{value:.0%}"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def sizes_table(by_size: dict[str, dict[str, Any]]) -> str:
    """Decoding and prefill of one row, and what our programs take to compile."""
    names = list(dict.fromkeys(name for found in by_size.values() for name in subjects(found)))
    lines = [f"| | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for row in (
        Row("decode, ms/token", "decode_ms_1", -1),
        Row("prefill 512, tokens/s", "prefill_tokens_per_s_512", 1),
    ):
        for size, results in by_size.items():
            known = subjects(results)
            cells = [cell(results, name, row) if name in known else "" for name in names]
            lines.append(f"| {size.upper()} {row.label} | {' | '.join(cells)} |")
    lines += ["", "| | decode, compile s | prefill 512, compile s |", "| --- | --- | --- |"]
    for size, results in by_size.items():
        found = [
            r[COMPILER] for r in results["rounds"] if "compile_decode_s" in r.get(COMPILER, {})
        ]
        if found:
            keys = ("compile_decode_s", "compile_prefill_s")
            cells = [number(median(figures[key] for figures in found)) for key in keys]
            lines.append(f"| {size.upper()} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(by_size: dict[str, dict[str, Any]], path: Path) -> None:
    """Decoding over sizes, batches and contexts, and prefill over lengths."""
    from matplotlib.figure import Figure

    (first, *_), figure = by_size.values(), Figure(figsize=(10, 5.6), layout="constrained")
    workload, names = first["workload"], subjects(first)
    sizes, batches, lengths, contexts = figure.subplots(2, 2).flat

    def points(found: list[tuple[Any, dict[str, Any], str]], name: str):
        kept = [(x, r["summary"].get(name, {}).get(key)) for x, r, key in found]
        return zip(*((x, y["median"]) for x, y in kept if y), strict=True)

    over = {
        sizes: [(size.upper(), found, "decode_ms_1") for size, found in by_size.items()],
        batches: [(b, first, f"decode_ms_{b}") for b in first["batch_sizes"]],
        lengths: [(t, first, f"prefill_tokens_per_s_{t}") for t in workload["prefill_tokens"]],
        contexts: [(t, first, f"long_context_1_{t}") for t in workload["long_contexts"]],
    }
    for axes, found in over.items():
        for i, name in enumerate(names):
            if line := list(points(found, name)):
                style = "-" if name.startswith(OURS) else "--"
                axes.plot(*line, style, marker=".", color=f"C{i}", label=name)
    title = f"{next(iter(by_size)).upper()}: "
    sizes.set(title="decode one row, ms/token", yscale="log")
    batches.set(title=title + "decode, ms/step", xlabel="rows", xscale="log", yscale="log")
    lengths.set(title=title + "prefill, tokens/s", xlabel="tokens", xscale="log", ylim=0)
    contexts.set(title=title + "ms/token, long context / short")
    contexts.set(xlabel="tokens", xscale="log", ylim=(0, 1.5))
    handles, labels = lengths.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    typer.run(main)
