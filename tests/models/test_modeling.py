"""Tests of the model: its scores are those of the plain model, whatever is done to batch, weights and checkpoint."""

import shutil

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_architectures import tiny_config
from tiny_vlms import FAMILIES, random_image, tiny_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from rewarddance_hf.models import RewardDanceConfig, RewardDanceForYesScoring, RewardDanceProcessor


EXACT = {"rtol": 0, "atol": 0}
# Equal weights and inputs: results may still differ in the last bit, where files put weights at other addresses.
SAME = {"rtol": 0, "atol": 2e-6}
# Scores of these random models are about 0.002, so that log-probabilities are what tells them apart.
CLOSE = {"rtol": 0, "atol": 1e-5}
RATIONALES = ["Image 2 shows a red circle, image 1 does not.", None, "yes no yes", "Two squares. " * 6]


def log_probs(model, batch):
    with torch.no_grad():
        return model(**batch).answer_log_probs


def answer_ids(family, folder):
    """IDs of "yes" and "no" as the released models write them: after "Assistant:" follows a space."""
    space = " " if family in ("idefics3", "smolvlm") else ""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ((yes,), (no,)) = (tokenizer.encode(space + word, add_special_tokens=False) for word in ("yes", "no"))
    return yes, no


def assert_equal_weights(got, wanted):
    got, wanted = got.state_dict(), wanted.state_dict()
    assert got.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(got[name], weight), name


# ---------------------------------------------------------------------------------------------------------- scores


@pytest.mark.every_family
def test_scores_equal_plain_transformers(family, vlm_folder, judge, stock_inputs, rows):
    """The reward is the plain model's probability of "yes" after the written-out question, and nothing else."""
    model, processor = judge(family)
    plain = AutoModelForImageTextToText.from_pretrained(vlm_folder(family)).eval()
    yes, no = answer_ids(family, vlm_folder(family))
    for references in (rows["references"], None):
        with torch.no_grad():
            output = model(**processor(rows["images"], rows["prompts"], references))
        wanted = []
        for i, (sample, prompt) in enumerate(zip(rows["images"], rows["prompts"], strict=True)):
            inputs = stock_inputs(family, sample, prompt, None if references is None else references[i])
            with torch.no_grad():
                wanted.append(plain(**inputs).logits[0, -1].softmax(-1)[[yes, no]])
        wanted = torch.stack(wanted)
        torch.testing.assert_close(output.scores, wanted[:, 0], rtol=0, atol=1e-6)
        torch.testing.assert_close(output.answer_log_probs, wanted.log(), **CLOSE)
        torch.testing.assert_close(output.logits, (wanted[:, :1] / wanted[:, 1:]).log(), **CLOSE)
        assert output.scores.shape == (4,)
        assert output.logits.shape == (4, 1)
        assert output.loss is None


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_normalization_and_temperature(temperature, family, vlm_folder, judge, stock_inputs, rows, select):
    """Calibration divides the logits by the temperature, under both normalizations."""
    _, processor = judge(family)
    plain, _ = judge(family)
    batch = processor(**select(rows, [1]))
    yes, no = answer_ids(family, vlm_folder(family))
    with torch.no_grad():
        logits = plain.vlm(**stock_inputs(family, *(rows[name][1] for name in rows))).logits[0, -1] / temperature
    wanted = {"vocabulary": logits.softmax(-1)[yes], "yes_no": logits[[yes, no]].softmax(-1)[0]}
    for normalization, score in wanted.items():
        model = RewardDanceForYesScoring.from_pretrained(
            vlm_folder(family), score_normalization=normalization, score_temperature=temperature
        )
        with torch.no_grad():
            output = model(**batch)
        torch.testing.assert_close(output.scores[0], score, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(output.logits[0, 0], logits[yes] - logits[no], **CLOSE)


def test_every_input_matters(family, judge, rows):
    """An image or text that is silently dropped leaves scores that look perfectly normal."""
    model, processor = judge(family)
    sample, reference, prompt = rows["images"][0], rows["references"][0], rows["prompts"][0]
    other = random_image(99)
    questions = {
        "question": ([sample], [prompt], [reference]),
        "other sample": ([other], [prompt], [reference]),
        "other reference": ([sample], [prompt], [other]),
        "swapped": ([reference], [prompt], [sample]),
        "other prompt": ([sample], ["a blue square"], [reference]),
        "no reference": ([sample], [prompt], None),
        "condition": ([sample], [prompt], [reference], [other]),
        "other condition": ([sample], [prompt], [reference], [reference]),
        "clip": ([[sample, other]], [prompt], [[other, other]]),
        "clip in other order": ([[other, sample]], [prompt], [[other, other]]),
    }
    scores = {name: model(**processor(*question)).scores.item() for name, question in questions.items()}
    scores["criteria"] = model(**processor([sample], [prompt], [reference], criteria="yes")).scores.item()
    scores["task"] = model(**processor([sample], [prompt], [reference], task="text-to-video")).scores.item()
    values = sorted(scores.values())
    gaps = [(b - a) / b for a, b in zip(values, values[1:], strict=False)]
    assert min(gaps) > 1e-5, scores


def test_answer_words_can_be_swapped(family, vlm_folder, judge, rows):
    """The meaning of "yes" comes from the processor's words, not from the order of the IDs."""
    _, processor = judge(family)
    swapped = RewardDanceProcessor.from_pretrained(vlm_folder(family), yes_word="no", no_word="yes")
    assert (swapped.yes_token_id, swapped.no_token_id) == (processor.no_token_id, processor.yes_token_id)
    model = RewardDanceForYesScoring.from_pretrained(
        vlm_folder(family), yes_token_id=swapped.yes_token_id, no_token_id=swapped.no_token_id
    )
    model.check_processor(swapped)
    plain, _ = judge(family)
    batch = processor(**rows)
    with torch.no_grad():
        got, wanted = model(**batch), plain(**batch)
    torch.testing.assert_close(got.answer_log_probs, wanted.answer_log_probs.flip(-1), **SAME)
    torch.testing.assert_close(got.logits, -wanted.logits, **SAME)


@pytest.mark.every_family
def test_unrelated_to_the_rest_of_the_batch(family, judge, rows, select):
    """A sample scores the same alone, in any order, and beside longer questions, larger images and clips."""
    model, processor = judge(family)
    alone = torch.cat([log_probs(model, processor(**select(rows, [i]))) for i in range(4)])
    assert (alone[:, None] - alone[None]).abs().sum(-1).fill_diagonal_(1).min() > 1e-3
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3], [1, 0, 2], [0, 0, 3]):
        together = log_probs(model, processor(**select(rows, order)))
        torch.testing.assert_close(together, alone[order], **CLOSE)

    clip = [random_image(i, 44, 36) for i in range(20, 23)]
    mixed = {
        **rows,
        "images": [rows["images"][0], clip, rows["images"][2], clip[1:]],
        "references": [rows["references"][0], clip[:2], rows["references"][1:3], rows["references"][3]],
        "conditions": [None, rows["references"][3], rows["references"][3], None],
        "task": ["text-to-image", "image-to-video", "image-to-video", "text-to-video"],
        "criteria": [None, "motion", None, None],
    }
    alone = torch.cat([log_probs(model, processor(**select(mixed, [i]))) for i in range(4)])
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        together = log_probs(model, processor(**select(mixed, order)))
        torch.testing.assert_close(together, alone[order], **CLOSE)


# --------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.every_family
@pytest.mark.parametrize("paradigm", ["pairwise", "regressive"])
def test_checkpoint_is_bit_exact(paradigm, family, vlm_folder, rows, tmp_path):
    """A judge scores the same after saving and loading, whichever classes load it."""
    model = RewardDanceForYesScoring.from_pretrained(
        vlm_folder(family), paradigm=paradigm, score_temperature=1.7, score_normalization="yes_no"
    )
    processor = RewardDanceProcessor.from_pretrained(vlm_folder(family), prompt_layout="text_first")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    batch = processor(**rows)
    with torch.no_grad():
        wanted = model(**batch)
    for model_class, processor_class in (
        (RewardDanceForYesScoring, RewardDanceProcessor),
        (AutoModel, AutoProcessor),
    ):
        loaded, loaded_processor = model_class.from_pretrained(tmp_path), processor_class.from_pretrained(tmp_path)
        assert type(loaded) is RewardDanceForYesScoring
        assert type(loaded_processor) is RewardDanceProcessor
        got, want = (
            {k: v for k, v in m.config.to_dict().items() if k not in ("_name_or_path", "architectures", "auto_map")}
            for m in (loaded, model)
        )
        got["vlm_config"].pop("_name_or_path"), want["vlm_config"].pop("_name_or_path")
        assert got == want
        assert_equal_weights(loaded, model)
        loaded_batch = loaded_processor(**rows)
        assert loaded_batch.keys() == batch.keys()
        for name in batch:
            torch.testing.assert_close(loaded_batch[name], batch[name], **EXACT)
        with torch.no_grad():
            output = loaded(**loaded_batch)
        torch.testing.assert_close(output.scores, wanted.scores, **SAME)
        torch.testing.assert_close(output.logits, wanted.logits, **SAME)


@pytest.mark.every_family
def test_plain_checkpoint_and_back(family, vlm_folder, tmp_path):
    """Wrapping changes no weight, and the tuned model inside can be taken out for use elsewhere."""
    plain = AutoModelForImageTextToText.from_pretrained(vlm_folder(family))
    model, information = RewardDanceForYesScoring.from_pretrained(vlm_folder(family), output_loading_info=True)
    assert not information["missing_keys"]
    assert not information["unexpected_keys"]
    assert_equal_weights(model.vlm, plain)
    model.vlm.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is type(plain)
    assert_equal_weights(again, plain)
    # The files are named alike, so that tools without transformers can read them too.
    assert (
        load_file(tmp_path / "model.safetensors").keys() == load_file(vlm_folder(family) / "model.safetensors").keys()
    )


@pytest.mark.parametrize("tie", [False, True])
def test_tied_weights(tie, family, judge, rows, tmp_path):
    """Where embedding and head are one tensor, training one of two copies would give a model that cannot be saved."""
    config, _ = FAMILIES[family]()
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = tie
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "plain")
    _, processor = judge(family)
    model = RewardDanceForYesScoring.from_pretrained(tmp_path / "plain", yes_token_id=1, no_token_id=2)
    model.save_pretrained(tmp_path / "judge")
    loaded = RewardDanceForYesScoring.from_pretrained(tmp_path / "judge")
    for each in (model, loaded):
        is_tied = each.get_output_embeddings().weight is each.get_input_embeddings().weight
        assert is_tied == tie
    assert_equal_weights(loaded, model)
    batch = processor(**rows)
    torch.testing.assert_close(log_probs(loaded, batch), log_probs(model, batch), **SAME)


def test_resized_embeddings(vlm_folder, judge, rows):
    """New tokens enlarge embedding and head of the wrapped model; old answers keep their logits."""
    model = RewardDanceForYesScoring.from_pretrained(vlm_folder("qwen2_5_vl"), score_normalization="yes_no")
    _, processor = judge("qwen2_5_vl")
    batch = processor(**rows)
    with torch.no_grad():
        before = model(**batch).scores
        size = model.get_input_embeddings().num_embeddings
        model.resize_token_embeddings(size + 8)
        assert model.get_output_embeddings().out_features == size + 8
        assert model.config.get_text_config().vocab_size == size + 8
        torch.testing.assert_close(model(**batch).scores, before, **CLOSE)


def test_attention_implementation(family, vlm_folder, judge, rows):
    """The choice of attention reaches the wrapped model, and does not change its scores."""
    model, processor = judge(family)
    eager = RewardDanceForYesScoring.from_pretrained(vlm_folder(family), attn_implementation="eager")
    assert eager.vlm.config.get_text_config()._attn_implementation == "eager"
    batch = processor(**rows)
    torch.testing.assert_close(log_probs(eager, batch), log_probs(model, batch), **CLOSE)


@pytest.mark.parametrize("dtype", ["auto", None])
def test_precision_of_the_checkpoint(dtype, vlm_folder, tmp_path):
    """A checkpoint in half precision is not doubled in memory by wrapping it, saving it and loading it again."""
    plain = AutoModelForImageTextToText.from_pretrained(vlm_folder("internvl"), dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "plain")
    arguments = {} if dtype is None else {"dtype": dtype}
    model = RewardDanceForYesScoring.from_pretrained(tmp_path / "plain", paradigm="regressive", **arguments)
    model.save_pretrained(tmp_path / "judge")
    loaded = RewardDanceForYesScoring.from_pretrained(tmp_path / "judge", **arguments)
    for each in (model, loaded):
        assert {parameter.dtype for parameter in each.parameters()} == {torch.bfloat16}


def test_device_map(judge, vlm_folder, rows):
    """`device_map` goes through accelerate's dispatch, which must find every module."""
    model, processor = judge("internvl")
    mapped = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"), device_map="cpu")
    batch = processor(**rows)
    torch.testing.assert_close(log_probs(mapped, batch), log_probs(model, batch), **SAME)


def test_bfloat16(judge, vlm_folder, rows, select):
    """Half precision changes a score by rounding only; output stays float32."""
    model, processor = judge("internvl")
    half = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    batch = processor(**select(rows, [0, 3]))
    with torch.no_grad():
        got, wanted = half(**batch), model(**batch)
    assert got.scores.dtype == got.logits.dtype == torch.float32
    torch.testing.assert_close(got.answer_log_probs, wanted.answer_log_probs, rtol=0, atol=0.05)
    torch.testing.assert_close(got.scores.log(), wanted.scores.log(), rtol=0, atol=0.05)


@pytest.mark.parametrize("way", ["weights", "autocast", "rationale"])
def test_log_odds_in_low_precision(way, vlm_folder, judge, rows):
    """Log-odds are those of the last hidden states in float32: logits in bfloat16 would come in steps."""
    processor = judge("internvl")[1]
    dtype = torch.float32 if way == "autocast" else torch.bfloat16
    model = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"), dtype=dtype).eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight *= 500  # logits of the size that trained models have, and large ones
    batch = processor(**rows)
    if way == "rationale":
        batch["rationale_labels"] = torch.full_like(batch["input_ids"], -100)
        batch["rationale_labels"][:, -1] = 5
        batch["answer_index"] = torch.full((len(batch["input_ids"]),), batch["input_ids"].shape[1] - 1)
    hidden = []
    handle = head.register_forward_pre_hook(lambda module, arguments: hidden.append(arguments[0].detach()))
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        output = model(**batch)
    handle.remove()
    answers = [processor.yes_token_id, processor.no_token_id]
    with torch.no_grad():
        states = hidden[0][:, -1] if way != "rationale" else hidden[0].view(len(batch["input_ids"]), -1, 64)[:, -1]
        yes, no = (states.float() @ head.weight[answers].float().T).T
    torch.testing.assert_close(output.logits[:, 0], yes - no, rtol=1e-5, atol=1e-5)
    assert output.answer_log_probs.exp().sum(-1).le(1).all()
    output.logits.sum().backward()
    assert head.weight.grad[answers].abs().sum() > 0


def test_lora(family, vlm_folder, judge, rows, tmp_path):
    """An adapter changes the scores, and keeps them when it is saved, loaded again and merged."""
    _, processor = judge(family)
    model = RewardDanceForYesScoring.from_pretrained(vlm_folder(family))
    batch = processor(**rows)
    plain = log_probs(model, batch)
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "qkv"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(model, settings).eval()
    wanted = log_probs(adapted, batch)
    assert (wanted - plain).abs().max() > 1e-3
    with adapted.disable_adapter():
        torch.testing.assert_close(log_probs(adapted, batch), plain, **SAME)
    adapted.save_pretrained(tmp_path / "adapter")

    base = RewardDanceForYesScoring.from_pretrained(vlm_folder(family))
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(log_probs(loaded, batch), wanted, **SAME)
    merged = loaded.merge_and_unload()
    assert type(merged) is RewardDanceForYesScoring
    torch.testing.assert_close(log_probs(merged, batch), wanted, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = RewardDanceForYesScoring.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(log_probs(again, batch), log_probs(merged, batch), **SAME)


# ------------------------------------------------------------------------------------------------------ paradigms


def test_pointwise_paradigm(judge, vlm_folder, rows):
    """The pointwise paradigm differs in the question alone."""
    _, processor = judge("internvl")
    plain, _ = judge("internvl")
    model = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"), paradigm="pointwise")
    batch = processor(rows["images"], rows["prompts"])
    torch.testing.assert_close(log_probs(model, batch), log_probs(plain, batch), **SAME)
    assert batch["input_ids"].shape[1] < processor(**rows)["input_ids"].shape[1]


@pytest.mark.every_family
def test_regressive_paradigm(family, vlm_folder, judge, stock_inputs, rows):
    """The baseline of the paper reads a number from the last hidden state; its score is that number's sigmoid."""
    _, processor = judge(family)
    model = RewardDanceForYesScoring.from_pretrained(vlm_folder(family), paradigm="regressive", score_temperature=2.0)
    assert model.score.weight.shape == (1, 64)
    assert 0 < model.score.weight.abs().max() < 0.2  # initialized, not whatever was in memory
    with torch.no_grad():
        model.score.weight.normal_()
        output = model(**processor(rows["images"], rows["prompts"]))
    plain = AutoModelForImageTextToText.from_pretrained(vlm_folder(family)).eval()
    for i, (sample, prompt) in enumerate(zip(rows["images"], rows["prompts"], strict=True)):
        with torch.no_grad():
            hidden = plain(**stock_inputs(family, sample, prompt), output_hidden_states=True).hidden_states[-1]
        wanted = hidden[0, -1] @ model.score.weight[0] / 2
        torch.testing.assert_close(output.logits[i, 0], wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.scores, output.logits[:, 0].sigmoid(), **EXACT)
    assert output.answer_log_probs is None
    assert output.loss is None


# ----------------------------------------------------------------------------------------------------------- losses


def test_answer_loss(family, judge, rows):
    """Targets are probabilities of "yes": 1, 0, and 0.5 for a tie."""
    model, processor = judge(family)
    batch = processor(**rows)
    labels = torch.tensor([1.0, 0.0, 0.5, 0.25])
    with torch.no_grad():
        output = model(**batch, labels=labels)
    yes, no = output.answer_log_probs.T
    wanted = -(yes[0] + no[1] + 0.5 * yes[2] + 0.5 * no[2] + 0.25 * yes[3] + 0.75 * no[3]) / 4
    torch.testing.assert_close(output.loss, wanted)
    with torch.no_grad():
        hard = [model(**batch, labels=torch.tensor([1, 0, 1, 0]).to(dtype)).loss for dtype in (torch.long, torch.bool)]
    torch.testing.assert_close(hard[0], -(yes[0] + no[1] + yes[2] + no[3]) / 4)
    torch.testing.assert_close(hard[1], hard[0], **EXACT)


def test_rationales(family, judge, rows, select):
    """Teacher-forced rationales leave the answer's probabilities alone, and their loss is the plain cross-entropy."""
    model, processor = judge(family)
    answers = [True, False, False, True]
    question = processor(**rows)
    length = question["input_ids"].shape[1]
    batch = processor.append_answers(processor(**rows), answers, RATIONALES)
    torch.testing.assert_close(batch["input_ids"][:, :length], question["input_ids"], **EXACT)
    wanted_answers = torch.where(torch.tensor(answers), processor.yes_token_id, processor.no_token_id)
    torch.testing.assert_close(batch["input_ids"][:, length], wanted_answers, **EXACT)
    labels = torch.tensor([1.0, 0.0, 0.0, 1.0])

    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    try:
        with torch.no_grad():
            output = model(**batch, labels=labels)
    finally:
        handle.remove()
    num_labelled = int((batch["rationale_labels"] != -100).sum())
    assert [shape.numel() // shape[-1] for shape in seen] == [4 + num_labelled]
    torch.testing.assert_close(output.answer_log_probs, log_probs(model, question), **CLOSE)

    plain_inputs = {k: v for k, v in batch.items() if k not in ("rationale_labels", "answer_index")}
    with torch.no_grad():
        logits = model.vlm(**plain_inputs).logits
    for i, rationale in enumerate(RATIONALES):
        targets = batch["rationale_labels"][i]
        if rationale is None:
            assert (targets == -100).all()
            assert output.rationale_loss[i] == 0
            continue
        wanted = cross_entropy(logits[i, :-1], targets[1:], ignore_index=-100)
        torch.testing.assert_close(output.rationale_loss[i], wanted, **CLOSE)
        # The same row by itself, without any padding, at positions counted from the end.
        row = processor.append_answers(processor(**select(rows, [i])), [answers[i]], [rationale])
        text = processor.tokenizer.decode(row["rationale_labels"][0][row["rationale_labels"][0] != -100])
        assert text.startswith("\n" + rationale)
        with torch.no_grad():
            alone = model.vlm(
                **{k: v for k, v in row.items() if k not in ("rationale_labels", "answer_index")}
            ).logits[0]
        count = int((row["rationale_labels"] != -100).sum())
        wanted = cross_entropy(alone[-count - 1 : -1], row["input_ids"][0, -count:])
        torch.testing.assert_close(output.rationale_loss[i], wanted, **CLOSE)

    answer_loss = -output.answer_log_probs[range(4), [0, 1, 1, 0]].mean()
    torch.testing.assert_close(output.loss, answer_loss + output.rationale_loss.mean())


def test_gradient_checkpointing(family, vlm_folder, judge, rows):
    """Saving memory must not change what is learned."""
    _, processor = judge(family)
    batch = processor.append_answers(processor(**rows), [True] * 4, RATIONALES)
    gradients = []
    for checkpointing in (False, True):
        model = RewardDanceForYesScoring.from_pretrained(vlm_folder(family)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model(**batch, labels=torch.tensor([1.0, 0.0, 0.5, 1.0])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(".vision" in name or ".visual" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


# ----------------------------------------------------------------------------------------------------------- errors


def test_right_padding_is_refused(vlm_folder, judge, rows):
    """With padding on the right the last position is padding, whose scores look like any other."""
    model, _ = judge("qwen2_5_vl")
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("qwen2_5_vl"))
    processor.tokenizer.padding_side = "right"
    batch = processor(**rows)
    with pytest.raises(ValueError, match="requires left padding"):
        model(**batch)
    with pytest.raises(ValueError, match="end in padding in 3 of 4 rows"):
        model(**processor.append_answers(batch, [True] * 4, RATIONALES))
    regressive = RewardDanceForYesScoring.from_pretrained(vlm_folder("qwen2_5_vl"), paradigm="regressive")
    with pytest.raises(ValueError, match="requires left padding"):
        regressive(**processor(rows["images"], rows["prompts"]))


def test_missing_images_are_refused(judge, vlm_folder, rows):
    """Without pixels the wrapped model reads placeholders as text, and gives scores that look like any other."""
    model, processor = judge("internvl")
    regressive = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"), paradigm="regressive")
    batch = {name: value for name, value in processor(**rows).items() if name != "pixel_values"}
    for each in (model, regressive):
        with pytest.raises(ValueError, match="the images would not be seen"):
            each(**batch)
        with pytest.raises(ValueError, match="the images would not be seen"):
            each(**batch, pixel_values=None)


def test_incomplete_inputs_are_refused(judge, vlm_folder, rows):
    """Half of the answer's bookkeeping would read the wrong position; misshapen labels would broadcast to a wrong loss."""
    model, processor = judge("internvl")
    batch = processor.append_answers(processor(**rows), [True] * 4, RATIONALES)
    with pytest.raises(ValueError, match="`rationale_labels` was given without `answer_index`"):
        model(**{name: value for name, value in batch.items() if name != "answer_index"})
    with pytest.raises(ValueError, match="`answer_index` was given without `rationale_labels`"):
        model(**{name: value for name, value in batch.items() if name != "rationale_labels"})
    with pytest.raises(ValueError, match=r"`labels` has shape \(4, 1\), but must hold one target per row: \(4,\)"):
        model(**batch, labels=torch.ones(4, 1))
    with pytest.raises(ValueError, match=r"`labels` has shape \(1,\)"):
        model(**batch, labels=torch.ones(1))
    regressive = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"), paradigm="regressive")
    question = processor(rows["images"], rows["prompts"])
    with pytest.raises(ValueError, match="`labels` was given, but the regressive paradigm has no loss"):
        regressive(**question, labels=torch.ones(4))
    with pytest.raises(ValueError, match="`rationale_labels` was given, but the regressive paradigm"):
        regressive(**batch)


def test_answers_are_known_and_agreed(judge, vlm_folder, rows, tmp_path):
    """A judge that does not know its answer tokens, or is asked in other words, must not score."""
    model, processor = judge("internvl")
    for path in vlm_folder("internvl").iterdir():
        if path.name in ("config.json", "model.safetensors"):
            shutil.copy(path, tmp_path)
    unaware = RewardDanceForYesScoring.from_pretrained(tmp_path)  # no processor to ask
    assert unaware.config.yes_token_id is None
    batch = processor(**rows)
    with pytest.raises(ValueError, match="`config.yes_token_id` is None"):
        unaware(**batch)
    unaware.check_processor(processor)
    torch.testing.assert_close(log_probs(unaware, batch), log_probs(model, batch), **SAME)

    other = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"), yes_word="no", no_word="yes")
    with pytest.raises(ValueError, match="Load both from the same checkpoint"):
        model.check_processor(other)
    model.check_processor(processor)


def test_other_checkpoints_are_refused(tmp_path):
    """Text models have no eyes: their scores would be about the prompt alone."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    for name, config in {
        "bert": hf.BertConfig(vocab_size=16, **sizes),
        "qwen2": hf.Qwen2Config(vocab_size=16, num_key_value_heads=1, **sizes),
    }.items():
        AutoModel.from_config(config).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"of model type '{name}'.*wraps an image-text-to-text model"):
            RewardDanceForYesScoring.from_pretrained(tmp_path / name)
        tiny_tokenizer(["<e>"], pad="<e>", eos="<e>").save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"'{name}' checkpoint without a processor"):
            RewardDanceProcessor.from_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="of model type None"):
        RewardDanceForYesScoring(RewardDanceConfig())
    with pytest.raises(ValueError, match="'pix2struct', an encoder-decoder"):
        RewardDanceForYesScoring(RewardDanceConfig(vlm_config=hf.Pix2StructConfig()))


def test_rationales_need_a_known_head():
    """BLIP has a language-model head, but does not tell which of its modules it is."""
    model = RewardDanceForYesScoring(RewardDanceConfig(vlm_config=tiny_config("blip"), yes_token_id=5, no_token_id=6))
    inputs = {"input_ids": torch.ones(1, 4).long(), "pixel_values": torch.zeros(1, 3, 64, 64)}
    with pytest.raises(ValueError, match="BlipForConditionalGeneration` does not tell its language-model head"):
        model(**inputs, rationale_labels=torch.ones(1, 4).long(), answer_index=torch.tensor([1]))


def test_missing_weights_are_refused(vlm_folder, tmp_path):
    """transformers fills missing weights with random numbers and a warning; a judge with those is worthless."""
    folder = tmp_path / "plain"
    shutil.copytree(vlm_folder("internvl"), folder)
    weights = load_file(folder / "model.safetensors")
    (removed,) = [name for name in weights if name.endswith("layers.1.mlp.up_proj.weight")]
    save_file({k: v for k, v in weights.items() if k != removed}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj\.weight"):
        RewardDanceForYesScoring.from_pretrained(folder)


def test_missing_head_is_refused(vlm_folder, tmp_path):
    """The scalar head is new only when the checkpoint never had one."""
    model = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"), paradigm="regressive")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = weights.pop("score.weight")
    assert torch.equal(head, model.score.weight)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights.*score\.weight"):
        RewardDanceForYesScoring.from_pretrained(tmp_path)


def test_no_chat_template(vlm_folder, tmp_path):
    """Base models without a chat template cannot be asked in a chat."""
    folder = tmp_path / "plain"
    shutil.copytree(vlm_folder("internvl"), folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="`chat_template` is None and `InternVLProcessor` has none"):
        RewardDanceProcessor.from_pretrained(folder)
    template = (vlm_folder("internvl") / "chat_template.jinja").read_text()
    assert RewardDanceProcessor.from_pretrained(folder, chat_template=template).yes_token_id is not None


def test_failed_pass_leaves_no_trace(judge, rows):
    """The head's hook of one forward pass must be gone in the next, also after an exception."""
    model, processor = judge("internvl")
    batch = processor.append_answers(processor(**rows), [True] * 4, RATIONALES)
    wanted = log_probs(model, processor(**rows))
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:1]})
    assert not model.get_output_embeddings()._forward_pre_hooks
    torch.testing.assert_close(log_probs(model, processor(**rows)), wanted, **SAME)


def test_further_outputs_are_passed_through(judge, rows):
    """What callers of transformers ask for is given, and not ignored."""
    model, processor = judge("internvl")
    batch = processor(**rows)
    plain = model(**batch)
    assert plain.hidden_states is plain.attentions is None
    more = model(**batch, output_hidden_states=True)
    assert len(more.hidden_states) == model.config.get_text_config().num_hidden_layers + 1
    assert more.hidden_states[-1].shape[:2] == batch["input_ids"].shape
    torch.testing.assert_close(more.scores, plain.scores)
    values = model(**batch, return_dict=False)
    assert isinstance(values, tuple)
    for got, want in zip(values, plain.to_tuple(), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("paradigm", ["pointwise", "regressive"])
def test_attentions_are_passed_through(vlm_folder, paradigm):
    """Attention weights need an implementation that has them."""
    folder = vlm_folder("qwen2_5_vl")
    model = RewardDanceForYesScoring.from_pretrained(folder, paradigm=paradigm, attn_implementation="eager")
    batch = RewardDanceProcessor.from_pretrained(folder)([random_image(1)], ["x"])
    output = model(**batch, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == model.config.get_text_config().num_hidden_layers
    assert output.attentions[0].shape[-1] == batch["input_ids"].shape[1]
    assert output.hidden_states is not None
