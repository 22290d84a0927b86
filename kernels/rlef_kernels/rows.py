"""Leaving rows out: masked tokens before the head, tokens without an upstream gradient before the
backward pass. Both are exact, and a row that is left out costs nothing.

On a GPU each of these asks the device for a count and so waits for it, once.

Shape suffixes: T tokens, R rows that stay, D hidden size.
"""

import torch


def rows_with_gradient(*grads_T: torch.Tensor | None) -> torch.Tensor | None:
    """Indices of the rows where some upstream gradient is not zero (NaN counts); None for all."""
    present = [grad_T != 0 for grad_T in grads_T if grad_T is not None]
    kept_T = present[0] if len(present) == 1 else torch.stack(present).any(0)
    rows_R = kept_T.nonzero()[:, 0]
    return None if len(rows_R) == len(kept_T) else rows_R


def select_rows(tensor: torch.Tensor, rows_R: torch.Tensor | None) -> torch.Tensor:
    return tensor if rows_R is None else tensor[rows_R]


def scatter_rows(
    grad_RD: torch.Tensor, rows_R: torch.Tensor | None, num_tokens: int
) -> torch.Tensor:
    """Rows back to their places, zeros elsewhere."""
    if rows_R is None:
        return grad_RD
    grad_TD = grad_RD.new_zeros(num_tokens, *grad_RD.shape[1:])
    return grad_TD.index_copy(0, rows_R, grad_RD)


def check_mask(mask_T: torch.Tensor, num_tokens: int) -> None:
    if mask_T.dtype != torch.bool or mask_T.shape != (num_tokens,):
        raise ValueError(
            f"mask_T is {mask_T.dtype} of shape {tuple(mask_T.shape)}; it must be torch.bool of "
            f"shape ({num_tokens},)"
        )
