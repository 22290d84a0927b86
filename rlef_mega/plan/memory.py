"""Bytes of one network on each rank of its layout.

    weights     2 per parameter in bfloat16, 4 in fp32; a tensor-parallel rank has 1/t of a matrix
    gradients   4 per parameter (Megatron's buffer, fp32)
    optimizer   12 per parameter for main copy and two moments (in fp32, 8 for the moments alone),
                divided by the data-parallel ranks
    activations what backward keeps, per token and layer, in units of b bytes (2 or 4); h, f, a and
                k are the sizes of hidden state, feed-forward block, all queries and all keys:
        4 h                 inputs and outputs of both norms; 1/t with sequence parallelism
        (2 a + 2 k) / t     queries, keys, values, output of attention
        3 f / t             gate and up, and their product; not with "selective" recomputation
        h                   the layer's input, instead of all these, with "full"; 1/t as above
      times the micro-batches in flight: P - r on a pipeline's rank r, and with V chunks, each of
      1/V of the layers, 2 (P - r - 1) + (V - 1) P + 1 (Narayanan et al., 2104.04473; Megatron's
      schedules.py)
    scratch     the largest temporary memory: in a layer's backward the gradients of its
                feed-forward block (3 f) and what is recomputed; at the head its inputs and a
                chunk of logits; and, where weight gradients are accumulated inside their product,
                an uninitialised placeholder for each matrix of a layer, which autograd receives as
                its gradient (Transformer Engine keeps one of each shape)

After Korthikanti et al., 2205.05198, for gated blocks, grouped heads, and attention that does not
store its scores.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

from rlef_mega.config import ParallelConfig
from rlef_mega.flops import LlamaShape
from rlef_mega.megatron.network.stages import BUCKET_BYTES, Stages, split_layers

# The most that a chunk of logits takes in the fused head, whatever the batch (rlef_kernels)
HEAD_CHUNK_BYTES = 2**30
CUBLAS_BYTES = 64 * 2**20  # of two threads, on Hopper (PyTorch's default)
Head = Literal["fused", "value"]
split_once = cache(split_layers)  # one entry for all data-parallel sizes (`Network.stages`)


@dataclass(frozen=True)
class Network:
    """A network in its layout. `head` is "fused" for a policy, "value" for a critic."""

    shape: LlamaShape
    parallel: ParallelConfig
    head: Head = "fused"
    weight_bytes: int = 2
    recompute: str = "none"

    @property
    def tensor(self) -> int:
        return self.parallel.tensor_model_parallel_size

    @property
    def pipeline(self) -> int:
        return self.parallel.pipeline_model_parallel_size

    @property
    def data(self) -> int:
        return self.parallel.data_parallel_size

    @property
    def sequence_shards(self) -> int:
        """Return over how many ranks tokens are split outside of the matrix products."""
        return self.tensor if self.parallel.sequence_parallel else 1

    @cached_property
    def stages(self) -> Stages:
        """Return the pipeline stages, as the trainer divides them."""
        one_copy = self.parallel.model_copy(update={"data_parallel_size": 1})
        return split_once(self.shape, one_copy, with_head=self.head == "fused")

    @cached_property
    def layers(self) -> list[int]:
        """Return the number of layers on each pipeline rank, in all its chunks."""
        return [sum(self.stages.layers[rank :: self.pipeline]) for rank in range(self.pipeline)]

    def is_last(self, rank: int) -> bool:
        return rank == self.pipeline - 1

    def parameters(self, rank: int) -> int:
        """Count the parameters on each of a pipeline rank's tensor-parallel ranks."""
        shape, t = self.shape, self.tensor
        count = self.layers[rank] * (shape.layer_products // t + 2 * shape.hidden)
        if rank == 0:
            count += shape.table_parameters // t
        if self.is_last(rank):
            count += shape.hidden  # the final norm
            if self.head == "value":
                count += shape.hidden + 1
            elif not shape.tied or self.pipeline > 1:  # else the embedding is the head
                count += shape.table_parameters // t
        return count

    # ------------------------------------------------------------------ bytes

    def weights(self, rank: int) -> float:
        return self.weight_bytes * self.parameters(rank)

    def gradients(self, rank: int) -> float:
        return 4 * self.parameters(rank)

    def optimizer(self, rank: int) -> float:
        return self.main_copy(rank) + 8 * self.parameters(rank) / self.data

    def main_copy(self, rank: int) -> float:
        return 4 * self.parameters(rank) / self.data if self.weight_bytes == 2 else 0.0

    def copying_scratch(self, rank: int) -> float:
        """Return the bytes of the largest matrix part that gets a main copy: the embedding's."""
        table = self.weight_bytes * self.shape.table_parameters / self.tensor
        return min(table, self.weights(rank) / self.data)

    def layer_bytes(self, recompute: str) -> float:
        """Return the bytes per token that backward keeps of one layer."""
        shape, t = self.shape, self.tensor
        norms = 4 * shape.hidden / self.sequence_shards
        attention = 2 * (shape.heads + shape.key_value_heads) * shape.head_dim / t
        kept = {
            "none": norms + attention + 3 * shape.ffn / t,
            "selective": norms + attention,
            "full": shape.hidden / self.sequence_shards,
        }
        return self.weight_bytes * kept[recompute]

    def in_flight(self, rank: int, microbatches: int) -> float:
        """Return for how many micro-batches a rank keeps activations; a chunk counts as 1/V."""
        chunks = self.stages.chunks
        if chunks == 1:
            return min(microbatches, self.pipeline - rank)
        warmup = 2 * (self.pipeline - rank - 1) + (chunks - 1) * self.pipeline
        return min(microbatches * chunks, warmup + 1) / chunks

    def activations(self, rank: int, tokens: int, microbatches: int) -> float:
        """Return the bytes that backward keeps of micro-batches of `tokens` tokens."""
        kept = self.layers[rank] * self.layer_bytes(self.recompute)
        if self.is_last(rank):  # the final norm's input and output
            kept += 2 * self.weight_bytes * self.shape.hidden / self.sequence_shards
        return self.in_flight(rank, microbatches) * tokens * kept

    def standing(self, tokens: int) -> float:
        """Return the bytes of the buffers that last from phase to phase: for the tokens that
        sequence parallelism gathers, and cuBLAS's workspaces."""
        gathered = self.weight_bytes * self.shape.hidden if self.sequence_shards > 1 else 0
        return tokens * gathered + CUBLAS_BYTES

    def scratch(self, rank: int, tokens: int, read: int) -> float:
        """Return the largest temporary memory of an update; the head reads `read` tokens."""
        peaks = [self.layer_scratch(tokens)]
        if self.is_last(rank):
            peaks.append(self.head_scratch(tokens, read))
        return max(peaks) + self.weight_bytes * self.shape.layer_products / self.tensor

    def scoring_scratch(self, rank: int, tokens: int, read: int, models: int = 1) -> float:
        """Return the largest temporary memory of a forward pass alone, of one model or of policy
        and reference together. While the reference runs, the policy's output is kept too, and what
        a stage receives has twice the width, and is copied."""
        shape, t = self.shape, self.tensor
        receives = rank > 0 or self.stages.chunks > 1
        beside = (2 + receives) * tokens * shape.hidden / self.sequence_shards
        beside *= models - 1
        peaks = [tokens * (4 * shape.ffn / t + 6 * shape.hidden / self.sequence_shards) + beside]
        if self.is_last(rank) and self.head != "value":
            peaks.append((2 * tokens + models * read) * shape.hidden + beside)
        return self.weight_bytes * max(peaks)

    def gather_scratch(self) -> float:
        """Return the bytes of the largest bucket of gathered weights, and of a whole tensor that is
        put together from its shards (hf_weights); an embedding is a bucket of its own."""
        table = self.weight_bytes * self.shape.table_parameters
        bucket = min(BUCKET_BYTES, max(map(self.weights, range(self.pipeline))))
        if self.tensor == 1:
            return max(table, bucket)
        matrix = self.weight_bytes * self.shape.hidden * self.shape.ffn
        return max(2 * table, self.tensor * bucket + matrix)

    def layer_scratch(self, tokens: int) -> float:
        """Return the bytes that the backward pass of a layer allocates."""
        block = 3 * self.weight_bytes * self.shape.ffn / self.tensor
        again = {"none": 0.0, "selective": block, "full": self.layer_bytes("none")}
        return tokens * (block + again[self.recompute])

    def head_scratch(self, tokens: int, read: int) -> float:
        """Return the most that the head and its backward pass allocate at once.

        The rows that are read and their gradient last throughout. A chunk of logits, with the fp32
        gradient that is summed over the ranks, comes before the gradient of all tokens.
        """
        hidden = self.weight_bytes * self.shape.hidden
        if self.head == "value":
            return tokens * hidden
        logits = read * self.weight_bytes * self.shape.vocabulary / self.tensor
        chunk = min(logits, HEAD_CHUNK_BYTES)
        summed = 4 * self.shape.hidden * read if self.tensor > 1 else 0
        return 2 * read * hidden + max(chunk + summed, tokens * hidden)
