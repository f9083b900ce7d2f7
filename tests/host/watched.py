"""Tracks all memory that a run allocates while its gradient is computed."""
from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(value) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class Watched(TorchDispatchMode):
    """Records every storage allocated inside the context while the pack computes a gradient."""

    def __init__(self):
        super().__init__()
        self.memory: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not torch.is_inference_mode_enabled():
            given = {storage._cdata for storage in storages(args)}
            self.memory += [(StorageWeakRef(storage), storage.nbytes()) for storage in storages(result)
                            if storage._cdata not in given]
        return result

    def held(self) -> int:
        """Storages that are still alive."""
        return sum(not storage.expired() for storage, _ in self.memory)

    def held_bytes(self) -> int:
        return sum(size for storage, size in self.memory if not storage.expired())
