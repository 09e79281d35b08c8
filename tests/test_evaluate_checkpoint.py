"""`eval` on small random checkpoints: against transformers' own logits, routers of every form, ablations, tasks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_hf import EXPERTS, LAYERS, TOP_K, tiny_model  # noqa: E402

from remoe_edge.cli import cli  # noqa: E402
from remoe_edge.errors import RemoeError  # noqa: E402
from remoe_edge.evaluate import hf_reader  # noqa: E402
from remoe_edge.evaluate.ablate import card_of, settings_of, variants  # noqa: E402
from remoe_edge.evaluate.harness import pair, right_answers, run_tasks  # noqa: E402
from remoe_edge.evaluate.hf_reader import HfReader, router_from, router_state, set_router  # noqa: E402
from remoe_edge.tuning.adapters import adapt  # noqa: E402
from remoe_edge.tuning.load import load_model, load_tokenizer  # noqa: E402
from remoe_edge.tuning.train import TuneConfig  # noqa: E402
from remoe_edge.tuning.weights import Weights  # noqa: E402

WORDS = "the router of a model chooses experts for each token and neighbours reuse them when nothing is read"
QUICK = ["--length", "24", "--sequences", "6", "--own-tokens", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("olmoe", tmp_path_factory.mktemp("olmoe"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    made = {}
    for name in "prose", "other":
        made[name] = tmp_path_factory.mktemp("text") / f"{name}.txt"
        made[name].write_text(" ".join(rng.choice(WORDS.split(), 400)), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def changed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A router file: the base's, slightly moved."""
    moe = adapt(load_model(str(folder)).eval())
    torch.manual_seed(1)
    router = {name: tensor + 0.03 * torch.randn_like(tensor) for name, tensor in router_state(moe).items()}
    path = tmp_path_factory.mktemp("router") / "changed.safetensors"
    save_file(router, path)
    return path


@pytest.fixture
def reader(folder: Path, changed: Path) -> HfReader:
    moe = adapt(load_model(str(folder)).eval())
    base = router_state(moe)
    return HfReader(moe, load_tokenizer(str(folder)), {"base": base, "tuned": router_from(moe, changed)})


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(cli, ["eval", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*arguments: object) -> str:
    done = CliRunner().invoke(cli, ["eval", *map(str, arguments)])
    assert done.exit_code != 0
    return f"{done.output}{done.exception}"


class TestReader:
    def test_losses_are_those_of_the_whole_logits(
        self, reader: HfReader, texts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # So few logits at once that every sequence is cut.
        monkeypatch.setattr(hf_reader, "_LOGITS_AT_ONCE", 320 * 5 * 4)
        rows = reader.sequences(texts["prose"], 24)[:5]
        base, tuned = reader.read(rows)
        logs = {}
        for name in reader.names:
            with reader.router(name) as moe, torch.no_grad():
                logs[name] = moe.model(input_ids=torch.from_numpy(rows[:, :-1])).logits.log_softmax(-1)
        targets = torch.from_numpy(rows[:, 1:, None])
        assert base.nll == pytest.approx(-logs["base"].gather(-1, targets)[..., 0].numpy(), abs=1e-4)
        assert tuned.nll == pytest.approx(-logs["tuned"].gather(-1, targets)[..., 0].numpy(), abs=1e-4)
        kl = (logs["base"].exp() * (logs["base"] - logs["tuned"])).sum(-1)
        assert tuned.kl == pytest.approx(kl.numpy(), abs=1e-4)
        assert base.kl is None
        assert tuned.kl.mean() > 1e-4
        assert base.ids.shape == (5, 24, LAYERS, TOP_K)
        assert (base.ids != tuned.ids).any()
        assert 0 < base.entropy.min() <= base.entropy.max() < 1

    def test_own_output_is_greedy(self, reader: HfReader, texts: dict[str, Path]) -> None:
        prompts = reader.sequences(texts["prose"], 24)[:2, :8]
        base, _ = reader.write(prompts, 3)
        assert base.ids.shape == (2, 3, LAYERS, TOP_K)
        with reader.router("base") as moe:
            out = moe.model.generate(torch.from_numpy(prompts), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        # Reading what it wrote, it chooses what it chose.
        read = reader.read(np.concatenate([out.numpy(), out.numpy()[:, :1]], 1))[0]
        assert (read.ids[:, 8:] == base.ids).all()

    def test_noise_is_small_but_measured(self, reader: HfReader, texts: dict[str, Path]) -> None:
        alone, bf16 = reader.noise(reader.sequences(texts["prose"], 24)[:4])
        assert alone.kl_mean < 1e-6
        assert 1e-6 < bf16.kl_mean < 0.1
        assert bf16.tokens == 96

    def test_bytes_are_those_of_the_text(self, reader: HfReader, texts: dict[str, Path]) -> None:
        rows = reader.sequences(texts["prose"], 24)
        text = texts["prose"].read_text().encode()
        # All but the first token and the rest that fills no sequence.
        assert 0.9 * len(text) < reader.text_bytes(rows) <= len(text)


class TestRouters:
    @pytest.mark.parametrize("arch", ["olmoe", "deepseek_v3", "gpt_oss", "mixtral"])
    def test_a_checkpoint_folder_is_a_router(self, arch: str, tmp_path: Path) -> None:
        one, other = tiny_model(arch, tmp_path / "one"), tiny_model(arch, tmp_path / "other", seed=1)
        moe = adapt(load_model(str(one)).eval())
        expected = router_state(adapt(load_model(str(other)).eval()))
        found = router_from(moe, other)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name

    def test_a_router_of_another_model_is_refused(self, reader: HfReader, tmp_path: Path) -> None:
        with reader.router("base") as moe:
            state = router_state(moe)
            name = next(iter(state))
            save_file({**state, name: state[name][:-1].contiguous()}, tmp_path / "small.safetensors")
            with pytest.raises(RemoeError, match=r"is \[7, 64\], expected \[8, 64\]"):
                router_from(moe, tmp_path / "small.safetensors")
            save_file({n: t for n, t in state.items() if n != name}, tmp_path / "less.safetensors")
            with pytest.raises(RemoeError, match="has no tensor 'model"):
                router_from(moe, tmp_path / "less.safetensors")
            save_file({**state, "model.layers.7.mlp.gate.weight": state[name].clone()}, tmp_path / "more.safetensors")
            with pytest.raises(RemoeError, match="no layer"):
                router_from(moe, tmp_path / "more.safetensors")


class TestCommand:
    def test_everything_at_once(self, folder: Path, changed: Path, texts: dict[str, Path], tmp_path: Path) -> None:
        second = tmp_path / "second.safetensors"
        shutil.copy(changed, second)
        given = [part for name, path in texts.items() for part in ("--text", f"{name}={path}")]
        out = tmp_path / "out"
        result = json.loads(invoke(folder, changed, second, *given, *QUICK, "-o", out, "--json"))
        assert result == json.loads((out / "eval.json").read_text())
        assert result["reuse_rate_base"] > 0
        assert result["ppl_base"] > 1
        # Equal routers: no spread over seeds.
        assert result["ppl_delta_ci95"] == pytest.approx([result["ppl_change"]] * 2)
        assert result["groups"]["tuned"]["routers"] == ["changed", "second"]
        assert {row["multiple"] for row in result["rows"]} == {1, 2, 4}
        assert len(result["noise"]) == 2
        assert "## The model's own output" in (out / "eval.md").read_text()
        assert (out / "eval.png").read_bytes().startswith(b"\x89PNG")
        assert "exists; pass --force" in refused(folder, changed, *given, *QUICK, "-o", out)

    def test_the_base_against_itself_changes_nothing(self, folder: Path, texts: dict[str, Path]) -> None:
        result = json.loads(invoke(folder, folder, "--text", texts["prose"], *QUICK, "--json"))
        assert result["reuse_rate_change"] == 0
        assert abs(result["ppl_change"]) < 1e-6
        assert result["kl_mean"] == pytest.approx(0, abs=1e-6)
        assert [verdict["reached"] for verdict in result["verdicts"]] == [False, True, False, None]

    def test_flags_without_effect_are_refused(self, folder: Path, changed: Path, texts: dict[str, Path]) -> None:
        text = ["--text", texts["prose"]]
        assert "--data has no effect without --ablate" in refused(folder, changed, *text, "--data", texts["prose"])
        assert "--limit has no effect without --tasks" in refused(folder, changed, *text, "--limit", 3)
        assert "--bias has no effect without --frontier" in refused(folder, changed, *text, "--bias", 0.1)
        assert "--ablate has no effect with --frontier" in refused(folder, changed, *text, "--frontier", "--ablate")
        assert "--frontier needs --output" in refused(folder, changed, *text, "--frontier")
        assert "--expert-cache has no effect" in refused(folder, changed, *text, "--expert-cache", "8s")
        assert "held-out text" in refused(folder, changed)
        assert "no such file" in refused(folder / "missing", changed, *text)
        assert "name this one" in refused(folder, changed, *text, *text)
        assert "too few" in refused(folder, changed, *text, "--length", 4000)


class TestAblation:
    def test_variants_leave_out_one_term_each(self) -> None:
        found = variants(TuneConfig(weights=Weights(smooth=0.0)))
        assert list(found) == ["full", "ce-only", "no-kl", "no-reuse", "no-lag", "no-window"]
        assert found["no-kl"].weights == Weights(smooth=0.0, kl=0.0)
        assert not found["ce-only"].weights.local
        assert found["ce-only"].weights.kl == 0

    def test_one_command_tunes_and_compares(self, folder: Path, texts: dict[str, Path], tmp_path: Path) -> None:
        text, data = ["--text", texts["prose"], *QUICK], texts["other"]
        router = tmp_path / "router.safetensors"
        tune = ["--length", 16, "--steps", 2, "--micro-batch", 2, "--accumulation", 1, "--held-out", 2, "--warm-up", 0]
        tune += ["--local-warm-up", 0, "--check-every", 1, "--lr", 0.01, "--max-ppl-increase", 1, "--smooth", 0]
        tune += ["--lag", 0, "--window", 0]
        done = CliRunner().invoke(cli, ["tune", *map(str, [folder, "--data", data, "-o", router, *tune])])
        assert done.exit_code == 0, done.output
        assert settings_of(router)[1] == 16
        out = tmp_path / "out"
        command = [folder, router, "--ablate", "--data", data, "--seeds", 2, *text, "-o", out]
        result = json.loads(invoke(*command, "--only", "full", "--only", "ce-only", "--json"))
        assert result["groups"].keys() == {"tuned", "ce-only"}
        assert result["groups"]["tuned"]["routers"] == ["full-seed0", "full-seed1"]
        assert result["verdicts"][3]["reached"] is not None
        one, two = (load_file(out / f"router-full-seed{seed}.safetensors") for seed in (0, 1))
        assert any(not torch.equal(one[name], two[name]) for name in one)
        assert card_of(out / "router-ce-only-seed1.safetensors")["settings"]["weights"]["reuse"] == 0
        before = {path: path.stat().st_mtime_ns for path in out.glob("router-*")}
        # The rest is added; what is there is kept.
        text_out = invoke(*command, "--force")
        assert "| no-kl |" in text_out
        assert "| no-reuse |" in text_out
        assert all(path.stat().st_mtime_ns == time for path, time in before.items())
        assert (out / "ablation.png").exists()
        # Other text is another experiment.
        other = [folder, router, "--ablate", "--data", texts["prose"], "--seeds", 1, *text, "-o", out, "--force"]
        assert "other text" in refused(*other)
        assert "no variant 'no-lag'" in refused(*command, "--only", "no-lag", "--force")

    def test_a_router_without_a_card_says_so(self, changed: Path) -> None:
        with pytest.raises(RemoeError, match="has no card"):
            settings_of(changed)


class TestTasks:
    def test_answers_are_paired_by_item(self) -> None:
        def samples(right: list[int]) -> dict:
            items = [{"doc_id": i, "exact_match": float(i in right)} for i in range(4)]
            # A second, looser filter comes later and does not count.
            return {"gsm8k": [*items, *({"doc_id": i, "exact_match": 1.0} for i in range(4))]}

        rows = pair({"base": right_answers(samples([0, 1])), "tuned": right_answers(samples([1, 2, 3]))})
        assert [(r["task"], r["items"], r["base_only"], r["tuned_only"]) for r in rows] == [("gsm8k", 4, 1, 2)]
        with pytest.raises(RemoeError, match="odd have none of exact_match"):
            right_answers({"odd": [{"doc_id": 0, "bleu": 1.0}]})

    def test_tasks_of_the_harness(self, reader: HfReader, folder: Path, tmp_path: Path) -> None:
        """A task of our own: the answer that the base finds likelier is the right one, so the base is always right."""
        pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra `eval`)")
        questions = [" ".join(words) for words in zip(*(WORDS.split()[skip:] for skip in (0, 3, 5)), strict=False)][:8]
        tokenizer = load_tokenizer(str(folder))
        choices = [" yes", " no"]
        with reader.router("base") as moe, torch.no_grad(), (tmp_path / "items.jsonl").open("w") as file:
            for question in questions:
                ids = tokenizer(question, return_tensors="pt")["input_ids"]
                scores = []
                for choice in choices:
                    added = tokenizer(choice, return_tensors="pt")["input_ids"]
                    logs = moe.model(input_ids=torch.cat([ids, added], 1)).logits.log_softmax(-1)
                    part = logs[0, ids.shape[1] - 1 : -1]
                    scores.append(float(part.gather(-1, added[0, :, None]).sum()))
                file.write(json.dumps({"question": question, "gold": int(np.argmax(scores))}) + "\n")
        (tmp_path / "own.yaml").write_text(
            "task: own\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {tmp_path}/items.jsonl}}, cache_dir: {tmp_path}/cache}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
            "doc_to_choice: ['yes', 'no']\ndoc_to_target: gold\nmetric_list: [{metric: acc}]\n"
        )
        (row,) = run_tasks(reader, tokenizer, ["own"], names=["base", "tuned"], folder=tmp_path, batch=2)
        assert (row["items"], row["base"], row["tuned_only"]) == (8, 1.0, 0)
        with pytest.raises(RemoeError, match="knows no task 'nothing'"):
            run_tasks(reader, tokenizer, ["nothing"], names=["base"], folder=tmp_path)

    def test_answers_that_are_written(self, reader: HfReader, folder: Path, tmp_path: Path) -> None:
        """As gsm8k: greedy answers under two filters, of which the first counts. What the base writes is right."""
        pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra `eval`)")
        tokenizer = load_tokenizer(str(folder))
        questions = [" ".join(WORDS.split()[skip : skip + 4]) for skip in range(4)]
        with reader.router("base") as moe, (tmp_path / "items.jsonl").open("w") as file:
            for question in questions:
                ids = tokenizer(question, return_tensors="pt")["input_ids"]
                written = moe.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
                answer = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
                file.write(json.dumps({"question": question, "answer": answer}) + "\n")
        (tmp_path / "written.yaml").write_text(
            "task: written\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {tmp_path}/items.jsonl}}, cache_dir: {tmp_path}/cache}}\n"
            "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
            "generation_kwargs: {until: ['never'], max_gen_toks: 6, do_sample: false}\n"
            "metric_list: [{metric: exact_match}]\n"
            "filter_list:\n- {name: strict, filter: [{function: take_first}]}\n"
            "- {name: none, filter: [{function: regex, regex_pattern: 'not there (.)'}, {function: take_first}]}\n"
        )
        (row,) = run_tasks(reader, tokenizer, ["written"], names=["base", "tuned"], folder=tmp_path, batch=1)
        assert (row["items"], row["base"], row["tuned_only"]) == (4, 1.0, 0)
        assert row["tuned"] < 1


def test_a_model_keeps_its_own_router(reader: HfReader) -> None:
    with reader.router("tuned") as moe:
        other = router_state(moe)
    with reader.router("base") as moe:
        assert any(not torch.equal(router_state(moe)[name], other[name]) for name in other)
        set_router(moe, other)
        assert all(torch.equal(router_state(moe)[name], other[name]) for name in other)
    assert moe.experts == EXPERTS
