"""Many questions at once: the texts, tokens and pixels of each are those that it has alone."""

import pytest
import torch
from jinja2 import Environment
from tiny_vlms import random_image

from rewarddance_hf.models import RewardDanceProcessor
from rewarddance_hf.models.chats_rewarddance import MIN_ALIKE, render_alike
from rewarddance_hf.models.question_rewarddance import Question


TEXTS = [
    *(
        "a red circle",
        "two blue squares, and a dog's bowl",
        'say \\"hi\\"',
        "",
        " ",
        "赤い円 🟥",
        "a/think b",
        "a/no_think b",
    ),
    *(
        "AN IMAGE of text",
        "an image of text",
        "<|user|>",
        "x" * 3000,
        "a#b",
        "İ",
        "back\\\\slash",
        "{{ 7*7 }} {% if %}",
    ),
]
TEMPLATES = {
    "plain": "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}",
    "looks for a string": "{{ messages[0]['content'] }}{% if '/no_think' in messages[0]['content'] %}!{% endif %}",
    "looks for either of two": (
        "{% set c = messages[0]['content'] %}{{ c }}{% if '/think' in c %}1{% elif '/no_think' in c %}2{% else %}1{% endif %}"
    ),
    "removes a string": "{{ messages[0]['content'] | replace(\"'s bowl\", '') }}",
    "cuts at a string": "<{{ messages[0]['content'].split('/think')[-1] }}>",
    "changes case": "{{ messages[0]['content'] | upper }}",
    "looks in lower case": "{{ messages[0]['content'] }}{{ 'an image' in messages[0]['content'] | lower }}",
    "looks for a character": "{{ messages[0]['content'] }}{{ '#' in messages[0]['content'] }}",
    "looks for a strange character": "{{ messages[0]['content'] }}{{ '円' in messages[0]['content'] }}",
    "looks for an escaped character": "{{ messages[0]['content'] }}{{ '\\u5186' in messages[0]['content'] }}",
    "looks at the length": "{{ messages[0]['content'] }}{{ messages[0]['content'] | length > 2500 }}",
    "writes it twice": "{{ messages[0]['content'] }}{{ messages[0]['content'] }}",
    "leaves it out": "nothing",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_what_the_template_makes_of_each(kind):
    """Whatever a template does with a text, each chat is the one that is rendered with it."""
    compiled, asked = Environment().from_string(TEMPLATES[kind]), []

    def render(text):
        asked.append(text)
        return compiled.render(messages=[{"role": "user", "content": f'Prompt: "{text}" is it?'}])

    texts = [*TEXTS, *TEXTS[:3]]
    got = render_alike(render, texts, TEMPLATES[kind])
    num_rendered = len(asked)
    assert got == [render(text) for text in texts]
    if kind == "plain":
        assert num_rendered == 2 + 1  # the one that is too long
    few = texts[: MIN_ALIKE - 1]
    asked.clear()
    assert render_alike(render, few, TEMPLATES[kind]) == [render(text) for text in few]
    assert len(asked) == 2 * len(few)
    assert render_alike(render, texts, {"default": TEMPLATES[kind]}) == got  # named templates


def hostile_questions(processor):
    controls = sorted(processor.tokenizer.get_added_vocab())[:8]
    prompts = [*controls, "".join(controls), *TEXTS, "long " * 900]
    images = [random_image(i) for i in range(len(prompts))]
    examples = processor.read_examples(
        [{"image": random_image(90), "reference": random_image(91), "prompt": controls[0], "verdict": True}]
    )
    kinds = [
        {},
        {"examples": examples},
        {"reasons_first": True, "criteria": f"whether it holds {controls[-1]}"},
        {"condition": random_image(92), "task": "image-to-video"},
    ]
    questions = []
    for i, prompt in enumerate(prompts):
        for settings in kinds:
            sample, reference = images[i], images[i - 1]
            if "condition" in settings:
                sample, reference = [sample] * 2, [reference] * 2
            questions.append(processor.load(Question(sample=sample, prompt=prompt, reference=reference, **settings)))
    return questions


@pytest.mark.every_family
def test_each_is_written_as_alone(family, vlm_folder):
    """Prompts with special tokens, long ones, examples, clips and conditions: all at once and one by one."""
    for layout in ("images_first", "text_first", "text_after_each"):
        processor = RewardDanceProcessor.from_pretrained(vlm_folder(family), prompt_layout=layout)
        questions = hostile_questions(processor)
        assert processor.write_questions(questions) == [processor.write_question(question) for question in questions]


@pytest.mark.every_family
def test_batch_is_that_of_the_wrapped_processor(family, vlm_folder):
    """Tokens and pixels are bit by bit those of the wrapped processor, also of images that have its size already."""
    processor = RewardDanceProcessor.from_pretrained(vlm_folder(family))
    sizes = [(28, 28), (56, 56), (28, 56), (64, 64), (40, 30), (28, 28), (112, 112)]
    images = [random_image(i, *size) for i, size in enumerate(sizes)]
    questions = [
        processor.load(Question(sample=image, prompt=f"prompt {i}", reference=images[i - 1]))
        for i, image in enumerate(images)
    ]
    texts = [processor.write_question(question) for question in questions]
    media = [question.images for question in questions]
    wanted = processor.vlm_processor(images=media, text=texts, padding=True, **processor.vlm_arguments(texts[0]))
    got = processor.encode(questions)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=0)


def test_settings_that_change_later(vlm_folder):
    """A setting of the image processor that is changed after a first call is in force."""
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"))
    image = random_image(1, 28, 28)
    before = processor([image], ["a"])["pixel_values"]
    processor.image_processor.image_mean = (0.0, 0.0, 0.0)
    processor.image_processor.size = {"height": 56, "width": 56}
    assert processor([image], ["a"])["pixel_values"].shape[-2:] == (56, 56)
    processor.image_processor.size = {"height": 28, "width": 28}
    assert not torch.equal(processor([image], ["a"])["pixel_values"], before)


def test_targets_of_each_are_those_alone(vlm_folder):
    """Answers and reasons of several rows, in both formats and without, are those of each row by itself."""
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"))
    rationales = ["because <image> it is", None, "because\nof that", "", "x " * 200, " spaces "]
    first = [False, False, True, True, False, True]
    answers = [True, False, True, False, False, True]
    questions = [Question(sample=random_image(i), prompt="p", reasons_first=first[i]) for i in range(6)]
    batch = processor.append_answers(processor.encode(questions), answers, rationales, first)
    for i, question in enumerate(questions):
        alone = processor.append_answers(processor.encode([question]), [answers[i]], [rationales[i]], [first[i]])
        for name in ("input_ids", "rationale_labels"):
            kept = [row["attention_mask"].bool() for row in (batch, alone)]
            assert batch[name][i][kept[0][i]].tolist() == alone[name][0][kept[1][0]].tolist()
        offset = int(alone["answer_index"][0]) - int((alone["attention_mask"][0] == 0).sum())
        padded = int(batch["attention_mask"][i].argmax())
        assert int(batch["answer_index"][i]) - padded == offset
