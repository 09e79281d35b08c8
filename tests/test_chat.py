"""`remoe-edge chat`, as a library, through a pipe, and on a terminal."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from fake_jetson import VDD_IN_WATTS, ina3221
from small_twin import write_small_twin
from terminal import Terminal
from tiny_models import write_tiny_model

from remoe_edge import demo_model
from remoe_edge.chat.conversation import Conversation, Turn
from remoe_edge.cli import cli
from remoe_edge.errors import RemoeError
from remoe_edge.parameters import model_path
from remoe_edge.power.find import find_source
from remoe_edge.runtime.build import ensure_runtime
from remoe_edge.runtime.llama import CacheConfig, DecodingStoppedError, RuntimeReadError, Session, open_model

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and m['content'] == 'no' %}{{ raise_exception('not that') }}"
    "{% endif %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_twin(tmp_path_factory.mktemp("chat") / "twin.gguf")


@pytest.fixture(scope="module")
def templated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("chat") / "chat.gguf", "olmoe", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def runtime() -> None:
    ensure_runtime()


needs_runtime = [pytest.mark.runtime, pytest.mark.usefixtures("runtime")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--expert-cache", "off", "--io", "direct"], "--io has no effect with --expert-cache off"),
        (["--temp", "0", "--top-p", "0.5"], "--top-p has no effect with --temp 0"),
        (["--temp", "0", "--seed", "1"], "--seed has no effect with --temp 0"),
    ],
)
def test_wrong_usage(twin: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["chat", str(twin), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_word_demo_names_the_packaged_model(twin: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_model, "demo_gguf", lambda tuned: twin if tuned else twin.parent / "other.gguf")
    assert model_path("demo-tuned") == twin
    assert model_path(str(twin)) == twin
    for command in "chat", "run", "bench":
        result = CliRunner().invoke(cli, [command, "demo"])
        assert (result.exit_code, "other.gguf' does not exist" in result.stderr) == (2, True)
    # A file of this name comes first.
    (tmp_path / "demo").touch()
    assert model_path("demo") == Path("demo")


class TestConversation:
    pytestmark = needs_runtime

    @pytest.fixture
    def session(self, templated: Path) -> Iterator[Session]:
        with open_model(templated, CacheConfig("4s"), n_ctx=256, n_threads=1) as session:
            yield session

    def test_only_new_tokens_are_evaluated_and_answers_stay_the_same(self, session: Session, templated: Path) -> None:
        chat = Conversation(session, system="be brief", n_gen=8)
        "".join(chat.answer("w00001 hello"))
        held = session.n_past
        "".join(chat.answer("w00002"))
        assert (chat.answers[0].n_reused, chat.answers[1].n_reused) == (0, held)
        # The end of the first answer, which was chosen but not evaluated, and the new message.
        assert chat.answers[1].n_prompt == 1 + len(session.tokenize("\n[user]w00002\n[assistant]", add_special=False))
        assert chat.answers[1].measured["n_gen"] == 8
        assert chat.answers[1].measured["cache"]["n_slots"] == 4
        prompt, chosen = chat._tokens[:-8], chat._tokens[-8:]
        with open_model(templated, n_ctx=256, n_threads=1) as fresh:
            fresh.decode(prompt)
            assert list(fresh.generate(8)) == chosen

    def test_reset_forgets_and_keeps_the_system_prompt(self, session: Session) -> None:
        chat = Conversation(session, system="be brief", n_gen=4)
        first = "".join(chat.answer("w00001"))
        "".join(chat.answer("w00002"))
        chat.reset()
        assert "".join(chat.answer("w00001")) == first
        assert [message["role"] for message in chat.messages()] == ["system", "user", "assistant"]
        assert chat.answers[-1].n_reused > 0

    def test_the_oldest_turns_go_when_the_context_is_full(self, session: Session) -> None:
        chat = Conversation(session, n_gen=3)
        dropped = 0
        for number in range(20):
            "".join(chat.answer(f"message {number}"))
            dropped += chat.answers[-1].n_dropped
            assert session.n_past <= 256
            assert len(chat.turns) == number + 1 - dropped
        assert dropped > 8
        assert chat.turns[-1].user.startswith("message 19")
        # Room is made for several turns at a time.
        assert sum(answer.n_dropped > 0 for answer in chat.answers) < 6

    def test_a_message_longer_than_the_context_is_refused_and_nothing_is_lost(self, session: Session) -> None:
        chat = Conversation(session, n_gen=4)
        "".join(chat.answer("w00001"))
        turns = list(chat.turns)
        with pytest.raises(RemoeError, match=r"the message has \d{3} tokens, but the context only 256; raise --ctx"):
            "".join(chat.answer("x" * 300))
        assert chat.turns == turns
        "".join(chat.answer("w00002"))
        assert chat.answers[-1].n_reused > 0

    def test_an_answer_ends_where_the_context_does(self, session: Session) -> None:
        chat = Conversation(session)
        "".join(chat.answer("w00001"))
        if chat.answers[-1].ended != "end":
            assert chat.answers[-1].ended == "context"
        "".join(chat.answer("w00002"))
        assert chat.turns[-1].user == "w00002"

    def test_stopped_in_the_answer(self, session: Session) -> None:
        chat = Conversation(session, n_gen=50)
        answer = chat.answer("w00001")
        next(answer)
        next(answer)
        chat.stop()
        assert list(answer) in ([], [""])
        assert chat.answers[-1].ended == "stopped"
        assert chat.answers[-1].measured["n_gen"] == 2
        assert len(chat.turns) == 1
        "".join(chat.answer("w00002"))
        assert len(chat.turns) == 2

    def test_stopped_in_the_prompt(self, session: Session) -> None:
        prompt = list(range(10, 210))
        session.decode(prompt)
        expected = session.logits().tobytes()
        for after in 1, 20, 77:
            session.clear()
            calls = iter(range(after))
            session.stop_when(lambda calls=calls: next(calls, None) is None)  # type: ignore[misc]
            with pytest.raises(DecodingStoppedError):
                session.decode(prompt)
            session.stop_when(None)
            assert session.n_past == 0
            session.decode(prompt)
            assert session.logits().tobytes() == expected

    def test_a_turn_stopped_before_its_first_token_is_forgotten(self, session: Session) -> None:
        chat = Conversation(session, n_gen=4)
        done = threading.Event()

        def stop() -> None:
            while not done.wait(0.0001):
                chat.stop()

        stopper = threading.Thread(target=stop)
        stopper.start()
        text = "".join(chat.answer("x" * 200))
        done.set()
        stopper.join()
        assert (text, chat.turns, chat.answers[-1].ended) == ("", [], "stopped")
        assert "".join(chat.answer("w00001")) != ""

    def test_keep_forgets_the_rest(self, session: Session) -> None:
        session.decode([280, 281, 282, 283])
        assert session.keep(2) == session.n_past == 2
        assert session.keep(5) == 2
        session.decode([282, 283])
        cut = session.logits().tobytes()
        session.clear()
        session.decode([280, 281])
        session.decode([282, 283])
        assert session.logits().tobytes() == cut

    def test_a_failed_read_leaves_the_history_as_it_was(self, templated: Path, tmp_path: Path) -> None:
        path, content = tmp_path / "m.gguf", templated.read_bytes()
        path.write_bytes(content)
        with open_model(path, CacheConfig("3s", io="direct"), n_threads=1) as session:
            chat = Conversation(session, n_gen=6)
            first = "".join(chat.answer("w00001"))
            os.truncate(path, len(content) // 2)
            with pytest.raises(RuntimeReadError, match="offset"):
                "".join(chat.answer("w00002 and more"))
            assert chat.turns == [Turn("w00001", first)]
            path.write_bytes(content)
            second = "".join(chat.answer("w00002 and more"))
        with open_model(templated, n_threads=1) as session:
            chat = Conversation(session, n_gen=6)
            assert "".join(chat.answer("w00001")) == first
            assert "".join(chat.answer("w00002 and more")) == second

    def test_a_system_prompt_needs_a_template_that_takes_it(self, session: Session, twin: Path) -> None:
        with pytest.raises(RemoeError, match="not that"):
            Conversation(session, system="no")
        with open_model(twin) as plain, pytest.raises(RemoeError, match="no chat template"):
            Conversation(plain, system="be brief")

    def test_without_a_template_the_text_goes_on(self, twin: Path) -> None:
        with open_model(twin, CacheConfig("4s"), n_threads=1) as session:
            chat = Conversation(session, n_gen=2)
            assert "".join(chat.answer("w00000")) == "w00001w00002"
            assert "".join(chat.answer("w00010")) == "w00011w00012"
            assert session.tokenize("w00000w00001w00002\nw00010w00011") == chat._tokens[:-1]

    def test_power_is_measured_while_it_answers(self, twin: Path, tmp_path: Path) -> None:
        ina3221(tmp_path, 6)
        sensor = partial(find_source, "ina3221", tmp_path)
        with open_model(twin, n_ctx=1024, n_threads=1) as session:
            chat = Conversation(session, n_gen=600, power=lambda: sensor().source)
            "".join(chat.answer("w00000"))
            assert chat.answers[-1].watts == pytest.approx(VDD_IN_WATTS)
            assert (chat.answers[-1].joules_per_token or 0) > 0

    def test_saved_as_text_or_json(self, session: Session, tmp_path: Path) -> None:
        chat = Conversation(session, n_gen=4)
        answer = "".join(chat.answer("w00001"))
        for name in "talk.txt", "talk.json":
            chat.save(tmp_path / name)
        assert (tmp_path / "talk.txt").read_text() == f"user: w00001\n\nassistant: {answer}\n"
        assert json.loads((tmp_path / "talk.json").read_text()) == {"messages": chat.messages()}
        with pytest.raises(RemoeError, match="exists"):
            chat.save(tmp_path / "talk.txt")


class TestPipe:
    pytestmark = needs_runtime

    def chat(self, model: Path, text: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "remoe_edge", "chat", str(model), "-t", "1", "--temp", "0", *arguments]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False)

    def test_a_line_is_a_message(self, twin: Path, tmp_path: Path) -> None:
        path = tmp_path / "talk.txt"
        text = f"w00000\n\n/stats\nw00005\\\nw00010\n/save {path}\n/nonsense\n//w00020\n"
        result = self.chat(twin, text, "-n", "2", "--expert-cache", "4s")
        assert result.stdout == "w00001w00002\nw00011w00012\n" + result.stdout.splitlines()[-1] + "\n"
        for part in "no chat template", "tokens/s", "hits", "power: ", "there is no /nonsense", "2 turns in ":
            assert part in result.stderr
        assert result.returncode == 1
        assert path.read_text() == "w00000w00001w00002\nw00005\nw00010w00011w00012\n"

    def test_json(self, twin: Path) -> None:
        long = "w00001" * 300
        result = self.chat(twin, f"w00000\n{long}\nw00010\n", "-n", "3", "--json", "-c", "256")
        answers = [json.loads(line) for line in result.stdout.splitlines()]
        assert result.returncode == 1
        assert "raise --ctx" in answers[1]["error"]
        assert [answer["text"] for answer in answers] == ["w00001w00002w00003", "", "w00011w00012w00013"]
        assert (answers[2]["n_reused"], answers[2]["ended"], answers[0]["prompt"]) == (3, "length", "w00000")
        assert answers[0]["watts"] is None or answers[0]["watts"] > 0
        assert 0 <= answers[2]["hit_rate"] <= 1

    def test_ctrl_c_ends_it(self, twin: Path) -> None:
        command = [sys.executable, "-m", "remoe_edge", "chat", str(twin), "-t", "1", "--temp", "0", "-n", "4000"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("w00000\nw00000\n")
            process.stdin.flush()
            assert process.stdout.read(12) == "w00001w00002"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in errors


class TestTerminal:
    pytestmark = needs_runtime

    def open(self, model: Path, *arguments: str) -> Terminal:
        return Terminal("chat", str(model), "-t", "1", "--temp", "0", "--expert-cache", "4s", *arguments)

    def test_a_conversation(self, twin: Path, tmp_path: Path) -> None:
        path = tmp_path / "talk.json"
        path.write_text("mine")
        with self.open(twin, "-c", "4096", "-n", "4000") as terminal:
            terminal.wait_for(r"/help lists .*\n> ")
            # Pasted: one message, although it has two lines.
            terminal.type("\x1b[200~w00007\nw00000\x1b[201~")
            terminal.wait_for("w00000")
            terminal.type("\r")
            terminal.wait_for("w00001w00002")
            # It streams: there would be 4000 tokens if this were the end.
            terminal.type("\x03")
            terminal.wait_for(r"\[stopped\]\n> ")
            terminal.type("/st\t\r")
            shown = terminal.wait_for(r"since the start: .*\n> ")
            for part in r"tokens/s", r"[\d.]+% hits, [\d.]+ MB read", r"power: ", r"history: 1 turn;":
                assert re.search(part, shown)
            terminal.type(f"/save {path}\r")
            terminal.wait_for(r"exists; /save --force .*\n> ")
            assert path.read_text() == "mine"
            terminal.type(f"/save --force {path}\r")
            terminal.wait_for(r"1 turn in .*\n> ")
            saved = json.loads(path.read_text())["messages"]
            assert saved[0] == {"role": "user", "content": "w00007\nw00000"}
            assert saved[1]["content"].startswith("w00001w00002")
            terminal.type("/reset\r")
            terminal.wait_for(r"forgotten.*\n> ")
            terminal.type("/help\r")
            terminal.wait_for(r"/quit .*\n(.*\n)+> ")
            terminal.type("/quit\r")
            assert terminal.wait() == 0

    def test_ctrl_c_at_the_prompt(self, twin: Path) -> None:
        with self.open(twin, "-n", "2") as terminal:
            terminal.wait_for(r"/help lists .*\n> ")
            terminal.type("half a line")
            terminal.wait_for("half a line")
            terminal.type("\x03")
            assert "ends" not in terminal.wait_for("\n> ")
            terminal.type("\x03")
            terminal.wait_for("Ctrl-C again or Ctrl-D ends.\n> ")
            # The program goes on.
            terminal.type("w00000\r")
            terminal.wait_for("w00001w00002\n> ")
            terminal.type("\x03")
            terminal.wait_for("ends.\n> ")
            terminal.type("\x03")
            assert terminal.wait() == 0

    def test_ctrl_d_ends(self, twin: Path) -> None:
        with self.open(twin) as terminal:
            terminal.wait_for(r"/help lists .*\n> ")
            terminal.type("\x04")
            assert terminal.wait() == 0
