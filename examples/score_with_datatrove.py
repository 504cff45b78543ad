# /// script
# dependencies = ["rewarddance_hf[train]", "datatrove>=0.10"]
# ///
"""
Score a large dataset with datatrove: here on the cores of this machine, elsewhere on Slurm or Ray.

```bash
python examples/score_with_datatrove.py --model ORG/JUDGE --data "hf://datasets/ORG/NAME/data/*.parquet" \
    --columns image=image prompt=caption --output scores --num_shards 8 --workers 2
python examples/score_with_datatrove.py ... --executor slurm --partition gpu --time 04:00:00
```

Rows are read where they are scored, a shard by each task. The executor starts a lost task again, and a finished shard
is not scored again. When all are done, the last step joins them in `OUTPUT/scores.parquet`.
"""

import argparse

from rewarddance_hf import ParquetRows, RewardDanceScorer, merge_shards, score_shards


class ScoreShard:
    """A step of datatrove: task `rank` of `world_size` scores one shard."""

    def __init__(self, model: str, data: list[str], columns: dict[str, str] | None, output: str) -> None:
        self.arguments = (model, data, columns, output)

    def __call__(self, _, rank: int = 0, world_size: int = 1):
        model, data, columns, output = self.arguments
        scorer = RewardDanceScorer.from_pretrained(model)
        score_shards(scorer, ParquetRows(data, columns), output, world_size, rank, show_progress=False)
        yield from ()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="judge: repository ID or folder")
    parser.add_argument("--data", required=True, nargs="+", help="parquet files, folders or patterns")
    parser.add_argument("--columns", nargs="+", metavar="NAME=COLUMN", help="columns to read, e.g. prompt=caption")
    parser.add_argument("--output", required=True, help="folder of the scores, which all tasks see")
    parser.add_argument("--num_shards", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1, help="tasks at a time")
    parser.add_argument("--executor", choices=("local", "slurm", "ray"), default="local")
    parser.add_argument("--partition", default="gpu", help="of Slurm")
    parser.add_argument("--time", default="04:00:00", help="of Slurm, for each task")
    args = parser.parse_args(arguments)

    columns = None
    if args.columns:
        columns = {column: name for name, column in (pair.split("=", 1) for pair in args.columns)}
    step = ScoreShard(args.model, args.data, columns, args.output)
    shared = {"pipeline": [step], "tasks": args.num_shards, "logging_dir": f"{args.output}/logs"}
    if args.executor == "local":
        from datatrove.executor import LocalPipelineExecutor

        LocalPipelineExecutor(**shared, workers=args.workers).run()
        print(merge_shards(args.output))
    elif args.executor == "slurm":
        from datatrove.executor import SlurmPipelineExecutor

        slurm = {"partition": args.partition, "time": args.time, "cpus_per_task": 8, "mem_per_cpu_gb": 8}
        SlurmPipelineExecutor(**shared, **slurm, gpus_per_task=1, workers=args.workers).run()
        print(f"When the array is done: rewarddance merge {args.output}")
    else:
        from datatrove.executor import RayPipelineExecutor

        RayPipelineExecutor(**shared, gpus_per_task=1, workers=args.workers).run()
        print(merge_shards(args.output))


if __name__ == "__main__":
    main()
