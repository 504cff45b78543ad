"""What no run may be worse than: ratios measured side by side, never times."""

from fnmatch import fnmatch


AT_LEAST = {
    "serving/*/throughput_over_in_process": 0.8,
    "scoring/13m/16x*/text_first/speedup_vs_batched": 4.0,
    "scoring/13m/16x*/images_first/speedup_vs_batched": 3.0,
    "scoring/13m_2b/*/speedup_vs_batched": 2.8,
    "scoring/3m/*/text_first/speedup_vs_batched": 3.0,
    "scoring/3m/*/images_first/speedup_vs_batched": 2.0,
    "scoring/13m/*/speedup_vs_cross_encoder": 3.0,
    "scoring/13m/*/speedup_vs_generation": 4.0,
    "scoring/distinct_pairs/*/speedup_vs_batched": 0.95,
    "training_memory/*/full_over_labelled": 4.0,
}
AT_MOST = {
    "serving/*/lost": 0.0,
    "serving/overload/peak_memory_over_twice_asked": 1.3,
    "scoring/*/tokens_over_minimum": 1.05,
    "scoring/*/encodings_per_image": 1.0,
    "scoring/*/largest_difference": 1e-4,
    "reward_step/*/*/first_time_over_full_graph": 0.9,
    "reward_step/*/*/again_time_over_full_graph": 0.75,
    "reward_step/*/*/again_memory_over_full_graph": 0.75,
    "reward_step/*/*/checkpointed_memory_over_full_graph": 0.5,
    "reward_step/*/*/*_gradient_difference": 1e-4,
    "gradient/*/refl_step_memory_over_full_backprop": 0.6,
}


def violations(results: dict[str, float]) -> list[str]:
    """Sentences about the numbers that are worse than allowed."""
    found = []
    for limits, word, sign in ((AT_LEAST, "at least", 1), (AT_MOST, "at most", -1)):
        for pattern, limit in limits.items():
            for key, value in results.items():
                if fnmatch(key, pattern) and not sign * value >= sign * limit:
                    found.append(f"{key} is {value:.4g}, but must be {word} {limit:.4g}")
    return found
