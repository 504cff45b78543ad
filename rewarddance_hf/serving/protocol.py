"""
Wire format: a safetensors body whose metadata holds a JSON header with the version of the protocol. The same header with
base64 in place of tensors is the JSON form, for people. Nothing is ever unpickled.
"""

import base64
import binascii
import json
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

from .errors import Refusal


PROTOCOL = 1
KEY = "rewarddance"  # of the header in the metadata of safetensors
# Types that go through numpy, which other threads wait less for: torch gives its lock away with each operation
NUMPY_TYPES = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
MAX_HEADER_BYTES = 64 << 20  # names of tensors and all texts

SAFETENSORS = "application/x-safetensors"
JSON = "application/json"

# Headers of HTTP
PROTOCOL_HEADER = "RewardDance-Protocol"
JUDGE_HEADER = "RewardDance-Judge"  # digest of the fingerprint: wanted by a request, true of an answer


def pack(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bytes:
    """Body with a header and tensors."""
    metadata = {KEY: json.dumps({"protocol": PROTOCOL, **header})}
    if all(tensor.dtype in NUMPY_TYPES for tensor in tensors.values()):
        arrays = {name: np.asarray(tensor.numpy(force=True), order="C") for name, tensor in tensors.items()}
        return safetensors.numpy.save(arrays, metadata)
    # Parts of a batch and what is sent twice share memory, which torch's form refuses.
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, metadata)


def unpack(body: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors of a body."""
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or length > min(len(body) - 8, MAX_HEADER_BYTES):
        raise Refusal(
            400, "ProtocolError", "The body is no safetensors file: it is cut off, or its header is too long."
        )
    try:
        described = json.loads(body[8 : 8 + length])
        header = json.loads(described.pop("__metadata__")[KEY])
        if all(tensor["dtype"] in NUMPY_TYPES.values() for tensor in described.values()):
            tensors = {name: torch.from_numpy(array) for name, array in safetensors.numpy.load(body).items()}
        else:
            tensors = safetensors.torch.load(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, safetensors.SafetensorError) as error:
        raise Refusal(
            400,
            "ProtocolError",
            f"The body is no safetensors file with a header under {KEY!r} ({type(error).__name__}).",
        ) from error
    if not isinstance(header, dict):
        raise Refusal(400, "ProtocolError", f"The header is a `{type(header).__name__}`, but must be an object.")
    return header, tensors


def unpack_json(body: bytes) -> dict[str, Any]:
    """Header of a JSON body. Who writes one by hand may leave the version out."""
    try:
        header = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "ProtocolError", f"The body is no JSON ({error}).") from error
    if not isinstance(header, dict):
        raise Refusal(400, "ProtocolError", f"The body is a `{type(header).__name__}`, but must be an object.")
    return {"protocol": PROTOCOL, **header}


def check_version(header: dict[str, Any]) -> None:
    """Refuse another version of the protocol."""
    version = header.get("protocol")
    if version != PROTOCOL:
        raise Refusal(
            400,
            "ProtocolError",
            f"The version of the protocol is {version!r}, but this server speaks {PROTOCOL}. Use the same version of "
            "rewarddance_hf on both sides.",
        )


def decode_base64(text: str, name: str) -> bytes:
    """Bytes of an image in JSON: base64, or a `data:` address of it."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(
            f"`{name}` is no base64 text ({error}). Send the bytes of a PNG file in base64; paths and addresses are not opened."
        ) from error
