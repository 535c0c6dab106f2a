"""``report.html``: a run on one page that opens offline, loads nothing and runs no script."""

from fedfuse_simulations.report.build import read_metrics, render, write_report

__all__ = ["read_metrics", "render", "write_report"]
