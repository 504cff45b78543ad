"""Search at test time, steered by a reward."""
