# /// script
# dependencies = [
#     "rewarddance_hf[scripts]",
# ]
# ///
"""
Train a judge that gives its reasons first by reinforcement learning, with GRPO of TRL: chains of thought are drawn, and those
that end in the right verdict are made more probable. No rationales are needed, but a start that sometimes reaches an answer:
a judge trained with `rationale="reasons_first"` or `"mixed"`, or a strong vision-language model.

    python examples/train_judge_grpo.py --model_name_or_path outputs/reasoning_judge --dataset_name me/my-pairs \\
        --output_dir outputs/grpo_judge --use_peft --lora_target_modules all-linear

Rows are preference rows as for `RewardDanceTrainer`; each is asked about in both orders, in the very words (and tokens) of
`RewardDanceScorer.reason`, which scores with what is saved. Rewards are the verdict (1 if right) and, with a weight of 0.2, the
format (1 for reasons, phrase and a verdict and nothing else); `--reward_weights` changes that.

Run by us at tiny size on a CPU only: with TRL 1.16 all families but LLaVA-OneVision, whose tiles TRL cannot split; with TRL 1.0
Qwen-VL and SmolVLM, but not InternVL and Gemma 3, as it takes one image a prompt there. (InternVL ran with 1.14, not with 1.10.)
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import trl
from packaging.version import Version
from transformers import ProcessorMixin
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config
from trl.data_utils import prepare_multimodal_messages

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor
from rewarddance_hf.data.preference import row_question
from rewarddance_hf.data.rows import prepare_rows
from rewarddance_hf.models.question_rewarddance import Question
from rewarddance_hf.scoring.reasoning import read_verdict


REWARD_WEIGHTS = [1.0, 0.2]
# Families whose images older versions of TRL divide among prompts one by one.
TAKES_ONE_IMAGE, TAKES_MORE_SINCE = ("internvl", "gemma3"), "1.14"


@dataclass
class RewardDanceScriptArguments(ScriptArguments):
    """Arguments of the script. `dataset_name` is a Hub repository, a folder of `save_to_disk`, or 'shapes'."""


def make_rewards(processor: RewardDanceProcessor) -> list[Callable[..., list[float]]]:
    """Reward functions of TRL: of the verdict, and of the format."""

    def verdict_reward(completions: list[Any], label: list[str], **kwargs: Any) -> list[float]:
        verdicts = [read_verdict(processor, _text(completion))[1] for completion in completions]
        return [
            float(verdict is not None and verdict == (want == "yes"))
            for verdict, want in zip(verdicts, label, strict=True)
        ]

    def format_reward(completions: list[Any], **kwargs: Any) -> list[float]:
        return [float(_is_well_formed(processor, _text(completion))) for completion in completions]

    return [verdict_reward, format_reward]


def _text(completion: Any) -> str:
    """Text of a completion, which is a message of a chat."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _is_well_formed(processor: RewardDanceProcessor, text: str) -> bool:
    """Whether there are reasons, the phrase, and one of the answers and nothing more."""
    reasons = processor.split_reasons(text)
    if not reasons:
        return False
    answer = f"\n{text.strip()}".partition(processor.prompt_texts["answer"].rstrip())[2]
    return answer.strip() in (processor.yes_word, processor.no_word)


def make_question(row: dict[str, Any], label: str) -> Question:
    """Question about a pair, in the order in which `label` is the right verdict."""
    return row_question(row, chosen_second=label == "yes", reasons_first=True)


def make_prompts(rows: Any, processor: RewardDanceProcessor) -> datasets.Dataset:
    """
    Each pair in both orders, as TRL wants it: messages, images, and the right verdict in `label`. Images are decoded when
    they are needed.
    """
    decided = [i for i in range(len(rows)) if not rows[i].get("tie")]
    index = {"row": [i for i in decided for _ in range(2)], "label": ["yes", "no"] * len(decided)}

    def ask(batch: dict[str, list]) -> dict[str, list]:
        columns: dict[str, list] = {"prompt": [], "images": [], "label": batch["label"]}
        for i, label in zip(batch["row"], batch["label"], strict=True):
            messages, images = processor.write_messages(make_question(rows[i], label))
            columns["prompt"].append(messages)
            columns["images"].append(images)
        return columns

    return datasets.Dataset.from_dict(index).with_transform(ask)


def processor_for_trl(processor: RewardDanceProcessor) -> Any:
    """Wrapped processor of the vision-language model, which makes of images what the judge sees, e.g. no tiles."""
    wrapped = copy.copy(processor.vlm_processor)
    images_kwargs = processor.vlm_images_kwargs

    class JudgeProcessor(type(wrapped)):
        def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
            if images_kwargs and images is not None:
                kwargs.setdefault("images_kwargs", images_kwargs)
            return super().__call__(images=images, text=text, **kwargs)

        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
            return ProcessorMixin.apply_chat_template(
                self, *args, **kwargs
            )  # SmolVLM's own one needs a video processor

    JudgeProcessor.__name__ = type(wrapped).__name__  # written into training checkpoints
    wrapped.__class__ = JudgeProcessor
    return wrapped


def check_tokens(rows: Any, processor: RewardDanceProcessor, trl_processor: Any) -> None:
    """Make sure that TRL asks with the tokens with which the scorer will ask, on the first pair."""
    question = make_question(rows[0], "yes")
    messages, images = processor.write_messages(question)
    messages = prepare_multimodal_messages(messages, images=images)
    asked = trl_processor.apply_chat_template([messages], add_generation_prompt=True, tokenize=True, return_dict=True)
    wanted = processor.encode([question])
    if list(asked["input_ids"][0]) != wanted["input_ids"][0].tolist():
        raise ValueError(
            "TRL writes the question in other tokens than the scorer: the chat template opens the assistant's turn with more than "
            "its generation prompt (e.g. an empty thought), or TRL is too old. Choose another model, or upgrade TRL."
        )


def main(script_args: RewardDanceScriptArguments, training_args: GRPOConfig, model_args: ModelConfig) -> GRPOTrainer:
    name = model_args.model_name_or_path
    if script_args.dataset_name == "shapes":
        from rewarddance_hf.shapes.loading import load_shapes

        rows = load_shapes("train", 10_000)
    elif os.path.isdir(script_args.dataset_name):
        rows = datasets.load_from_disk(script_args.dataset_name)
    else:
        rows = datasets.load_dataset(
            script_args.dataset_name, script_args.dataset_config, split=script_args.dataset_train_split
        )
    arguments = {"revision": model_args.model_revision} if model_args.model_revision else {}
    processor = RewardDanceProcessor.from_pretrained(name, **arguments)
    judge = RewardDanceForYesScoring.from_pretrained(
        name, dtype=model_args.dtype, attn_implementation=model_args.attn_implementation, **arguments
    )
    if judge.config.paradigm != "pairwise":
        raise ValueError(
            f"The judge is {judge.config.paradigm}, but pairs are asked about. Start from a pairwise judge."
        )
    judge.check_processor(processor)
    peft_config = get_peft_config(model_args)
    if training_args.beta != 0 and peft_config is None:
        raise ValueError("`beta` needs a reference model, which is the model without its adapter. Pass `--use_peft`.")
    model_type = judge.config.vlm_config.model_type
    if model_type in TAKES_ONE_IMAGE and Version(trl.__version__) < Version(TAKES_MORE_SINCE):
        raise ValueError(
            f"The judge is of type {model_type!r}, of which TRL {trl.__version__} takes one image a prompt, but pairs have two. "
            f"Install TRL {TAKES_MORE_SINCE} or later."
        )
    trl_processor = processor_for_trl(processor)
    rows = prepare_rows(rows, "train_dataset")
    check_tokens(rows, processor, trl_processor)
    training_args.reward_weights = training_args.reward_weights or REWARD_WEIGHTS
    training_args.remove_unused_columns = False
    trainer = GRPOTrainer(
        model=judge.vlm,
        reward_funcs=make_rewards(processor),
        args=training_args,
        train_dataset=make_prompts(rows, processor),
        processing_class=trl_processor,
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    trained = trainer.accelerator.unwrap_model(trainer.model)
    judge.vlm = trained.merge_and_unload() if peft_config is not None else trained
    if trainer.accelerator.is_main_process:
        judge.save_pretrained(training_args.output_dir)
        processor.save_pretrained(training_args.output_dir)
    trainer.accelerator.print(f"Judge saved to {training_args.output_dir}: score with `RewardDanceScorer.reason`")
    trainer.accelerator.wait_for_everyone()
    return trainer


def make_parser() -> TrlParser:
    return TrlParser((RewardDanceScriptArguments, GRPOConfig, ModelConfig))


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
