"""A stand-in for `vllm serve`: its command line, its health check, and its streams, line by line as vLLM sends them.

Models whose name contains "slow" take 20 ms per token, others 5; one with "broken" ends as vLLM does without memory.
"""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

ARGUMENTS = sys.argv[1:]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if request["model"] != MODEL:
            self.send_response(404)
            self.end_headers()
            self.wfile.write(
                json.dumps({"error": {"message": f"The model `{request['model']}` does not exist."}}).encode()
            )
            return
        assert request["stream"]
        assert request["stream_options"] == {"include_usage": True}
        assert request["ignore_eos"]
        assert request["temperature"] == 0
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        for _ in range(request["max_tokens"]):
            time.sleep(0.02 if "slow" in MODEL else 0.005)
            self.event(
                {"choices": [{"index": 0, "text": " x", "logprobs": None, "finish_reason": None}], "usage": None}
            )
        usage = {
            "prompt_tokens": 7,
            "total_tokens": 7 + request["max_tokens"],
            "completion_tokens": request["max_tokens"],
        }
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, content: dict[str, object]) -> None:
        whole = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": MODEL, **content}
        self.wfile.write(f"data: {json.dumps(whole)}\n\n".encode())

    def log_message(self, *_: object) -> None:
        pass


if ARGUMENTS == ["--version"]:
    print("0.11.0")
    sys.exit()
assert ARGUMENTS[0] == "serve"
MODEL = ARGUMENTS[1]
options = dict(zip(ARGUMENTS[2::2], ARGUMENTS[3::2], strict=True))
assert float(options["--cpu-offload-gb"]) == 2.5
assert options["--max-num-seqs"] == "1"
print("serving", MODEL, options.get("--max-model-len"), flush=True)
if "broken" in MODEL:
    sys.exit("torch.OutOfMemoryError: CUDA out of memory")
HTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
