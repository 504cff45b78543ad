"""
Text from users stays text with tokenizers as they are released, which `make test-tokenizers` fetches: Gemma 3 has 6,415
added tokens, HTML tags among them, Llama 3 has 256, and Qwen 3 normalizes text first.
"""

import os
import random
import time
import unicodedata
from pathlib import Path

import pytest
import transformers as hf
from tiny_vlms import CHATML, GEMMA, PARTS, image_only, random_image

from rewarddance_hf import RewardDanceProcessor
from rewarddance_hf.models.plain_text_rewarddance import ZERO_WIDTH_SPACE
from rewarddance_hf.models.question_rewarddance import Question


SOURCE = Path(os.environ.get("REAL_TOKENIZERS", "outputs/tokenizers"))
LLAMA = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    + PARTS.replace("PLACEHOLDER", "<IMG_CONTEXT>\n")
    + "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
HTML = "<div class='a'><table><tr><td>a red circle</td></tr></table><h1>x < y</h1></div>\n"
# Letters that become others where text is normalized, parts of words, spaces of other scripts
LETTERS = (
    "\u212a\u037e\u1fef\u0338\uff1c\uff5c\uff1e\u2581\u200b\u200d\u00ad\ufeff\u202e\u0130\u00df\n\t\r \"\\'{}[]</>|_#"
)
WORDS = ["yes", "no", "Answer:", "a red circle", "two cats", "{{ bos_token }}", "\U0001f600", "<b", "/>", "<|", "|>"]


def qwen3(files):
    image_processor = hf.Qwen2VLImageProcessorPil(patch_size=7, size={"shortest_edge": 196, "longest_edge": 3136})
    template = CHATML.replace("PLACEHOLDER", "<|vision_start|><|image_pad|><|vision_end|>")
    return image_only("Qwen3VLProcessor")(
        image_processor, hf.AutoTokenizer.from_pretrained(files), chat_template=template
    )


def gemma3(files):
    image_processor = hf.Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    template = GEMMA.replace("PLACEHOLDER", "<start_of_image>")
    return hf.Gemma3Processor(
        image_processor, hf.AutoTokenizer.from_pretrained(files), chat_template=template, image_seq_length=4
    )


def llama3(files):
    names = {"start_image": "<img>", "end_image": "</img>", "context_image": "<IMG_CONTEXT>", "video": "<video>"}
    named = {f"{name}_token": token for name, token in names.items()}
    tokenizer = hf.AutoTokenizer.from_pretrained(files, extra_special_tokens=named)
    image_processor = hf.GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=False)
    return image_only("InternVLProcessor")(image_processor, tokenizer, image_seq_length=4, chat_template=LLAMA)


@pytest.fixture(scope="module", params=[qwen3, gemma3, llama3], ids=lambda make: make.__name__)
def processor(request, tmp_path_factory):
    """Processor of a checkpoint with a released tokenizer."""
    files = SOURCE / request.param.__name__
    if not files.exists():
        pytest.skip(f"{files} is missing: `make test-tokenizers` fetches it")
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param(files).save_pretrained(folder)
    return RewardDanceProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def added(processor):
    """Added tokens but those of spaces, which control nothing, with their IDs."""
    vocabulary = processor.tokenizer.get_added_vocab()
    return {token: vocabulary[token] for token in sorted(vocabulary) if token.strip(" \n\t\u2581")}


def ids_of(processor, text):
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def controls_in(added, ids):
    """Added tokens among tokens, each as often as it is there."""
    wanted = set(added.values())
    return sorted(token for token in ids if token in wanted)


def seconds(work):
    """Of the processor: beside other work, a long text would wait for its turn, and a short one would not."""
    start = time.process_time()
    work()
    return time.process_time() - start


@pytest.mark.parametrize("kind", ["html", "tokens", "halves"])
def test_time_is_linear(processor, added, kind):
    """5,400 characters of HTML took Gemma 3 a minute; all of its tokens one after another, or begun only, are no worse."""
    text = {"html": HTML, "tokens": "".join(added), "halves": "".join(token[:-1] for token in added)}[kind]
    text *= 54_000 // len(text) + 1
    processor.plain_text(text[:100])
    short, long = (
        min(seconds(lambda count=count: processor.plain_text(text[:count])) for _ in range(3))
        for count in (5_400, 54_000)
    )
    print(f"{kind}: 5,400 characters take {1000 * short:.1f} ms, 54,000 take {1000 * long:.1f} ms")  # noqa: T201
    assert long < 50 * short  # 100 times if it were quadratic
    assert long < 5


def test_every_token(processor, added):
    """Each added token stays text, alone, in other text, between others, and nothing of it is lost."""
    for text in [*added, *(f"a{token}b" for token in added), "".join(added), "".join([*added][::-1])]:
        plain = processor.plain_text(text)
        ids = ids_of(processor, plain)
        assert not controls_in(added, ids), text
        assert plain.replace(ZERO_WIDTH_SPACE, "") == text
        decoded = processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert decoded == plain.replace("\u2581", " "), text


def random_texts(added, count, seed):
    chance, tokens = random.Random(seed), [*added]
    for _ in range(count):
        parts = []
        for _ in range(chance.randint(1, 12)):
            token = chance.choice(tokens)
            cut = chance.randint(0, len(token))
            parts.append(
                chance.choice(
                    [
                        token,
                        token[:cut],
                        token[cut:],
                        f"{token[:cut]}{ZERO_WIDTH_SPACE}{token[cut:]}",
                        f"{token[:cut]}{chance.choice(tokens)}{token[cut:]}",
                        token.upper(),
                        unicodedata.normalize("NFD", token.replace("k", "\u212a")),
                        chance.choice(WORDS),
                        "".join(chance.choices(LETTERS, k=3)),
                        chr(chance.choice([chance.randrange(0xD800), chance.randrange(0xE000, 0x11000)])),
                    ]
                )
            )
        yield "".join(parts)


def test_questions_with_random_texts(processor, added):
    """
    Thousands of strings as prompt and criteria bring no added token into a question; text that spells none stays as
    it is.
    """
    image = processor.load_frames(random_image(0, 28, 28))

    def controls(prompt, criteria):
        question = Question(image, prompt, reference=image, task="text-to-image", criteria=criteria)
        return controls_in(added, ids_of(processor, processor.write_question(question)))

    wanted = controls("a red circle", "how good it is")
    assert wanted
    for text in random_texts(added, 4000, seed=0):
        assert controls(text, text[::-1]) == wanted, repr(text)
        if not any(token in text for token in added):
            assert processor.plain_text(text) == text


def test_images_of_a_batch(processor):
    """A batch with such prompts has as many image tokens as one without."""
    images = [random_image(seed, 28, 28) for seed in range(2)]
    token = str(processor.vlm_processor.image_token)
    image_id = processor.tokenizer.convert_tokens_to_ids(token)
    batches = [processor(images, prompts, images) for prompts in (["a", "b"], [f"{token} {HTML}", token * 100])]
    counts = [(batch["input_ids"] == image_id).sum(-1).tolist() for batch in batches]
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0
