"""What a run did, for a person: a page, and tables in the terminal.

Everything here reads files of a run directory and nothing else, so a report can be made while the
run goes on, after it was killed, or on another machine.
"""

from rlef_mega.report.live import LiveServer
from rlef_mega.report.page import write_report
from rlef_mega.report.tables import print_comparison

__all__ = ["LiveServer", "print_comparison", "write_report"]
