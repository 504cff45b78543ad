"""Examples that ask a judge over HTTP, against a server of a tiny one."""

import importlib.util
import sys
from pathlib import Path

import datasets
import pytest
import torch
import transformers as hf
from new_process import run_python
from tiny_vlms import CHATML, TEXT, random_image, tiny_tokenizer

from rewarddance_hf import JudgeServer, RewardDanceScorer


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def server(vlm_folder):
    with JudgeServer(RewardDanceScorer.from_pretrained(vlm_folder("internvl"))) as server:
        yield server


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_prompt_writer(server, tmp_path):
    """GRPO draws groups, has their images compared, and learns from the rewards."""
    tokenizer = tiny_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pad="<|endoftext|>", eos="<|im_end|>")
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    model = hf.Qwen2ForCausalLM(hf.Qwen2Config(vocab_size=len(tokenizer), **TEXT))
    model.save_pretrained(tmp_path / "writer")
    tokenizer.save_pretrained(tmp_path / "writer")
    rows = [{"prompt": prompt} for prompt in ("a red circle", "two blue squares")]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "prompts"))
    settings = {
        "model_name_or_path": tmp_path / "writer",
        "pipeline": "shapes",
        "num_inference_steps": 2,
        "judge": server.url,
        "dataset_name": tmp_path / "prompts",
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "use_cpu": "true",
        "bf16": "false",
        "dtype": "float32",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": "true",
    }
    example = load_example("train_prompt_writer_grpo")
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    example.main(*example.make_parser().parse_args_and_config(flags))
    trained = hf.Qwen2ForCausalLM.from_pretrained(tmp_path / "out")
    moved = [not torch.equal(new, old) for new, old in zip(trained.parameters(), model.parameters(), strict=True)]
    assert any(moved)


def test_flow_factory_client(server, vlm_folder, tmp_path):
    """The script prints the rewards of a group, and what the server refuses."""
    images = [random_image(i) for i in range(3)]
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    command = [EXAMPLES / "flow_factory_reward.py", "--url", server.url, "--prompt", "a circle", "--image"]
    done = run_python(*command, *paths)
    assert done.returncode == 0, done.stderr
    want = RewardDanceScorer.from_pretrained(vlm_folder("internvl")).rank(images, "a circle").scores
    assert [float(line.split("\t")[0]) for line in done.stdout.splitlines()] == pytest.approx(want.tolist(), abs=1e-6)
    done = run_python(*command, paths[0])
    assert done.returncode == 1
    assert "has a single sample and no reference" in done.stderr
