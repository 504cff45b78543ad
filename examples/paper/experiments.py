"""The experiments of the paper as jobs: what their YAML files mean."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jobs import Job

from rewarddance_hf.shapes.generator import WIDTH


FOLDER = Path(__file__).parent / "experiments"
NAMES = ("paradigms", "sizes", "references", "reasons", "dynamics", "attacks", "clips")
WEIGHTS = "model.safetensors"
GENERATOR_WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


class Study:
    """
    All jobs of the study.

    Args:
        bases (`Mapping[str, Path]`):
            Folders of base models by size.
        generators (`Mapping[int, Path]`):
            Folders of generators by the width of their denoiser.
        clip_models (`Mapping[str, Path]`):
            Folders of a base model that has seen clips (`"base"`) and of a generator of clips (`"generator"`).
        quick (`bool`, *optional*, defaults to `False`):
            Whether to take the small settings that each YAML file has under `quick`.
        folder (`Path`, *optional*):
            Folder of the YAML files.
    """

    def __init__(
        self,
        bases: Mapping[str, Path],
        generators: Mapping[int, Path],
        clip_models: Mapping[str, Path],
        quick: bool = False,
        folder: Path = FOLDER,
    ) -> None:
        self.bases, self.generators, self.clip_models = dict(bases), dict(generators), dict(clip_models)
        self.settings = {name: read_settings(folder / f"{name}.yaml", quick) for name in ("common", *NAMES)}

    def jobs(self, names: tuple[str, ...] = NAMES) -> list[Job]:
        """Jobs of some experiments, without those of judges whose base model is missing."""
        return [job for name in names for job in getattr(self, name)().values()]

    def missing_sizes(self) -> list[str]:
        """Sizes that experiments ask for and that have no base model."""
        wanted = [
            size for settings in self.settings.values() for size in settings.get("sizes", [settings.get("size")])
        ]
        return [size for size in dict.fromkeys(wanted) if size is not None and size not in self.bases]

    def missing_widths(self) -> list[int]:
        """Widths of generators that experiments ask for and that are not there."""
        return [width for width in self.settings["sizes"]["generators"] if width not in self.generators]

    def paradigms(self) -> dict[tuple[Any, ...], Job]:
        """Judges by paradigm, number of pairs and seed; 0 pairs is the base model itself."""
        settings = self.settings["paradigms"]
        size = settings["size"]
        if size not in self.bases:
            return {}
        jobs: dict[tuple[Any, ...], Job] = {
            (paradigm, 0, 0): self.untrained(size, paradigm)
            for paradigm in settings["paradigms"]
            if paradigm != "regressive"  # its head is random
        }
        for paradigm in settings["paradigms"]:
            for num_rows, updates in settings["rows"].items():
                for seed in settings["seeds"]:
                    name = f"judges/{size}_{paradigm}_{num_rows}_{seed}"
                    jobs[paradigm, num_rows, seed] = self._judge(name, size, paradigm, num_rows, updates, seed)
        return jobs

    def sizes(self) -> dict[tuple[Any, ...], Job]:
        """
        Generators as they are, by width; by size of the judge: zero-shot judges, judges, generators that these tune, searches by
        pointwise ones, by seed.
        """
        settings = self.settings["sizes"]
        widths = [width for width in settings["generators"] if width in self.generators]
        search = dict(settings["search"])
        searching = search.pop("sizes")
        jobs: dict[tuple[Any, ...], Job] = {("base", width): self.base_generator(width) for width in widths}
        for size in settings["sizes"]:
            if size not in self.bases:
                continue
            for paradigm in settings["paradigms"]:
                jobs[size, "untrained", paradigm, 0] = self.untrained(size, paradigm)
            for seed in settings["seeds"]:
                for paradigm in settings["paradigms"]:
                    jobs[size, "judge", paradigm, seed] = self.full_judge(size, paradigm, seed)
                    for width in widths:
                        if size in settings["generators"][width].get(paradigm, ()):
                            jobs[size, "tuned", paradigm, seed, width] = self.tuned(size, paradigm, seed, width=width)
                if size in searching:
                    jobs[size, "search", "pointwise", seed] = Job(
                        f"searches/{size}_{seed}",
                        "generators:search",
                        {"seed": seed, **search},
                        (self.full_judge(size, "pointwise", seed),),
                        cost=60,
                    )
        return jobs

    def references(self) -> dict[tuple[Any, ...], Job]:
        """Generators by how references are chosen and by seed, and the one that is not tuned."""
        settings = self.settings["references"]
        if settings["size"] not in self.bases:
            return {}
        return {("base",): self.base_generator()} | {
            (name, seed): self.tuned(settings["size"], "pairwise", seed, references)
            for name, references in settings["references"].items()
            for seed in settings["seeds"]
        }

    def reasons(self) -> dict[tuple[Any, ...], Job]:
        """Pairwise judges by where their reasons stand and by seed."""
        settings = self.settings["reasons"]
        if settings["size"] not in self.bases:
            return {}
        return {
            (name, seed): self.full_judge(settings["size"], "pairwise", seed, rationale)
            for name, rationale in settings["rationales"].items()
            for seed in settings["seeds"]
        }

    def dynamics(self) -> dict[tuple[Any, ...], Job]:
        """Generators by size and paradigm of the judge that tunes them and by seed, and the one that is not tuned."""
        settings = self.settings["dynamics"]
        return {("base",): self.base_generator()} | {
            (size, paradigm, seed): self.tuned(size, paradigm, seed)
            for size in settings["sizes"]
            for paradigm in settings["paradigms"]
            for seed in settings["seeds"]
            if size in self.bases
        }

    def attacks(self) -> dict[tuple[Any, ...], Job]:
        """Attacks by size and paradigm; the other judge is another training of the same kind."""
        settings = self.settings["attacks"]
        seeds = self.settings["sizes"]["seeds"]
        shared = {name: settings[name] for name in ("num_rows", "radii", "steps")}
        return {
            (size, paradigm): Job(
                f"attacks/{size}_{paradigm}",
                "attacks:attack",
                {"paradigm": paradigm, **shared},
                (self.full_judge(size, paradigm, seeds[0]), self.full_judge(size, paradigm, seeds[-1])),
                cost=40,
            )
            for size in settings["sizes"]
            for paradigm in settings["paradigms"]
            if size in self.bases
        }

    def clips(self) -> dict[tuple[Any, ...], Job]:
        """By task: the generator of clips as it is; by paradigm and seed: judges of clips, and by gradient generators that these tune."""
        settings = self.settings["clips"]
        if not {"base", "generator"} <= set(self.clip_models):
            return {}
        base, generator = (str(self.clip_models[name]) for name in ("base", "generator"))
        weights = (f"{generator}/{GENERATOR_WEIGHTS}",)
        pairs = tuple(
            Job(
                f"clips/pairs_{split}",
                "clips:draw_pairs",
                {"generator": generator, "split": split, "num_prompts": num_prompts},
                cost=num_prompts / 4,
                inputs=weights,
            )
            for split, num_prompts in settings["pairs"].items()
        )
        measured = {"generator": generator, "num_prompts": settings["measured_prompts"]}
        jobs: dict[tuple[Any, ...], Job] = {
            ("base", task): Job(
                f"clips/base_{task}", "clips:measure", {"task": task, **measured}, cost=30, inputs=weights
            )
            for task in settings["tasks"]
        }
        trained = {name: settings[name] for name in ("updates", "sample_updates", "held_out_rows")}
        for paradigm, gradients in settings["paradigms"].items():
            for seed in settings["seeds"]:
                judge = jobs["judge", paradigm, seed] = Job(
                    f"clips/judge_{paradigm}_{seed}",
                    "clips:train_and_measure",
                    {"base": base, "paradigm": paradigm, "seed": seed, **trained},
                    pairs,
                    cost=settings["updates"] + settings["sample_updates"],
                    inputs=(f"{base}/{WEIGHTS}",),
                )
                for task, gradient in itertools.product(settings["tasks"], gradients):
                    jobs["tuned", task, paradigm, gradient, seed] = Job(
                        f"clips/tuned_{task}_{paradigm}_{gradient}_{seed}",
                        "clips:tune",
                        {
                            "generator": generator,
                            "task": task,
                            "paradigm": paradigm,
                            "seed": seed,
                            "gradient": settings["gradients"][gradient],
                            "measured_prompts": settings["measured_prompts"],
                            **settings["tuning"],
                        },
                        (judge,),
                        cost=3 * settings["tuning"]["updates"],
                        inputs=weights,
                    )
        return jobs

    def missing_clip_models(self) -> list[str]:
        """Models of clips that are not there."""
        return [name for name in ("base", "generator") if name not in self.clip_models]

    # ---- jobs that several experiments share ----

    def base_generator(self, width: int = WIDTH) -> Job:
        """Measurement of a generator that is not tuned."""
        settings = {
            "generator": str(self.generators[width]),
            "num_prompts": self.settings["common"]["measured_prompts"],
        }
        inputs = (f"{self.generators[width]}/{GENERATOR_WEIGHTS}",)
        return Job(f"generators/{_named('base', width)}", "generators:measure", settings, cost=30, inputs=inputs)

    def pairs(self) -> tuple[Job, ...]:
        """Pairs of the generator's samples, for training and held out."""
        return tuple(
            Job(f"pairs/{split}", "judges:draw_pairs", {"split": split, "num_prompts": count}, cost=count / 5)
            for split, count in self.settings["common"]["pairs"].items()
        )

    def untrained(self, size: str, paradigm: str) -> Job:
        """Zero-shot measurement of a base model, on drawings and held-out samples."""
        base = str(self.bases[size])
        settings = {"model": base, "paradigm": paradigm, **self._measured()}
        name = f"judges/{size}_{paradigm}_untrained"
        return Job(name, "judges:measure", settings, self.pairs()[1:], cost=30, inputs=(f"{base}/{WEIGHTS}",))

    def full_judge(self, size: str, paradigm: str, seed: int, rationale: str | None = None) -> Job:
        """A judge of all data, pairs of the generator's samples among them."""
        settings = self.settings["sizes"]
        name = f"judges/{size}_{paradigm}{'_' + rationale if rationale else ''}_all_{seed}"
        more = {"sample_updates": settings["sample_updates"], "rationale": rationale}
        return self._judge(name, size, paradigm, settings["num_rows"], settings["updates"], seed, self.pairs(), more)

    def tuned(
        self, size: str, paradigm: str, seed: int, references: dict[str, Any] | None = None, width: int = WIDTH
    ) -> Job:
        """A generator tuned by a judge of all data."""
        settings = dict(self.settings["sizes"]["tuning"])
        references = references or settings["references"]
        settings |= {
            "generator": str(self.generators[width]),
            "paradigm": paradigm,
            "seed": seed,
            **{name: self.settings["common"][name] for name in ("measured_prompts", "monitored_prompts")},
            "references": references,
        }
        label = f"{references['method']}_{references['top_k']}_of_{references['num_candidates']}"
        return Job(
            f"generators/{_named(f'{size}_{paradigm}_{label}_{seed}', width)}",
            "generators:tune",
            settings,
            (self.full_judge(size, paradigm, seed),),
            cost=1.3 * settings["updates"] + settings["num_prompts"] * references["num_candidates"] / 60,
            inputs=(f"{self.generators[width]}/{GENERATOR_WEIGHTS}",),
        )

    def _measured(self) -> dict[str, Any]:
        """How all judges are asked and measured."""
        return {name: self.settings["common"][name] for name in ("held_out_rows", "prompt_layout")}

    def _judge(
        self,
        name: str,
        size: str,
        paradigm: str,
        num_rows: int,
        updates: int,
        seed: int,
        pairs: tuple[Job, ...] = (),
        more: dict[str, Any] | None = None,
    ) -> Job:
        base = str(self.bases[size])
        settings = {
            "base": base,
            "paradigm": paradigm,
            "num_rows": num_rows,
            "updates": updates,
            "seed": seed,
            **self._measured(),
            **(more or {}),
        }
        cost = 15 + COST_OF_SIZE[size] * (updates + (more or {}).get("sample_updates", 0))
        return Job(name, "judges:train_and_measure", settings, pairs, cost, (f"{base}/{WEIGHTS}",))


# Seconds of an update, about
COST_OF_SIZE = {"0.12m": 0.12, "0.32m": 0.18, "0.7m": 0.25, "1.1m": 0.35, "2m": 0.6, "5m": 1.2, "10m": 2.5}


def _named(name: str, width: int) -> str:
    """Name of a job with a generator."""
    return name if width == WIDTH else f"{name}_w{width}"


def read_settings(file: Path, quick: bool = False) -> dict[str, Any]:
    """Settings of an experiment."""
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    small = settings.pop("quick", {})
    return {**settings, **small} if quick else settings
