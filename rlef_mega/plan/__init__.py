"""What a run would take: memory by rank, time by phase, the layout and the split of GPUs that suit
it, its cost. `rlef plan`.

Arithmetic alone; nothing is started, allocated or measured. `memory.py` and `step_time.py` are of
one network in one layout; `rollouts.py` of servers and the dialogues they hold; `job.py` puts them
together to a run, `search.py` looks through layouts. Where layers stand is the trainer's own rule
(megatron/stages.py), as are micro-batches (packing.py) and FLOPs (flops.py). Constants stand in
`hardware.py` with where they come from, and what the arithmetic is held against in
`published.toml`.
"""
