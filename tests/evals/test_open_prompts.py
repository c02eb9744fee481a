"""Prompts to be continued end where the answer begins, and leave room for it in the model's positions."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from hfpatch.evals.errors import EvaluationError
from hfpatch.evals.jobs.memory import _measure
from hfpatch.evals.jobs.niah import NiahJob
from hfpatch.evals.jobs.perplexity import PerplexityJob
from hfpatch.evals.jobs.reader import ReaderJob
from hfpatch.evals.jobs.task import TaskJob
from hfpatch.evals.run.cells import Cell, Session
from hfpatch.evals.run.estimate import measure_speed
from hfpatch.evals.run.generation import complete, text_ids
from hfpatch.evals.run.models import Loaded, check_length
from hfpatch.evals.run.variants import Variant, parse_variants
from hfpatch.evals.tasks import PerplexityByPosition
from hfpatch.evals.tasks.layout import count_tokens
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, LlamaConfig, OPTConfig

from hfpatch import patched
from hfpatch.calibrate.classification import Example, Questions
from hfpatch.calibrate.flux.examples import built_in_example
from hfpatch.errors import InputError
from hfpatch.methods.infiniretri.prompt import make_prompt
from hfpatch.runtime.positions import position_table
from hfpatch.text.prompt_ids import prompt_ids, special_around

CLOSED = ["$A </s>", "<s> $A </s>", "<s> $A <pad>", "$A <pad> </s>", "<pad> <s> $A </s> </s>"]
OPEN = ["$A", "<s> $A"]


def with_template(tokenizer, template: str):
    """The tokenizer with other special tokens around every text."""
    made = copy.deepcopy(tokenizer)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>", "<pad>")]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return made


class Stub:
    """Answers nothing and keeps the prompts it gets."""

    def __init__(self, tokenizer) -> None:
        self.config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096)
        self.device, self.prompts = torch.device("cpu"), []

    def generate(self, ids, **more):
        self.prompts += ids.tolist()
        return torch.cat([ids, ids[:, :1]], 1)


def session(model, tokenizer, variants=None) -> Session:
    made = Session("tiny", variants or [Variant("dense")])
    made.loaded = Loaded("tiny", model, tokenizer)
    return made


@pytest.mark.parametrize("template", [*CLOSED, *OPEN])
def test_special_tokens_stay_in_front_and_go_at_the_end(template, tokenizer):
    made = with_template(tokenizer, template)
    front = made.convert_tokens_to_ids(template.split("$A")[0].split())
    end = made.convert_tokens_to_ids(template.split("$A")[1].split())
    assert special_around(made) == (front, end)
    for text in ("The otter", "第三天", "", "</s>"):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert prompt_ids(made, text) == front + plain and count_tokens(made, text) == len(front + plain)


@pytest.mark.parametrize("template", CLOSED)
@pytest.mark.parametrize(
    "job", [NiahJob([200], [50], 1, nll=False), TaskJob("passkey", [200], 1, nll=False), ReaderJob([200], [50])]
)
def test_generating_jobs_ask_open_questions(job, template, tokenizer):
    made = with_template(tokenizer, template)
    stub = Stub(made)
    job.run(Cell(job.label, "dense", 200), session(stub, made))
    assert len(stub.prompts) == 1
    assert made.decode(stub.prompts[0][-1:]) in (" is", "is")


@pytest.mark.parametrize("template", CLOSED)
def test_likelihoods_are_those_of_the_text_alone(template, tokenizer, model):
    made, plain = with_template(tokenizer, template), with_template(tokenizer, template.split("$A")[0] + "$A")
    found = []
    for chosen in (made, plain):
        samples = PerplexityByPosition().samples(chosen, 200, 1)
        found.append((samples, PerplexityByPosition().measure(model, chosen, samples, 2)))
    assert found[0] == found[1]
    assert torch.equal(*(text_ids(Loaded("x", model, chosen), 64) for chosen in (made, plain)))


@pytest.mark.parametrize("template", CLOSED)
def test_methods_ask_open_questions_too(template, tokenizer):
    made = with_template(tokenizer, template)
    front, end = special_around(made)
    prompt = make_prompt(made, "{context}\n{question}", "What is it?", None)
    assert prompt.head[: len(front)] == front and prompt.ids([])[-1] not in end
    asked = Questions(made, [Example("Topic:", (" animal",), " animal")])
    assert asked.groups[0].batches[0].ids[0, -1] not in end
    example = built_in_example(made, "single", 200, random.Random(0))
    assert not set(end) & set(example.ids[len(front) :].tolist())


SHAPE = {"vocab_size": 1500, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
TABLES = {
    "gpt2": GPT2Config(n_positions=96, n_embd=16, n_layer=1, n_head=2, **SHAPE),
    "opt": OPTConfig(
        hidden_size=16, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2, max_position_embeddings=96,
        word_embed_proj_dim=16, **SHAPE,
    ),
    "gptj": GPTJConfig(n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=96, **SHAPE),
}  # fmt: skip
COMPUTED = LlamaConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=96,
    **SHAPE,
)


def small(config):
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(params=TABLES)
def table_model(request):
    return small(TABLES[request.param])


def test_a_table_of_positions_is_used_to_its_end_and_no_further(table_model, tokenizer):
    assert position_table(table_model) == 96
    prompt = tokenizer.decode(range(300, 390))
    size = count_tokens(tokenizer, prompt)
    table_model.generation_config.eos_token_id = None
    assert complete(table_model, tokenizer, [prompt], 96 - size + 1)
    with pytest.raises(
        EvaluationError, match=f"table of 96 positions; {size} tokens and {96 - size + 2} for the answer"
    ):
        complete(table_model, tokenizer, [prompt], 96 - size + 2)


def test_generating_jobs_refuse_a_length_that_leaves_no_room(table_model, tokenizer):
    beyond = ReaderJob([120], [0], at_most={"dense": 120})
    for job in (NiahJob([96], [0], 1), TaskJob("passkey", [96], 1), ReaderJob([96], [0]), beyond):
        name = type(table_model).__name__ if job.kind == "reader" else "tiny"  # the others know before they ask
        with pytest.raises(EvaluationError, match=f"^{name} has .* for the answer are too many, ask for"):
            job.run(Cell(job.label, "dense", job.lengths[0]), session(table_model, tokenizer))
    loaded = Loaded("tiny", table_model, tokenizer)
    with pytest.raises(EvaluationError, match="table of 96 positions"):
        _measure(loaded, Variant("dense"), 96, 4, 0)
    PerplexityJob([96], 1).run(Cell("perplexity", "dense", 96), session(table_model, tokenizer))
    check_length(loaded, 87, 10)
    with pytest.raises(EvaluationError, match="ask for 87 at most"):
        check_length(loaded, 88, 10)


def test_an_estimate_keeps_to_the_table(tokenizer):
    assert measure_speed(session(small(TABLES["gpt2"]), tokenizer)).token >= 0


def test_computed_positions_may_be_exceeded_by_the_answer_alone(tokenizer):
    model = small(COMPUTED)
    assert position_table(model) is None
    NiahJob([96], [0], 1).run(Cell("niah", "dense", 96), session(model, tokenizer))
    ReaderJob([120], [0], at_most={"dense": 120}).run(Cell("reader", "dense", 120), session(model, tokenizer))
    with pytest.raises(EvaluationError, match="positions for 96 tokens; 97 are too many"):
        NiahJob([97], [0], 1).run(Cell("niah", "dense", 97), session(model, tokenizer))


def test_tables_of_other_parts_of_a_model_do_not_count():
    model = torch.nn.Module()
    model.vision = torch.nn.ModuleDict({"position_embedding": torch.nn.Embedding(64, 4)})
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=4096))
    assert position_table(model) is None


def test_a_reader_keeps_to_the_table(tokenizer):
    model = small(GPT2Config(n_positions=256, n_embd=16, n_layer=2, n_head=2, **SHAPE))
    said = "The otter sleeps. Nobody knows the lamp near the river. " * 40
    with patched(model, "infiniretri", chunk_tokens=100) as patch:
        found = patch.retrieve(said, "What is it?", tokenizer=tokenizer, progress=False)
        assert patch.answer(found, tokenizer=tokenizer, max_new_tokens=5, do_sample=False)
        with pytest.raises(InputError, match="do not fit into the model's 256 positions"):
            patch.answer(found, tokenizer=tokenizer, max_new_tokens=256, do_sample=False)
    with (
        patched(model, "infiniretri", chunk_tokens=512, mode="faithful") as patch,
        pytest.raises(InputError, match="lower chunk_tokens"),
    ):
        patch.retrieve(said, "What is it?", tokenizer=tokenizer, progress=False)


def test_a_patch_changes_nothing_about_room(table_model, tokenizer):
    made = session(table_model, tokenizer, parse_variants(["streaming:window=16"]))
    with pytest.raises(EvaluationError, match="ask for"):
        NiahJob([96], [0], 1).run(Cell("niah", "streaming:window=16", 96), made)
