"""The health check of the image: asks `remoe-edge serve` on its port; anything else that runs is healthy."""

import sys
import urllib.request
from pathlib import Path


def main() -> int:
    words = Path("/proc/1/cmdline").read_bytes().decode(errors="replace").split("\0")
    if "serve" not in words:
        return 0
    port = "8080"
    for index, word in enumerate(words):
        if word == "--port":
            port = words[index + 1]
        elif word.startswith("--port="):
            port = word.partition("=")[2]
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=8) as answer:
            return 0 if answer.status == 200 else 1
    except OSError as error:
        print(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
