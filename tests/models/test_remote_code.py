"""Test of the checkpoint's own copy of the code."""

import json
import os

import pytest
import torch
from new_process import run_python

from rewarddance_hf.models.prompting_rewarddance import DIMENSIONS


SCRIPT = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

torch.set_num_threads(1)
try:
    import rewarddance_hf
except ImportError:
    pass
else:
    sys.exit("the package can be imported here")
folder = sys.argv[1]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
sample, reference = Image.open("sample.png"), Image.open("reference.png")
example = {"image": reference, "reference": sample, "prompt": "two", "verdict": "no"}
batch = processor(
    images=[sample] * 2,
    prompts=["a red circle", "no"],
    references=[reference] * 2,
    criteria=processor.dimension_criteria("binding"),
    examples=[example],
)
with torch.no_grad():
    output = model(**batch)
texts = [module.CRITERIA for name, module in sys.modules.items() if name.endswith(".prompting_rewarddance")]
answer = {"log_probs": output.answer_log_probs.tolist(), "module": type(model).__module__, "texts": texts}
print(json.dumps(answer))
"""


@pytest.mark.new_process
def test_checkpoint_works_without_the_package(judge, rows, tmp_path):
    """Whoever downloads a judge without installing the package gets the same scores, by criteria that were saved."""
    model, processor = judge("internvl")
    folder, elsewhere = tmp_path / "judge", tmp_path / "elsewhere"
    elsewhere.mkdir()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    sample, reference = rows["images"][1], rows["references"][0]
    sample.save(elsewhere / "sample.png")
    reference.save(elsewhere / "reference.png")

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    # Stands in front of an installed package.
    (elsewhere / "rewarddance_hf.py").write_text("raise ImportError('not installed here')")
    result = run_python("-c", SCRIPT, folder, env=environment, cwd=elsewhere)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["module"].startswith("transformers_modules.")
    assert answer["texts"]
    assert not any(answer["texts"])  # no text files travel

    batch = processor(
        images=[sample] * 2,
        prompts=["a red circle", "no"],
        references=[reference] * 2,
        criteria=DIMENSIONS["text-to-image"]["binding"],
        examples=[{"image": reference, "reference": sample, "prompt": "two", "verdict": False}],
    )
    with torch.no_grad():
        wanted = model(**batch).answer_log_probs
    torch.testing.assert_close(torch.tensor(answer["log_probs"]), wanted, rtol=0, atol=1e-6)
