"""
Images from encoded bytes to what a vision encoder takes, without any model: must not be what a GPU waits for.

The engine's desk prepares them in threads, the collator of training in processes of a `DataLoader`; both by the time on the wall,
which is of use where there are as many cores as workers. What one image costs is the time that the process computes.
"""

import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from judges import make_judge, tiny_config
from PIL import Image
from timing import timed


NUM_TOKENS = 256  # an image, 448 x 448 pixels of InternVL
# Larger ones in the two common formats, and those that were brought to the judge's size beforehand
IMAGES = {"jpeg_1024": ("JPEG", 1024), "png_1024": ("PNG", 1024), "jpeg_512": ("JPEG", 512), "png_448": ("PNG", 448)}


def encoded_images(kind: str, count: int) -> list[bytes]:
    """Images with the entropy of photographs: smooth colors with some noise."""
    format, side = IMAGES[kind]
    images = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        smooth = torch.rand(1, 3, 8, 8, generator=generator)
        pixels = torch.nn.functional.interpolate(smooth, size=(side, side), mode="bicubic")[0]
        pixels += 0.02 * torch.randn(3, side, side, generator=generator)
        array = (255 * pixels.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, format, **({"quality": 90} if format == "JPEG" else {}))
        images.append(stream.getvalue())
    return images


def torchvision_decoder() -> Callable[[bytes], torch.Tensor] | None:
    """Decoder of torchvision, where it is installed and works."""
    try:
        from torchvision.io import decode_image

        decode_image(torch.frombuffer(bytearray(encoded_images("png_448", 1)[0]), dtype=torch.uint8))
    except (ImportError, RuntimeError):  # its library is built for another torch
        return None
    return lambda image: decode_image(torch.frombuffer(bytearray(image), dtype=torch.uint8))


def desk(
    kind: str, count: int = 32, workers: tuple[int, ...] = (1, 2, 4), num_tokens: int = NUM_TOKENS
) -> dict[str, float]:
    """Images a second of the engine's desk with some threads, and what decoding alone takes of the time of one."""
    from rewarddance_hf.models.question_rewarddance import Question
    from rewarddance_hf.scoring.engine.media_desk import ImageDesk

    _, processor = make_judge(num_tokens, "text_first", **tiny_config("3m"))
    images = encoded_images(kind, count)

    def prepare(executor: Any) -> None:
        room = ImageDesk(processor, executor)
        questions = [Question(Image.open(io.BytesIO(image)), "a circle", row=row) for row, image in enumerate(images)]
        for futures in room.take(room.open(questions)):
            for future in futures:
                future.result()

    prepare(None)  # how the processor is called has been learned
    _, alone = timed(partial(prepare, None))
    _, decoding = timed(lambda: [Image.open(io.BytesIO(image)).load() for image in images])
    results = {"cpu_ms_per_image": 1000 * alone / count, "share_of_decoding": decoding / alone}
    if (decode := torchvision_decoder()) is not None:
        _, seconds = timed(lambda: [decode(image) for image in images])
        results["torchvision_over_pillow_decoding"] = seconds / decoding
    for number in workers:
        with ThreadPoolExecutor(number) as executor:
            start = time.perf_counter()
            prepare(executor)
            results[f"images_per_second_{number}_threads"] = count / (time.perf_counter() - start)
    return results


class _Rows(torch.utils.data.Dataset):
    def __init__(self, images: list[bytes]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images) // 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        chosen, rejected = ({"bytes": self.images[2 * index + i], "path": None} for i in range(2))
        return {"prompt": f"circle {index}", "chosen": chosen, "rejected": rejected}


def collator(
    kind: str, count: int = 64, workers: tuple[int, ...] = (1, 2), num_tokens: int = NUM_TOKENS
) -> dict[str, float]:
    """Rows a second of the collator in some processes of a `DataLoader`, which are busy already."""
    from rewarddance_hf import DataCollatorForRewardDance

    _, processor = make_judge(num_tokens, "text_first", **tiny_config("3m"))
    collate, rows = DataCollatorForRewardDance(processor), _Rows(encoded_images(kind, count))
    batch_size = min(4, len(rows))
    batches = [[rows[i] for i in range(start, start + batch_size)] for start in range(0, len(rows), batch_size)]
    collate(batches[0])
    _, seconds = timed(lambda: [collate(batch) for batch in batches])
    results = {"cpu_ms_per_row": 1000 * seconds / len(rows)}
    for number in workers:
        ahead = 2 * number  # batches that workers begin before they are asked for
        order = [
            [i % len(rows) for i in range(start, start + batch_size)]
            for start in range(0, 3 * ahead * batch_size, batch_size)
        ]
        loader = iter(torch.utils.data.DataLoader(rows, batch_sampler=order, num_workers=number, collate_fn=collate))
        for _ in range(ahead):
            next(loader)
        start = time.perf_counter()
        left = sum(len(batch["labels"]) for batch in loader)
        results[f"rows_per_second_{number}_processes"] = left / (time.perf_counter() - start)
    return results


def measurements(is_full: bool = False) -> dict[str, Callable[[], dict[str, float]]]:
    """The desk and the collator, with 1 to 16 workers, also where this process may use fewer cores."""
    threads = (1, 2, 4, 8, 16)
    processes = threads if is_full else threads[:3]
    return {f"desk/{kind}": partial(desk, kind, workers=threads) for kind in IMAGES} | {
        f"collator/{kind}": partial(collator, kind, workers=processes) for kind in IMAGES
    }
