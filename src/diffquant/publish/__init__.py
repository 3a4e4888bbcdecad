"""What is shown to others: the demo's sample grid and HTML page. Loads no torch."""

from diffquant.publish.grid import column_label, sample_grid
from diffquant.publish.page import ModelPictures, render_page
from diffquant.publish.rows import DemoModel, DemoRow

__all__ = ["DemoModel", "DemoRow", "ModelPictures", "column_label", "render_page", "sample_grid"]
