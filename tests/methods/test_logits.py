"""Logits in one place against loops, and that what other methods add to them counts wherever they are looked at."""

import pytest
import torch
from method_calls import make_call, make_method

from hfpatch.core.logits import capped, causal, log_sum, logits, weights
from hfpatch.methods._column_sums import ColumnSums
from hfpatch.methods.dhsa.labels import mass_ratio
from hfpatch.methods.infiniretri.scores import question_view

SHAPE = (2, 4, 2, 40, 56)
SPAN = slice(16, 24)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [None, (1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
def test_logits_equal_the_formula(softcap: float | None, bias: tuple[int, int] | None) -> None:
    call = make_call(SHAPE)
    added = None if bias is None else torch.randn(*bias, call.Lk, generator=torch.Generator().manual_seed(1))
    got = logits(call.q, call.k, scale=0.3, softcap=softcap, bias=added)
    assert got.shape == (2, 4, 40, 56)
    for b, h, i, j in [(0, 0, 0, 0), (1, 3, 39, 55), (1, 1, 7, 20), (0, 2, 30, 3)]:
        want = 0.3 * call.q[b, h, i] @ call.k[b, h // 2, j]
        want = want if softcap is None else softcap * torch.tanh(want / softcap)
        want = want if added is None else want + added[min(b, added.shape[0] - 1), min(h, added.shape[1] - 1), j]
        torch.testing.assert_close(got[b, h, i, j], want)


def test_without_a_cap_logits_stay_the_same_tensor() -> None:
    x = torch.randn(3)
    assert capped(x, None) is x and float(capped(x * 100, 2.0).abs().max()) <= 2.0


@pytest.mark.parametrize("sinks", [None, torch.tensor([-1.0, 0.0, 1.0, 2.0])], ids=["plain", "sinks"])
def test_weights_are_causal_and_leave_the_sinks_their_part(sinks: torch.Tensor | None) -> None:
    call = make_call(SHAPE)
    every = causal(logits(call.q, call.k, scale=call.scale), call.q_pos, call.k_pos)
    got = weights(every, sinks)
    assert not got[..., call.k_pos > call.q_pos[:, None]].any() and bool((got[..., 0] > 0).all())
    columns = every if sinks is None else torch.cat([every, sinks.view(1, 4, 1, 1).expand(2, 4, 40, 1)], -1)
    torch.testing.assert_close(got, columns.softmax(-1)[..., :56])
    torch.testing.assert_close(log_sum(every, sinks), columns.logsumexp(-1))


@pytest.fixture(params=[(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
def dimmed(request: pytest.FixtureRequest) -> torch.Tensor:
    """A bias that leaves nothing of the keys of `SPAN`."""
    bias = torch.zeros(*request.param, SHAPE[4])
    bias[..., SPAN] = -1e4
    return bias


@pytest.mark.parametrize(
    "name,settings",
    [
        ("skip_softmax", {"prefill": 1e-6, "decode": 1e-6, "block_q": 8, "block_k": 8}),
        ("vertical_slash", {"block_q": 1, "block_k": 8, "vertical": 24, "slash": 1, "sink": 0, "local": 1}),
    ],
)
def test_block_methods_see_the_bias(name: str, settings: dict, dimmed: torch.Tensor) -> None:
    method = make_method(name, min_length=0, **settings)
    plain, call = make_call(SHAPE), make_call(SHAPE, bias=dimmed)
    first = SPAN.start // 8
    rows = slice(24, None) if name == "vertical_slash" else slice(2, None)  # away from the diagonals, always kept
    seen = [method.select(c).block_mask(c.layout)[..., rows, first] for c in (plain, call)]
    assert seen[0].any() and not seen[1].any()


def test_everything_that_looks_at_attention_sees_the_bias(dimmed: torch.Tensor) -> None:
    plain, call = make_call(SHAPE), make_call(SHAPE, bias=dimmed)
    for look in (lambda c: question_view(c, 1, 5).weights, lambda c: ColumnSums.of(c, None, [1, 2]).sums):
        assert float(look(plain)[..., SPAN].min()) > 0 and not look(call)[..., SPAN].any()
    same = make_call(SHAPE, bias=torch.zeros(1, 1, SHAPE[4]))
    assert torch.equal(mass_ratio(plain).nan_to_num(), mass_ratio(same).nan_to_num())
    assert float((mass_ratio(plain) - mass_ratio(call))[:, 8:48].abs().max()) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_of_half_precision_in_a_longer_buffer(dtype: torch.dtype) -> None:
    """Heads are multiplied one by one there: every row and head with its own keys."""
    call = make_call((2, 8, 2, 1, 56))
    buffer = torch.zeros(2, 2, 80, call.k.shape[3], dtype=dtype)
    buffer[:, :, :56] = call.k
    got = logits(call.q.to(dtype), buffer[:, :, :56], scale=call.scale)
    want = logits(call.q.to(dtype).float(), buffer[:, :, :56].float(), scale=call.scale)
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)
