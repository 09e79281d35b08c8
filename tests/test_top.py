"""`remoe-edge top`: a server's metrics and a benchmark's journal on a terminal."""

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner
from records import RUN, STOCK, make_rows, record
from small_twin import write_small_twin
from terminal import Terminal

from remoe_edge.cli import cli
from remoe_edge.errors import RemoeError
from remoe_edge.measure.arms import Arm
from remoe_edge.measure.journal import journal_path, open_journal
from remoe_edge.measure.storage import Bandwidth
from remoe_edge.monitor.benchmark import benchmark_frame
from remoe_edge.monitor.screen import sparkline
from remoe_edge.monitor.server import metrics_url, parse, server_frame, watch
from remoe_edge.runtime.build import ensure_runtime

MB = 1_000_000


def metrics(step: int, *, requests: int = 1, layers: int = 3) -> str:
    """What a server tells that does the same in each step: 10 tokens, 3 hits of 4 in layer 0, 2 in 1, 0 in 2."""
    lines = [
        "# HELP llamacpp:tokens_predicted_total Number of generation tokens processed.",
        "# TYPE llamacpp:tokens_predicted_total counter",
        f"llamacpp:tokens_predicted_total {10 * step}",
        "# TYPE llamacpp:tokens_predicted_seconds_total counter",
        f"llamacpp:tokens_predicted_seconds_total {0.5 * step}",
        "# TYPE llamacpp:predicted_tokens_seconds gauge",
        "llamacpp:predicted_tokens_seconds 12.5",
        "# TYPE llamacpp:requests_processing gauge",
        f"llamacpp:requests_processing {requests}",
        "# TYPE llamacpp:requests_deferred gauge",
        "llamacpp:requests_deferred 2",
    ]

    def counter(name: str, *values: float) -> None:
        lines.append(f"# TYPE remoe_expert_cache_{name}_total counter")
        lines.extend(
            f'remoe_expert_cache_{name}_total{{layer="{layer}"}} {value * step}'
            for layer, value in enumerate(values[:layers])
        )

    counter("hits", 30, 20, 0)
    counter("misses", 10, 20, 40)
    counter("bytes_demand", 1 * MB, 2 * MB, 4 * MB)
    counter("bytes_prefetch", 0, 1 * MB, 0)
    counter("stall_seconds", 0.05, 0.05, 0.1)
    counter("evictions", 5, 5, 10)
    for name, value in ("budget_bytes", 64 << 20), ("used_bytes", 48 << 20):
        lines += [f"# TYPE remoe_expert_cache_{name} gauge", f"remoe_expert_cache_{name} {value}"]
    lines += [
        "# TYPE remoe_ttft_seconds histogram",
        f'remoe_ttft_seconds_bucket{{le="0.5"}} {step}',
        f'remoe_ttft_seconds_bucket{{le="+Inf"}} {step}',
        f"remoe_ttft_seconds_sum {0.25 * step}",
        f"remoe_ttft_seconds_count {step}",
        "# TYPE remoe_tpot_seconds histogram",
        f'remoe_tpot_seconds_bucket{{le="+Inf"}} {step}',
        f"remoe_tpot_seconds_sum {0.04 * step}",
        f"remoe_tpot_seconds_count {step}",
        "# TYPE remoe_power_watts gauge",
        "remoe_power_watts 7.5",
        "# TYPE remoe_temperature_celsius gauge",
        'remoe_temperature_celsius{zone="cpu"} 51',
        'remoe_temperature_celsius{zone="tj"} 53',
    ]
    return "\n".join(lines) + "\n"


class _Server(ThreadingHTTPServer):
    """Answers as `answer` says, counting the times it was asked."""

    asked = 0
    status = 200
    text: str | None = None
    key: str | None = None


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.asked += 1
        status = self.server.status
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            status = 401
        body = (self.server.text or metrics(self.server.asked)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server(("127.0.0.1", 0), _Handler) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def url(server: _Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def top(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, ["top", *arguments], env={"LLAMA_API_KEY": None})
    message = str(result.exception) if isinstance(result.exception, RemoeError) else result.stderr
    return result.exit_code, result.stdout, message


def test_rates_are_those_between_two_looks() -> None:
    frame = server_frame([parse(metrics(3), 100.0, "s"), parse(metrics(5), 104.0, "s")], "here")
    assert (frame.source, frame.state) == ("here", "1 request, 2 waiting")
    assert frame.tokens_per_s == 5.0
    assert frame.tpot_ms == pytest.approx(40)
    assert frame.ttft_ms == pytest.approx(250)
    assert frame.layer_hit_rate == (0.75, 0.5, 0.0)
    assert frame.hit_rate == pytest.approx(50 / 120)
    assert frame.read_bytes_per_s == 4 * MB
    assert frame.prefetch_bytes_per_s == 0.5 * MB
    assert frame.stall_share == pytest.approx(0.1)
    assert frame.evictions_per_s == 10
    assert (frame.budget_bytes, frame.used_bytes) == (64 << 20, 48 << 20)
    assert (frame.power_w, frame.temperature_c) == (7.5, 53)


def test_an_idle_server_shows_what_it_did_before() -> None:
    frame = server_frame([parse(metrics(5, requests=0), 1.0, "s"), parse(metrics(5, requests=0), 2.0, "s")], "s")
    assert (frame.state, frame.tokens_per_s, frame.read_bytes_per_s) == ("idle", 0.0, 0.0)
    assert frame.layer_hit_rate == (0.75, 0.5, 0.0)
    assert frame.tpot_ms == pytest.approx(40)


def test_a_server_that_began_again_has_no_negative_rates() -> None:
    frame = server_frame([parse(metrics(9), 1.0, "s"), parse(metrics(2), 2.0, "s")], "s")
    assert frame.tokens_per_s == 12.5
    assert frame.read_bytes_per_s is None
    assert frame.layer_hit_rate == (0.75, 0.5, 0.0)


def test_stock_llama_server_has_no_cache() -> None:
    text = "# TYPE llamacpp:tokens_predicted_total counter\nllamacpp:tokens_predicted_total {}\n"
    frame = server_frame([parse(text.format(0), 0.0, "s"), parse(text.format(8), 2.0, "s")], "s")
    assert (frame.tokens_per_s, frame.hit_rate, frame.layer_hit_rate, frame.budget_bytes) == (4.0, None, (), None)


def test_storage_that_fails_is_told() -> None:
    failing = "# TYPE remoe_expert_cache_storage_failing gauge\nremoe_expert_cache_storage_failing {}\n"
    states = [server_frame([parse(metrics(1) + failing.format(bad), 0.0, "s")] * 2, "s").state for bad in (0, 1)]
    assert states == ["1 request, 2 waiting", "1 request, 2 waiting, cannot read its experts"]


def test_rates_are_of_the_last_seconds() -> None:
    times = iter(range(100))
    more = watch(lambda: parse(metrics(1), float(next(times)), "s"), 10.0)
    for _ in range(50):
        scrapes = more()
    assert scrapes[-1].time_s - scrapes[0].time_s in (10, 11)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("localhost:9090", "http://localhost:9090/metrics"),
        ("https://host/", "https://host/metrics"),
        ("http://host/v1/metrics", "http://host/v1/metrics"),
        ("ftp://host", None),
        ("http://", None),
    ],
)
def test_addresses(address: str, expected: str | None) -> None:
    if expected is None:
        with pytest.raises(RemoeError, match="no address of a server"):
            metrics_url(address)
    else:
        assert metrics_url(address) == expected


def test_one_object(server: _Server) -> None:
    status, out, _ = top(url(server), "--json", "--interval", "0.1")
    frame = json.loads(out)
    assert status == 0
    assert frame["layer_hit_rate"] == [0.75, 0.5, 0.0]
    assert frame["tokens_per_s"] > 10
    assert server.asked == 2


def test_one_frame(server: _Server) -> None:
    status, out, _ = top(url(server), "--once", "--interval", "0.1")
    assert status == 0
    for part in "1 request, 2 waiting", "40.0 ms TPOT", "41.7%", "▇▅▁", "lowest 0% in layer 2", "7.5 W  53 °C":
        assert part in out
    assert "48 MiB of 64 MiB" in out


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [
        (501, None, "--metrics"),
        (404, None, "has no metrics there"),
        (503, None, "loading its model"),
        (500, None, "status 500"),
        (200, "<html>hello</html>", "Prometheus' text format"),
        (200, "\n", "without any metrics"),
    ],
)
def test_what_does_not_tell(server: _Server, status: int, text: str | None, message: str) -> None:
    server.status, server.text = status, text
    code, out, error = top(url(server), "--once")
    assert (code, out) == (1, "")
    assert message in error


def test_a_key(server: _Server) -> None:
    server.key = "secret"
    assert "--api-key" in top(url(server), "--json", "--interval", "0.1")[2]
    assert top(url(server), "--json", "--interval", "0.1", "--api-key", "secret")[0] == 0


def test_no_server_says_what_to_start() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as free:
        port = free.server_port
    command = [sys.executable, "-m", "remoe_edge", "top", f"127.0.0.1:{port}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert "no server answers" in result.stderr
    assert "remoe-edge serve MODEL" in result.stderr


def test_live(server: _Server) -> None:
    with Terminal("top", url(server), "--interval", "0.1") as terminal:
        terminal.wait_for("lowest 0% in layer 2")
        terminal.wait_for(r"tokens/s")
        # What was seen last stays while the server does not answer, and it may come back.
        server.status = 503
        terminal.wait_for("loading its model")
        terminal.wait_for("lowest 0% in layer 2")
        server.status = 200
        seen = server.asked
        while server.asked < seen + 3:
            terminal.wait_for("lowest 0% in layer 2")
        terminal.shown = ""
        terminal.wait_for("lowest 0% in layer 2")
        assert "loading" not in terminal.wait_for("lowest 0% in layer 2")
        terminal.type("\x03")
        assert terminal.wait() == 0


ARMS = [Arm("cache", Path("m.gguf"), "16s"), Arm("mmap", Path("m.gguf"))]


def journal(output: Path) -> Path:
    plan = {"list of models or arms": [{**asdict(arm), "model": str(arm.model)} for arm in ARMS]}
    path = journal_path(output)
    with open_journal(path, {**plan, "number of repetitions (-r)": 3}, resume=False) as opened:
        opened.append(record(RUN, storage=Bandwidth(5e6, 4096, 4, True), state={"temperature_c": [40.0, 45.0]}))
        opened.append(record(STOCK, arm=1))
        opened.append(record(RUN, repetition=1, state={"temperature_c": [41.0, None]}))
    return path


def test_a_running_benchmark(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    path = journal(output)
    with path.open("ab") as file:
        file.write(b'{"turn": {"arm"')
    frame = benchmark_frame(output)
    assert frame == benchmark_frame(path)
    assert frame.state == "running, 3 runs made; 3 repetitions of each prompt"
    assert (frame.tpot_ms, frame.ttft_ms, frame.tokens_per_s) == (20.0, 100.0, 50.0)
    assert frame.layer_hit_rate == (1.0, 0.5, None)
    # 4000 bytes in 4 tokens of 20 ms, of which 2 are stalls.
    assert (frame.read_bytes_per_s, frame.stall_share) == (50_000.0, 0.1)
    assert (frame.budget_bytes, frame.used_bytes, frame.temperature_c) == (1000, 900, 41.0)
    assert [(arm.label, arm.runs, arm.status) for arm in frame.arms] == [
        ("m.gguf, cache 16s", 2, "ok"),
        ("m.gguf, mmap", 1, "ok"),
    ]
    status, out, _ = top(str(output), "--once")
    assert status == 0
    for part in "m.gguf, cache 16s", "hits by layer  █▅·", "900 B of 1000 B", "not measured":
        assert part in out or part == "not measured"


def test_a_benchmark_that_ended(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    rows = make_rows({Arm("cache", Path("m.gguf"), "900", "lfu"): [20.0, 22.0], Arm("mmap", Path("m.gguf")): [90.0]})
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, _ = top(str(output), "--json")
    frame = json.loads(out)
    assert status == 0
    assert frame["tpot_ms"] == 21.0
    assert [arm["tpot_ms"] for arm in frame["arms"]] == [21.0, 90.0]
    assert frame["storage_bytes_per_s"] == 1e6


def test_a_benchmark_that_has_not_begun(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl.partial").touch()
    assert "has not begun" in top(str(tmp_path / "r.jsonl"), "--once")[2]
    (tmp_path / "r.jsonl.partial").write_text("hello\n")
    assert "is not a journal" in top(str(tmp_path / "r.jsonl"), "--once")[2]


def test_sparkline() -> None:
    assert sparkline([0.0, 5.0, 10.0]) == "▁▅█"
    assert sparkline([0.0]) == "▁"


@pytest.mark.runtime
def test_the_patched_llama_server(tmp_path: Path) -> None:
    runtime = ensure_runtime()
    model = write_small_twin(tmp_path / "twin.gguf")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as free:
        port = free.server_port
    command = [str(runtime.bin_dir / "llama-server"), "-m", str(model), "--port", str(port), "--metrics", "-t", "1"]
    command += ["-c", "256", "-np", "1", "--expert-cache", "4s"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            until = time.monotonic() + 30
            while top(address, "--json", "--interval", "0.1")[0] != 0:
                assert time.monotonic() < until
                time.sleep(0.1)
            body = json.dumps({"prompt": "w00000", "n_predict": 20, "temperature": 0}).encode()
            request = urllib.request.Request(f"{address}/completion", body, {"Content-Type": "application/json"})
            timer = threading.Timer(0.5, lambda: urllib.request.urlopen(request).close())
            timer.start()
            frame = json.loads(top(address, "--json", "--interval", "2")[1])
            timer.join()
            assert frame["state"] == "idle"
            assert frame["tokens_per_s"] > 5
            assert frame["tpot_ms"] > 0
        finally:
            process.terminate()
