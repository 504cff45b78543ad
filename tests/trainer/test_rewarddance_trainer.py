"""Trainer on real tiny models: what moves, what resumes, what is logged, what is refused."""

import json
import logging
import math
import shutil

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from tiny_vlms import random_image
from transformers import TrainerCallback

from rewarddance_hf import (
    DataCollatorForRewardDance,
    RewardDanceEvaluator,
    RewardDanceForYesScoring,
    RewardDanceProcessor,
    RewardDanceTrainer,
    RewardDanceTrainingArguments,
)
from rewarddance_hf.trainer.losses import bradley_terry_loss
from rewarddance_hf.trainer.model_card import FACTS_KEY, public_name


PARADIGMS = ("pairwise", "pointwise", "regressive")


def make_dataset(count=8, **columns):
    rationale = {"yes": "Image 1: worse. Image 2: better.", "no": "Image 1: better. Image 2: worse."}
    return datasets.Dataset.from_list(
        [
            {
                "prompt": f"a red circle {i}",
                "chosen": random_image(i),
                "rejected": random_image(100 + i),
                "rationale": rationale,
                **columns,
            }
            for i in range(count)
        ]
    )


@pytest.fixture(scope="module")
def dataset():
    return make_dataset()


def make_trainer(
    folder, output_dir, dataset, peft_config=None, eval_dataset=None, callbacks=None, evaluator=None, **arguments
):
    defaults = {
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return RewardDanceTrainer(
        model=str(folder) if not isinstance(folder, torch.nn.Module) else folder,
        args=RewardDanceTrainingArguments(str(output_dir), **{**defaults, **arguments}),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        callbacks=callbacks,
        evaluator=evaluator,
    )


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_every_trainable_parameter_moves_and_no_other_does(family, paradigm, vlm_folder, dataset, tmp_path):
    """One step changes each trainable parameter; the frozen ones are those that no gradient can reach."""
    rationale = "decision_first" if paradigm == "pairwise" else None
    trainer = make_trainer(vlm_folder(family), tmp_path, dataset, paradigm=paradigm, rationale=rationale)
    before = snapshot(trainer.model)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_resume_gives_the_weights_of_an_uninterrupted_run(family, vlm_folder, dataset, tmp_path):
    """
    Weights in memory after resuming equal those saved, and the run ends as if it had not stopped.

    With the file names of the original checkpoint, transformers resumes most of these models from random weights and
    only warns (transformers#43701).
    """
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "rationale": "decision_first"}
    whole = make_trainer(vlm_folder(family), tmp_path / "whole", dataset, **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    # What a kill while the next one is written leaves is passed over. Resuming used to fail at it.
    unfinished = shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-3")
    (unfinished / "trainer_state.json").unlink()
    (unfinished / "optimizer.pt").write_bytes((unfinished / "optimizer.pt").read_bytes()[:100])

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.at_start = {name: value.clone() for name, value in model.state_dict().items()}

    watch = Watch()
    resumed = make_trainer(vlm_folder(family), tmp_path / "resumed", dataset, callbacks=[watch], **settings)
    resumed.train(resume_from_checkpoint=True)
    saved = RewardDanceForYesScoring.from_pretrained(tmp_path / "whole" / "checkpoint-2").state_dict()
    for name, value in watch.at_start.items():
        assert torch.equal(value, saved[name]), name
    assert_equal_weights(whole.model, resumed.model)


def test_a_checkpoint_of_an_earlier_run_is_not_whole_while_it_is_written_again(vlm_folder, dataset, tmp_path):
    """Its last file used to stay, so that weights of one run went on with the optimizer of another."""
    settings = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(vlm_folder("internvl"), tmp_path, dataset, **settings).train()
    optimizer = tmp_path / "checkpoint-1" / "optimizer.pt"
    optimizer.unlink()
    optimizer.mkdir()  # where writing breaks off
    with pytest.raises((RuntimeError, OSError)):
        make_trainer(vlm_folder("internvl"), tmp_path, dataset, **settings).train()
    with pytest.raises(ValueError, match="has no complete checkpoint to resume from"):
        make_trainer(vlm_folder("internvl"), tmp_path, dataset, **settings).train(resume_from_checkpoint=True)


def test_processor_is_of_the_revision_of_the_model(vlm_folder, dataset, tmp_path):
    """Of a repository with several revisions, model and processor are those of the one that was asked for."""
    cache, processor = tmp_path / "cache", RewardDanceProcessor.from_pretrained(vlm_folder("internvl"))
    repository = cache / "models--org--judge"
    for revision, digest in (("main", "a" * 40), ("small", "b" * 40)):
        snapshot = shutil.copytree(vlm_folder("internvl"), repository / "snapshots" / digest)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(digest)
    processor.prompt_layout = "text_first"
    processor.save_pretrained(snapshot)
    trainer = make_trainer(
        "org/judge", tmp_path, dataset, model_init_kwargs={"revision": "small", "cache_dir": str(cache)}
    )
    assert trainer.processing_class.prompt_layout == "text_first"
    plain = make_trainer("org/judge", tmp_path, dataset, model_init_kwargs={"cache_dir": str(cache)})
    assert plain.processing_class.prompt_layout != "text_first"


def test_resume_crosses_epochs_with_the_same_orders(vlm_folder, dataset, tmp_path):
    """Resuming in the middle of the second epoch sees the rows in the orders that epoch draws."""
    settings = {"num_train_epochs": 2, "max_steps": -1, "save_strategy": "steps", "save_steps": 6}
    whole = make_trainer(vlm_folder("internvl"), tmp_path / "whole", dataset, **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "resumed" / "checkpoint-6")
    resumed = make_trainer(vlm_folder("internvl"), tmp_path / "resumed", dataset, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_weights(whole.model, resumed.model)


def test_resume_from_something_else_is_refused(vlm_folder, dataset, tmp_path):
    """A checkpoint of another model raises instead of training from random weights."""
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(vlm_folder("qwen3_vl"), tmp_path / "other", dataset, **settings).train()
    trainer = make_trainer(vlm_folder("internvl"), tmp_path / "mine", dataset, **settings)
    with pytest.raises(
        ValueError, match="lacks 46 weights of the model .* Resume from a checkpoint that this trainer wrote"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-1"))


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_accumulation_equals_a_larger_batch(paradigm, vlm_folder, dataset, tmp_path):
    """8 batches of 1 row and 2 batches of 4 rows make the same step."""
    rationale = "decision_first" if paradigm == "pairwise" else None
    weights = []
    for size, steps in ((1, 8), (4, 2)):
        trainer = make_trainer(
            vlm_folder("internvl"),
            tmp_path / str(size),
            dataset,
            paradigm=paradigm,
            rationale=rationale,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
        )
        trainer.train()
        weights.append((snapshot(trainer.model), trainer.state.log_history[0]))
    (first, first_log), (second, second_log) = weights
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=1e-5)
    for metric in ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
        assert first_log[metric] == pytest.approx(second_log[metric], rel=1e-4), metric


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_logged_loss_and_metrics_equal_a_reference(paradigm, vlm_folder, dataset, tmp_path):
    """Loss and metrics of an evaluation follow from scores of single questions, computed one by one."""
    trainer = make_trainer(
        vlm_folder("internvl"), tmp_path, None, eval_dataset=dataset, paradigm=paradigm, per_device_eval_batch_size=3
    )
    metrics = trainer.evaluate()
    model, processor = trainer.model.eval(), trainer.processing_class
    labels = trainer._eval_collator([dict(row) for row in dataset])["labels"].tolist()
    losses, preferences, scores = [], [], []
    with torch.no_grad():
        for row, label in zip(dataset, labels, strict=True):
            if paradigm == "pairwise":
                second, first = (row["chosen"], row["rejected"]) if label == 1 else (row["rejected"], row["chosen"])
                output = model(**processor([second], [row["prompt"]], references=[first]))
                losses.append(-output.answer_log_probs[0, 0 if label == 1 else 1].item())
                preferences.append(output.logits.item() * (1 if label == 1 else -1))
                scores.append(output.scores.item())
            else:
                outputs = [model(**processor([row[side]], [row["prompt"]])) for side in ("chosen", "rejected")]
                preferences.append(outputs[0].logits.item() - outputs[1].logits.item())
                loss = bradley_terry_loss(outputs[0].logits[:, 0], outputs[1].logits[:, 0]).item()
                if paradigm == "pointwise":
                    answers = outputs[0].answer_log_probs[0, 0] + outputs[1].answer_log_probs[0, 1]
                    loss -= 0.1 * answers.item() / 2
                losses.append(loss)
                scores += [output.scores.item() for output in outputs]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    assert metrics["eval_loss"] == pytest.approx(mean(losses), rel=1e-4)
    assert metrics["eval_accuracy"] == pytest.approx(mean([p > 0 for p in preferences]))
    assert metrics["eval_margin"] == pytest.approx(mean(preferences), rel=1e-3, abs=1e-5)
    assert metrics["eval_mean_reward"] == pytest.approx(mean(scores), rel=1e-4)
    assert metrics["eval_max_reward"] == pytest.approx(max(scores), rel=1e-4)


def test_several_evaluation_sets_and_the_best_checkpoint(vlm_folder, dataset, tmp_path):
    """Each evaluation set has its own metrics, and the best checkpoint by one of them is really loaded at the end."""
    trainer = make_trainer(
        vlm_folder("internvl"),
        tmp_path,
        dataset,
        eval_dataset={"id": dataset, "ood": dataset.select(range(3))},
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_id_loss",
        greater_is_better=False,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
    )
    trainer.train()
    losses = [log["eval_id_loss"] for log in trainer.state.log_history if "eval_id_loss" in log]
    assert all("eval_ood_accuracy" in log for log in trainer.state.log_history if "eval_ood_loss" in log)
    best = RewardDanceForYesScoring.from_pretrained(tmp_path / f"checkpoint-{1 + losses.index(min(losses))}")
    assert_equal_weights(trainer.model, best)


def test_evaluator_gives_its_metrics_at_each_evaluation(vlm_folder, dataset, tmp_path):
    """A `RewardDanceEvaluator` is asked at each evaluation, its metrics are logged and can choose the best checkpoint."""
    evaluator = RewardDanceEvaluator(dataset, name="held_out", bootstrap_samples=10)
    trainer = make_trainer(
        vlm_folder("internvl"),
        tmp_path,
        dataset,
        eval_dataset={"id": dataset},
        evaluator=evaluator,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_held_out_nll",
        greater_is_better=False,
    )
    trainer.train()
    logged = [log["eval_held_out_accuracy"] for log in trainer.state.log_history if "eval_held_out_accuracy" in log]
    assert len(logged) == 2
    assert trainer.state.best_metric is not None
    alone = evaluator(trainer.model, trainer.processing_class)
    again = trainer.evaluate()
    assert again["eval_held_out_nll"] == pytest.approx(alone["held_out_nll"])
    assert "eval_id_accuracy" in again


def test_evaluation_keeps_its_order_and_leaves_training_alone(vlm_folder, dataset, tmp_path):
    """Evaluating twice gives the same figures whatever the epoch, and training is the same with and without it."""
    dataset = dataset.select(range(4))
    with_eval = make_trainer(
        vlm_folder("internvl"),
        tmp_path / "a",
        dataset,
        eval_dataset=dataset,
        eval_strategy="epoch",
        num_train_epochs=2,
        max_steps=-1,
    )
    with_eval.train()
    without = make_trainer(vlm_folder("internvl"), tmp_path / "b", dataset, num_train_epochs=2, max_steps=-1)
    without.train()
    assert_equal_weights(with_eval.model, without.model)
    first, second = with_eval.evaluate(), with_eval.evaluate()
    assert first["eval_loss"] == second["eval_loss"]


def test_adapter_trains_resumes_and_is_found_again(vlm_folder, dataset, tmp_path):
    """LoRA: only adapter weights move, a resumed run ends the same, and the saved adapter scores the same."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": True}
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    whole = make_trainer(vlm_folder("internvl"), tmp_path / "whole", dataset, LoraConfig(**lora), **settings)
    before = snapshot(whole.model)
    whole.train()
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = make_trainer(vlm_folder("internvl"), tmp_path / "resumed", dataset, LoraConfig(**lora), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_weights(whole.model, resumed.model)

    whole.save_model()
    base = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"))
    loaded = PeftModel.from_pretrained(base, tmp_path / "whole").merge_and_unload().eval()
    processor = RewardDanceProcessor.from_pretrained(tmp_path / "whole")
    batch = processor([random_image(1)], ["a red circle"], references=[random_image(2)])
    with torch.no_grad():
        expected = whole.model.eval()(**batch).scores
        torch.testing.assert_close(loaded(**batch).scores, expected, atol=1e-6, rtol=1e-5)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["model_type"] == "rewarddance"


def test_regressive_adapter_trains_its_new_head(vlm_folder, dataset, tmp_path):
    """The scalar head is new, so it is trained and saved beside the adapter."""
    config = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = make_trainer(vlm_folder("internvl"), tmp_path, dataset, config, paradigm="regressive")
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert any("score" in name for name in trained)
    assert all("lora_" in name or "score" in name for name in trained)


def test_adapter_by_default(family, vlm_folder, dataset, tmp_path):
    """
    An adapter that names no layers gets all linear ones of the language model: none of the vision tower, nor the head. TRL's
    default task type, which PEFT has no use for here, is passed over; it used to be refused. The caller's object stays.
    """
    config = LoraConfig(r=2, task_type="CAUSAL_LM")
    trainer = make_trainer(
        vlm_folder(family),
        tmp_path,
        dataset,
        config,
        learning_rate=None,
        model_init_kwargs={"dtype": torch.bfloat16},
        gradient_checkpointing=True,
    )
    model = trainer.model.get_base_model()
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_modules() if name.endswith("lora_A")}
    decoder = model.vlm.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    assert {id(model.get_submodule(name)) for name in adapted} <= inside
    kinds = {name.rpartition(".")[2] for name in adapted}
    assert kinds >= {"q_proj", "v_proj", "o_proj", "down_proj"}
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert config.target_modules is None
    trainer.train()
    assert trainer.args.learning_rate == 1e-4
    trainer.save_model()
    loaded = RewardDanceForYesScoring.from_pretrained(tmp_path)
    assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == len(adapted)


def test_all_weights_are_trained_in_float32(vlm_folder, dataset, tmp_path, caplog):
    """
    Judges that are loaded to be trained as a whole come in float32, whatever they were saved in; others are warned of. In
    bfloat16, which used to be kept, most updates of 1e-5 are rounded away.
    """
    judge = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"), dtype=torch.bfloat16)
    judge.save_pretrained(tmp_path / "judge")
    RewardDanceProcessor.from_pretrained(vlm_folder("internvl")).save_pretrained(tmp_path / "judge")
    trainer = make_trainer(tmp_path / "judge", tmp_path / "a", dataset, learning_rate=None)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert trainer.args.learning_rate == 1e-5
    with caplog.at_level("WARNING", logger="transformers"):
        logging.getLogger("transformers").propagate = True
        make_trainer(judge, tmp_path / "b", dataset)
    assert "All weights are trained, and they are torch.bfloat16" in caplog.text


def test_cards_name_no_folders_of_this_machine(vlm_folder, tmp_path):
    """A local model is called by the base model that its card names, or by the name of its folder."""
    folder = vlm_folder("internvl")
    assert public_name("org/vlm") == "org/vlm"
    assert public_name(str(folder)) == folder.name
    (tmp_path / "README.md").write_text("---\nbase_model: org/vlm\n---\n")
    assert public_name(str(tmp_path)) == "org/vlm"
    (tmp_path / "README.md").write_text(f"---\nbase_model: {folder}\n---\n")  # as PEFT writes it
    assert public_name(str(tmp_path)) == tmp_path.name


def test_resume_as_a_command_line_says_it(vlm_folder, dataset, tmp_path):
    """ "true" is no folder: it used to be looked for as one."""
    trainer = make_trainer(vlm_folder("internvl"), tmp_path, dataset)
    with pytest.raises(ValueError, match="has no complete checkpoint to resume from"):
        trainer.train(resume_from_checkpoint="true")
    trainer.train(resume_from_checkpoint="false")


def test_streamed_rows_train_like_stored_ones(vlm_folder, dataset, tmp_path):
    """
    An iterable dataset gives the same weights as the same rows in a map-style one, read in order, and the same loss when the
    last batch of an evaluation is not full.
    """
    held_out = dataset.select(range(3))
    stored = make_trainer(
        vlm_folder("internvl"),
        tmp_path / "a",
        dataset,
        max_steps=2,
        train_sampling_strategy="sequential",
        per_device_eval_batch_size=2,
        dataloader_drop_last=True,
    )
    stored.train()
    streamed = make_trainer(
        vlm_folder("internvl"),
        tmp_path / "b",
        dataset.to_iterable_dataset(),
        max_steps=2,
        per_device_eval_batch_size=2,
    )
    streamed.train()
    assert_equal_weights(stored.model, streamed.model)
    losses = [stored.evaluate(held_out.select(rows))["eval_loss"] for rows in ([0, 1, 2], [0], [1], [2])]
    losses.append(streamed.evaluate(held_out.to_iterable_dataset())["eval_loss"])
    assert losses[0] == pytest.approx(losses[-1], rel=1e-5)
    assert losses[0] == pytest.approx(sum(losses[1:4]) / 3, rel=1e-5)


def test_images_resized_beforehand_are_trained_on(vlm_folder, dataset, tmp_path, monkeypatch):
    """Training and evaluation read small files, of which the judge sees the same; streams are refused."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = {"resize_images": True, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    large = {"chosen": random_image(0, 300, 200), "rejected": random_image(1, 200, 300), "prompt": "large"}
    rows = datasets.Dataset.from_list([large] * 4)
    trainer = make_trainer(vlm_folder("qwen3_vl"), tmp_path, rows, eval_dataset={"one": dataset}, **arguments)
    processor = trainer.processing_class
    row = trainer.train_dataset[0]
    for name in ("chosen", "rejected"):
        assert max(processor.load_image(row[name]).size) < 100
        first, second = (processor([image], ["p"])["pixel_values"] for image in (large[name], row[name]))
        assert torch.equal(first, second)
    trainer.train()
    assert "eval_one_accuracy" in trainer.state.log_history[-2]
    with pytest.raises(TypeError, match="`train_dataset` is a `IterableDataset`"):
        make_trainer(vlm_folder("qwen3_vl"), tmp_path, dataset.to_iterable_dataset(), resize_images=True)


def test_resuming_with_other_batches_warns(vlm_folder, dataset, tmp_path, caplog):
    """Rows of an update times updates is where a run stopped: with fewer rows it would go on elsewhere without a word."""
    settings = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(vlm_folder("internvl"), tmp_path, dataset, **settings).train()
    for size, accumulation in ((1, 2), (1, 1)):
        trainer = make_trainer(
            vlm_folder("internvl"),
            tmp_path / str(accumulation),
            dataset,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        logging.getLogger("transformers").propagate = True
        with caplog.at_level("WARNING", logger="transformers"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert ("made updates of 2 rows, but this run makes them of 1" in caplog.text) == (accumulation == 1)


def test_checkpoints_that_cannot_go_on_are_refused(vlm_folder, dataset, tmp_path):
    """Without the state of the optimizer, a run used to start it anew without a word."""
    settings = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(vlm_folder("internvl"), tmp_path, dataset, save_only_model=True, **settings).train()
    trainer = make_trainer(vlm_folder("internvl"), tmp_path, dataset, max_steps=2, **settings)
    with pytest.raises(ValueError, match="holds no state of the optimizer"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.raises(ValueError, match="checkpoint-9', but there is no such folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


@pytest.mark.parametrize("rationale", ["decision_first", "reasons_first", "mixed"])
def test_loss_of_rationale_formats(vlm_folder, tmp_path, rationale):
    """The loss is the answer's cross-entropy, read where the answer is, plus its weight times that of the rationale."""
    dataset = make_dataset(4)
    trainer = make_trainer(vlm_folder("internvl"), tmp_path, dataset, rationale=rationale, rationale_weight=0.3)
    batch = trainer.data_collator([dict(row) for row in dataset])
    loss = trainer.compute_loss(trainer.model, batch)

    inputs = {k: v for k, v in batch.items() if k not in ("labels", "rationale_labels", "answer_index")}
    log_probs = trainer.model.vlm(**inputs).logits.log_softmax(-1)
    answers, rationales, reasons_first = [], [], []
    for i, label in enumerate(batch["labels"]):
        token = trainer.processing_class.yes_token_id if label == 1 else trainer.processing_class.no_token_id
        answers.append(-log_probs[i, batch["answer_index"][i], token])
        (where,) = torch.nonzero(batch["rationale_labels"][i] != -100, as_tuple=True)
        rationales.append(-log_probs[i, where - 1, batch["rationale_labels"][i, where]].mean())
        reasons_first.append(bool(where[0] <= batch["answer_index"][i]))
    torch.testing.assert_close(loss, torch.stack(answers).mean() + 0.3 * torch.stack(rationales).mean())
    assert (
        set(reasons_first) == {"decision_first": {False}, "reasons_first": {True}, "mixed": {True, False}}[rationale]
    )


def test_evaluation_asks_for_the_decision_only(vlm_folder, tmp_path):
    """Held-out rows are judged without their reasons, which would tell the verdict."""
    dataset = make_dataset(4)
    metrics = {}
    for rationale in (None, "reasons_first"):
        trainer = make_trainer(vlm_folder("internvl"), tmp_path, dataset, eval_dataset=dataset, rationale=rationale)
        metrics[rationale] = trainer.evaluate()
    assert metrics[None]["eval_margin"] == metrics["reasons_first"]["eval_margin"]


@pytest.mark.parametrize("rationale_format", ["decision_first", "reasons_first"])
def test_training_step_holds_no_full_sequence_logits(tmp_path, vlm_folder, rationale_format):
    """With a vocabulary of 150,000 no tensor of sequence length times vocabulary is ever made."""
    model = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"))
    model.resize_token_embeddings(150_000)
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"))
    rows = [dict(row) for row in make_dataset(2)]
    batch = DataCollatorForRewardDance(processor, with_rationales=True, rationale_format=rationale_format)(rows)
    batch.pop("labels")
    labelled = int((batch["rationale_labels"] != -100).sum()) + len(rows)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    rows_of_logits = []

    def record(tensor):
        if 150_000 in tensor.shape and tensor.data_ptr() not in weights:
            rows_of_logits.append(tensor.numel() // 150_000)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        output = model(**batch)
        (output.rationale_loss.mean() - output.answer_log_probs.sum()).backward()
    assert 0 < max(rows_of_logits) <= labelled < batch["input_ids"].numel() / 4


def test_model_card_is_filled_from_the_run(vlm_folder, dataset, tmp_path):
    """The draft names paradigm, steps and held-out accuracy, and its metadata can be parsed."""
    trainer = make_trainer(vlm_folder("internvl"), tmp_path, dataset, eval_dataset={"id": dataset}, max_steps=1)
    trainer.train()
    accuracy = trainer.evaluate()["eval_id_accuracy"]
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert "rewarddance" in card.data.tags
    assert card.data.eval_results[0].metric_value == pytest.approx(accuracy)
    assert f"| id | {100 * accuracy:.1f} |" in card.text
    assert "pairwise paradigm" in card.text


@pytest.mark.parametrize(("paradigm", "with_adapter"), [("regressive", False), ("pairwise", True)])
def test_new_weights_come_from_the_seed(vlm_folder, dataset, tmp_path, paradigm, with_adapter):
    """A scalar head and an adapter start from the run's seed, whatever was drawn before."""

    def start(seed, drawn):
        torch.manual_seed(drawn)
        peft_config = LoraConfig(r=2, target_modules=["q_proj"]) if with_adapter else None
        trainer = make_trainer(
            vlm_folder("internvl"), tmp_path, dataset, peft_config=peft_config, paradigm=paradigm, seed=seed
        )
        weights = trainer.model.state_dict()
        return torch.cat([weights[name].flatten() for name in weights if "lora_A" in name or name == "score.weight"])

    assert torch.equal(start(seed=1, drawn=2), start(seed=1, drawn=3))
    assert not torch.equal(start(seed=1, drawn=2), start(seed=4, drawn=2))


def test_model_card_records_the_licenses_of_its_data(vlm_folder, dataset, tmp_path):
    """Every dataset of a mix is recorded with its license, so that a release cannot miss one that forbids commercial use."""
    parts = []
    for name, license in (("org/free", "apache-2.0"), ("org/restricted", "cc-by-nc-4.0")):
        info = datasets.DatasetInfo(homepage=f"https://huggingface.co/datasets/{name}", license=license)
        parts.append(datasets.Dataset(dataset.data, info=info, fingerprint=name).cast(dataset.features))
    rows = torch.utils.data.ConcatDataset([parts[0], torch.utils.data.Subset(parts[1], [0])])
    make_trainer(vlm_folder("internvl"), tmp_path, rows, max_steps=1).create_model_card()
    facts = ModelCard.load(tmp_path / "README.md").data.to_dict()[FACTS_KEY]
    assert facts["data"] == [
        {"name": "org/free", "license": "apache-2.0"},
        {"name": "org/restricted", "license": "cc-by-nc-4.0"},
    ]


def test_nan_is_noticed(vlm_folder, dataset, tmp_path):
    """NaN weights stop training at the next log and evaluation at once, and checkpoints on disk stay as they are."""
    trainer = make_trainer(vlm_folder("internvl"), tmp_path, dataset, eval_dataset=dataset, max_steps=2)
    with torch.no_grad():
        next(trainer.model.vlm.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="Training gave NaN or infinite values by step 1"):
        trainer.train()
    with pytest.raises(ValueError, match="Evaluation gave NaN"):
        trainer.evaluate()


def test_unusable_inputs_are_refused_before_training(vlm_folder, dataset, tmp_path):
    """Wrong datasets, paradigms, adapters, models and folders are named when the trainer is made."""
    folder = vlm_folder("internvl")
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        make_trainer(folder, tmp_path, dataset.select([]))
    with pytest.raises(ValueError, match=r"`eval_dataset\['ood'\]` lacks the columns \['chosen'\]"):
        make_trainer(folder, tmp_path, dataset, eval_dataset={"ood": dataset.rename_column("chosen", "image_win")})
    judge = RewardDanceForYesScoring.from_pretrained(folder, paradigm="pointwise")
    with pytest.raises(ValueError, match="`args.paradigm` is 'pairwise', but the model's is 'pointwise'"):
        make_trainer(judge, tmp_path, dataset)
    with pytest.raises(TypeError, match="`model` is a `Linear`"):
        make_trainer(torch.nn.Linear(1, 1), tmp_path, dataset)
    with pytest.raises(ValueError, match="`rationale` is 'reasons_last'"):
        RewardDanceTrainingArguments(str(tmp_path), rationale="reasons_last")
    with pytest.raises(ValueError, match="the pointwise paradigm has no rationales"):
        RewardDanceTrainingArguments(str(tmp_path), rationale="decision_first", paradigm="pointwise")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        make_trainer(folder, tmp_path / "file", dataset)


def test_corrupt_image_in_a_dataset_names_its_row(vlm_folder, tmp_path):
    """The row of a dataset is named although its images are decoded late, in the collator."""
    good = {"bytes": None, "path": str(tmp_path / "good.png")}
    random_image(0).save(good["path"])
    features = datasets.Features(prompt=datasets.Value("string"), chosen=datasets.Image(), rejected=datasets.Image())
    rows = [
        {"prompt": "p", "chosen": good, "rejected": {"bytes": b"broken", "path": None} if i == 1 else good}
        for i in range(2)
    ]
    dataset = datasets.Dataset.from_list(rows, features=features)
    trainer = make_trainer(vlm_folder("internvl"), tmp_path / "out", dataset)
    with pytest.raises(ValueError, match=r"`rejected of train_dataset\[1\]` cannot be read as an image"):
        trainer.train()


def test_fitted_temperature_does_not_bend_the_loss(vlm_folder, dataset, tmp_path):
    """Training starts from temperature 1, since a fitted one belongs to the weights before."""
    judge = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"), score_temperature=3.0)
    trainer = make_trainer(judge, tmp_path, dataset)
    assert trainer.model.config.score_temperature == 1.0
