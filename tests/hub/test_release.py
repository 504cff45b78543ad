"""Releases: built with all that they need, verified without the package, pushed whole or not at all."""

import json
import shutil

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from snippets import code_blocks

from rewarddance_hf.cli import main
from rewarddance_hf.hub.licenses import TrainingData
from rewarddance_hf.hub.release import build_model_release, plan_push, push_release
from rewarddance_hf.hub.verification import verify_release
from rewarddance_hf.models import RewardDanceForYesScoring
from rewarddance_hf.scoring.loading import load_judge
from rewarddance_hf.scoring.scorer import RewardDanceScorer
from rewarddance_hf.shapes.models import BASE_VLM, judge_processor
from rewarddance_hf.trainer.model_card import FACTS_KEY


SHAPES = [TrainingData("shapes", "apache-2.0")]
NUMBERS = {"accuracy": 0.75, "accuracy_low": 0.7, "accuracy_high": 0.8, "accuracy_with_ties": 0.75, "num_rows": 9.0}
REPO = "org/judge"


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A judge with the trainer's draft of a card, as a folder."""
    folder = tmp_path_factory.mktemp("trained")
    RewardDanceForYesScoring.from_pretrained(BASE_VLM).save_pretrained(folder)
    judge_processor().save_pretrained(folder)
    facts = {
        "steps": 7,
        "batch_size": 4,
        "learning_rate": 0.001,
        "hardware": "1 x cpu (x86_64)",
        "versions": {"rewarddance_hf": "0", "transformers": "5", "torch": "2"},
        "data": [{"name": "shapes", "license": "apache-2.0"}],
    }
    (folder / "README.md").write_text(f"---\nbase_model: tiny\n{FACTS_KEY}: {json.dumps(facts)}\n---\ndraft\n")
    return folder


@pytest.fixture(scope="module")
def built(judge, tmp_path_factory):
    """A built and verified release. Read only."""
    folder = tmp_path_factory.mktemp("built")
    results = folder / "ood.json"
    measured = {"dataset": "shapes", "split": "ood", "metrics": {**NUMBERS, "num_ties": 0.0}}
    measured["judge_fingerprint"] = RewardDanceScorer.from_pretrained(judge).fingerprint()
    results.write_text(json.dumps(measured))
    return build_model_release(judge, folder / "judge", REPO, "v1", SHAPES, [results], limits=["Sees shapes only."])


@pytest.fixture
def release(built, tmp_path):
    """A copy of the release."""
    return shutil.copytree(built, tmp_path / "judge")


@pytest.fixture
def api(hub, monkeypatch, tmp_path):
    """Client of the loopback Hub in this process, which is offline otherwise."""
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path)}.items():
        monkeypatch.setattr(constants, name, value)
    return HfApi(endpoint=hub.url, token="hf_owner")


@pytest.mark.new_process
class TestBuild:
    def test_folder_has_all_of_it(self, judge, built):
        """Weights, processor, code, pipeline, card, results and the sheet; no pickle and nothing of the draft."""
        names = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
        wanted = {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "README.md"}
        wanted |= {
            "modeling_rewarddance.py",
            "pipeline_rewarddance.py",
            "results/ood.json",
            "verification/scores.json",
        }
        assert wanted <= names
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl")) or "adapter" in name]
        card = ModelCard.load(built / "README.md")
        assert card.data.eval_results[0].dataset_split == "ood"
        for text in (
            "7 steps of 4 rows",
            "1 x cpu (x86_64)",
            "Fine-tuned from tiny",
            "Sees shapes only.",
            "| shapes |",
        ):
            assert text in card.text
        assert "draft" not in card.text
        # The sheet has the scores of the judge that was built from.
        sheet = json.loads((built / "verification" / "scores.json").read_text())
        model, processor = load_judge(judge)
        row = sheet["rows"][0]
        inputs = processor(
            images=[built / row["image"]], prompts=[row["prompt"]], references=[built / row["reference"]]
        )
        with torch.no_grad():
            assert model(**inputs).logits.item() == pytest.approx(row["log_odds"], abs=1e-4)

    @pytest.mark.usefixtures("built", "quick_verification")  # in this order: how `built` is verified is not changed
    def test_an_adapter_is_merged(self, tmp_path):
        """A release of an adapter needs neither peft nor the base model, and gives the adapter's scores."""
        model = RewardDanceForYesScoring.from_pretrained(BASE_VLM)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        adapter = get_peft_model(model, config)
        adapter.save_pretrained(tmp_path / "adapter")
        model.config.save_pretrained(tmp_path / "adapter")
        judge_processor().save_pretrained(tmp_path / "adapter")
        folder = build_model_release(tmp_path / "adapter", tmp_path / "judge", REPO, "v1", SHAPES)
        assert not list(folder.glob("adapter*"))
        row = json.loads((folder / "verification" / "scores.json").read_text())["rows"][0]
        inputs = judge_processor()([folder / row["image"]], [row["prompt"]], [folder / row["reference"]])
        with torch.no_grad():
            assert adapter.eval()(**inputs).scores.item() == pytest.approx(row["score"], abs=1e-5)
            with adapter.disable_adapter():
                assert adapter(**inputs).scores.item() != pytest.approx(row["score"], abs=1e-4)

    @pytest.mark.usefixtures("built", "quick_verification")  # in this order: how `built` is verified is not changed
    def test_other_weights_than_those_that_were_measured_are_noticed(self, release):
        """A folder whose weights give other scores than its sheet fails its verification, and the difference is said."""
        weights = load_file(release / "model.safetensors")
        name = next(name for name in weights if "lm_head" in name)
        weights[name] = weights[name] + 0.1 * torch.randn(weights[name].shape, generator=torch.manual_seed(0))
        save_file(weights, release / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="gives log-odds that differ by .* Nothing was uploaded"):
            verify_release(release)

    @pytest.mark.usefixtures("built", "quick_verification")  # in this order: how `built` is verified is not changed
    def test_missing_code_is_noticed(self, release):
        """A folder that only works with the package installed fails its verification."""
        (release / "pixels_rewarddance.py").unlink()
        with pytest.raises(ValueError, match="cannot be used without this package"):
            verify_release(release)

    def test_a_failed_build_leaves_the_old_one(self, release, tmp_path):
        """What cannot be built leaves no half folder, and the folder of an earlier release stays as it was."""
        before = (release / "README.md").read_text()
        with pytest.raises(ValueError, match="forbids commercial use"):
            build_model_release(
                BASE_VLM, release, REPO, "v2", [TrainingData("TIGER-Lab/EditReward-Data", "cc-by-nc-4.0")]
            )
        (tmp_path / "r.json").write_text("[]")
        with pytest.raises(ValueError, match="is no result of"):
            build_model_release(BASE_VLM, release, REPO, "v2", SHAPES, [tmp_path / "r.json"])
        other = {**RewardDanceScorer.from_pretrained(BASE_VLM).fingerprint(), "weights": "0"}
        measured = {
            "dataset": "a/b",
            "split": "test",
            "metrics": {**NUMBERS, "num_ties": 0},
            "judge_fingerprint": other,
        }
        (tmp_path / "r.json").write_text(json.dumps(measured))
        with pytest.raises(ValueError, match=r"another judge .* differ in \['weights'\].* or leave the results out"):
            build_model_release(BASE_VLM, release, REPO, "v2", SHAPES, [tmp_path / "r.json"])
        assert (release / "README.md").read_text() == before
        assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("years of work")
        with pytest.raises(ValueError, match="holds something that is no release"):
            build_model_release(BASE_VLM, tmp_path / "mine", REPO, "v1", SHAPES)


class TestPush:
    def test_first_release_is_public_and_tagged_when_complete(self, hub, api, release):
        """The repository holds exactly the folder, is public only afterwards, and the tag points to it."""
        plan = push_release(release, REPO, "v1", api=api)
        assert plan.is_first
        repository = hub.repositories["model", REPO]
        held = hub.read(REPO, revision="v1")
        held.pop(".gitattributes", None)
        files = [path for path in release.rglob("*") if path.is_file()]
        assert held == {path.relative_to(release).as_posix(): path.read_bytes() for path in files}
        assert not repository.private
        requests = [(logged.method, logged.url.partition("?")[0].rpartition("/")[2]) for logged in hub.requests]
        assert requests.index(("POST", "main")) < requests.index(("PUT", "settings"))

    def test_dry_run_changes_nothing(self, hub, api, release):
        """A plan names what would go, and the Hub gets no writing request."""
        plan = plan_push(release, REPO, "v1", api)
        assert "model.safetensors" in plan.added
        assert "+ model.safetensors" in str(plan)
        assert {logged.method for logged in hub.requests} <= {"GET", "HEAD"}
        assert ("model", REPO) not in hub.repositories

    def test_new_version_changes_what_differs_only(self, hub, api, release):
        """A second release adds, changes and deletes what differs; the first tag stays as it is."""
        push_release(release, REPO, "v1", api=api)
        before = hub.read(REPO, revision="v1")
        (release / "README.md").write_text((release / "README.md").read_text() + "\nMore.\n")
        (release / "results" / "new.json").write_text("{}")
        (release / "results" / "ood.json").unlink()
        plan = push_release(release, REPO, "v2", api=api)
        assert (plan.added, plan.changed, plan.deleted) == (["results/new.json"], ["README.md"], ["results/ood.json"])
        assert hub.read(REPO, revision="v1") == before
        assert "results/ood.json" not in hub.read(REPO, revision="v2")

    def test_repeating_a_release_does_nothing(self, hub, api, release):
        """The same files under the same tag are no change; other files under it are refused."""
        push_release(release, REPO, "v1", api=api)
        head = hub.repositories["model", REPO].branches["main"]
        assert push_release(release, REPO, "v1", api=api).is_released
        assert hub.repositories["model", REPO].branches["main"] == head
        (release / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="Tag 'v1' of 'org/judge' exists and holds other files"):
            push_release(release, REPO, "v1", api=api)

    def test_foreign_repositories_are_not_overwritten(self, hub, api, release):
        """A repository with other people's files is refused, with a card or without, and stays as it is."""
        for name, files in {
            "org/card": {"README.md": b"---\nlicense: mit\n---\n"},
            "org/none": {"a.bin": b"1"},
        }.items():
            hub.put(name, files)
            hub.put(name, files | {"b.txt": b"2"})
            before = hub.read(name)
            with pytest.raises(ValueError, match="were not released by this tool"):
                push_release(release, name, "v1", api=api)
            assert hub.read(name) == before

    @pytest.mark.parametrize(
        ("action", "method", "url"),
        [
            ("drop", "PUT", "/_large/"),
            ("drop", "POST", "/commit/"),
            ("lose_answer", "POST", "/commit/"),
            ("status", "POST", "/tag/"),
            ("status", "PUT", "/settings"),
        ],
    )
    def test_broken_uploads_are_repeated(self, hub, api, release, monkeypatch, action, method, url):
        """A connection that breaks at any point leaves the old release as it was and no new tag; repeated, it succeeds."""
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own tries
        push_release(release, REPO, "v1", api=api)
        first = hub.read(REPO, revision="v1")
        if url == "/settings":
            api.delete_repo(REPO)
            first = None
        weights = load_file(release / "model.safetensors")
        save_file({name: weight + 1 for name, weight in weights.items()}, release / "model.safetensors")
        hub.inject(action, method, url, times=20, status=500)
        message = (
            "Server disconnected|Error while uploading|500 Internal Server Error"  # of classes of several clients
        )
        with pytest.raises(Exception, match=message):
            push_release(release, REPO, "v2", api=api)
        repository = hub.repositories["model", REPO]
        assert "v2" not in repository.tags
        assert first is None or hub.read(REPO, revision="v1") == first
        assert first is not None or repository.private
        if url in ("/_large/", "/commit/") and action == "drop":
            assert hub.read(REPO) == first
        hub.faults.clear()
        push_release(release, REPO, "v2", api=api)
        assert hub.read(REPO, revision="v2")["model.safetensors"] == (release / "model.safetensors").read_bytes()
        assert not hub.repositories["model", REPO].private

    def test_other_bytes_on_the_hub_are_not_tagged(self, hub, api, release, monkeypatch):
        """If the Hub holds other bytes than the folder after the upload, the release gets no tag."""
        commit = api.create_commit

        def commit_and_damage(**arguments):
            info = commit(**arguments)
            info.oid = hub.put(REPO, {**hub.read(REPO), "config.json": b"{ }"})
            return info

        monkeypatch.setattr(api, "create_commit", commit_and_damage)
        with pytest.raises(ValueError, match=r"holds other bytes .* in \['config.json'\]. It was not tagged"):
            push_release(release, REPO, "v1", api=api)
        assert not hub.repositories["model", REPO].tags
        assert hub.repositories["model", REPO].private

    def test_private_stays_private(self, hub, api, release):
        """`private=True` is kept by later releases too, which do not say so."""
        push_release(release, REPO, "v1", private=True, api=api)
        (release / "results" / "new.json").write_text("{}")
        push_release(release, REPO, "v2", api=api)
        assert hub.repositories["model", REPO].private

    def test_strangers_and_wrong_tokens_are_refused(self, hub, api, release):
        """Who may not write changes nothing, and the Hub's refusal is passed on."""
        push_release(release, REPO, "v1", api=api)
        before = hub.read(REPO)
        (release / "config.json").write_text("{}")
        for token in ("hf_stranger", "hf_wrong"):
            with pytest.raises(OSError, match=r"40[13]"):
                push_release(release, REPO, "v2", api=HfApi(endpoint=hub.url, token=token))
        assert hub.read(REPO) == before


@pytest.mark.new_process
def test_released_judge_by_its_repository_id(hub, api, release, run_client):
    """By the pinned revision, over HTTP and without the package, the card's snippet runs and scores are those of the sheet."""
    push_release(release, REPO, "v1", api=api)
    without, with_package = code_blocks((release / "README.md").read_text())
    sheet = json.loads((release / "verification" / "scores.json").read_text())
    assert sheet["rows"][0]["reference"].endswith("1.png")
    answer = run_client(
        without
        + 'print(json.dumps(judge({"prompt": "a red circle", "image": a, "reference": b})))'.replace(
            "json", "__import__('json')"
        ),
        package=False,
    )
    assert answer["score"] == pytest.approx(sheet["rows"][0]["score"], abs=1e-6)
    script = f"import json\n{with_package}\nprint(json.dumps(float(scorer.score([a], 'a red circle', [b]))))"
    assert run_client(script) == pytest.approx(answer["score"], abs=1e-6)


def test_command_line_refuses_early(capsys, built):
    """`rewarddance release` says what is missing before it loads anything."""
    for arguments, message in (
        (["--folder", str(built), "--repo-id", "judge", "--tag", "v1"], "must be OWNER/NAME"),
        (["--folder", str(built.parent), "--repo-id", REPO, "--tag", "v1", "--dry-run"], "has no card of a release"),
        (["--model", str(BASE_VLM), "--folder", "x", "--repo-id", REPO, "--tag", "v1"], "`training_data` is empty"),
    ):
        assert main(["release", *arguments]) in (1, 2)
        assert message in capsys.readouterr().err
