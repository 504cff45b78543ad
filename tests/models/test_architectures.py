"""Architectures beyond the tiny families: weights as transformers loads them, processors and inputs of other shapes."""

import pytest
import torch
import transformers as hf
from tiny_architectures import architectures, tiny_config
from tiny_vlms import CHATML, random_image, tiny_tokenizer

from rewarddance_hf import RewardDanceScorer
from rewarddance_hf.models import RewardDanceConfig, RewardDanceForYesScoring, RewardDanceProcessor


EXACT = {"rtol": 0, "atol": 0}


def kimi_config():
    """Kimi-K2.5, whose weights are permuted on loading by the number of heads of its vision tower."""
    text = {
        **{"model_type": "deepseek_v3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48},
        **{"moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
        **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
        **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
    }
    vision = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2},
        **{"patch_size": 7, "pos_emb_height": 4, "pos_emb_width": 4},
    }
    ids = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    return hf.Kimi_K25Config(text_config=text, vision_config=vision, projection_hidden_size=32, **ids)


def assert_weights_of_transformers(folder):
    plain = hf.AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    judge = RewardDanceForYesScoring.from_pretrained(folder).vlm.state_dict()
    assert judge.keys() == plain.keys()
    for name, weights in plain.items():
        torch.testing.assert_close(judge[name], weights, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.every_family
def test_weights_are_those_of_transformers(family, vlm_folder):
    """A judge that is wrapped around a plain model has its very weights, whatever is converted on loading."""
    assert_weights_of_transformers(vlm_folder(family))


@pytest.mark.skipif(not hasattr(hf, "Kimi_K25Config"), reason="needs a transformers version with Kimi-K2.5")
def test_conversions_find_the_parts_of_the_configuration(tmp_path):
    """The vision tower of Kimi-K2.5 was permuted as if it had one head, and no error said so."""
    torch.manual_seed(0)
    hf.AutoModelForImageTextToText.from_config(kimi_config()).save_pretrained(tmp_path)
    assert_weights_of_transformers(tmp_path)
    config = RewardDanceConfig.from_pretrained(tmp_path)
    assert config.vision_config is config.vlm_config.vision_config
    assert set(config.to_dict()) == set(RewardDanceConfig(vlm_config=config.vlm_config).to_dict())
    for wrong in (config, RewardDanceConfig()):
        with pytest.raises(AttributeError, match="`RewardDanceConfig` has no attribute `vision_tower`"):
            _ = wrong.vision_tower


def save_processor(processor_class, image_processor, tokenizer, folder):
    """What the repository of a plain model has beside its weights."""
    image_processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "processor_config.json").write_text(f'{{"processor_class": "{processor_class}"}}')
    return RewardDanceProcessor.from_pretrained(folder)


@pytest.mark.skipif(not hasattr(hf, "MiniCPMV4_6Processor"), reason="needs a transformers version with MiniCPM-V 4.6")
def test_processors_that_read_their_video_part(tmp_path):
    """MiniCPM-V looks up settings of its video processor when it is made; without torchvision there is none."""
    names = (
        "image_start",
        "image_end",
        "slice_start",
        "slice_end",
        "image_id_start",
        "image_id_end",
        "image",
        "video",
    )
    named = {f"{name}_token": f"<|{name}|>" for name in names}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()]
    tokenizer = tiny_tokenizer(specials, pad="<|endoftext|>", eos="<|im_end|>", **named)
    tokenizer.chat_template = CHATML.replace("PLACEHOLDER", "<|image|>")
    image_processor = hf.MiniCPMV4_6ImageProcessorPil(scale_resolution=56)
    processor = save_processor("MiniCPMV4_6Processor", image_processor, tokenizer, tmp_path)
    batch = processor([random_image(1), random_image(2)], ["a", "b c"], [random_image(3), random_image(4)])
    assert batch["input_ids"].shape[0] == 2
    assert (batch["input_ids"] == processor.tokenizer.image_token_id).any(1).all()


@pytest.fixture(scope="module")
def mllama(tmp_path_factory):
    """Processor of a tiny Mllama, and the folder that its weights are in too."""
    folder = tmp_path_factory.mktemp("mllama")
    specials = ["<|pad|>", "<|begin|>", "<|im_start|>", "<|im_end|>", "<|image|>", "<|python_tag|>"]
    tokenizer = tiny_tokenizer(specials, pad="<|pad|>", eos="<|im_end|>", bos="<|begin|>", image_token="<|image|>")
    tokenizer.chat_template = "{{ bos_token }}" + CHATML.replace("PLACEHOLDER", "<|image|>")
    image_processor = hf.MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=2)
    processor = save_processor("MllamaProcessor", image_processor, tokenizer, folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "cross_attention_layers": [1, 3], **sizes}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "pad_token_id": 0}
    vision = {
        "image_size": 28,
        "patch_size": 7,
        "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    vision |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"attention_heads": 4, "intermediate_layers_indices": [0, 1], "vision_output_dim": 96}
    torch.manual_seed(0)
    model = hf.MllamaForConditionalGeneration(
        hf.MllamaConfig(
            vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<|image|>")
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return processor, folder


def test_all_inputs_per_token_are_extended(mllama):
    """Mllama has a mask by token, image and tile: targets see the images that the end of the question sees."""
    processor, _ = mllama
    images = [random_image(i) for i in range(4)]
    question = processor(images[:2], ["a", "b c d e f g"], images[2:])
    length, before = question["input_ids"].shape[1], question["cross_attention_mask"].clone()
    assert before.shape[1] == length
    batch = processor.append_answers(question, [True, False], ["because it is red", "no"])
    assert batch["cross_attention_mask"].shape[:2] == batch["input_ids"].shape == batch["attention_mask"].shape
    torch.testing.assert_close(batch["cross_attention_mask"][:, :length], before, **EXACT)
    for position in range(length, batch["input_ids"].shape[1]):
        torch.testing.assert_close(batch["cross_attention_mask"][:, position], before[:, -1], **EXACT)


def test_rationales_of_mllama(mllama):
    """Losses and explanations are those of the plain model, shown each row alone, and every image to all that follows it."""
    processor, folder = mllama
    plain = hf.MllamaForConditionalGeneration.from_pretrained(folder)
    judge = RewardDanceForYesScoring.from_pretrained(folder)
    images = [random_image(0), random_image(1, 60, 30), random_image(2, 28, 56)]

    @torch.no_grad()
    def logits_of(ids, batch, row):
        first, second = (ids == plain.config.image_token_index).nonzero()[:, 0].tolist()
        seen = torch.zeros(1, len(ids), 2, 2, dtype=torch.long)
        tiles = batch["aspect_ratio_mask"][row].sum(-1)
        seen[:, first:second, 0, : tiles[0]] = seen[:, second:, 1, : tiles[1]] = 1
        shown = {
            name: batch[name][row : row + 1] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        }
        return plain(input_ids=ids[None], cross_attention_mask=seen, **shown).logits[0]

    batch = processor(images[:2], ["a", "b c d e f g"], images[1:])
    batch = processor.append_answers(batch, [True, False], ["because it is red", "no"])
    with torch.no_grad():
        losses = judge(**batch).rationale_loss
    for row, loss in enumerate(losses):
        is_text = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row][is_text], batch["rationale_labels"][row][is_text]
        wanted = torch.nn.functional.cross_entropy(logits_of(ids, batch, row)[:-1], labels[1:])
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)

    got = RewardDanceScorer(judge, processor).compare(images[1], images[0], "a", explain=True, max_new_tokens=6)
    question = processor(images[:1], ["a"], images[1:2])
    ids = torch.cat(
        [
            question["input_ids"][0],
            torch.tensor([processor.yes_token_id if got.winner == "b" else processor.no_token_id]),
        ]
    )
    start = len(ids)
    while len(ids) < start + 6 and ids[-1] != processor.tokenizer.eos_token_id:
        ids = torch.cat([ids, logits_of(ids, question, 0)[-1:].argmax(-1)])
    assert got.rationale == processor.tokenizer.decode(ids[start:], skip_special_tokens=True).strip() != ""


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        ("mistral4", "takes no images"),
        ("diffusion_gemma", "takes no images"),
        ("pi0", r"needs \['state'\] beside images"),
    ],
)
def test_what_is_shown_no_image_is_refused(family, fault):
    """Transformers lists them as image-text-to-text models, and a judge of them would fail at its first question."""
    if family not in architectures():
        pytest.skip(f"no {family!r} in this version of transformers")
    with torch.device("meta"), pytest.raises(ValueError, match=f"of model type '{family}', and .* {fault}"):
        RewardDanceForYesScoring(RewardDanceConfig(vlm_config=tiny_config(family)))
