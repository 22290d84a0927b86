"""`rlef check-gpu`: find out in twelve minutes what works, and how fast, on one GPU.

`command.py` runs each step of `steps.py` as a process with a time limit, and `summary.py` writes
OUT/summary.md. docs/gpu_day.md says what each step shows. `doctor.py` is `rlef doctor`.
"""
