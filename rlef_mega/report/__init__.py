"""Reports of a run: a page, plots, and tables in the terminal.

This package only reads files of a run directory, so a report can be made during the run, after it
was killed, or on another machine.
"""

from rlef_mega.report.live import LiveServer
from rlef_mega.report.page import write_report
from rlef_mega.report.tables import print_comparison

__all__ = ["LiveServer", "print_comparison", "write_report"]
