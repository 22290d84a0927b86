"""Estimate what a run takes: memory by rank, time by phase, layout, split of the GPUs, and cost.

`rlef plan` computes this; it starts, allocates and measures nothing. `memory.py` and `step_time.py`
are about one network in one layout, `rollouts.py` about dialogues and the servers that sample them;
`planned_run.py` combines them into a run, and `search.py` searches layouts. Pipeline stages
(megatron/network/stages.py), micro-batches (packing.py) and FLOPs (flops.py) come from the
trainer's own code. Constants and their sources are in `hardware.py`; the published measurements
with which tests compare the estimates are in tests/rlef_mega/plan/published.toml.
"""
