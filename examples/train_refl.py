# /// script
# dependencies = [
#     "rewarddance_hf[scripts,diffusers]",
# ]
# ///
"""
Tune a diffusers pipeline by the gradient of a judge's reward (ReFL), with Best-of-N references for a pairwise judge.

The shapes run takes minutes on one CPU core and needs no download. Its judge is trained first:

    accelerate launch --cpu examples/train_reward_model.py --config examples/configs/shapes.yaml --max_steps 1400
    accelerate launch --cpu examples/train_reward_model.py --config examples/configs/shapes_generated.yaml
    accelerate launch --cpu examples/train_refl.py --config examples/configs/refl_shapes.yaml

Real generators with LoRA on one 80 GB GPU (not run by us; the configurations say what they rest on):

    accelerate launch examples/train_refl.py --config examples/configs/refl_sd35.yaml --judge org/my-judge

Any argument of the configuration can be set on the command line too, e.g. `--beta 0.1`. An interrupted run goes on with
`--resume_from_checkpoint true`. On several GPUs, add `--config_file examples/accelerate_configs/multi_gpu.yaml` after
`launch`.
"""

from rewarddance_hf.scripts.tune import main, make_parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
