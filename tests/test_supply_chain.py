"""What runs here and where it comes from: pinned downloads, no code out of data, known licences, quiet keys."""

import ast
import json
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from remoe_edge.runtime.pin import load_pin, patches_dir

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "remoe_edge").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])

sys.path.insert(0, str(ROOT / "scripts"))
import licences  # noqa: E402

# Each can run what a file or a user says.
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execl", "os.spawnl", "pty.spawn"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell", "commands.getoutput"),
    *(
        "torch.load",
        "torch.jit.load",
        "yaml.load",
        "yaml.unsafe_load",
        "tempfile.mktemp",
        "ssl._create_unverified_context",
    ),
    *("pickle.load", "pickle.loads", "numpy.memmap"),
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "telnetlib", "xmlrpc"}
FORBIDDEN_ARGUMENTS = {"shell": True, "allow_pickle": True, "trust_remote_code": True, "verify": False}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def dangers(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.split(".")[0] in FORBIDDEN_MODULES:
                yield module
            yield from (f"{module}.{each.name}" for each in node.names if f"{module}.{each.name}" in FORBIDDEN_CALLS)
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            weights_only = any(
                each.arg == "weights_only" and getattr(each.value, "value", None) is True for each in node.keywords
            )
            if name in FORBIDDEN_CALLS and not (name == "torch.load" and weights_only):
                yield name
            for each in node.keywords:
                # A value that is computed cannot be judged here, so only the safe one may stand there.
                # CacheConfig's verify is of checksums, and off by default.
                if each.arg in FORBIDDEN_ARGUMENTS and name != "CacheConfig":
                    safe = not FORBIDDEN_ARGUMENTS[each.arg]
                    if not (isinstance(each.value, ast.Constant) and each.value.value is safe):
                        yield f"{name}({each.arg}=...)"
            loads = name.endswith(".from_pretrained") and name.startswith("Auto")
            if loads and "trust_remote_code" not in {each.arg for each in node.keywords}:
                yield f"{name} without trust_remote_code=False"


@pytest.mark.parametrize(
    "source",
    [
        *(
            "import os; os.system(x)",
            "from os import system",
            "eval(x)",
            "exec(x)",
            "import pickle",
            "from dill import load",
        ),
        *("subprocess.run(x, shell=True)", "subprocess.run(x, shell=y)", "np.load(x, allow_pickle=True)"),
        *("torch.load(x)", "torch.load(x, weights_only=False)", "yaml.load(x)", "import joblib.pool"),
        *("AutoConfig.from_pretrained(x)", "AutoModel.from_pretrained(x, trust_remote_code=True)"),
        *("asyncio.create_subprocess_shell(x)", "requests.get(x, verify=False)", "os.popen(x)"),
    ],
)
def test_the_search_finds(source: str) -> None:
    assert list(dangers(source))


def test_the_search_finds_nothing_else() -> None:
    harmless = """
import json, subprocess
subprocess.run(["x", y], shell=False)
model.eval()
torch.load(x, weights_only=True)
np.lib.format.read_array(x, allow_pickle=False)
AutoTokenizer.from_pretrained(x, trust_remote_code=False)
"""
    assert not list(dangers(harmless))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_out_of_data_and_no_shell(path: Path) -> None:
    assert not list(dangers(path.read_text()))


def test_checkpoints_are_safetensors_without_code() -> None:
    """The one place that lets transformers read weights says so; it would take a pickle otherwise."""
    text = (ROOT / "remoe_edge/tuning/load.py").read_text()
    calls = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and dotted(node.func) == "AutoModelForCausalLM.from_pretrained"
    ]
    assert len(calls) == 1
    given = {each.arg: getattr(each.value, "value", None) for each in calls[0].keywords}
    assert given["use_safetensors"] is True
    assert given["trust_remote_code"] is False


def test_downloads_are_pinned_by_hash() -> None:
    """pip fetches the sdist and a Jetson's wheels by hash, and installs without an index."""
    calls: dict[str, list[set[str]]] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and dotted(node.func) == "run_pip":
                words = {each.value for each in node.args if isinstance(each, ast.Constant)}
                calls.setdefault(path.name, []).append(words)
    # Its subject is a release that nobody has seen yet; it records the hash.
    del calls["try_upgrade.py"]
    assert calls.keys() == {"sdist.py", "wheel.py", "wheels.py"}
    for words in (words for each in calls.values() for words in each):
        assert {"download", "--require-hashes", "--no-deps"} <= words or {"install", "--no-index", "--no-deps"} <= words
    assert re.fullmatch(r"[0-9a-f]{64}", load_pin(patches_dir()).sha256)


def test_nothing_else_reaches_out() -> None:
    """Names that open connections: the server, its watcher, and tools that talk to servers under test."""
    reaching = re.compile(r"^ *(import|from) (aiohttp|urllib\.request|http\.client|requests|socket)\b", re.M)
    users = {str(path.relative_to(ROOT)) for path in SOURCES if reaching.search(path.read_text())}
    package = {path for path in users if path.startswith("remoe_edge")}
    assert all(path.startswith(("remoe_edge/serve/", "remoe_edge/monitor/")) for path in package), package


def test_workflows_are_pinned_and_may_only_read() -> None:
    workflows = sorted((ROOT / ".github/workflows").glob("*.yml"))
    assert workflows
    for path in workflows:
        text = path.read_text()
        assert re.search(r"^permissions:\n  contents: read$", text, re.M), path
        for action in re.findall(r"uses: (\S+)", text):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), (path, action)


def test_all_licences_are_known_and_permissive() -> None:
    found = licences.licences()
    assert {"numpy", "gguf", "safetensors", "aiohttp", "click"} <= {each.package for each in found}
    assert not [each for each in found if not each.allowed]


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("Apache-2.0 AND MIT", True),
        ("GPL-3.0-only OR MIT", True),
        ("GPL-3.0-only", False),
        ("MIT AND AGPL-3.0-only", False),
        (None, False),
        ("", False),
    ],
)
def test_what_the_list_of_licences_lets_pass(expression: str | None, allowed: bool) -> None:
    assert licences.Licence("x", "1", expression).allowed is allowed


def test_the_agpl_is_one_extra_and_imported_in_one_file() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r"^(\w+) = \[.*jetson-stats", project, re.M) == ["jetson"]
    users = [
        path.name
        for path in SOURCES
        if re.search(r"^\s*(import|from) jtop\b|import_module\(.jtop", path.read_text(), re.M)
    ]
    assert users in ([], ["jtop.py"])


def test_a_package_under_an_unknown_licence_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, expected in (
        ("Metadata-Version: 2.4\nName: x\nVersion: 1\nLicense-Expression: AGPL-3.0-only\n", "AGPL-3.0-only"),
        ("Metadata-Version: 2.1\nName: x\nVersion: 1\nLicense: do what you like\n", None),
        (
            "Metadata-Version: 2.1\nName: x\nVersion: 1\nClassifier: License :: OSI Approved :: ISC License (ISCL)\n",
            "ISC",
        ),
    ):
        folder = tmp_path / f"{abs(hash(text))}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(text)
        assert licences.licence(licences.Distribution.at(folder)) == expected


KEY = "sk-remoe-5d1b7c0e9a"


@pytest.mark.runtime
@pytest.mark.parametrize("by", ["variable", "file"])
def test_a_servers_key_is_nowhere_to_be_seen(by: str, tmp_path: Path) -> None:
    """Not in the log, however talkative, not in --json, in no command line, and not in the model process."""
    from serving import serving
    from tiny_models import write_tiny_model

    from remoe_edge.runtime.build import ensure_runtime

    ensure_runtime()
    model = write_tiny_model(tmp_path / "tiny.gguf", "olmoe", hidden=64, ff=64)
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    given = ["--api-key-file", str(keys)] if by == "file" else []
    environment = {} if by == "file" else {"LLAMA_API_KEY": KEY}
    with serving(model, tmp_path, "--verbose", "--ctx", "512", *given, environment=environment) as server:
        body = {"prompt": "a", "max_tokens": 1}
        authorised = {"Authorization": f"Bearer {KEY}"}
        assert server.request("/v1/completions", body, headers=authorised)[0] == 200
        status, message = server.error("/v1/completions", body, headers={"Authorization": f"Bearer {KEY}x"})
        assert status == 401
        pages = [server.request(path, headers=authorised)[1] for path in ("/metrics", "/health", "/v1/models", "/")]
        child = server.model_pid()
        seen = [Path(f"/proc/{child}/environ").read_bytes()]
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            # Processes end meanwhile.
            with suppress(OSError):
                seen.append(path.read_bytes())
        texts = [json.dumps(server.ready), json.dumps(pages), message]
    texts.append(server.stderr)
    assert "llama" in server.stderr
    assert not [text for text in texts if KEY in text]
    assert not [each for each in seen if KEY.encode() in each]
