"""A short training run, started once or twice by the test of several processes; writes the routers it reached."""

import os
import sys
from pathlib import Path

import zoo
from safetensors.torch import save_file

from hfpatch.calibrate.flux.examples import Example
from hfpatch.calibrate.flux.training import Recipe, Trainer
from hfpatch.methods.flux import FluxConfig

if __name__ == "__main__":
    out = Path(sys.argv[1])
    model = zoo.SUPPORTED["llama"].build()
    config = FluxConfig(router="learned", pool=8, sparse_settings={"sink": 1, "window": 4})
    examples = [Example(zoo.prompt(model, 1, 33, seed=n)[0], 20, "holistic") for n in range(6)]
    recipe = Recipe({"holistic": 1.0}, steps=4, batch=4, rate=1e-2, multiplier_rate=0.1)
    result = Trainer(model, config, examples, recipe, out / "run").run(resume=False)
    if os.environ.get("RANK", "0") == "0":
        save_file(result.tensors, out / f"{os.environ['WORLD_SIZE']}.safetensors")
