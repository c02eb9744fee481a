"""lm-eval's caches on patched models: whatever changes an answer or a request makes it another entry."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hfpatch.evals.tasks import LM_EVAL_FOLDER
from tiny_llama import tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM

from hfpatch import ConfigError, PatchConfig, patch_model, unpatch_model
from hfpatch.config.registry import make_config

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import CachingLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from hfpatch.integrations.lm_eval import HFPatchLM  # noqa: E402
from hfpatch.integrations.lm_eval_model import resolve_patch  # noqa: E402
from hfpatch.integrations.merged_report import merge_reports  # noqa: E402
from hfpatch.integrations.response_cache import ResponseKey, keep_apart, tensors_digest  # noqa: E402

REQUEST = Instance("generate_until", {}, ("The badger near the old mill", {"until": ["\n"], "max_gen_toks": 4}), 0)


def lm(model=None, tokenizer=None, **more) -> HFPatchLM:
    return HFPatchLM(copy.deepcopy(model or tiny_model()), tokenizer=tokenizer or tiny_tokenizer(), **more)


def asked(made: HFPatchLM, cache) -> bool:
    """Whether the model was asked, rather than the cache."""
    calls = []
    inner = made.generate_until
    made.generate_until = lambda requests, **more: calls.append(requests) or inner(requests, disable_tqdm=True)
    CachingLM(made, str(cache / "responses.db")).generate_until([REQUEST])
    made.generate_until = inner
    return bool(calls)


def saved(folder, name="streaming", settings=None, tensors=None):
    """The folder of a saved patch."""
    PatchConfig([make_config(name, settings or {})], tensors=tensors or {}).save_pretrained(folder)
    return str(folder)


PATCHES = [
    {}, {"patch": "streaming"}, {"patch": "streaming", "patch_window": 8}, {"patch": "streaming", "patch_window": 9},
    {"patch": "streaming", "patch_window": 8, "patch_layers": 1}, {"patch": "dense"}, {"patch": "quest"},
    {"patch": "dense+streaming", "patch_window": 8}, {"patch": "streaming+dense", "patch_window": 8},
]  # fmt: skip


def test_every_patch_has_responses_of_its_own_and_finds_them_again(tmp_path):
    assert [asked(lm(**arguments), tmp_path) for arguments in PATCHES] == [True] * len(PATCHES)
    assert [asked(lm(**arguments), tmp_path) for arguments in PATCHES] == [False] * len(PATCHES)


def test_a_saved_patch_counts_by_its_content(tmp_path):
    first = saved(tmp_path / "a", settings={"window": 8})
    assert asked(lm(patch=first), tmp_path)
    assert not asked(lm(patch=saved(tmp_path / "b", settings={"window": 8})), tmp_path)
    assert not asked(lm(patch="streaming", patch_window=8), tmp_path)
    assert asked(lm(patch=saved(tmp_path / "a", settings={"window": 9})), tmp_path)


def test_learned_tensors_count(tmp_path):
    ones = torch.ones(2, 4)
    folders = [saved(tmp_path / str(n), "head_scale", tensors={"0.scale": n * ones}) for n in (1, 2)]
    assert [asked(lm(patch=folder), tmp_path) for folder in (*folders, *folders)] == [True, True, False, False]
    assert not asked(lm(patch=saved(tmp_path / "copy", "head_scale", tensors={"0.scale": ones})), tmp_path)


def other_weights():
    model = copy.deepcopy(tiny_model())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    return model


def rounded():
    return copy.deepcopy(tiny_model()).bfloat16()


def with_config(**settings):
    model = copy.deepcopy(tiny_model())
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


def other_generation():
    model = copy.deepcopy(tiny_model())
    model.generation_config.repetition_penalty = 1.3
    return model


def other_tokenizer():
    made = copy.deepcopy(tiny_tokenizer())
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 2)])
    return made


@pytest.mark.parametrize(
    "changed",
    [
        lambda: lm(other_weights()), lambda: lm(with_config(rms_norm_eps=1e-3)), lambda: lm(other_generation()),
        lambda: lm(rounded().float()), lambda: lm(rounded()),
        lambda: lm(tokenizer=other_tokenizer()), lambda: lm(max_length=64), lambda: lm(truncation=True),
        lambda: lm(add_bos_token=False), lambda: lm(strict=True),
    ],
    ids=["weights", "config", "generation", "rounded", "dtype", "tokenizer", "length", "truncation", "bos", "strict"],
)  # fmt: skip
def test_every_change_to_the_model_counts(changed, tmp_path):
    assert asked(lm(), tmp_path)
    assert asked(changed(), tmp_path)
    assert not asked(lm(), tmp_path)
    assert not asked(lm(with_config(_name_or_path="elsewhere"), batch_size=7), tmp_path)


def test_a_version_of_hfpatch_counts(tmp_path, monkeypatch):
    assert asked(lm(), tmp_path)
    monkeypatch.setattr("hfpatch.integrations.response_cache.__version__", "99")
    assert asked(lm(), tmp_path)


def test_a_patch_put_on_later_counts_at_once(tmp_path):
    made = lm()
    cached = CachingLM(made, str(tmp_path / "responses.db"))
    told = [cached.generate_until([REQUEST])]
    for settings in ({"window": 1, "sink": 0}, {"window": 2, "sink": 0}):
        patch_model(made.model, "streaming", **settings)
        told.append(cached.generate_until([REQUEST]))
        unpatch_model(made.model)
    told.append(cached.generate_until([REQUEST]))
    assert told[0] == told[3] and len(cached.dbdict) == 3


def test_keys_of_parts_and_of_tensors_without_content():
    twin = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    a, b = torch.zeros(2), torch.ones(2)
    assert tensors_digest({"x": twin(a, a.clone())}) != tensors_digest({"x": twin(a, b)})
    assert tensors_digest({"x": torch.empty(2, device="meta")}) != tensors_digest({"x": torch.empty(3, device="meta")})
    assert tensors_digest({"x": torch.tensor(1.0)}) != tensors_digest({"y": torch.tensor(1.0)})
    with torch.device("meta"):
        empty = LlamaForCausalLM(tiny_model().config)
    keys = [ResponseKey(SimpleNamespace(model=empty, tokenizer=tiny_tokenizer(), pretrained=x), False) for x in "aba"]
    assert keys[0].of(None, "x") == keys[2].of(None, "x") != keys[1].of(None, "x")
    with pytest.raises(ConfigError, match="needs sqlitedict 2"):
        keep_apart(object(), str)


def run(folder, tmp_path, length=256, cache=True, **more):
    """Results of one task of ours, with lm-eval's caches in `tmp_path`."""
    metadata = {"tokenizer": folder, "length": length, "samples": 2}
    manager = TaskManager(include_path=[str(LM_EVAL_FOLDER)], include_defaults=False, metadata=metadata)
    return lm_eval.simple_evaluate(
        model="hfpatch", model_args={"pretrained": folder, "device": "cpu", **more}, tasks=["hfpatch_passkey"],
        task_manager=manager, use_cache=str(tmp_path / "responses") if cache else None, bootstrap_iters=0,
        cache_requests=cache,
    )  # fmt: skip


def told(results) -> list:
    return [s["filtered_resps"] for s in results["samples"]["hfpatch_passkey"]]


def test_one_cache_file_serves_dense_and_patched_runs(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "requests"))
    patch = {"patch": "streaming", "patch_window": 4, "patch_sink": 0}
    right = told(run(folder, tmp_path, cache=False, **patch))
    dense = told(run(folder, tmp_path))
    assert dense != right
    assert told(run(folder, tmp_path, **patch)) == right


def test_cached_requests_are_those_of_the_documents_at_hand(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "requests"))
    sizes = []
    for length in (256, 400):
        samples = run(folder, tmp_path, length)["samples"]["hfpatch_passkey"]
        sizes.append([len(s["arguments"][0][0]) for s in samples])
        assert [s["doc"]["prompt"] for s in samples] == [s["arguments"][0][0] for s in samples]
    assert min(sizes[1]) > max(sizes[0])
    assert len(list((tmp_path / "requests").iterdir())) == 2


def test_reports_without_calls_have_no_density():
    made = lm(**PATCHES[1])
    assert merge_reports([made.patch.report().to_dict()])["density"] is None
    assert resolve_patch("none", {}) is None
