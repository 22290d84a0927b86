"""Rollouts driven by several processes at once: each its share, then all hold all of it.

Eight processes over gloo, each with an event loop and simulated servers of its own (simulated.py),
as data-parallel leaders on as many nodes would have; no model. Measured are the gathering of the
episodes, of which every process then has all, and what a process drives. Here they share this
machine's cores. Run as a module it is the worker.
"""

import asyncio
import hashlib
import json
import pickle
import tempfile
import time
from pathlib import Path

import torch.distributed as dist

from rlef_mega.bench.dialogues import RULES, curriculum_chat, fast_servers
from rlef_mega.bench.figures import Figure, Report, describe_benchmark
from rlef_mega.bench.simulated import made_up_problems
from rlef_mega.bench.workload import RESULT
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.rollout import DialogueLoop, join_shares
from rlef_mega.run.launch import launch, worker_main
from rlef_mega.run.ranks import gather, my_share

PROCESSES, EPISODES = 8, 1024
REPEATS = 5


def benchmark(processes: int = PROCESSES, episodes: int = EPISODES) -> Report:
    with tempfile.TemporaryDirectory(prefix="rlef-bench-") as name:
        folder = Path(name)
        (folder / "episodes").write_text(str(episodes))
        curriculum_chat(folder / "tokenizer")
        code = launch("rlef_mega.bench.leaders", folder, processes)
        if code:
            raise RuntimeError(f"the processes ended with exit code {code}")
        ranks = json.loads((folder / RESULT).read_text())
    for name in ("digest", "all"):
        if len({rank[name] for rank in ranks}) > 1:
            raise RuntimeError("the processes do not hold the same episodes")
    return Report(
        f"rlef bench leaders: {processes} processes, {episodes} episodes",
        describe_benchmark(processes=processes, episodes=episodes),
        (
            Figure("dialogues a process drove", "dialogues", tuple(r["drove"] for r in ranks)),
            Figure("episodes a process holds", "episodes", tuple(r["all"] for r in ranks)),
            Figure("its share, pickled", "MiB", tuple(r["bytes"] / 2**20 for r in ranks)),
            Figure(
                "gathering",
                "s",
                tuple(max(each) for each in zip(*(r["gather_s"] for r in ranks), strict=True)),
            ),
            Figure("rolling out and gathering", "s", tuple(r["wall_s"] for r in ranks)),
        ),
    )


def work(folder: Path) -> int:
    dist.init_process_group("gloo")
    episodes = int((folder / "episodes").read_text())
    chat = ChatFormat.from_folder(folder / "tokenizer")
    problems = made_up_problems(64)
    chosen = [problems[number % len(problems)] for number in range(episodes)]
    engine, judge = fast_servers(chat)
    dist.barrier()  # all processes begin together
    begun = time.perf_counter()
    share = asyncio.run(DialogueLoop(engine, judge, chat, RULES).run_my_share(chosen, 0))
    held = join_shares(lambda: share)
    wall_s = time.perf_counter() - begun
    gather_s = []
    for _ in range(REPEATS):
        dist.barrier()
        begun = time.perf_counter()
        gather(share)
        gather_s.append(time.perf_counter() - begun)
    assert [episode.problem_id for episode in held.episodes] == [p.id for p in chosen]
    mine = {
        "drove": len(share.episodes),
        "asked": len(my_share(chosen)),
        "all": len(held.episodes),
        "bytes": len(pickle.dumps(share)),
        "gather_s": gather_s,
        "wall_s": wall_s,
        "requests": engine.take_counts()["requests"],
        "turns": sum(len(episode.turns) for episode in share.episodes),
        # tokens and turns: what a pickle's memory of equal objects does not change
        "digest": hashlib.sha256(repr(held.episodes).encode()).hexdigest(),
    }
    ranks = gather(mine)
    if dist.get_rank() == 0:
        (folder / RESULT).write_text(json.dumps(ranks))
    dist.barrier()
    return 0


if __name__ == "__main__":
    worker_main(work)
