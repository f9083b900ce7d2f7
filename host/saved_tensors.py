"""Lets blocks that work in place be differentiated: a tensor kept for backward is copied before it is changed.

PyTorch has `torch.autograd.graph.allow_mutation_on_saved_tensors` for this, but up to 2.14 it may give a wrong tensor
back: it knows tensors by id, address and version, lets go of an original once it is copied, and takes the next tensor
that happens to get the same three for the old one. That is rare, and silent where the shapes agree.
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
    """One tensor kept for backward; `value` is the original until somebody is about to change it, then a copy.

    None after the scope. A graph in a reference cycle through C++ is never freed, so it must not own any memory by then.
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

    None after the scope. The function closes over the host's options and whatever other packs store in them, so it may well
    reach the node's own outputs; Python's collector cannot see such a cycle, because it passes through C++.
    """

    __slots__ = ("__weakref__", "value")

    def __init__(self, run: Callable) -> None:
        self.value: Callable | None = run

    def run(self, *args):
        if self.value is None:
            raise RuntimeError("backward outside of the mutation_of_saved_tensors scope in which the graph was made")
        return self.value(*args)


def _storage(tensor: Tensor) -> int:
    """Identity of the memory behind a tensor and its views; unique for as long as it is held."""
    return tensor.untyped_storage()._cdata


class InPlaceWriteTracker(TorchDispatchMode):
    """Sees every operation; those whose schema says that they write an argument have it copied where it is kept."""

    def __init__(self) -> None:
        super().__init__()
        # Only originals stand here. They hold their memory, so a storage's identity cannot pass to another.
        self._originals: dict[int, list[weakref.ref[_Saved]]] = defaultdict(list)
        self._all: weakref.WeakSet[_Saved | Recomputation] = weakref.WeakSet()

    def keep(self, tensor: Tensor) -> _Saved:
        # Detached: an operation that saves its own result (softmax, normalisation) would otherwise hold itself through it.
        saved = _Saved(tensor.detach() if tensor.requires_grad else tensor)
        self._all.add(saved)
        self._originals[_storage(tensor)].append(weakref.ref(saved))
        return saved

    def keep_function(self, run: Callable) -> Recomputation:
        """For a graph node that must call `run` in backward, and must not hold it any longer than this scope."""
        kept = Recomputation(run)
        self._all.add(kept)
        return kept

    def release(self) -> None:
        self._originals.clear()
        for saved in self._all:
            saved.value = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Writes are not looked for: for a backward pass, which writes no tensor that it still needs.

        Half of all operations are spared the detour through Python. One that did write such a tensor would raise.
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
    """Place and name of each argument that an operation writes, by its schema; keyword-only ones lie beyond `args`."""
    return tuple((index, argument.name) for index, argument in enumerate(func._schema.arguments)
                 if argument.alias_info is not None and argument.alias_info.is_write)


_OPEN: ContextVar[InPlaceWriteTracker] = ContextVar("learn_to_steer_saved_tensors")


@contextlib.contextmanager
def mutation_of_saved_tensors() -> Iterator[InPlaceWriteTracker]:
    """In this scope in-place operations cannot spoil a backward pass; forward and backward both belong inside.

    Gives an object whose `paused()` the backward pass may run in. May be nested: a graph made inside the inner scope has
    to be differentiated there.
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
