"""The queries of a row's last tokens, remembered from call to call."""

import torch
from torch import Tensor


class LastQueries:
    """Queries `[B, Hq, n, D]` of the last tokens of rows, up to their key number `length`."""

    def __init__(self) -> None:
        self.queries, self.length = torch.empty(0), 0

    def add(self, q: Tensor, length: int, most: int) -> None:
        """Take in the queries `q` of a call that ends with key `length`; `most` of them are kept."""
        follows = self.length == length - q.shape[2] and self.queries.ndim == q.ndim
        both = torch.cat([self.queries, q], 2) if follows and q.shape[2] < most else q
        self.queries, self.length = both[:, :, -most:].clone(), length

    def reorder(self, index: Tensor) -> "LastQueries":
        """The queries of rows `index [n]`."""
        out = LastQueries()
        out.queries, out.length = self.queries.index_select(0, index.to(self.queries.device)), self.length
        return out

    def crop(self, length: int) -> None:
        """Forget the queries from `length` on."""
        gone = max(0, self.length - length)
        self.queries = self.queries[:, :, : max(0, self.queries.shape[2] - gone)]
        self.length -= gone
