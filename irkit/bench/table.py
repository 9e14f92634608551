"""A report as a table for the terminal."""

import statistics
from typing import TYPE_CHECKING

from irkit.bench.measure import Measure, Report

if TYPE_CHECKING:
    from rich.table import Table

_LABELS = {
    "import": "importing libraries",
    "load": "loading, to a first token",
    "first_token": "first token, prompt of {}",
    "prefill": "prefill of {}",
    "decode": "decode at context {}",
    "decode_json": "decode by a JSON schema at {}",
    "json_masks": "masks of that, a token, at {}",
    "of_bandwidth": "of memory bandwidth, at {}",
    "peak_memory": "peak memory",
    "serve": "serving {} at once",
    "serve_gain": "{} at once / one",
    "serve_first_token": "first token while {} are read",
    "serve_chunks": "the same, in chunks' time",
    "serve_long": "those {}, to their end",
    "serve_cost": "cost of streaming over HTTP",
}


def as_table(report: Report) -> "Table":
    """Medians over the runs, and irkit's values divided by the peer's."""
    from rich.table import Table

    bandwidth = statistics.median(report.bandwidth)
    about = "\n".join(f"{engine}: {line}" for engine, line in report.engines.items())
    table = Table(
        title=f"{report.model} ({report.size / 1e6:.0f} MB)",
        caption=f"medians of {len(report.bandwidth)} runs; memory read at {bandwidth / 1e9:.1f} GB/s by "
        f"{report.threads} threads{', one core kept busy' * report.busy}\n{about}",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for engine in report.engines:
        table.add_column(engine, justify="right")
    peers = [engine for engine in report.engines if engine != "irkit"]
    for peer in peers:
        table.add_column(f"irkit / {peer}", justify="right")
    for measure in report.measures:
        values = [_shown(measure, measure.median(e)) if e in measure.values else "" for e in report.engines]
        ratios = ["" if (ratio := measure.ratio(peer)) is None else f"{ratio:.2f}" for peer in peers]
        table.add_row(_LABELS[measure.name].format(measure.tokens), *values, *ratios)
    return table


def _shown(measure: Measure, value: float) -> str:
    if measure.name in ("serve_gain", "serve_chunks"):
        return f"{value:.2f}"
    if measure.name in ("of_bandwidth", "serve_cost"):
        return f"{value:.0%}"
    if measure.name == "peak_memory":
        return f"{value / 1e6:,.0f} MB"
    if measure.name == "json_masks":
        return f"{value * 1e6:,.0f} µs"
    if measure.name in ("prefill", "decode", "decode_json", "serve"):
        return f"{value:,.1f} tokens/s"
    return f"{value * 1000:,.0f} ms"
