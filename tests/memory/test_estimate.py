"""`rewarddance estimate`: what is counted is what real trainings allocate, and what several GPUs hold follows from it."""

import json
from pathlib import Path

import pytest
import transformers
from hub_server import LoopbackHub
from new_process import run_python

from rewarddance_hf.memory.report import BEFORE, CARDS, GIB, Count, advice, on_each_gpu, table, with_split_denoiser
from rewarddance_hf.scripts.estimate import EstimateArguments, find_task, make_rows, read_parallel, with_gpu_defaults


ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
BILLION = 10**9
COUNT_ALL = """
import json, os, sys
from pathlib import Path
from rewarddance_hf.scripts.estimate import estimate, parse
counts = {}
for name, flags in json.loads(Path(sys.argv[1]).read_text()).items():
    task, parsed = parse(flags)
    counts[name] = estimate(task, *parsed)[1].as_dict()
print()
print(json.dumps(counts))
sys.stdout.flush()
os._exit(0)
"""


def counted(arguments, file, **settings):
    """Counts by name."""
    file.write_text(json.dumps(arguments))
    done = run_python("-c", COUNT_ALL, file, **settings)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def measured(file):
    """Peaks of the real trainings by name."""
    done = run_python(Path(__file__).parent / "real_peaks.py", file)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """Vision-language model whose weights and activations take some megabytes each."""
    import tiny_vlms

    config, processor = tiny_vlms.internvl()
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 64}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    text = {**config.text_config.to_dict(), "model_type": "qwen3", **sizes, "layer_types": None}
    config = transformers.InternVLConfig(
        text_config=text,
        vision_config={**config.vision_config.to_dict(), "hidden_size": 64, "intermediate_size": 256},
        image_token_id=config.image_token_id,
        image_seq_length=config.image_seq_length,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("vlm")
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.new_process
def test_a_judge_takes_what_is_counted(vlm, tmp_path):
    """LoRA and all weights, with and without checkpointing: within 1 % of what the allocator of the CPU sees."""
    common = ["--model", str(vlm), "--per_device_train_batch_size", "4", "--bf16", "false", "--lora_dropout", "0"]
    cases = {
        f"{kind} {checkpointing}": [*common, *flags, "--gradient_checkpointing", checkpointing]
        for kind, flags in {"lora": ["--use_peft"], "full": []}.items()
        for checkpointing in ("true", "false")
    }
    counts = counted(cases, tmp_path / "cases.json")
    peaks = measured(tmp_path / "cases.json")
    for name, peak in peaks.items():
        assert counts[name]["peak"] == pytest.approx(peak, rel=0.01), name
    assert counts["full true"]["parts"]["optimizer"] == pytest.approx(
        2 * counts["full true"]["parts"]["weights"], rel=0.01
    )


@pytest.mark.slow
@pytest.mark.new_process
@pytest.mark.parametrize("is_adapter", [True, False])
def test_a_generator_takes_what_is_counted(is_adapter, tmp_path):
    """A tuned pipeline: within 1 % of what the same operations on the CPU return. A judge beside it comes on top."""
    import tiny_hub

    tiny_hub.save_pipeline(tiny_hub.stable_diffusion_35, tmp_path / "pipeline")
    tiny_hub.save_vlm("internvl", tmp_path / "vlm", "GotOcr2ImageProcessorFast")
    tiny_hub.save_judge(tmp_path / "vlm", tmp_path / "judge")
    flags = ["--pipeline", str(tmp_path / "pipeline"), "--bf16", "false", "--dtype", "float32"]
    flags += ["--num_inference_steps", "2", "--pipeline_kwargs", '{"height": 256, "width": 256}']
    flags += ["--per_device_train_batch_size", "4", *(["--use_peft"] if is_adapter else [])]
    (tmp_path / "cases.json").write_text(json.dumps({"alone": flags}))
    peak = measured(tmp_path / "cases.json")["alone"]
    counts = counted(
        {"alone": flags, "judged": [*flags, "--judge", str(tmp_path / "judge")]}, tmp_path / "more_cases.json"
    )
    assert counts["alone"]["peak"] == pytest.approx(peak, rel=0.01)
    judged = counts["judged"]
    assert {"VAE decode", "reward step", "backward"} <= set(judged["phases"])
    assert judged["peak"] > counts["alone"]["peak"] + judged["parts"]["judge"]


@pytest.mark.slow
@pytest.mark.new_process
def test_only_configurations_are_fetched(tmp_path):
    """A name on the Hub: no weights are downloaded. The command prints a table."""
    import tiny_hub

    name = "OpenGVLab/InternVL3_5-2B-HF"
    with LoopbackHub() as hub:
        tiny_hub.save_vlm("internvl", tmp_path / "vlm", "GotOcr2ImageProcessorFast")
        hub.put(name, tmp_path / "vlm")
        environment = hub.environment(tmp_path / "home", PYTHONPATH=str(ROOT))
        done = run_python("-m", "rewarddance_hf", "estimate", "--model", name, "--use-peft", env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "adapter" in done.stdout
    assert "The largest part: " in done.stdout
    files = [path.name for path in (tmp_path / "home").rglob("*") if path.is_file() or path.is_symlink()]
    assert "config.json" in files
    assert not [file for file in files if file.endswith(".safetensors")]


def judge_count(is_adapter=False):
    """8 billion parameters."""
    trained = 10**8 if is_adapter else 8 * BILLION
    parts = {"weights": 8 * BILLION * 2 / GIB}
    if is_adapter:
        parts["adapter"] = trained * 4 / GIB
    parts |= {"gradients": trained * 4 / GIB, "optimizer": trained * 8 / GIB, "activations": 2.0}
    return Count(parts, 8 * BILLION + trained * is_adapter, trained, 2 * 10**8, 10**9)


def test_several_gpus():
    """Each holds its share of what an engine splits, and all of the rest."""
    count = judge_count()
    assert on_each_gpu(count, "none", 1) is count
    ddp = on_each_gpu(count, "ddp", 8)
    assert ddp.peak == pytest.approx(count.peak + count.parts["gradients"])
    fsdp = on_each_gpu(count, "fsdp2", 8)
    gathered = (4 * 2 * 10**8 + 10**9) * 2 / GIB
    assert fsdp.peak == pytest.approx(8 * BILLION * 16 / 8 / GIB + gathered + 2.0)
    zero2, zero3 = (on_each_gpu(count, name, 8) for name in ("zero2", "zero3"))
    assert zero2.parts["weights"] == pytest.approx(8 * BILLION * 2 / GIB)
    assert zero3.parts["weights"] == pytest.approx(BILLION * 2 / GIB)
    for count in (judge_count(), judge_count(is_adapter=True)):  # buffers have one size, whatever is trained
        assert on_each_gpu(count, "zero2", 8).parts["gathered"] == pytest.approx(BILLION / GIB)
        assert on_each_gpu(count, "zero3", 8).parts["gathered"] == pytest.approx(3 * BILLION / GIB)
    adapter = on_each_gpu(judge_count(is_adapter=True), "fsdp2", 8)
    assert adapter.parts["weights"] == pytest.approx((8 * BILLION * 2 + 10**8 * 4) / 8 / GIB)
    assert adapter.peak < fsdp.peak


def test_a_denoiser_on_several_gpus():
    """Its weights, its adapter and the optimizer are split; what is before the first update is on the CPU."""
    parts = {"transformer": 24.0, "vae": 1.0, "adapter": 0.4, "gradients": 0.4, "optimizer": 0.8, "activations": 9.0}
    count = Count(parts, 12 * BILLION, 10**8, 3 * 10**8, phases={"backward": 5.0, BEFORE: 9.0})
    found = with_split_denoiser(count, ["transformer"], 4)
    assert found.peak == pytest.approx((24.0 + 1.6) / 4 + 1.0 + 5.0 + 2 * 3 * 10**8 * 2 / GIB)


def test_what_is_printed():
    """The largest part and what makes it smaller; the smallest card that it fits on."""
    from types import SimpleNamespace

    args = SimpleNamespace(per_device_train_batch_size=8, gradient_checkpointing=True)
    count = judge_count()
    assert count.smallest_card == CARDS[-1]
    lines = "\n".join(table(count, "title") + advice(count, "train", args, False, "none"))
    assert "a card of 141 GB" in lines
    assert "The largest part: optimizer, 59.60 GiB." in lines
    assert "--use_peft" in lines
    assert "--parallel fsdp2" in lines
    assert judge_count(is_adapter=True).smallest_card == CARDS[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_task_of_a_recipe(path):
    """A recipe tells what it is for."""
    assert find_task(["--config", str(path)]) == ("tune" if path.stem.startswith("refl") else "train")


def test_flags_that_do_not_fit():
    """Errors tell what to pass."""
    with pytest.raises(ValueError, match="`task` is 'guess'"):
        find_task(["--task", "guess"])
    with pytest.raises(ValueError, match="`num_gpus` is 1 and `parallel` is 'fsdp2'"):
        read_parallel(EstimateArguments(parallel="fsdp2"))
    with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
        make_rows("large", False)
    assert with_gpu_defaults(["--model", "a"])[2:] == ["--bf16", "true", "--use_cpu", "true"]
    assert with_gpu_defaults(["--model", "a", "--fp16"])[3:] == ["--use_cpu", "true"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("single_gpu", ("none", 1)),
        ("multi_gpu", ("ddp", 8)),
        ("fsdp2", ("fsdp2", 8)),
        ("deepspeed_zero2", ("zero2", 8)),
        ("deepspeed_zero3", ("zero3", 8)),
    ],
)
def test_configurations_of_accelerate(name, wanted):
    """The file that a run is launched with tells the engine and the number of GPUs."""
    how = EstimateArguments(accelerate_config=str(ROOT / "examples" / "accelerate_configs" / f"{name}.yaml"))
    read_parallel(how)
    assert (how.parallel, how.num_gpus) == wanted
