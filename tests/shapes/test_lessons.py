"""Questions that base models are taught with: true answers, and what a model knows is counted as it would answer."""

import re

import pytest
import torch
from transformers import AutoModelForImageTextToText

from rewarddance_hf.shapes.captions import parse_caption
from rewarddance_hf.shapes.knowledge import answer_accuracy, knowledge_table, measure_knowledge
from rewarddance_hf.shapes.lessons import ShapesLessons, ShapesMatching, ShapesPairMatching, lesson_words
from rewarddance_hf.shapes.models import BASE_VLM, build_tokenizer, judge_processor
from rewarddance_hf.shapes.oracle import check, detect_objects
from rewarddance_hf.shapes.questions import QuestionCollator
from rewarddance_hf.shapes.scenes import HELD_OUT_COMPOSITIONS, NUMBERS


PLACE_SIGNS = {"left": ("x", -1), "right": ("x", 1), "top": ("y", -1), "bottom": ("y", 1)}
RELATION_SIGNS = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}


@pytest.fixture(scope="module", params=["train", "ood"])
def rows(request):
    """Lessons of a split, with every topic."""
    return list(ShapesLessons(150, request.param, seed=1))


def named(objects, text):
    """Objects of the image whose color and shape a text names."""
    return [item for item in objects if f"{item.color} {item.shape}" in text]


def is_at(item, place):
    if place == "middle":
        return max(abs(item.x - 0.5), abs(item.y - 0.5)) < 0.2
    signs = [PLACE_SIGNS[word] for word in place.split()]
    return all(sign * (getattr(item, axis) - 0.5) > 0 for axis, sign in signs)


def is_related(first, relation, second):
    axis, sign = RELATION_SIGNS[relation]
    other = "y" if axis == "x" else "x"
    apart = sign * (getattr(first, axis) - getattr(second, axis))
    return apart > abs(getattr(first, other) - getattr(second, other))


def answer_by_pixels(question, objects):
    """What the oracle's objects say to a question, or None where that is not one answer."""
    if question == "How many objects?":
        return NUMBERS[len(objects) - 1]
    if match := re.fullmatch(r"What color is the (\w+)\?", question):
        return next(item.color for item in objects if item.shape == match[1])
    if match := re.fullmatch(r"What shape is (\w+)\?", question):
        return next(item.shape for item in objects if item.color == match[1])
    if match := re.fullmatch(r"Which is (larger|smaller)\?", question):
        found = (max if match[1] == "larger" else min)(objects, key=lambda item: item.radius)
        return f"a {found.color} {found.shape}"
    if match := re.fullmatch(r"Is the (.+) larger than the (.+)\?", question):
        (first,), (second,) = named(objects, match[1]), named(objects, match[2])
        return "yes" if first.radius > second.radius else "no"
    if match := re.fullmatch(r"Is there a (.+)\?", question):
        return "yes" if named(objects, match[1]) else "no"
    if match := re.fullmatch(r"Is the (.+) (left of|right of|above|below) the (.+)\?", question):
        (first,), (second,) = named(objects, match[1]), named(objects, match[3])
        return "yes" if is_related(first, match[2], second) else "no"
    if match := re.fullmatch(r"Where is the (.+) from the (.+)\?", question):
        (first,), (second,) = named(objects, match[1]), named(objects, match[2])
        return next(relation for relation in RELATION_SIGNS if is_related(first, relation, second))
    return None


def test_answers_are_true(rows):
    """An independent reading of the pixels gives the same answers, for every topic."""
    checked = {}
    for row in rows:
        if len(row["images"]) != 1:
            continue
        objects = detect_objects(row["images"][0])
        if any(item.color is None or item.shape is None for item in objects):
            continue
        for (question, answer), topic in zip(row["questions"], row["topics"], strict=True):
            if match := re.fullmatch(r"What is (top \w+|bottom \w+|middle)\?", question):
                there = [item for item in objects if is_at(item, match[1])]
                right = len(there) == (0 if answer == "nothing" else len(answer.split(" and ")))
                right &= all(f"a {item.color} {item.shape}" in answer for item in there)
            elif match := re.fullmatch(r"Where is the (\w+ \w+)\?", question):
                right = is_at(named(objects, match[1])[0], answer)
            elif match := re.fullmatch(r"What is (left of|right of|above|below) the (.+)\?", question):
                there = [item for item in objects if is_related(item, match[1], named(objects, match[2])[0])]
                right = answer == (f"a {there[0].color} {there[0].shape}" if there else "nothing")
            elif topic.startswith("check") and question.startswith("Is this"):
                caption = question.removeprefix("Is this ").removesuffix("?")
                right = check(row["images"][0], caption).all_hold == (answer == "yes")
            elif topic == "describe":
                right = check(row["images"][0], answer).all_hold
            elif question == "What size?":
                right = {"small": 0.11, "medium": 0.15, "large": 0.22}[answer] < objects[0].radius
            else:
                right = answer_by_pixels(question, objects) == answer
            checked.setdefault(topic, []).append(right)
    assert {"place", "color", "shape", "count", "size", "relation", "check relation", "check binding"} <= set(checked)
    for topic, found in checked.items():
        assert sum(found) / len(found) > 0.97, (topic, sum(found), len(found))


def test_differences_are_true(rows):
    """What is said to differ between two images is what differs between their descriptions, read apart."""
    differences = []
    for row in rows:
        if len(row["images"]) != 2:
            continue
        (_, differs), (_, both) = row["questions"]
        first, second = (
            parse_caption(text) for text in re.fullmatch(r"Image 1: (.+)\. Image 2: (.+)\.", both).groups()
        )
        colors, shapes = (
            [[getattr(item, name) for item in scene.objects] for scene in (first, second)]
            for name in ("color", "shape")
        )
        if len(first.objects) != len(second.objects):
            assert differs == "number"
        else:
            assert ("color" in differs) == (colors[0] != colors[1])
            assert ("shape" in differs) == (shapes[0] != shapes[1])
            assert (differs == "nothing") == (first == second)
        for image, scene in zip(row["images"], both.removesuffix(".").split(". Image 2: "), strict=True):
            differences.append(check(image, scene.removeprefix("Image 1: ")).all_hold)
    assert sum(differences) / len(differences) > 0.97


@pytest.mark.parametrize("split", ["train", "ood"])
def test_matching_is_true(split):
    """The oracle agrees with the answers about what an image shows."""
    agreed, answers = [], []
    for row in ShapesMatching(60, split):
        (image,) = row["images"]
        drawn_well = {
            answer
            for (_, answer), topic in zip(row["questions"], row["topics"], strict=True)
            if topic == "match quality"
        }
        assert len(drawn_well) < 2
        for (question, answer), topic in zip(row["questions"], row["topics"], strict=True):
            answers.append(answer == "yes")
            if topic != "match quality" and drawn_well == {
                "yes"
            }:  # the oracle reads blurred and coarse images less well
                agreed.append(check(image, question.split('"')[1]).all_hold == (answer == "yes"))
    assert sum(agreed) / len(agreed) > 0.97
    assert 0.4 < sum(answers) / len(answers) < 0.7


def test_matching_is_what_a_judge_is_asked():
    """The tokens of an image and one prompt are those that a pointwise judge of shapes gets."""
    processor = judge_processor(prompt_layout="images_first")
    row = ShapesMatching(1)[0]
    batch = QuestionCollator(processor.vlm_processor)([{**row, "questions": row["questions"][:1]}])
    _, prompt, rest = row["questions"][0][0].split('"')
    criteria = rest.partition("Criteria: ")[2].partition(".\n")[0]
    asked = processor(images=row["images"], prompts=[prompt], criteria=[criteria])
    length = asked["input_ids"].shape[1]
    torch.testing.assert_close(batch["input_ids"][:, :length], asked["input_ids"])
    torch.testing.assert_close(batch["pixel_values"], asked["pixel_values"])
    assert processor.tokenizer.decode(batch["labels"][0][length:]) == f"{row['questions'][0][1]}<|end|>"


@pytest.mark.parametrize("split", ["train", "ood"])
def test_pair_matching_is_true(split):
    """Each of two images of a prompt is said to be right where the oracle finds it right; all four cases come."""
    agreed, cases = [], set()
    for row in ShapesPairMatching(60, split):
        answers = [answer for _, answer in row["questions"]]
        assert [question for question, _ in row["questions"]] == ["Is image 1 right?", "Is image 2 right?"]
        cases.add(tuple(answers))
        if row["topics"][0] != "pair quality":
            prompt = row["opening"].split('"')[1]
            agreed += [
                check(image, prompt).all_hold == (answer == "yes")
                for image, answer in zip(row["images"], answers, strict=True)
            ]
    assert sum(agreed) / len(agreed) > 0.97
    assert len(cases) == 4


@pytest.mark.parametrize("kind", [ShapesMatching, ShapesPairMatching])
def test_explanations_are_true(kind):
    """A question that comes a second time has what the pixels show for an answer, and is right where the prompt says that."""
    shares = {"relation": 0.5, "size": 0.5}
    checked = {"explain relation": [], "explain size": []}
    for more in kind(90, "ood", 4, kind_shares=shares, explained=True):
        asked = list(zip(more["questions"], more["topics"], strict=True))
        verdicts = {question: answer for (question, answer), topic in asked if "explain" not in topic}
        for (question, said), topic in asked:
            if "explain" not in topic:
                continue
            place = int(question.split()[2]) - 1 if kind is ShapesPairMatching else 0
            wanted = parse_caption((question if '"' in question else more["opening"]).split('"')[1])
            told = str(wanted.relation or wanted.objects[0].size)
            assert verdicts[question] == ("yes" if said == told else "no")
            objects = detect_objects(more["images"][place])
            found = [
                [item for item in objects if (item.color, item.shape) == (w.color, w.shape)] for w in wanted.objects
            ]
            if all(len(items) == 1 for items in found) and not set(more["topics"]) & {"match quality"}:
                first, *second = (items[0] for items in found)
                checked[topic].append(
                    is_related(first, said, second[0])
                    if topic == "explain relation"
                    else (first.radius > (second[0].radius if second else 0.16)) == said.startswith("large")
                )
    for found in checked.values():
        assert len(found) > 10
        assert sum(found) / len(found) > 0.95


@pytest.mark.parametrize("kind", [ShapesMatching, ShapesPairMatching])
def test_explanations_leave_matching_as_it_is(kind):
    """The other questions about images, and the images, are the same with explanations and without."""
    plain, explained = (kind(20, seed=2, explained=explained) for explained in (False, True))
    for row, more in zip(plain, explained, strict=True):
        asked = zip(more["questions"], more["topics"], strict=True)
        assert [pair for pair, topic in asked if "explain" not in topic] == row["questions"]
        assert more["images"] == row["images"]


@pytest.mark.parametrize("split", ["train", "ood"])
def test_faults_are_true(split):
    """What is told to be wrong with each of two images is what the oracle finds, and agrees with which of them are right."""
    agreed, counts = [], set()
    for row in ShapesPairMatching(80, split, 1, faults=True, explained=True):
        answers = dict(reversed(row["questions"]))  # verdicts, not what explains them
        right = [number for number in ("1", "2") if answers[f"Is image {number} right?"] == "yes"]
        assert answers["Which is right?"] == (" and ".join(right) or "nothing")
        if "pair quality" in row["topics"]:
            assert len(answers) == 3
            continue
        prompt = row["opening"].split('"')[1]
        for number, image in zip(("1", "2"), row["images"], strict=True):
            told = answers[f"What differs in image {number}?"].split(" and ")
            told = [] if told == ["nothing"] else told
            assert answers[f"How many differ in image {number}?"] == (NUMBERS[len(told) - 1] if told else "nothing")
            assert (not told) == (number in right)
            counts.add(len(told))
            facts = check(image, prompt).facts
            broken = [name.split()[0].replace("relation", "place") for name, holds in facts.items() if not holds]
            agreed.append(broken == told)
    assert sum(agreed) / len(agreed) > 0.95
    assert counts >= {0, 1, 2}


def test_pair_matching_is_what_a_judge_is_shown():
    """Up to the question, tokens and pixels are those that a pairwise judge of shapes gets."""
    processor = judge_processor(prompt_layout="text_after_each")
    row = ShapesPairMatching(1)[0]
    batch = QuestionCollator(processor.vlm_processor)([{**row, "questions": []}])
    _, prompt, rest, *_ = row["opening"].split('"')
    criteria = rest.partition("Criteria: ")[2].partition(".\n")[0]
    first, second = row["images"]
    asked = processor(images=[second], prompts=[prompt], references=[first], criteria=[criteria])
    opening = asked["input_ids"][0, : batch["input_ids"].shape[1]]
    torch.testing.assert_close(batch["input_ids"][0], opening)
    rest = processor.tokenizer.decode(asked["input_ids"][0, len(opening) :])
    assert rest == "Is image 2 better than image 1?<|end|><|assistant|>"
    torch.testing.assert_close(batch["pixel_values"], asked["pixel_values"])


def test_splits_are_apart():
    """Lessons for training show no pair of color and shape that is held out; those out of domain each show one."""
    for split, wanted in (("train", False), ("ood", True)):
        for row in ShapesLessons(40, split):
            text = " ".join(answer for _, answer in row["questions"])
            assert any(f"{color} {shape}" in text for color, shape in HELD_OUT_COMPOSITIONS) == wanted


def test_words_are_single_tokens():
    """The tokenizer takes each word of questions and answers as one token."""
    tokenizer = build_tokenizer(lesson_words())
    words = {
        word
        for row in ShapesLessons(100)
        for pair in row["questions"]
        for text in pair
        for word in re.findall(r"\w+", text)
    }
    assert set(lesson_words()) & words
    for word in words:
        assert len(tokenizer(f" {word}")["input_ids"]) == 1, word


def test_answers_are_counted_as_generated():
    """What counts as a right answer is what greedy generation writes."""
    model = AutoModelForImageTextToText.from_pretrained(BASE_VLM).eval()
    processor = judge_processor().vlm_processor
    collator = QuestionCollator(processor)
    counted = answer_accuracy(num_rows=12)
    right = {}
    for row in ShapesLessons(12, "id"):
        for (question, answer), topic in zip(row["questions"], row["topics"], strict=True):
            batch = collator([{**row, "questions": [(question, "")]}])
            length = batch["input_ids"].shape[1] - 1  # an empty answer is its end alone
            with torch.no_grad():
                said = model.generate(
                    input_ids=batch["input_ids"][:, :length],
                    pixel_values=batch["pixel_values"],
                    attention_mask=torch.ones(1, length, dtype=torch.long),
                    max_new_tokens=40,
                    do_sample=False,
                )[0, length:]
            right.setdefault(topic, []).append(processor.tokenizer.decode(said) == f"{answer}<|end|>")
    assert counted == {topic: sum(values) / len(values) for topic, values in sorted(right.items())}


def test_knowledge_has_all_that_a_table_shows():
    """Answers by topic and zero-shot judging by category, for both splits."""
    knowledge = measure_knowledge(lesson_rows=30, judged_rows=40)
    assert all(0 <= value <= 1 for value in knowledge.values())
    assert {"id/answers/count", "ood/answers/relation", "id/pointwise/accuracy", "ood/pairwise/accuracy"} <= set(
        knowledge
    )
    table = knowledge_table(knowledge)
    assert f"| answers: count | {100 * knowledge['id/answers/count']:.1f} % |" in table
