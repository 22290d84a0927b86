"""Reports of a run: a page, plots, and tables in the terminal.

This package reads nothing but the files of a run directory, so a report can be made during the run,
after it was killed, or on another machine.
"""
