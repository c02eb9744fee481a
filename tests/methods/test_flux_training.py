"""Training of Flux's routers: the constraint pulls to its target, both branches mix, runs resume."""

from pathlib import Path

import pytest
import torch
import zoo

from hfpatch import ConfigError, patched
from hfpatch.flux.ranking import matrix_entropy, rank_layers
from hfpatch.flux.training import Constraint, Example, Recipe, Trainer
from hfpatch.methods.flux import FluxConfig

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
        model(zoo.prompt(model, 2, 33))
        assert patch.methods[0].sparse_share() > 0.5  # type: ignore[attr-defined]


def test_a_stopped_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    def trainer(folder: str) -> Trainer:
        recipe = Recipe({"holistic": 1.0}, steps=6, batch=1, save_every=3)
        return Trainer(zoo.SUPPORTED["llama"].build(), CONFIG, examples(), recipe, tmp_path / folder)

    class Stop(Exception):
        pass

    count = 0

    def stop() -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise Stop

    broken = trainer("a")
    with pytest.raises(Stop):
        broken.run(stop)
    resumed = trainer("a")
    resumed.run()
    assert [h["step"] for h in resumed.history] == [0, 1, 2, 3, 4, 5]
    other = trainer("a")
    other.recipe.__dict__["steps"] = 7
    with pytest.raises(ConfigError, match="other settings"):
        other.run()


def test_kinds_without_a_target_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no target sparsity"):
        Trainer(zoo.SUPPORTED["llama"].build(), CONFIG, examples(kind="odd"), Recipe(), tmp_path)


def test_rankings_equal_direct_sums() -> None:
    model = zoo.SUPPORTED["llama"].build()
    texts = [e.ids for e in examples(2)]
    scores = rank_layers(model, texts, CONFIG, by="entropy")
    hidden: dict[int, list[float]] = {n: [] for n in range(3)}
    for ids in texts:
        with torch.no_grad():
            out = model(ids[None], output_hidden_states=True)
        for n, layer in enumerate(model.model.layers):
            normed = layer.input_layernorm(out.hidden_states[n])[0].detach()
            hidden[n].append(float(matrix_entropy(normed)))
    assert torch.allclose(scores, torch.tensor([sum(v) / 2 for v in hidden.values()]), rtol=1e-4)
    wide = FluxConfig(router="learned", sparse_settings={"window": 1 << 20})
    assert torch.allclose(rank_layers(model, texts, wide), torch.zeros(3), atol=1e-5)
    assert (rank_layers(model, texts, CONFIG) > 0.01).all()


def test_matrix_entropy_of_known_spectra() -> None:
    eye = torch.cat([torch.eye(8), -torch.eye(8)])
    assert float(matrix_entropy(eye)) == pytest.approx(torch.log(torch.tensor(8.0)).item(), abs=1e-4)
    line = torch.outer(torch.linspace(-1, 1, 9), torch.ones(8))
    assert float(matrix_entropy(line)) == pytest.approx(0.0, abs=1e-3)
