"""What the reader job puts to a model: chats, needles in ordinary words, texts cut to the model's positions."""

import re

import pytest
from hfpatch.evals.errors import EvaluationError
from hfpatch.evals.jobs.reader import ReaderJob
from hfpatch.evals.run.cells import Session
from hfpatch.evals.run.models import Loaded
from hfpatch.evals.run.variants import parse_variants
from hfpatch.evals.tasks.cutting import within
from hfpatch.evals.tasks.layout import count_tokens
from tiny_tokenizer import VOCAB, byte_tokenizer
from zoo import SUPPORTED

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
READS = "infiniretri:chunk_tokens=400,keep_budget=200,template={context}{question}"


def asked(variant, **settings):
    """The one record of a job's one question, and the prompt the model was to go on from."""
    tokenizer, model, prompts = byte_tokenizer(), SUPPORTED["llama"].build(vocab_size=VOCAB), []
    model.config.max_position_embeddings = 2048
    tokenizer.chat_template = TEMPLATE
    generate = model.generate

    def spy(input_ids, **words):
        prompts.append(tokenizer.decode(input_ids[0]))
        return generate(input_ids, **words)

    model.generate = spy
    session = Session("x", [v for v in parse_variants([READS]) if v.name.startswith(variant)])
    session.__dict__["loaded"] = Loaded("x", model, tokenizer)
    job = ReaderJob(**{"lengths": [1200], "depths": [50], **settings})
    [cell] = job.cells(session.variants)
    job.check(cell, session)
    [record] = job.run(cell, session).samples
    return record, "".join(prompts)


@pytest.mark.parametrize("variant", ["dense", "infiniretri"])
def test_a_chat_is_asked_in_words_and_begins_its_answer(variant):
    record, prompt = asked(variant)
    assert record["chat"] and record["needle"] == "words"
    text = re.fullmatch(r"\[user\](.*)\[end\]\[assistant\](.*)", prompt, re.DOTALL)
    key = re.search(r"What is the special magic number for (\S+) mentioned in the text\?$", text[1])[1]
    assert text[2] == f"The special magic number for {key} is"
    assert variant == "infiniretri" or f"The special magic number for {key} is {record['expected']}." in text[1]


@pytest.mark.parametrize("variant", ["dense", "infiniretri"])
def test_plain_prompts_and_the_grammars_needles_where_asked_for(variant):
    record, prompt = asked(variant, chat=False, needle="grammar")
    assert not record["chat"] and record["needle"] == "grammar" and "[" not in prompt
    assert re.search(r"Question: What is the secret code for (\S+)\? Answer: The secret code for \1 is$", prompt)


def test_a_chat_that_the_variant_rules_out_is_none(monkeypatch):
    monkeypatch.setattr(f"{__name__}.READS", READS.replace("chunk", "chat=False,chunk"))
    assert not asked("infiniretri")[0]["chat"] and asked("infiniretri", chat=True)[0]["chat"]


def test_the_first_line_of_an_answer_counts(monkeypatch):
    value = asked("dense")[0]["expected"]
    for output, score in ((f" {value}.\nNo, 7.", 1), (f"I cannot say.\n{value}", 0), (f" 1{value}", 0)):
        monkeypatch.setattr("hfpatch.evals.jobs.reader.complete", lambda *_, said=output: [said])
        assert asked("dense")[0]["score"] == score


def test_a_text_beyond_the_positions_is_refused_or_cut_in_the_middle():
    for length in (6000, 2047):
        with pytest.raises(EvaluationError, match=rf"for 2048 tokens; {length} and \d+ for the question are too many"):
            asked("dense", lengths=[length])
    found = {depth: asked("dense", lengths=[6000], depths=[depth], cut=True) for depth in (0, 50, 100)}
    for depth, (record, prompt) in found.items():
        assert 1700 < len(byte_tokenizer()(prompt)["input_ids"]) < 2048
        assert (f"is {record['expected']}." in prompt) == (depth != 50)
    record, prompt = asked("infiniretri", lengths=[6000], cut=True)
    assert record["chunks"] > 10


@pytest.mark.parametrize("room", [0, 1, 50, 51, 77, 1000])
def test_a_cut_text_keeps_both_ends_and_stays_within_its_room(room):
    tokenizer, told = byte_tokenizer(), [f"Sentence {n} of them." for n in range(40)]
    kept = within(tokenizer, " ".join(told), room)
    numbers = [int(n) for n in re.findall(r"Sentence (\d+) of them\.", kept)]
    half = next((n for n in range(40) if sum(len(t) + 1 for t in told[: n + 1]) > room // 2), 40)
    assert numbers == ([*range(half), *range(40 - half, 40)] if room < 1000 else [*range(40)])
    assert count_tokens(tokenizer, kept) <= room


def test_a_text_that_fits_is_left_alone():
    text = "One  sentence.\nAnother one."
    assert within(byte_tokenizer(), text, 40) is text


def test_no_room_beside_the_question_is_said(tokenizer):
    with pytest.raises(EvaluationError, match="no room for a text"):
        within(tokenizer, "One sentence. Another one. A third.", -3)
