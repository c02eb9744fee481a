"""The tasks' prompts hold what they ask for, have the length asked for, and are scored as they should be."""

import re
import subprocess
import sys
from functools import lru_cache

import pytest
from hfpatch.evals.errors import EvaluationError
from hfpatch.evals.tasks import LM_EVAL_FOLDER, get_task, list_tasks
from hfpatch.evals.tasks.base import clip, even_depth, recall
from hfpatch.evals.tasks.facts import pairs
from hfpatch.evals.tasks.layout import compose
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

ASKING = [name for name in list_tasks() if name != "perplexity_by_position"]
HIDING = ["single", "multi_key", "multi_value", "multi_query", "passkey"]
GROWING = ["kv_retrieval", "line_retrieval", "common_words", "frequent_words", "few_shot", "sentiment", "subject"]


@lru_cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, `<s>` in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: n for n, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@lru_cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word or mark, all unknown, and nothing in front."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


TOKENIZERS = [byte_tokenizer, word_tokenizer]


def count(tokenizer, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("length", [1111, 4096])
@pytest.mark.parametrize("name", list_tasks())
def test_prompts_are_as_long_as_asked_for(name, length, make):
    tokenizer = make()
    for sample in get_task(name).samples(tokenizer, length, 2, seed=3):
        tokens = count(tokenizer, sample.prompt)
        assert sample.meta["length"] == tokens
        longest = (
            "Text: Although the lecture was disappointing, the hotel was outstanding and I told all my friends to "
            "stay away. Sentiment: positive. "
        )
        unit = count(tokenizer, longest)
        assert length - max(16, unit) <= tokens <= length
        assert sample.meta["requested"] == length
        assert sample.meta["question_in_sparse_part"] is True


@pytest.mark.parametrize("name", ASKING)
def test_answers_stand_in_the_prompt(name):
    for sample in get_task(name).samples(byte_tokenizer(), 2048, 3):
        assert sample.answers
        for answer in sample.answers:
            body = sample.prompt[: sample.meta["question_at"]]
            assert answer in body
            assert answer not in sample.prompt[sample.meta["question_at"] :]
        assert len(set(sample.answers)) == len(sample.answers)


@pytest.mark.parametrize("name", list_tasks())
def test_samples_depend_on_the_seed_and_their_index_alone(name):
    task, tokenizer = get_task(name), byte_tokenizer()
    some = task.samples(tokenizer, 1111, 3, seed=5)
    assert task.samples(tokenizer, 1111, 2, seed=5) == some[:2]
    assert len({s.prompt for s in some}) == 3
    assert task.samples(tokenizer, 1111, 1, seed=6)[0].prompt != some[0].prompt


@pytest.mark.slow
def test_samples_are_the_same_in_another_process():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_tasks import byte_tokenizer, get_task;"
        "print(get_task('multi_key').samples(byte_tokenizer(), 1111, 1)[0].prompt)"
    )
    folder = __file__.rpartition("/")[0]
    told = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True).stdout
    assert told.strip() == get_task("multi_key").samples(byte_tokenizer(), 1111, 1)[0].prompt


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("name", HIDING)
def test_the_needle_gets_the_depth_asked_for(name, depth):
    tokenizer = byte_tokenizer()
    sample = get_task(name).samples(tokenizer, 4096, 1, depth=depth)[0]
    assert sample.meta["depth"] == pytest.approx(depth, abs=0.05)
    if len(sample.answers) == 1:
        body = sample.prompt[: sample.meta["question_at"]]
        assert body.find(sample.answers[0]) / len(body) == pytest.approx(depth, abs=0.06)


def test_depths_cover_the_haystack_evenly():
    for n in (5, 10, 40):
        depths = sorted(even_depth(0, i) for i in range(n))
        gaps = [b - a for a, b in zip([0.0, *depths], [*depths, 1.0], strict=True)]
        assert max(gaps) < 3 / n


@pytest.mark.parametrize("depth", [0.0, 1.0])
def test_a_pair_to_look_up_gets_its_depth(depth):
    sample = get_task("kv_retrieval").samples(byte_tokenizer(), 2048, 1, depth=depth)[0]
    lines = sample.prompt[: sample.meta["question_at"]].split("; ")
    assert sample.answers[0] in lines[0 if depth == 0.0 else -1]


def test_assignments_stay_in_order():
    for sample in get_task("variable_tracking").samples(byte_tokenizer(), 2048, 5, hops=3):
        known: dict[str, str] = {}
        for name, value in re.findall(r"Let (\w+) = (\w+)\.", sample.prompt):
            known[name] = known.get(value, value)
        asked = re.findall(r"What is (\w+)\?", sample.prompt)[0]
        assert known[asked] == sample.answers[0]
        assert len(known) == 8


def test_word_counts_decide_the_answers():
    for name, most in (("common_words", 5), ("frequent_words", 3)):
        for sample in get_task(name).samples(byte_tokenizer(), 2048, 2):
            body = sample.prompt[: sample.meta["question_at"]]
            counts = {w: len(re.findall(rf"\b{w}\b", body)) for w in set(re.findall(r"\w+", body))}
            ranked = sorted(counts, key=lambda w: -counts[w])
            assert set(ranked[:most]) == set(sample.answers)
            assert counts[ranked[most - 1]] > counts[ranked[most]]


def test_examples_carry_the_label_that_is_asked_for():
    for sample in get_task("few_shot").samples(byte_tokenizer(), 1111, 4):
        assert f"Topic: {sample.answers[0]}." in sample.prompt
        assert sample.prompt.endswith("Topic:")


def test_more_pairs_than_keys_are_made():
    task = pairs(get_task("kv_retrieval").rng(0, 0), 5000)
    assert len({f.split(":")[0] for f in task.facts}) == 5000


@pytest.mark.parametrize("name", GROWING)
def test_a_number_of_facts_leaves_room_for_a_haystack(name):
    task = get_task(name)
    option = {
        "kv_retrieval": "count",
        "line_retrieval": "count",
        "common_words": "rare",
        "frequent_words": "words",
        "few_shot": "shots",
        "sentiment": "shots",
        "subject": "shots",
    }[name]
    sample = task.samples(byte_tokenizer(), 4096, 1, **{option: 20})[0]
    assert sample.meta["haystack"] == "grammar"
    assert sample.meta["length"] > 4000
    assert len(sample.meta["depths"]) < 200


@pytest.mark.parametrize("name", ["single", "kv_retrieval", "few_shot"])
def test_the_question_can_stand_in_front_too(name):
    sample = get_task(name).samples(byte_tokenizer(), 2048, 1, question_place="both")[0]
    head, tail = sample.prompt.split("\n")[0], sample.prompt[sample.meta["question_at"] :]
    assert tail.startswith(head)
    assert sample.meta["question_place"] == "both"


@pytest.mark.parametrize(
    ("name", "right", "half", "wrong"),
    [
        ("single", " {0}.", None, " 1{0}."),
        ("multi_key", "{0}", None, "000000"),
        ("multi_value", " {0}, {1}, {2}, {3}.", " {0}, {1}.", "{0}x"),
        ("multi_query", " {0}. The secret code for a is {1}. b {2}, c {3}", "{3} {1}", ""),
        ("passkey", "the pass key is {0}", None, "{0}0"),
        ("kv_retrieval", " {0};", None, " 12\n{0}"),
        ("variable_tracking", " AB12 = CD34 = {0}.", None, " AB12 = 5"),
        ("common_words", "{4}, {3}, {2}, {1}, {0}", None, "none"),
        ("frequent_words", " {0}, {1} and {2}", None, "{0}{1}{2}"),
        ("few_shot", " {0}. Text:", None, " other. Text: x Topic: {0}."),
    ],
)
def test_scores(name, right, half, wrong):
    task = get_task(name)
    for sample in task.samples(byte_tokenizer(), 2048, 2):
        assert task.score(right.format(*sample.answers), sample) == 1.0
        assert task.score(right.format(*sample.answers).upper(), sample) == 1.0
        if half:
            assert task.score(half.format(*sample.answers), sample) == 0.5
        assert task.score(wrong.format(*sample.answers), sample) == 0.0


@pytest.mark.parametrize("name", ASKING)
def test_the_expected_answer_fits_into_the_new_tokens(name):
    task = get_task(name)
    sample = task.samples(byte_tokenizer(), 2048, 1)[0]
    told = ", ".join(sample.answers)
    if name == "multi_query":
        told = " ".join(f"The secret code for a long-blanket is {a}." for a in sample.answers)
    assert count(byte_tokenizer(), told) <= task.max_new_tokens
    assert task.score(told, sample) == 1.0


def test_clip_and_recall():
    assert clip("\n a b\nc", ("\n",)) == "a b"
    assert clip("abc", ()) == "abc"
    assert recall("12 345", ["12", "34"]) == 0.5
    assert recall("anything", []) == 0.0


def test_haystack_from_a_file(tmp_path):
    file = tmp_path / "hay.txt"
    file.write_text("Blue birds sing. Green frogs jump! Red foxes run? " * 3, encoding="utf-8")
    sample = get_task("single").samples(byte_tokenizer(), 1024, 1, haystack=str(file))[0]
    assert "Green frogs jump!" in sample.prompt
    assert sample.meta["haystack"] == str(file)


def test_haystack_from_a_data_set(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, split, streaming):
        asked.append((name, split, streaming))
        return iter([{"id": 1, "story": "Old ships sail far. Young crews sing loud."}] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    sample = get_task("single").samples(byte_tokenizer(), 1024, 1, haystack="hub:someone/stories:test:story")[0]
    assert "Young crews sing loud." in sample.prompt
    assert asked == [("someone/stories", "test", True)]


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("single", {"haystack": "nowhere.txt"}, "path of a UTF-8 text file"),
        ("single", {"depth": 1.5}, "between 0"),
        ("single", {"question_place": "middle"}, "not one of end, both"),
        ("single", {"distractors": 3}, "there is no option 'distractors'"),
        ("multi_key", {"distractors": 100_000}, "not a number from 0 to 2000"),
        ("multi_key", {"distractors": True}, "not a number"),
        ("multi_query", {"count": 0}, "cannot be made"),
        ("multi_key", {"distractors": 200}, "tokens are too few"),
        ("variable_tracking", {"depth": 0.5}, "leave out `depth`"),
    ],
)
def test_bad_options_are_told_in_a_sentence(name, options, part):
    with pytest.raises(EvaluationError, match=f"^{name}: .*{re.escape(part)}"):
        get_task(name).samples(byte_tokenizer(), 1024, 1, **options)


@pytest.mark.parametrize("name", GROWING)
def test_too_short_a_length_is_told(name):
    with pytest.raises(EvaluationError, match="raise the length"):
        get_task(name).samples(byte_tokenizer(), 30, 1)


def test_unknown_task():
    with pytest.raises(EvaluationError, match="did you mean 'multi_key'"):
        get_task("multikey")


def test_a_haystack_without_facts_is_prose():
    found = compose(byte_tokenizer(), [], [], iter(["One two three."] * 1000), 200)
    assert found.prompt.startswith("One two three. One two")
    assert found.depths == []


def test_every_task_has_its_yaml_with_the_same_limits():
    yaml = pytest.importorskip("yaml")

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    told = {}
    for file in LM_EVAL_FOLDER.glob("*.yaml"):
        config = yaml.load(file.read_text(encoding="utf-8"), Loader)
        if "dataset_kwargs" in config:
            told[config["dataset_kwargs"]["hfpatch_task"]] = config["generation_kwargs"]
    for name in ASKING:
        task = get_task(name)
        assert told[name]["max_gen_toks"] == task.max_new_tokens
        assert tuple(told[name]["until"]) == task.stop
