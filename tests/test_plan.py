"""Planning on a small model whose sizes are known, and the arithmetic it stands on against the runtime's."""

import json
import os
import platform
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from small_twin import small_trace, write_small_twin
from tiny_models import MOE_ARCHITECTURES, write_tiny_model

from remoe_edge.commands.plan import command
from remoe_edge.device.memory import available
from remoe_edge.errors import RemoeError
from remoe_edge.gguf_io.layout import read_model
from remoe_edge.measure.memory_speed import memory_bandwidth
from remoe_edge.measure.plan import STEP, Plan, choose_policy, make_plan
from remoe_edge.routing.simulate import simulate
from remoe_edge.routing.trace import save_trace
from remoe_edge.runtime import budget as runtime_budget
from remoe_edge.runtime.budget import cache_bytes, expert_groups, floor_bytes, least_slots, most_slots, slots_for
from remoe_edge.runtime.footprint import footprint
from remoe_edge.runtime.llama import POLICIES, CacheConfig, load_model
from remoe_edge.runtime.pin import patches_dir

MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_twin(tmp_path_factory.mktemp("plan") / "small.gguf")


def plan_with_slots(model: Path, slots: int, policy: str = "lru", **options: object) -> Plan:
    """A plan for memory that pays for just so many slots under a policy."""
    needs = footprint(read_model(model), 256)
    groups = expert_groups(read_model(model))
    # The part left alone is the fixed one at this size.
    memory = needs.total + 128 * MIB + cache_bytes(groups, slots, policy)
    known = {"storage_bytes_per_s": 1e9, "resident_ms": 2.0}
    return make_plan(model, memory=memory, n_ctx=256, **(known | options))  # type: ignore[arg-type]


def test_all_memory_becomes_slots_and_their_hit_rate_is_the_simulators(model: Path) -> None:
    trace = small_trace()
    plan = plan_with_slots(model, 8, "next-use", trace=trace)
    groups = expert_groups(read_model(model))
    assert plan.own_trace
    assert (plan.layers, plan.experts, plan.top_k) == (3, 16, 2)
    assert {each.slots for each in plan.options} >= {2, 4, 6, 8, 12, 16}
    assert [each.fits for each in plan.options] == [each.slots <= plan.recommended.slots for each in plan.options]
    assert plan.recommended.slots == 8
    assert plan.policy == "next-use"
    assert set(plan.policies) == set(POLICIES)
    first = replace(trace, ids=trace.ids[:32], offs=np.array([0, 32]))
    for each in plan.options:
        whole, before = (simulate(part, each.slots, plan.policy) for part in (trace, first))
        # The second half of 64 tokens, 3 layers, 2 experts.
        misses = whole.misses - before.misses if each.slots < 16 else 0
        assert each.hit_rate == each.hit_rate_low == each.hit_rate_high == pytest.approx(1 - misses / (32 * 3 * 2))
        read = misses / 32 * groups[0].expert_bytes
        assert each.bytes_per_token == pytest.approx(read)
        assert each.limit_ms == pytest.approx(max(2.0, read / 1e6))
        assert each.no_overlap_ms == pytest.approx(2.0 + read / 1e6)
    assert plan.next is not None
    assert plan.next.slots == 16, f"{STEP} bytes hold everything"
    assert plan.command[:5] == ["remoe-edge", "run", str(model), "--expert-cache", plan.budget]


def test_another_policy_than_the_default_has_to_prove_itself() -> None:
    rates = {"next-use": 0.60, "lfu": 0.62, "lru": 0.58}
    assert choose_policy(rates, 1000) == "lfu"
    assert choose_policy(rates, 100) == "next-use"
    assert choose_policy(rates | {"lfu": 0.605}, 1000) == "next-use"
    # Too little memory for what the default learns.
    assert choose_policy({"lfu": 0.5, "lru": 0.51}, 100) == "lru"


def test_recommended_budget_is_what_the_memory_leaves(model: Path) -> None:
    needs, groups = footprint(read_model(model), 256), expert_groups(read_model(model))
    plan = plan_with_slots(model, 5)
    assert plan.memory.dense == needs.dense
    assert plan.memory.cache == cache_bytes(groups, 5, "lru")
    total = plan.memory.dense + plan.memory.kv + plan.memory.compute + plan.memory.reserve + plan.memory.cache
    assert total == plan.memory.total
    text = plan.budget
    size = int(text.removesuffix("MiB")) * MIB if text.endswith("MiB") else int(text)
    assert plan.floor <= size <= plan.memory.cache


def test_other_models_traces_give_a_range(model: Path) -> None:
    plan = plan_with_slots(model, 6)
    assert not plan.own_trace
    assert len(plan.traces) == 3
    # 16 experts, top 2: 8 to 1, as in OLMoE and gpt-oss; DeepSeek-V2-Lite has 10.7 to 1.
    assert "deepseek" in plan.traces[-1]
    rates = [each.hit_rate for each in plan.options]
    assert rates == sorted(rates)
    assert rates[-1] == 1.0
    for each in plan.options:
        assert each.hit_rate_low <= each.hit_rate <= each.hit_rate_high
        assert each.limit_ms <= each.no_overlap_ms
    some = plan.options[1]
    assert some.hit_rate_low < some.hit_rate_high


def test_less_than_the_floor_is_refused_with_numbers(model: Path) -> None:
    groups = expert_groups(read_model(model))
    floor = min(floor_bytes(groups, policy) for policy in POLICIES)
    least = footprint(read_model(model), 256).total + 128 * MIB + floor
    known = {"n_ctx": 256, "storage_bytes_per_s": 1e9, "resident_ms": 2.0}
    assert make_plan(model, memory=least, **known).recommended.slots == 2  # type: ignore[arg-type]
    with pytest.raises(RemoeError, match=r"1 B too little: dense weights take .* 2 slots in each of 3 layers, takes"):
        make_plan(model, memory=least - 1, **known)  # type: ignore[arg-type]
    # What is left alone grows with the memory: a tenth, where that is more.
    for n_ctx in 256, 1 << 20:
        with pytest.raises(RemoeError, match=r"give --memory (\d+)MiB") as refused:
            make_plan(model, memory=MIB, **{**known, "n_ctx": n_ctx})  # type: ignore[arg-type]
        found = re.search(r"give --memory (\d+)MiB", str(refused.value))
        assert found
        named = int(found[1]) * MIB
        assert make_plan(model, memory=named, **{**known, "n_ctx": n_ctx}).recommended.slots >= 2  # type: ignore[arg-type]
        with pytest.raises(RemoeError, match=f"give --memory {found[1]}MiB"):
            make_plan(model, memory=named - MIB, **{**known, "n_ctx": n_ctx})  # type: ignore[arg-type]


def test_a_trace_of_another_model_is_refused(model: Path) -> None:
    from remoe_edge.routing.trace import packaged_trace

    with pytest.raises(RemoeError, match=r"16 layers with top 8 of 64 experts, but .* has 3 with top 2 of 16"):
        plan_with_slots(model, 6, trace=packaged_trace())


def test_command_measures_the_storage_and_prints_a_plan(model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.npz"
    save_trace(small_trace(), trace)
    arguments = [str(model), "--memory", "200MiB", "--ctx", "256", "--resident-ms", "3", "--trace", str(trace)]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert "3 MoE layers, top 2 of 16 experts" in result.stdout
    assert re.search(r"Storage: \d+\.\d\d GB/s, measured: random reads of .* 4 at once", result.stdout)
    assert "T_resident: 3.0 ms, given" in result.stdout
    assert "recommended" in result.stdout
    assert "all experts are held" in result.stdout
    assert f"Use: remoe-edge run {model} --expert-cache" in result.stdout

    # A folder elsewhere: a file is written there, read and removed.
    result = CliRunner().invoke(command, [*arguments, "--storage", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["storage"]["bytes_per_s"] == content["storage_bytes_per_s"] > 0
    assert content["recommended"]["slots"] == 16
    assert content["resident"] == {"ms": 3.0, "source": "given", "read_bytes": None, "bytes_per_s": None, "note": None}
    assert [each.name for each in tmp_path.iterdir()] == ["trace.npz"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--storage", ".", "--storage-bandwidth", "1GB"], "--storage has no effect"),
        (["--threads", "2", "--resident-ms", "3"], "--threads has no effect"),
    ],
)
def test_flags_without_effect_are_refused(model: Path, flags: list[str], message: str) -> None:
    result = CliRunner().invoke(command, [str(model), *flags])
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    dense = write_tiny_model(tmp_path / "dense.gguf", "llama", hidden=64, ff=64)
    with pytest.raises(RemoeError, match="has no experts"):
        make_plan(dense)


def test_prediction_without_room_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remoe_edge.measure.plan.available", lambda: 1 << 20)
    plan = plan_with_slots(model, 6, resident_ms=None)
    needs, groups = footprint(read_model(model), 256), expert_groups(read_model(model))
    assert plan.resident.source == "predicted"
    assert plan.resident.note == "the model does not fit into memory"
    assert plan.resident.read_bytes == needs.read + sum(2 * group.expert_bytes for group in groups)
    assert plan.resident.bytes_per_s
    assert plan.resident.ms == pytest.approx(plan.resident.read_bytes / plan.resident.bytes_per_s * 1e3)


def test_memory_is_read_at_some_speed() -> None:
    assert 1e8 < memory_bandwidth() < 1e13


def test_memory_that_groups_leave(tmp_path: Path) -> None:
    def put(name: str, content: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)

    put("proc/meminfo", "MemTotal: 8000 kB\nMemAvailable:    4000 kB\n")
    assert available(tmp_path) == 4000 * 1024
    put("proc/self/cgroup", "0::/a/b\n")
    put("sys/fs/cgroup/a/memory.max", "3000000\n")
    put("sys/fs/cgroup/a/memory.stat", "anon 500000\nfile 900000\nshmem 100000\n")
    put("sys/fs/cgroup/a/b/memory.max", "max\n")
    assert available(tmp_path) == 2400000
    put("proc/self/cgroup", "5:cpu:/x\n7:memory:/job\n")
    put("sys/fs/cgroup/memory/job/memory.limit_in_bytes", "2000000\n")
    put("sys/fs/cgroup/memory/job/memory.stat", "total_rss 1900000\ntotal_cache 7\ntotal_shmem 200000\n")
    assert available(tmp_path) == 0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="a mutex has another size elsewhere")
def test_objects_have_the_sizes_that_are_counted(tmp_path: Path) -> None:
    source = Path(__file__).parent / "cache_sizes.cpp"
    compiler = os.environ.get("CXX", "c++")
    subprocess.run(
        [compiler, "-std=c++17", "-I", patches_dir() / "sources" / "src", source, "-o", tmp_path / "sizes"], check=True
    )
    sizes = subprocess.run([tmp_path / "sizes"], capture_output=True, text=True, check=True).stdout.split()
    counted = (getattr(runtime_budget, name) for name in ("_CACHE", "_GROUP", "_TENSOR", "_SLICE", "_REQUEST"))
    assert [int(size) for size in sizes] == list(counted)


def test_more_budget_never_gives_fewer_slots(model: Path) -> None:
    groups = expert_groups(read_model(model))
    for policy in POLICIES:
        assert slots_for(groups, floor_bytes(groups, policy) - 1, policy) == 0
        for slots in range(least_slots(groups), most_slots(groups) + 1):
            size = cache_bytes(groups, slots, policy)
            assert slots_for(groups, size, policy) == slots
            assert slots_for(groups, size - 1, policy) == (slots - 1 if slots > least_slots(groups) else 0)
        assert slots_for(groups, 1 << 50, policy) == most_slots(groups)


@pytest.mark.runtime
@pytest.mark.parametrize("arch", MOE_ARCHITECTURES)
def test_the_runtime_makes_the_same_of_a_budget(arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Sizes that are no multiple of a page as well (gpt-oss in MXFP4: 32 + 2 bytes for 64 weights).
    quant = "MXFP4" if arch == "gpt-oss" else "Q4_0"
    path = write_tiny_model(tmp_path / "tiny.gguf", arch, quant, hidden=128, ff=96, n_expert=12, k=3)
    layouts = read_model(path)
    groups = expert_groups(layouts)
    for policy in POLICIES:
        between = (cache_bytes(groups, 7, policy) + cache_bytes(groups, 8, policy)) // 2
        for budget, slots in (("5s", 5), (str(between), 7), ("64MiB", 12)):
            with load_model(path, CacheConfig(budget, policy, repack="off")) as loaded:
                info = loaded.info()
            assert info
            assert info.n_slots == slots
            assert budget.endswith("s") or slots_for(groups, info.budget, policy) == slots
            # C++ objects may have other sizes elsewhere.
            assert info.used == pytest.approx(cache_bytes(groups, slots, policy), abs=64 * slots * len(groups) * 3)
            assert info.floor == pytest.approx(floor_bytes(groups, policy), abs=64 * 3 * len(groups) * 3)
    with load_model(path, CacheConfig("5s", "lru", threads=7, repack="on", verify=True)) as loaded:
        info = loaded.info()
    assert info
    counted = cache_bytes(groups, 5, "lru", 7, checksums=True, repack=info.kernels == "repack")
    # Repacked experts do without the room that a slice takes that begins anywhere in a page.
    pages = 2 * 4096 if info.kernels == "repack" else 0
    assert -64 <= (counted - info.used) / (5 * len(groups) * 3) <= 64 + pages
    capsys.readouterr()
    with load_model(path, CacheConfig("off"), verbose=True) as loaded, loaded.session(n_ctx=2048):
        log = capsys.readouterr().err
    told = {
        what: sum(float(size) for size in re.findall(rf"{what} buffer size = +([\d.]+) MiB", log)) * MIB
        for what in ("KV", "compute")
    }
    needs = footprint(layouts, 2048)
    assert needs.kv == pytest.approx(told["KV"], abs=0.02 * MIB)
    assert 0.9 * told["compute"] < needs.compute < 2 * told["compute"]


@pytest.mark.runtime
def test_t_resident_is_measured_where_the_model_fits(model: Path) -> None:
    plan = plan_with_slots(model, 6, resident_ms=None)
    assert plan.resident.source == "measured"
    assert 0 < plan.resident.ms < 60_000
