"""Sources: what an owner puts on disk is what the run gets, and a mistake is named together with its place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.data.records import ClientData, Record, record_digest
from fedpeft.data.sources import hold_out, load_source, write_client_folder
from fedpeft.errors import FedPeftError


def digests(records: tuple[Record, ...]) -> list[bytes]:
    return [record_digest(record) for record in records]


texts = st.text(alphabet=st.characters(exclude_categories=()), max_size=40)


@settings(max_examples=25)
@given(train=st.lists(texts, min_size=1, max_size=5), heldout=st.lists(texts, min_size=1, max_size=3))
def test_text_written_for_a_client_is_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory, train: list[str], heldout: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("client")
    data = ClientData(
        "all",
        tuple({"text": t, "label": i, "client": "ö"} for i, t in enumerate(train)),
        tuple({"text": t} for t in heldout),
    )
    write_client_folder(data, folder)
    assert load_source(str(folder), "causal-lm") == (data,)


def test_images_written_for_a_client_are_read_back_to_the_last_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = ClientData(
        "all",
        tuple(
            {"image": rng.random(shape, dtype=np.float32), "label": i} for i, shape in enumerate([(8, 8), (3, 5, 3)])
        ),
        ({"image": np.float32([[0.1, 1e-30], [1.0, 0.0]]), "label": 1},),
    )
    write_client_folder(data, tmp_path)
    (back,) = load_source(str(tmp_path), "image-classification")
    assert digests(back.train) == digests(data.train)
    assert digests(back.heldout) == digests(data.heldout)
    assert all(record["image"].dtype == np.float32 for record in back.train)


def test_a_folder_of_client_folders_gives_named_clients_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_client_folder(ClientData(name, ({"text": f"{name}1"},), ({"text": f"{name}2"},)), tmp_path / name)
    assert [c.name for c in load_source(str(tmp_path), "causal-lm")] == ["a", "b"]


def test_plain_files_parquet_and_jsonl_say_the_same(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    rows = {"train": ["x = 1\n", "y = 2\n"], "heldout": ["z = 3\n"]}
    for part, lines in rows.items():
        (tmp_path / "plain" / part).mkdir(parents=True)
        for number, text in enumerate(lines):
            (tmp_path / "plain" / part / f"{number}.py").write_text(text)
        (tmp_path / "table").mkdir(exist_ok=True)
        parquet.write_table(pyarrow.table({"text": lines}), tmp_path / "table" / f"{part}.parquet")
        (tmp_path / "json").mkdir(exist_ok=True)
        (tmp_path / "json" / f"{part}.jsonl").write_text("".join(json.dumps({"content": t}) + "\n" for t in lines))
    plain, table, jsonl = (load_source(str(tmp_path / kind), "causal-lm") for kind in ("plain", "table", "json"))
    assert plain == table == jsonl
    assert [r["text"] for r in plain[0].train] == rows["train"]


def test_class_folders_of_images_with_and_without_clients(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for client in ("one", "two"):
        for part in ("train", "heldout"):
            for label in ("3", "7"):
                folder = tmp_path / client / part / label
                folder.mkdir(parents=True)
                image.fromarray(np.full((4, 6), 51, dtype=np.uint8)).save(folder / "a.png")
    clients = load_source(str(tmp_path), "image-classification")
    assert [c.name for c in clients] == ["one", "two"]
    assert [r["label"] for r in clients[0].train] == [3, 7]
    np.testing.assert_array_equal(clients[0].heldout[0]["image"], np.full((4, 6), 0.2, dtype=np.float32))
    (tmp_path / "one" / "train" / "classes.txt").write_text("3\n7\n")
    (alone,) = load_source(str(tmp_path / "one"), "image-classification")
    assert digests(alone.train) == digests(clients[0].train)


def test_named_classes_count_in_the_order_of_classes_txt(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for shade, name in enumerate(("cat", "dog")):
        (tmp_path / "train" / name).mkdir(parents=True)
        image.fromarray(np.full((4, 4), shade, dtype=np.uint8)).save(tmp_path / "train" / name / "a.png")
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    (client,) = load_source(str(tmp_path), "image-classification")
    assert {r["label"]: float(r["image"][0, 0] * 255) for r in (*client.train, *client.heldout)} == {1: 0.0, 0: 1.0}


@given(st.lists(st.text(max_size=6), min_size=2, max_size=60).filter(lambda lines: len(set(lines)) > 1))
def test_holding_out_splits_by_content_and_never_shares_a_record(lines: list[str]) -> None:
    records = [{"text": line} for line in lines]
    train, heldout = hold_out(records, "here")
    assert sorted(map(repr, (*train, *heldout))) == sorted(map(repr, records))
    assert train
    assert heldout
    assert not {r["text"] for r in train} & {r["text"] for r in heldout}
    assert tuple(sorted(map(repr, hold_out(records[::-1], "here")[1]))) == tuple(sorted(map(repr, heldout)))


def test_about_a_tenth_is_held_out() -> None:
    _, heldout = hold_out([{"text": str(i)} for i in range(2000)], "here")
    assert 150 < len(heldout) < 250


def test_a_data_set_on_disk_is_grouped_by_its_client_column(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"{o}{i}", "client": o} for o in ("a", "b") for i in range(5)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "set"))
    clients = load_source(str(tmp_path / "set"), "causal-lm")
    assert [c.name for c in clients] == ["a", "b"]
    assert all(len(c.train) + len(c.heldout) == 5 for c in clients)


def test_a_local_folder_is_read_anew(tmp_path: Path) -> None:
    write_client_folder(ClientData("all", ({"text": "old"},), ({"text": "h"},)), tmp_path)
    assert load_source(str(tmp_path), "causal-lm")[0].train[0]["text"] == "old"
    write_client_folder(ClientData("all", ({"text": "new"},), ({"text": "h"},)), tmp_path)
    assert load_source(str(tmp_path), "causal-lm")[0].train[0]["text"] == "new"


@pytest.mark.parametrize(
    ("files", "task", "says"),
    [
        ({}, "causal-lm", "the folder holds no data for causal-lm"),
        ({"train.jsonl": '{"text": "a"}\n{oops\n'}, "causal-lm", "train.jsonl, line 2"),
        ({"train.jsonl": "[1]\n"}, "causal-lm", "a line is no JSON object"),
        ({"train.jsonl": '{"body": "a"}\n'}, "causal-lm", "no key 'text' (keys: body)"),
        ({"train.jsonl": '{"text": "a"}\n'}, "sequence-classification", "no key 'label'"),
        ({"train.jsonl": '{"text": "a"}\n'}, "causal-lm", "fewer than two different records"),
        ({"train.jsonl": ""}, "causal-lm", "there are no records"),
        ({"heldout.jsonl": '{"text": "a"}\n'}, "causal-lm", "heldout but no train"),
        ({"train.jsonl": '{"image": [[0, 255]], "label": 1}\n'}, "image-classification", "divide by 255"),
        ({"train.jsonl": '{"image": [[0], [0, 1]], "label": 1}\n'}, "image-classification", "'image' cannot be read"),
        ({"train.parquet": "no parquet"}, "causal-lm", "not a readable Parquet file"),
        ({"train/0/a.png": "no image"}, "image-classification", "not a readable image"),
    ],
)
def test_a_mistake_in_a_folder_is_named(tmp_path: Path, files: dict[str, str], task: str, says: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(FedPeftError) as error:
        load_source(str(tmp_path), task)
    assert error.value.field == "data.source"
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("spec", "task", "says"),
    [
        ("builtin:stdlbi", "causal-lm", "did you mean 'builtin:stdlib'?"),
        ("builtin:stdlib", "image-classification", "these data are for causal-lm"),
        ("builtin:stdlib", "causal-ml", "did you mean 'causal-lm'?"),
        ("./no-such-folder", "causal-lm", "no such file or folder"),
        ("nobody/has-this", "causal-lm", "the data set cannot be fetched"),
    ],
)
def test_a_mistake_in_a_spec_is_named(spec: str, task: str, says: str) -> None:
    with pytest.raises(FedPeftError) as error:
        load_source(spec, task)
    assert says in str(error.value)


def test_what_json_cannot_express_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedPeftError, match="cannot be written as JSON"):
        write_client_folder(ClientData("c", ({"text": "a", "extra": {1, 2}},), ()), tmp_path)
