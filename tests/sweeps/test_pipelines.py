"""
Gradient, training and search on every pipeline of diffusers that can be built tiny: `make test-pipelines`.

Each check ends as "ok", as a reason why it does not apply (the pipeline alone cannot do it either), as an error of this
package that says what to do, or as a fault. Outcomes go to one file for each pipeline, which the table in
`rewarddance_hf/alignment/README.md` is made from. A sweep that was interrupted goes on: pipelines without a file come first,
and those that ended without fault are not run again, except with `AGAIN=1` or another version of diffusers.
"""

import gc
import json
import os
import re
import sys
import time
import traceback
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
import transformers


sys.path.insert(0, str(Path(__file__).parent))

from benchmarks.machine import commit  # noqa: E402
from diffusers_tests import tiny_pipelines  # noqa: E402
from pipeline_checks import CHECKS, NotApplicableError, Tiny  # noqa: E402
from tiny_checkpoints import save_checkpoints  # noqa: E402
from tiny_pipelines import BUILDERS  # noqa: E402

import rewarddance_hf  # noqa: E402
from rewarddance_hf.resumable import write_atomically  # noqa: E402


PACKAGE = str(Path(rewarddance_hf.__file__).parent)
COMMIT = commit()  # of what was imported
RESULTS = Path(os.environ.get("REWARDDANCE_PIPELINES", "outputs/pipelines")).resolve()
# The folder `tests` of a checkout of diffusers, whose source distribution lacks it
TESTS = os.environ.get("DIFFUSERS_TESTS")
AGAIN = bool(os.environ.get("AGAIN"))
# What most people use comes first: a sweep may be interrupted.
FIRST = "StableDiffusion Flux Qwen Wan LTX Hunyuan Sana ZImage PixArt CogVideoX CogView4 Kandinsky".split()
OWN_ERRORS = (ValueError, TypeError, NotImplementedError)


def for_one_prompt(build):
    def first(value):
        return value[:1] if isinstance(value, (list, torch.Tensor)) and len(value) == 2 else value

    def wrapper():
        pipeline, inputs = build()
        return pipeline, {name: first(value) for name, value in inputs.items()} | {"num_inference_steps": 3}

    return wrapper


def pipelines():
    found = {f"{name} [own]": for_one_prompt(build) for name, build in BUILDERS.items()}
    if TESTS:
        found |= dict(tiny_pipelines(Path(TESTS).resolve()))
    return dict(sorted(found.items(), key=lambda build: (file_of(build[0]).exists(), place_of(build[0]))))


def place_of(name: str) -> int:
    return next((place for place, first in enumerate(FIRST) if name.startswith(first)), len(FIRST))


def file_of(name: str) -> Path:
    return RESULTS / (re.sub(r"\W+", "-", name).strip("-") + ".json")


def has_ended(file: Path) -> bool:
    """Whether a pipeline was put to all checks with this version of diffusers, and none found a fault."""
    if not file.exists():
        return False
    results = json.loads(file.read_text(encoding="utf-8"))
    outcomes = results["outcomes"]
    is_whole = set(outcomes) == set(CHECKS) and results.get("diffusers") == diffusers.__version__
    return is_whole and not any(outcome.startswith("fault") for outcome in outcomes.values())


BUILDS = pipelines()


@pytest.fixture(scope="session", autouse=True)
def checkpoints(tmp_path_factory):
    """Names of the Hub that diffusers' tests load are folders in the working folder."""
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    before, folder = os.getcwd(), tmp_path_factory.mktemp("checkpoints")
    save_checkpoints(folder)
    os.chdir(folder)
    gc.freeze()
    yield
    os.chdir(before)


def outcome_of(check, tiny) -> str:
    try:
        check(tiny)
    except NotApplicableError as reason:
        return f"not applicable: {reason}"[:400]
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        text = f"{type(error).__name__}: {error}"[:600]
        if frames[-1].filename.startswith(PACKAGE) and isinstance(error, OWN_ERRORS):
            return f"error: {text}"
        ours = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
        where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in (*ours[-1:], frames[-1])]
        return f"fault: {text} ({', '.join(where)})"
    return "ok"


def outcomes_of(name, build) -> dict:
    """Outcomes of all checks of a pipeline, which go to a file too."""
    started = time.process_time()
    versions = {"diffusers": diffusers.__version__, "commit": COMMIT}
    results = {"name": name, **versions, "outcomes": {}, "seconds of checks": {}}
    try:
        if isinstance(build, str):
            raise RuntimeError(build)
        tiny = Tiny(build)
    except Exception as error:
        results["not built"] = f"{type(error).__name__}: {error}"[:400]
    else:
        results |= {"class": type(tiny.pipeline).__name__, "batch size": tiny.batch_size}
        for check_name, check in CHECKS.items():
            before = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results["outcomes"][check_name] = outcome_of(check, tiny)
            results["seconds of checks"][check_name] = round(time.process_time() - before, 1)
    results["seconds"] = round(time.process_time() - started, 1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomically(file_of(name), (json.dumps(results, indent=2) + "\n").encode())
    return results


@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in BUILDS])  # ids that `-k` finds, however long
def test_pipeline(name):
    if has_ended(file_of(name)) and not AGAIN:
        pytest.skip("ended before; AGAIN=1 runs it again")
    results = outcomes_of(name, BUILDS[name])
    gc.collect()  # what refers to itself, such as trainers
    if "not built" in results:
        pytest.skip(f"not built: {results['not built']}")
    assert not {check: outcome for check, outcome in results["outcomes"].items() if outcome.startswith("fault")}
