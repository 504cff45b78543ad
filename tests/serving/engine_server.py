"""
A small engine: it serves an exported judge through plain transformers, with nothing of our package but the processor that has no
video part, in the form of vLLM's server of OpenAI's protocol. Log-probabilities are those of the model.
"""

import base64
import io
import json
from pathlib import Path

import torch
import transformers as hf
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from tiny_vlms import image_only


class Engine:
    """
    The model of a folder. `logprobs_mode` is vLLM's; `knows_token_ids` is whether it gives the log-probabilities of chosen tokens
    or of the most probable ones only.
    """

    def __init__(self, folder: Path, logprobs_mode: str = "raw_logprobs", knows_token_ids: bool = True):
        self.logprobs_mode, self.knows_token_ids = logprobs_mode, knows_token_ids
        self.model = hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        settings = json.loads((folder / "processor_config.json").read_text())
        kept = {"image_seq_length", "image_seq_len"}
        self.processor = image_only(settings["processor_class"])(
            hf.AutoImageProcessor.from_pretrained(folder, backend="pil"),
            hf.AutoTokenizer.from_pretrained(folder),
            chat_template=(folder / "chat_template.jinja").read_text(),
            **{name: value for name, value in settings.items() if name in kept},
        )

    @torch.no_grad()
    def answer(self, body: dict) -> dict:
        images = []
        for message in body["messages"]:
            for part in message["content"]:
                if part["type"] == "image_url":
                    part["type"] = "image"
                    content = base64.b64decode(part.pop("image_url")["url"].removeprefix("data:image/png;base64,"))
                    images.append(Image.open(io.BytesIO(content)).convert("RGB"))
        text = self.processor.apply_chat_template(
            body["messages"], add_generation_prompt=body["add_generation_prompt"]
        )
        batch = self.processor(images=[images], text=[text], return_tensors="pt", add_special_tokens=False)
        logits = self.model(**batch).logits[0, -1].float()
        if self.logprobs_mode == "processed_logprobs":
            logits = logits / body["temperature"]
        logprobs = logits.log_softmax(dim=-1)
        chosen = body["logprob_token_ids"] if self.knows_token_ids else logprobs.topk(20).indices.tolist()
        top = [{"token": f"token_id:{token}", "logprob": logprobs[token].item()} for token in chosen]
        return {
            "choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}],
            "prompt_token_ids": batch["input_ids"][0].tolist(),
        }

    def app(self) -> Starlette:
        async def models(request: Request) -> JSONResponse:
            return JSONResponse({"data": [{"id": "judge"}]})

        async def chat(request: Request) -> JSONResponse:
            return JSONResponse(self.answer(await request.json()))

        return Starlette(routes=[Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])])
