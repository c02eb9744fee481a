"""Dynamic hierarchical sparse attention: learned or found chunk boundaries, a token budget per query block."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...config.registry import register_method
from ...core.call import AttentionCall
from ...core.graph_step import GraphKeys, GraphStep
from ...core.learned import Learned, ModelSizes
from ...core.method import Method
from ...core.selection import Causal, Rows, Selection
from ...errors import ConfigError
from ...runtime.model_facts import modeling_names, text_config
from . import fused
from .choose import Room, Rooms, choose, token_lists
from .config import DhsaConfig
from .finder import Finder
from .fused import Scores
from .graph import chosen_keys, chunk_lists
from .predictor import BoundaryPredictor, load_predictor
from .rotary import Rotary
from .score import Chunks, pool_queries, score_by_queries, score_chunks
from .sharing import LayerSharing
from .table import ChunkTable
from .trust import serves

KEY = "dhsa"


@register_method
class Dhsa(Method[DhsaConfig]):
    """Chunks keys at found boundaries, scores chunks by queries, shows each query block its best N_b tokens.

    arXiv 2510.24606 (ICML 2026). As in the paper: variable chunks, token budget, dense question, one more chunk for
    generated tokens in decode. Unlike it, chunks are ranked by what some real queries pay them; `score="mean"` is its
    product of pooled queries and sqrt(len) * mean(k). Unlike the authors' code: sink and
    recent tokens never displace selected ones, no token counts twice, one selection per key-value group, soft-cap
    kept, batches, sparse decode. Query blocks have a fixed size there and here; the paper chunks queries as keys.
    """

    summary = "variable key chunks, token budget per query block"
    paper = "https://arxiv.org/abs/2510.24606"
    reads = "positions"
    stateful = True
    compiles = True
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
        self.sharing = LayerSharing(config.layer_sharing)
        self._settings = json.dumps(asdict(config))
        self._rooms = Rooms(config.sink, config.local, config.align)
        self._chunks: dict[int, tuple[Tensor, int]] = {}  # layer: chunks cut last, tokens in them

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
                    "and name its folder in `predictor`, or use boundaries='fixed'."
                )
            self.predictor = load_predictor(s.predictor)
        if self.predictor is not None:
            self.predictor.check(model)
        self.rotary = Rotary.of(text_config(model), modeling_names(model))
        self.sharing = LayerSharing(s.layer_sharing, layers, s.layer_sharing_span)

    def notes(self) -> list[str]:
        """What decode steps do, and chunk counts and mean lengths of the last call that cut chunks, layer by layer."""
        least = self.config.sparse_decode_from if "decode" in self.acts_in else 0
        told = [f"dhsa: decode steps with fewer than {least} keys run dense (decode_min_length)"] if least else []
        return told + [
            f"dhsa: layer {layer}: {int(chunks)} chunks, {tokens / int(chunks):.1f} tokens on average"
            for layer, (chunks, tokens) in sorted(self._chunks.items())
        ]

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
        c = self.config
        decode = call.phase == "decode"
        units = c.units(call.Lk, decode)
        dense = decode and (c.phase == "prefill" or call.Lk < c.sparse_decode_from)
        if dense or call.Lk <= units * c.align:
            return None
        return self.sharing.once("selection", call, (call.Lq, call.Lk), self._choose, call, units)

    def _choose(self, call: AttentionCall, units: int) -> Selection | None:
        """Token lists within a budget of `units`; dense are queries that see no more, and the question."""
        c, align, off = self.config, self.config.align, call.off
        block = c.block(units)
        table = self._table(call, block)
        block = 1 if call.Lq == 1 else block
        stop = call.Lq - self._question(call)
        dense = min(max(0, (units * align - off) // block * block), stop)
        if stop <= dense or off + stop <= units * align:
            return None
        room = self._rooms.of((off + dense, off + stop), block, units, call.Lk, call.q.device)
        lists = token_lists(self._lists(call, table, room, dense, stop), room)
        if call.Lq > off:  # most of a prompt: the moments would lie idle while the other layers work
            table.forget()
        parts: list[tuple[int, Selection]] = [(dense, Causal()), (stop, lists), (call.Lq, Causal())]
        parts = parts[0 if dense else 1 : 3 if stop < call.Lq else 2]
        return lists if len(parts) == 1 else Rows(parts)

    def graph_blocker(self, capacity: int) -> str | None:
        """Chunks are ranked by the step's own query, between boundaries that need no other."""
        c = self.config
        if capacity < c.sparse_decode_from:
            return None
        for name, value, known in (
            ("score", c.score, ("queries",)),
            ("boundaries", c.boundaries, ("novelty", "fixed")),
            ("layer_sharing", c.layer_sharing, ("none",)),
        ):
            if value not in known:
                return f"{name}={value!r} has no form of fixed shapes; {' and '.join(known)} have one"
        return super().graph_blocker(capacity)

    def graph_state(
        self, call: AttentionCall, capacity: int, before: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Where the chunks of the keys so far begin."""
        if capacity < self.config.sparse_decode_from or self.graph_blocker(capacity):
            return {}
        table = call.state.get(KEY)
        if before is not None and (table is None or table.listed == table.closed):
            return dict(before)
        if table is None or table.closed > call.Lk:
            table = ChunkTable.empty(call.k, self.rotary)
        table.listed = table.closed
        return chunk_lists(table, self.config, capacity)

    @torch.no_grad()
    def graph_select(self, step: GraphStep) -> GraphKeys | None:
        return chosen_keys(step, self.config, self._settings)

    def _lists(self, call: AttentionCall, table: ChunkTable, room: Room, start: int, stop: int) -> Tensor:
        """Unit lists `[B, H, nQ, budget]` of the query blocks between queries `start` and `stop`."""
        c, shared = self.config, self.config.head_sharing == "all"
        rule = c.score if call.Lq == 1 and c.score in fused.SCORED else None
        kernels = serves(call, table, room, rule, shared, c.executor)
        if kernels and rule is not None:
            return fused.choose(fused.scores(call, table, room, rule, shared), table, room)
        upto = room.stop - c.local
        chunks = table.bare if c.score == "queries" else table.chunks(call.k, upto)
        score = self._score(call, chunks, room, start, stop, shared)  # [B, H, nQ, C]
        if kernels:
            return fused.choose(Scores(score), table, room)
        return choose(score, chunks.starts, chunks.ends, room)

    def _score(self, call: AttentionCall, chunks: Chunks, room: Room, start: int, stop: int, shared: bool) -> Tensor:
        """Scores `[B, H, nQ, C]` of the query blocks between queries `start` and `stop`."""
        c, block = self.config, room.block
        if c.score == "queries":
            return score_by_queries(call, chunks, start, stop, block, c.queries or -(-block // 16), shared)
        q = pool_queries(call.q[:, :, start:stop], block)  # [B, Hq, nQ, D]
        return score_chunks(q, chunks, c.score, room.units.begin, call.scale, shared)

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
        fresh, after = table.closed == 0, self.config.close_after
        if call.Lq >= block or (fresh and call.Lq > 1):
            self._close(table, call, call.Lk)
        elif fresh or 0 < after <= call.off - table.closed:
            self._close(table, call, call.off)
        if table.closed < call.Lk:
            table.grow(call.off, call.Lk)
        return table

    def _close(self, table: ChunkTable, call: AttentionCall, stop: int) -> None:
        question = self._question(call) if stop == call.Lk and call.Lq > 1 else 0
        finder = Finder(self.config, self.predictor)

        def find(start: int, stop: int) -> Tensor:
            forced = stop - question - start if question else None
            return self.sharing.once("boundaries", call, (start, stop), finder.find, call, start, stop, forced)

        table.close(stop, find, call.Lk, finder.most(stop - table.closed))
        starts, ends = table.spans
        self._chunks[call.layer] = ((ends > starts).sum(), call.B * table.seen)
