# /// script
# dependencies = [
#     "rewarddance_hf[scripts]",
# ]
# ///
"""
Train a RewardDance judge on preference pairs.

The shapes run takes minutes on two CPU cores and needs no download:

    accelerate launch --cpu examples/train_reward_model.py --config examples/configs/shapes.yaml

A real vision-language model with LoRA on one 80 GB GPU (not run by us; the configuration says what it rests on):

    accelerate launch examples/train_reward_model.py --config examples/configs/internvl_open_image_preferences.yaml

Any argument of the configuration can be set on the command line too, e.g. `--learning_rate 2e-5`. On several GPUs, add
`--config_file examples/accelerate_configs/multi_gpu.yaml` after `launch`, or `fsdp2.yaml` for what does not fit one.
"""

from rewarddance_hf.scripts.train import main, make_parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
