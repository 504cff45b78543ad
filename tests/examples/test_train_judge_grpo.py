"""Reinforcement learning of a reasoning judge with TRL, on real tiny models."""

import importlib.util
import sys
from pathlib import Path

import datasets
import pytest
import torch
import trl
from packaging.version import Version
from tiny_vlms import random_image
from trl.data_utils import prepare_multimodal_messages

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceScorer
from rewarddance_hf.models.question_rewarddance import Question


EXAMPLE = Path(__file__).parents[2] / "examples" / "train_judge_grpo.py"
ROWS = [
    {"prompt": f"p{i}", "chosen": random_image(i), "rejected": random_image(10 + i, 56, 28), "tie": i == 2}
    for i in range(3)
]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_judge_grpo", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def undecided_judge(vlm_folder, tmp_path_factory):
    """Judge that has learned how to answer after a reason, but not what."""
    torch.manual_seed(0)
    model = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"))
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"))
    pairs = [(row["chosen"], row["rejected"]) for row in ROWS[:2]]
    samples, references = zip(*pairs, *((b, a) for a, b in pairs), strict=True)
    questions = processor(list(samples) * 2, ["p0", "p1"] * 4, list(references) * 2, reasons_first=True)
    answers = [True] * 4 + [False] * 4
    batch = processor.append_answers(questions, answers, ["red"] * 8, reasons_first=True)
    optimizer = torch.optim.AdamW(model.parameters(), 6e-3)
    for _ in range(40):
        model(**batch, labels=torch.tensor(answers).float()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("undecided")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run(example, folder, output, *more, **changes):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(output / "pairs"))
    settings = {
        "model_name_or_path": folder,
        "dataset_name": output / "pairs",
        "output_dir": output / "judge",
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "learning_rate": 1e-3,
        "use_cpu": "true",
        "bf16": "false",
        "dtype": "float32",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": "true",
        **changes,
    }
    pairs = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return example.main(*example.make_parser().parse_args_and_config([*pairs, *more]))


def test_prompts_are_the_questions_of_the_scorer(example, vlm_folder, family):
    """In every family TRL's way through messages and template gives the tokens and pixels of `RewardDanceScorer.reason`."""
    scorer = RewardDanceScorer.from_pretrained(vlm_folder(family))
    prompts = example.make_prompts(ROWS, scorer.processor)
    assert prompts[:]["label"] == ["yes", "no"] * 2  # not the tie
    wrapped = example.processor_for_trl(scorer.processor)
    for entry, row in zip(prompts, [ROWS[0], ROWS[0], ROWS[1], ROWS[1]], strict=True):
        messages = prepare_multimodal_messages(entry["prompt"], images=entry["images"])
        got = wrapped.apply_chat_template(
            [messages], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        sample, reference = ("chosen", "rejected") if entry["label"] == "yes" else ("rejected", "chosen")
        question = Question(row[sample], row["prompt"], reference=row[reference], reasons_first=True)
        want = scorer.processor.encode([question])
        assert torch.equal(got["input_ids"], want["input_ids"])
        assert torch.equal(got["pixel_values"], want["pixel_values"])
    example.check_tokens(ROWS, scorer.processor, wrapped)


def test_images_are_prepared_as_the_judge_sees_them(example, vlm_folder):
    """Arguments of the image processor that the judge was trained with reach TRL too, which knows nothing of them."""
    processor = RewardDanceProcessor.from_pretrained(
        vlm_folder("internvl"), vlm_images_kwargs={"crop_to_patches": False}
    )
    rows = [{**ROWS[0], "chosen": random_image(0, 112, 28)}]
    example.check_tokens(rows, processor, example.processor_for_trl(processor))
    with pytest.raises(ValueError, match="TRL writes the question in other tokens"):
        example.check_tokens(rows, processor, processor.vlm_processor)


def test_rewards(example, vlm_folder):
    """The verdict counts wherever it can be read; the format wants reasons, phrase and answer, and nothing else."""
    verdict, form = example.make_rewards(RewardDanceProcessor.from_pretrained(vlm_folder("internvl")))
    texts = [
        "red\nAnswer:\nyes",
        "red\nAnswer: Yes.",
        "red\nAnswer: no",
        "Answer: yes",
        "yes",
        "red\nAnswer: maybe",
        "",
    ]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    assert verdict(completions=completions, label=["yes"] * 7) == [1, 1, 0, 1, 0, 0, 0]
    assert verdict(completions=texts, label=["no"] * 7) == [0, 0, 1, 0, 0, 0, 0]
    assert form(completions=completions, label=["yes"] * 7) == [1, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("adapter", [False, True])
def test_training_gives_a_judge(example, undecided_judge, tmp_path, adapter):
    """A few steps on a CPU draw chains that end in right and wrong verdicts, learn from them, and save a judge that reasons."""
    lora = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--lora_r", "4"] if adapter else []
    if Version(trl.__version__) < Version(example.TAKES_MORE_SINCE):
        with pytest.raises(ValueError, match=r"takes one image a prompt, but pairs have two. Install TRL 1\.14"):
            run(example, undecided_judge, tmp_path, *lora)
        return
    trainer = run(example, undecided_judge, tmp_path, *lora)
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(steps) == 3
    assert 0 < steps[0]["rewards/verdict_reward/mean"] < 1
    assert steps[0]["rewards/format_reward/mean"] > 0.5
    start = RewardDanceForYesScoring.from_pretrained(undecided_judge).state_dict()
    scorer = RewardDanceScorer.from_pretrained(tmp_path / "judge")
    changed = [name for name, value in scorer.model.state_dict().items() if not torch.equal(value, start[name])]
    assert changed
    assert all(".q_proj." in name or ".v_proj." in name for name in changed) == adapter
    assert scorer.model.state_dict().keys() == start.keys()
    got = scorer.reason([ROWS[0]["chosen"]], "p0", [ROWS[0]["rejected"]], max_new_tokens=12)
    assert got.num_failed == 0
    assert 0 < got.scores.item() < 1


def test_what_cannot_be_trained(example, undecided_judge, vlm_folder, tmp_path):
    """A penalty without a reference model, and a judge of single images, are refused before anything runs."""
    with pytest.raises(ValueError, match="`beta` needs a reference model"):
        run(example, undecided_judge, tmp_path, beta=0.1)
    RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"), paradigm="pointwise").save_pretrained(
        tmp_path / "p"
    )
    RewardDanceProcessor.from_pretrained(vlm_folder("internvl")).save_pretrained(tmp_path / "p")
    with pytest.raises(ValueError, match="The judge is pointwise"):
        run(example, tmp_path / "p", tmp_path)


def test_help_can_be_printed(example, capsys):
    """Every help text can be rendered, and no two arguments share a name."""
    with pytest.raises(SystemExit, match="0"):
        example.make_parser().parse_args_and_config(["--help"])
    assert "--num_generations" in capsys.readouterr().out
