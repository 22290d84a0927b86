"""Keys and values of a batch in memory that is allocated once and written in place.

transformers' dynamic cache grows by concatenation, a copy of everything it holds at every token;
its static cache computes attention over columns that are still empty. This one does neither.

Shape suffixes: B rows, H key-value heads, L columns, S head size.
"""

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values, [B, H, L, S].

    The prefill fills some rows at a time (`group`), each right-aligned to the column
    `prompt_columns`; afterwards every update appends one column to all rows.
    """

    def __init__(self, batch: int, prompt_columns: int, capacity: int) -> None:
        super().__init__()
        self.batch, self.prompt_columns, self.capacity = batch, prompt_columns, capacity
        self.length = 0
        self.group: slice | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # zeros, because columns left of a prompt are masked, and 0 * NaN would not be 0
        self.keys, self.values = (
            states.new_zeros(self.batch, states.shape[1], self.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.group is not None:
            columns = slice(self.prompt_columns - key_states.shape[2], self.prompt_columns)
            self.keys[self.group, :, columns] = key_states
            self.values[self.group, :, columns] = value_states
            return key_states, value_states
        columns = slice(self.length, self.length + key_states.shape[2])
        self.keys[:, :, columns] = key_states
        self.values[:, :, columns] = value_states
        self.length = columns.stop
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Move these rows into a smaller cache."""
        for name in ("keys", "values"):
            old_BHLS = getattr(self, name)
            kept_BHLS = old_BHLS.new_empty(len(rows), *old_BHLS.shape[1:])
            kept_BHLS[:, :, : self.length] = old_BHLS[:, :, : self.length][rows]
            setattr(self, name, kept_BHLS)


class PreallocatedCache(Cache):
    """All layers of a model, for `batch` rows whose prompts end at column `prompt_columns`."""

    def __init__(self, num_layers: int, batch: int, prompt_columns: int, capacity: int) -> None:
        self.own_layers = [
            PreallocatedLayer(batch, prompt_columns, capacity) for _ in range(num_layers)
        ]
        super().__init__(layers=list(self.own_layers))

    def begin_prefill(self, rows: slice) -> None:
        """Write the keys and values of the next forward pass into these rows."""
        for layer in self.own_layers:
            layer.group = rows

    def begin_decoding(self) -> None:
        """Append one column to all rows in each forward pass from now on."""
        for layer in self.own_layers:
            layer.group, layer.length = None, layer.prompt_columns

    def keep_rows(self, rows: torch.Tensor) -> None:
        for layer in self.own_layers:
            layer.keep_rows(rows)
