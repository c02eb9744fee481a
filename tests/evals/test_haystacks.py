"""Texts of any script fill prompts and take facts where they should stand; what cannot, and bad files, are refused."""

import copy
import random
from itertools import repeat
from pathlib import Path

import pytest
from hfpatch.evals.errors import EvaluationError
from hfpatch.evals.jobs.niah import NiahJob
from hfpatch.evals.run.models import Loaded
from hfpatch.evals.tasks import get_task, harness
from hfpatch.evals.tasks.filling import little
from hfpatch.evals.tasks.layout import compose, count_tokens
from hfpatch.evals.tasks.stream import stream
from test_tasks import byte_tokenizer, word_tokenizer
from tokenizers import Regex, normalizers

from hfpatch.text import grammar
from hfpatch.text.pieces import cut, split
from hfpatch.text.sources import sentences

DRAW = random.Random(0)
FACT = grammar.needle("brisk-otter", "123456")
TEXTS = {
    "chinese": "".join(f"第{n}天的天气很好，孩子们在公园里玩耍。" for n in range(200)),
    "chinese without marks": "".join(DRAW.choices("天地人你我他大小山水火木金土日月", k=3000)),
    "japanese": "".join(f"今日は{n}番目の晴れた日です！楽しいですか？「はい。」と言った。" for n in range(150)),
    "korean": " ".join(f"{n}일째 날씨가 좋았고 아이들은 공원에서 놀았다." for n in range(150)),
    "thai": "วันนี้อากาศดีมากเด็กๆเล่นอยู่ในสวนสาธารณะ" * 100,
    "thai with spaces": "วันนี้อากาศดีมาก เด็กๆเล่นอยู่ในสวนสาธารณะ " * 100,
    "arabic": " ".join(f"كان الطقس جميلا في اليوم {n}، ولعب الأطفال. هل كان ذلك ممتعا؟" for n in range(150)),
    "hindi": " ".join(f"दिन {n} का मौसम बहुत अच्छा था और बच्चे बगीचे में खेल रहे थे।" for n in range(150)),
    "russian": " ".join(f"На {n}-й день погода была хорошей. Это было весело!" for n in range(150)),
    "lower case": " ".join(f"am {n}. tag war das wetter schön. die kinder spielten." for n in range(150)),
    "code": Path(harness.__file__).read_text(encoding="utf-8"),
    "one long line": "".join(DRAW.choices("0123456789abcdef", k=9000)),
    "words without marks": " ".join(DRAW.choices(["otter", "lamp", "river", "blue"], k=3000)),
    "lines without marks": "\n".join(" ".join(DRAW.choices(["otter", "lamp", "river"], k=5)) for _ in range(600)),
    "crlf": "\r\n".join(f"On day {n} the weather was fine.\r\nChildren played." for n in range(150)),
    "tabs": "\t".join(f"{n}\tred\tblue" for n in range(600)),
    "emoji": "".join(DRAW.choices(["😀", "👨‍👩‍👧", "🇩🇪", "👍🏽", "❤️"], k=900)),
    "one short sentence": "天气很好。",
    "long sentences": "Nobody knew " + ", nor did anyone say, " * 200 + "why. " + "It rained. " * 20,
}


@pytest.fixture(params=TEXTS, ids=lambda name: name.replace(" ", "-"))
def haystack(request, tmp_path):
    path = tmp_path / "haystack.txt"
    path.write_bytes(TEXTS[request.param].encode())
    return str(path)


def place(tokenizer, prompt: str) -> tuple[float, int]:
    """Share of the haystack's tokens that stand before the needle, and their number in all."""
    said = prompt.split("\nQuestion")[0].split(grammar.needle("", "")[:19])
    before, after = (count_tokens(tokenizer, part) for part in said)
    return before / (before + after), before + after


@pytest.mark.parametrize("make", [byte_tokenizer, word_tokenizer, None], ids=["bytes", "words", "pieces"])
def test_niah_prompts_have_their_length_and_depth(haystack, make, tokenizer):
    chosen = make() if make else tokenizer
    for sample in NiahJob([1000], [0, 30, 100], 1, haystack, needle="grammar").build(
        Loaded("x", None, chosen), 1000, 0
    ):
        tokens, depth, reached = (sample.meta[k] for k in ("length", "depth", "depth_reached"))
        assert 1000 - little(1000) <= tokens == count_tokens(chosen, sample.prompt) <= 1000
        share, hay = place(chosen, sample.prompt)
        assert abs(reached - depth) * hay <= little(1000) + 1
        assert abs(share - depth) * hay <= little(1000) + 80  # the needle's own tokens count here


@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_streams_have_their_length_and_depth(haystack, depth, tokenizer):
    said = "".join(stream(tokenizer, [FACT], [depth], sentences(haystack, random.Random(3)), 1500))
    tokens, before = (len(tokenizer(s, add_special_tokens=False)["input_ids"]) for s in (said, said.split(FACT)[0]))
    assert 1500 - little(1500) - 4 <= tokens <= 1502
    assert abs(before - depth * tokens) <= little(1500) + 20


def test_tasks_and_perplexity_have_their_length(haystack, tokenizer):
    for name in ("multi_key", "variable_tracking", "perplexity_by_position"):
        for sample in get_task(name).samples(tokenizer, 900, 2, haystack=haystack):
            assert 900 - little(900) <= count_tokens(tokenizer, sample.prompt) <= 900


def test_samples_begin_at_different_places(tmp_path, tokenizer):
    path = tmp_path / "haystack.txt"
    for name in ("chinese without marks", "thai", "one long line", "words without marks", "code"):
        path = tmp_path / f"{name}.txt"
        path.write_text(TEXTS[name], encoding="utf-8")
        assert len({next(sentences(str(path), random.Random(n))) for n in range(20)}) > (1 if name == "thai" else 8)


def test_english_sentences_are_what_they_were():
    prose = grammar.PROSE_FILE.read_text(encoding="utf-8")
    for source in (prose, '"Oh!" said he. (A b.) "No.\n\nYes" 5 p.m. He left.'):
        assert [" ".join(pieces) for pieces in split(source)] == grammar.split_sentences(source)
    assert all(len(pieces) == 1 for pieces in split(prose))


def test_pieces_are_sentences_or_short(tmp_path):
    assert [p for s in split(TEXTS["chinese"]) for p in s][:2] == [
        f"第{n}天的天气很好，孩子们在公园里玩耍。" for n in range(2)
    ]
    assert next(iter(split("他说：“好。”然后走了。"))) == ("他说：“好。”", "然后走了。")
    assert next(iter(split("یہ ایک دن ہے۔ وہ گیا۔"))) == ("یہ ایک دن ہے۔", "وہ گیا۔")
    for name, said in TEXTS.items():
        assert all(len(piece.encode()) <= 1500 for s in split(said) for piece in s), name


def test_a_cut_keeps_words_and_characters_whole(tokenizer):
    assert cut(tokenizer, "one two-three", 5)[0] in ("one", "one two-three")
    family = "👨‍👩‍👧"
    begun, rest = cut(tokenizer, family * 5, 20)
    assert begun.count(family) * len(family) == len(begun) and begun + rest == family * 5
    assert cut(tokenizer, "กิ" * 9, 1)[0] == "กิ"


ZALGO = "a" + "\u0301" * 4000


def silent_tokenizer():
    """Drops all characters but ASCII, with the space before them."""
    chosen = copy.deepcopy(byte_tokenizer())
    chosen.backend_tokenizer.normalizer = normalizers.Replace(Regex(r" ?[^\x00-\x7f]"), "")
    return chosen


def test_what_cannot_be_filled_is_refused_with_figures(tokenizer):
    asked = {"tail": grammar.question("brisk-otter")}
    with pytest.raises(EvaluationError, match=r"comes to \d+ of 1000 tokens, \d+ too few, .* choose another haystack"):
        compose(silent_tokenizer(), [FACT], [0.5], repeat("第三天"), 1000, **asked)
    with pytest.raises(EvaluationError, match=r"depth 50% would stand at \d+% .* \d+ tokens off"):
        compose(tokenizer, [FACT], [0.5], repeat(ZALGO), 1000, **asked)
    with pytest.raises(EvaluationError, match=r"would end \d+ tokens from its place"):
        list(stream(silent_tokenizer(), [FACT], [0.0], repeat("第三天"), 1000))
    with pytest.raises(EvaluationError, match=r"would stand \d+ tokens from its place"):
        list(stream(tokenizer, [FACT], [0.3], repeat(ZALGO), 30_000))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "There is no haystack .*write grammar, prose"),
        ("schön.".encode("latin-1"), r"is not UTF-8 \(byte 0xf6 at 3\); save it as UTF-8"),
        ("Bees hum.".encode("utf-16"), "is not UTF-8 .* looks like UTF-16"),
        ("Bees hum.".encode("utf-16-le"), "holds NUL bytes"),
        (b"Bees hum.\0 They rest.", "holds NUL bytes"),
        ("天气".encode("gb18030"), "is not UTF-8"),
        (b"", "holds no sentences"),
        (b" \r\n\t\n", "holds no sentences"),
        ("\ufeff \n".encode(), "holds no sentences"),
        ("folder", "is a folder; name a text file"),
    ],
    ids=str,
)
def test_bad_files_are_told_in_a_sentence(content, part, tmp_path):
    path = tmp_path / "haystack.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    for run in (
        lambda: sentences(str(path), random.Random(0)),
        lambda: get_task("perplexity_by_position").samples(byte_tokenizer(), 300, 1, haystack=str(path)),
    ):
        with pytest.raises(EvaluationError, match=part):
            run()


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "file.txt/more"])
def test_bad_names_are_told_in_a_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("Bees hum.")
    with pytest.raises(EvaluationError, match=r"There is no haystack|cannot be read"):
        sentences(name, random.Random(0))


def test_a_file_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "haystack.txt"
    path.write_text("Bees hum.")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(EvaluationError, match="cannot be read: Permission denied"):
        sentences(str(path), random.Random(0))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "haystack.txt"
    path.write_text("Bees hum all day.", encoding="utf-8-sig")
    assert next(sentences(str(path), random.Random(0))) == "Bees hum all day."


@pytest.mark.parametrize("name", ["chinese without marks", "one long line", "words without marks"])
def test_perplexity_documents_have_four_parts(name, tmp_path, tokenizer):
    pytest.importorskip("datasets")
    path = tmp_path / "haystack.txt"
    path.write_text(TEXTS[name], encoding="utf-8")
    rows = harness.perplexity_docs(tokenizer=tokenizer, length=800, samples=1, haystack=str(path))["test"]
    assert [row["quarter"] for row in rows] == list(harness.QUARTERS)
    sizes = [len(row["told"]) for row in rows]
    assert max(sizes) < 2 * min(sizes)
    assert rows[3]["context"] == "".join(row["told"] for row in rows.select(range(3)))
    scored = [harness.perplexity_of_doc(row, [(-2.0 * len(harness.words(row["told"])), False)])["ppl"] for row in rows]
    assert harness.word_perplexity(scored) == pytest.approx(2.718281828**2)
    assert harness.word_perplexity([(-1e6, 1)]) == float("inf")
