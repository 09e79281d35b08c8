"""What a benchmark compares, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from remoe_edge.measure.workloads import Workload
from remoe_edge.runtime.llama import CacheConfig

BASELINES = ("mmap", "resident")
PAGE_CACHES = ("cold", "warm")


@dataclass(frozen=True)
class Options:
    """What to compare.

    Attributes
    ----------
    models
        GGUFs, each measured in every way.
    workload
        Prompts that every arm decodes, each in a process of its own.
    n_gen
        Tokens to choose after each prompt; the model's end token does not end it.
    budgets
        Of the expert cache: bytes ("880MiB"), slots per layer ("16s"), or "auto".
    policies, read_modes, prefetches, cache_threads
        Of the expert cache, as in `CacheConfig`; every budget is measured with every combination.
    verify_reads
        Every run of the expert cache compares what it reads with checksums (`CacheConfig.verify`).
    warm
        Hot set that every run of the expert cache starts from; the file stays as it is.
    route_biases, route_keep
        Lossy: other experts are chosen than the model's, as in `CacheConfig`; None: the model's own. Every budget is
        measured with each.
    baselines
        "mmap": stock llama.cpp, experts in the page cache. "resident": all experts in memory, without a memory limit.
    gpu_layers
        As in `layers_on_gpu`, for "cache" and "resident" runs. "mmap" is on the CPU: a GPU takes copies of weights.
    repack
        Use the repacked kernels that llama.cpp chooses for this CPU in "cache" and "resident" runs; "mmap" cannot,
        since repacked weights are a copy in memory. Outputs of different kernels differ in their last bits.
    memory_limit
        Bytes that runs other than resident ones may take, page cache included.
    page_cache
        State before each run: "cold", dropped where permitted; "warm", the model's files read through once.
    power
        Sensor, as in `find_source`.
    cool_down_s
        Longest wait before a run for the chip to be about as cool as before the first; 0 does not wait.
    """

    models: Sequence[Path]
    workload: Workload
    n_gen: int
    n_threads: int
    budgets: Sequence[str] = ("auto",)
    baselines: Sequence[str] = ()
    repack: bool = False
    repetitions: int = 1
    memory_limit: int | None = None
    policies: Sequence[str | None] = (None,)
    read_modes: Sequence[str | None] = (None,)
    prefetches: Sequence[str | None] = (None,)
    route_biases: Sequence[float | None] = (None,)
    route_keep: int | None = None
    cache_threads: int | str | None = None
    verify_reads: bool = False
    warm: Path | None = None
    page_cache: str = "cold"
    power: str = "auto"
    cool_down_s: float = 60.0
    gpu_layers: int | str = 0


@dataclass(frozen=True)
class Arm:
    """One way to hold the experts of one model.

    `budget`, `policy`, `read_mode`, `prefetch`, `route_bias` and `route_keep` are None except for "cache".
    """

    name: str
    model: Path
    budget: str | None = None
    policy: str | None = None
    read_mode: str | None = None
    prefetch: str | None = None
    route_bias: float | None = None
    route_keep: int | None = None
    repack: bool = False

    @property
    def label(self) -> str:
        prefetch = f"prefetch {self.prefetch}" if self.prefetch else None
        bias = f"route bias {self.route_bias:g}" if self.route_bias else None
        repacked = "repacked" if self.repack else None
        parts = (self.name, self.budget, self.policy, self.read_mode, prefetch, bias, repacked)
        return f"{self.model.name}, {' '.join(part for part in parts if part)}"

    def cache(self, options: Options) -> CacheConfig:
        if self.budget is None:
            return CacheConfig("off")
        repack = "on" if self.repack else None
        return CacheConfig(
            self.budget,
            self.policy,
            self.read_mode,
            options.cache_threads,
            self.prefetch,
            repack,
            self.route_bias,
            self.route_keep,
            verify=options.verify_reads or None,
            warm=None if options.warm is None else str(options.warm),
        )


@dataclass(frozen=True)
class Turn:
    """One run to make: indices of the arm and of the prompt, and the repetition."""

    arm: int
    prompt: int
    repetition: int


def plan_arms(options: Options) -> list[Arm]:
    """The arms of all models, by model."""
    arms = []
    for model in options.models:
        ways = product(options.budgets, options.policies, options.read_modes, options.prefetches, options.route_biases)
        for budget, policy, read_mode, prefetch, bias in ways:
            keep = None if bias is None else options.route_keep
            arms.append(Arm("cache", model, budget, policy, read_mode, prefetch, bias, keep, options.repack))
        arms += [Arm(name, model, repack=options.repack and name == "resident") for name in options.baselines]
    return list(dict.fromkeys(arms))


def schedule(arms: int, prompts: int, repetitions: int) -> Iterator[Turn]:
    """All runs. Arms take turns on each prompt, every other time in reverse (ABBA).

    What drifts, such as heat or other load, then touches all arms alike.
    """
    for block, (repetition, prompt) in enumerate(product(range(repetitions), range(prompts))):
        order = range(arms) if block % 2 == 0 else range(arms)[::-1]
        for arm in order:
            yield Turn(arm, prompt, repetition)
