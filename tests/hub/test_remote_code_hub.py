"""Judges by repository ID over HTTP: by their own code, with the package, as adapters, after training."""

import copy
import io
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_vlms import random_image

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceScorer
from rewarddance_hf.hub.remote_code import check_code, save_with_code


SAMPLE, REFERENCE = random_image(0), random_image(1)
PROMPTS = ["a red circle", "no"]
CANARY = b'import os as _os\n_os.close(_os.open(_os.environ["HOME"] + "/executed", _os.O_CREAT))\n'


def scores(model, processor):
    references = [REFERENCE] * 2 if model.config.paradigm == "pairwise" else None
    batch = processor(images=[SAMPLE] * 2, prompts=PROMPTS, references=references)
    with torch.no_grad():
        return model.eval()(**batch).scores.tolist()


def load(folder, **settings):
    return RewardDanceForYesScoring.from_pretrained(folder, **settings), RewardDanceProcessor.from_pretrained(folder)


def random_adapter(model):
    torch.manual_seed(1)
    head = ["score"] if model.config.paradigm == "regressive" else None
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=head))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def save_adapter(model, processor, folder, base):
    """An adapter as the trainer leaves it, which names its base model by repository ID."""
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    model.get_base_model().config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def with_pickle(folder, name, safe_name):
    """Files of a checkpoint whose weights stand in a pickle file that says when it is opened."""

    class Trap:
        def __reduce__(self):
            return exec, ("import os; open(os.environ['HOME'] + '/executed', 'w')",)

    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != safe_name}
    buffer = io.BytesIO()
    torch.save({"weight": Trap()}, buffer)
    return {**files, name: buffer.getvalue()}


@pytest.fixture
def images(tmp_path):
    SAMPLE.save(tmp_path / "sample.png")
    REFERENCE.save(tmp_path / "reference.png")
    return tmp_path


@pytest.fixture
def wanted(hub, vlm_folder, tmp_path):
    """Puts judges on the Hub and gives their scores by repository ID and revision."""
    base = vlm_folder("internvl")
    hub.put("org/base", base)
    wanted = {}

    model, processor = load(base)
    save_with_code(model, processor, tmp_path / "judge")
    hub.put("org/judge", tmp_path / "judge")
    repository = hub.repositories["model", "org/judge"]
    repository.tags["v1"] = repository.branches["main"]
    wanted["org/judge", "v1"] = scores(model, processor)
    model.config.score_temperature = 3.0
    save_with_code(model, processor, tmp_path / "judge")
    hub.put("org/judge", tmp_path / "judge")
    wanted["org/judge", "main"] = scores(model, processor)
    hub.put("org/private", tmp_path / "judge", private=True)
    wanted["org/private", "main"] = wanted["org/judge", "main"]

    code = {path.name: CANARY + path.read_bytes() for path in (tmp_path / "judge").glob("*.py")}
    hub.put("org/canary", tmp_path / "judge")
    hub.put("org/canary", code)

    model.config.score_temperature = 2.0
    save_with_code(model, processor, tmp_path / "sharded", max_shard_size="100KB")
    hub.put("org/sharded", tmp_path / "sharded")
    wanted["org/sharded", "main"] = scores(model, processor)

    model = random_adapter(model)
    wanted["org/adapter", "main"] = scores(model, processor)  # its temperature is not that of its base model
    hub.put("org/adapter", save_adapter(model, processor, tmp_path / "adapter", "org/base"))
    wanted["org/judge-adapter", "main"] = wanted["org/adapter", "main"]
    hub.put("org/judge-adapter", save_adapter(model, processor, tmp_path / "judge-adapter", "org/judge"))
    save_with_code(model, processor, tmp_path / "merged")
    hub.put("org/merged", tmp_path / "merged")
    wanted["org/merged", "main"] = wanted["org/adapter", "main"]

    hub.put("org/pickled", with_pickle(tmp_path / "judge", "pytorch_model.bin", "model.safetensors"))
    hub.put("org/pickled-adapter", with_pickle(tmp_path / "adapter", "adapter_model.bin", "adapter_model.safetensors"))

    model, processor = load(vlm_folder("llava_onevision"))
    save_with_code(model, processor, tmp_path / "onevision")
    hub.put("org/onevision", tmp_path / "onevision")
    wanted["org/onevision", "main"] = scores(model, processor)
    return wanted


SCORES = """
import json, os, sys
from pathlib import Path
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor

torch.set_num_threads(1)
home, folder = Path(os.environ["HOME"]), Path(sys.argv[1])
sample, reference = Image.open(folder / "sample.png"), Image.open(folder / "reference.png")

def scores(model, processor):
    batch = processor(images=[sample] * 2, prompts=["a red circle", "no"], references=[reference] * 2)
    with torch.no_grad():
        return model.eval()(**batch).scores.tolist()
"""
WITHOUT_PACKAGE = (
    SCORES
    + """
AUTO_CLASSES = (AutoConfig, AutoModel, AutoProcessor)
answer = {"refused": [error_of(auto_class.from_pretrained, "org/canary") for auto_class in AUTO_CLASSES]}
answer["executed without trust"] = (home / "executed").exists() or any(home.rglob("*_rewarddance.py"))
answer["modules"] = [auto_class.from_pretrained("org/canary", trust_remote_code=True).__module__ for auto_class in AUTO_CLASSES]
answer["executed with trust"] = (home / "executed").exists()
inject("drop", "GET", "/org/onevision/resolve/.*model.safetensors")
inject("drop", "GET", "/org/onevision/resolve/.*modeling_rewarddance.py")
answer["scores"] = []
for name, revision in json.loads(sys.argv[2]):
    arguments = {"trust_remote_code": True, "revision": revision, "code_revision": revision}
    model = AutoModel.from_pretrained(name, **arguments)
    answer["scores"].append(scores(model, AutoProcessor.from_pretrained(name, **arguments)))
assert "rewarddance_hf.models" not in sys.modules
print()  # ends the line of transformers' question for trust
print(json.dumps(answer))
"""
)


def test_without_the_package(hub, wanted, run_client, images):
    """Nothing is executed without trust; with it, the repository's own code gives the same scores."""
    # transformers asks the base model's repository for the code of an adapter.
    rows = [row for row in wanted if row[0] not in ("org/adapter",)]
    answer = run_client(WITHOUT_PACKAGE, images, json.dumps(rows), package=False)
    for error in answer["refused"]:
        assert error.startswith("ValueError")
        assert "pass the argument `trust_remote_code=True`" in error
    assert not answer["executed without trust"]
    assert all(module.startswith("transformers_modules.org.canary.") for module in answer["modules"])
    assert answer["executed with trust"]
    assert [logged.status for logged in hub.requests].count(0) == 2  # both interrupted downloads went on
    for row, got in zip(rows, answer["scores"], strict=True):
        assert got == pytest.approx(wanted[row], rel=1e-5), row


WITH_PACKAGE = (
    SCORES
    + """
from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceScorer

answer = {}
models = [AutoModel.from_pretrained("org/canary"), AutoModel.from_pretrained("org/canary", trust_remote_code=True)]
processors = [AutoProcessor.from_pretrained("org/canary"), AutoProcessor.from_pretrained("org/canary", trust_remote_code=True)]
answer["modules"] = [type(part).__module__ for part in (*models, *processors, AutoConfig.from_pretrained("org/canary"))]
answer["scores"] = []
for name, revision in json.loads(sys.argv[2]):
    scorer = RewardDanceScorer.from_pretrained(name, revision=revision)
    answer["scores"].append(scorer.score([sample] * 2, ["a red circle", "no"], references=[reference] * 2).tolist())
answer["adapters"] = [
    scores(RewardDanceForYesScoring.from_pretrained("org/adapter"), RewardDanceProcessor.from_pretrained("org/adapter")),
    scores(AutoModel.from_pretrained("org/judge-adapter"), AutoProcessor.from_pretrained("org/judge-adapter")),
]
load = RewardDanceScorer.from_pretrained
answer["errors"] = {
    "pickled": error_of(load, "org/pickled"),
    "pickled, asked for": error_of(RewardDanceForYesScoring.from_pretrained, "org/pickled", use_safetensors=False),
    "pickled adapter": error_of(load, "org/pickled-adapter"),
    "no revision": error_of(load, "org/judge", revision="v9"),
    "no repository": error_of(load, "org/nothing"),
    "stranger": error_of(load, "org/private", token="hf_stranger", cache_dir=home / "other"),
    "wrong token": error_of(load, "org/private", token="hf_wrong", cache_dir=home / "other"),
}
answer["executed"] = (home / "executed").exists() or any(home.rglob("*_rewarddance.py"))
print(json.dumps(answer))
"""
)


def test_with_the_package(wanted, run_client, images):
    """The installed classes are used, with or without trust; adapters keep their own configuration; pickles stay shut."""
    answer = run_client(WITH_PACKAGE, images, json.dumps(list(wanted)))
    assert all(module.startswith("rewarddance_hf.models.") for module in answer["modules"])
    for row, got in zip(wanted, answer["scores"], strict=True):
        assert got == pytest.approx(wanted[row], rel=1e-5), row
    for got in answer["adapters"]:
        assert got == pytest.approx(wanted["org/adapter", "main"], rel=1e-5)
    errors = {
        "pickled": "ValueError: 'org/pickled' has its weights in 'pytorch_model.bin', a pickle file",
        "pickled, asked for": "ValueError: 'org/pickled' has its weights in 'pytorch_model.bin', a pickle file",
        "pickled adapter": "ValueError: 'org/pickled-adapter' has its weights in 'adapter_model.bin', a pickle file",
        "no revision": "OSError: v9 is not a valid git identifier",
        "no repository": "OSError: 'org/nothing' is no folder here, and http",
        "stranger": "OSError: 'org/private' is no folder here, and http",
        "wrong token": "Invalid credentials",
    }
    for name, error in errors.items():
        assert error in answer["errors"][name], answer["errors"][name]
    assert not answer["executed"]


TRAINER = (
    SCORES
    + """
import datasets
from peft import LoraConfig
from rewarddance_hf import RewardDanceScorer, RewardDanceTrainer, RewardDanceTrainingArguments

rows = datasets.Dataset.from_list([{"prompt": "a red circle", "chosen": sample, "rejected": reference}] * 4)
answer = {}
for name, peft_config in {"trained": None, "trained-adapter": LoraConfig(r=2, target_modules=["q_proj"])}.items():
    arguments = RewardDanceTrainingArguments(
        str(home / name), hub_model_id=f"org/{name}", hub_private_repo=True, max_steps=1, learning_rate=1e-2,
        per_device_train_batch_size=2, gradient_checkpointing=False, report_to="none", use_cpu=True, disable_tqdm=True,
    )
    trainer = RewardDanceTrainer(model="org/base", args=arguments, train_dataset=rows, peft_config=peft_config)
    trainer.train()
    trainer.push_to_hub()
    loaded = RewardDanceScorer.from_pretrained(f"org/{name}")
    answer[name] = [scores(trainer.model, trainer.processing_class), scores(loaded.model, loaded.processor)]
print(json.dumps(answer))
"""
)


def test_trainer_pushes(hub, vlm_folder, run_client, images):
    """What the trainer pushes is found again, whole or as an adapter, and holds no pickle and no local path."""
    hub.put("org/base", vlm_folder("internvl"))
    answer = run_client(TRAINER, images)
    for name, (trained, loaded) in answer.items():
        assert loaded == pytest.approx(trained, rel=1e-5), name
        assert hub.repositories["model", f"org/{name}"].private
        for path, content in hub.read(f"org/{name}").items():
            assert not path.endswith((".pt", ".pth", ".pkl")), path
            assert path == "training_args.bin" or str(images).encode() not in content, path
    assert "auto_map" in json.loads(hub.read("org/trained")["config.json"])


@pytest.mark.parametrize("paradigm", ["pairwise", "regressive"])
def test_save_with_code(vlm_folder, tmp_path, paradigm):
    """Adapters are merged, whoever put them on; files say nothing of where they come from; the code is complete."""
    model, processor = load(vlm_folder("internvl"), paradigm=paradigm)
    model = random_adapter(model)
    wanted = scores(model, processor)
    save_adapter(model, processor, tmp_path / "adapter", str(vlm_folder("internvl")))
    by_transformers = RewardDanceScorer.from_pretrained(tmp_path / "adapter")
    for name, judge in {"by peft": model, "by transformers": by_transformers.model}.items():
        save_with_code(judge, processor, tmp_path / name, max_shard_size="100KB")
        loaded = load(tmp_path / name)
        assert not getattr(loaded[0], "peft_config", None)
        assert scores(*loaded) == pytest.approx(wanted, rel=1e-5)
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 2
        for file in (tmp_path / name).glob("*.json"):
            text = file.read_text()
            assert str(tmp_path.parent) not in text, file
            assert "local_files_only" not in text, file

    folder = tmp_path / "by peft"
    (folder / "pixels_rewarddance.py").unlink()
    with pytest.raises(ValueError, match="lacks 'pixels_rewarddance.py', which 'modeling_rewarddance"):
        check_code(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]["AutoModel"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="but `AutoModel` needs an entry"):
        check_code(folder)


def test_foreign_processor_is_refused(vlm_folder, tmp_path):
    """A judge is not saved with a processor that asks for other answers."""
    model, processor = load(vlm_folder("internvl"))
    other = copy.copy(processor)
    other.yes_token_id = 3
    with pytest.raises(ValueError, match="answers with token IDs"):
        save_with_code(model, other, tmp_path / "judge")
    assert not (tmp_path / "judge").exists()


def test_folders_with_pickles(vlm_folder, tmp_path):
    """Pickle files are not opened in local folders either, and do no harm beside safetensors files."""
    folder = tmp_path / "judge"
    save_with_code(*load(vlm_folder("internvl")), folder)
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    load(folder)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    RewardDanceForYesScoring.from_pretrained(folder, variant="fp16")
    with pytest.raises(ValueError, match="weights in 'pytorch_model.bin', a pickle file"):
        load(folder)
