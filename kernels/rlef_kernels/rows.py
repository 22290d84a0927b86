"""Selection of rows: masked tokens are dropped before the head, tokens without an upstream gradient
before the backward pass. Both are exact, and a dropped row costs nothing.

On a GPU each selection waits for the device once, for the number of rows.

Shape suffixes: T tokens, R selected rows, D hidden size.
"""

import torch


def rows_with_gradient(*grads_T: torch.Tensor | None) -> torch.Tensor | None:
    """Return the indices of rows with a nonzero or NaN upstream gradient, or None for all rows."""
    present = [grad_T != 0 for grad_T in grads_T if grad_T is not None]
    kept_T = present[0] if len(present) == 1 else torch.stack(present).any(0)
    rows_R = kept_T.nonzero()[:, 0]
    return None if len(rows_R) == len(kept_T) else rows_R


def select_rows(tensor: torch.Tensor, rows_R: torch.Tensor | None) -> torch.Tensor:
    """Return the rows `rows_R` of the tensor, or all of it for None."""
    return tensor if rows_R is None else tensor[rows_R]


def scatter_rows(
    selected: torch.Tensor, rows_R: torch.Tensor | None, num_tokens: int
) -> torch.Tensor:
    """Undo `select_rows`: put each row back at its index, with zeros elsewhere."""
    if rows_R is None:
        return selected
    zeros = selected.new_zeros(num_tokens, *selected.shape[1:])
    return zeros.index_copy(0, rows_R, selected)


def check_mask(mask_T: torch.Tensor, num_tokens: int) -> None:
    """Raise ValueError if the mask is not bool or has another shape than [num_tokens]."""
    if mask_T.dtype != torch.bool or mask_T.shape != (num_tokens,):
        raise ValueError(
            f"mask_T is {mask_T.dtype} of shape {tuple(mask_T.shape)}; it must be torch.bool of "
            f"shape ({num_tokens},)"
        )
