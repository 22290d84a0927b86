"""Rehearse one rank of a run on a GPU that is not there: `rlef rehearse`.

The rank's own code builds the networks, scores, updates, gathers the weights and takes a
checkpoint's snapshot on the null GPU (tests/null_gpu): PyTorch's allocator, Triton's launches and
every call of the host are real, the kernels compute nothing. `rank.py` is the rehearsed rank, one
process; `command.py` chooses ranks, starts them and reports.
"""
