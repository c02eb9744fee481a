"""Settings of `dhsa`, and what follows from a budget."""

import math
from dataclasses import dataclass
from typing import ClassVar

from ...config.common import phase, question_tokens
from ...config.method_config import MethodConfig, option
from ...errors import ConfigError
from ...values import PathText
from .score import RULES

LEAST_BLOCK, MOST_BLOCK = 16, 256


@dataclass(kw_only=True)
class DhsaConfig(MethodConfig):
    """Settings of `dhsa`; sizes in tokens."""

    method: ClassVar[str] = "dhsa"
    budget: int | float = option(2048, "tokens every query block may see, or a share of the keys", gt=0, share=True)
    decode_budget: int | float | None = option(
        None, "tokens or share of the keys that a decode step may see; as `budget` when None", gt=0, share=True
    )
    decode_min_length: int | None = option(
        None, "decode steps with fewer keys run dense; None: by queries 8 budgets of 1024 tokens or more, else 0", ge=0
    )
    sink: int = option(64, "first tokens, always visible, inside the budget", ge=0)
    local: int = option(128, "tokens before a query block, always visible, inside the budget", ge=0)
    block_q: int | None = option(
        None, "queries that share one list, their own tokens inside the budget; an eighth of it, 16 to 256", ge=1
    )
    boundaries: str = option("fixed", "where chunks begin", choices=("fixed", "novelty", "predictor", "oracle"))
    chunk: int = option(16, "length of fixed chunks; of others the smallest mean length", ge=1)
    longest: int = option(64, "longer chunks are split; 0 leaves them whole", ge=0)
    boundary_window: int = option(4, "tokens compared on each side of a possible boundary", ge=1, old="window")
    radius: int = option(4, "a boundary this close to a better one is dropped", ge=0)
    threshold: float | None = option(None, "least boundary score (novelty 0..2, predictor logit, oracle ratio)")
    head_sharing: str = option(
        "group", "one selection per key-value group, or one for all heads", choices=("group", "all"), old="heads"
    )
    score: str = option(
        "queries",
        "what chunks are ranked by: some real queries of the block and all keys ('queries'), or means of both; "
        "'mean' is the paper's",
        choices=RULES,
    )
    queries: int | None = option(
        None, "score='queries': real queries per query block that choose for it; one in 16 when None", ge=1
    )
    question_tokens: int = question_tokens(64)
    close_after: int = option(64, "generated tokens after which their chunk is closed; 0 keeps one", ge=0)
    align: int = option(1, "boundaries and lists are rounded to blocks of this many tokens", ge=1)
    phase: str = phase()
    layer_sharing: str = option(
        "none", "what later layers take over", choices=("none", "boundaries", "selection"), old="share"
    )
    layer_sharing_span: int = option(
        0, "patched layers that share with the first of them; 0 is all", ge=0, old="share_span"
    )
    predictor: PathText | None = option(
        None, "folder or Hub id of a boundary predictor, or 'embedded' for the small model's"
    )

    def validate(self) -> None:
        if isinstance(self.budget, int) and self.budget < self.least:
            block = "block_q" if self.block_q else f"{self.least_block} queries"
            raise ConfigError(
                f"dhsa: budget={self.budget} has no room for sink + local + {block} = {self.least} tokens; "
                "raise it or lower one of these."
            )
        if isinstance(self.decode_budget, int) and self.decode_budget <= self._around:
            raise ConfigError(
                f"dhsa: decode_budget={self.decode_budget} has no room for sink + local + the token itself = "
                f"{self._around + 1} tokens; raise it or lower one of these."
            )
        if self.boundaries == "fixed" and self.chunk % self.align:
            raise ConfigError(f"dhsa: chunk={self.chunk} must be a multiple of align={self.align}.")
        if self.block_q and self.block_q % self.align:
            raise ConfigError(f"dhsa: block_q={self.block_q} must be a multiple of align={self.align}.")

    @property
    def least(self) -> int:
        """Tokens that are visible whatever they score, with the smallest blocks of queries."""
        return self._around + self.least_block

    @property
    def least_block(self) -> int:
        """Queries of the smallest block."""
        return self.block_q or max(LEAST_BLOCK // self.align, 1) * self.align

    @property
    def _around(self) -> int:
        return self.sink + self.local + (3 * self.align if self.align > 1 else 0)

    @property
    def least_in_decode(self) -> int:
        """Tokens that a decode step sees whatever its share."""
        return self.least if self.decode_budget is None else self._around + 1

    def units(self, keys: int, decode: bool = False) -> int:
        """Budget in units of `align` tokens for a call with `keys` keys, a decode step or not."""
        budget, least = self.budget, self.least
        if decode and self.decode_budget is not None:
            budget, least = self.decode_budget, self.least_in_decode
        wanted = budget if isinstance(budget, int) else max(least, math.ceil(budget * keys))
        return -(-wanted // self.align)

    @property
    def sparse_decode_from(self) -> int:
        """Keys from which decode steps are sparse: with fewer, choosing takes longer than it saves."""
        budget = self.budget if self.decode_budget is None else self.decode_budget
        if self.decode_min_length is not None:
            return self.decode_min_length
        return 8 * budget if self.score == "queries" and isinstance(budget, int) and budget >= 1024 else 0

    def block(self, units: int) -> int:
        """Queries per block for a budget of `units`."""
        if self.block_q:
            return self.block_q
        tokens = units * self.align
        wanted = min(tokens // 8, tokens - self._around, MOST_BLOCK)
        return max(wanted // self.align * self.align, self.least_block)
