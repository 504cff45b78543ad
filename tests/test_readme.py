"""
READMEs and their like: code compiles, and what needs no download runs, on tiny models and with small numbers; commands take their
arguments; links lead somewhere.
"""

import argparse
import re
import runpy
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import datasets
import pytest
import torch
from snippets import anchors, code_blocks, commands, links, printed_blocks
from tiny_editing import CALLS, flux_kontext
from tiny_refl import PROMPTS, tiny_sd3
from tiny_vlms import random_image
from trl import TrlParser

from rewarddance_hf import NoAnswerError, RewardDanceScorer
from rewarddance_hf.cli.main import COMMANDS, main
from rewarddance_hf.shapes.models import BASE_VLM, judge_processor


ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in (".", ".github", "examples", "hub_cards", "rewarddance_hf", "tests/benchmarks")
    for path in sorted((ROOT / folder).glob("**/README.md" if folder in ("examples", "rewarddance_hf") else "*.md"))
    if folder != "hub_cards" or path.name == "README.md"  # the others are templates, which tests/hub renders
}
BLOCKS = [(name, block) for name, text in DOCUMENTS.items() for block in code_blocks(text)]
SHELL = [(name, words) for name, text in DOCUMENTS.items() for words in commands(text)]
# Each holds a text by which a block is known. These need a download, or run elsewhere (the Hub's snippets by tests/hub, a remote judge by tests/serving).
ELSEWHERE = [
    "load_dataset(",
    "load_preferences(",
    "load_rows(",
    "RemoteReward(",
    "trust_remote_code",
    "load_into_transformer_2",
]
SMALL = {
    "OpenGVLab/InternVL3_5-2B-HF": str(BASE_VLM),
    "org/my-judge": str(BASE_VLM),
    "num_candidates=16": "num_candidates=2, num_inference_steps=2",
    "max_denoiser_evaluations=512": "max_denoiser_evaluations=64, num_inference_steps=4",
    '"num_inference_steps": 20': '"num_inference_steps": 2',
    'output_dir="': 'num_candidates=2, output_dir="',
    "max_steps=200": "max_steps=1",
    "eval_steps=25": "eval_steps=1",
    "num_samples=8": "num_samples=2, max_new_tokens=4",
}


def title(value) -> str:
    text = " ".join(value) if isinstance(value, list) else str(value)
    return re.sub(r"\W+", " ", text)[:40].strip()


def test_length():
    """The README is read in one go; what is longer has a README of its own."""
    assert len(DOCUMENTS["README.md"].splitlines()) <= 200


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links(name):
    """Relative links lead to files, and to headings that they have."""
    for link in links(DOCUMENTS[name]):
        path, _, anchor = link.partition("#")
        if not path.startswith(("http://", "https://")):
            target = (ROOT / name).parent / path if path else ROOT / name
            assert target.exists(), link
            if anchor:
                assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize(("name", "block"), BLOCKS, ids=title)
def test_code_compiles(name, block):
    """Every block is Python."""
    compile(block, name, "exec")


@pytest.mark.parametrize(
    ("name", "block"), [pair for pair in BLOCKS if not any(text in pair[1] for text in ELSEWHERE)], ids=title
)
def test_code_runs(name, block, tmp_path, monkeypatch):
    """What a block uses without making it is given; all else happens as it is written."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images = [random_image(index) for index in range(4)]
    pipeline = tiny_sd3()
    pipeline.set_progress_bar_config(disable=True)
    names = {
        "images": images,
        "references": images[::-1],
        "reference": images[0],
        "image_a": images[0],
        "image_b": images[1],
        "good": images[2],
        "bad": images[3],
        "prompts": PROMPTS[:4],
        "prompt": PROMPTS[0],
        "held_out_prompts": PROMPTS[:2],
        "rows": datasets.Dataset.from_list([{"prompt": "a", "image": images[0], "reference": images[1]}]),
        "pairs": datasets.Dataset.from_list([{"prompt": "a", "chosen": images[0], "rejected": images[1]}]),
        "processor": judge_processor(),
        **dict.fromkeys(("scorer", "judge", "other_judge"), RewardDanceScorer.from_pretrained(BASE_VLM)),
        "pointwise_scorer": lambda images, prompts: images.mean((1, 2, 3)),
        "pipeline": pipeline,
        "editor": flux_kontext(),
        "instructions": PROMPTS[:2],
        "sources": [random_image(index, 8, 8) for index in range(2)],
        "settings": CALLS["flux_kontext"],
    }
    for text, small in SMALL.items():
        block = block.replace(text, small)
    untrained = pytest.raises(NoAnswerError, match="did not reach") if ".reason(" in block else nullcontext()
    with untrained:  # a judge that has learned no reasons is called as it should be, and finds no answer
        exec(compile(block, name, "exec"), names)


@pytest.mark.parametrize(("code", "output"), printed_blocks("\n".join(DOCUMENTS.values())), ids=title)
def test_output(code, output, capsys):
    """A block that shows what it prints prints it, as it ships."""
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == output


def test_every_document_is_read():
    """There are commands, blocks and one with its output in what is tested here."""
    assert {"README.md", ".github/CONTRIBUTING.md", "examples/README.md", "examples/paper/README.md"} < set(DOCUMENTS)
    assert len(BLOCKS) > 5
    assert len(SHELL) > 10
    assert printed_blocks(DOCUMENTS["README.md"])


USE_CPU = ["--use_cpu", "true"]  # bf16 is refused where there is no GPU


class Parsed(Exception):  # noqa: N818
    """The arguments were taken."""


def parsed(arguments) -> None:
    raise Parsed


def parse_only(monkeypatch, parser, name) -> None:
    """Let a method of a parser end the program after it has taken the arguments."""
    parse = getattr(parser, name)

    def end(*args, **kwargs):
        parsed(parse(*args, **kwargs))

    monkeypatch.setattr(parser, name, end)


@contextmanager
def modules_beside(program):
    """As Python does for a script, modules in its folder come before all others; those that tests have imported by the same names come back."""
    folder = (ROOT / program).parent
    names = [file.stem for file in folder.glob("*.py")] if program.endswith(".py") else []
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(others)


@pytest.mark.parametrize(("name", "words"), SHELL, ids=title)
def test_commands(name, words, monkeypatch):
    """Commands exist, and take their arguments. That they do what they should is tested with the commands and the examples."""
    monkeypatch.chdir(ROOT)
    parse_only(monkeypatch, TrlParser, "parse_args_and_config")
    if words[0] == "rewarddance":
        command = next(command for command in COMMANDS if command.__name__.endswith(f".{words[1]}"))
        training = words[1] in ("train", "tune")  # their runs begin with a parser
        if not training:
            monkeypatch.setattr(command, "_run", parsed)
        with pytest.raises(Parsed):
            main(words[1:] + USE_CPU * training)
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif words[0] in ("accelerate", "python"):
        start = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
        program = words[start:]
        if Path(program[0]).name.startswith("train_"):
            program += USE_CPU
        parse_only(monkeypatch, argparse.ArgumentParser, "parse_args")
        run = runpy.run_path
        if program[0] == "-m":
            program, run = program[1:], runpy.run_module
        monkeypatch.setattr(sys, "argv", program)
        with modules_beside(program[0]), pytest.raises(Parsed):
            run(program[0], run_name="__main__")
    else:
        assert words[0] in ("curl", "pip", "pre-commit", "vllm")
