"""The training loop: routers only, resumable at every step, guarded by what it may cost.

Order of data, weights and optimiser states are a pure function of the settings and the step, so a run that was killed
ends with the bytes of one that was not. Several processes (torchrun, through accelerate) share each step's sequences.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers.modeling_layers import GradientCheckpointingLayer

from remoe_edge.errors import RemoeError
from remoe_edge.files import append_line, atomic_output, writing
from remoe_edge.progress import Report, silent
from remoe_edge.tuning.adapters import MoE, record
from remoe_edge.tuning.data import Sequences
from remoe_edge.tuning.losses import lag_loss, reuse_loss, reuse_rate, smooth_loss, trust_loss, window_loss
from remoe_edge.tuning.weights import Weights

CHECKPOINT = "tune-checkpoint.safetensors"
LOG = "log.jsonl"
TERMS = ("ce", "kl", "reuse", "smooth", "lag", "window")
SCHEDULES = ("constant", "linear", "cosine")
"""Learning rates after the warm-up: the full one to the end, or down to 0 at the last step."""
SECONDS_AT_RISK = 60.0
"""A checkpoint is written at every look at held-out text, and between looks when the last one is so old."""
_MAX_KEPT_LOGITS = 1 << 30
"""Most bytes of the base's predictions on held-out text that are kept from one look to the next."""


@dataclass(frozen=True)
class TuneConfig:
    """Settings of a run. Steps, rate, warm-up, clipping and batch are the paper's; the weights are ours.

    Attributes
    ----------
    local_warm_up
        Steps in which the weight of the locality losses rises from 0 to 1 (s_warm).
    window
        Tokens of a window of `window_loss` (W).
    micro_batch, accumulation
        Sequences computed at once by one process, and how often, for one step.
    check_every
        Steps between looks at held-out text.
    max_ppl_increase, max_kl
        What a state may cost on held-out text to be kept: relative increase of perplexity; mean KL(base || tuned) of
        the next token, in nats. None: no guard.
    patience
        Looks in a row that break a guard before the run ends early.
    schedule
        What the rate does after its warm-up: one of `SCHEDULES`. The paper names none but the warm-up.
    """

    steps: int = 2000
    learning_rate: float = 5e-5
    warm_up: int = 200
    local_warm_up: int = 200
    clip: float = 1.0
    micro_batch: int = 1
    accumulation: int = 8
    weights: Weights = field(default_factory=Weights)
    window: int = 64
    seed: int = 0
    check_every: int = 50
    max_ppl_increase: float | None = 0.01
    max_kl: float | None = None
    patience: int = 4
    schedule: str = "constant"


@dataclass(frozen=True)
class Check:
    """Held-out figures at one step; `kl` is the mean KL(base || tuned) of the next token, in nats."""

    step: int
    ppl: float
    kl: float
    reuse_rate: float


@dataclass(frozen=True)
class TuneResult:
    """The chosen state and how it was found.

    Attributes
    ----------
    router
        FP32 tensors by the name they have in a checkpoint.
    before, after
        Held-out figures of the base and of the chosen state.
    stopped
        Why the run ended before its last step; None if it did not.
    frozen_sha256
        Hash over everything but the routers, the same before and after.
    """

    router: dict[str, Tensor]
    before: Check
    after: Check
    checks: list[Check]
    stopped: str | None
    frozen_sha256: str


def tune(
    moe: MoE,
    train: Sequences,
    held_out: Sequences,
    config: TuneConfig,
    *,
    folder: Path | None = None,
    accelerator: Accelerator | None = None,
    autocast: torch.dtype | None = None,
    report: Report = silent,
    on_step: Callable[[dict[str, Any]], None] = lambda _row: None,
) -> TuneResult:
    """Tune the routers of `moe` and leave the chosen ones in it.

    Parameters
    ----------
    folder
        Where the run keeps its checkpoint and `log.jsonl`; it goes on from what is there. None: nothing is kept.
    autocast
        Type of matrix products outside of routers, for models in FP32; None: the model's own.
    on_step
        Called with every line of the log.

    Raises RemoeError when a loss is not finite and no state was good before, when memory runs out, and for a folder
    whose run had other settings.
    """
    accelerator = accelerator or join_processes()
    frozen = _frozen_hash(moe)
    run = _Run(moe, train, held_out, config, accelerator, autocast, frozen)
    state = _State()
    if folder is not None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        state = run.restore(folder)
    if not state.checks:
        state.checks.append(run.check(0))
        state.keep(run, config)
    with contextlib.ExitStack() as stack:
        logs = folder is not None and accelerator.is_main_process
        log = stack.enter_context(open(folder / LOG, "ab")) if folder and logs else None
        first, saved = state.step, time.monotonic()
        while state.step < config.steps and state.stopped is None:
            row = run.step(state.step)
            state.step += 1
            if not math.isfinite(row["loss"]):
                state.stopped = f"the loss of step {state.step} is {row['loss']}"
                break
            if state.step % config.check_every == 0 or state.step == config.steps:
                state.checks.append(run.check(state.step))
                state.keep(run, config)
                row["held_out"] = asdict(state.checks[-1])
            if accelerator.is_main_process:
                if log:
                    append_line(log, row)
                on_step(row)
                if folder is not None and ("held_out" in row or time.monotonic() - saved >= SECONDS_AT_RISK):
                    run.save(folder, state)
                    saved = time.monotonic()
            report(_progress_text(row, state), (state.step - first) / (config.steps - first))
    after = _hash_equal(moe, frozen)
    run.load(state.best)
    return TuneResult(
        router={name: tensor.clone() for name, tensor in state.best.items()},
        before=state.checks[0],
        after=next(check for check in state.checks if check.step == state.best_step),
        checks=state.checks,
        stopped=state.stopped,
        frozen_sha256=after,
    )


def _progress_text(row: dict[str, Any], state: _State) -> str:
    best = next(check for check in state.checks if check.step == state.best_step)
    base = state.checks[0].reuse_rate
    return (
        f"step {row['step']}: loss {row['loss']:.3f}, reuse {row['reuse_rate']:.1%} "
        f"(kept: {best.reuse_rate / max(base, 1e-9) - 1:+.1%})"
    )


def join_processes() -> Accelerator:
    """This process among those that torchrun started, if it did; on CPUs, too, which accelerate wants to be told."""
    return Accelerator(cpu=not torch.accelerator.is_available())


def rate_at(step: int, config: TuneConfig) -> float:
    """Part of the learning rate that optimiser step `step`, from 0, uses."""
    if step < config.warm_up:
        return (step + 1) / config.warm_up
    left = 1 - (step - config.warm_up) / max(1, config.steps - config.warm_up)
    if config.schedule == "linear":
        return left
    if config.schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    return 1.0


@dataclass
class _State:
    """What a run carries from step to step, beside weights and optimiser."""

    step: int = 0
    checks: list[Check] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    broken: int = 0
    stopped: str | None = None

    def keep(self, run: _Run, config: TuneConfig) -> None:
        """Keep the state if it obeys the guards and reuses more than the one kept; end a run that no longer obeys."""
        base, now = self.checks[0], self.checks[-1]
        obeys = all(map(math.isfinite, (now.ppl, now.kl)))
        if config.max_ppl_increase is not None:
            obeys &= now.ppl <= base.ppl * (1 + config.max_ppl_increase)
        if config.max_kl is not None:
            obeys &= now.kl <= config.max_kl
        self.broken = 0 if obeys else self.broken + 1
        kept = next((check for check in self.checks if check.step == self.best_step), base)
        # Without locality there is nothing to choose by: the control ends where it ends.
        better = now.reuse_rate > kept.reuse_rate if config.weights.local else True
        if not self.best or (obeys and better):
            self.best = {name: p.detach().float().cpu().clone() for name, p in run.parameters.items()}
            self.best_step = now.step
        if self.broken >= config.patience:
            self.stopped = (
                f"{self.broken} looks at held-out text in a row broke a guard (perplexity "
                f"{now.ppl / base.ppl - 1:+.2%}, KL {now.kl:.4f})"
            )


class _Run:
    """One run's model, optimiser and data."""

    def __init__(
        self,
        moe: MoE,
        train: Sequences,
        held_out: Sequences,
        config: TuneConfig,
        accelerator: Accelerator,
        autocast: torch.dtype | None,
        frozen: str,
    ) -> None:
        self.moe, self.train, self.held_out, self.config, self.frozen = moe, train, held_out, config, frozen
        self.accelerator, self.autocast = accelerator, autocast
        self.parameters = moe.router_parameters()
        for parameter in moe.model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        moe.model.eval()
        for module in moe.model.modules():
            # Layers save memory in training mode only; what is inside them stays as it is, without dropout and jitter.
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                module.training = True
        self.reference = {name: p.detach().clone() for name, p in self.parameters.items()}
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=config.learning_rate, weight_decay=0.0)
        # Offloaded weights are empty where they stand, and cannot be moved.
        placed = hasattr(moe.model, "hf_device_map") or any(p.is_meta for p in moe.model.parameters())
        self.model, self.optimizer = accelerator.prepare(moe.model, optimizer, device_placement=[not placed, True])
        self._orders: dict[int, Tensor] = {}
        self._base_logs: dict[int, Tensor] = {}

    @cached_property
    def digest(self) -> str:
        """Of all that makes a run what it is: settings, data, model, and how it is computed."""
        how = [self.accelerator.num_processes, str(self.autocast), str(next(self.moe.model.parameters()).dtype)]
        said = json.dumps([asdict(self.config), self.frozen, how], sort_keys=True).encode()
        parts = [said, self.train.ids.tobytes(), self.held_out.ids.tobytes(), self.train.learn.tobytes()]
        parts += [tensor.cpu().numpy().tobytes() for tensor in self.reference.values()]
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def step(self, step: int) -> dict[str, Any]:
        """One optimiser step; the line of the log."""
        config, begin = self.config, time.monotonic()
        rate = config.learning_rate * rate_at(step, config)
        rising = min(1.0, (step + 1) / max(1, config.local_warm_up))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        totals: dict[str, float] = dict.fromkeys((*TERMS, "loss", "reuse_rate"), 0.0)
        batches = list(self._batches(step))
        for index, rows in enumerate(batches):
            last = index + 1 == len(batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                terms, reuse = self._terms(rows)
                loss = self._weigh(terms, rising) / len(batches)
                with _clear_memory_errors(self.config):
                    self.accelerator.backward(loss)
            for name, value in terms.items():
                totals[name] += float(value.detach()) / len(batches)
            totals["loss"] += float(loss.detach())
            totals["reuse_rate"] += reuse / len(batches)
        # Of all processes, so that they agree on what the log says and on whether to go on.
        totals = dict(zip(totals, self._mean(list(totals.values())), strict=True))
        norm = self.accelerator.clip_grad_norm_(list(self.parameters.values()), config.clip)
        if math.isfinite(totals["loss"]):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "step": step + 1,
            **totals,
            "grad_norm": float(norm),
            "lr": rate,
            "local_weight": rising,
            "seconds": time.monotonic() - begin,
        }

    def _mean(self, values: list[float]) -> list[float]:
        """Of the same figures of all processes."""
        if self.accelerator.num_processes == 1:
            return values
        mine = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        reduced: Tensor = self.accelerator.reduce(mine, "mean")
        return reduced.tolist()

    def _batches(self, step: int) -> Iterator[Any]:
        """Rows of the training set for this process: every step goes on where the last one ended, epoch by epoch."""
        config, world = self.config, self.accelerator.num_processes
        size = config.micro_batch * world
        for index in range(config.accumulation):
            first = (step * config.accumulation + index) * size
            places = (divmod(position, len(self.train)) for position in range(first, first + size))
            order = [int(self._order(epoch)[place]) for epoch, place in places]
            yield order[self.accelerator.process_index :: world]

    def _order(self, epoch: int) -> Tensor:
        """All rows of the training set, shuffled by seed and epoch."""
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self.config.seed * 100_003 + epoch)
            self._orders = {epoch: torch.randperm(len(self.train), generator=generator)}
        return self._orders[epoch]

    def _forward(self, ids: Tensor) -> Tensor:
        kind = self.accelerator.device.type
        with (
            torch.autocast(kind, self.autocast, enabled=self.autocast is not None),
            _clear_memory_errors(self.config),
            # A second pass that ends early would leave experts that it fetched from host memory on the accelerator.
            set_checkpoint_early_stop(False),
        ):
            model = self.model if torch.is_grad_enabled() else self.moe.model
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    def _terms(self, rows: list[int]) -> tuple[dict[str, Tensor], float]:
        """All losses of some rows, without weights, and their reuse rate."""
        weights = self.config.weights
        ids = torch.from_numpy(self.train.ids[rows]).to(self.accelerator.device)
        learn = torch.from_numpy(self.train.learn[rows]).to(ids.device)
        with record(self.moe) as routings:
            logits = self._forward(ids[:, :-1])
        entropy = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        parts: dict[str, list[Tensor]] = {name: [] for name in TERMS[1:]}
        reuse = 0.0
        for router, routing in zip(self.moe.routers, routings, strict=True):
            shape = (len(rows), ids.shape[1] - 1, -1)
            probs, chosen = routing.probs.view(shape), routing.ids.view(shape)
            reuse += reuse_rate(chosen) / len(routings)
            if weights.kl:
                with torch.no_grad():
                    old = [self.reference[name].to(routing.hidden.device) for name in router.parameters]
                    reference = F.linear(routing.hidden, *old)
                parts["kl"].append(trust_loss(routing.logits, reference))
            if weights.reuse:
                parts["reuse"].append(reuse_loss(probs, chosen))
            if weights.smooth:
                parts["smooth"].append(smooth_loss(probs))
            if weights.lag:
                parts["lag"].append(lag_loss(probs))
            if weights.window:
                parts["window"].append(window_loss(probs, self.config.window))
        count = learn.sum().clamp(min=1)
        terms = {"ce": (entropy * learn.flatten()).sum() / count}
        for name, values in parts.items():
            terms[name] = (
                torch.stack([value.to(entropy.device) for value in values]).mean() if values else entropy.new_zeros(())
            )
        return terms, reuse

    def _weigh(self, terms: dict[str, Tensor], rising: float) -> Tensor:
        weights = asdict(self.config.weights)
        parts = [
            term * weights[name] * (1.0 if name in ("ce", "kl") else rising)
            for name, term in terms.items()
            if weights[name]
        ]
        return torch.stack(parts).sum()

    @torch.no_grad()
    def check(self, step: int) -> Check:
        """Figures on held-out text, beside those of the base router on the same tokens; processes share the rows."""
        entropy, divergence, reuse, count = 0.0, 0.0, 0.0, 0
        size, processes = self.config.micro_batch, self.accelerator.num_processes
        for start in range(self.accelerator.process_index * size, len(self.held_out), size * processes):
            ids = torch.from_numpy(self.held_out.ids[start : start + self.config.micro_batch])
            ids = ids.to(self.accelerator.device)
            # Not through the wrapper of several processes: some may have a row less than others.
            with record(self.moe) as routings:
                logits = self._forward(ids[:, :-1])
            logs = logits.float().log_softmax(-1)
            entropy += float(F.nll_loss(logs.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            chosen = [routing.ids.view(len(ids), ids.shape[1] - 1, -1) for routing in routings]
            reuse += sum(map(reuse_rate, chosen)) / len(chosen) * len(ids)
            if step > 0:
                base = self._base(start, ids)
                divergence += float((base.exp() * (base - logs)).sum())
            count += ids[:, 1:].numel()
        entropy, divergence, reuse, count_mean = self._mean([entropy, divergence, reuse, float(count)])
        # An exponent too large for a float is as bad as one that is not a number.
        ppl = math.exp(entropy / count_mean) if entropy / count_mean < 700 else math.inf
        return Check(step, ppl, divergence / count_mean, reuse * processes / len(self.held_out))

    def _base(self, start: int, ids: Tensor) -> Tensor:
        """Log probabilities of the base on the held-out rows from `start` on."""
        if start in self._base_logs:
            return self._base_logs[start].to(ids.device)
        tuned = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.load(self.reference)
        logs = self._forward(ids[:, :-1]).float().log_softmax(-1)
        self.load(tuned)
        if logs.nbytes * len(self.held_out) <= _MAX_KEPT_LOGITS * len(ids) * self.accelerator.num_processes:
            self._base_logs[start] = logs.cpu()
        return logs

    @torch.no_grad()
    def load(self, router: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(router[name])

    def save(self, folder: Path, state: _State) -> None:
        """Everything that the next step depends on, in one file that is whole or not there."""
        tensors = {f"router.{name}": p.detach().cpu() for name, p in self.parameters.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in state.best.items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value).cpu() for key, value in values.items()}
        said = {
            "run": self.digest,
            "step": state.step,
            "best_step": state.best_step,
            "broken": state.broken,
            "stopped": state.stopped,
            "checks": [asdict(check) for check in state.checks],
        }
        with atomic_output(folder / CHECKPOINT, force=True) as temporary:
            # Its save_file makes a temporary file of its own, which a killed process leaves.
            temporary.write_bytes(save({n: t.contiguous() for n, t in tensors.items()}, {"state": json.dumps(said)}))

    def restore(self, folder: Path) -> _State:
        """Go on from a checkpoint, if there is one of the same run."""
        path = folder / CHECKPOINT
        found = [float(path.exists())]
        if self._mean(found) != found:
            raise RemoeError(f"{folder}: some machines see a checkpoint there, others do not; --work must be shared")
        if not path.exists():
            if self.accelerator.is_main_process:
                # Of a run that was killed before its first checkpoint.
                (folder / LOG).unlink(missing_ok=True)
            return _State()
        try:
            with safe_open(path, "pt") as file:
                said = json.loads((file.metadata() or {}).get("state", "{}"))
            tensors = load_file(path)
        except (SafetensorError, ValueError) as error:
            raise RemoeError(f"{path}: is damaged ({error}); remove {folder} to begin again") from error
        if said.get("run") != self.digest:
            raise RemoeError(
                f"{folder}: holds a run with other settings, data or model; give another folder, or remove it"
            )
        self.load({name: tensors[f"router.{name}"] for name in self.parameters})
        optimizer = self.optimizer.state_dict()
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                index, key = name.split(".")[1:]
                optimizer["state"].setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(optimizer)
        best = {name: tensors[f"best.{name}"] for name in self.parameters}
        checks = [Check(**check) for check in said["checks"]]
        # Lines of steps after the checkpoint are made again.
        if self.accelerator.is_main_process:
            log = folder / LOG
            lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
            with atomic_output(log, force=True) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines[: said["step"]]), encoding="utf-8")
        return _State(said["step"], checks, best, said["best_step"], said["broken"], said["stopped"])


@contextlib.contextmanager
def _clear_memory_errors(config: TuneConfig) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RemoeError(
            f"the accelerator has too little memory for {config.micro_batch} sequence(s) at once: use a smaller "
            "--micro-batch (with more --accumulation) or --length, --gradient-checkpointing, or --experts-on-cpu"
        ) from error


def _frozen_hash(moe: MoE) -> str:
    """sha256 over every parameter and buffer that is no router's."""
    own = {id(parameter) for parameter in moe.router_parameters().values()}
    digest = hashlib.sha256()
    for place, module in sorted(moe.model.named_modules(), key=lambda named: named[0]):
        with _fetched(module):
            named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in named:
                if id(tensor) not in own:
                    digest.update(f"{place}.{name}".encode())
                    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def _fetched(module: Any) -> Iterator[None]:
    """Weights that accelerate keeps elsewhere are in the module only while it computes; or here."""
    if not any(tensor.is_meta for tensor in module.parameters(recurse=False)):
        yield
        return
    module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        module._hf_hook.post_forward(module, None)


def _hash_equal(moe: MoE, before: str) -> str:
    after = _frozen_hash(moe)
    if after != before:
        raise RemoeError("weights other than the routers' have changed, which must not happen; the result is not kept")
    return after
