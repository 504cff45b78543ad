"""ReFL: a generator is tuned by the gradient of a reward."""
