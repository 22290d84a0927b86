"""What a run did, for a person: a page, a table in the terminal, curves for a README.

Everything here reads files of a run directory and nothing else, so a report can be made while the
run goes on, after it was killed, or on another machine.
"""

from rlef_mega.report.live import LiveServer
from rlef_mega.report.page import write_report
from rlef_mega.report.plots import save_learning_curves
from rlef_mega.report.tables import print_comparison

__all__ = ["LiveServer", "print_comparison", "save_learning_curves", "write_report"]
