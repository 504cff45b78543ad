# /// script
# dependencies = [
#     "rewarddance_hf[diffusers,demo]",
# ]
# ///
"""
The paper's experiments where the truth is known: judges and generators of shapes, measured by an exact oracle.

    make paper                                    # with the base models that ship, and those that are in outputs/
    make paper PAPER=--quick                      # with too little of everything to conclude from

Results are kept in the output folder: a call after a stop goes on, and does again only what other settings ask for. The
report is made of what there is.
"""

import argparse
import sys
from pathlib import Path

from experiments import FOLDER, GENERATOR_WEIGHTS, NAMES, WEIGHTS, Study
from jobs import stages_of, with_needs
from report import write_report
from results import pack_results, take_results

from rewarddance_hf.shapes.generator import BASE_GENERATOR, WIDTH
from rewarddance_hf.shapes.models import LADDER_VLMS
from rewarddance_hf.shapes.stages import run_stages


PRELOAD = ("torch", "transformers", "diffusers", "peft", "datasets", "judges", "generators", "attacks", "clips")


# Models that ship with the study, in folders named as those in outputs/
MODELS = Path(__file__).parent / "models"


def find_bases(folder: Path) -> dict[str, Path]:
    """Base models by size: those that ship, and those that `make shapes-base` has written to a folder, which come first."""
    shipped = {file.parent.name: file.parent for file in sorted(LADDER_VLMS.glob(f"*/{WEIGHTS}"))}
    found = [file for place in (MODELS, folder) for file in sorted(place.glob(f"shapes_base_*/{WEIGHTS}"))]
    return shipped | {file.parent.name.rpartition("_")[2]: file.parent for file in found}


def find_generators(folder: Path) -> dict[int, Path]:
    """Generators by width: those that ship, and those that `make shapes-generator WIDTH=...` has written to a folder, which come first."""
    found = [
        file for place in (MODELS, folder) for file in sorted(place.glob(f"shapes_generator_*/{GENERATOR_WEIGHTS}"))
    ]
    return {WIDTH: BASE_GENERATOR} | {int(file.parents[1].name.rpartition("_")[2]): file.parents[1] for file in found}


def find_clip_models(folder: Path) -> dict[str, Path]:
    """The base model that has seen clips and the generator of clips, where their trainings have written them to a folder."""
    files = {"base": f"shapes_clip_base/{WEIGHTS}", "generator": f"shapes_clip_generator/{GENERATOR_WEIGHTS}"}
    return {name: folder / Path(file).parts[0] for name, file in files.items() if (folder / file).is_file()}


def main(args: argparse.Namespace) -> None:
    folder = Path(args.output_dir or ("outputs/paper_quick" if args.quick else "outputs/paper"))
    bases = Path(args.bases)
    study = Study(
        find_bases(bases), find_generators(bases), find_clip_models(bases), args.quick, Path(args.experiments)
    )
    for size in study.missing_sizes():
        print(
            f"There is no base model of {size} in {args.bases}: its jobs are left out. `make shapes-base SIZE={size}` trains it."
        )
    for width in study.missing_widths():
        print(
            f"There is no generator of width {width} in {args.bases}: its jobs are left out. "
            f"`make shapes-generator WIDTH={width}` trains it."
        )
    for name in study.missing_clip_models():
        print(
            f"There is no {name} of clips in {args.bases}: jobs of clips are left out. `make shapes-clip-{name}` trains it."
        )
    jobs = with_needs(study.jobs(tuple(args.only)))
    if args.results:
        print(f"{take_results(jobs, folder, Path(args.results))} results are taken from {args.results}.")
    if not args.report:
        stages = stages_of(jobs, folder)
        print(f"{len(stages)} of {len(jobs)} jobs are left to do.")
        run_stages(stages, folder / "logs", PRELOAD)
    print(write_report(study, folder))
    if args.pack:
        print(f"{pack_results(with_needs(study.jobs()), folder, Path(args.pack))} results are in {args.pack}.")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small settings, to see how it goes")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="some of the experiments")
    parser.add_argument("--report", action="store_true", help="make the report of what is done, and do nothing more")
    parser.add_argument("--results", help="file of --pack: jobs whose results are in it are not done again")
    parser.add_argument("--pack", help="write all results into one file")
    parser.add_argument("--experiments", default=str(FOLDER), help="folder of YAML files, for settings of your own")
    parser.add_argument("--bases", default="outputs", help="folder of base models and generators of other sizes")
    parser.add_argument("--output_dir", help="folder for results and report (default: outputs/paper)")
    return parser


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    main(make_parser().parse_args())
