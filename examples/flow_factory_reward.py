# /// script
# dependencies = [
#     "rewarddance_hf[serve]",
# ]
# ///
"""
Ask a judge as Flow-Factory asks its remote reward models, before a run of days depends on it.

    rewarddance serve --model org/my-judge &
    python examples/flow_factory_reward.py --url http://127.0.0.1:8000 --prompt "a red circle" --image a.png b.png

The run itself needs no code of ours. In its configuration, a judge of single samples is

    rewards:
      - name: "rewarddance"
        reward_model: "flow_factory.rewards.my_reward_remote.RemotePointwiseRewardModel"
        server_url: "http://127.0.0.1:8000"
        batch_size: 16

and a pairwise judge the same with `RemoteGroupwiseRewardModel`: it compares the samples of a group with each other. That client
sends no token, so that the server stands on the same machine, or behind a proxy that adds it. It retries without a limit of
its own on what a server answers when it is busy: `--max-waiting` of the server should hold what all processes send at once.
"""

import argparse
import base64
import io
import json
import os
import urllib.error
import urllib.request
from typing import Any

from PIL import Image


def as_base64(path: str) -> str:
    stream = io.BytesIO()
    Image.open(path).convert("RGB").save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def ask(url: str, prompts: list[str], images: list[str], token: str | None = None) -> list[float]:
    """Rewards of images. What the server says is wrong is raised."""
    body = {"prompt": prompts, "image": [as_base64(path) for path in images], "kwargs": None}
    request = urllib.request.Request(f"{url}/compute", json.dumps(body).encode(), {"Content-Type": "application/json"})
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} answered with status {error.code}: {json.load(error)['error']['message']}") from error
    return found["rewards"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--image", nargs="+", required=True)
    args = parser.parse_args()
    rewards = ask(args.url, [args.prompt] * len(args.image), args.image, os.environ.get("REWARDDANCE_TOKEN"))
    for path, reward in zip(args.image, rewards, strict=True):
        print(f"{reward:.6f}\t{path}")


if __name__ == "__main__":
    main()
