"""A rank that takes part in publications to an engine which only rank 0 has.

The weights are wrong in the ways of CASES; the outcome on each rank is printed.
"""

import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from rlef_mega.engines.local import LocalEngine
from rlef_mega.engines.publish import publish


class Sender:
    """Stands in for the learner; `spoil` changes the weights of its first `wrong_tries`
    publications."""

    def __init__(self, folder: str, spoil, wrong_tries: int) -> None:
        model = LlamaForCausalLM.from_pretrained(folder)
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.spoil, self.wrong_tries, self.tries = spoil, wrong_tries, 0

    def policy_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.tries += 1
        weights = dict(self.weights)
        if self.tries <= self.wrong_tries:
            self.spoil(weights)
        for name, tensor in weights.items():
            dist.barrier()  # like a gather: all ranks take part for each weight
            yield name, tensor


def rename(weights: dict[str, torch.Tensor]) -> None:
    weights["model.rotary"] = weights.pop("model.norm.weight")


def cut(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1]


def break_one(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))


CASES = {
    "renamed": (rename, 9),
    "cut": (cut, 9),
    "broken once": (break_one, 1),
    "broken": (break_one, 9),
}


def main() -> None:
    folder = sys.argv[1]
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    engine = LocalEngine(folder) if dist.get_rank() == 0 else None
    for case, (spoil, wrong_tries) in CASES.items():
        sender = Sender(folder, spoil, wrong_tries)
        try:
            publish(sender.policy_weights, engine, version=1)
            said = "published"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (sender.tries, said))
        if engine is not None:
            for rank, (tries, said) in enumerate(everyone):
                print(f"{case} | rank {rank} | {tries} | {said}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
