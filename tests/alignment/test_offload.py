"""Models that are on the CPU while they are not in use; on a device of their own in `test_second_device.py`."""

import torch
from tiny_refl import make_trainer, pixel_reward, rows, tiny_sd3, trained_weights
from torch import nn

from rewarddance_hf.alignment.monitor.callback import RewardDynamicsCallback
from rewarddance_hf.alignment.refl.offload import Offload
from rewarddance_hf.rewards import as_reward


class Judge(nn.Module):
    """A reward with weights, which are where they should be when it is asked."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.moves = []

    def to(self, device):
        self.moves.append(torch.device(device).type)
        return self

    def forward(self, images, prompts):
        self.moves.append("asked")
        return pixel_reward(images, prompts) * self.scale


def test_updates_are_those_without(tmp_path):
    """Weights after two updates are equal, whatever is asked in between, and judges and text encoders are moved around their use."""
    weights = []
    for offload in (False, True):
        judge, held_out, pipeline = Judge(), Judge(), tiny_sd3()
        moves = []
        to = pipeline.text_encoder.to
        pipeline.text_encoder.to = lambda device, to=to, moves=moves: (
            moves.append(torch.device(device).type) or to(device)
        )
        trainer = make_trainer(
            tmp_path,
            pipeline,
            judge,
            offload=offload,
            beta=0.1,
            gradient_accumulation_steps=2,
            reward_transform="log",
            eval_dataset=rows(1),
            eval_strategy="steps",
            eval_steps=1,
            callbacks=[RewardDynamicsCallback(held_out, rows(2), eval_steps=1, plot=False)],
        )
        moves.clear()
        trainer.train()
        weights.append(trained_weights(trainer))
        assert (moves == [*["cpu", "cpu"] * (len(moves) // 2)] and len(moves) > 8) == offload
        for one in (judge, held_out):
            wanted = ["cpu", *["cpu", "asked", "cpu"] * one.moves.count("asked")] if offload else []
            assert [move for move in one.moves if offload or move != "asked"] == wanted
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-6, atol=1e-7)


def test_judges_in_parts_are_left_alone():
    """A judge that is spread over devices is where its hooks look for it."""
    judge = Judge()
    Offload(torch.device("cpu")).take(as_reward(judge))
    assert judge.moves == ["cpu"]
    spread = Judge()
    spread.elsewhere = nn.Parameter(torch.ones((), device="meta"))
    Offload(torch.device("cpu")).take(as_reward(spread))
    assert spread.moves == []
