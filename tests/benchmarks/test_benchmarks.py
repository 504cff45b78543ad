"""Every benchmark still runs, at its smallest size, and what it compares is the same."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch


FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def bench():
    """Function that imports a module of this folder, as the benchmarks import each other."""
    import importlib

    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("references", [None, 1])
def test_scoring(bench, references, monkeypatch):
    """A round robin of three images, timed on all pairs or some, against all peers that are installed."""
    scoring = bench("bench_scoring")
    monkeypatch.setattr(bench("peers"), "NEW_TOKENS", 2)
    case = scoring.RoundRobin(3, 4, "text_first", "3m", references=references, peer_pairs=2, with_generation=True)
    results = scoring.round_robin(case)
    assert results["largest_difference"] < 1e-4
    assert results["encodings_per_image"] == 1
    assert all(
        results[f"speedup_vs_{name}"] > 0 for name in ("batched", "batched_forward", "one_by_one", "generation")
    )
    if references is None:
        assert 1 < results["theoretical_speedup"] < 10


def test_distinct_pairs(bench):
    """Pairs that share nothing get the scores of a plain batch."""
    assert bench("bench_scoring").distinct_pairs(3, 4, "3m", repeats=1)["largest_difference"] < 1e-4


def test_without_vllm(bench, tmp_path, monkeypatch, capsys):
    """Where vLLM is not installed, a line says so and nothing is measured."""
    vllm = bench("bench_vllm")
    monkeypatch.setattr(vllm, "PYTHON", tmp_path / "python")
    assert vllm.beside_vllm("3m") == {}
    assert "no comparison with vLLM" in capsys.readouterr().err


@pytest.mark.slow
def test_beside_vllm(bench):
    """vLLM is asked with the same tokens and gives the same log-odds, where it is installed."""
    vllm = bench("bench_vllm")
    if not vllm.PYTHON.exists():
        pytest.skip("vLLM is not installed: `make test-vllm` does it.")
    results = vllm.beside_vllm("3m", rounds=1, num_tokens=4)
    assert results["largest_difference"] < 1e-4
    assert results["distinct_pairs_speedup_vs_vllm"] > 0


def test_questions_for_vllm(bench, tmp_path):
    """The process of vLLM is given each image once, and reads the pixels and prompts that the judge sees."""
    import numpy as np

    from rewarddance_hf import RewardDanceScorer

    judges, vllm = bench("judges"), bench("bench_vllm")
    scorer = RewardDanceScorer(*judges.make_judge(4, "text_first", **judges.tiny_config("3m")))
    questions = vllm.make_questions(scorer, "round_robin", 3, 4, 0)
    vllm.write(scorer.processor, questions, tmp_path / "questions.npz")
    with np.load(tmp_path / "questions.npz") as file:
        assert len(file["images"]) == 3
        for question, prompt, shown in zip(questions, file["prompts"], file["shown"], strict=True):
            assert scorer.processor.write_question(question) == prompt
            pixels = [np.asarray(image) for image in (question.reference[0], question.sample[0])]
            assert all(np.array_equal(file["images"][i], one) for i, one in zip(shown, pixels, strict=True))


@pytest.mark.parametrize("has_one_reference", [False, True])
def test_reward_step(bench, has_one_reference):
    """All ways give the gradient of the full graph."""
    results = bench("bench_reward_step").reward_step("images_first", has_one_reference, 4, "3m", repeats=1)
    assert all(value < 1e-4 for key, value in results.items() if key.endswith("difference"))


def test_input(bench):
    """Images are prepared by threads and by processes."""
    inputs = bench("bench_input")
    assert inputs.desk("jpeg_512", 2, (1,), 4)["images_per_second_1_threads"] > 0
    assert inputs.collator("png_1024", 4, (1,), 4)["cpu_ms_per_row"] > 0


def test_attention(bench, monkeypatch):
    """Ways to attend to a shared prefix agree (FlexAttention needs a compiler), and what attention takes is seen."""
    attention = bench("bench_attention")
    monkeypatch.setattr(attention, "WAYS", ("copied", "grouped", "apart"))
    monkeypatch.setattr(attention, "REPEATS", 1)
    shares, shape = attention.shares("3m", 2, 4, "text_first")
    assert shape[:2] + shape[3:] == (2, shape[1], 10, 5, 32)
    assert 0 < shares["share_of_copies"] < shares["share_of_attention"] < 1
    results = attention.compare(*shape)
    assert results["apart_float32_difference"] < 1e-5
    assert results["grouped_float32_difference"] < 1e-5
    assert results["apart_bfloat16_difference"] < 0.05


def test_tournaments(bench):
    """A tournament asks less."""
    assert bench("bench_scoring").tournaments()["swiss_over_round_robin"] < 1


def test_gradient(bench, monkeypatch):
    """Memory of a ReFL step is below that of the whole sampler."""
    gradient = bench("bench_gradient")
    monkeypatch.setattr(gradient, "STEPS", 4)
    monkeypatch.setattr(gradient, "ROUNDS", 1)
    assert gradient.pipeline("StableDiffusion3", 4)["refl_step_memory_over_full_backprop"] < 1


def test_training_memory(bench, monkeypatch):
    """A step with labelled positions only has the loss of one with all, up to how it is averaged."""
    training = bench("bench_training_memory")
    monkeypatch.setattr(training, "VOCABULARY", 2000)
    batch, model = training.batch_and_model()
    losses = [training.step(full_logits, batch, model) for full_logits in (False, True)]
    assert all(torch.isfinite(loss) for loss in losses)
    assert training.step(True, batch, model) == losses[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads peaks of memory from /proc")
def test_peak_of_memory(bench):
    """The peak of a step is measured above what there was before it (in a fresh process, when benchmarks run)."""
    before, peaks = torch.ones(60_000_000, dtype=torch.uint8), []

    class Connection:
        send = peaks.append

    def allocate(measure, count):
        measure(lambda: torch.ones(count, dtype=torch.uint8).max())

    bench("timing")._send_peak(allocate, (30_000_000,), Connection)
    assert 29e6 <= peaks[0] <= 40e6
    del before


@pytest.mark.parametrize("name", ["internvl3_5_8b", pytest.param("qwen3_vl_8b", marks=pytest.mark.slow)])
def test_gpu(bench, name, monkeypatch):
    """What is measured on a GPU runs on any device, of the same classes at tiny size (FlexAttention needs a compiler)."""
    monkeypatch.setattr(bench("bench_attention"), "WAYS", ("copied", "grouped", "apart"))
    gpu = bench("bench_gpu")
    size = gpu.SIZES[name]
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 1000}
    vision = {"hidden_size": 32, "intermediate_size": 32}
    if name.startswith("internvl"):
        vision |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    else:
        vision |= {"depth": 3, "num_heads": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [0, 1]}
        rope = size.configs["text_config"]["rope_parameters"]
        text["rope_parameters"] = {**rope, "mrope_section": [6, 5, 5]}
    configs = {"text_config": size.configs["text_config"] | text}
    configs["vision_config"] = size.configs["vision_config"] | vision
    small = {"num_tokens": 4, "pairs": 2, "images": 3, "train_pairs": 1, "updates": 2, "repeats": 1}
    size = dataclasses.replace(size, configs=configs, device="cpu", dtype=torch.float32, bound=1e-4, **small)
    results = {task: measure(size) for task, measure in gpu.TASKS.items()}
    assert results["attention"]["apart_float32_difference"] < 1e-5
    assert results["score"]["images_per_second"] > 0
    assert results["rank"]["share_of_peak"] > 0
    assert results["reward_step"]["again_time_over_full_graph"] > 0
    assert results["train"]["tokens_per_second"] > 0


def test_memory_of_configurations(bench):
    """All configurations of large generators are counted, but for those of editors, whose source images are not (models take minutes)."""
    refl = bench("bench_refl_memory")
    assert set(refl.RECIPES) == {path.stem for path in refl.CONFIGS.glob("refl_*.yaml")} - {
        "refl_shapes",
        "refl_flux_kontext",
    }


@pytest.mark.slow
def test_encoded_prompts(bench):
    """Prompts that are encoded once are not encoded in an update; text encoders have the share in the parameters that they have in FLUX."""
    results = bench("bench_encoded_prompts").flux_reduced(width=128, pixels=32, tokens=8, steps=2, updates=1)
    assert results["encoding_once_seconds"] < results["encoding_seconds"] / 10
    assert 0.35 < results["t5_over_denoiser"] < 0.45


def test_results_are_kept_and_compared(bench, tmp_path, monkeypatch, capsys):
    """Results are written with commit and versions; what got worse, failed or changed is said, and ends with status 1."""
    run, thresholds = bench("run"), bench("thresholds")
    values = {"part": {"ratio": 2.0, "other": 1.0}}

    def broken():
        raise RuntimeError("no memory")

    monkeypatch.setattr(
        run, "measurements", lambda is_full=False: {"a/part": lambda: values["part"], "b/broken": broken}
    )
    monkeypatch.setattr(thresholds, "AT_LEAST", {"a/*/ratio": 1.5})
    output, before = tmp_path / "results" / "here.json", tmp_path / "before.json"

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", "--output", str(output), *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run.main()
        return end.value.code, capsys.readouterr()

    status, printed = main()
    assert status == 1
    assert "b/broken failed" in printed.out
    assert "no memory" in printed.err
    written = json.loads(output.read_text())
    assert written["results"] == {"a/part/ratio": 2.0, "a/part/other": 1.0}
    assert written["versions"]["torch"] == torch.__version__
    assert {"date", "cpu", "cores", "python"} <= set(written)
    assert written["commits"] == {"a/part": written["commit"]}
    output.rename(before)
    values["part"] = {"ratio": 1.0, "other": 1.01}
    status, printed = main("--only", "a/", "--compare", before)
    assert status == 1
    assert "a/part/ratio: 2 -> 1 (0.50x)" in printed.out
    assert "a/part/other" not in printed.out.split("Against")[1]
    assert "a/part/ratio is 1, but must be at least 1.5" in printed.out
    values["part"]["ratio"] = float("nan")
    assert main("--only", "a/")[0] == 1
    values["part"]["ratio"] = 1.6
    assert main("--only", "a/")[0] == 0
    values["part"] = {}  # what it needs is not installed
    assert main("--only", "a/")[0] == 0
    assert json.loads(output.read_text())["results"]["a/part/ratio"] == 1.6


def test_thresholds_name_what_is_measured(bench):
    """Each limit is about something that is measured, or it would never be broken."""
    from fnmatch import fnmatch

    names = list(bench("run").measurements(is_full=True))
    thresholds = bench("thresholds")
    for pattern in [*thresholds.AT_LEAST, *thresholds.AT_MOST]:
        assert any(fnmatch(name, pattern.rpartition("/")[0]) for name in names), pattern


def test_tables_are_those_of_the_results(bench):
    """The tables of both README.md are made from a file of results, and not by hand."""
    table = bench("results_table")
    text = "".join(path.read_text(encoding="utf-8") for path in table.READMES)
    files = [json.loads(path.read_text(encoding="utf-8")) for path in (FOLDER / "results").iterdir()]
    for name in table.TABLES:
        measured = [file for file in files if name in table.measured(file)]
        assert f"<!-- {name}: begin -->" in text
        assert not measured or any(table.write(file, text, [name]) == text for file in measured), name


def test_table_of_a_gpu(bench):
    """Tables that a machine did not measure stay as they are."""
    table = bench("results_table")
    results = {"gpu/internvl3_5_2b/score/images_per_second": 120.0, "gpu/internvl3_5_2b/train/tokens_per_second": 9e3}
    written = {"commits": {"gpu/internvl3_5_2b/score": "abc1234"}, "versions": {"torch": "2.13.0"}, "threads": 1}
    written |= {"results": results, "date": "2026-12-01", "gpu": "Large GPU", "python": "3.12.1"}
    before = "<!-- gpu: begin -->\nold\n<!-- gpu: end -->\n<!-- scoring: begin -->\nkept\n<!-- scoring: end -->\n"
    text = table.write(written, before)
    assert "Commit abc1234, 2026-12-01, Large GPU" in text
    assert "| internvl3_5_2b | 120 | - |" in text
    assert "\nkept\n" in text
    assert "old" not in text
