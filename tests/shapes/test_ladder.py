"""The ladder of base models: its sizes, its optimizer, and that its training runs and repeats."""

import pytest
import torch

from rewarddance_hf import RewardDanceForYesScoring
from rewarddance_hf.shapes.edit_instructions import instruction_words
from rewarddance_hf.shapes.ladder import (
    SIZES,
    Curriculum,
    Phase,
    Stage,
    hard_pair_matching,
    lessons,
    matching,
    pair_faults,
    train_rung,
    with_more_layers,
)
from rewarddance_hf.shapes.lessons import ShapesLessons, lesson_words
from rewarddance_hf.shapes.matrix_optimizer import MatrixOptimizer
from rewarddance_hf.shapes.models import VlmSize, build_tokenizer, build_vlm, build_vlm_processor
from rewarddance_hf.shapes.questions import QuestionCollator


def test_training_runs_and_repeats(tmp_path):
    """Every kind of row trains, a phase goes on from the one before, and the same seed gives the same weights."""
    phases = (
        Phase(1e-3, (Stage(1, (lessons,)), Stage(2, (lessons, matching)))),
        Phase(5e-4, (Stage(2, (hard_pair_matching,)),)),
    )
    for name, part in {"first": phases, "second": phases, "before": phases[:1]}.items():
        train_rung(tmp_path / name, "0.12m", seed=3, phases=part)
    first, second, before = (
        RewardDanceForYesScoring.from_pretrained(tmp_path / name).state_dict()
        for name in ("first", "second", "before")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Updates of a warm-up over 50, the first of which stands still, move weights by little.
    assert 0 < max((first[name] - before[name]).abs().max().item() for name in first) < 0.02


def test_training_goes_on_after_a_stop(tmp_path):
    """What a phase has learned is not lost when a later one stops, and the weights are those of a run that did not."""

    def failing(num_rows, seed):
        raise OSError("the machine is switched off")

    first, second = Phase(1e-3, (Stage(2, (lessons,)),)), Phase(5e-4, (Stage(1, (matching,)),))
    train_rung(tmp_path / "whole", "0.12m", phases=(first, second))
    with pytest.raises(OSError, match="switched off"):
        train_rung(tmp_path / "stopped", "0.12m", phases=(first, Phase(5e-4, (Stage(1, (failing,)),))))
    train_rung(tmp_path / "stopped", "0.12m", phases=(Phase(1e-3, (Stage(2, (failing,)),)), second))
    whole, stopped = (
        RewardDanceForYesScoring.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "stopped")
    )
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert not [path for path in (tmp_path / "stopped").iterdir() if path.is_dir()]


def test_more_layers_change_nothing_until_they_are_trained(tmp_path):
    """A deeper model gives the answers of the one before, with the last layer of that one at its end, and trains what is new."""
    tokenizer = build_tokenizer([*lesson_words(), *instruction_words()])
    model, deeper = (
        build_vlm(tokenizer, seed, VlmSize(32, layers, 1, 32, 2, 1)) for seed, layers in enumerate((2, 4))
    )
    batch = QuestionCollator(build_vlm_processor(tokenizer))([ShapesLessons(3)[index] for index in range(3)])
    batch.pop("labels")
    before = model(**batch).logits
    deeper = with_more_layers(model, deeper)
    torch.testing.assert_close(deeper(**batch).logits, before)
    last = deeper.model.language_model.layers[-1].state_dict()
    for name, weight in model.model.language_model.layers[-1].state_dict().items():
        assert torch.equal(last[name], weight)
    deeper(**batch).logits.square().sum().backward()
    for layer in deeper.model.language_model.layers:
        assert layer.self_attn.o_proj.weight.grad.abs().max() > 0
        assert layer.mlp.down_proj.weight.grad.abs().max() > 0
    phases = (
        Phase(1e-3, (Stage(2, (lessons,)),)),
        Phase(1e-3, (Stage(3, (pair_faults,)),), added_layers=2),
    )
    for name in ("whole", "again"):
        train_rung(tmp_path / name, "0.12m", phases=phases)
    whole, again = (RewardDanceForYesScoring.from_pretrained(tmp_path / name) for name in ("whole", "again"))
    assert whole.num_parameters() == build_vlm(tokenizer, size=SIZES["0.12m"]).num_parameters()
    for (name, weight), other in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, other)
        assert weight.abs().max() > 0, name


def test_stages_take_turns():
    """A batch is of one kind, kinds take turns, and no row comes twice."""
    curriculum = Curriculum((Stage(2, (lessons,)), Stage(4, (lessons, matching))), seed=0)
    kinds = ["Prompt" in curriculum[index]["questions"][0][0] for index in range(0, len(curriculum), 16)]
    assert kinds == [False] * 9 + [True] * 3 + [False] * 3 + [True] * 3
    asked = [str(curriculum[index]["questions"]) for index in range(0, 3 * 48, 7)]
    assert len(set(asked)) == len(asked)


def test_matrices_are_updated_by_muon():
    """
    Two updates are those of Muon in float64, written out, for matrices, ten times as fast, and of AdamW for all else; torch's own Muon
    agrees as far as bfloat16 goes.
    """
    tokenizer = build_tokenizer()
    ours, by_hand, by_torch = (build_vlm(tokenizer, 0, SIZES["0.12m"]) for _ in range(3))
    named = {name: weight.data.double() for name, weight in by_hand.named_parameters()}
    is_matrix = {
        name: weight.ndim == 2 and "embed" not in name and "lm_head" not in name for name, weight in named.items()
    }
    assert is_matrix["model.language_model.layers.0.self_attn.q_proj.weight"]
    optimizer = MatrixOptimizer(ours, lr=1e-3, weight_decay=0.02)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    matrices, others = (
        [weight for name, weight in by_torch.named_parameters() if is_matrix[name] == wanted]
        for wanted in (True, False)
    )
    references = (
        torch.optim.Muon(matrices, lr=5e-3, weight_decay=0.02),
        torch.optim.AdamW(others, lr=5e-4, weight_decay=0.02, betas=(0.9, 0.98)),
    )
    torch.manual_seed(0)
    momenta = {name: torch.zeros_like(weight) for name, weight in named.items()}
    for _ in range(2):
        for first, second in zip(ours.parameters(), by_torch.parameters(), strict=True):
            first.grad = torch.randn_like(first)
            second.grad = first.grad.clone()
        for name, weight in ours.named_parameters():
            gradient = weight.grad.double()
            momenta[name] = 0.95 * momenta[name] + 0.05 * gradient
            if is_matrix[name]:
                update = _newton_schulz(0.05 * gradient + 0.95 * momenta[name])
                scale = max(1, weight.shape[0] / weight.shape[1]) ** 0.5
                named[name] = (1 - 5e-3 * 0.02) * named[name] - 5e-3 * scale * update
        for part in (optimizer, *references):
            part.step()
    fresh = dict(build_vlm(tokenizer, 0, SIZES["0.12m"]).named_parameters())
    for (name, weight), other in zip(ours.named_parameters(), by_torch.parameters(), strict=True):
        if is_matrix[name]:
            torch.testing.assert_close(weight.data.double(), named[name], rtol=0, atol=1e-7)
            assert (weight - other).norm() < 0.03 * (weight - fresh[name]).norm(), name
        else:
            torch.testing.assert_close(weight, other)
    optimizer.zero_grad()
    assert all(weight.grad is None for weight in ours.parameters())


def _newton_schulz(matrix):
    """Five steps of the quintic iteration, for one matrix."""
    matrix = matrix / matrix.norm()
    for _ in range(5):
        square = matrix @ matrix.T
        matrix = 3.4445 * matrix - 4.775 * square @ matrix + 2.0315 * square @ square @ matrix
    return matrix


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    """Each has about as many parameters as its name says, and attention heads of 32 dimensions."""
    model = build_vlm(build_tokenizer([*lesson_words(), *instruction_words()]), size=SIZES[size])
    assert model.num_parameters() / 1e6 == pytest.approx(float(size.removesuffix("m")), rel=0.05)
    text = model.config.text_config
    assert text.hidden_size // text.num_attention_heads == 32
