"""Needle grids: prompts of the right size and place, and scores that tell finding from not finding."""

import random

import pytest
import torch
from hfpatch.evals.errors import EvaluationError
from hfpatch.evals.jobs.niah import NiahJob
from hfpatch.evals.run.cells import Session
from hfpatch.evals.run.generation import complete, pad_left
from hfpatch.evals.run.models import Loaded
from hfpatch.evals.run.shared_prompt import SharedPrompt
from hfpatch.evals.run.variants import parse_variants
from hfpatch.evals.tasks.layout import compose, count_tokens

from hfpatch.runtime.pipeline import FEW
from hfpatch.text import grammar
from hfpatch.text.sources import sentences


def fill(tokenizer, source, needle, tail, length, depth):
    return compose(tokenizer, [needle], [depth], source, length, tail=tail)


NEEDLE, TAIL = grammar.needle("brisk-otter", "123456"), grammar.question("brisk-otter")


@pytest.mark.parametrize("source", ["grammar", "prose"])
@pytest.mark.parametrize("length", [63, 257, 1111])
def test_prompt_fills_the_length_to_within_a_sentence(tokenizer, source, length):
    prompt = fill(tokenizer, sentences(source, random.Random(3)), NEEDLE, TAIL, length, 0.5)
    assert prompt.tokens == count_tokens(tokenizer, prompt.prompt) <= length
    drawn = sentences(source, random.Random(3))
    longest = max(count_tokens(tokenizer, next(drawn)) for _ in range(200))
    assert length - prompt.tokens <= longest
    assert prompt.prompt.endswith(f"\n{TAIL}")


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_needle_stands_at_a_sentence_border_near_its_depth(tokenizer, depth):
    prompt = fill(tokenizer, sentences("grammar", random.Random(0)), NEEDLE, TAIL, 900, depth)
    before, after = prompt.prompt.removesuffix(f"\n{TAIL}").split(NEEDLE)
    share = count_tokens(tokenizer, before) / (count_tokens(tokenizer, before) + count_tokens(tokenizer, after))
    assert abs(share - depth) < 0.03 and abs(prompt.depths[0] - depth) < 0.03
    assert before == "" or before.endswith((". ", "? "))


def test_too_short_a_length_says_how_much_is_needed(tokenizer):
    with pytest.raises(EvaluationError, match="question and facts alone take"):
        fill(tokenizer, sentences("grammar", random.Random(0)), NEEDLE, TAIL, 12, 0.5)


def test_haystack_file(tokenizer, tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("Bees hum all day. They rest at night. Then it rains.")
    prompt = fill(tokenizer, sentences(str(file), random.Random(0)), NEEDLE, TAIL, 200, 0.5)
    assert "Bees hum all day. They rest at night. Then it rains. Bees" in prompt.prompt
    with pytest.raises(EvaluationError, match="no haystack"):
        sentences(str(tmp_path / "missing.txt"), random.Random(0))


def test_padding_is_on_the_left():
    ids, mask = pad_left([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_batched_completions_equal_single_ones(model, tokenizer):
    prompts = ["The badger", "Nobody at the farm greets the", "In winter"]
    alone = [complete(model, tokenizer, [p], 5)[0] for p in prompts]
    assert complete(model, tokenizer, prompts, 5) == alone


def test_scores_follow_the_text_and_record_the_question(model, tokenizer, monkeypatch):
    job = NiahJob([256], depths=[0, 100], samples=2, batch_size=3, needle="grammar")
    session = Session("tiny", parse_variants(["streaming"], {"window": 32}))
    session.loaded = Loaded("tiny", model, tokenizer)
    values = {s.prompt: s.answers[0] for s in job.build(session.loaded, 256, 0)}

    def answer(model, tokenizer, prompts, room):
        return [f" {values[p]}." if p.startswith(grammar.needle("", "")[:15]) else " 000000." for p in prompts]

    monkeypatch.setattr("hfpatch.evals.jobs.task.complete", answer)
    results = {cell: job.run(cell, session) for cell in job.cells(session.variants)}
    rows = job.rows({cell: r.data for cell, r in results.items()})
    assert {(r["variant"], r["depth"]): r["score"] for r in rows} == {
        ("dense", 0.0): 1.0, ("dense", 1.0): 0.0,
        ("streaming:window=32", 0.0): 1.0, ("streaming:window=32", 1.0): 0.0,
    }  # fmt: skip
    samples = [s for r in results.values() for s in r.samples]
    assert len(samples) == 8 and {s["expected"] for s in samples} == set(values.values())
    assert [s["question_in_sparse_part"] for s in samples] == [False] * 4 + [True] * 4


def test_patch_is_on_during_generation_and_off_afterwards(model, tokenizer):
    job = NiahJob([256], depths=[50], samples=1)
    session = Session("tiny", parse_variants(["streaming"], {"window": 32}))
    session.loaded = Loaded("tiny", model, tokenizer)
    before = model(torch.tensor([[1, 2, 3]])).logits
    dense, sparse = (job.run(cell, session).data for cell in job.cells(session.variants))
    assert dense["density_prefill"] == 1.0 and 0 < sparse["density_prefill"] < 0.5
    assert torch.equal(before, model(torch.tensor([[1, 2, 3]])).logits)


TOGETHER = {
    None: None, "streaming": "streaming:window=64,sink=4", "quest": "quest:budget=64",
    "dhsa": "dhsa:budget=128,sink=4,local=16,question_tokens=0",
}  # fmt: skip


@pytest.mark.parametrize("patch", TOGETHER)
def test_together_asks_of_one_prefill_what_apart_asks_of_many(model, tokenizer, patch):
    """Dense and patched: a question after the text's own prefill; counted by forwards and by a plain run."""
    variants = parse_variants([TOGETHER[patch]] if patch else [])
    session = Session("tiny", variants)
    session.loaded = Loaded("tiny", model, tokenizer)
    job = NiahJob([300], depths=[0, 50, 100], samples=2, needle="words", together=True)
    built = job.build(session.loaded, 300, 0)
    assert len(built) == 6 and len({s.prompt[: s.shared] for s in built}) == 2
    assert all(s.prompt[: s.shared].count(s.answers[0]) == 1 for s in built)
    assert all(t.answers[0] in s.prompt for s in built[:3] for t in built[:3])
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append((args[0] if args else kwargs["input_ids"]).shape[1]), with_kwargs=True
    )
    try:
        cell = job.cells(variants)[-1]
        found = job.run(cell, session)
    finally:
        hook.remove()
    assert sum(n > 150 for n in lengths) == 2
    assert all(n == 1 or n > FEW for n in lengths)  # no question counts as decode steps
    variant = session.variant(cell.variant)
    for n, (sample, record) in enumerate(zip(built, found.samples, strict=True)):
        with variant.applied(model):
            wanted, output = by_hand(model, tokenizer, sample, built[n // 3 * 3 :][:3], steps=patch == "quest")
        assert record["answer_nll"] == pytest.approx(wanted, abs=1e-4)
        assert record["output"].startswith(output)
        assert record["question_place"].startswith("a call of its own")


@torch.inference_mode()
def by_hand(model, tokenizer, sample, asked, steps):
    """Answer NLL and first output token of a sample in plain calls: text, question with answer, decode steps."""
    whole, full = (tokenizer(t)["input_ids"] for t in (sample.prompt, sample.prompt + sample.continuation))
    rows = [tokenizer(t)["input_ids"] for t in (sample.prompt[: sample.shared], *(s.prompt for s in asked))]
    cut = next((n for n, t in enumerate(zip(*rows, strict=False)) if len(set(t)) > 1), len(rows[0]))
    cut = min(cut, *(len(r) - FEW - 1 for r in rows[1:]))
    cache = model(torch.tensor([whole[:cut]]), use_cache=True).past_key_values
    ends = list(range(len(whole), len(full))) if steps else [len(full) - 1]
    logits, begin = [], cut
    for end in ends:
        logits.append(model(torch.tensor([full[begin:end]]), past_key_values=cache, use_cache=True).logits[0])
        begin = end
    logp = torch.cat(logits).float().log_softmax(-1)
    nll = [-logp[n - 1 - cut, full[n]].item() for n in range(len(whole), len(full))]
    return sum(nll) / len(nll), tokenizer.decode([int(logp[len(whole) - 1 - cut].argmax())])


def test_the_shortest_question_is_no_decode_step(model, tokenizer):
    """Calls of few tokens after a cache count as decode steps, in which prefill methods run dense."""
    text = " ".join(sentences_of("grammar", 12))
    prompts = [f"{text} So?", f"{text} Who is it?"]
    shared = SharedPrompt(model, tokenizer, text, prompts)
    assert shared.tokens < count_tokens(tokenizer, text)
    calls = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args[0] if args else kwargs["input_ids"]).shape[1]), with_kwargs=True
    )
    try:
        shared.complete(prompts[0], 3)
        shared.nll(prompts[0], " The badger", steps=True)
    finally:
        hook.remove()
    assert max(calls) > FEW and all(n == 1 or n > FEW for n in calls)
    with pytest.raises(EvaluationError, match="too short"):
        SharedPrompt(model, tokenizer, "A text.", ["A text. So?"])


def sentences_of(source, count):
    drawn = sentences(source, random.Random(0))
    return [next(drawn) for _ in range(count)]
