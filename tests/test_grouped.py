"""Products of routed tokens with stacks of matrices: the numbers and gradients of a loop over routes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from understudy.grouped import Picks, product, thin

WIDTHS = [(32, 48), (21, 32), (32, 21), (4, 8)]  # what enters and leaves; of the odd ones rows are no 16 bytes
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers that want gradients."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def picks_of(count: int, rows: int, chosen: list[int] | None = None, seed: int = 0) -> Picks:
    """Routes to some of so many rows, by default to all but the second."""
    chosen = chosen or [row for row in range(rows) if row != 1 or rows == 1]
    drawn_N = torch.randint(len(chosen), (count, 1), generator=torch.Generator().manual_seed(seed))
    return Picks.of(torch.tensor(chosen)[drawn_N], rows)


def agree(got: Tensor, expected: Tensor, leaves: list[Tensor], dtype: torch.dtype) -> None:
    """Compare two answers and the gradients that they send to the leaves, which must be there, be they zero."""
    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    scale, found = TOLERANCE[dtype], []
    for answer in (got, expected):
        found.append(torch.autograd.grad(answer, leaves, direction.to(answer.dtype), allow_unused=answer is expected))
    assert all(mine is not None for mine in found[0])
    wanted = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found[1], strict=True)]
    for mine, theirs in [(got, expected), *zip(found[0], wanted, strict=True)]:
        largest = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(mine.to(theirs.dtype), theirs, rtol=scale, atol=scale * max(1.0, largest))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_product(dtype: torch.dtype, widths: tuple[int, int], transposed: bool) -> None:
    for rows, count in [(1, 7), (5, 0), (5, 1), (5, 40)]:
        x, stored = drawn(count, widths[0], dtype=dtype), drawn(rows, *widths[:: 1 if transposed else -1], dtype=dtype)
        picks = picks_of(count, rows)
        weight = stored if transposed else stored.transpose(1, 2)
        got = product(x, weight, picks)
        assert got.dtype == dtype and got.shape == (count, widths[1])
        expected = x.new_zeros(0, widths[1]) + weight.sum() * 0 + x.sum() * 0
        if count:
            expected = torch.stack([one @ weight[row] for one, row in zip(x, picks.row_N.tolist(), strict=True)])
        agree(got, expected, [x, stored], dtype)


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_thin(dtype: torch.dtype, widths: tuple[int, int], rank: int) -> None:
    for count in (0, 1, 6, 40):
        x, a, b = drawn(count, widths[0], dtype=dtype), drawn(6, rank, widths[0], dtype=dtype, seed=1), None
        b = drawn(6, widths[1], rank, dtype=dtype, seed=2)
        picks = picks_of(count, 6, [0, 2, 5])
        got = thin(x, a, b, picks)
        assert got.dtype == dtype and got.shape == (count, widths[1])
        expected = x.new_zeros(0, widths[1]) + (a.sum() + b.sum() + x.sum()) * 0
        if count:
            expected = torch.stack([b[row] @ (a[row] @ one) for one, row in zip(x, picks.row_N.tolist(), strict=True)])
        agree(got, expected, [x, a, b], dtype)


def test_gradients_that_are_not_contiguous() -> None:
    """As those of one half, or of every other place, of a fused projection."""
    x, a, b, picks = drawn(40, 32), drawn(6, 3, 32), drawn(6, 48, 3), picks_of(40, 6)
    into = torch.randn(40, 96, generator=torch.Generator().manual_seed(4))
    for part in (into[:, :48], into[:, ::2]):
        mine, dense = (torch.autograd.grad(thin(x, a, b, picks), [x, a, b], g) for g in (part, part.contiguous()))
        for got, expected in zip(mine, dense, strict=True):
            torch.testing.assert_close(got, expected)


def test_picks() -> None:
    row_Tk = torch.tensor([[2, 4], [0, 2], [4, 4], [2, 0]])  # 4: none of the 4 rows
    picks = Picks.of(row_Tk, 4)
    assert picks.row_N.tolist() == [0, 0, 2, 2, 2]
    assert picks.slot_N.tolist() == [2, 7, 0, 3, 6]
    assert picks.token_N.tolist() == [1, 3, 0, 1, 3]
    assert picks.ends_G.tolist() == [2, 2, 5, 5] and picks.ends_G.dtype == torch.int32
    joined = picks.joined(torch.tensor([0, 0, 1, 1]), 2)
    assert (joined.row_N.tolist(), joined.ends_G.tolist()) == ([0, 0, 1, 1, 1], [2, 5])
    gate_Tk = torch.arange(1.0, 9).view(4, 2)
    spread = picks.spread(torch.ones(5, 3), gate_Tk)
    assert torch.equal(spread, (gate_Tk * (row_Tk != 4))[:, :, None].expand(4, 2, 3))


def test_picks_once() -> None:
    """Of the routes of a token that lead to the same row, one stands for all."""
    row_Tk = torch.tensor([[2, 4, 2], [0, 2, 0], [4, 4, 4], [2, 0, 1]])  # 4: none of the 4 rows
    picks = Picks.of(row_Tk, 4)
    once = picks.once()
    pairs = list(zip(once.picks.row_N.tolist(), once.picks.token_N.tolist(), strict=True))
    assert pairs == [(0, 1), (0, 3), (1, 3), (2, 0), (2, 1), (2, 3)]
    assert once.picks.ends_G.tolist() == [2, 3, 6, 6] and once.picks.ends_G.dtype == torch.int32
    every = list(zip(picks.row_N.tolist(), picks.token_N.tolist(), strict=True))
    assert [pairs[place] for place in once.place_N.tolist()] == every
    assert [every[route] for route in once.route_U.tolist()] == pairs


def test_spread_onto_what_others_add() -> None:
    row_Tk, gate_Tk = torch.tensor([[2, 4], [0, 2], [4, 4]]), torch.rand(3, 2)
    picks, answer = Picks.of(row_Tk, 4), torch.randn(3, 5)
    others = torch.randn(3, 2, 5) * (row_Tk == 4)[:, :, None]
    for dtype in (torch.float32, torch.float64):
        expected = others.to(dtype) + picks.spread(answer, gate_Tk)
        assert torch.equal(picks.spread(answer, gate_Tk, others.to(dtype)), expected)


def test_picks_of_nothing() -> None:
    for row_Tk in (torch.full((3, 2), 4), torch.zeros(0, 2, dtype=torch.long)):
        picks = Picks.of(row_Tk, 4)
        assert not len(picks.row_N) and picks.ends_G.tolist() == [0, 0, 0, 0]
        assert picks.joined(torch.tensor([0, 0, 1, 1]), 2).ends_G.tolist() == [0, 0]
        spread = picks.spread(torch.zeros(0, 5), torch.ones(row_Tk.shape))
        assert spread.shape == (len(row_Tk), 2, 5) and not spread.any()


def test_autocast() -> None:
    x, weight, a, b = drawn(40, 32), drawn(6, 32, 48, seed=1), drawn(6, 3, 32, seed=2), drawn(6, 48, 3, seed=3)
    for count in (40, 3, 0):
        picks = picks_of(count, 6)
        with torch.autocast("cpu", torch.bfloat16):
            got = [product(x[:count], weight, picks), thin(x[:count], a, b, picks)]
        assert [out.dtype for out in got] == [torch.bfloat16] * 2
        for out, exact in zip(got, [product(x[:count], weight, picks), thin(x[:count], a, b, picks)], strict=True):
            torch.testing.assert_close(out.float(), exact, rtol=2e-2, atol=0.3)
        grads = torch.autograd.grad(sum((out.float() ** 2).sum() for out in got), [x, weight, a, b])
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
