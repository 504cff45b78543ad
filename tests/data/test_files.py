"""Own data in every form that users have it in, and what is said of rows that cannot be used."""

import csv
import functools
import http.server
import json
import os
import threading

import datasets
import pytest
from PIL import Image
from tiny_vlms import random_image

from rewarddance_hf.data.files import hold_out, load_rows, load_samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with the images 0.png to 5.png and one that is truncated. Tables may be added, each under a name of its own."""
    path = tmp_path_factory.mktemp("own")
    for i in range(6):
        random_image(i).save(path / f"{i}.png")
    (path / "cut.png").write_bytes((path / "0.png").read_bytes()[:-40])
    return path


def table(path, header, rows, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def pairs(rows):
    return [
        (row["prompt"], os.path.basename(row["chosen"]), os.path.basename(row["rejected"]), bool(row.get("tie")))
        for row in rows
    ]


WANTED = [("a", "0.png", "1.png", False), ("b", "3.png", "2.png", False), ("c", "4.png", "5.png", True)]
SAMPLES = [("a", "0.png", "1.png"), ("b", "2.png", "3.png"), ("c", "4.png", "5.png")]


@pytest.mark.parametrize(
    ("names", "values", "options"),
    [
        (["label"], [["1"], ["2"], ["tie"]], {}),
        (["winner"], [["left"], ["Right"], ["both"]], {"columns": "label=winner"}),
        (["label"], [["image_1"], ["image_2"], ["tie"]], {}),
        (["label"], [["1"], ["0"], ["0.5"]], {"label_values": ["1", "0", "0.5"]}),
        (["votes_1", "votes_2"], [["3", "1"], ["0", "5"], ["2", "2"]], {}),
        (["score_1", "score_2"], [["0.5", "0.1"], ["-1", "3e2"], ["7", "7.0"]], {}),
    ],
)
def test_winners(folder, names, values, options):
    """Labels, votes and scores say which of two samples is chosen; equal ones are ties, and votes have margins."""
    path = table(
        folder / "winners.csv",
        ["prompt", "image_1", "image_2", *names],
        [[*sample, *value] for sample, value in zip(SAMPLES, values, strict=True)],
    )
    rows = load_rows(path, **options)
    assert pairs(rows) == WANTED
    margins = [row["margin"] for row in rows]
    assert margins == (pytest.approx([1.0986, 4.5951, 0.0], abs=1e-3) if "votes_1" in names else [None] * 3)


def test_forms(folder, tmp_path):
    """CSV with any delimiter, JSON lines, JSON, Parquet, `metadata.csv` in a folder, and a saved dataset give the same rows."""
    columns = "prompt=caption,chosen=a,rejected=b"
    records = [{"caption": prompt, "a": first, "b": second, "id": 1} for prompt, first, second in SAMPLES]
    cells = [list(record.values()) for record in records]
    header = list(records[0])
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    (folder / "list.json").write_text(json.dumps(records))
    datasets.Dataset.from_list(records).to_parquet(folder / "rows.parquet")
    forms = {
        "comma.csv": table(folder / "comma.csv", header, cells),
        "semicolon.csv": table(folder / "semicolon.csv", header, cells, ";"),
        "tabs.tsv": table(folder / "tabs.tsv", header, cells, "\t"),
        **{name: folder / name for name in ("lines.jsonl", "list.json", "rows.parquet")},
    }
    images = tmp_path / "images"
    images.mkdir()
    for i in range(6):
        (images / f"{i}.png").write_bytes((folder / f"{i}.png").read_bytes())
    table(
        images / "metadata.csv",
        ["chosen_file_name", "rejected_file_name", "prompt"],
        [[b, c, a] for a, b, c in SAMPLES],
    )
    want = [(*sample, False) for sample in SAMPLES]
    for name, path in forms.items():
        assert pairs(load_rows(path, columns=columns)) == want, name
    assert pairs(load_rows(images)) == want
    loaded = load_rows(images)
    loaded.cast_column("chosen", datasets.Image()).save_to_disk(tmp_path / "saved")
    saved = load_rows(tmp_path / "saved")
    assert [row["prompt"] for row in saved] == ["a", "b", "c"]
    assert pairs(load_rows(forms["comma.csv"], "train[1:]", columns=columns)) == want[1:]
    assert "not used: id" in load_rows(forms["comma.csv"], columns=columns).info.description


def test_a_winner_in_a_table_of_images(tmp_path):
    """Images in a saved dataset are put in order by the label, and stay encoded."""
    rows = [
        {"prompt": "a", "image_1": random_image(1), "image_2": random_image(2), "label": 2},
        {"prompt": "b", "image_1": random_image(3), "image_2": random_image(4), "label": 1},
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path)
    loaded = load_rows(tmp_path).cast_column("chosen", datasets.Image())
    for row, seed in zip(loaded, (2, 3), strict=True):
        assert row["chosen"].tobytes() == random_image(seed).tobytes()


@pytest.mark.parametrize(
    ("header", "row", "options", "message"),
    [
        (["prompt", "chosen"], ["a", "0.png"], {}, "lacks the columns ['rejected']; it has ['prompt', 'chosen']"),
        (["caption", "chosen", "rejected"], ["a", "0.png", "1.png"], {}, "--columns prompt=caption"),
        (["prompt", "chosen", "rejected"], ["a", "0.png", "gone.png"], {}, "bad.csv, line 3: `rejected`: there is no file"),
        (["prompt", "chosen", "rejected"], ["a", "cut.png", "1.png"], {}, "cut.png"),
        (["prompt", "chosen", "rejected"], ["a", "1.png", "1.png"], {}, "line 3: `chosen` and `rejected` are the same"),
        (["prompt", "chosen", "rejected"], ["", "0.png", "1.png"], {}, "`prompt` of bad.csv, line 3 is None"),
        (["prompt", "chosen", "rejected"], ["a", "b", "0.png", "1.png"], {}, "line 3: it has 4 cells under 3 columns"),
        (["prompt", "chosen", "rejected"], ["a", "0.png", "1.png"], {"columns": "prompt=text"}, "columns ['text']"),
        (["prompt", "chosen", "rejected"], ["a", "0.png", "1.png"], {"columns": "win=a"}, "`columns` names ['win']"),
        (["prompt", "image_1", "image_2"], ["a", "0.png", "1.png"], {}, "nothing says which is better"),
        (["prompt", "image_1", "image_2", "label"], ["a", "0.png", "1.png", "C"], {}, "line 3: the label 'label' is 'C'"),
        (["prompt", "image_1", "image_2", "votes_1", "votes_2"], ["a", "0.png", "1.png", "-1", "x"], {}, "'x'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(folder, header, row, options, message):
    """File, line and column of what cannot be used are in the error."""
    good = {
        "prompt": "a",
        "caption": "a",
        "chosen": "2.png",
        "rejected": "3.png",
        "image_1": "2.png",
        "image_2": "3.png",
    }
    path = table(folder / "bad.csv", header, [[good.get(name, "1") for name in header], row])
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        load_rows(path, **options)
    assert message in str(raised.value)


def test_labels_with_two_readings(folder):
    """0 and 1 may be indices or "the first one wins": it has to be said which."""
    path = table(folder / "binary.csv", ["prompt", "image_1", "image_2", "label"], [["a", "0.png", "1.png", "0"]])
    with pytest.raises(ValueError, match="may be the index of the better sample, or whether the first one is better"):
        load_rows(path)
    assert pairs(load_rows(path, label_values=["0", "1"])) == [("a", "0.png", "1.png", False)]
    assert pairs(load_rows(path, label_values=["1", "0"])) == [("a", "1.png", "0.png", False)]


def test_bad_rows_can_be_skipped(folder):
    """With `skip_bad_rows` the others are used, and those left out are counted."""
    cells = [["a", "0.png", "1.png"], ["b", "cut.png", "1.png"], ["c", "gone.png", "1.png"], ["d", "2.png", "3.png"]]
    path = table(folder / "some.csv", ["prompt", "chosen", "rejected"], cells)
    with pytest.raises(
        ValueError, match=r"2 of 4 rows of some.csv cannot be used\. some.csv, line 3: .*--skip-bad-rows"
    ):
        load_rows(path)
    rows = load_rows(path, skip_bad_rows=True)
    assert [row["prompt"] for row in rows] == ["a", "d"]


def test_missing_files_and_empty_folders(tmp_path):
    """A path is looked for on the disk only, and what is not there is said at once."""
    with pytest.raises(ValueError, match="There is no file or folder './pairs.csv'"):
        load_rows("./pairs.csv")
    with pytest.raises(ValueError, match="has neither a table .* nor images"):
        load_rows(tmp_path)
    (tmp_path / "empty.csv").write_text("prompt,chosen,rejected\n")
    with pytest.raises(ValueError, match="has no rows"):
        load_rows(tmp_path / "empty.csv")


def test_hold_out_keeps_prompts_together():
    """Rows of one prompt are on one side, whatever their order; adding prompts moves none from one side to the other."""
    rows = datasets.Dataset.from_list([{"prompt": str(i // 3), "row": i} for i in range(300)])
    train, test = hold_out(rows, 0.1)
    assert (len(train), len(test)) == (270, 30)
    assert not set(train["prompt"]) & set(test["prompt"])
    assert set(hold_out(rows.shuffle(seed=1), 0.1)[1]["row"]) == set(test["row"])
    with pytest.raises(ValueError, match="that is all 100 prompts"):
        hold_out(rows, 300)


def test_samples_to_be_scored(folder, tmp_path):
    """A folder of images needs no table; rows that cannot be scored are named, and the others stay."""
    path = table(folder / "samples.csv", ["file_name", "prompt"], [["0.png", "a"], ["cut.png", "b"], ["1.png", ""]])
    rows, problems = load_samples(path)
    assert [os.path.basename(row["image"]) for row in rows] == ["0.png", "cut.png", "1.png"]
    assert sorted(problems) == [1, 2]
    assert "samples.csv, line 3" in problems[1]
    assert "cut.png" in problems[1]
    (tmp_path / "0.png").write_bytes((folder / "0.png").read_bytes())
    assert load_samples(tmp_path, defaults={"prompt": "a"}) == (
        [{"prompt": "a", "image": str(tmp_path / "0.png")}],
        {},
    )


def test_addresses_are_downloaded(folder, tmp_path, monkeypatch):
    """Images on the web are fetched into the cache; one that is not there is a bad row with its address."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "cache"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        cells = [["a", f"{base}/0.png", f"{base}/1.png"], ["b", f"{base}/2.png", f"{base}/gone.png"]]
        path = table(tmp_path / "web.csv", ["prompt", "chosen", "rejected"], cells)
        (row,) = load_rows(path, skip_bad_rows=True)
        with pytest.raises(ValueError, match=r"line 3: `rejected` 'http://[^']*/gone.png' cannot be downloaded"):
            load_rows(path)
        server.shutdown()
    assert Image.open(row["chosen"]).tobytes() == random_image(0).tobytes()
