"""The latent that steering moves, kept beside the sampler's own."""
from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .rehearsal import Rehearsal, advice
from .stepping import SteeringError


class MovedLatent:
    """The steered latent: the sampler's own latent plus the move. The sampler's tensor is never written to."""

    def __init__(self, rehearsal: Rehearsal):
        self.rehearsal = rehearsal
        self.evaluations = 0
        self._reported: set[int] = set()
        self._move: Tensor | None = None  # the move at step `_since`
        self._since = 0
        self._own: Tensor | None = None  # the latent that the sampler handed over last

    def handed(self, x: Tensor) -> tuple[int | None, Tensor]:
        """Takes the sampler's latent at its next evaluation. Returns the step that begins here (or None), and x with the move."""
        self._own = x
        self.evaluations += 1
        return self.rehearsal.begins.get(self.evaluations - 1), self._with_move(x, self.evaluations - 1)

    def moved(self, move: Tensor) -> Tensor:
        """Adds a move at the step that just began. Returns the moved latent."""
        call = self.evaluations - 1
        before = self._moved_by(call)
        self._move, self._since = move if before is None else before + move, self.rehearsal.begins[call]
        return self._own + self._move

    def result(self, own: Tensor) -> Tensor:
        """The sampler's result with the move. Raises SteeringError where the run was shorter or longer than its rehearsal."""
        if self._move is not None and self.evaluations != len(self.rehearsal.kept[self._since]) - 1:
            raise self._unlike_rehearsal()
        return self._with_move(own, -1)

    def watched(self, callback: Callable | None) -> Callable:
        """The host's callback, called with the moved latent. Raises SteeringError where the run departs from its rehearsal."""
        def wrapped(info: dict) -> None:
            step = info["i"]
            if self.rehearsal.kept and step not in self._reported and self.evaluations != self.rehearsal.reported.get(step):
                raise self._unlike_rehearsal()
            self._reported.add(step)
            if callback is not None:
                moves = self._move is not None and info["x"] is self._own
                callback({**info, "x": self._with_move(info["x"], self.evaluations - 1)} if moves else info)

        return wrapped

    def _with_move(self, own: Tensor, call: int) -> Tensor:
        move = self._moved_by(call)
        if move is None:
            return own
        if move.shape != own.shape:
            raise SteeringError(f"{self.rehearsal.sampler} changes the latent's size from {list(move.shape)} to "
                                f"{list(own.shape)} and keeps the move that steering made, so it cannot be steered. "
                                f"{advice(self.rehearsal.sampler)}")
        return own + move

    def _moved_by(self, call: int) -> Tensor | None:
        if self._move is None:
            return None
        kept = self.rehearsal.kept[self._since]
        if call >= len(kept) - 1:
            raise self._unlike_rehearsal()
        return self._move * kept[call] if kept[call] else None

    def _unlike_rehearsal(self) -> SteeringError:
        return SteeringError(f"{self.rehearsal.sampler} evaluates the model a different number of times than in its "
                             f"rehearsal, so it cannot be steered. {advice(self.rehearsal.sampler)}")
