"""Whether a checkpoint's network computes what transformers computes from the Hugging Face folder.

`compare_weights` reads both sides through one name map, so it cannot see a mistake in the map. Here
each side has its own code, in fp32: Megatron's loader and our model for the checkpoint,
transformers for the folder. This runs in a process of its own, so that both models are freed:

    python -m rlef_mega.megatron.convert.compare_outputs CHECKPOINT FOLDER ROLE
"""

import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from rlef_mega.config import ConfigError, ParallelConfig
from rlef_mega.megatron import parallel
from rlef_mega.megatron.checkpoints.checkpoints import load_weights
from rlef_mega.megatron.convert.config_and_tokenizer import Role
from rlef_mega.megatron.convert.weights import tensors_of
from rlef_mega.megatron.cpu_shim import calls_megatron
from rlef_mega.megatron.network.attention import packed_sequences
from rlef_mega.megatron.network.families import DenseConfig, read_config
from rlef_mega.megatron.network.packed_llama import CriticModel, PolicyModel
from rlef_mega.megatron.parallel import Ranks

LENGTHS = [5, 17, 40]  # tokens of the sequences that are compared
# fp32 on both sides; a misplaced tensor changes log-probs by whole numbers
LARGEST_DIFFERENCE = 1e-3


def check_outputs(checkpoint: Path, folder: Path, role: Role) -> str:
    """Compare the outputs if both models fit into memory. Returns a line that reports the result;
    raises ConfigError if the outputs differ."""
    config = read_config(folder)
    numbers = sum(torch.Size(tensor.shape).numel() for tensor in tensors_of(role, config))
    needed, free = 2 * 4 * numbers * 1.1, psutil.virtual_memory().available
    if needed > free:
        return (
            f"outputs not compared with transformers': two models in fp32 take "
            f"{needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free"
        )
    ranks = parallel.initialize(ParallelConfig(), seed=0)
    difference = largest_difference(checkpoint, folder, role, ranks)
    parallel.shutdown(ranks)
    what = "log-prob" if role == "policy" else "value"
    if not difference <= LARGEST_DIFFERENCE:
        raise ConfigError(
            f"the {role} of {checkpoint} is not what transformers loads from {folder}: a {what} "
            f"differs by {difference:.3g}"
        )
    return f"largest difference of a {what} to transformers': {difference:.2g}, of {sum(LENGTHS)}"


@torch.no_grad()
def largest_difference(checkpoint: Path, folder: Path, role: Role, ranks: Ranks) -> float:
    config = read_config(folder)
    generator = torch.Generator().manual_seed(0)
    token_ids_T = torch.randint(config.vocab_size, (sum(LENGTHS),), generator=generator)
    ours_T = our_outputs(checkpoint, config, role, token_ids_T.to(ranks.device), ranks)
    theirs_T = their_outputs(folder, role, token_ids_T)
    return float((ours_T.cpu() - theirs_T).abs().max())


@calls_megatron
def our_outputs(
    checkpoint: Path, config: DenseConfig, role: Role, token_ids_T: torch.Tensor, ranks: Ranks
) -> torch.Tensor:
    """Compute the log-prob of each token's successor in the row, or each token's value. The
    successor of a sequence's last token is the first of the next sequence, which does as well."""
    kind = PolicyModel if role == "policy" else CriticModel
    model: Any = kind(config, ranks, dtype=torch.float32).to(ranks.device).eval()
    load_weights(checkpoint, role, [model], ranks)
    sequences = packed_sequences(LENGTHS, ranks.device)
    hidden = model(token_ids_T[None], None, None, packed_seq_params=sequences)
    rows_T = torch.arange(len(token_ids_T), device=ranks.device)
    if role == "critic":
        return model.values(hidden, rows_T)
    return model.logprobs(hidden, rows_T, token_ids_T.roll(-1), temperature=1.0)[0]


def their_outputs(folder: Path, role: Role, token_ids_T: torch.Tensor) -> torch.Tensor:
    kind = AutoModelForCausalLM if role == "policy" else AutoModelForTokenClassification
    model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    outputs = [model(ids[None]).logits[0] for ids in token_ids_T.split(LENGTHS)]
    if role == "critic":
        return torch.cat(outputs)[:, 0]
    logprobs_TV = torch.cat(outputs).log_softmax(-1)
    return logprobs_TV.gather(1, token_ids_T.roll(-1)[:, None])[:, 0]


if __name__ == "__main__":
    chosen: Any = sys.argv[3]
    try:
        print(check_outputs(Path(sys.argv[1]), Path(sys.argv[2]), chosen))
    except ConfigError as error:
        sys.exit(f"error: {error}")
