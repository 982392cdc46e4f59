"""Attention by the fastest kernel at hand, over cells that lie one after the other (packed) or are padded.

In: queries, keys and values of a layer of BERT, and the lengths of packed cells. Out: what the layer takes for its
attention. The name ``auto`` of this module is what ``attention: auto`` of a study asks transformers for.

Measured on one core with avx512_bf16, forward and backward, 4 heads of 64, 12 cells of 128, 512 and 896 tokens: in bf16
the kernel of `scaled_dot_product_attention` takes 16, 112 and 274 ms of the core, products of the matrices of all cells
4, 67 and 244, and of three cells at a time 4, 44 and 140. In fp32 the kernel and products take the same time. On a GPU
flash attention reads packed cells as they are.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

KEPT = 256e6  # bytes of attention weights of one layer that are kept for the backward pass; more are computed again
AT_ONCE = 16e6  # bytes of them that are computed at a time: about what the caches hold


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    lengths: list[int] | None = None,
    bounds: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention of each cell to itself, (batch, length, heads, head_dim), as transformers asks for it.

    `query`, `key` and `value` are (batch, heads, length, head_dim). With `lengths` the batch is one row of packed
    cells, and `bounds` (cells + 1,) int32 says where they begin; else `attention_mask` is True where a token is read.
    """
    whole, scale = (query, key, value), query.shape[-1] ** -0.5 if scaling is None else scaling
    if lengths is None:
        return _cells(*whole, attention_mask, dropout=dropout, scale=scale).transpose(1, 2), None
    if query.is_cuda and not dropout and query.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn

        rows = (one[0].transpose(0, 1) for one in whole)  # (tokens, heads, head_dim)
        return varlen_attn(*rows, bounds, bounds, max(lengths), max(lengths), scale=scale).unsqueeze(0), None
    # The backward pass of a split is one concatenation; a slice has zeros of the whole batch for each of its cells.
    runs, parts = list(_runs(lengths)), []
    split = [one[0].split([n_cells * length for n_cells, length in runs], dim=1) for one in whole]
    for (n_cells, length), *own in zip(runs, *split, strict=True):
        alike = (one.unflatten(1, (n_cells, length)) for one in own)
        found = _cells(*(one.transpose(0, 1) for one in alike), None, dropout=dropout, scale=scale)
        parts.append(found.transpose(1, 2).flatten(0, 1))  # (tokens, heads, head_dim)
    return torch.cat(parts).unsqueeze(0), None


def _runs(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """Give number and length of the cells that follow each other and are as long as each other."""
    for length, group in groupby(lengths):
        yield len(list(group)), length


def _cells(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    dropout: float,
    scale: float,
) -> torch.Tensor:
    """Return the attention of cells of the same length, (batch, heads, length, head_dim)."""
    if query.is_cuda or dropout or query.dtype == torch.float32:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
    batch, heads, length, _ = query.shape
    size = heads * length**2 * query.element_size()  # bytes of one cell
    at_once = max(1, int(AT_ONCE / size))
    is_large = torch.is_grad_enabled() and batch * size > KEPT
    masks = [None] * -(-batch // at_once) if mask is None else mask.split(at_once)
    given = zip((query * scale).split(at_once), key.split(at_once), value.split(at_once), masks, strict=True)
    parts = [checkpoint(_products, *one, use_reentrant=False) if is_large else _products(*one) for one in given]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value


AttentionInterface.register("auto", attend)
AttentionMaskInterface.register("auto", sdpa_mask)
