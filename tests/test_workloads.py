import json
from pathlib import Path
from typing import Any

import pytest

from remoe_edge.errors import RemoeError
from remoe_edge.measure.workloads import PACKAGED, Prompt, load_workload, single_prompt


def written(path: Path, *entries: Any) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_prompts_say_where_they_are_from(name: str) -> None:
    workload = load_workload(name)
    assert workload.name == name
    assert len(workload.prompts) >= 4
    assert len({prompt.name for prompt in workload.prompts}) == len(workload.prompts)
    for prompt in workload.prompts:
        assert prompt.source
        assert prompt.license in ("MIT", "Apache-2.0", "public domain")
        assert prompt.chat == (name not in ("text", "demo"))
    assert len(load_workload(name, 2).prompts) == 2


@pytest.mark.parametrize(
    ("entry", "prompt"),
    [
        ({"name": "n", "prompt": "x", "source": "s", "licence": "MIT"}, Prompt("n", "x", False, "s", "MIT")),
        ({"prompt": "x", "format": "chat", "task_id": "t/1"}, Prompt("t/1", "x", True)),
        ({"id": 7, "text": "x"}, Prompt("7", "x")),
        ({"id": 7, "question": "x", "answer": "y"}, Prompt("7", "x", True)),
        ({"question_id": 81, "turns": ["x", "y"]}, Prompt("81", "x", True)),
        (
            {
                "id": "s",
                "conversations": [
                    {"from": "system", "value": "be kind"},
                    {"from": "human", "value": "x"},
                    {"from": "gpt", "value": "y"},
                    {"from": "human", "value": "z"},
                ],
            },
            Prompt("s", "x", True),
        ),
        (
            {"id": "o", "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "x"}]},
            Prompt("o", "x", True),
        ),
    ],
)
def test_known_forms_are_read(tmp_path: Path, entry: Any, prompt: Prompt) -> None:
    assert load_workload(written(tmp_path / "mine.jsonl", entry)).prompts == (prompt,)
    array = tmp_path / "array.json"
    array.write_text(json.dumps([entry], indent=2))
    assert load_workload(str(array)).prompts == (prompt,)


def test_prompts_have_names_of_their_own(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.jsonl", {"prompt": "x"}, {"name": "a", "prompt": "x"}, {"name": "a", "prompt": "y"})
    workload = load_workload(path)
    assert workload.name == "mine"
    assert [prompt.name for prompt in workload.prompts] == ["mine.jsonl, line 1", "a", "a (2)"]


def test_separators_of_unicode_within_a_text_do_not_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert load_workload(str(path)).prompts[0].text == "a\u2028b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ("{", "line 1: is not JSON"),
        ('{"prompt": "x"}\n\n[1', "line 3: is not JSON"),
        ("[1", "is not JSON"),
        ("7", "is not an object"),
        ('{"story": "x"}', "has no text; expected .*found: story"),
        ('{"prompt": " "}', "has no text"),
        ('{"prompt": 7}', "has no text"),
        ('{"turns": []}', "has no text"),
        ('{"conversations": [{"from": "gpt", "value": "y"}]}', "has no text"),
        ('{"messages": "x"}', "has no text"),
    ],
)
def test_other_content_is_an_error_that_says_where(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(RemoeError, match=rf"mine\.jsonl.*{message}"):
        load_workload(str(path))


def test_a_large_file_has_to_be_cut(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.jsonl", *({"prompt": f"{index}"} for index in range(65)))
    with pytest.raises(RemoeError, match="has 65 prompts; say how many of them to use with --prompts"):
        load_workload(path)
    assert len(load_workload(path, 65).prompts) == 65


def test_what_does_not_exist_or_is_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RemoeError, match="no such workload; give a JSONL file, or one of gsm8k"):
        load_workload("gsm9k")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(RemoeError, match="is not UTF-8"):
        load_workload(str(tmp_path / "bytes.jsonl"))


def test_workloads_with_the_same_texts_have_the_same_hash() -> None:
    assert single_prompt("a", "one").sha256 == single_prompt("a", "two").sha256
    assert single_prompt("a").sha256 != single_prompt("b").sha256
