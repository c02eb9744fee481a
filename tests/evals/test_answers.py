"""An answer counts when it stands in the text as whole words and whole numbers, wherever one is looked for."""

import pytest
from hfpatch.evals.jobs import reader as reader_job
from hfpatch.evals.jobs import task as task_job
from hfpatch.evals.jobs.niah import NiahJob
from hfpatch.evals.jobs.reader import ReaderJob
from hfpatch.evals.run.cells import Cell, Session
from hfpatch.evals.run.models import Loaded
from hfpatch.evals.run.variants import Variant
from hfpatch.evals.tasks import Sample, get_task
from hfpatch.evals.tasks.answers import holds

from hfpatch.text.scripts import words

CODE = "699108"


@pytest.mark.parametrize(
    "text",
    [
        " 699108.", "(699108)", "“699108”", "**699108**", "_699108_", "code:699108,", "A-699108", "#699108!",
        "699,108", "699'108", "699’108", "699_108", "699\u202f108", "6,99,108",
        "123456,699108", "699108,123456", "699108/123456", "1. 699108",
        "٦٩٩١٠٨", "۶۹۹۱۰۸", "६९९१०८", "６９９１０８", "๖๙๙๑๐๘",
        "密码是699108。", "暗号は699108です", "699108입니다", "รหัส699108ครับ", "و699108", "699108है",
        "\u200e699108\u200e",
    ],
)  # fmt: skip
def test_a_number_counts_whatever_stands_around_it(text):
    assert holds(text, CODE)


@pytest.mark.parametrize(
    "text",
    [
        "9699108", "6991087", "0699108", "1,699,108", "699,108,123", "16,99,108", "3.699108", "699108.5", "٣٫699108",
        "x699108", "699108x", "699108th", "é699108", "ж699108", "9٦٩٩١٠٨", "६९९१०८७", "699 108", "69910", "", "none",
    ],
)  # fmt: skip
def test_a_number_inside_another_or_in_a_name_does_not_count(text):
    assert not holds(text, CODE)


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("The Otter's lamp", "otter", True), ("otters", "otter", False), ("brisk-otter", "otter", True),
        ("STRASSE", "straße", True), ("cle\u0301", "clé", True), ("clé", "cle", False), ("clef", "clé", False),
        ("КОТ.", "кот", True), ("которая", "кот", False), ("سرد", "سر", False), ("کتاب،", "کتاب", True),
        ("कि", "क", False), ("बिल्ली।", "बिल्ली", True), ("答案是北京。", "北京", True), ("ประเทศไทย", "ไทย", True),
        ("กิ", "ก", False), ("답은 서울입니다", "서울", True), ("ab12  =\n123456.", "AB12 = 123456", True),
        ("AB12 = 1234567", "AB12 = 123456", False), ("use C++ now", "C++", True), ("1,234", "1,234", True),
        ("1234", "1,234", True), ("1,234", "234", False), ("1,234", "1", False), ("x", "", False),
    ],
)  # fmt: skip
def test_words_of_any_script(text, answer, found):
    assert holds(text, answer) is found


def test_words_are_counted_where_they_are_written_together():
    assert words("The  cat sat-on, it.") == ["The", "  cat", " sat-on,", " it."]
    assert words("第2天 ok กิน") == ["第", "2", "天", " ok", " กิ", "น"]
    assert "".join(words("x" * 250)) == "x" * 250 and len(words("x" * 250)) == 3


ANSWERS = [(" {}.", 1.0), (" 9{}.", 0.0), (" {}7.", 0.0), ("({})", 1.0)]


def job_score(job, module, monkeypatch, model, tokenizer, told):
    """Score of a job whose model answers the value in the words of `told`."""
    session = Session("tiny", [Variant("dense")])
    session.loaded = Loaded("tiny", model, tokenizer)
    value = "123456"
    monkeypatch.setattr("hfpatch.text.grammar.random_value", lambda rng: value)
    monkeypatch.setattr(
        module, "complete", lambda model, tokenizer, prompts, room: [told.format(value)] * len(prompts)
    )
    return job.run(Cell(job.label, "dense", 300), session).data["grid"][0]["score"]


@pytest.mark.parametrize(("told", "score"), ANSWERS)
@pytest.mark.parametrize(("job", "module"), [(NiahJob, task_job), (ReaderJob, reader_job)])
def test_jobs_count_whole_numbers(job, module, told, score, monkeypatch, model, tokenizer):
    made = job([300], depths=[50], samples=1)
    assert job_score(made, module, monkeypatch, model, tokenizer, told) == score


@pytest.mark.parametrize(("told", "score"), ANSWERS)
def test_tasks_count_whole_numbers(told, score):
    assert get_task("single").score(told.format(CODE), Sample("", [CODE])) == score
