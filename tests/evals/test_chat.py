"""Prompts through a chat template, needles in ordinary words, and what the true answer's likelihood measures."""

import random
from statistics import mean

import pytest
import torch
from hfpatch.evals.errors import EvaluationError
from hfpatch.evals.jobs.niah import NiahJob
from hfpatch.evals.jobs.task import TaskJob
from hfpatch.evals.report.summary import answer_table, lines
from hfpatch.evals.run.answer_nll import answer_ids, answer_nll
from hfpatch.evals.run.cells import Session
from hfpatch.evals.run.models import Loaded, load_model
from hfpatch.evals.run.stats import mean_interval
from hfpatch.evals.run.variants import parse_variants
from hfpatch.evals.tasks import Sample, get_task, list_tasks
from hfpatch.evals.tasks.answers import first_line
from hfpatch.evals.tasks.frame import INTRODUCTION, PLAIN, frame_of, style_of
from tiny_tokenizer import byte_tokenizer
from tokenizers import processors

from hfpatch import patched
from hfpatch.methods.quest import QuestConfig
from hfpatch.text import grammar
from hfpatch.text.needles import CITIES, STYLES, styled
from hfpatch.text.prompt_ids import prompt_ids

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ASKING = [name for name in list_tasks() if name != "perplexity_by_position"]


def chat_tokenizer(template: str = TEMPLATE, begins: bool = True):
    """Bytes, `<s>` in front if it `begins` so, and a chat template."""
    tokenizer = byte_tokenizer()
    if begins:
        start = [("<s>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=start
        )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("begins", [True, False])
def test_a_chat_prompt_is_what_the_template_gives(begins):
    tokenizer = chat_tokenizer(begins=begins)
    job = NiahJob([700], [50], 1)
    [sample] = job.build(Loaded("x", None, tokenizer), 700, 0)
    start, answer = sample.prompt.index("Read this"), sample.prompt.rindex("[end]")
    messages = [{"role": "user", "content": sample.prompt[start:answer]}]
    told = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    begun = "The special magic number for"
    assert sample.prompt[answer:].startswith(f"[end][assistant]{begun}")
    rest = tokenizer(sample.prompt[sample.prompt.rindex(begun) :], add_special_tokens=False)["input_ids"]
    assert prompt_ids(tokenizer, sample.prompt) == list(told) + list(rest)
    assert sample.meta["length"] == len(told) + len(rest) <= 700
    key = sample.prompt.split("number for ")[1].split()[0]
    assert f"\nWhat is the special magic number for {key} mentioned in the text?[end]" in sample.prompt
    assert sample.prompt.endswith(f"for {key} is") and f"for {key} is{sample.continuation}." in sample.prompt


@pytest.mark.parametrize("name", ASKING)
def test_every_task_asks_in_the_users_turn_and_is_as_long_as_asked_for(name):
    tokenizer = chat_tokenizer()
    for sample in get_task(name).samples(tokenizer, 2048, 2, chat=None):
        assert 2048 - 150 < sample.meta["length"] == len(prompt_ids(tokenizer, sample.prompt)) <= 2048
        before, question = sample.prompt.split(INTRODUCTION)[0], sample.prompt[sample.meta["question_at"] :]
        assert before == "[user]" and question[0].strip() and question.count("[end][assistant]") == 1
        assert "Answer:" not in question and "Question:" not in question
        assert all(a in sample.continuation for a in sample.answers)


def test_chat_is_taken_where_there_is_a_template():
    plain, chat = byte_tokenizer(), chat_tokenizer()
    assert frame_of(plain, None) == frame_of(chat, False) == PLAIN != frame_of(chat, None) == frame_of(chat, True)
    with pytest.raises(EvaluationError, match="no chat template; ask for plain prompts"):
        frame_of(plain, True)
    with pytest.raises(EvaluationError, match="cannot be used"):
        frame_of(chat_tokenizer("{{ raise_exception('no') }}"), None)
    with pytest.raises(EvaluationError, match="leaves out what the user says"):
        frame_of(chat_tokenizer("hello"), None)
    assert frame_of(chat_tokenizer(TEMPLATE + "<think>\n"), None).after.endswith("<think>\n</think>\n\n")


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (" 123456.\nmore", "123456."), ("\n\n12\n13", "12"), ("<think>\nis it 9?\n</think>\n\n12", "12"),
        ("<think>9 or", ""), ("so it is 9</think>12", "12"), ("12<think>9</think>", "12"), ("", ""),
    ],
)  # fmt: skip
def test_the_first_line_counts_and_thoughts_do_not(output, line):
    assert first_line(output) == line
    sample = Sample("", ["9"])
    assert get_task("single").score(output, sample) == 0.0
    assert NiahJob([64]).score(sample, output) == 0.0


def test_styles_say_the_same_facts():
    for make in (grammar.single, grammar.multikey, grammar.multineedle, grammar.passkey, grammar.tracking):
        plain = make(random.Random(1))
        said = {style: styled(plain, style, random.Random(2)) for style in STYLES}
        assert said["grammar"] is plain
        for style in ("words", "cities"):
            assert "secret code" not in str(said[style])
            assert said[style].target == plain.target and len(said[style].facts) == len(plain.facts)
            assert [f.split()[-1] for f in said[style].facts] == [f.split()[-1] for f in plain.facts]
    fact = styled(grammar.single(random.Random(1)), "cities", random.Random(2)).facts[0]
    assert fact.split(" for ")[1].split()[0] in CITIES
    many = styled(grammar.multikey(random.Random(1), 200), "cities", random.Random(2))
    assert len({f.split(" is ")[0] for f in many.facts}) == 201


def test_the_embedded_model_keeps_its_grammar_and_others_get_words():
    embedded = load_model("embedded").tokenizer
    assert (style_of(embedded, None), style_of(byte_tokenizer(), None), style_of(embedded, "cities")) == (
        "grammar", "words", "cities",
    )  # fmt: skip


def test_answer_ids_begin_where_the_prompt_ends(tokenizer):
    ids, start = answer_ids(tokenizer, "The code is", " 123456")
    assert tokenizer.decode(ids[start:]).strip() == "123456" and ids[:start] == prompt_ids(tokenizer, "The code is")


@pytest.mark.parametrize("steps", [False, True])
def test_answer_nll_is_the_cross_entropy_of_the_answer(model, tokenizer, steps):
    ids, start = answer_ids(tokenizer, "In winter, the badger waits at the farm. The code is", " 123456")
    logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
    want = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]))
    told = answer_nll(model, tokenizer, "In winter, the badger waits at the farm. The code is", " 123456", steps=steps)
    assert told == pytest.approx(float(want), rel=1e-4) and len(ids) - start > 1


def test_by_steps_a_patch_of_decoding_is_felt(model, tokenizer):
    prompt = " ".join(f"In winter, badger {n} waits." for n in range(60)) + " The code is"
    config = QuestConfig(budget=32, page=16, min_length=0)

    def told(steps: bool) -> float:
        return answer_nll(model, tokenizer, prompt, " 123456", steps=steps)

    dense = told(False), told(True)
    with patched(model, config) as patch:
        assert told(False) == dense[0] and {x.phase for x in patch.report().lines} == {"prefill"}
        assert told(True) != dense[1] and patch.report().density("decode") < 0.5


def test_jobs_tell_the_answer_nll_beside_the_score(model, tokenizer):
    session = Session("tiny", parse_variants(["streaming:window=32", "quest"]))
    session.loaded = Loaded("tiny", model, tokenizer)
    counted = []
    session.step = lambda: counted.append(1)
    for job in (NiahJob([256], [0, 100], 2), TaskJob("line_retrieval", [256], 2, label="lines")):
        counted.clear()
        cells = job.cells(session.variants)
        done = {cell: job.run(cell, session) for cell in cells}
        assert len(counted) == sum(job.steps(cell, session.variants) for cell in cells)
        rows = job.rows({cell: result.data for cell, result in done.items()})
        own = {r["variant"]: r for r in rows}
        assert [own[v.name]["nll_by_steps"] for v in session.variants] == [False, False, True]
        assert own["dense"]["answer_nll"] != own["streaming:window=32"]["answer_nll"]
        view = job.view({"kind": job.kind, "label": job.label, "rows": rows})
        assert view.table.header[-1] == "answer NLL" and "quest, acting in decoding alone" in " ".join(view.notes)
        assert any(n.what == "answer NLL" and n.variant == "quest" for n in view.numbers)
        nlls = {v: [s["answer_nll"] for s in done[job.cells([session.variant(v)])[0]].samples] for v in own}
        pairs = [a - b for a, b in zip(nlls["streaming:window=32"], nlls["dense"], strict=True)]
        middle, _, high = mean_interval(pairs)
        first = {row[0].text: row[-1] for row in answer_table(lines(list(own), view.answers)).cells}
        for cells_ in (first, {row[0].text: row[-1] for row in view.table.cells}):
            assert cells_["dense"].small == "" and cells_["dense"].text == f"{mean(nlls['dense']):.3f}"
            assert cells_["streaming:window=32"].small == f"{middle:+.3f} ± {high - middle:.3f}"
        before = {cell: {k: v for k, v in r.data.items() if k != "answer_nll_of_samples"} for cell, r in done.items()}
        told = job.view({"kind": job.kind, "label": job.label, "rows": job.rows(before)}).table.cells
        assert [row[-1].small for row in told] == ["", "", ""] and told[0][-1].text == first["dense"].text
        old = [{k: v for k, v in r.items() if not k.startswith(("answer_nll", "nll_by_steps"))} for r in rows]
        assert "answer NLL" not in job.view({"kind": job.kind, "label": job.label, "rows": old}).table.header


def test_without_nll_no_prompt_is_read_again(model, tokenizer, monkeypatch):
    monkeypatch.setattr("hfpatch.evals.jobs.task.answer_nll", lambda *_, **__: pytest.fail("it was read again"))
    session = Session("tiny", parse_variants([]))
    session.loaded = Loaded("tiny", model, tokenizer)
    job = NiahJob([256], [50], 1, nll=False)
    [cell] = job.cells(session.variants)
    assert "answer_nll" not in job.rows({cell: job.run(cell, session).data})[0]


def test_positions_are_checked_before_the_first_cell_runs(tmp_path, model, tokenizer, monkeypatch):
    from hfpatch.evals.run.runner import Run, execute

    monkeypatch.setattr("hfpatch.evals.run.cells.load_model", lambda *_: Loaded("tiny", model, tokenizer))
    monkeypatch.setattr("hfpatch.evals.jobs.task.complete", lambda *_: pytest.fail("a cell was run"))
    run = Run("x", "tiny", parse_variants([]), [NiahJob([64, 5000], [50], 1)])
    with pytest.raises(EvaluationError, match="has positions for 4096 tokens; 5000 are too many"):
        execute(run, tmp_path / "out")
