"""Dynamic hierarchical sparse attention: learned or found chunk boundaries, a token budget per query block."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...config.common import phase
from ...config.method_config import MethodConfig, option
from ...config.registry import register_method
from ...core.call import AttentionCall
from ...core.learned import Learned, ModelSizes
from ...core.method import Method
from ...core.selection import Causal, Rows, Selection
from ...errors import ConfigError
from ...runtime.model_facts import modeling_names, text_config
from ...values import PathText
from . import boundaries as cutting
from .choose import Room, choose, whole
from .labels import mass_ratio
from .predictor import BoundaryPredictor, load_predictor
from .rotary import Rotary
from .score import RULES, pool_queries, score_chunks
from .table import ChunkTable

KEY = "dhsa"
LEAST_BLOCK, MOST_BLOCK = 16, 256


@dataclass(kw_only=True)
class DhsaConfig(MethodConfig):
    """Settings of `dhsa`; sizes in tokens."""

    method: ClassVar[str] = "dhsa"
    budget: int | float = option(2048, "tokens every query block may see, or a share of the keys", gt=0, share=True)
    sink: int = option(64, "first tokens, always visible, inside the budget", ge=0)
    local: int = option(128, "tokens before a query block, always visible, inside the budget", ge=0)
    block_q: int | None = option(
        None, "queries that share one list, their own tokens inside the budget; an eighth of it, 16 to 256", ge=1
    )
    boundaries: str = option("novelty", "where chunks begin", choices=("fixed", "novelty", "predictor", "oracle"))
    chunk: int = option(16, "length of fixed chunks; of others the smallest mean length", ge=1)
    longest: int = option(64, "longer chunks are split; 0 leaves them whole", ge=0)
    boundary_window: int = option(4, "tokens compared on each side of a possible boundary", ge=1, old="window")
    radius: int = option(4, "a boundary this close to a better one is dropped", ge=0)
    threshold: float | None = option(None, "least boundary score (novelty 0..2, predictor logit, oracle ratio)")
    head_sharing: str = option(
        "group", "one selection per key-value group, or one for all heads", choices=("group", "all"), old="heads"
    )
    score: str = option("mass", "what chunks are ranked by; 'mean' is the paper's", choices=RULES)
    question_tokens: int = option(64, "last queries of a prefill call, which attend densely", ge=0)
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

    def units(self, keys: int) -> int:
        """Budget in units of `align` tokens for a call with `keys` keys."""
        wanted = self.budget if isinstance(self.budget, int) else max(self.least, math.ceil(self.budget * keys))
        return -(-wanted // self.align)

    def block(self, units: int) -> int:
        """Queries per block for a budget of `units`."""
        if self.block_q:
            return self.block_q
        tokens = units * self.align
        wanted = min(tokens // 8, tokens - self._around, MOST_BLOCK)
        return max(wanted // self.align * self.align, self.least_block)


@register_method
class Dhsa(Method[DhsaConfig]):
    """Chunks keys at found boundaries, scores chunks by pooled queries, shows each query block its best N_b tokens.

    arXiv 2510.24606 (ICML 2026). As in the paper: variable chunks, sqrt(len) * mean(k) as their representation,
    token budget, dense question, one more chunk for generated tokens in decode. Unlike the authors' code: sink and
    recent tokens never displace selected ones, no token counts twice, one selection per key-value group, soft-cap
    kept, batches, sparse decode. Query blocks have a fixed size there and here; the paper chunks queries as keys.
    """

    summary = "variable key chunks, token budget per query block"
    paper = "https://arxiv.org/abs/2510.24606"
    stateful = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dhsa-paper": {
            "boundaries": "predictor", "threshold": 1.1, "head_sharing": "all", "score": "mean", "sink": 128,
            "local": 0, "block_q": 128, "chunk": 8, "radius": 8, "longest": 0, "close_after": 0, "question_tokens": 64,
        },
    }  # fmt: skip

    def __init__(self, config: DhsaConfig, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config, tensors)
        tiled = config.boundaries == "fixed" and config.chunk <= config.local + config.least_block
        tiled = tiled and config.score != "bands"
        self.causality = "tile" if tiled else "no"
        self.predictor: BoundaryPredictor | None = None
        self.watch: Callable[[AttentionCall, Selection | None], None] | None = None
        self.rotary = Rotary()
        self.needs = frozenset({"forward"} if config.layer_sharing != "none" else ())
        self._leader: dict[int, int] = {}
        self._counts: dict[int, tuple[Tensor, int]] = {}

    def learns(self, sizes: ModelSizes) -> dict[str, Learned]:
        """The weights and sizes of a boundary predictor, all of them."""
        return BoundaryPredictor.learned(self.given)

    def prepare(self, model: nn.Module, layers: Sequence[int]) -> None:
        """Load the predictor and settle which layer shares with which. Raises ConfigError."""
        s = self.config
        self.predictor = BoundaryPredictor.of(self.given)
        if s.boundaries == "predictor" and self.predictor is None:
            if s.predictor is None:
                raise ConfigError(
                    "dhsa: boundaries='predictor' needs a trained predictor; train one with `hfpatch calibrate dhsa` "
                    "and name its folder in `predictor`, or use boundaries='novelty'."
                )
            self.predictor = load_predictor(s.predictor)
        if self.predictor is not None:
            self.predictor.check(model)
        self.rotary = Rotary.of(text_config(model), modeling_names(model))
        span = s.layer_sharing_span or len(layers)
        if s.layer_sharing != "none":
            self._leader = {layer: layers[n // span * span] for n, layer in enumerate(layers)}

    def notes(self) -> list[str]:
        """Chunk counts and mean chunk length of the last call that cut chunks, layer by layer."""
        parts = [(layer, int(n), tokens) for layer, (n, tokens) in sorted(self._counts.items())]
        return [f"dhsa: layer {layer}: {n} chunks, {t / n:.1f} tokens on average" for layer, n, t in parts]

    def tensors(self) -> dict[str, Tensor]:
        """The predictor's weights and sizes."""
        return {} if self.predictor is None else self.predictor.tensors()

    @torch.no_grad()
    def select(self, call: AttentionCall) -> Selection | None:
        """Lists of tokens per query block; `watch`, if set, is shown the call and the answer."""
        selection = self._select(call)
        if self.watch is not None:
            self.watch(call, selection)
        return selection

    def _select(self, call: AttentionCall) -> Selection | None:
        s = self.config
        units = s.units(call.Lk)
        decode = call.phase == "decode"
        if call.Lk <= units * s.align or (s.phase == "prefill" and decode):
            return None
        if s.layer_sharing == "selection":
            return self._from_leader(
                call, "selection", (call.rows, call.Lq, call.Lk), lambda: self._choose(call, units)
            )
        return self._choose(call, units)

    def _choose(self, call: AttentionCall, units: int) -> Selection | None:
        s, a = self.config, self.config.align
        block = s.block(units)
        table = self._table(call, block)
        block = 1 if call.Lq == 1 else block
        stop = call.Lq - self._question(call)
        dense = min(max(0, (units * a - call.off) // block * block), stop)
        if stop <= dense or call.off + stop <= units * a:
            return None
        begin = torch.arange(call.off + dense, call.off + stop, block, device=call.q.device)
        end = (begin + block).clamp(max=call.off + stop)
        sink = -(-s.sink // a)
        room = Room(sink, whole(begin - s.local, a).clamp(min=sink), whole(end + (a - 1), a), units, call.Lk // a)
        chunks = table.chunks(call.k, upto=call.off + stop - s.local)
        q = pool_queries(call.q[:, :, dense:stop], block)
        score = score_chunks(q, chunks, s.score, begin, call.scale, s.head_sharing == "all")
        if call.Lq > call.off:  # most of a prompt: the moments would lie idle while the other layers work
            table.forget()
        lists = choose(score, whole(chunks.starts, a), whole(chunks.ends, a), room, block, a)
        parts = [(dense, Causal()), (stop, lists), (call.Lq, Causal())]
        parts = parts[0 if dense else 1 : 3 if stop < call.Lq else 2]
        return lists if len(parts) == 1 else Rows(parts)

    def _question(self, call: AttentionCall) -> int:
        """Queries at the end of the call that attend densely: from the span "question" on, or `question_tokens`."""
        if call.phase == "decode":
            return 0
        places = (call.spans or {}).get("question", ())
        starts = [p[0] for p in places if p is not None]
        tail = call.Lk - min(starts) if starts else 0 if places else self.config.question_tokens
        return min(max(tail, 0), call.Lq)

    def _table(self, call: AttentionCall, block: int) -> ChunkTable:
        """The chunk table brought up to date; built anew from the keys when it is gone or the cache was cut back."""
        table = call.state.get(KEY)
        if table is None or table.closed > call.off:
            table = ChunkTable.empty(call.k, self.rotary)
            call.state[KEY] = table
        s, fresh = self.config, table.closed == 0
        if call.Lq >= block or (fresh and call.Lq > 1):
            self._close(table, call, call.Lk)
        elif fresh or 0 < s.close_after <= call.off - table.closed:
            self._close(table, call, call.off)
        if table.closed < call.Lk:
            table.grow(call.off, call.Lk)
        return table

    def _close(self, table: ChunkTable, call: AttentionCall, stop: int) -> None:
        question = self._question(call) if stop == call.Lk and call.Lq > 1 else 0

        def find(start: int, stop: int) -> Tensor:
            key = (call.rows, start, stop)
            make = lambda: self._find(call, start, stop, stop - question - start if question else None)  # noqa: E731
            shared = self.config.layer_sharing == "boundaries"
            return self._from_leader(call, "boundaries", key, make) if shared else make()

        table.close(stop, find, call.Lk)
        starts, ends = table.spans
        self._counts[call.layer] = ((ends > starts).sum(), call.B * table.seen)

    def _find(self, call: AttentionCall, start: int, stop: int, forced: int | None) -> Tensor:
        """Boundary flags `[B, stop - start]` of the tokens `start .. stop`."""
        s = self.config
        if s.boundaries == "fixed":
            flags = cutting.fixed(call.B, start, stop, s.chunk, call.k.device)
        else:
            score = self._score(call, start, stop)
            if s.threshold is not None:
                score = score.masked_fill(score <= s.threshold, -torch.inf)
            flags = cutting.cut(score, cutting.Cutting(s.radius, s.chunk), forced)
        if start < s.sink < stop:  # initial tokens' keys are unlike others and would speak for their chunk
            flags = flags.clone()
            flags[:, s.sink - start] = True
        if s.longest:
            flags = cutting.split_long(flags, s.longest)
        return cutting.snap(flags, start, s.align) if s.align > 1 else flags

    def _score(self, call: AttentionCall, start: int, stop: int) -> Tensor:
        """Boundary scores `[B, stop - start]`; -inf where there are too few tokens on a side."""
        s = self.config
        if s.boundaries == "oracle":
            return mass_ratio(call, s.boundary_window)[:, start:stop].float().nan_to_num(-torch.inf)
        if s.boundaries == "predictor" and self.predictor is not None:
            lead = min(start, self.predictor.window)
            return self.predictor.score(call.k[:, :, start - lead : stop])[:, lead:]
        lead = min(start, s.boundary_window)
        return cutting.novelty(call.k[:, :, start - lead : stop], s.boundary_window)[:, lead:]

    def _from_leader(self, call: AttentionCall, what: str, key: Any, make: Callable[[], Any]) -> Any:
        """What the leading layer made for the same rows and tokens in this forward; made here where it did not."""
        leader = self._leader.get(call.layer, call.layer)
        known: dict[Any, Any] = {} if call.forward is None else call.forward.shared
        place = ("dhsa", leader, what, key, call.k.device)
        if call.layer == leader or place not in known:
            known[place] = make()
        return known[place]
