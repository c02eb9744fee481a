"""Prompts under lm-eval: open at the end whatever the tokenizer appends, and never without their beginning."""

import copy

import pytest
from test_open_prompts import CLOSED, with_template
from tiny_llama import tiny_model, tiny_tokenizer

from hfpatch import ConfigError

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from hfpatch.integrations.lm_eval import HFPatchLM

TEXTS = ["The badger near the old mill", "Nobody at the farm greets the", "In winter, every"]


def lm(template: str, **more) -> HFPatchLM:
    return HFPatchLM(tiny_model(), tokenizer=with_template(tiny_tokenizer(), template), batch_size=3, **more)


def answers(made: HFPatchLM) -> tuple[list, list[float]]:
    """What the model says after some texts, and how likely it finds others."""
    until = {"until": ["\n"], "max_gen_toks": 5}
    ask = [Instance("generate_until", {}, (t, dict(until)), n) for n, t in enumerate(TEXTS)]
    rate = [
        Instance("loglikelihood", {}, (t, told), n) for n, t in enumerate(TEXTS) for told in (" lantern", " a fox")
    ]
    roll = [Instance("loglikelihood_rolling", {}, (t,), n) for n, t in enumerate(TEXTS)]
    found = [made.generate_until(ask, True), made.loglikelihood(rate, True), made.loglikelihood_rolling(roll, True)]
    return [found[0], [x[1] for x in found[1]]], [*(x[0] for x in found[1]), *found[2]]


@pytest.mark.parametrize("template", CLOSED)
@pytest.mark.parametrize("more", [{}, {"add_bos_token": False}, {"max_length": 12}], ids=str)
def test_what_a_tokenizer_appends_changes_no_answer(template, more):
    told, likely = answers(lm(template, **more))
    assert (told, pytest.approx(likely, abs=1e-4)) == answers(lm(template.split("$A")[0] + "$A", **more))


def test_an_open_tokenizer_is_left_alone():
    made = lm("<s> $A")
    assert made.tok_encode("The otter</s>")[-1] == made.tokenizer.eos_token_id
    assert made.tok_encode("The otter") == made.tokenizer("The otter")["input_ids"]


@pytest.mark.parametrize(("length", "fits"), [(55, True), (56, False), (400, False)])
def test_our_prompts_are_refused_rather_than_cut(length, fits):
    made = lm("<s> $A", max_length=60)
    doc = {"meta": {"requested": length, "length": length}}
    ask = [
        Instance("generate_until", doc, (TEXTS[0], {"until": ["\n"], "max_gen_toks": 5}), 0, ("hfpatch_niah", 0, 1))
    ]
    rate = [Instance("loglikelihood", copy.deepcopy(doc), (TEXTS[0], " x"), 0, ("hfpatch_perplexity", 0, 1))]
    if fits:
        assert made.generate_until(ask, True) and made.loglikelihood(rate, True)
        return
    with pytest.raises(
        ConfigError, match=f"hfpatch_niah: a prompt of {length} tokens and 5 for the answer do not fit"
    ):
        made.generate_until(ask, True)
    if length > 61:
        with pytest.raises(
            ConfigError, match=f"hfpatch_perplexity: a prompt of {length} tokens does not fit into the 60"
        ):
            made.loglikelihood(rate, True)


def test_prompts_of_other_tasks_are_cut_as_lm_eval_does():
    made = lm("<s> $A", max_length=12)
    ask = [Instance("generate_until", {"meta": 3}, (" ".join(TEXTS), {"until": ["\n"], "max_gen_toks": 5}), 0)]
    assert len(made.generate_until(ask, True)) == 1
