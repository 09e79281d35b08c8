"""Which GPUs the runtime sees, and what commands do about it. Stand-ins take the place of a runtime that has one."""

import ctypes
import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from remoe_edge.cli import cli
from remoe_edge.device import doctor
from remoe_edge.device.identity import identity
from remoe_edge.errors import RemoeError
from remoe_edge.measure.worker import DecodeRun, GpuUse
from remoe_edge.runtime.gpu import ALL_LAYERS, Device, find_devices, layers_on_gpu
from remoe_edge.runtime.wheel import Manifest
from remoe_edge.serve.plan import _devices

ORIN = Device("CUDA0", "Orin", "CUDA", 10 << 30, 15 << 30)

# ggml's functions over one CPU, one GPU of each kind and an accelerator: enum ggml_backend_dev_type.
LIBRARY = """
#include <stddef.h>
struct device { int type; const char * name, * description, * backend; size_t free, total; };
static struct device devices[] = {
    { 1, "CUDA0", "NVIDIA H100", "CUDA", 70, 80 },
    { 2, "CUDA1", "Orin", "CUDA", 5, 8 },
    { 3, "BLAS", "an accelerator", "BLAS", 0, 0 },
    { 0, "CPU", "a processor", "CPU", 1, 2 },
};
size_t ggml_backend_dev_count(void) { return sizeof(devices) / sizeof(devices[0]); }
struct device * ggml_backend_dev_get(size_t i) { return &devices[i]; }
int ggml_backend_dev_type(struct device * d) { return d->type; }
const char * ggml_backend_dev_name(struct device * d) { return d->name; }
const char * ggml_backend_dev_description(struct device * d) { return d->description; }
struct device * ggml_backend_dev_backend_reg(struct device * d) { return d; }
const char * ggml_backend_reg_name(struct device * d) { return d->backend; }
void ggml_backend_dev_memory(struct device * d, size_t * free, size_t * total) { *free = d->free; *total = d->total; }
"""


def test_gpus_of_both_kinds_are_found_and_nothing_else(tmp_path: Path) -> None:
    source, library = tmp_path / "devices.c", tmp_path / "devices.so"
    source.write_text(LIBRARY)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    assert find_devices(ctypes.CDLL(str(library))) == [
        Device("CUDA0", "NVIDIA H100", "CUDA", 70, 80),
        Device("CUDA1", "Orin", "CUDA", 5, 8),
    ]


@pytest.mark.parametrize(
    ("wanted", "devices", "layers"),
    [
        ("auto", [], 0),
        ("auto", [ORIN], ALL_LAYERS),
        ("all", [ORIN], ALL_LAYERS),
        (12, [ORIN], 12),
        (0, [ORIN], 0),
        (0, [], 0),
    ],
)
def test_layers(wanted: int | str, devices: list[Device], layers: int) -> None:
    assert layers_on_gpu(wanted, devices) == layers


@pytest.mark.parametrize("wanted", ["all", 1])
def test_layers_without_a_gpu_are_refused(wanted: int | str) -> None:
    with pytest.raises(RemoeError, match=f"--gpu-layers {wanted}: the runtime sees no GPU.*build --cuda"):
        layers_on_gpu(wanted, [])


@pytest.mark.parametrize("command", [["run", "-p", "a"], ["chat"], ["bench", "-p", "a"], ["serve"]])
@pytest.mark.parametrize("text", ["-1", "some", "1.5", ""])
def test_what_is_no_number_of_layers(command: list[str], text: str, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.touch()
    name, *rest = command
    result = CliRunner().invoke(cli, [name, str(model), *rest, "-ngl", text])
    assert result.exit_code == 2
    assert "neither a number, nor auto or all" in result.output


def test_devices_as_the_server_lists_them(tmp_path: Path) -> None:
    """In the form of llama.cpp's common/arg.cpp: "  %s: %s (%zu MiB, %zu MiB free)"."""

    class Runtime:
        bin_dir = tmp_path

    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho 'Available devices:'\necho '  CUDA0: Orin (SoC) (15520 MiB, 9876 MiB free)'\n")
    program.chmod(0o755)
    assert _devices(Runtime()) == [  # type: ignore[arg-type]
        Device("CUDA0", "Orin (SoC)", "CUDA", 9876 << 20, 15520 << 20)
    ]
    program.write_text("#!/bin/sh\necho 'Available devices:'\necho '  (none)'\n")
    assert _devices(Runtime()) == []  # type: ignore[arg-type]


def test_what_a_run_took_of_a_gpu() -> None:
    after = [Device("CUDA0", "Orin", "CUDA", 7 << 30, 15 << 30)]
    assert GpuUse.of(ALL_LAYERS, [ORIN], after) == GpuUse(-1, "CUDA", "Orin (CUDA0)", 3 << 30)


def test_a_run_of_an_earlier_version_has_no_gpu(fixture_run: dict[str, object]) -> None:
    assert DecodeRun.from_json(fixture_run).gpu is None
    again = DecodeRun.from_json({**fixture_run, "gpu": {"layers": -1, "backend": "CUDA", "device": "Orin", "bytes": 5}})
    assert again.gpu == GpuUse(-1, "CUDA", "Orin", 5)


@pytest.fixture
def fixture_run() -> dict[str, object]:
    empty = dict.fromkeys(("prefill", "decode", "info", "tokens", "layers"))
    numbers = dict.fromkeys(("n_prompt", "n_gen", "major_faults", "model_bytes", "model_params"), 1)
    texts = dict.fromkeys(("output_sha256", "logits_sha256", "text", "kernels", "model_description"), "")
    return {**empty, **numbers, **texts, "token_ns": [1], "read_bytes": None, "memory": {}}


@pytest.mark.parametrize(
    ("cuda", "devices", "level", "said"),
    [
        (True, [ORIN], doctor.OK, "with CUDA: Orin (CUDA0), 10 GiB free"),
        (True, [], doctor.NOTE, "with CUDA, but it sees no GPU"),
        (False, [], doctor.OK, "without CUDA"),
    ],
)
def test_doctor_tells(
    cuda: bool, devices: list[Device], level: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pin = doctor.load_pin(doctor.patches_dir())
    digest = doctor.patches_digest(doctor.patches_dir())
    installed = Manifest("key", pin.version, pin.llama_cpp_commit, "", digest, cuda, [], "", "", {})
    monkeypatch.setattr(doctor, "installed_manifest", lambda: installed)
    monkeypatch.setattr(doctor, "gpu_devices", lambda: devices)
    (finding,) = doctor._runtime(identity(tmp_path))
    assert (finding.level, finding.found.endswith(said)) == (level, True), finding


@pytest.mark.runtime
class TestOnThisRuntime:
    """A build for the CPU."""

    @pytest.mark.parametrize(
        "command", [["run", "demo", "-p", "a"], ["chat", "demo"], ["serve", "demo", "--dry-run"], ["serve", "demo"]]
    )
    def test_refused(self, command: list[str]) -> None:
        result = CliRunner().invoke(cli, [*command, "-ngl", "all"])
        assert result.exit_code == 1
        assert "--gpu-layers all: the runtime sees no GPU" in str(result.exception)

    def test_bench_says_why(self, tmp_path: Path) -> None:
        options = ["-p", "a", "-n", "2", "--budget", "8s", "--cool-down", "0", "-t", "1"]
        result = CliRunner().invoke(cli, ["bench", "demo", *options, "-ngl", "7", "-o", str(tmp_path / "rows.jsonl")])
        assert "--gpu-layers 7: the runtime sees no GPU" in result.output

    def test_auto_is_the_cpu_here(self, tmp_path: Path) -> None:
        rows = tmp_path / "rows.jsonl"
        options = ["-p", "a", "-n", "2", "--budget", "8s", "--baseline", "mmap", "--cool-down", "0", "-t", "1"]
        result = CliRunner().invoke(cli, ["bench", "demo", *options, "-o", str(rows)])
        assert result.exit_code == 0, result.output
        for row in map(json.loads, rows.read_text().splitlines()):
            assert (row["n_gpu_layers"], row["backends"], row["gpu_info"]) == (0, "CPU", "")
            assert row["gpu_memory_bytes"] is None
