"""Makes in-place blocks differentiable: a tensor saved for backward is copied before an operation writes to it.

PyTorch has `torch.autograd.graph.allow_mutation_on_saved_tensors` for this, but up to 2.14 it may return a wrong tensor. It
identifies tensors by id, address and version and frees an original once it is copied. A later tensor with the same id,
address and version is then mistaken for the original. This is rare, and silent where the shapes agree.
"""
from __future__ import annotations

import contextlib
import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Saved:
    """A tensor saved for backward. `value` is the original until an operation is about to write to it, then a copy.

    After the scope `value` is None. A graph in a reference cycle through C++ is never freed, so it must not hold any memory.
    """

    __slots__ = ("__weakref__", "value", "version")

    def __init__(self, value: Tensor) -> None:
        self.value: Tensor | None = value
        self.version = value._version

    def unpack(self) -> Tensor:
        if self.value is None:
            raise RuntimeError("backward outside of the mutation_of_saved_tensors scope in which the graph was made")
        if self.value._version != self.version:
            raise RuntimeError("a tensor that is needed for backward was modified where writes are not seen")
        return self.value

    def copy(self) -> None:
        if self.value is not None:
            self.value = self.value.clone()
            self.version = self.value._version


class Recomputation:
    """The function that a graph node runs again in backward.

    After the scope `value` is None. The function closes over the host's options and whatever other packs store there, so it
    may refer to the node's own outputs. Python's garbage collector cannot see such a cycle, because it passes through C++.
    """

    __slots__ = ("__weakref__", "value")

    def __init__(self, run: Callable) -> None:
        self.value: Callable | None = run

    def run(self, *args):
        if self.value is None:
            raise RuntimeError("backward outside of the mutation_of_saved_tensors scope in which the graph was made")
        return self.value(*args)


def _storage(tensor: Tensor) -> int:
    """Identity of the storage that a tensor shares with its views; unique while the storage is alive."""
    return tensor.untyped_storage()._cdata


class InPlaceWriteTracker(TorchDispatchMode):
    """Intercepts every operation and copies saved tensors whose storage the operation, by its schema, writes to."""

    def __init__(self) -> None:
        super().__init__()
        # Originals only. They keep their storage alive, so its identity cannot be reused.
        self._originals: dict[int, list[weakref.ref[_Saved]]] = defaultdict(list)
        self._all: weakref.WeakSet[_Saved | Recomputation] = weakref.WeakSet()

    def keep(self, tensor: Tensor) -> _Saved:
        # Detached: an operation that saves its own result (softmax, normalisation) would otherwise keep itself alive.
        saved = _Saved(tensor.detach() if tensor.requires_grad else tensor)
        self._all.add(saved)
        self._originals[_storage(tensor)].append(weakref.ref(saved))
        return saved

    def keep_function(self, run: Callable) -> Recomputation:
        """Wraps `run` for a graph node that calls it in backward and must not hold it beyond this scope."""
        kept = Recomputation(run)
        self._all.add(kept)
        return kept

    def release(self) -> None:
        self._originals.clear()
        for saved in self._all:
            saved.value = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Suspends tracking for a backward pass, which overwrites no tensor that it still needs.

        This saves half of all operations the detour through Python. If an operation did overwrite a saved tensor, `unpack`
        would raise.
        """
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def _before_write(self, tensor: Tensor) -> None:
        for reference in self._originals.pop(_storage(tensor), ()):
            saved = reference()
            if saved is not None:
                saved.copy()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for index, name in _written_arguments(func):
            given = args[index] if index < len(args) else kwargs.get(name)
            for written in given if isinstance(given, (list, tuple)) else (given,):
                if isinstance(written, Tensor):
                    self._before_write(written)
        return func(*args, **kwargs)


@functools.cache
def _written_arguments(func) -> tuple[tuple[int, str], ...]:
    """Index and name of each argument that an operation writes to, by its schema."""
    return tuple((index, argument.name) for index, argument in enumerate(func._schema.arguments)
                 if argument.alias_info is not None and argument.alias_info.is_write)


_OPEN: ContextVar[InPlaceWriteTracker] = ContextVar("learn_to_steer_saved_tensors")


@contextlib.contextmanager
def mutation_of_saved_tensors() -> Iterator[InPlaceWriteTracker]:
    """A scope in which in-place operations cannot corrupt a backward pass. Forward and backward must both run inside it.

    The backward pass may run inside the yielded tracker's `paused()`. Scopes may be nested; a graph must be differentiated in
    the scope that it was made in.
    """
    writes = InPlaceWriteTracker()
    outer = _OPEN.set(writes)
    try:
        with writes, torch.autograd.graph.saved_tensors_hooks(writes.keep, _Saved.unpack):
            yield writes
    finally:
        _OPEN.reset(outer)
        writes.release()


def open_scope() -> InPlaceWriteTracker:
    """The innermost `mutation_of_saved_tensors` of this thread. Raises LookupError outside of any."""
    return _OPEN.get()
