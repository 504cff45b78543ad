"""Tests of clips: every kind of file gives the same frames, those that were asked for, and damage is never judged."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vlms import random_image
from transformers.dynamic_module_utils import get_imports

from rewarddance_hf import RewardDanceScorer
from rewarddance_hf.data.collator import DataCollatorForRewardDance
from rewarddance_hf.models import RewardDanceProcessor, video_rewarddance
from rewarddance_hf.models.clips_rewarddance import Clip, sample_frame_indices
from rewarddance_hf.models.media_rewarddance import load_frames, open_clip


EXACT = {"rtol": 0, "atol": 0}
SIZE = (48, 32)
FRAMES = [random_image(i, *SIZE) for i in range(12)]
FPS = 8
LOSSLESS = {"GIF": {}, "WEBP": {"lossless": True}, "PNG": {}}


def pixels_of(frames):
    return np.stack([np.asarray(frame) for frame in frames])


def animation(kind, frames=FRAMES, **arguments):
    buffer = io.BytesIO()
    options = {**LOSSLESS[kind], "duration": 1000 // FPS, "loop": 0, **arguments}
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], **options)
    return buffer.getvalue()


def video(frames=FRAMES, kind="matroska", codec="ffv1", fps=FPS, audio_seconds=0.0, **options):
    """Video file; `ffv1` loses nothing."""
    av = pytest.importorskip("av", exc_type=ImportError)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        streams = []
        if frames:
            stream = container.add_stream(codec, rate=fps, options={k: str(v) for k, v in options.items()})
            stream.width, stream.height = frames[0].size
            stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
            stream.codec_context.gop_size = 4
            streams.append((stream, [av.VideoFrame.from_image(frame) for frame in frames]))
        if audio_seconds:
            stream = container.add_stream("aac", rate=8000, layout="mono")
            sound = av.AudioFrame.from_ndarray(np.zeros((1, int(8000 * audio_seconds)), "float32"), "fltp", "mono")
            sound.sample_rate = 8000
            streams.append((stream, [sound]))
        for stream, content in streams:
            for frame in [*content, None]:
                container.mux(stream.encode(frame))
    return buffer.getvalue()


def mp4(frames=FRAMES, **options):
    return video(frames, "mp4", "mpeg4", **options)


# ------------------------------------------------------------------------------------------------- which frames


@pytest.mark.parametrize("count", [2, 3, 7, 16])
def test_frames_at_equal_distances(count):
    """First and last are always there, gaps differ by one at most, and short clips give all they have."""
    for length in range(2, 40):
        indices = sample_frame_indices(length, num_frames=count)
        assert indices == sample_frame_indices(length, max_frames=count)
        assert len(indices) == min(length, count)
        assert (indices[0], indices[-1]) == (0, length - 1)
        gaps = np.diff(indices)
        assert gaps.min() >= 1
        assert gaps.max() - gaps.min() <= 1
    assert sample_frame_indices(9) == list(range(9))


def test_frames_by_time():
    """Frames are those nearest to each wanted moment, by their own times where these are irregular."""
    times = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.1, 50)).tolist()
    for fps in (1, 2.5, 8):
        moments = np.arange(times[0], times[-1] + 1e-9, 1 / fps)
        nearest = [min(range(50), key=lambda i, moment=moment: abs(times[i] - moment)) for moment in moments]
        assert sample_frame_indices(50, fps=fps, times=times) == sorted(set(nearest))
    assert sample_frame_indices(50, fps=1000, times=times) == list(range(50))
    assert sample_frame_indices(50, fps=8, times=times, max_frames=3) == [0, nearest[len(nearest) // 2], nearest[-1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 1}, "`num_frames` is 1, but a clip has 2 frames or more"),
        ({"num_frames": 2.0}, "`num_frames` is 2.0"),
        ({"max_frames": 0}, "`max_frames` is 0"),
        ({"max_frames": True}, "`max_frames` is True"),
        ({"fps": 0, "times": [0.0]}, "`fps` is 0, but must be a positive number"),
        ({"fps": float("inf"), "times": [0.0]}, "`fps` is inf"),
        ({"fps": 2}, "`fps` is 2, but `times` is None"),
        ({"fps": 2, "num_frames": 3}, "`num_frames` is 3 and `fps` is 2, but only one of them can choose"),
    ],
)
def test_wrong_sampling_is_refused(arguments, message):
    """A setting that cannot be meant is an error, also when a processor is made."""
    with pytest.raises(ValueError, match=message):
        sample_frame_indices(5, **arguments)


def test_sampling_is_a_setting_of_the_checkpoint(vlm_folder, tmp_path):
    """A judge sees as many frames as it was trained with, wherever it is loaded."""
    settings = {"fps": 4.0, "max_frames": 5, "max_clip_tokens": 1000}
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"), **settings)
    processor.save_pretrained(tmp_path)
    loaded = RewardDanceProcessor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in ("num_frames", *settings)} == {"num_frames": None, **settings}
    assert loaded.load_frames(Clip(FRAMES, fps=FPS)).indices == [0, 2, 6, 8, 10]
    assert RewardDanceProcessor.from_pretrained(tmp_path, fps=None, num_frames=2).load_frames(FRAMES).indices == [
        0,
        11,
    ]
    with pytest.raises(ValueError, match="`max_frames` is 1"):
        RewardDanceProcessor.from_pretrained(tmp_path, max_frames=1)
    with pytest.raises(ValueError, match="`max_clip_tokens` is 0"):
        RewardDanceProcessor.from_pretrained(tmp_path, max_clip_tokens=0)


def test_frame_of_no_known_time(vlm_folder):
    """Lists have no times: what to do is said, instead of taking frames that are not those of the training."""
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"), fps=4)
    with pytest.raises(ValueError, match=r"`images\[1\]` has no times.*Clip\(frames, fps=...\)"):
        processor([Clip(FRAMES, fps=FPS), FRAMES], ["a", "b"])


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl", "llava_onevision", "gemma3", "smolvlm"])
def test_token_budget(family, vlm_folder):
    """Frames of a clip take no more tokens than allowed, and nearly as many."""
    base = RewardDanceProcessor.from_pretrained(vlm_folder(family))
    per_frame = base([FRAMES[:3]], ["a"])["input_ids"].shape[1] - base([FRAMES[:2]], ["a"])["input_ids"].shape[1]
    processor = RewardDanceProcessor.from_pretrained(vlm_folder(family), max_clip_tokens=5 * per_frame)
    taken = len(processor.load_frames(FRAMES))
    text = per_frame - processor.count_frame_tokens(SIZE)  # "Image 1, frame 2: " is no token of a frame
    assert 0 <= text < 25
    assert taken == min(12, 5 * per_frame // (per_frame - text))
    with pytest.raises(ValueError, match="`max_clip_tokens` is 1, but a frame of `images\\[0\\]` takes [0-9]+ tokens"):
        RewardDanceProcessor.from_pretrained(vlm_folder(family), max_clip_tokens=1)([FRAMES], ["a"])


# ---------------------------------------------------------------------------------------------------- reading


def sources():
    pixels = pixels_of(FRAMES)
    tensor = torch.tensor(pixels).permute(0, 3, 1, 2)
    yield from (FRAMES, tuple(FRAMES), pixels, tensor, tensor / 255, Clip(FRAMES), Clip(FRAMES, fps=FPS))
    yield from (animation("WEBP"), animation("PNG"))


def test_all_sources_give_the_same_frames(tmp_path):
    """Lists, tensors, arrays and lossless files, by path or as bytes, are the same clip."""
    wanted = pixels_of(FRAMES)
    for source in sources():
        np.testing.assert_array_equal(pixels_of(load_frames(source)), wanted)
    for kind in ("WEBP", "PNG"):
        path = tmp_path / f"clip.{kind}"
        path.write_bytes(animation(kind))
        for source in (
            path,
            str(path),
            {"bytes": path.read_bytes(), "path": None},
            {"bytes": None, "path": str(path)},
        ):
            np.testing.assert_array_equal(pixels_of(load_frames(source)), wanted)
        with Image.open(path) as opened:
            opened.seek(3)
            np.testing.assert_array_equal(pixels_of(load_frames(opened)), wanted)
            assert opened.tell() == 3  # the caller's image is left as it was


def test_animations_know_their_times():
    """Durations of frames are read, also where they differ; a GIF has 256 colors, but no other frames."""
    for kind in LOSSLESS:
        clip = load_frames(animation(kind, duration=[100 * (1 + i % 3) for i in range(12)]))
        wanted = np.cumsum([0, *(0.1 * (1 + i % 3) for i in range(11))])
        np.testing.assert_allclose(clip.times, wanted, atol=1e-6)
        assert np.abs(pixels_of(clip).astype(int) - pixels_of(FRAMES)).mean() < 12
    assert len(load_frames(animation("PNG", FRAMES[:1]))) == 1


def test_images_of_several_pages_are_no_clips():
    """The second image in a photograph (MPO) is no later moment."""
    buffer = io.BytesIO()
    FRAMES[0].save(buffer, "MPO", save_all=True, append_images=FRAMES[1:3])
    assert Image.open(buffer).n_frames == 3
    assert open_clip(buffer.getvalue()) is None
    assert len(load_frames(buffer.getvalue())) == 1


def test_video_files_give_the_same_frames(tmp_path):
    """A lossless video is its frames, by path or as bytes, with times of its rate."""
    data = video()
    path = tmp_path / "clip.mkv"
    path.write_bytes(data)
    for source in (
        data,
        path,
        str(path),
        {"bytes": data, "path": "elsewhere.mkv"},
        {"bytes": None, "path": str(path)},
    ):
        clip = load_frames(source)
        np.testing.assert_array_equal(pixels_of(clip), pixels_of(FRAMES))
        np.testing.assert_allclose(clip.times, np.arange(12) / FPS, atol=1e-3)
    with_sound = load_frames(video(FRAMES, "matroska", audio_seconds=4.0))
    np.testing.assert_array_equal(pixels_of(with_sound), pixels_of(FRAMES))


@pytest.mark.parametrize("kind", ["mp4", "matroska", "avi", "mpegts", "mov"])
def test_only_needed_frames_are_decoded(kind, monkeypatch, vlm_folder):
    """Chosen frames equal those of a full decoding in order, and decoding starts at the last key frame before each."""
    data = video(FRAMES * 3, kind, "mpeg4", bf=2) if kind != "avi" else video(FRAMES * 3, kind, "mpeg4")
    wanted = load_frames(data)
    assert len(wanted) == 36
    converted, decoded = [], []
    image = video_rewarddance._image
    monkeypatch.setattr(video_rewarddance, "_image", lambda frame: converted.append(frame) or image(frame))
    decode = video_rewarddance._decode_by_time

    class Counting:
        def __init__(self, container):
            self.container = container

        def seek(self, *arguments, **named):
            self.container.seek(*arguments, **named)

        def decode(self, stream):
            for frame in self.container.decode(stream):
                decoded.append(frame.pts)
                yield frame

    monkeypatch.setattr(video_rewarddance, "_decode_by_time", lambda c, *rest: decode(Counting(c), *rest))
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"), num_frames=4)
    clip = processor.load_frames(data)
    assert clip.indices == [0, 12, 23, 35]
    assert clip.num_source_frames == 36
    np.testing.assert_array_equal(pixels_of(clip), pixels_of([wanted[i] for i in clip.indices]))
    if kind != "mpegts":  # which cannot be told where to go, and is decoded in order
        assert len(converted) == 4
    if kind not in ("avi", "mpegts"):
        assert len(decoded) <= 16


def test_turned_video():
    """Phones store the rotation beside the pixels."""
    data = bytearray(mp4())
    matrix = data.index(b"tkhd") + 44
    turned = [0, 0x10000, 0, -0x10000, 0, 0, SIZE[1] << 16, 0, 0x40000000]
    data[matrix : matrix + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in turned)
    upright, rotated = load_frames(mp4()), load_frames(bytes(data))
    np.testing.assert_array_equal(pixels_of(rotated), np.rot90(pixels_of(upright), k=-1, axes=(1, 2)))


# --------------------------------------------------------------------------------------------------- the question


def test_judge_is_told_number_and_time(vlm_folder):
    """Frames are numbered as in their clip; where times are known they are said; all else is as for lists of frames."""
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("qwen2_5_vl"), num_frames=3)

    def text(clip, reference=None):
        batch = processor([clip], ["x"], None if reference is None else [reference], task="text-to-video")
        return processor.tokenizer.decode(batch["input_ids"][0])

    plain = text(FRAMES[:3], FRAMES[3:6])
    for number in (1, 2, 3):
        assert f"Video 1, frame {number}: " in plain
        assert f"Video 2, frame {number}: " in plain
    sampled = text(FRAMES)
    assert [f"Video, frame {number}: " in sampled for number in (1, 2, 7, 12)] == [True, False, True, True]
    timed = text(animation("PNG"))
    for number in (1, 7, 12):
        assert f"Video, frame {number} at {(number - 1) / FPS:.2f} s: " in timed
    assert timed == text(Clip(FRAMES, fps=FPS))


def test_frames_are_chosen_once(vlm_folder):
    """Who loads frames before asking gets the same question: indices and times go along."""
    for settings in ({"num_frames": 4}, {"fps": 3.0}, {"max_frames": 5}, {"max_clip_tokens": 100}):
        processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"), **settings)
        clip = Clip(FRAMES, fps=FPS)
        loaded = processor.load_frames(clip)
        assert 2 <= len(loaded) < 12
        twice = processor.load_frames(loaded)
        assert (twice.indices, twice.times, twice.num_source_frames) == (loaded.indices, loaded.times, 12)
        want, got = processor([clip], ["a"], [clip]), processor([loaded], ["a"], [load_frames(clip)])
        for name in want:
            torch.testing.assert_close(got[name], want[name], **EXACT)


# ------------------------------------------------------------------------------------------- the way of a clip


@pytest.fixture(scope="module")
def judge(vlm_folder):
    return RewardDanceScorer.from_pretrained(vlm_folder("internvl"), num_workers=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three animated files and the frames of each, 6 different ones in all."""
    folder, clips = tmp_path_factory.mktemp("clips"), [FRAMES[:3], FRAMES[2::-1], FRAMES[3:6]]
    for i, clip in enumerate(clips):
        (folder / f"{i}.webp").write_bytes(animation("WEBP", clip))
    return [folder / f"{i}.webp" for i in range(3)], [Clip(clip, fps=FPS) for clip in clips]


@pytest.mark.parametrize("engine", ["auto", "features", "plain"])
def test_scorer_takes_files(judge, files, engine):
    """A file scores as its frames do, on all paths of the scorer; a first frame stands before; each image is seen once."""
    paths, clips = files
    scorer = RewardDanceScorer(judge.model, judge.processor, engine=engine)
    context = {"conditions": [FRAMES[0], None, FRAMES[2]], "task": "image-to-video"}
    want = RewardDanceScorer(judge.model, judge.processor, engine="plain").score(clips, "a", clips[::-1], **context)
    assert want.std() > 1e-5
    got = scorer.score(paths, "a", [path.read_bytes() for path in paths[::-1]], **context)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    if engine != "plain":
        assert scorer.statistics.num_encoded == 6
    ranking, matrix = (scorer.rank(media, "a", task="text-to-video") for media in (paths, clips))
    torch.testing.assert_close(ranking.matrix, matrix.matrix, rtol=1e-5, atol=1e-6, equal_nan=True)
    verdict = scorer.compare(paths[0], clips[1], "a", task="text-to-video")
    assert verdict.probability_b == pytest.approx(
        scorer.compare(clips[0], paths[1], "a", task="text-to-video").probability_b, rel=1e-4
    )


def test_engine_shares_clips_and_first_frames(judge):
    """Candidates for one first frame and reference share both: neither is computed again, and scores stay the same."""
    samples = [FRAMES[:4], FRAMES[4:8], FRAMES[8:]]
    arguments = (samples, "a", [FRAMES[2:6]] * 3)
    context = {"conditions": [FRAMES[0]] * 3, "task": "image-to-video"}
    plain = RewardDanceScorer(judge.model, judge.processor, engine="plain")
    torch.testing.assert_close(
        judge.score(*arguments, **context), plain.score(*arguments, **context), rtol=1e-5, atol=1e-6
    )
    statistics = judge.statistics
    assert statistics.num_encoded == 12
    lengths = [judge.processor([s], ["a"], [FRAMES[2:6]], [FRAMES[0]], task="image-to-video") for s in samples]
    assert statistics.plain_tokens == sum(batch["input_ids"].shape[1] for batch in lengths)
    assert statistics.tokens == statistics.minimum_tokens < 0.75 * statistics.plain_tokens


def test_rewards_of_sampled_clips_have_a_gradient(judge, vlm_folder):
    """The gradient reaches the frames that the judge saw, and the first frame; by either path it is the same."""
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"), num_frames=3)
    samples = torch.rand(2, 7, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    condition = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    gradients = []
    for engine in ("auto", "plain"):
        scorer = RewardDanceScorer(judge.model, processor, engine=engine)
        rewards = scorer.score(
            samples, "a", [FRAMES[:3], FRAMES[3:6]], conditions=[condition, None], task="image-to-video"
        )
        gradients.append(torch.autograd.grad(rewards.log().sum(), [samples, condition]))
    for got, want in zip(*gradients, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()
    seen = gradients[0][0].abs().sum(dim=(2, 3, 4)) > 0
    assert seen.tolist() == [[True, False, False, True, False, False, True]] * 2
    assert gradients[0][1].abs().sum() > 0


def test_rows_of_files_are_collated(judge, files):
    """A training batch of files is that of their frames; a rationale speaks of videos."""
    paths, clips = files
    row = {"prompt": "a", "task": "text-to-video", "rationale": "{chosen} is smooth, {rejected} is not."}
    collate = DataCollatorForRewardDance(judge.processor, with_rationales=True)
    got = collate([{**row, "chosen": paths[0], "rejected": {"bytes": paths[1].read_bytes(), "path": None}}])
    want = collate([{**row, "chosen": clips[0], "rejected": clips[1]}])
    for name in want:
        torch.testing.assert_close(got[name], want[name], **EXACT)
    text = judge.processor.tokenizer.decode(got["input_ids"][0])
    winner = 2 if got["labels"].item() else 1
    assert f"Video {winner} is smooth, Video {3 - winner} is not." in text


# ------------------------------------------------------------------------------------------------------ bad input


def broken_files():
    """Files that were cut, and files that are no clips."""
    for kind in LOSSLESS:
        data = animation(kind)
        for share in (0.5, 0.8, 0.97):
            yield f"{kind} cut at {share}", data[: int(share * len(data))]
    for name, make in {"mp4": mp4, "mkv": video, "avi": lambda: video(FRAMES, "avi", "mpeg4")}.items():
        data = make()
        for share in (0.3, 0.6, 0.9):
            yield f"{name} cut at {share}", data[: int(share * len(data))]
    data = mp4()
    index = data.index(b"moov") - 4  # moved to the front, as for streaming: frames that it names are not there
    yield "mp4 that begins with its index", data[:32] + data[index:] + data[32 : index - 500]
    yield "text", b"no clip at all"
    yield "play list", b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n"
    yield "play list of FFmpeg", b"ffconcat version 1.0\nfile /etc/hostname\n"
    yield "video in name only", b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 4
    yield "empty", b""


def test_damaged_files(judge, tmp_path):
    """No file that was cut off is judged by what is left of it, and each is named."""
    pytest.importorskip("av")
    for kind, data in broken_files():
        path = tmp_path / "clip.mp4"
        path.write_bytes(data)
        for source in (data, path):
            with pytest.raises(
                ValueError, match="`sample` (cannot be read as (a clip|an image)|is of type)"
            ) as caught:
                load_frames(source, "sample")
            assert caught.value is not None, kind


def test_sound_without_images():
    """What is missing is said."""
    with pytest.raises(
        ValueError, match=r"`sample` cannot be read as a clip \(it has no video stream, only \['audio'\]\)"
    ):
        load_frames(video([], "mp4", audio_seconds=1.0), "sample")


def test_video_without_pyav(monkeypatch):
    """The missing library is named with the command that brings it; images and animations do without."""
    data = mp4()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        ImportError, match=r"`sample` is a video file, for which av is needed.*rewarddance_hf\[video\]"
    ):
        load_frames(data, "sample")
    assert len(load_frames(animation("PNG"))) == 12


def test_clips_of_no_or_one_frame(judge):
    """Motion cannot be seen in one frame: where it is asked for, a score would be of something else."""
    for empty in ([], torch.zeros(0, 3, 8, 8), np.zeros((0, 8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"`images\[0\]` is a clip without frames"):
            judge.score([empty], "a", [FRAMES], task="text-to-video")
    for single in (FRAMES[:1], torch.zeros(1, 3, 8, 8), mp4(FRAMES[:1])):
        with pytest.raises(
            ValueError, match=r"`references\[0\]` is a clip of a single frame, but the task 'text-to-video'"
        ):
            judge.score([FRAMES], "a", [single], task="text-to-video")
        assert judge.score([FRAMES[0]], "a", [single]).isfinite()
    row = {
        "prompt": "a",
        "task": "image-to-video",
        "chosen": FRAMES,
        "rejected": FRAMES[:1],
        "row": "train_dataset[7]",
    }
    with pytest.raises(ValueError, match=r"`rejected of train_dataset\[7\]` is a clip of a single frame"):
        DataCollatorForRewardDance(judge.processor)([row])


def test_frames_of_different_size(judge, tmp_path):
    """Frames that differ in size belong to no clip: the first that does is named, before anything is judged."""
    odd = random_image(99, SIZE[0], SIZE[1] + 2)
    odd.save(tmp_path / "odd.png")
    FRAMES[0].save(tmp_path / "even.png")
    tensors = [torch.zeros(3, 32, 48), torch.zeros(3, 34, 48)]
    for clip in (
        [FRAMES[0], odd],
        [FRAMES[0], np.asarray(odd)],
        tensors,
        [tmp_path / "even.png", tmp_path / "odd.png"],
    ):
        with pytest.raises(
            ValueError, match=r"`images\[0\]\[1\]` has size \(48, 34\), but `images\[0\]\[0\]` has \(48, 32\)"
        ):
            judge.score([clip], "a", [FRAMES])


def test_turned_photographs_are_frames_of_one_size(tmp_path):
    """What counts is the size as shown."""
    exif = Image.Exif()
    exif[0x0112] = 6
    random_image(1, *SIZE[::-1]).save(tmp_path / "turned.jpg", exif=exif)
    assert {frame.size for frame in load_frames([FRAMES[0], tmp_path / "turned.jpg"])} == {SIZE}


def test_broken_clips_cost_no_scores(judge, files, tmp_path):
    """A clip that cannot be read ends a run with its row named; what was computed before is in the file."""
    paths, _ = files
    (tmp_path / "cut.webp").write_bytes(paths[1].read_bytes()[:-50])
    rows = [{"image": path, "prompt": "a", "reference": paths[0]} for path in (*paths, tmp_path / "cut.webp")]
    with pytest.raises(ValueError, match=r"`images\[3\]` cannot be read as (a clip|an image)"):
        judge.score_dataset(rows, tmp_path / "scores.jsonl", save_every=2, show_progress=False)
    assert [json.loads(line)["row"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()] == [0, 1]


def test_checkpoints_do_not_demand_pyav():
    """Loading a checkpoint with its own code asks for what the file imports, but for what is tried only."""
    assert not set(get_imports(video_rewarddance.__file__)) - sys.stdlib_module_names - {"numpy", "torch", "PIL"}
