"""Small copies of public preference datasets, with their exact file trees, columns and types: path -> content."""

import datetime
import io
import json
import tarfile
import zipfile

import datasets
import numpy as np
import pyarrow.parquet
from datasets import Features, Image, List, Value
from PIL import Image as PILImage

from rewarddance_hf.models.media_rewarddance import open_clip


STRING, FLOAT, FLOAT32, INTEGER, BOOL = (Value(t) for t in ("string", "float64", "float32", "int64", "bool"))


def image(number):
    """PNG whose red says which one it is."""
    file = io.BytesIO()
    PILImage.new("RGB", (24, 16), (number, 50, 100)).save(file, "PNG")
    return file.getvalue()


def number_of(media):
    """Number of an image, or of a video, which is a path or bytes (videos are lossy: numbers are tens there)."""
    if isinstance(media, PILImage.Image):
        return media.convert("RGB").getpixel((0, 0))[0]
    clip = open_clip(media)
    assert len(clip) == 12
    return round(np.asarray(clip.read()[0])[:, :, 0].mean() / 10)


def video(number, num_frames=12):
    """MP4 whose red says which one it is, and whose green grows from frame to frame."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 32, 32, "yuv420p", 2_000_000
        for i in range(num_frames):
            pixels = np.full((32, 32, 3), (number * 10, i * 20, 100), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def parquet(rows, **types):
    file = io.BytesIO()
    columns = {name: [row.get(name) for row in rows] for name in types}
    table = datasets.Dataset.from_dict(columns, features=Features(types)).data.table
    pyarrow.parquet.write_table(table, file)  # with the features in its metadata
    return file.getvalue()


def card(**splits):
    """README with one configuration, or with several if each value is a dict."""
    configs = splits if isinstance(next(iter(splits.values())), dict) else {"default": splits}
    lines = ["---", "configs:"]
    for config, files in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [line for split, path in files.items() for line in (f"  - split: {split}", f"    path: {path}")]
    return "\n".join([*lines, "---", "A small copy.", ""]).encode()


def tar_gz(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def zipped(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def split_in_parts(content, name, suffixes):
    step = -(-len(content) // len(suffixes))
    return {f"{name}.{suffix}": content[i * step : (i + 1) * step] for i, suffix in enumerate(suffixes)}


def encoded(number):
    return {"bytes": image(number), "path": f"{number}.png"}


def pickapic():
    def row(i, label, has_label=True):
        return {
            "are_different": True,
            "best_image_uid": f"uid{2 * i}",
            "caption": f"caption {i}",
            "created_at": datetime.datetime(2023, 5, 1),
            "has_label": has_label,
            "image_0_uid": f"uid{2 * i}",
            "image_0_url": "https://example.org/0",
            "image_1_uid": f"uid{2 * i + 1}",
            "image_1_url": "https://example.org/1",
            "jpg_0": image(2 * i),
            "jpg_1": image(2 * i + 1),
            "label_0": label,
            "label_1": 1 - label,
            "model_0": "a",
            "model_1": "b",
            "ranking_id": i,
            "user_id": 7,
            "num_example_per_prompt": 1,
            "__index_level_0__": i,
        }

    texts = "best_image_uid caption image_0_uid image_0_url image_1_uid image_1_url model_0 model_1".split()
    types = {
        **dict.fromkeys(texts, STRING),
        **dict.fromkeys(("ranking_id", "user_id", "num_example_per_prompt", "__index_level_0__"), INTEGER),
        **dict.fromkeys(("jpg_0", "jpg_1"), Value("binary")),
        **dict.fromkeys(("label_0", "label_1"), FLOAT),
        **dict.fromkeys(("are_different", "has_label"), BOOL),
        "created_at": Value("timestamp[ns]"),
    }
    rows = [row(0, 1.0), row(1, 0.0), row(2, 0.5), row(3, 1.0, has_label=False)]
    files = {f"data/{split}-00000-of-00001.parquet": parquet(rows, **types) for split in ("test", "test_unique")}
    # Only the files of the wanted split may be touched.
    files["data/train-00000-of-00001.parquet"] = b"not to be read"
    return files | {
        "README.md": card(train="data/train-*", test="data/test-*", test_unique="data/test_unique-*"),
    }


def hpdv2(loose=False):
    test = [
        {
            "prompt": "three bears",
            "image_path": ["00000.jpg", "00001.jpg", "00002.jpg"],
            "rank": [2, 1, 3],
            "raw_annotations": [
                {"rank": [2, 1, 3], "user_hash": "a"},
                {"rank": [1, 2, 3], "user_hash": "b"},
                {"rank": [3, 1, 2], "user_hash": "c"},
                {"rank": [2, 1, 3], "user_hash": "d"},
            ],
        }
    ]
    train = [
        {"prompt": "a bee", "file_path": ["00010.jpg", "00011.jpg"], "human_preference": [0, 1]},
        {"prompt": "bees", "file_path": ["00010.jpg", "00011.jpg", "00012.jpg"], "human_preference": [0, 1, 0]},
        {"prompt": "a wasp", "file_path": ["00011.jpg", "00012.jpg"], "human_preference": [1, 1]},
    ]
    images = {
        "test": {f"test/{i:05d}.jpg": image(i) for i in range(3)},
        "train": {f"train/{i:05d}.jpg": image(i) for i in (10, 11, 12)},
    }
    files = {"test.json": json.dumps(test).encode(), "train.json": json.dumps(train).encode(), "HPDv2.py": b"1/0"}
    if loose:
        return files | images["test"] | images["train"]
    return files | {f"{split}.tar.gz": tar_gz(members) for split, members in images.items()}


def hpdv3():
    records = [
        {
            "prompt": "a lake",
            "path1": "images/uuid0.jpg",
            "path2": "images/uuid1.jpg",
            "confidence": 0.75,
            "choice_dist": [9, 3],
            "model1": "flux",
            "model2": "kolors",
        },
        {
            "prompt": "a hill",
            "path1": "images/uuid2.jpg",
            "path2": "images/uuid3.jpg",
            "confidence": None,
            "choice_dist": None,
            "model1": "real_images",
            "model2": "sd2",
        },
        {
            "prompt": "a dune",
            "path1": "images/uuid1.jpg",
            "path2": "images/uuid3.jpg",
            "confidence": 0.999,
            "choice_dist": [19, 0],
            "model1": "flux",
            "model2": "sd2",
        },
    ]
    archive = tar_gz({f"images/uuid{i}.jpg": image(i) for i in range(4)})
    content = json.dumps(records).encode()
    return {"train.json": content, "test.json": content} | split_in_parts(archive, "images.tar.gz", ["aa", "ab", "ac"])


def hpdv3_plus_plus():
    record = {"prompt": "a kite", "path1": "images/qwen_image/0.png", "path2": "images/rollout/1.png"}
    archive = tar_gz({"images/qwen_image/0.png": image(0), "images/rollout/1.png": image(1)})
    names = ("train_aes", "train_tf", "test_aes", "test_tf")
    return {
        **{f"{name}.json": (json.dumps(record) + "\n").encode() for name in names},
        "rollout.json": b"[]",
        **split_in_parts(archive, "images.tar", ["part00", "part01"]),
    }


def imagereward_db():
    ranks = {("p1", "People"): [1, 2, 2], ("p2", "Animals"): [2, 1]}
    rows, archives = [], {"test_1": {}, "test_2": {}}
    for i, ((prompt_id, kind), prompt_ranks) in enumerate(ranks.items()):
        for j, rank in enumerate(prompt_ranks):
            name = f"{prompt_id}_{j}.webp"
            archives[f"test_{i + 1}"][name] = image(10 * i + j)
            rows.append(
                {
                    "image_path": f"images/test/test_{i + 1}/{name}",
                    "prompt_id": prompt_id,
                    "prompt": f"prompt {prompt_id}",
                    "classification": kind,
                    "image_amount_in_total": len(prompt_ranks),
                    "rank": rank,
                    "overall_rating": 8 - rank,
                    "image_text_alignment_rating": 5,
                    "fidelity_rating": 6,
                }
            )
    numbers = "image_amount_in_total rank overall_rating image_text_alignment_rating fidelity_rating".split()
    types = dict.fromkeys(("image_path", "prompt_id", "prompt", "classification"), STRING) | dict.fromkeys(
        numbers, Value("int32")
    )
    return {
        "ImageRewardDB.py": b"1/0",
        "metadata-test.parquet": parquet(rows[:2] + rows[3:] + rows[2:3], **types),  # a prompt's images lie apart
        **{f"images/test/{name}.zip": zipped(members) for name, members in archives.items()},
    }


def open_image_preferences(count=1):
    texts = ("prompt", "chosen_model", "rejected_model", "evolution", "category", "sub_category")
    row = {
        **dict.fromkeys(texts, "text"),
        "id": 3,
        "prompt": "a knight",
        "category": "Anime",
        "chosen": encoded(1),
        "rejected": encoded(0),
    }
    more = [
        {**row, "id": 3 + i, "prompt": f"a knight {i}", "chosen": encoded(2 * i + 1), "rejected": encoded(2 * i)}
        for i in range(1, count)
    ]
    types = {"id": INTEGER, **dict.fromkeys(texts, STRING), "chosen": Image(), "rejected": Image()}
    return {
        "data/train-00000-of-00001.parquet": parquet([row, *more], **types),
        "README.md": card(train="data/train-*"),
    }


def rapidata_700k():
    rows = [
        {
            "prompt": f"prompt {i}",
            "image1": encoded(2 * i),
            "image2": encoded(2 * i + 1),
            "votes_image1": first,
            "votes_image2": second,
            "model1": "flux",
            "model2": "sd3",
            "detailed_results": "{}",
            "image1_path": "a",
            "image2_path": "b",
        }
        for i, (first, second) in enumerate([(20, 6), (0, 26), (13, 13)])
    ]
    texts = ("prompt", "model1", "model2", "detailed_results", "image1_path", "image2_path")
    types = {
        **dict.fromkeys(texts, STRING),
        **dict.fromkeys(("image1", "image2"), Image()),
        **dict.fromkeys(("votes_image1", "votes_image2"), INTEGER),
    }
    return {
        "data/train_0001-00000-of-00001.parquet": parquet(rows, **types),
        "data/train_0002-00000-of-00001.parquet": b"not to be read",
        "README.md": card(train_0001="data/train_0001-*", train_0002="data/train_0002-*"),
    }


def rapidata_pairs():
    row = {"prompt": "a cup", "image1": encoded(0), "image2": encoded(1), "model1": "a", "model2": "b"}
    shares = {"preference": (0.25, 0.75), "coherence": (0.5, 0.5), "alignment": (0.9, 0.1)}
    for dimension, values in shares.items():
        for i, value in enumerate(values, 1):
            row |= {f"weighted_results_image{i}_{dimension}": value, f"detailed_results_{dimension}": "[]"}
    types = {
        name: Image() if name in ("image1", "image2") else FLOAT if name.startswith("weighted") else STRING
        for name in row
    }
    return {"data/train-00000-of-00001.parquet": parquet([row], **types), "README.md": card(train="data/train-*")}


def genai_bench(with_videos=True):
    votes = ("leftvote", "rightvote", "tievote", "bothbad_vote")
    models = {"left_model": "a", "right_model": "b"}
    images = [
        {
            "prompt": f"prompt {i}",
            "left_image": encoded(2 * i),
            "right_image": encoded(2 * i + 1),
            "vote_type": vote,
            **models,
        }
        for i, vote in enumerate(votes)
    ]
    edits = [
        {
            "source_prompt": "a dog",
            "target_prompt": "a cat",
            "instruct_prompt": f"instruction {i}",
            "source_image": encoded(100 + i),
            "left_output_image": encoded(2 * i),
            "right_output_image": encoded(2 * i + 1),
            "vote_type": vote,
            **models,
        }
        for i, vote in enumerate(votes)
    ]
    videos = [
        {
            "prompt": f"prompt {i}",
            "left_video": f"videos/{2 * i}.mp4",
            "right_video": f"videos/{2 * i + 1}.mp4",
            "vote_type": vote,
            **models,
        }
        for i, vote in enumerate(votes)
    ]
    tables = {"image_generation": images, "image_edition": edits, "video_generation": videos}
    files = {}
    for config, rows in tables.items():
        types = {name: Image() if name.endswith("image") else STRING for name in rows[0]}
        for split in ("test", "test_v1"):
            files[f"{config}/{split}-00000-of-00001.parquet"] = parquet(rows, **types)
    if with_videos:
        files |= {f"videos/{i}.mp4": video(i) for i in range(8)}
    configs = {config: {split: f"{config}/{split}-*" for split in ("test", "test_v1")} for config in tables}
    return files | {"README.md": card(**configs)}


def mmrb2():
    def row(i, chosen, prompt_images=(), response_images=(1, 1)):
        return {
            "pair_id": f"pair{i}",
            "prompt_text": f"{'<image_1> ' * bool(prompt_images)}draw {i}",
            "prompt_images": [encoded(100 + j) for j in prompt_images],
            "prompt_source": "EvalMuse" if i % 2 else "OneIG",
            "prompt_metadata": "{}",
            "response_a_text": "<image_1>",
            "response_a_images": [encoded(2 * i)] * response_images[0],
            "response_a_model": "gpt",
            "response_b_text": "<image_1>",
            "response_b_images": [encoded(2 * i + 1)] * response_images[1],
            "response_b_model": "gemini",
            "chosen": chosen,
            "human_annotations": "[]",
        }

    tables = {
        "t2i": [row(0, "a"), row(1, "B"), row(2, "a", response_images=(2, 1))],
        "edit": [row(0, "b", [0]), row(1, "A", [1]), row(2, "A", [1, 2])],
        "interleaved": [row(0, "a")],
        "reasoning": [row(0, "a")],
    }
    types = {name: List(Image()) if name.endswith("images") else STRING for name in tables["t2i"][0]}
    return {
        **{f"{config}/test-00000-of-00001.parquet": parquet(rows, **types) for config, rows in tables.items()},
        "README.md": card(**{config: {"test": f"{config}/test-*"} for config in tables}),
    }


def editreward_bench():
    def row(kind, ranking, *candidates):
        numbers = dict(enumerate(candidates, 1))
        return {
            "id": f"{kind}_{ranking}",
            "instruction": f"instruction {ranking}",
            "dataset": kind,
            "ranking": ranking,
            "source_image": encoded(100),
            **{f"candidate_{i}": encoded(number) for i, number in numbers.items()},
            **{f"model_{i}": "m" for i in numbers},
            **{f"score_{i}": 1.0 for i in numbers},
        }

    rows = [
        row("2pair", "B>A", 0, 1),
        row("2pair", "A=B=Bad", 2, 3),
        row("2pair", "A<B", 10, 11),
        row("3pair", "C>A", 4, 5),
        row("4pair", "B>A=C>D", 6, 7, 8, 9),
    ]
    types = dict.fromkeys(("id", "instruction", "dataset", "ranking"), STRING) | {"source_image": Image()}
    for i in range(1, 5):
        types |= {f"candidate_{i}": Image(), f"model_{i}": STRING, f"score_{i}": FLOAT32}
    return {"data/train-00000-of-00001.parquet": parquet(rows, **types), "README.md": card(train="data/train-*")}


def editreward_data():
    votes = [("leftvote", 4, 2), ("rightvote", 3, 3), ("tie", 1, 4)]
    rows = [
        {
            "key": f"k{i}",
            "unique_key": f"u{i}",
            "pair_index": i,
            "instruction": f"instruction {i}",
            "source_img": encoded(100 + i),
            "left_output_image": encoded(2 * i),
            "right_output_image": encoded(2 * i + 1),
            "left_model": "qwen_edit",
            "right_model": "flux_kontext",
            **{f"{side}_overall_score": 6.0 for side in ("left", "right")},
            "left_instruction_following_score": float(left),
            "right_instruction_following_score": float(right),
            **{f"{side}_quality_aesthetic_score": 2.0 for side in ("left", "right")},
            "vote_type": vote,
            "metadata_index": i,
            "left_img_rel": "a.png",
            "right_img_rel": "b.png",
        }
        for i, (vote, left, right) in enumerate(votes)
    ]
    types = {
        name: Image()
        if name in ("source_img", "left_output_image", "right_output_image")
        else FLOAT32
        if name.endswith("score")
        else INTEGER
        if name.endswith("index")
        else STRING
        for name in rows[0]
    }
    return {"data/train-00000-of-00001.parquet": parquet(rows, **types), "README.md": card(train="data/train-*")}


def magic_brush():
    """Edits to make, without preferences: splits `train` and `dev`."""
    rows = [
        {
            "img_id": str(i),
            "turn_index": 1,
            "source_img": encoded(i),
            "mask_img": encoded(50 + i),
            "instruction": f"make it {i}",
            "target_img": encoded(100 + i),
        }
        for i in range(4)
    ]
    types = {name: Image() if name.endswith("img") else STRING for name in rows[0]} | {"turn_index": INTEGER}
    files = {split: f"data/{split}-00000-of-00001.parquet" for split in ("train", "dev")}
    return {
        **{file: parquet(rows, **types) for file in files.values()},
        "README.md": card(**{split: f"data/{split}-*" for split in files}),
    }


def rapidata_videos(from_images=False, count=1):
    row = {"prompt": "a wave", "file_name1": "wan/0.mp4", "file_name2": "wan/1.mp4", "model1": "a", "model2": "b"}
    shares = {"Preference": (0.25, 0.75), "Coherence": (0.9, 0.1), "Alignment": (0.5, 0.5)}
    for dimension, values in shares.items():
        row |= {f"weighted_results{i}_{dimension}": value for i, value in enumerate(values, 1)}
        row[f"detailedResults_{dimension}"] = "[]"
    types = {name: FLOAT if name.startswith("weighted") else STRING for name in row}
    if from_images:
        row |= {
            "file_name1": "https://assets.example.org/x/wan/0.mp4",
            "file_name2": "https://assets.example.org/x/wan/1.mp4",
            "prompt_asset": {"bytes": image(100)},
        }
        types["prompt_asset"] = {"bytes": Value("binary")}
    more = [{**row, "prompt": f"a wave {i // 2}"} for i in range(2, 2 * count)]  # each prompt in two rows
    return {
        "data/train-00000-of-00001.parquet": parquet([row, *more], **types),
        "README.md": card(train="data/train-*"),
        "Videos/wan/0.mp4": video(0),
        "Videos/wan/1.mp4": video(1),
    }


def videogen_rewardbench():
    rows = [
        "path_A,path_B,A_model,B_model,prompt,VQ,MQ,TA,Overall,fps_A,fps_B,num_frames_A,num_frames_B",
        'videos/0.mp4,videos/1.mp4,kling,sora,"a dog, running",A,same,B,A,8,8,12,12',
        "videos/2.mp4,videos/3.mp4,kling,sora,a cat,B,A,B,B,8,8,12,12",
        "videos/1.mp4,videos/3.mp4,kling,sora,a bird,same,A,B,same,8,8,12,12",
        "videos/1.mp4,videos/2.mp4,kling,sora,a fish,,A,B,,8,8,12,12",
    ]
    return {
        "videogen-rewardbench.csv": "\n".join(rows).encode(),
        "videos.zip": zipped({f"videos/{i}.mp4": video(i) for i in range(4)}),
        "README.md": card(eval="videogen-rewardbench.csv"),
    }


def videodpo():
    pairs = [
        {"video1": 0, "video2": 1, "frame_caption": "a storm", "label": 0},
        {"video1": 2, "video2": 1, "frame_caption": "a brook", "label": 0},
    ]
    return {
        "pair.json": json.dumps(pairs).encode(),
        "winvideos/000000.mp4": video(4),
        "losevideos/000000.mp4": video(5),
        "winvideos/000001.mp4": video(6),
    }
