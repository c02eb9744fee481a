"""Remembers what was found in the last tensor asked about: the layers of a forward all ask about the same one."""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

T = TypeVar("T")


class _Memo(NamedTuple):
    tensor: "weakref.ref[Tensor]"
    version: int | None
    key: Hashable
    answer: Any
    askers: set[int]


class LastAnswer(Generic[T]):
    """One answer, for one tensor and one `key`.

    Inference tensors do not tell when they change: there each `asker` (a layer) is given an answer once, then the
    tensor is read again. So it is with `once`, for answers that a pass changes although the tensor stays as it was.
    """

    def __init__(self) -> None:
        self._memo: _Memo | None = None

    def of(self, tensor: Tensor, key: Hashable, asker: int | None, find: Callable[[], T], once: bool = False) -> T:
        """The remembered answer if it still holds, else `find()`."""
        version = None if once or tensor.is_inference() else tensor._version
        memo = self._memo
        if memo is not None and memo.tensor() is tensor and (memo.version, memo.key) == (version, key):
            if version is not None:
                return memo.answer
            if asker is not None and asker not in memo.askers:
                memo.askers.add(asker)
                return memo.answer
        answer = find()
        self._memo = _Memo(weakref.ref(tensor), version, key, answer, set() if asker is None else {asker})
        return answer

    def put(self, tensor: Tensor, key: Hashable, answer: T) -> None:
        """Remember an answer found otherwise, given to nobody yet."""
        version = None if tensor.is_inference() else tensor._version
        self._memo = _Memo(weakref.ref(tensor), version, key, answer, set())
