"""
A vLLM without a server, in the environment of `make test-vllm`: started by `bench_vllm.py`, which it does not import.

    python tests/benchmarks/vllm_process.py FOLDER    # of `rewarddance export`

Each line that it reads names a file of questions (prompts, images, which images each prompt shows); each line that it writes has
the log-odds, the tokens of the first question, and the seconds that this process computed.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image


def main(folder: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM writes is no answer
    from vllm import LLM, SamplingParams

    score = json.loads((folder / "score.json").read_text(encoding="utf-8"))
    asked = [score["yes_token_id"], score["no_token_id"]]
    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=32,
        limit_mm_per_prompt={"image": 2},
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=asked)
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        with np.load(line.strip()) as file:
            images = [Image.fromarray(pixels) for pixels in file["images"]]
            prompts, shown = file["prompts"].tolist(), file["shown"].tolist()
        start = time.process_time()
        questions = [
            {"prompt": prompt, "multi_modal_data": {"image": [images[i] for i in of_prompt]}}
            for prompt, of_prompt in zip(prompts, shown, strict=True)
        ]
        outputs = llm.generate(questions, sampling, use_tqdm=False)
        found = [[output.outputs[0].logprobs[0][token].logprob for token in asked] for output in outputs]
        seconds = time.process_time() - start
        log_odds = [yes - no for yes, no in found]
        content = {"seconds": seconds, "log_odds": log_odds, "token_ids": list(outputs[0].prompt_token_ids)}
        answers.write(json.dumps(content) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
