"""What layers share stays within one forward: between threads, and where a layer runs again for its gradient."""

import threading
from typing import Any

import pytest
import torch
import zoo
from test_invariants import assert_close
from torch import Tensor

from hfpatch import patched


@pytest.mark.parametrize("share", ["boundaries", "selection"])
def test_threads_and_streams_share_within_their_own_forward(share: str) -> None:
    """Prompts of one length in several threads at once, each past the leading layer before any goes on."""
    model = zoo.SUPPORTED["llama"].build()
    settings = {"budget": 24, "sink": 2, "local": 4, "block_q": 4, "chunk": 4, "question_tokens": 0, "share": share}
    prompts = [zoo.prompt(model, 1, 60, seed=n) for n in range(3)]
    got: dict[int, Tensor] = {}
    with torch.no_grad(), patched(model, "dhsa", **settings):
        want = [model(p).logits for p in prompts]
        meet = threading.Barrier(3, timeout=30)

        def wait(*args: Any) -> None:
            meet.wait()

        hook = model.model.layers[0].register_forward_hook(wait)

        def work(n: int) -> None:
            with torch.no_grad():
                got[n] = model(prompts[n]).logits

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        hook.remove()
    for n in range(3):
        assert_close(f"thread {n}", got[n], want[n])


@pytest.mark.parametrize("share", ["boundaries", "selection"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_sharing_survives_gradient_checkpointing(share: str, reentrant: bool) -> None:
    """A layer run again for its gradient finds what its forward had shared."""
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 1, 60)
    settings = {"budget": 24, "sink": 2, "local": 4, "block_q": 4, "chunk": 4, "question_tokens": 0, "share": share}

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with patched(model, "dhsa", **settings):
        want = gradients()
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        got = gradients()
    for a, b in zip(got, want, strict=True):
        assert_close("gradient", a, b)
