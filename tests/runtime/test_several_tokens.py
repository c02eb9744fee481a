"""Several tokens at once after a cache: speculating, taking back, padded rows, and what has no chance to act."""

import pytest
import torch
import zoo
from methods_list import METHODS, MethodCase
from test_invariants import assert_close, built

from hfpatch import patched

cases = pytest.mark.parametrize("case", METHODS, ids=str)


@cases
@torch.no_grad()
def test_several_tokens_after_a_cache_are_decode_steps(case: MethodCase) -> None:
    """What a speculating helper proposed, checked at once, gives the logits of one token at a time."""
    model = built("llama")
    ids = zoo.prompt(model, 2, 60)
    with patched(model, case.name, **case.settings) as patch:
        one, many = (model(ids[:, :45], use_cache=True).past_key_values for _ in range(2))
        want = torch.cat([model(ids[:, t : t + 1], past_key_values=one).logits for t in range(45, 60)], 1)
        patch.reset_report()
        got = torch.cat([model(ids[:, a:b], past_key_values=many).logits for a, b in ((45, 49), (49, 60))], 1)
        assert_close("logits", got, want)
        assert not patch.report().fallbacks()


# act keeps what wrong guesses gave to earlier tokens, and says so
@pytest.mark.parametrize("case", [case for case in METHODS if case.name != "act"], ids=str)
@torch.no_grad()
def test_tokens_taken_back_leave_decoding_as_it_was(case: MethodCase) -> None:
    """Wrong guesses are cropped off the cache again: greedy decoding goes on as if they had never been."""
    model = built("llama")
    ids, wrong = zoo.prompt(model, 1, 60), zoo.prompt(model, 1, 9, seed=4)
    with patched(model, case.name, **case.settings):
        one, many = (model(ids[:, :45], use_cache=True).past_key_values for _ in range(2))
        want, got = [], []
        for t in range(45, 60, 3):
            want += [model(ids[:, t + n : t + n + 1], past_key_values=one).logits for n in range(3)]
            guess = torch.cat([ids[:, t : t + 3], wrong], 1)
            got.append(model(guess, past_key_values=many).logits[:, :3])
            many.crop(-wrong.shape[1])
        assert_close("logits", torch.cat(got, 1), torch.cat(want, 1))


@cases
@torch.no_grad()
def test_padded_rows_and_small_chunks(case: MethodCase) -> None:
    model = built("llama")
    ids, lengths = zoo.prompt(model, 3, 45), [45, 30, 40]
    batch, mask = zoo.left_pad(ids, lengths)
    more = zoo.prompt(model, 3, 9, seed=1)
    place = torch.tensor(lengths)[:, None] + torch.arange(9)
    with patched(model, case.name, **case.settings):
        cache = model(batch, attention_mask=mask, position_ids=zoo.positions(mask), use_cache=True).past_key_values
        whole = torch.cat([mask, torch.ones_like(more)], 1)
        got = model(more, attention_mask=whole, position_ids=place, past_key_values=cache).logits
        for row, n in enumerate(lengths):
            alone = model(ids[row : row + 1, :n], use_cache=True).past_key_values
            assert_close(f"row {row}", got[row], model(more[row : row + 1], past_key_values=alone).logits[0])


@torch.no_grad()
def test_assisted_decoding_says_what_it_cannot_promise() -> None:
    model = built("llama")
    ids = zoo.prompt(model, 1, 9).repeat(1, 6)
    tiles = {"min_length": 0, "block_q": 16, "block_k": 8, "budget": 24, "window": 1}
    for name, settings, told in (
        ("quest", {"min_length": 0, "budget": 16, "page": 4}, False),
        ("block_topk", tiles, True),
    ):
        with patched(model, name, **settings) as patch:
            greedy = model.generate(ids, max_new_tokens=12, do_sample=False)
            assert "several tokens" not in str(patch.report())
            fast = model.generate(
                ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=4, eos_token_id=zoo.VOCAB
            )
            assert ("assisted decoding" in str(patch.report())) == told
            assert told or torch.equal(greedy, fast)


@torch.no_grad()
def test_methods_that_have_no_chance_to_act_say_so() -> None:
    model = built("llama")
    ids = zoo.prompt(model, 1, 45)
    quest = {"min_length": 0, "budget": 16, "page": 4}
    with patched(model, "quest", **quest) as patch:
        model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
        assert patch.report().fallbacks() == {"no cache, and quest acts in decode steps": 4 * 3}
        patch.reset_report()
        cache = model(ids, use_cache=True).past_key_values
        model(zoo.prompt(model, 1, 40, seed=1), past_key_values=cache)
        assert "quest acts in decode steps; over 32 tokens at once after a cache are none" in str(patch.report())
        assert not patch.report().fallbacks()
    from hfpatch.methods.flash_prefill import FlashPrefillConfig
    from hfpatch.methods.quest import QuestConfig

    both = [FlashPrefillConfig(min_length=0, block_q=8, block_k=8), QuestConfig(**quest)]
    with patched(model, both) as patch:
        model(ids, use_cache=False)
        assert "quest acts in decode steps, and there was no cache" in str(patch.report())
