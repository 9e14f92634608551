"""How fast a model runs here, how near that is to what the memory allows, and how another engine does beside it.

Every run starts a fresh process for each engine, so that loading is timed and memory counted each time; then the
engines take turns, one measure after the other, and only one computes at a time.
"""

from irkit.bench.measure import Measure, Report, bench
from irkit.bench.table import as_table

__all__ = ["Measure", "Report", "as_table", "bench"]
