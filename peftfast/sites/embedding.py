"""Embeddings: a row lookup is a product with one-hot rows, so the down factor is looked up instead of multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfast.base.weight import base_weight
from peftfast.modes import in_mode
from peftfast.ops.dora import weight_norm
from peftfast.ops.gate import gated
from peftfast.sites.site import Slot, UsualSite, is_plain, is_untouched, register_site
from peftfast_kernels.decode import Operand

if TYPE_CHECKING:
    from peftfast.rows.routing import Rows


def scaled_by(module: nn.Embedding, y: Tensor) -> Tensor:
    """Rows of a table as the module would give them. Gemma scales its embeddings in forward, a change of the table with
    them."""
    embed_scale = getattr(module, "embed_scale", None)
    if embed_scale is None:
        return y
    return y * (embed_scale.to(y.dtype) if isinstance(embed_scale, Tensor) else embed_scale)


@register_site("torch.nn.Embedding", lambda module: isinstance(module, nn.Embedding))
class EmbeddingSite(UsualSite):
    """y = W[ids] with ids [...] and y [..., K]; W [N, K] is N tokens of K features.

    Raises:
        TypeError: the module gives something else than rows of its table for the numbers that it is called with.
    """

    looks_up = True
    gates = True

    def __init__(self, module: nn.Module) -> None:
        self.weight = base_weight(module)
        if type(module).forward is not nn.Embedding.forward:
            self._check_looks_up()

    @torch.no_grad()
    def _check_looks_up(self) -> None:
        """Positions computed from the input, norms after the table and the like: there the change of an output is not
        that of rows, which training would not notice and merging would get wrong."""
        m, table = self.module, self.module.weight
        if self.weight.quantization is not None or table.is_meta or not is_plain(table) or not is_untouched(m):
            return
        ids = torch.arange(min(8, len(table)), device=table.device)
        want, found, why = scaled_by(m, table[ids]), None, "gives something else"
        try:
            with in_mode(m, training=False):
                found = m(ids)
        except Exception as e:
            why = f"raises {type(e).__name__}"
        if (
            not isinstance(found, Tensor)
            or found.shape != want.shape
            or not torch.allclose(found.float(), want.float(), rtol=1e-2, atol=1e-5)
        ):
            raise TypeError(
                f"{type(m).__name__} derives from torch.nn.Embedding, but for the numbers of rows it {why}, not these "
                "rows of its table, so that no adapter of the table can act on its output. Leave it out of "
                "target_modules; modules_to_save trains such a module in full."
            )

    def probe(self) -> Tensor | None:
        m = self.module
        usual = m.max_norm is None and self.around is None
        if usual or m.weight.is_meta or not is_plain(m.weight) or not is_untouched(m):
            return None
        # rows longer than that are shortened where they are looked up, also with adapters inside
        return torch.arange(len(m.weight), device=m.weight.device)

    def low_rank_slots(self, rank: int, bias: bool = False) -> Mapping[str, Slot]:
        if bias:
            raise ValueError("lora_bias=True is not supported for Embedding")
        n, k = self.weight.shape
        return {"lora_embedding_A": Slot((rank, n)), "lora_embedding_B": Slot((k, rank))}

    def adapt_each(
        self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: Tensor | float, gate: Tensor | None = None
    ) -> Tensor:
        if self.segmented(x):
            each = torch.arange(a.shape[0], device=x.device)
            t = self._rows(x.reshape(a.shape[0], -1), a, each)
        else:
            t = torch.stack([self.down(i, f) for i, f in zip(x.reshape(a.shape[0], -1), a, strict=True)])
        return self._added(y, t, b.transpose(1, 2), scale, gate)

    def segmented(self, x: Tensor) -> bool:
        """Whether tables are looked up in by number; what counts or changes the rows that are read needs them apart."""
        m = self.module
        return m.max_norm is None and not m.scale_grad_by_freq

    def adapt_rows(
        self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: Tensor, rows: Rows, gate: Tensor | None = None
    ) -> Tensor:
        """`adapt_each` with a [G, r, N], b [G, K, r] and scale [G] of all adapters: a sample's table is as large as the
        vocabulary, and only the rows that it looks up are read."""
        index, count = rows.index, a.shape[0]
        own = index.clamp(0, count - 1)
        each = torch.where(index < count, scale[own], float("nan"))
        t = self._rows(x.reshape(index.shape[0], -1), a, own)
        out = self._added(y, t, b.transpose(1, 2).index_select(0, own), each, gate)
        if rows.host is not None and rows.used == len(rows.host):
            return out
        return torch.where((index < 0).view(-1, *(1,) * (y.dim() - 1)), y, out)

    def _rows(self, ids: Tensor, a: Tensor, own: Tensor) -> Tensor:
        """[S, T, r]: rows ids [S, T] of the tables a [G, r, N] with the numbers own [S]."""
        t = a.transpose(1, 2)[own.view(-1, 1), ids]
        if self.module.padding_idx is not None and t.requires_grad:
            padding = (ids == self.module.padding_idx).unsqueeze(-1)
            t = torch.where(padding, t.detach(), t)  # no gradient for padding, as in the module itself
        return t

    def _added(self, y: Tensor, t: Tensor, up: Tensor, scale: Tensor | float, gate: Tensor | None) -> Tensor:
        """y + scale · t up, for t [S, T, r], up [S, r, K] and scale [S] or one number."""
        if gate is not None:
            t = gated(t, gate.reshape(t.shape[0], -1, 1))
        t = t * (scale.view(-1, 1, 1) if isinstance(scale, Tensor) else scale)
        return (y + scaled_by(self.module, torch.bmm(t, up)).view(y.shape)).to(y.dtype)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        m = self.module  # a sparse gradient could not be turned, as the factor lies
        return F.embedding(x, a.t(), m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq)

    def up(self, t: Tensor, b: Tensor) -> Tensor:
        return scaled_by(self.module, t @ b.t())

    def drop(self, x: Tensor, dropout: float) -> Tensor:
        return x  # token ids: nothing to drop, as in PEFT

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.t(), b.t()

    def scale_input(self, x: Tensor, s: Tensor) -> Tensor:
        raise ValueError("An embedding has no input features to scale")

    def vector_shape(self, side: str) -> tuple[int, ...]:
        if side == "input":
            raise ValueError("An embedding has no input features to scale; take it out of feedforward_modules")
        return (self.weight.shape[1],)

    def on_weight(self, s: Tensor, side: str) -> Tensor:
        return s.reshape(1, -1)

    def adapted_norm(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        n, k = self.weight.shape
        w = self.weight.readable()
        table = w.tensors[0] if w.format == "dense" else self.weight.dense()
        return weight_norm(Operand("dense_t", [table], (k, n), table.dtype), a, b, scale)

    def output_norm(self, weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weight, dim=0)
