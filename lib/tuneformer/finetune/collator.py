"""Cells of different lengths to one batch.

In: cells as ``{"input_ids": (length,), "labels": class number}``. Out: tensors padded to the longest cell of the batch.
"""

from typing import Any

import torch


class CellCollator:
    """Pad a batch of cells on the right with the pad token.

    Parameters
    ----------
    pad
        The pad token.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, cells: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return input_ids and attention_mask, (batch, length) int64, and labels, (batch,) int64."""
        rows = [torch.as_tensor(cell["input_ids"], dtype=torch.int64) for cell in cells]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)
        labels = torch.tensor([cell["labels"] for cell in cells])
        return {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels}
