"""Training of Flux's routers: the constraint pulls to its target, both branches mix, runs resume."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from hfpatch.evals.testbed import load
from safetensors.torch import load_file, save_file

from hfpatch import ConfigError, PatchConfig, cli, patched
from hfpatch.api import patched_with
from hfpatch.calibrate.flux.examples import Example, built_in_examples, read_examples
from hfpatch.calibrate.flux.ranking import matrix_entropy, rank_layers
from hfpatch.calibrate.flux.training import Constraint, Recipe, Trainer
from hfpatch.errors import InputError
from hfpatch.methods.flux import FluxConfig
from hfpatch.methods.flux.published import convert_routers, projection_difference, read_published
from hfpatch.methods.flux.router import Router, Routers

CONFIG = FluxConfig(router="learned", pool=8, sparse_settings={"sink": 1, "window": 4})


def examples(count: int = 6, kind: str = "holistic") -> list[Example]:
    model = zoo.SUPPORTED["llama"].build()
    return [Example(zoo.prompt(model, 1, 33, seed=n)[0], 20, kind) for n in range(count)]


@pytest.mark.parametrize("sparsity,sign", [(0.2, -1), (0.9, 1)])
def test_constraint_pulls_to_the_target_from_both_sides(sparsity: float, sign: int) -> None:
    constraint = Constraint({"retrieval": 0.5})
    for _ in range(3):
        s = torch.tensor(sparsity, requires_grad=True)
        constraint(s, "retrieval").backward()
        assert s.grad is not None and torch.sign(s.grad) == sign
        constraint.climb(0.1)
    assert torch.sign(constraint.linear["retrieval"]) == sign


def test_routers_learn_to_go_sparse_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = zoo.SUPPORTED["llama"].build()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    recipe = Recipe({"holistic": 1.0}, steps=30, batch=2, rate=2e-2, multiplier_rate=0.5)
    trainer = Trainer(model, CONFIG, examples(), recipe, tmp_path)
    result = trainer.run()
    first, last = trainer.history[0]["holistic"], trainer.history[-1]["holistic"]
    assert first < 0.2 < 0.6 < last
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    with patched(model, result) as patch:
        for e in examples():
            model(e.ids[None, : e.predict_from])
        assert patch.methods[0].sparse_share() > 0.5  # type: ignore[attr-defined]


def test_a_stopped_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    def trainer(folder: str) -> Trainer:
        recipe = Recipe({"holistic": 1.0}, steps=6, batch=1, rate=1e-2, save_every=3)
        model = zoo.SUPPORTED["llama"].build()
        return Trainer(model, CONFIG, examples(), recipe, tmp_path / folder, examples(2))

    class Stop(Exception):
        pass

    count = 0

    def stop() -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise Stop

    with pytest.raises(Stop):
        trainer("a").run(stop)
    resumed, whole = trainer("a"), trainer("b")
    got, want = resumed.run(), whole.run()
    assert resumed.history == whole.history and resumed.checks == whole.checks
    assert [h["step"] for h in resumed.history] == [0, 1, 2, 3, 4, 5]
    assert [c["step"] for c in resumed.checks] == [3, 6]
    assert all(torch.equal(t, want.tensors[k]) for k, t in got.tensors.items())
    other = trainer("a")
    other.recipe.__dict__["steps"] = 7
    with pytest.raises(ConfigError, match="other settings"):
        other.run()


def test_routers_read_the_prompt_alone(tmp_path: Path) -> None:
    model = zoo.SUPPORTED["llama"].build()
    trainer = Trainer(model, CONFIG, examples(), Recipe({"holistic": 1.0}), tmp_path)
    for p in trainer.routers.parameters():
        torch.nn.init.normal_(p, std=0.2)
    example = examples(1)[0]
    changed = Example(example.ids.clone(), example.predict_from, example.kind)
    changed.ids[example.predict_from :] = 9
    with torch.no_grad(), patched_with(model, [trainer.soft]):
        trainer.soft.noise = torch.Generator()
        shares = []
        for e in (example, changed, Example(changed.ids, 33, "holistic")):
            trainer.soft.noise.manual_seed(0)
            shares.append(float(trainer._one(e)[1]))
    assert shares[0] == shares[1] != shares[2]


def test_folded_routers_decide_as_the_standardised_ones(tmp_path: Path) -> None:
    model = zoo.SUPPORTED["llama"].build()
    trainer = Trainer(model, CONFIG, examples(), Recipe({"holistic": 1.0}, steps=2, rate=1e-2), tmp_path)
    result = trainer.run()
    x = torch.randn(5, 16)
    for n, (mean, scale) in trainer.soft.standard.items():
        assert (scale > 0).all() and mean.norm() > 0
        routers = Routers.from_tensors({k[2:]: t for k, t in result.tensors.items()})
        assert torch.allclose(routers[n](x * scale + mean), trainer.routers[n](x), atol=1e-4)


def test_each_kind_gets_its_share_of_every_batch(tmp_path: Path) -> None:
    some = examples(5) + examples(1, "retrieval")
    trainer = Trainer(zoo.SUPPORTED["llama"].build(), CONFIG, some, Recipe(steps=3, batch=2), tmp_path)
    trainer.run()
    assert all({"retrieval", "holistic"} <= set(h) for h in trainer.history)


def test_built_in_examples_cover_both_kinds_and_keep_their_facts() -> None:
    _, tokenizer = load()
    found = built_in_examples(tokenizer, 8, 300)
    assert [e.kind for e in found] == ["retrieval", "holistic"] * 4
    assert all(150 < len(e.ids) <= 300 and 0 < e.predict_from < len(e.ids) for e in found)
    for e in found[::2]:
        answer = tokenizer.decode(e.ids[e.predict_from :]).strip(" .;")
        assert answer in tokenizer.decode(e.ids[: e.predict_from])


def test_examples_are_read_and_bad_lines_named(tmp_path: Path) -> None:
    _, tokenizer = load()
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "one two", "answer": " three", "kind": "holistic"}\n')
    (only,) = read_examples(file, tokenizer, 99)
    assert tokenizer.decode(only.ids[only.predict_from :]) == " three" and only.kind == "holistic"
    file.write_text('{"prompt": "one two", "kind": "holistic"}\n')
    with pytest.raises(ConfigError, match="line 1: expected prompt, answer and kind"):
        list(read_examples(file, tokenizer, 99))


@pytest.mark.slow
def test_two_processes_reach_the_weights_of_one(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("flux_processes.py")), str(tmp_path)]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(zoo.__file__).parent), *sys.path])
    two = [subprocess.Popen(command, env={**env, "RANK": str(n), "WORLD_SIZE": "2"}) for n in range(2)]
    assert [p.wait(timeout=120) for p in two] == [0, 0]
    assert subprocess.run(command, env={**env, "WORLD_SIZE": "1"}).returncode == 0
    one, both = (load_file(tmp_path / f"{n}.safetensors") for n in (1, 2))
    off = {k: float((t - both[k]).norm() / t.norm().clamp_min(1e-3)) for k, t in one.items()}
    assert max(off.values()) < 1e-3, off


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def published(dim: int = 16, layers: int = 3) -> dict[str, torch.Tensor]:
    """Tensors named as the paper's code names them."""
    torch.manual_seed(0)
    parts = {"encoder": "cls_feat_extractor", "head": "cls_router_head_agnostic"}
    return {
        f"model.layers.{n}.self_attn.mask_allocator.{parts[part]}.{rest}": torch.randn_like(p)
        for n in range(layers)
        for part, rest, p in ((*name.split(".", 1), p) for name, p in Router(dim).named_parameters())
    }


def test_published_names_become_routers_that_run(tmp_path: Path) -> None:
    model = zoo.SUPPORTED["llama"].build()
    tensors = published()
    projection = "model.layers.0.self_attn.q_proj.weight"
    weight = model.get_parameter(projection).detach()
    save_file({**tensors, projection: weight * 1.5, "model.norm.weight": torch.ones(4)}, tmp_path / "m.safetensors")
    found = read_published(tmp_path)
    name = "model.layers.2.self_attn.mask_allocator.cls_router_head_agnostic.4.bias"
    assert torch.equal(found["layer.2.head.4.bias"], tensors[name]) and len(found) == 3 * 10
    assert projection_difference(tmp_path, model) == pytest.approx(0.5, rel=1e-5)
    with patched(model, PatchConfig([CONFIG], tensors={f"0.{k}": t for k, t in found.items()})) as patch:
        model(zoo.prompt(model, 2, 33))
        assert "flux routed" in str(patch.report())


def test_published_routers_of_another_form_are_refused() -> None:
    with pytest.raises(InputError, match="No router"):
        convert_routers({"model.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)})
    tensors = published()
    one_logit = {k: t[:1] if ".4." in k else t for k, t in tensors.items()}
    small = {k: t[:64] if "extractor.0" in k else t for k, t in tensors.items()}
    missing = dict(list(tensors.items())[1:])
    for odd in (one_logit, small, missing):
        with pytest.raises(InputError, match="another form"):
            convert_routers(odd)


def test_kinds_without_a_target_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no target sparsity"):
        Trainer(zoo.SUPPORTED["llama"].build(), CONFIG, examples(kind="odd"), Recipe(), tmp_path)


def test_rankings_equal_direct_sums() -> None:
    model = zoo.SUPPORTED["llama"].build()
    texts = examples(2)
    scores = rank_layers(model, texts, CONFIG, by="entropy")
    hidden: dict[int, list[float]] = {n: [] for n in range(3)}
    for e in texts:
        with torch.no_grad():
            out = model(e.ids[None], output_hidden_states=True)
        for n, layer in enumerate(model.model.layers):
            normed = layer.input_layernorm(out.hidden_states[n])[0].detach()
            hidden[n].append(float(matrix_entropy(normed)))
    assert torch.allclose(scores, torch.tensor([sum(v) / 2 for v in hidden.values()]), rtol=1e-4)
    wide = FluxConfig(router="learned", sparse_settings={"window": 1 << 20})
    for by in ("error", "audit"):
        assert torch.allclose(rank_layers(model, texts, wide, by=by), torch.zeros(3), atol=1e-5)
        assert (rank_layers(model, texts, CONFIG, by=by) > 0.01).all()


def test_the_ranking_by_audit_is_the_mass_outside_the_branch() -> None:
    model = zoo.SUPPORTED["llama"].build()
    texts = [
        Example(e.ids[:16], 9, e.kind) for e in examples(2)
    ]  # as many tokens as an audit looks at: none is left to chance
    scores = rank_layers(model, texts, CONFIG, by="audit")
    model.set_attn_implementation("eager")
    far = torch.ones(16, 16).tril(-4)  # window 4
    far[:, 0] = 0  # sink 1
    lost = torch.zeros(3)
    for e in texts:
        with torch.no_grad():
            weights = model(e.ids[None], output_attentions=True).attentions
        lost += torch.stack([(w[0] * far).sum(-1).mean() for w in weights]) / 2
    assert torch.allclose(scores, lost, atol=1e-5) and (lost > 0.01).all()


def test_the_ranking_by_answer_reads_the_answer_s_queries_alone() -> None:
    model = zoo.SUPPORTED["llama"].build()
    (example,) = examples(1, "retrieval")
    every = Example(example.ids, 1, "retrieval")  # all but the last query, and the first four miss nothing
    inside = Example(example.ids[:8], 4, "retrieval")  # these see all that is before them
    window = FluxConfig(router="learned", sparse_settings={"sink": 1, "window": 8})
    scores = {e.predict_from: rank_layers(model, [e], CONFIG, by="answer") for e in (every, example)}
    assert (scores[example.predict_from] > scores[1]).all()
    assert torch.allclose(rank_layers(model, [inside], window, by="answer"), torch.zeros(3), atol=1e-5)
    holistic = Example(example.ids, 20, "holistic")
    mixed = rank_layers(model, [example, holistic], CONFIG, by="answer")
    assert torch.equal(mixed, scores[example.predict_from])
    with pytest.raises(ConfigError, match="retrieval"):
        rank_layers(model, [holistic], CONFIG, by="answer")


def test_matrix_entropy_of_known_spectra() -> None:
    eye = torch.cat([torch.eye(8), -torch.eye(8)])
    assert float(matrix_entropy(eye)) == pytest.approx(torch.log(torch.tensor(8.0)).item(), abs=1e-4)
    line = torch.outer(torch.linspace(-1, 1, 9), torch.ones(8))
    assert float(matrix_entropy(line)) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("router", ["learned", "error", "audit", "answer"])
def test_the_command_writes_what_patches_the_model(
    router: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "calibrate flux embedded --steps 2 --batch 2 --examples 4 --checks 2 --length 120 --target-sparsity 0.5"
    sizes = '{"sink": 1, "window": 16}'
    options = ["--out", str(tmp_path), "--router", router, "--sparse-settings", sizes, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["hfpatch", *words.split(), *options])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code in (0, None) and "written to" in capsys.readouterr().out
    model, _ = load()
    with patched(model, PatchConfig.from_pretrained(tmp_path)) as patch, torch.no_grad():
        model(torch.arange(10, 90)[None])
        assert patch.methods[0].sparse_share() == (0.0 if router == "learned" else 0.5)  # type: ignore[attr-defined]
