"""Our tasks in lm-eval, with cached requests (`--cache_requests`) that are those of the documents at hand."""

import hashlib
import json
from typing import Any

from lm_eval.api.task import ConfigurableTask


class DocsTask(ConfigurableTask):  # type: ignore[misc]
    """A task whose documents depend on tokenizer, length, seed and options, which lm-eval's own key leaves out."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={k: v for k, v in config.items() if k != "class"})

    def build_all_requests(self, *, tokenizer_name: str = "", **kwargs: Any) -> None:
        """Build the requests, or take those cached for the very same documents."""
        asked = json.dumps([list(self.eval_docs), self.config.generation_kwargs], sort_keys=True, default=str)
        digest = hashlib.sha256(asked.encode()).hexdigest()[:16]
        super().build_all_requests(tokenizer_name=f"{tokenizer_name}-docs{digest}", **kwargs)
