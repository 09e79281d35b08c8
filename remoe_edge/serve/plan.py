"""What a server will take of the machine: context, slots, threads, and who gets how much of the memory.

Sizes of KV cache and compute buffers are those that llama.cpp itself gives for this model (`llama-fit-params`), so they
hold for every architecture; weights are counted in the file.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.layout import Layout, align
from remoe_edge.gguf_io.runnable import check_runnable
from remoe_edge.measure.worker import process_memory
from remoe_edge.runtime.budget import MOST_READERS, READERS, cache_bytes, expert_groups, least_slots, most_slots
from remoe_edge.runtime.build import Runtime
from remoe_edge.runtime.gpu import Device, layers_on_gpu
from remoe_edge.runtime.llama import POLICIES, CacheConfig, default_threads, load_model
from remoe_edge.sizes import format_size, parse_size

CHATML = Path(__file__).parent / "chatml.jinja"
"""For models without a template of their own; unlike llama.cpp's default it knows tools."""

_MIB = 1 << 20
_CONTEXTS = (32768, 16384, 8192, 4096, 2048, 1024, 512)
"""Contexts to choose from, in tokens of each slot; a model's own limit is tried as well."""

_CONTEXT_SHARE = 4
"""A chosen context takes at most this part of the memory that weights leave: the rest holds experts."""

_BYTES_PER_TOKEN = 32
"""A request with more bytes of text than this per token of its context cannot fit into it."""

_LEAST_REQUEST = _MIB
REQUESTS_AT_ONCE = 2
"""Bodies of this many largest requests may be here at a time; most are far smaller."""
_REQUEST_COPIES = 6
"""How often a request lies in memory while it is parsed: bytes, text, JSON, prompt, tokens."""

_PROCESS = 48 * _MIB
_FRONT, _FRONT_MARGIN, _FRONT_STEP = 64 * _MIB, 16 * _MIB, 8 * _MIB
"""Room for the front: the first, or what this process takes and a margin, rounded up to a step, if that is more. It is
rounded so that a limit that is accepted once is accepted always."""

_OBJECTS = 64 << 10
"""C++ objects of the cache may be larger elsewhere than where `cache_bytes` learned their sizes."""
_REPACK_ROOM = 500, 16 * _MIB
"""The runtime repacks experts of its own accord if the budget has one part in so many, and so many bytes, to spare."""

_TOOL_TIMEOUT_S = 120


@dataclass(frozen=True)
class Options:
    """What the user asked for; None leaves the choice to `make_plan`.

    Attributes
    ----------
    ctx
        Tokens of each slot.
    memory
        Bytes that everything together may take.
    prompt_cache
        Bytes for the states of prompts that have lost their slot.
    queue
        Requests that may wait for a slot.
    max_request
        Largest body of a request, in bytes.
    """

    model: Path
    cache: CacheConfig | None = None
    slots: int = 2
    ctx: int | None = None
    threads: int | None = None
    memory: int | None = None
    prompt_cache: int = 0
    queue: int = 16
    max_request: int | None = None
    embeddings: bool = False
    chat_template: Path | None = None
    alias: str | None = None
    gpu_layers: int | str = "auto"


@dataclass(frozen=True)
class Plan:
    """What was decided. Sizes in bytes.

    Attributes
    ----------
    ctx, n_ctx_train
        Tokens of each slot, and those the model was trained on.
    cache
        Budget "off" for a model without experts.
    budget
        Of the expert cache; None if the runtime finds it at start (`cache.budget` tells how) or there is none.
    weights
        Kept in memory: all but the experts, if there is a cache.
    kv_cache, compute
        As llama.cpp counts them.
    process, front
        What the model process takes beside that, requests being parsed included; and this one, with a margin.
    expert_bytes
        Of all experts in the file.
    pools
        Whether the model says how embeddings of tokens become one.
    chat_template
        A Jinja file; None for the model's own.
    """

    model: Path
    alias: str
    slots: int
    ctx: int
    n_ctx_train: int
    threads: int
    queue: int
    max_request: int
    embeddings: bool
    pools: bool
    chat_template: Path | None
    cache: CacheConfig
    memory: int | None
    budget: int | None
    weights: int
    kv_cache: int
    compute: int
    prompt_cache: int
    process: int
    front: int
    expert_bytes: int
    gpu_layers: int | str = "auto"

    @property
    def fixed(self) -> int:
        """All but the expert cache."""
        return self.weights + self.kv_cache + self.compute + self.prompt_cache + self.process + self.front

    @property
    def model_memory(self) -> int | None:
        """What of `memory` the model process may take; None without a limit."""
        return None if self.memory is None else self.memory - self.front

    def command(self, program: Path, socket: Path) -> list[str]:
        """The model process, listening on a Unix socket."""
        cache = {
            "--expert-cache": self.cache.budget if self.budget is None else str(self.budget),
            "--expert-cache-policy": self.cache.policy,
            "--expert-cache-io": self.cache.io,
            "--expert-cache-threads": self.cache.threads,
            "--expert-prefetch": self.cache.prefetch,
            "--expert-cache-repack": self.cache.repack,
            "--expert-cache-warm": self.cache.warm,
        }
        flags = {
            "--model": self.model,
            "--alias": self.alias,
            "--host": socket,
            "--parallel": self.slots,
            "--ctx-size": self.ctx * self.slots,
            "--threads": self.threads,
            "--gpu-layers": None if self.gpu_layers == "auto" else self.gpu_layers,
            "--chat-template-file": self.chat_template,
            "--cache-ram": -(-self.prompt_cache // _MIB),
            # A request holds a thread from its arrival to its end; a few more answer health and metrics meanwhile.
            "--threads-http": self.slots + self.queue + 4,
            **(cache if self.cache.enabled else {}),
        }
        command = [str(program)]
        for flag, value in flags.items():
            if value is not None:
                command += [flag, str(value)]
        # The plan is ours: no fitting by llama.cpp. Contexts are apart, so that one client cannot fill another's.
        command += ["--no-kv-unified", "--fit", "off", "--no-ui", "--metrics", "--no-slots", "--no-log-timestamps"]
        if self.cache.enabled and self.cache.verify:
            command.append("--expert-cache-verify")
        if self.embeddings:
            command.append("--embeddings")
            # A model that is no embedding model does not say how: the mean over its tokens.
            command += [] if self.pools else ["--pooling", "mean"]
        return command

    def fields(self) -> dict[str, Any]:
        """Plain values for JSON."""
        template = None if self.chat_template is None else str(self.chat_template)
        return {**asdict(self), "model": str(self.model), "chat_template": template, "fixed": self.fixed}


def make_plan(options: Options, runtime: Runtime) -> Plan:
    """Decide. Raises RemoeError with the numbers if the memory cannot be enough, or the model cannot be read."""
    layouts = check_runnable(options.model)
    model = _Model(layouts)
    cache = options.cache or CacheConfig("auto" if model.experts else "off")
    if cache.enabled and not model.experts:
        raise RemoeError(f"{options.model}: the model has no experts to cache; leave out --expert-cache")
    if options.gpu_layers not in ("auto", 0):
        layers_on_gpu(options.gpu_layers, _devices(runtime))
    least = model.least_budget(cache) if cache.enabled else 0
    ctx_limit = model.n_ctx_train
    if options.ctx and options.ctx > ctx_limit:
        raise RemoeError(f"{options.model}: was trained on contexts of {ctx_limit} tokens; lower --ctx {options.ctx}")

    def draft(ctx: int) -> Plan:
        kv_cache, compute = _context_memory(runtime, options, ctx)
        max_request = options.max_request or max(_LEAST_REQUEST, _BYTES_PER_TOKEN * ctx)
        return Plan(
            model=options.model,
            alias=options.alias or options.model.stem,
            slots=options.slots,
            ctx=ctx,
            n_ctx_train=model.n_ctx_train,
            threads=options.threads or default_threads(),
            gpu_layers=options.gpu_layers,
            queue=options.queue,
            max_request=max_request,
            embeddings=options.embeddings,
            pools=model.pools,
            chat_template=options.chat_template or (None if model.has_chat_template else CHATML),
            cache=cache,
            memory=options.memory,
            budget=None,
            weights=model.dense if cache.enabled else model.dense + model.experts,
            kv_cache=kv_cache,
            compute=compute,
            prompt_cache=options.prompt_cache,
            process=_PROCESS + _REQUEST_COPIES * REQUESTS_AT_ONCE * max_request,
            front=max(_FRONT, align(process_memory(os.getpid()) + _FRONT_MARGIN, _FRONT_STEP))
            + 2 * REQUESTS_AT_ONCE * max_request,
            expert_bytes=model.experts,
        )

    memory = options.memory or _available_memory()
    plan = draft(options.ctx) if options.ctx else _largest_context(draft, ctx_limit, memory, least)
    if options.memory is None:
        return plan
    left = options.memory - plan.fixed
    if left < least:
        raise RemoeError(_too_small(plan, least))
    if not cache.enabled or cache.budget != "auto":
        return plan
    return replace(plan, budget=min(left, model.whole_budget(cache)))


def _largest_context(draft: Callable[[int], Plan], limit: int, memory: int, least: int) -> Plan:
    choices = sorted({limit, *(ctx for ctx in _CONTEXTS if ctx < limit)}, reverse=True)
    if limit > _CONTEXTS[0]:
        choices.remove(limit)
    for ctx in choices:
        plan = draft(ctx)
        context = plan.kv_cache + plan.compute
        rest = memory - (plan.fixed - context)
        if context <= max(0, rest) // _CONTEXT_SHARE and rest - context >= least:
            return plan
    return plan


def _too_small(plan: Plan, least: int) -> str:
    assert plan.memory is not None
    needed = align(plan.fixed + least, _MIB) // _MIB
    chosen, lower = parts(plan), ["--ctx", "--slots", "--max-request"]
    if plan.cache.budget == "auto":
        chosen["expert cache at least"] = least
    elif plan.cache.enabled:
        chosen["expert cache"] = least
        lower.append("--expert-cache")
    return (
        f"--memory {format_size(plan.memory)} is not enough for {plan.model.name} with {plan.slots} slots of "
        f"{plan.ctx} tokens: {', '.join(f'{name} {format_size(size)}' for name, size in chosen.items())}; "
        f"give --memory {needed}MiB, or lower {', '.join(lower[:-1])} or {lower[-1]}"
    )


def parts(plan: Plan) -> dict[str, int]:
    """The fixed parts of the memory by name, without those that take nothing."""
    named = {
        "weights": plan.weights,
        "KV cache": plan.kv_cache,
        "compute": plan.compute,
        "prompt cache": plan.prompt_cache,
        "process": plan.process,
        "front": plan.front,
    }
    return {name: size for name, size in named.items() if size}


class _Model:
    """What the plan needs to know of a GGUF."""

    def __init__(self, layouts: list[Layout]) -> None:
        first = layouts[0]
        architecture = first.text("general.architecture") or "?"
        tensors = [tensor for layout in layouts for tensor in layout.tensors.values()]
        self._path = first.path
        self._quantised = any(tensor.type.block > 1 for tensor in tensors if tensor.experts)
        self.experts = sum(tensor.nbytes for tensor in tensors if tensor.experts)
        self._groups = expert_groups(layouts) if self.experts else []
        self.dense = sum(tensor.nbytes for tensor in tensors if not tensor.experts)
        named = {tensor.name: tensor for tensor in tensors}
        if "output.weight" not in named and "token_embd.weight" in named:
            # Tied: the output may be kept a second time, rearranged for this CPU's kernels.
            self.dense += named["token_embd.weight"].nbytes
        self.pools = f"{architecture}.pooling_type" in first.fields
        self.has_chat_template = "tokenizer.chat_template" in first.fields
        self.n_ctx_train = first.integer(f"{architecture}.context_length") or _CONTEXTS[-1]

    def least_budget(self, cache: CacheConfig) -> int:
        """Bytes that the cache takes at least: what was asked for, or its floor.

        Raises RemoeError for less than the floor, which the runtime would refuse once the model is loaded.
        """
        fewest = least_slots(self._groups)
        floor = self._bytes(cache, fewest)
        if cache.budget == "auto":
            return floor + _OBJECTS
        slots = re.fullmatch(r"(\d+)s", cache.budget)
        asked = self._bytes(cache, int(slots[1])) if slots else parse_size(cache.budget)
        if asked < floor:
            raise RemoeError(
                f"{self._path}: --expert-cache {cache.budget} is below the floor of this model: give at least "
                f"{align(floor + _OBJECTS, _MIB) // _MIB}MiB, or {fewest}s: {fewest} experts of each of "
                f"{len(self._groups)} layers are used for every token"
            )
        return asked

    def whole_budget(self, cache: CacheConfig) -> int:
        """Bytes beyond which a budget buys nothing: for all experts, repacked or not."""
        part, more = _REPACK_ROOM
        plain, repacked = (self._bytes(cache, most_slots(self._groups), repack) for repack in (False, True))
        return max(plain, repacked, self.experts + self.experts // part + more) + _OBJECTS

    def _bytes(self, cache: CacheConfig, slots: int, repack: bool | None = None) -> int:
        return cache_bytes(
            self._groups,
            min(slots, most_slots(self._groups)),
            cache.policy or POLICIES[0],
            MOST_READERS if cache.threads == "auto" else int(cache.threads or READERS),
            checksums=bool(cache.verify),
            repack=self._quantised and (cache.repack == "on" if repack is None else repack),
        )


def _context_memory(runtime: Runtime, options: Options, ctx: int) -> tuple[int, int]:
    """Bytes of KV cache and of compute buffers, rounded up to MiB; with a GPU both its and the host's.

    That is what they take where CPU and GPU share one memory. A card of its own has its part in its own memory, so
    there the plan counts more than the host needs.
    """
    command = [str(runtime.bin_dir / "llama-fit-params"), "--model", str(options.model), "--fit-print", "on"]
    command += [] if options.gpu_layers == "auto" else ["--gpu-layers", str(options.gpu_layers)]
    command += ["--parallel", str(options.slots), "--ctx-size", str(ctx * options.slots)]
    try:
        # Without a debugger's account of where it gave up.
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TOOL_TIMEOUT_S, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise RemoeError(f"{options.model}: llama-fit-params did not end within {_TOOL_TIMEOUT_S} s") from error
    # A line for each device, and one for the host: MiB of weights, context and compute buffers.
    found = re.findall(r"^\S+ \d+ (\d+) (\d+) *$", done.stdout, re.MULTILINE)
    if done.returncode or not found:
        # The tool does not say why; loading does.
        with load_model(options.model):
            raise RemoeError(f"{options.model}: llama-fit-params failed with status {done.returncode}")
    kv_cache, compute = (sum(int(mib) + 1 for mib in column) for column in zip(*found, strict=True))
    return kv_cache * _MIB, compute * _MIB


def _devices(runtime: Runtime) -> list[Device]:
    """GPUs that the model process will see; asked of it, so that this process needs no driver's memory."""
    command = [str(runtime.bin_dir / "llama-server"), "--list-devices"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TOOL_TIMEOUT_S)
    lines = re.findall(r"^  (\w+): (.+) \((\d+) MiB, (\d+) MiB free\)$", done.stdout, re.MULTILINE)
    return [
        Device(name, description, name.rstrip("0123456789"), int(free) * _MIB, int(total) * _MIB)
        for name, description, total, free in lines
    ]


def _available_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
