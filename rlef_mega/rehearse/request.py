"""What a rehearsed rank is asked for, in the files of a folder; needs neither PyTorch nor a GPU."""

from dataclasses import dataclass

REQUEST, RESULT = "request.json", "rank_{}.json"


@dataclass(frozen=True)
class Request:
    """The lengths of dialogues in tokens, and an update's micro-batches on each rank."""

    dialogue: int
    responses: int
    per_microbatch: int
    microbatches: int
