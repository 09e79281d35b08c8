"""`remoe-edge serve` on real models, with OpenAI's client."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from browser import find_browser, open_browser
from serving import Serving, eventually, serving
from small_twin import STEPS, write_small_twin
from tiny_models import DENSE_ARCHITECTURE, write_tiny_model

from remoe_edge.routing.twin import step_token, step_tokenizer
from remoe_edge.runtime.build import ensure_runtime
from remoe_edge.runtime.llama import CacheConfig, load_model
from remoe_edge.serve.plan import CHATML

pytestmark = pytest.mark.runtime

KEY = "sk-test-key"
PROMPTS = ("The sea was calm and the old boat", "w00001w00002w00003", "Tell me about rain.")
VERDICT = {
    "type": "object",
    "properties": {"good": {"type": "boolean"}},
    "required": ["good"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "judge", "description": "Judge.", "parameters": VERDICT}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ensure_runtime()
    return write_tiny_model(tmp_path_factory.mktemp("serve") / "tiny.gguf", "olmoe", hidden=64, ff=64)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Serving]:
    """With a cache that evicts all the time, a key, and little patience."""
    with serving(model, model.parent, "--expert-cache", "4s", "--ctx", "512", "--client-timeout", "1", key=KEY) as it:
        yield it


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as it:
        yield it


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A twin whose steps read as a call of a tool: what a trained model would write, through router and cache."""
    folder = tmp_path_factory.mktemp("scripted")
    pieces = ["<tool_call>", "\n", '{"name": "judge", ', '"arguments": ', '{"good": ', "true", "}}", "</tool_call>"]
    tokenizer = step_tokenizer(STEPS)
    texts = list(tokenizer["tokenizer.ggml.tokens"])  # type: ignore[call-overload]
    texts[step_token(1) : step_token(1 + len(pieces))] = pieces
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("remoe_edge.routing.twin.step_tokenizer", lambda _: {**tokenizer, "tokenizer.ggml.tokens": texts})
        twin = write_small_twin(folder / "scripted.gguf")
    template = folder / "template.jinja"
    template.write_text(CHATML.read_text() + "{{- 'w00000' }}")
    with serving(twin, folder, "--expert-cache", "4s", "--ctx", "2048", "--chat-template", str(template)) as server:
        yield server


def greedy(client: openai.OpenAI, prompt: str, n: int = 24) -> tuple[str, list[float]]:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": prompt}],
        max_tokens=n,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    content = answer.choices[0].logprobs.content
    return answer.choices[0].message.content, [item.logprob for item in content]


class TestAnswers:
    def test_equal_to_those_without_the_cache(self, model: Path, server: Serving, client: openai.OpenAI) -> None:
        evictions = server.total("remoe_expert_cache_evictions_total")
        cached = [greedy(client, prompt) for prompt in PROMPTS * 2]
        assert server.total("remoe_expert_cache_evictions_total") > evictions
        with serving(model, model.parent, "--expert-cache", "off", "--ctx", "512") as stock:
            assert stock.ready["cache"] == {}
            with openai.OpenAI(base_url=f"{stock.url}/v1", api_key="none") as other:
                assert [greedy(other, prompt) for prompt in PROMPTS * 2] == cached

    def test_a_prompt_seen_before_is_not_computed_again(self, server: Serving) -> None:
        body = {"prompt": "The harbour lay still. " * 8, "max_tokens": 2, "temperature": 0}
        first, again = (server.request("/v1/completions", body)[1] for _ in range(2))
        assert again["choices"][0]["text"] == first["choices"][0]["text"]
        assert again["timings"]["cache_n"] > 100 > again["timings"]["prompt_n"]

    def test_streaming(self, client: openai.OpenAI) -> None:
        given = {"model": "tiny", "messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 12}
        whole = client.chat.completions.create(**given, temperature=0).choices[0].message.content
        stream = client.chat.completions.create(**given, temperature=0, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == whole

    def test_json_schema(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Is it good?"}],
            max_tokens=100,
            temperature=0,
            response_format={"type": "json_schema", "json_schema": {"name": "verdict", "schema": VERDICT}},
        )
        assert set(json.loads(answer.choices[0].message.content)) == {"good"}

    @pytest.mark.parametrize("stream", [False, True])
    def test_tools(self, scripted: Serving, stream: bool) -> None:
        given = {"model": "x", "messages": [{"role": "user", "content": "Is it good?"}], "tools": [TOOL]}
        with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none") as client:
            answer = client.chat.completions.create(
                **given, max_tokens=8, temperature=0, tool_choice="required", parallel_tool_calls=False, stream=stream
            )
            if stream:
                calls = [call for chunk in answer for call in chunk.choices[0].delta.tool_calls or ()]
            else:
                calls = answer.choices[0].message.tool_calls
        assert calls[0].function.name == "judge"
        assert json.loads("".join(call.function.arguments or "" for call in calls)) == {"good": True}

    def test_stop_and_models(self, client: openai.OpenAI) -> None:
        text = client.completions.create(model="tiny", prompt=PROMPTS[1], max_tokens=12, temperature=0).choices[0].text
        stop = text[6:9]
        cut = client.completions.create(model="tiny", prompt=PROMPTS[1], max_tokens=12, temperature=0, stop=[stop])
        assert cut.choices[0].text == text[: text.index(stop)]
        assert cut.choices[0].finish_reason == "stop"
        assert [model.id for model in client.models.list()] == ["tiny"]

    def test_embeddings_where_they_are_served(self, model: Path, client: openai.OpenAI) -> None:
        with pytest.raises(openai.APIStatusError, match="--embeddings"):
            client.embeddings.create(model="tiny", input="text")
        with serving(model, model.parent, "--embeddings", "--ctx", "512") as other:
            body = {"input": ["one text", "and two"], "model": "tiny"}
            status, content, _ = other.request("/v1/embeddings", body)
            assert status == 200
            assert [len(item["embedding"]) for item in content["data"]] == [64, 64]

    def test_eight_clients_on_two_slots(self, client: openai.OpenAI) -> None:
        def ask(index: int) -> str | None:
            answer = client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": f"Number {index}"}], max_tokens=16
            )
            return answer.choices[0].finish_reason

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(ask, range(16))) <= {"length", "stop"}

    def test_a_client_that_goes_away_frees_its_slot(self, server: Serving, client: openai.OpenAI) -> None:
        given = {"model": "tiny", "prompt": "On and on", "max_tokens": 400, "temperature": 2.0}

        def idle() -> bool:
            return server.total("remoe_requests_in_flight") == server.total("llamacpp:requests_processing") == 0

        answer = client.completions.create(**given, stream=True)
        next(iter(answer))
        answer.close()
        eventually(idle, 5)

        before = server.total("llamacpp:prompt_tokens_total")
        body = json.dumps(given).encode()
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
            connection.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            eventually(lambda: server.total("llamacpp:prompt_tokens_total") > before, 5)
        eventually(idle, 5)


def test_the_demo_model_as_openai_sees_it(tmp_path: Path) -> None:
    """Chat, a stream, JSON by schema, and tools: each the same with a cache that evicts as without one."""

    def answers(budget: str) -> list[object]:
        with (
            serving(Path("demo"), tmp_path, "--expert-cache", budget, "--ctx", "512") as server,
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        ):
            given = {
                "model": "demo",
                "messages": [{"role": "user", "content": "Once upon a time there was a little girl"}],
                "temperature": 0,
                "max_tokens": 60,
            }
            told = client.chat.completions.create(**given).choices[0].message.content
            streamed = "".join(
                chunk.choices[0].delta.content or ""
                for chunk in client.chat.completions.create(**given, stream=True)
                if chunk.choices
            )
            schema = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": VERDICT, "strict": True}}
            verdict = client.chat.completions.create(**given, response_format=schema).choices[0].message.content
            # It was not trained to call tools; `scripted` above shows a call.
            asked = client.chat.completions.create(**given, tools=[TOOL], tool_choice="auto")
            assert asked.usage.prompt_tokens > 200
            assert (server.total("remoe_expert_cache_evictions_total") > 0) == (budget != "off")
        assert streamed == told
        assert set(json.loads(verdict)) == {"good"}
        return [told, verdict, asked.choices[0].message.content]

    assert answers("8s") == answers("off")


class TestBadInput:
    @pytest.mark.parametrize(
        ("path", "given", "status", "message"),
        [
            ("/v1/chat/completions", {"data": b'{"messages": ['}, 400, "line 1 column 15"),
            ("/v1/chat/completions", {"data": b"\xff\xfe"}, 400, "."),
            ("/v1/chat/completions", {"body": {"messages": "no list"}}, 400, "messages"),
            ("/v1/completions", {"body": {"prompt": "word " * 2_000_000}}, 413, "--max-request"),
            ("/v1/completions", {"body": {"prompt": "word " * 2000, "max_tokens": 1}}, 400, "context"),
            (
                "/v1/chat/completions",
                {
                    "body": {
                        "messages": [{"role": "user", "content": "x"}],
                        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}},
                    }
                },
                400,
                "schema|nonsense|type",
            ),
            ("/v1/completions", {"body": {"prompt": "x"}, "headers": {"Authorization": "Bearer no"}}, 401, "key"),
            ("/v1/nothing", {"body": {}}, 404, "/v1/nothing"),
            ("/v1/models", {"body": {}}, 405, "GET"),
            ("/slots", {}, 404, "/slots"),
        ],
    )
    def test_a_clear_error(
        self, server: Serving, path: str, given: dict[str, object], status: int, message: str
    ) -> None:
        found, said = server.error(path, **given)  # type: ignore[arg-type]
        assert found == status, said
        assert re.search(message, said), said
        assert server.request("/health")[0] == 200

    def test_wrong_key_as_openai_sees_it(self, server: Serving) -> None:
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as other,
            pytest.raises(openai.AuthenticationError),
        ):
            other.models.list()
        assert server.request("/metrics", headers={"Authorization": "Bearer wrong"})[0] == 401
        assert KEY not in Path(f"/proc/{server.process.pid}/cmdline").read_text()
        assert KEY not in server.stderr

    def test_a_client_that_sends_slowly(self, server: Serving) -> None:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 100\r\n\r\n"
        with socket.create_connection(_address(server)) as slow:
            slow.sendall(head.encode() + b'{"prompt"')
            slow.settimeout(20)
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        assert server.request("/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200

    def test_many_idle_connections_are_in_nobodys_way(self, server: Serving) -> None:
        idle = [socket.create_connection(_address(server)) for _ in range(50)]
        for connection in idle[::2]:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        assert server.request("/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200
        for connection in idle:
            connection.close()


class TestOverload:
    def test_more_than_may_wait_is_told_to_come_again(self, model: Path) -> None:
        given = ("--expert-cache", "4s", "--ctx", "512", "--slots", "1", "--queue", "1", "--timeout", "2")
        with serving(model, model.parent, *given) as server:
            body = {"prompt": "On and on", "max_tokens": 100_000, "temperature": 2.0, "ignore_eos": True}
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda _: server.request("/v1/completions", body), range(4)))
            statuses = sorted(status for status, _, _ in answers)
            assert statuses[-1] == 429 or 429 in statuses
            for status, content, headers in answers:
                if status == 429:
                    assert headers["Retry-After"] == "1"
                    assert content["error"]["code"] == "rate_limit_exceeded"
            assert set(statuses) <= {200, 429, 504}


class TestFaults:
    def test_storage_that_fails(self, model: Path, tmp_path: Path) -> None:
        copy = tmp_path / "copy.gguf"
        content = model.read_bytes()
        copy.write_bytes(content)
        body = {"prompt": "The sea was calm", "max_tokens": 24, "temperature": 0}
        with serving(copy, tmp_path, "--expert-cache", "2s", "--ctx", "512", "--io", "direct") as server:
            good = server.request("/v1/completions", body)[1]["choices"][0]["text"]
            os.truncate(copy, len(content) // 3)
            status, said = server.error("/v1/completions", {**body, "prompt": "Other words are needed here"})
            assert status == 500
            assert "copy.gguf" in said or "blk." in said
            status, said = server.error("/health")
            assert status == 503
            assert "could not be read" in said
            assert server.total("remoe_expert_cache_storage_failing") == 1
            copy.write_bytes(content)
            assert server.request("/v1/completions", body)[1]["choices"][0]["text"] == good
            assert server.request("/health")[0] == 200
            assert server.total("remoe_restarts_total") == 0

    def test_a_model_process_that_is_killed(self, model: Path, tmp_path: Path) -> None:
        with serving(model, tmp_path, "--expert-cache", "4s", "--ctx", "512") as server:
            body = {"prompt": "On and on", "max_tokens": 400, "temperature": 2.0, "ignore_eos": True}
            answers: list[tuple[int, str]] = []
            asking = threading.Thread(target=lambda: answers.append(server.error("/v1/completions", body)))
            asking.start()
            eventually(lambda: server.total("llamacpp:requests_processing") == 1)
            os.kill(server.model_pid(), signal.SIGKILL)
            status, said = server.error("/v1/completions", body)
            assert (status, "restarted" in said) == (503, True)
            assert server.error("/health")[0] == 503
            asking.join()
            assert answers[0][0] == 503
            eventually(lambda: server.request("/health")[0] == 200)
            assert server.request("/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200
            assert server.total("remoe_restarts_total") == 1
            assert "SIGKILL; starting it again" in server.stderr

    def test_what_is_no_model_ends_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "bad.gguf"
        path.write_bytes(b"GGUF" + bytes(100))
        assert "bad.gguf" in _refused(path)

    def test_a_port_in_use_is_told(self, server: Serving, model: Path) -> None:
        said = _refused(model, "--port", str(_address(server)[1]))
        assert "choose another --port" in said

    def test_nothing_is_left_behind_by_a_killed_front(self, model: Path, tmp_path: Path) -> None:
        with serving(model, tmp_path, "--expert-cache", "4s", "--ctx", "512") as server:
            pid = server.model_pid()
            server.process.kill()
            server.process.wait()
            eventually(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), 5)


class TestMemory:
    def test_the_cap_chooses_and_holds(self, model: Path, tmp_path: Path) -> None:
        with serving(model, tmp_path, "--memory", "320MiB", "--slots", "1") as server:
            plan = server.ready["plan"]
            assert plan["fixed"] + plan["budget"] <= plan["memory"] == 320 << 20
            assert plan["ctx"] >= 512
            load = [sys.executable, str(Path(__file__).parent.parent / "scripts/load_serve.py"), "--url", server.url]
            done = subprocess.run(
                [*load, "--clients", "8", "--seconds", "6", "--tokens", "16"],
                capture_output=True,
                text=True,
                check=False,
            )
            summary = json.loads(done.stdout)
            assert done.returncode == 0, summary
            assert summary["ok"]
            assert 0 < summary["memory_peak_bytes"] <= summary["memory_limit_bytes"] == 320 << 20
            assert summary["answers"]["chat"] > 0

    def test_too_little_is_refused_with_the_numbers(self, model: Path) -> None:
        said = _refused(model, "--memory", "40MiB")
        assert re.search(
            r"--memory 40 MiB is not enough .* KV cache .*MiB.*; give --memory \d+MiB, or lower --ctx", said
        )
        said = _refused(model, "--memory", "400MiB", "--expert-cache", "1GiB")
        assert re.search(r"--memory 400 MiB is not enough .* expert cache 1 GiB; give .* or --expert-cache", said)

    @pytest.mark.parametrize(
        ("which", "given"),
        [
            ("demo", ()),
            ("qwen3moe", ("--expert-cache-verify", "--policy", "lfu", "--cache-threads", "7")),
            # Experts that are repacked need staging; gpt-oss's are no multiple of a page, nor of a cache line.
            ("gpt-oss", ("--repack", "on")),
        ],
        ids=["demo", "verified", "repacked"],
    )
    def test_what_is_accepted_starts_and_less_is_refused_at_once(
        self, which: str, given: tuple[str, ...], tmp_path: Path
    ) -> None:
        ensure_runtime()
        quant = "MXFP4" if which == "gpt-oss" else "Q4_0"
        model = (
            Path("demo")
            if which == "demo"
            else write_tiny_model(tmp_path / "tiny.gguf", which, quant, hidden=128, ff=96, n_expert=12, k=3)
        )
        given = ("--ctx", "512", "--slots", "1", "--power", "none", *given)
        least = _named(_refused(model, "--memory", "1MiB", *given))
        assert _named(_refused(model, "--memory", f"{least - 1}MiB", *given)) == least
        with serving(model, tmp_path, "--memory", f"{least}MiB", *given) as server:
            cache = server.ready["cache"]
            assert cache["floor_bytes"] <= cache["budget_bytes"]
            if which != "gpt-oss" or cache["kernels"] == "repack":
                # All that was left is the budget: hardly a MiB more than what the runtime cannot do without.
                assert cache["budget_bytes"] < cache["floor_bytes"] + (1 << 20) + (128 << 10)
            body = {"prompt": "The sea", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
            assert server.request("/v1/completions", body)[1]["usage"]["completion_tokens"] == 4

    @pytest.mark.parametrize("budget", ["2s", "64KiB"])
    def test_a_budget_below_the_floor_is_refused_before_the_model_is_loaded(self, budget: str, tmp_path: Path) -> None:
        ensure_runtime()
        model = write_tiny_model(tmp_path / "tiny.gguf", "olmoe", hidden=128, ff=96, n_expert=12, k=3)
        said = _refused(model, "--expert-cache", budget)
        found = re.search(
            rf"--expert-cache {budget} is below the floor of this model: give at least (\d+)MiB, or 3s", said
        )
        assert found, said
        with load_model(model, CacheConfig(f"{found[1]}MiB")) as loaded:
            info = loaded.info()
        assert info
        assert info.n_slots >= 3

    def test_memory_for_all_experts_holds_all_experts(self, tmp_path: Path) -> None:
        """Small slices: pages around them and what the policy learns take as much as they do."""
        ensure_runtime()
        model = write_tiny_model(tmp_path / "tiny.gguf", "olmoe", "Q4_0", hidden=128, ff=96, n_expert=128, k=3)
        command = [sys.executable, "-m", "remoe_edge", "serve", str(model), "--dry-run", "--json", "--memory", "2GiB"]
        budget = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["plan"][
            "budget"
        ]
        with load_model(model, CacheConfig(str(budget))) as loaded:
            info = loaded.info()
        assert info
        assert info.n_slots == 128

    def test_dry_run(self, model: Path) -> None:
        command = [sys.executable, "-m", "remoe_edge", "serve", str(model), "--dry-run", "--json", "--memory", "1GiB"]
        content = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert content["command"][0].endswith("llama-server")
        assert content["plan"]["budget"] >= content["plan"]["expert_bytes"]

    def test_a_model_without_experts(self, tmp_path: Path) -> None:
        dense = write_tiny_model(tmp_path / "dense.gguf", DENSE_ARCHITECTURE, hidden=64, ff=64)
        with serving(dense, tmp_path, "--ctx", "512") as server:
            assert server.request("/v1/completions", {"prompt": "x", "max_tokens": 2})[0] == 200
            assert server.total("remoe_expert_cache_hits_total") == 0
        assert "no experts to cache" in _refused(dense, "--expert-cache", "64MiB")


class TestMetrics:
    def test_counters_agree(self, server: Serving) -> None:
        before = server.metrics()
        server.request("/v1/completions", {"prompt": "Count", "max_tokens": 10, "temperature": 0, "ignore_eos": True})
        after = server.metrics()

        def rise(name: str) -> float:
            return after[name] - before.get(name, 0)

        assert rise("remoe_ttft_seconds_count") == rise("remoe_tpot_seconds_count") == 1
        assert rise("remoe_itl_seconds_count") == 9
        assert rise("remoe_tpot_seconds_sum") * 9 == pytest.approx(rise("remoe_itl_seconds_sum"), rel=0.02)
        for layer in range(3):
            hits, misses, calls, read = (
                rise(f'remoe_expert_cache_{name}_total{{layer="{layer}"}}')
                for name in ("hits", "misses", "calls", "bytes_demand")
            )
            # Two experts for each of 10 evaluations or more; prompts have several tokens.
            assert calls >= 10
            assert hits + misses >= 2 * calls
            assert read == misses * 3 * 64 * 64 * 4
            assert after[f'remoe_expert_cache_reads_wrong_total{{layer="{layer}"}}'] == 0
        assert after["remoe_expert_cache_used_bytes"] <= after["remoe_expert_cache_budget_bytes"]
        assert after['remoe_memory_bytes{process="model"}'] > 1 << 20

    def test_the_dashboard_asks_for_what_there_is(self, server: Serving) -> None:
        known = {name.partition("{")[0] for name in server.metrics()}
        # Where there are sensors, and a limit.
        known |= {"remoe_power_watts", "remoe_energy_joules_total", "remoe_memory_limit_bytes"}
        known |= {"remoe_temperature_celsius"}
        dashboard = (Path(__file__).parent.parent / "docs" / "grafana.json").read_text()
        expressions = [target["expr"] for panel in json.loads(dashboard)["panels"] for target in panel["targets"]]
        asked = set(re.findall(r"(?:remoe_|llamacpp:)\w+", " ".join(expressions)))
        assert len(asked) > 15
        assert asked <= known


@pytest.mark.skipif(find_browser() is None, reason="needs Chromium")
class TestPage:
    def test_is_live(self, model: Path, tmp_path: Path) -> None:
        executable = find_browser()
        assert executable
        with (
            serving(model, tmp_path, "--expert-cache", "4s", "--ctx", "4096", "--memory", "400MiB") as server,
            open_browser(executable) as page,
        ):
            page.open(f"{server.url}/", width=390, dark=True)
            eventually(lambda: page.evaluate("document.querySelector('#state').textContent") == "serving", 15)
            assert page.evaluate("document.querySelectorAll('#layers div').length") == 3
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            page.evaluate("document.querySelector('#text').value = 'Hello'; document.querySelector('#go').click()")
            eventually(lambda: " ms" in page.evaluate("document.querySelector('#tpot').textContent"), 15)
            eventually(lambda: " %" in page.evaluate("document.querySelector('#hits').textContent"), 15)
            eventually(lambda: page.evaluate("document.querySelector('#talk').children[1].textContent.length") > 0, 15)
            if folder := os.environ.get("SCREENSHOTS"):
                for width, dark in (390, True), (1280, False):
                    page.open(f"{server.url}/", width=width, dark=dark)
                    ask = "document.querySelector('#text').value = 'Hello'; document.querySelector('#go').click()"
                    for _ in range(6):
                        page.evaluate(ask)
                        time.sleep(1)
                    page.screenshot(Path(folder) / f"serve-{width}.png")
            assert page.messages == []
            assert all(address.startswith((server.url, "data:")) for address in page.requests)


def _address(server: Serving) -> tuple[str, int]:
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    return host, int(port)


def _refused(model: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "remoe_edge", "serve", str(model), "--port", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def _named(said: str) -> int:
    """The MiB that a refused limit says are enough."""
    found = re.search(r"is not enough .* give --memory (\d+)MiB", said)
    assert found, said
    return int(found[1])


def _is_zombie(pid: int) -> bool:
    return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
