"""AdaLoRA's schedule: importance of every rank of every module, a budget that falls with the cube of the remaining
time, and the cut at the end (Zhang et al., arXiv 2303.10512, algorithm 1).

All modules are handled together: the averages in multi-tensor operations, the scores per group of equal shapes. The
host waits for the device in allocation steps only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.errors import PeftWarning, warn
from peftfast.methods.adalora import VALUES, AdaLoraConfig
from peftfast.methods.lora.lora import factors
from peftfast.ops.function import set_anew
from peftfast.ops.orthogonality import by_shape
from peftfast.sharding import put_together, taken_apart


class Allocation(NamedTuple):
    """One decision about ranks.

    Attributes:
        step: when. budget: how many ranks all modules were to have together.
        ranks: module name -> ranks left. scores: module name -> importance of each of its ranks [r], on the CPU.
    """

    step: int
    budget: int
    ranks: dict[str, int]
    scores: dict[str, Tensor]


class RankAllocator:
    """The schedule of one adapter.

    Attributes:
        step: the last step that was taken into account. finished: whether the final ranks are chosen.
        counts: whether it has advanced by itself since it began or was loaded.
        history: every allocation so far.
    """

    def __init__(self, cfg: AdaLoraConfig, adapters: Sequence[Adapter]) -> None:
        if not 0 < cfg.beta1 < 1 or not 0 < cfg.beta2 < 1:
            raise ValueError(f"beta1 and beta2 must be between 0 and 1, got {cfg.beta1} and {cfg.beta2}")
        self.cfg = cfg
        self.adapters: list[Adapter] | None = list(adapters)
        self.step = 0
        self.counts = False
        # an adapter that was saved after its cut has nothing left to decide
        self.finished = bool(cfg.rank_pattern)
        self.history: list[Allocation] = []
        self._sizes = [len(a[VALUES]) for a in self.adapters]
        self.init_bgt = sum(self._sizes)
        self.target_bgt = cfg.target_r * len(self.adapters)
        self.sensitivity: list[Tensor] | None = None
        self.uncertainty: list[Tensor] | None = None
        self._keep: Tensor | None = None  # [all ranks] bool on the device
        self._before: dict[str, Any] | None = None  # to take the first automatic step back

    def parameters(self) -> list[Tensor]:
        """All A, then all B, then all E."""
        pairs = [factors(a) for a in self.adapters]
        return [a for a, _ in pairs] + [b for _, b in pairs] + [a[VALUES] for a in self.adapters]

    def _names(self) -> list[str]:
        """What a state calls them."""
        return [f"{side}.{a.key}" for side in ("A", "B", "E") for a in self.adapters]

    # ---- the schedule ------------------------------------------------------------------------------------------------
    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """The number of ranks of all modules together at `step`, and whether ranks are allocated in it."""
        cfg = self.cfg
        if step <= cfg.tinit:
            return self.init_bgt, False
        if step > cfg.total_step - cfg.tfinal:
            return self.target_bgt, True
        remaining = 1 - (step - cfg.tinit) / (cfg.total_step - cfg.tfinal - cfg.tinit)
        budget = int((self.init_bgt - self.target_bgt) * remaining**3 + self.target_bgt)
        return budget, step % cfg.deltaT == 0

    @torch.no_grad()
    def advance(self, step: int) -> bool:
        """Take the gradients of an optimizer step into account and prune if it is time; after the step, before
        gradients are cleared. True if this was the step that chose the final ranks."""
        last = self.cfg.total_step - self.cfg.tfinal
        self.step = step
        if self.finished:
            self.mask()
            return False
        if step < last:
            self.observe()
            budget, due = self.budget_schedule(step)
            if due:
                self.allocate(budget)
            return False
        if self.sensitivity is None:  # a schedule of one step, or one that is joined at its end
            if all(p.grad is None for p in self.parameters()):
                raise RuntimeError(
                    f"AdaLoRA's final allocation is due (step {step}), but no gradient has been seen; were the "
                    "gradients cleared before update_and_allocate?"
                )
            self.observe()
        self.allocate(self.budget_schedule(last)[0])
        self.finished = True
        self.sensitivity = self.uncertainty = None
        self.cfg.rank_pattern = self.rank_pattern()
        return True

    # ---- importance --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def observe(self) -> None:
        """Update the averages of sensitivity |p · grad| and of its variation, equations 9 and 10 of the paper."""
        parameters = self.parameters()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        now = [put_together(n) for n in torch._foreach_mul(parameters, gradients)]
        if any(n.dtype in (torch.float16, torch.bfloat16) for n in now):
            now = [n.float() for n in now]  # averages of half-precision numbers would not move
        torch._foreach_abs_(now)
        if self.sensitivity is None:
            self.sensitivity = [torch.zeros_like(n) for n in now]
            self.uncertainty = [torch.zeros_like(n) for n in now]
        torch._foreach_mul_(self.sensitivity, self.cfg.beta1)
        torch._foreach_add_(self.sensitivity, now, alpha=1 - self.cfg.beta1)
        torch._foreach_sub_(now, self.sensitivity)
        torch._foreach_abs_(now)
        torch._foreach_mul_(self.uncertainty, self.cfg.beta2)
        torch._foreach_add_(self.uncertainty, now, alpha=1 - self.cfg.beta2)

    @torch.no_grad()
    def scores(self) -> Tensor:
        """The importance of every rank, all modules one after the other: that of its singular value plus the mean
        over each of its two vectors (equation 8)."""
        count = len(self.adapters)
        products = torch._foreach_mul(self.sensitivity, self.uncertainty)
        home = products[0].device
        values = torch.cat(_on(home, products[2 * count :])).view(-1)
        downs = self._means(products[:count], 1)
        ups = self._means(products[count : 2 * count], 0)
        return values + (downs.to(home) + ups.to(home))

    def _means(self, products: Sequence[Tensor], dim: int) -> Tensor:
        rows: list[Tensor | None] = [None] * len(products)
        for group in by_shape(products):
            means = torch.stack([products[i] for i in group]).mean(dim + 1)
            for i, row in zip(group, means.unbind(0), strict=True):
                rows[i] = row
        return torch.cat(_on(products[0].device, rows))

    # ---- pruning -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def allocate(self, budget: int) -> None:
        """Keep the `budget` most important ranks (fewer where scores tie) and set the other singular values to zero."""
        scores = self.scores()
        dropped = self.init_bgt - budget
        if dropped <= 0:
            self._keep = torch.ones_like(scores, dtype=torch.bool)
        else:
            self._keep = scores > torch.kthvalue(scores, dropped).values
        self.mask()
        table = torch.stack([scores, self._keep.to(scores.dtype)]).cpu()
        names, kept, ranks, start = [a.key for a in self.adapters], table[1].tolist(), {}, 0
        for name, size in zip(names, self._sizes, strict=True):
            ranks[name] = int(sum(kept[start : start + size]))
            start += size
        parts = table[0].split(self._sizes)
        self.history.append(Allocation(self.step, budget, ranks, dict(zip(names, parts, strict=True))))

    @torch.no_grad()
    def mask(self) -> None:
        """Set pruned singular values to zero, again after an optimizer has moved them."""
        if self._keep is None:
            return
        values = [a[VALUES] for a in self.adapters]
        masks = self._keep.to(values[0].dtype).unsqueeze(1).split(self._sizes)
        if len({v.device for v in values}) > 1:
            masks = [m.to(v.device) for m, v in zip(masks, values, strict=True)]
        torch._foreach_mul_(values, [taken_apart(m, v) for m, v in zip(masks, values, strict=True)])

    def rank_pattern(self) -> dict[str, list[bool]] | None:
        """As configs hold it: `<module>.lora_E` -> which of its ranks are kept; None before the first allocation."""
        if self._keep is None:
            return None
        kept = self._keep.cpu().split(self._sizes)
        return {f"{a.key}.{VALUES}": k.tolist() for a, k in zip(self.adapters, kept, strict=True)}

    # ---- cutting -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def shrink(self, optimizer: torch.optim.Optimizer | None) -> bool:
        """Cut the pruned ranks out of the Parameters, which stay the same objects, and out of their gradients and
        optimizer state. False, with a warning and nothing changed, if the state cannot be cut.

        Args:
            optimizer: that trains all the factors; None: nothing trains them any more.
        """
        if not self.finished or self._keep is None or bool(self._keep.all()):
            return self.finished
        state = {} if optimizer is None else optimizer.state
        stuck = _uncuttable(self.parameters(), optimizer)
        if stuck:
            warn(
                f"AdaLoRA's ranks are final but stay masked instead of being cut: {stuck}. Call shrink_ranks() after "
                "training; saved files are small either way.",
                PeftWarning,
            )
            return False
        for adapter, kept in zip(self.adapters, self._keep.split(self._sizes), strict=True):
            where = kept.nonzero().view(-1)
            a, b = factors(adapter)
            for parameter, dim in ((a, 0), (b, 1), (adapter[VALUES], 0)):
                cut(parameter, where.to(parameter.device), dim, state)
            adapter.change("r", len(where))
        self._sizes = [len(a[VALUES]) for a in self.adapters]
        self._keep = None
        return True

    # ---- taking a step back, saving ----------------------------------------------------------------------------------
    def remember(self) -> None:
        """The schedule is about to `advance` by itself: if that is the first time, be able to `take_back` it."""
        self._before = None
        if not self.counts:
            self._before = {
                "state": self.state_dict(),
                "values": [a[VALUES].detach().clone() for a in self.adapters],
                "history": list(self.history),
            }
        self.counts = True

    def forget(self) -> None:
        self._before = None

    @torch.no_grad()
    def take_back(self) -> bool:
        """Undo the `advance` since `remember`; False if there is none to undo."""
        before, self._before = self._before, None
        if before is None or (self.finished and self._keep is None):
            return False
        self.load_state_dict(before["state"])
        self.history = before["history"]
        torch._foreach_copy_([a[VALUES] for a in self.adapters], before["values"])
        return True

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the model has layers of its own, in which it looks the adapters up
        return {**self.__dict__, "adapters": None, "_before": None}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that resuming in mid-schedule needs besides the adapter itself."""
        state = {"step": torch.tensor(self.step), "finished": torch.tensor(self.finished)}
        if self._keep is not None:
            state["keep"] = self._keep.clone()
        names = self._names()
        for kind, tensors in (("sensitivity", self.sensitivity), ("uncertainty", self.uncertainty)):
            if tensors is not None:
                state.update({f"{kind}.{n}": t.clone() for n, t in zip(names, tensors, strict=True)})
        return state

    def beside_file(self) -> dict[str, Tensor]:
        """What going on with the training needs beside the adapter's file: the running schedule, or, once the final
        ranks are chosen and only masked, the pruned part of the factors, which the file leaves out and which the
        optimizer's saved state has a place for. Empty if the file says everything."""
        if not self.finished:
            return self.state_dict() if self.step else {}
        pruned = None if self._keep is None else ~self._keep
        if pruned is None or not pruned.any() or any(type(p) is not nn.Parameter for p in self.parameters()):
            return {}
        state = self.state_dict()
        for adapter, gone in zip(self.adapters, pruned.split(self._sizes), strict=True):
            a, b = (f.detach() for f in factors(adapter))
            where = gone.nonzero().view(-1).to(a.device)
            state[f"pruned.A.{adapter.key}"] = a.index_select(0, where)
            state[f"pruned.B.{adapter.key}"] = b.index_select(1, where)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: the state belongs to an adapter with other modules or shapes.
        """
        parameters = self.parameters()
        names = self._names()
        averages: dict[str, list[Tensor] | None] = {"sensitivity": None, "uncertainty": None}
        for kind in averages:
            found = {k.partition(".")[2]: v for k, v in state.items() if k.startswith(kind + ".")}
            if not found:
                continue
            shapes = {n: p.shape for n, p in zip(names, parameters, strict=True)}
            wrong = [n for n in {*found, *shapes} if n not in found or n not in shapes or found[n].shape != shapes[n]]
            if wrong:
                raise ValueError(f"AdaLoRA's saved schedule does not fit this adapter: {sorted(wrong)[:5]} differ")
            # a copy, because the averages are updated in place
            averages[kind] = [_copy_beside(p, found[n]) for n, p in zip(names, parameters, strict=True)]
        self.sensitivity, self.uncertainty = averages["sensitivity"], averages["uncertainty"]
        self.step, self.finished, self.counts = int(state["step"]), bool(state["finished"]), False
        keep = state.get("keep")
        self._keep = None if keep is None else _copy_beside(parameters[0], keep)

    @torch.no_grad()
    def packed(self) -> Tensor:
        """`state_dict` in one tensor of a size that no step changes, which any format of a model's state dict can
        hold."""
        parameters = self.parameters()
        device = torch.device("cpu") if parameters[0].is_meta else parameters[0].device
        dtype = torch.float32
        for p in parameters:
            dtype = torch.promote_types(dtype, p.dtype)
        averages = [*(self.sensitivity or ()), *(self.uncertainty or ())]
        packed = torch.zeros(sum(self._packed_sizes()), dtype=dtype, device=device)
        head, keep, rest = packed.split(self._packed_sizes())
        head.copy_(torch.tensor([self.step, self.finished, self._keep is not None, bool(averages)]))
        if self._keep is not None:
            keep.copy_(self._keep)
        for part, average in zip(rest.split([t.numel() for t in averages]) if averages else (), averages, strict=True):
            part.copy_(average.flatten())
        return packed

    def _packed_sizes(self) -> list[int]:
        return [4, sum(self._sizes), 2 * sum(p.numel() for p in self.parameters())]

    def unpack(self, packed: Tensor) -> None:
        """Go on where `packed` was taken."""
        head, keep, rest = packed.split(self._packed_sizes())
        step, finished, keeps, known = map(int, head.tolist())
        state = {"step": torch.tensor(step), "finished": torch.tensor(finished)}
        if keeps:
            state["keep"] = keep.bool()
        if known:
            parameters = self.parameters()
            names = self._names()
            parts = iter(rest.split([p.numel() for p in parameters] * 2))
            for kind in ("sensitivity", "uncertainty"):
                state.update({f"{kind}.{n}": next(parts).view(p.shape) for n, p in zip(names, parameters, strict=True)})
        self.load_state_dict(state)
        self.history = [entry for entry in self.history if entry.step <= step]
        self._before = None
        if not finished:
            self.cfg.rank_pattern = None
        elif keeps:
            self.cfg.rank_pattern = self.rank_pattern()


def _copy_beside(parameter: Tensor, values: Tensor) -> Tensor:
    """Of values that belong to a parameter; where that has none yet, it will be where they are."""
    return values.to(values.device if parameter.is_meta else parameter.device, copy=True)


@torch.no_grad()
def put_back(adapters: Sequence[Adapter], state: dict[str, Tensor]) -> None:
    """Widen factors that were read from a file by the pruned ranks that `RankAllocator.beside_file` kept.

    Raises:
        ValueError: they belong to an adapter with other modules or shapes; nothing was changed.
    """
    work, start, keep = [], 0, state.get("keep")
    for adapter in adapters:
        a, b = factors(adapter)
        rows, columns = (state.get(f"pruned.{side}.{adapter.key}") for side in ("A", "B"))
        fits = all(t is not None and t.dim() == 2 for t in (rows, columns)) and keep is not None
        fits = fits and rows.shape[1] == a.shape[1] and columns.shape == (b.shape[0], len(rows))
        size = len(a) + len(rows) if fits else 0
        kept = keep[start : start + size].bool() if fits else None
        if not fits or len(kept) != size or int(kept.sum()) != len(a):
            raise ValueError(f"AdaLoRA's saved schedule does not fit this adapter: {adapter.key} differs")
        work.append((adapter, kept, rows, columns))
        start += size
    for adapter, kept, rows, columns in work:
        a, b = factors(adapter)
        values = adapter[VALUES]
        for parameter, pruned, dim in ((a, rows, 0), (b, columns, 1), (values, values.new_zeros(len(rows), 1), 0)):
            shape = list(parameter.shape)
            shape[dim] = len(kept)
            whole = parameter.new_empty(shape)
            for part, where in ((parameter.detach(), kept), (pruned, ~kept)):
                whole.index_copy_(dim, where.nonzero().view(-1).to(whole.device), part.to(whole))
            replace(parameter, whole)
        adapter.change("r", len(kept))


def _on(device: torch.device, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on one device, for models that are spread over several."""
    return [t if t.device == device else t.to(device) for t in tensors]


def held_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """What an optimizer steps, by id."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _uncuttable(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer | None) -> str | None:
    """Why these Parameters cannot be cut, if so."""
    if optimizer is not None:
        held = held_by(optimizer)
        elsewhere = sum(id(p) not in held for p in parameters)
        if elsewhere:
            return f"{elsewhere} of their {len(parameters)} factors are not in this optimizer, whose state would be cut"
    state = {} if optimizer is None else optimizer.state
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        return "the training is distributed, and its buckets and shards have fixed sizes"
    for p in parameters:
        if type(p) is not nn.Parameter:
            return f"they are {type(p).__name__}s"
        for name, value in state.get(p, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != p.shape:
                return (
                    f"the optimizer keeps {name!r} of shape {tuple(value.shape)} for a factor of shape {tuple(p.shape)}"
                )
    return None


@torch.no_grad()
def cut(parameter: Tensor, where: Tensor, dim: int, state: Any = None) -> None:
    """Keep the rows (`dim` 0) or columns (1) `where` of a Parameter, of its gradient and of its optimizer state."""
    for name, value in ((state or {}).get(parameter, {}) or {}).items():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.numel() > 1:
            state[parameter][name] = value.index_select(dim, where).contiguous()
    gradient = parameter.grad
    replace(parameter, parameter.detach().index_select(dim, where).contiguous())
    if gradient is not None:
        parameter.grad = gradient.index_select(dim, where).contiguous()


def replace(parameter: Tensor, value: Tensor) -> None:
    """Give a Parameter other contents of another shape, without its gradient."""
    parameter.grad = None
    set_anew(parameter, value)  # a loss of the last step that is still alive checks gradients against the old shape
