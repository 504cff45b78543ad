"""Space of a RewardDance judge: compare two images in both orders, read its reasons, rank many."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image
from transformers import pipeline


# Written when the Space is built: `title`, `judge` and `generator` (repository IDs or folders), `revision`, `loading` and
# `sampling` (arguments of the generator), `criteria` to choose from, `prompts` to try, `explains` (whether the judge writes reasons).
SETTINGS = json.loads((Path(__file__).parent / "settings.json").read_text(encoding="utf-8"))
MAX_IMAGES = 12
HUB_ARGUMENTS = {} if Path(SETTINGS["judge"]).is_dir() else {"revision": SETTINGS["revision"]}

judge = pipeline("visual-preference", model=SETTINGS["judge"], trust_remote_code=True, **HUB_ARGUMENTS)
IS_PAIRWISE = judge.model.config.uses_reference


@cache
def load_generator() -> Any:
    """Load the generator when it is first asked for."""
    from diffusers import DiffusionPipeline

    generator = DiffusionPipeline.from_pretrained(SETTINGS["generator"], **SETTINGS["loading"], **HUB_ARGUMENTS)
    generator.set_progress_bar_config(disable=True)
    return generator


def draw(prompt: str, seed: float) -> tuple[Image.Image, Image.Image]:
    """
    Draw two images of a prompt.

    Args:
        prompt (`str`):
            Prompt.
        seed (`float`):
            Seed of the noise; a whole number.

    Returns:
        `tuple`: Two images.
    """
    _check_prompt(prompt)
    noise = torch.Generator().manual_seed(int(seed))
    images = load_generator()([prompt] * 2, generator=noise, **SETTINGS["sampling"]).images
    return images[0], images[1]


def compare(
    prompt: str, criteria: str, image_a: Image.Image | None, image_b: Image.Image | None
) -> tuple[str, list[list[str]], str]:
    """
    Judge two images, in both orders if the judge is pairwise.

    Args:
        prompt (`str`):
            Prompt of both.
        criteria (`str`):
            Criteria, or nothing for those of the judge.
        image_a (`PIL.Image.Image`):
            Image A.
        image_b (`PIL.Image.Image`):
            Image B.

    Returns:
        `tuple`: Verdict, one row for each question that was asked, and the reasons.
    """
    _check_prompt(prompt)
    if image_a is None or image_b is None:
        raise gr.Error("Two images are needed: upload both, or draw them.")
    answer = judge({"prompt": prompt, "images": [image_a, image_b], "criteria": criteria or None})
    score_a, score_b = answer["scores"]
    if IS_PAIRWISE:
        rows = [
            ["A, then B", 'Is B better? P("yes")', f"{score_b:.3f}"],
            ["B, then A", 'Is A better? P("yes")', f"{score_a:.3f}"],
        ]
    else:
        rows = [["A alone", "reward", f"{score_a:.3f}"], ["B alone", "reward", f"{score_b:.3f}"]]
    b_wins = answer["order"][0] == 1
    reasons = _explain(prompt, criteria, image_a, image_b, b_wins) if SETTINGS["explains"] and IS_PAIRWISE else ""
    wins_a, wins_b = answer["wins"]
    verdict = "Neither is better" if wins_a == wins_b else f"{'B' if b_wins else 'A'} is better"
    return verdict, rows, reasons


def rank(prompt: str, criteria: str, images: list[Any] | None) -> list[tuple[Image.Image, str]]:
    """
    Rank images, all against all if the judge is pairwise.

    Args:
        prompt (`str`):
            Prompt of all.
        criteria (`str`):
            Criteria, or nothing for those of the judge.
        images (`list`):
            Images, each with its caption, as a gallery gives them.

    Returns:
        `list[tuple]`: Images with their places, best first.
    """
    _check_prompt(prompt)
    samples = [image[0] if isinstance(image, (list, tuple)) else image for image in images or []]
    if not 2 <= len(samples) <= MAX_IMAGES:
        raise gr.Error(f"{len(samples)} images were given, but 2 to {MAX_IMAGES} can be ranked here.")
    answer = judge({"prompt": prompt, "images": samples, "criteria": criteria or None})
    return [
        (samples[i], f"{place}. image {i + 1}: {answer['wins'][i]:g} wins, reward {answer['scores'][i]:.3f}")
        for place, i in enumerate(answer["order"], start=1)
    ]


def _check_prompt(prompt: str) -> None:
    if not (prompt or "").strip():
        raise gr.Error("A prompt is needed: what the images should show.")


def _explain(prompt: str, criteria: str, image_a: Image.Image, image_b: Image.Image, b_wins: bool) -> str:
    """What the judge writes after its verdict, with A as image 1 and B as image 2."""
    processor, model = judge.processor, judge.model
    question = processor(images=[image_b], prompts=[prompt], references=[image_a], criteria=criteria or None)
    inputs = processor.append_answers(question, [b_wins], [None]).to(model.device)
    inputs = {name: value for name, value in inputs.items() if name not in ("rationale_labels", "answer_index")}
    tokenizer = processor.tokenizer
    with torch.no_grad():
        tokens = model.vlm.generate(
            **inputs,
            max_new_tokens=128,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


with gr.Blocks(title=SETTINGS["title"]) as demo:
    gr.Markdown(f"# {SETTINGS['title']}\n\n{SETTINGS['text']}")
    with gr.Row():
        prompt = gr.Textbox(SETTINGS["prompts"][0], label="Prompt", elem_id="prompt", scale=2)
        criteria = gr.Dropdown(
            ["", *SETTINGS["criteria"]], value="", label="Criteria", allow_custom_value=True, elem_id="criteria"
        )
    with gr.Tab("Compare two"):
        with gr.Row():
            image_a = gr.Image(label="A", type="pil", image_mode="RGB", height=220, elem_id="image_a")
            image_b = gr.Image(label="B", type="pil", image_mode="RGB", height=220, elem_id="image_b")
        with gr.Row():
            if SETTINGS["generator"]:
                seed = gr.Number(0, label="Seed", precision=0)
                gr.Button("Draw two", elem_id="draw").click(draw, [prompt, seed], [image_a, image_b])
            button = gr.Button("Judge", variant="primary", elem_id="judge")
        with gr.Row():
            verdict = gr.Label(label="Which is better", elem_id="verdict")
            questions = gr.Dataframe(headers=["shown", "question", "answer"], label="Asked", interactive=False)
        reasons = gr.Textbox(label="Reasons", visible=SETTINGS["explains"], interactive=False, elem_id="reasons")
        button.click(compare, [prompt, criteria, image_a, image_b], [verdict, questions, reasons])
    with gr.Tab("Rank many"):
        images = gr.Gallery(
            label="Images",
            type="pil",
            columns=6,
            object_fit="contain",
            interactive=True,
            elem_id="images",
        )
        rank_button = gr.Button("Rank", variant="primary", elem_id="rank")
        ranked = gr.Gallery(label="Best first", columns=6, object_fit="contain", interactive=False, elem_id="ranked")
        rank_button.click(rank, [prompt, criteria, images], ranked)
    gr.Examples([[text] for text in SETTINGS["prompts"]], [prompt], label="Prompts")

if __name__ == "__main__":
    demo.launch()
