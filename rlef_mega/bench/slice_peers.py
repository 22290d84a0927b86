"""A worker of `rlef bench slice`: our policy update beside Hugging Face's, with Liger's kernels
where they can run, on the same slice and the same batch.
"""

import dataclasses
import gc
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from rlef_mega.bench import beside_hf
from rlef_mega.bench.against_hf import describe_batch, on_policy_targets, policy_update
from rlef_mega.bench.hf_policy import HuggingFacePolicy, has_liger
from rlef_mega.bench.slice_model import REQUEST
from rlef_mega.bench.slice_phases import slice_batch
from rlef_mega.bench.workload import RESULT
from rlef_mega.config import TrainConfig, load_config
from rlef_mega.flops import LlamaShape
from rlef_mega.megatron import parallel
from rlef_mega.megatron.learner import Learner
from rlef_mega.parts import make_learner
from rlef_mega.run.launch import worker_main

PACKAGES = ("transformers", "liger-kernel", "flash-attn", "torch", "triton")


def work(folder: Path) -> int:
    config = load_config(folder / "config.toml", [], TrainConfig)
    # the reference is no part of an update
    config = config.model_copy(update={"ppo": config.ppo.model_copy(update={"beta": 0.0})})
    request = json.loads((folder / REQUEST).read_text())
    ranks = parallel.initialize(config.parallel, seed=config.run.seed)
    device, dtype = ranks.device, getattr(torch, config.model.dtype)
    learner = make_learner(config, ranks)
    batch = slice_batch(config, LlamaShape(**request["shape"]), request)
    batch, targets = on_policy_targets(learner, config, batch)
    forget_critic(learner)
    peer = HuggingFacePolicy(
        Path(config.model.path),
        device,
        dtype,
        config.learner.policy,
        temperature=config.rollout.temperature,
        clip_eps=config.ppo.clip_eps,
        recompute=config.model.recompute == "full",
    )
    duel = beside_hf.Duel(
        lambda: policy_update(learner, batch, targets),
        peer,
        batch,
        targets,
        device,
        dtype,
        deadline=request["deadline"],
    )
    found = duel.run(beside_hf.ways(device, [request["microbatch_tokens"]]), request["repeats"])
    measured = dataclasses.asdict(found) | describe_batch(batch)
    measured["peer"] = "Hugging Face with Liger" if has_liger(device) else "Hugging Face"
    measured["versions"] = {name: installed(name) for name in PACKAGES}
    if device.type == "cuda" and not has_liger(device):
        measured["unmeasured"] = ["Liger's kernels: no package liger_kernel"]
    (folder / RESULT).write_text(json.dumps(measured))
    parallel.shutdown(ranks)
    return 0


def forget_critic(learner: Learner) -> None:
    """Its memory is the peer's."""
    learner.critic = None
    gc.collect()
    if learner.ranks.device.type == "cuda":
        torch.cuda.empty_cache()


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    worker_main(work)
