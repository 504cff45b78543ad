"""The experiments of the paper as jobs: what their YAML files mean."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jobs import Job


FOLDER = Path(__file__).parent / "experiments"
NAMES = ("paradigms", "sizes", "references", "reasons", "dynamics", "attacks")
WEIGHTS = "model.safetensors"


class Study:
    """
    All jobs of the study.

    Args:
        bases (`Mapping[str, Path]`):
            Folders of base models by size.
        quick (`bool`, *optional*, defaults to `False`):
            Whether to take the small settings that each YAML file has under `quick`.
        folder (`Path`, *optional*):
            Folder of the YAML files.
    """

    def __init__(self, bases: Mapping[str, Path], quick: bool = False, folder: Path = FOLDER) -> None:
        self.bases = dict(bases)
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
        """By size: zero-shot judges, judges, generators tuned by pairwise ones, searches by pointwise ones, by seed."""
        settings = self.settings["sizes"]
        jobs: dict[tuple[Any, ...], Job] = {("base",): self.base_generator()}
        for size in settings["sizes"]:
            if size not in self.bases:
                continue
            for paradigm in settings["paradigms"]:
                jobs[size, "untrained", paradigm, 0] = self.untrained(size, paradigm)
            for seed in settings["seeds"]:
                for paradigm in settings["paradigms"]:
                    jobs[size, "judge", paradigm, seed] = self.full_judge(size, paradigm, seed)
                jobs[size, "tuned", "pairwise", seed] = self.tuned(size, "pairwise", seed)
                jobs[size, "search", "pointwise", seed] = Job(
                    f"searches/{size}_{seed}",
                    "generators:search",
                    {"seed": seed, **settings["search"]},
                    (self.full_judge(size, "pointwise", seed),),
                    cost=60,
                )
        return jobs

    def references(self) -> dict[tuple[Any, ...], Job]:
        """Generators by how references are chosen and by seed."""
        settings = self.settings["references"]
        if settings["size"] not in self.bases:
            return {}
        return {
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
        """Generators by the paradigm of the judge that tunes them and by seed."""
        settings = self.settings["dynamics"]
        if settings["size"] not in self.bases:
            return {}
        return {
            (paradigm, seed): self.tuned(settings["size"], paradigm, seed)
            for paradigm in settings["paradigms"]
            for seed in settings["seeds"]
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

    # ---- jobs that several experiments share ----

    def base_generator(self) -> Job:
        """Measurement of the generator that is not tuned."""
        prompts = self.settings["common"]["measured_prompts"]
        return Job("generators/base", "generators:measure", {"num_prompts": prompts}, cost=30)

    def pairs(self) -> tuple[Job, ...]:
        """Pairs of the generator's samples, for training and held out."""
        return tuple(
            Job(f"pairs/{split}", "judges:draw_pairs", {"split": split, "num_prompts": count}, cost=count / 5)
            for split, count in self.settings["common"]["pairs"].items()
        )

    def untrained(self, size: str, paradigm: str) -> Job:
        """Zero-shot measurement of a base model, on drawings and held-out samples."""
        base = str(self.bases[size])
        rows = self.settings["common"]["held_out_rows"]
        settings = {"model": base, "paradigm": paradigm, "held_out_rows": rows}
        name = f"judges/{size}_{paradigm}_untrained"
        return Job(name, "judges:measure", settings, self.pairs()[1:], cost=30, inputs=(f"{base}/{WEIGHTS}",))

    def full_judge(self, size: str, paradigm: str, seed: int, rationale: str | None = None) -> Job:
        """A judge of all data, pairs of the generator's samples among them."""
        settings = self.settings["sizes"]
        name = f"judges/{size}_{paradigm}{'_' + rationale if rationale else ''}_all_{seed}"
        more = {"sample_updates": settings["sample_updates"], "rationale": rationale}
        return self._judge(name, size, paradigm, settings["num_rows"], settings["updates"], seed, self.pairs(), more)

    def tuned(self, size: str, paradigm: str, seed: int, references: dict[str, Any] | None = None) -> Job:
        """A generator tuned by a judge of all data."""
        settings = dict(self.settings["sizes"]["tuning"])
        references = references or settings["references"]
        settings |= {
            "paradigm": paradigm,
            "seed": seed,
            "measured_prompts": self.settings["common"]["measured_prompts"],
            "references": references,
        }
        label = f"{references['method']}_{references['top_k']}_of_{references['num_candidates']}"
        return Job(
            f"generators/{size}_{paradigm}_{label}_{seed}",
            "generators:tune",
            settings,
            (self.full_judge(size, paradigm, seed),),
            cost=1.3 * settings["updates"] + settings["num_prompts"] * references["num_candidates"] / 60,
        )

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
            "held_out_rows": self.settings["common"]["held_out_rows"],
            **(more or {}),
        }
        cost = 15 + COST_OF_SIZE[size] * (updates + (more or {}).get("sample_updates", 0))
        return Job(name, "judges:train_and_measure", settings, pairs, cost, (f"{base}/{WEIGHTS}",))


# Seconds of an update, about
COST_OF_SIZE = {"0.1m": 0.12, "0.5m": 0.2, "1.5m": 0.4, "5m": 1.2, "10m": 2.5}


def read_settings(file: Path, quick: bool = False) -> dict[str, Any]:
    """Settings of an experiment."""
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    small = settings.pop("quick", {})
    return {**settings, **small} if quick else settings
