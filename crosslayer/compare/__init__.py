"""Several designs trained under one budget: a table, plots and a report of what they cost and what they lose."""

from crosslayer.compare.config import CompareConfig, Sample
from crosslayer.compare.results import Results
from crosslayer.compare.run import compare
from crosslayer.compare.table import format_table

__all__ = ["CompareConfig", "Results", "Sample", "compare", "format_table"]
