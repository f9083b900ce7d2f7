"""In-place operations cannot corrupt a backward pass."""
from __future__ import annotations

import gc
import weakref

import pytest
import torch
from learn_to_steer.host.saved_tensors import mutation_of_saved_tensors, open_scope
from torch.multiprocessing.reductions import StorageWeakRef


def test_without_it_autograd_refuses() -> None:
    leaf = torch.ones(3, requires_grad=True)
    kept = leaf * 2
    out = kept.square()
    kept += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("write", [
    lambda kept: kept.add_(1), lambda kept: kept[1:].mul_(3), lambda kept: torch.mul(kept, 5, out=kept),
    lambda kept: torch._foreach_add_([kept], 1.0), lambda kept: kept.copy_(torch.zeros(4)),
    lambda kept: kept.view(2, 2).zero_()], ids=["add_", "view", "out=", "foreach", "copy_", "view zero_"])
def test_every_kind_of_write_is_seen(write) -> None:
    leaf = torch.arange(4.0, requires_grad=True)
    with mutation_of_saved_tensors():
        kept = leaf * 2
        out = kept.square() + kept.view(2, 2).square().flatten()
        with torch.no_grad():
            write(kept)
        (gradient,) = torch.autograd.grad(out.sum(), leaf)
    assert torch.equal(gradient, 16 * leaf.detach())


def test_scopes_can_be_nested() -> None:
    leaf = torch.arange(4.0, requires_grad=True)
    with mutation_of_saved_tensors():
        kept = leaf * 2
        out = kept.square()
        with mutation_of_saved_tensors():
            inner = kept.detach().requires_grad_() * 1
            product = inner.square().sum()
            with torch.no_grad():
                inner.zero_()
                kept.zero_()
            del product
        (gradient,) = torch.autograd.grad(out.sum(), leaf)
    assert torch.equal(gradient, 8 * leaf.detach())


def test_a_new_tensor_in_freed_memory_is_not_taken_for_the_old_one() -> None:
    """Many short-lived tensors of one size, with which torch's own context manager sometimes fails."""
    leaf = torch.linspace(1, 2, 32, dtype=torch.float64, requires_grad=True)
    for _ in range(20):
        with mutation_of_saved_tensors():
            total, expected = 0.0, torch.zeros(32, dtype=torch.float64)
            for k in range(1, 40):
                kept = leaf * k
                total = total + kept.square()
                expected += 2 * k * k * leaf.detach()
                with torch.no_grad():
                    kept.add_(1)
                del kept
            (gradient,) = torch.autograd.grad(total.sum(), leaf)
        assert torch.allclose(gradient, expected, rtol=1e-12)


def test_nothing_is_held_afterwards_even_by_a_graph_in_a_reference_cycle() -> None:
    leaf = torch.ones(3, requires_grad=True)
    gc.disable()
    try:
        with mutation_of_saved_tensors():
            kept = (leaf * 2).detach_()  # a constant, so that the graph alone holds it
            out = leaf * kept
            watched = StorageWeakRef(kept.untyped_storage())
            cycle = [out]
            cycle.append(cycle)
        del kept, out, cycle
        assert watched.expired()
    finally:
        gc.enable()


def test_a_backward_pass_outside_says_so() -> None:
    leaf = torch.ones(3, requires_grad=True)
    with mutation_of_saved_tensors():
        out = leaf.square()
    with pytest.raises(RuntimeError, match="outside of the mutation_of_saved_tensors scope"):
        out.sum().backward()


def test_a_graph_that_saves_its_own_results_goes_when_nobody_holds_it() -> None:
    """Inside the scope and without a garbage collector: softmax and normalisation save their results for backward."""
    leaf = torch.ones(3, requires_grad=True)
    gc.disable()
    try:
        with mutation_of_saved_tensors():
            watched = []
            for _ in range(3):
                out = torch.softmax((leaf * 2).exp(), dim=0)
                watched.append(StorageWeakRef(out.untyped_storage()))
                del out
            assert all(storage.expired() for storage in watched)
            (gradient,) = torch.autograd.grad((leaf * 2).exp().sum(), leaf)
        assert torch.allclose(gradient, 2 * (2 * leaf.detach()).exp())
    finally:
        gc.enable()


def test_a_function_for_backward_is_held_no_longer_than_the_scope() -> None:
    class Big:
        pass

    big = Big()
    gone = weakref.ref(big)
    gc.disable()
    try:
        with mutation_of_saved_tensors():
            kept = open_scope().keep_function(lambda big=big: type(big))
            assert kept.run() is Big
        del big
        assert gone() is None
        with pytest.raises(RuntimeError, match="outside of the mutation_of_saved_tensors scope"):
            kept.run()
    finally:
        gc.enable()
