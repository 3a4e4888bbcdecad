"""What is shown to others: cards, the page of a comparison, the sample grid. Loads no torch."""

from diffquant.publish.compare_page import render_comparison, render_comparisons
from diffquant.publish.grid import column_label, sample_grid

__all__ = ["column_label", "render_comparison", "render_comparisons", "sample_grid"]
