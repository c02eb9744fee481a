"""lm-eval's own command, with patched models and our tasks known to it."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ..errors import ConfigError, HfpatchError
from ..files.output import writable
from .lm_eval_model import EMBEDDED, HFPatchLM, location

__all__ = ["HFPatchLM", "main", "run_lm_eval"]


def run_lm_eval(argv: Sequence[str]) -> int:
    """Run lm-eval's own command with `argv`; the model is `hfpatch` unless named, our tasks are known to it.

    Returns the exit code. Raises HfpatchError.
    """
    try:
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging
    except ImportError as error:
        raise ConfigError("This needs lm-eval 0.4.10 or newer; run `pip install -U 'lm-eval>=0.4.10'`.") from error
    setup_logging()
    HFPatchLM.last_report, before = None, sys.argv
    sys.argv = ["lm-eval", *argv]
    try:
        cli = HarnessCLI()
        args = cli.parse_args()
        _add_ours(args)
        with _results(args):
            cli.execute(args)
        if HFPatchLM.last_report is not None:
            print(HFPatchLM.last_report)
    except ValueError as error:
        if str(error).startswith("Tasks not found"):
            raise ConfigError(f"{error}; `ls tasks` in place of the options lists those there are.") from error
        raise
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    return 0


def _results(args: Any) -> AbstractContextManager[None]:
    """The folder lm-eval writes to, which it tries only when all is done."""
    asked = getattr(args, "output_path", None)
    if not asked:
        return nullcontext()
    path = Path(asked)
    return writable(path.parent if path.suffix == ".json" else path)


def _add_ours(args: Any) -> None:
    """Put our model, our tasks and the embedded model's tokenizer into lm-eval's parsed arguments."""
    from hfpatch.evals.tasks import LM_EVAL_FOLDER

    config: dict[str, Any] = {}
    if getattr(args, "config", None):
        from lm_eval.config.evaluate_config import EvaluatorConfig

        config = EvaluatorConfig.load_yaml_config(args.config)
    if hasattr(args, "include_path"):
        theirs = args.include_path or config.get("include_path") or []
        args.include_path = [str(LM_EVAL_FOLDER), *([theirs] if isinstance(theirs, str | Path) else theirs)]
    if hasattr(args, "output_path"):
        args.output_path = args.output_path or config.get("output_path")
    if hasattr(args, "model_args"):
        args.model = args.model or config.get("model") or "hfpatch"
        if (args.model_args or {}).get("pretrained") == EMBEDDED:
            args.metadata = {"tokenizer": location(EMBEDDED), **(args.metadata or {})}


main = run_lm_eval

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except HfpatchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
