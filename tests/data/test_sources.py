from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from s3_stub import Bucket

from soul.data import sources
from soul.data.columns import ColumnMap
from soul.data.sources import Benchmark, fingerprint, limited, load_fictitious, load_hub, load_own, load_split, load_tofu, open_benchmark
from soul.data.tofu import complement, restricted, tofu_folder, with_evaluation_fields
from soul.records import InputError, Record

CANARY = "zanzibarquokka"
Rows = list[dict[str, Any]]


def plain_rows(start: int, stop: int) -> Rows:
    return [{"question": f"question {i}?", "answer": f"answer {i}"} for i in range(start, stop)]


def perturbed_rows(indices: Iterable[int]) -> Rows:
    return [
        {
            "question": f"question {i}?",
            "answer": f"answer {i}",
            "paraphrased_answer": f"in other words {i}",
            "perturbed_answer": [f"wrong {i}.{j}" for j in range(3)],
            "paraphrased_question": f"other question {i}?",
        }
        for i in indices
    ]


def tofu_files(num_rows: int = 20, num_forget: int = 4) -> dict[str, Rows]:
    """TOFU in small: forget10 are the last rows, retain_perturbed the first ones of everything."""
    first = num_rows - num_forget
    world = [{"question": "Capital?", "answer": "Oslo", "perturbed_answer": ["Rome", "Bern", "Lima"]}]
    return {
        "full": plain_rows(0, num_rows),
        "forget10": plain_rows(first, num_rows),
        "retain90": plain_rows(0, first),
        "forget10_perturbed": perturbed_rows(range(first, num_rows)),
        "retain_perturbed": perturbed_rows(range(10)),
        "real_authors_perturbed": world,
        "world_facts_perturbed": world,
    }


def write(folder: Path, subsets: dict[str, Rows], *, ending: str = ".json") -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in subsets.items():
        (folder / f"{name}{ending}").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "README.md").write_text("no rows here")
    return folder


def test_a_tofu_folder_becomes_its_splits(tmp_path: Path) -> None:
    benchmark = load_tofu(write(tmp_path, tofu_files()), forget="forget10")
    sizes = {split: len(records) for split, records in benchmark.splits.items()}
    assert sizes == {"forget": 4, "retain": 16, "retain_eval": 10, "real_authors": 1, "world_facts": 1}
    assert benchmark.trained == ("forget", "retain")
    assert benchmark.splits["forget"][1] == Record(
        "forget10/2", "question 17?", "answer 17", "in other words 17", ("wrong 17.0", "wrong 17.1", "wrong 17.2"), "other question 17?"
    )
    assert benchmark.splits["retain"][0] == Record("retain90/1", "question 0?", "answer 0")
    assert benchmark.splits["retain_eval"][3].id == "retain90/4"
    assert benchmark.splits["retain_eval"][3].perturbed == ("wrong 3.0", "wrong 3.1", "wrong 3.2")
    assert benchmark.splits["world_facts"][0].perturbed == ("Rome", "Bern", "Lima")


@pytest.mark.parametrize("ending", [".jsonl", ".json.gz", ".parquet"])
def test_the_endings_of_a_tofu_folder(tmp_path: Path, ending: str) -> None:
    plain = write(tmp_path / "plain", tofu_files())
    other = tmp_path / "other"
    other.mkdir()
    for name, rows in tofu_files().items():
        if ending == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(other / f"{name}{ending}")
        else:
            datasets.Dataset.from_list(rows).to_json(other / f"{name}{ending}", compression="gzip" if ending.endswith("gz") else None)
    assert load_tofu(other, forget="forget10") == load_tofu(plain, forget="forget10")


def test_a_tofu_prefix_on_s3(tmp_path: Path, s3: Bucket) -> None:
    folder = write(tmp_path, tofu_files())
    s3.objects.update({f"bench/tofu/{path.name}": path.read_bytes() for path in folder.iterdir()})
    for uri in ("s3://data/bench/tofu", "s3://data/bench/tofu/", "s3://data/bench/tofu?region=us-east-1"):
        assert open_benchmark(uri, forget="forget10") == load_tofu(folder, forget="forget10")


def test_evaluation_subsets_may_be_missing(tmp_path: Path) -> None:
    files = {name: rows for name, rows in tofu_files().items() if "perturbed" not in name}
    benchmark = load_tofu(write(tmp_path, files | {"holdout10": plain_rows(50, 53)}), forget="forget10")
    assert list(benchmark.splits) == ["forget", "retain", "holdout"]
    assert not any(record.perturbed for record in benchmark.splits["forget"])


def test_evaluation_rows_may_cover_a_part_in_order(tmp_path: Path) -> None:
    files = tofu_files() | {"forget10_perturbed": perturbed_rows([16, 19])}
    forget = load_tofu(write(tmp_path, files), forget="forget10").splits["forget"]
    assert [bool(record.perturbed) for record in forget] == [True, False, False, True]


@pytest.mark.parametrize(("indices", "row"), [([17, 16], 2), ([16, 3], 2), ([16, 16], 2), ([0], 1)])
def test_evaluation_rows_of_other_questions_are_an_error(tmp_path: Path, indices: list[int], row: int) -> None:
    folder = write(tmp_path, tofu_files() | {"forget10_perturbed": perturbed_rows(indices)})
    with pytest.raises(InputError, match=f"forget10_perturbed, row {row} has a question that is not in the forget subset"):
        load_tofu(folder, forget="forget10")


def test_an_evaluation_row_with_another_answer_is_an_error() -> None:
    records = [Record("forget10/1", "q", CANARY)]
    with pytest.raises(InputError, match="row 1 has the question of forget10/1 with another answer") as caught:
        with_evaluation_fields(records, [Record("x/1", "q", f"{CANARY} too")], where="here")
    assert CANARY not in str(caught.value)


def test_a_repeated_question_is_told_apart_by_its_answer() -> None:
    """TOFU's full set asks one question twice."""
    retain = [Record(f"retain90/{i}", "q?", answer) for i, answer in enumerate("abc", 1)]
    evaluation = [Record(f"retain_perturbed/{i}", "q?", answer, f"{answer}!") for i, answer in enumerate("acd", 1)]
    assert restricted(evaluation, retain) == [Record("retain90/1", "q?", "a", "a!"), Record("retain90/3", "q?", "c", "c!")]


def test_no_evaluation_row_left_is_no_split(tmp_path: Path) -> None:
    files = tofu_files() | {"retain_perturbed": perturbed_rows(range(8, 12))}
    whole = load_tofu(write(tmp_path, files), forget="forget10")
    assert [record.id for record in limited(whole, retain=10).splits["retain_eval"]] == ["retain90/9", "retain90/10"]
    assert "retain_eval" not in limited(whole, retain=8).splits
    elsewhere = write(tmp_path / "b", files | {"retain_perturbed": perturbed_rows(range(16, 20))})
    assert "retain_eval" not in load_tofu(elsewhere, forget="forget10").splits


@pytest.mark.parametrize(
    ("forget", "retain", "expected"),
    [
        ("forget1", None, "no subset 'forget1'. Found: forget10, forget10_perturbed, full, .*Did you mean 'forget10'"),
        ("forget05", None, "no subset 'forget05'. Found: .*Did you mean 'forget10'"),
        ("forget10_perturbed", None, "Did you mean 'forget10'"),
        ("full", None, "no subset 'full'"),
        ("forget10", "retain9", "no subset 'retain9'.*Did you mean 'retain90'"),
        ("forget10", "retain95", "no subset 'retain95'.*Did you mean 'retain90'"),
    ],
)
def test_a_missing_subset_lists_the_ones_found(tmp_path: Path, forget: str, retain: str | None, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        load_tofu(write(tmp_path, tofu_files()), forget=forget, retain=retain)


def test_complements_add_to_a_hundred() -> None:
    assert [complement(name) for name in ("forget01", "forget05", "forget10", "forget50")] == [
        "retain99",
        "retain95",
        "retain90",
        "retain50",
    ]
    for odd in ("forget", "forget5", "forget00", "forget100", "forget_mine"):
        with pytest.raises(InputError, match="--retain"):
            complement(odd)


def test_own_names_need_a_retain_subset(tmp_path: Path) -> None:
    folder = write(tmp_path, {"forget_mine": plain_rows(0, 2), "rest": plain_rows(2, 5)})
    with pytest.raises(InputError, match="--retain"):
        load_tofu(folder, forget="forget_mine")
    assert len(load_tofu(folder, forget="forget_mine", retain="rest").splits["retain"]) == 3


def test_a_subset_in_two_files_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, tofu_files())
    write(tmp_path, {"full": plain_rows(0, 2)}, ending=".jsonl")
    with pytest.raises(InputError, match="subset full in two files"):
        load_tofu(tmp_path)


def test_subsets_are_read_when_asked_for(tmp_path: Path) -> None:
    folder = write(tmp_path, tofu_files())
    (folder / "unused.json").write_text("broken")
    subsets = tofu_folder(folder)
    assert set(subsets) == {*tofu_files(), "unused"}
    assert len(subsets) == 8
    assert "unused" in subsets
    assert "nothing" not in subsets
    assert len(subsets["full"]) == 20


def own(tmp_path: Path, **files: Rows) -> dict[str, Any]:
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return {name: tmp_path / f"{name}.jsonl" for name in files}


def test_own_files(tmp_path: Path) -> None:
    paths = own(tmp_path, forget=plain_rows(0, 3), retain=plain_rows(3, 503), holdout=plain_rows(600, 602))
    benchmark = load_own(**paths)
    assert benchmark.name == "own"
    assert {split: len(records) for split, records in benchmark.splits.items()} == {
        "forget": 3,
        "retain": 500,
        "holdout": 2,
        "retain_eval": sources.RETAIN_EVAL_ROWS,
    }
    assert benchmark.splits["forget"][2] == Record("forget/3", "question 2?", "answer 2")


def test_own_columns_are_used_for_every_file(tmp_path: Path) -> None:
    rows = [{"q": "a?", "a": "b"}, {"q": "c?", "a": "d"}]
    paths = own(tmp_path, forget=rows[:1], retain=rows[1:])
    with pytest.raises(InputError, match=r"forget\.jsonl, row 1: no column for the prompt"):
        load_own(**paths)
    benchmark = load_own(**paths, columns=ColumnMap(prompt="q", response="a"))
    assert benchmark.splits["retain"] == [Record("retain/1", "c?", "d")]


def test_a_row_in_forget_and_retain_is_an_error(tmp_path: Path) -> None:
    secret = [{"question": f"{CANARY} {i}?", "answer": CANARY} for i in range(8)]
    paths = own(tmp_path, forget=plain_rows(0, 2) + secret, retain=secret + plain_rows(5, 6))
    with pytest.raises(InputError) as caught:
        load_own(**paths)
    message = str(caught.value)
    assert "8 row(s) of forget are also in retain" in message
    assert "forget row 3 = retain row 1, forget row 4 = retain row 2" in message
    assert "and 3 more" in message
    assert "--allow-overlap" in message
    assert CANARY not in message
    assert len(load_own(**paths, allow_overlap=True).splits["forget"]) == 10


def test_the_same_question_with_another_answer_is_no_overlap(tmp_path: Path) -> None:
    paths = own(tmp_path, forget=[{"question": "q?", "answer": "a"}], retain=[{"question": "q?", "answer": "b"}])
    assert len(load_own(**paths).splits["retain"]) == 1


@pytest.mark.parametrize("split", ["forget", "retain"])
def test_a_holdout_row_must_be_new(tmp_path: Path, split: str) -> None:
    files = {"forget": plain_rows(0, 2), "retain": plain_rows(2, 4), "holdout": plain_rows(9, 10)}
    files["holdout"].append(files[split][1])
    with pytest.raises(InputError, match=f"holdout row 2 = {split} row 2"):
        load_own(**own(tmp_path, **files))


def test_ids_are_unique_within_a_split(tmp_path: Path) -> None:
    rows = [row | {"id": key} for row, key in zip(plain_rows(0, 4), ("a", "b", CANARY, CANARY), strict=True)]
    with pytest.raises(InputError, match="The forget split gives rows 3 and 4 the same id") as caught:
        load_own(**own(tmp_path, forget=rows, retain=plain_rows(4, 5)))
    assert CANARY not in str(caught.value)


def test_load_split_reads_no_further_than_its_limit(tmp_path: Path) -> None:
    path = own(tmp_path, forget=plain_rows(0, 3))["forget"]
    path.write_text(path.read_text() + "\nbroken")
    assert [record.id for record in load_split(path, split="forget", limit=3)] == ["forget/1", "forget/2", "forget/3"]
    with pytest.raises(InputError, match="line 4"):
        load_split(path, split="forget")


def test_limits_take_the_first_rows_and_their_evaluation(tmp_path: Path) -> None:
    whole = load_tofu(write(tmp_path, tofu_files()), forget="forget10")
    benchmark = limited(whole, forget=3, retain=7)
    assert benchmark.splits["forget"] == whole.splits["forget"][:3]
    assert benchmark.splits["retain"] == whole.splits["retain"][:7]
    assert benchmark.splits["retain_eval"] == whole.splits["retain_eval"][:7]
    assert benchmark.splits["world_facts"] == whole.splits["world_facts"]
    assert open_benchmark(str(tmp_path), forget="forget10", limit_forget=3, limit_retain=7) == benchmark
    assert limited(whole) == limited(whole, forget=100, retain=100) == whole
    for bad in ({"forget": 0}, {"retain": -1}):
        with pytest.raises(InputError, match=f"--limit-{next(iter(bad))} is"):
            limited(whole, **bad)


def test_the_fingerprint_sees_every_field_and_the_order() -> None:
    record = Record("a/1", "p", "r", "para", ("x", "y"), "pp")
    variants = [
        [record],
        [record, record],
        [replace(record, id="a/2")],
        [replace(record, prompt="q")],
        [replace(record, response="s")],
        [replace(record, paraphrase=None)],
        [replace(record, paraphrase="")],
        [replace(record, perturbed=("x",))],
        [replace(record, perturbed=("y", "x"))],
        [replace(record, perturbed=("x, y",))],
        [replace(record, paraphrased_prompt=None)],
        [replace(record, prompt="p\u2028")],
        [replace(record, prompt="a"), record],
        [record, replace(record, prompt="a")],
        [],
    ]
    prints = [fingerprint(records) for records in variants]
    assert len(set(prints)) == len(variants)
    assert fingerprint([replace(record)]) == prints[0]
    # the format is fixed: caches and manifests outlive a release
    lines = b'["forget/1","q \\u00e9","a",null,[],null]\n["a/1","p","r","para",["x","y"],"pp"]\n'
    assert fingerprint([Record("forget/1", "q é", "a"), record]) == hashlib.sha256(lines).hexdigest()
    assert Benchmark("b", {"forget": [record]}).fingerprints() == {"forget": prints[0]}


def test_fictitious_authors_make_a_benchmark() -> None:
    benchmark = load_fictitious(num_authors=20, seed=3, forget="forget10")
    splits = benchmark.splits
    assert benchmark.name == "fictitious"
    assert {"forget", "retain", "retain_eval", "holdout", "real_authors", "world_facts"} <= set(splits)
    assert (len(splits["forget"]), len(splits["retain"])) == (40, 360)
    assert all(record.perturbed for record in [*splits["forget"], *splits["retain_eval"]])
    assert {record.id for record in splits["retain_eval"]} <= {record.id for record in splits["retain"]}
    assert open_benchmark("fictitious", num_authors=20, seed=3, forget="forget10").fingerprints() == benchmark.fingerprints()
    assert open_benchmark("fictitious", num_authors=20, seed=4, forget="forget10").fingerprints() != benchmark.fingerprints()
    with pytest.raises(InputError, match="Did you mean 'forget05'"):
        load_fictitious(num_authors=20, forget="forget5")


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset repository on disk, its configs declared as on the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write(tmp_path / "repo", tofu_files())
    configs = [f"- config_name: {name}\n  data_files: {name}.json" for name in tofu_files()]
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n")
    return folder


def test_a_hub_dataset_equals_the_folder(hub_folder: Path) -> None:
    assert load_hub(str(hub_folder), forget="forget10") == load_tofu(hub_folder, forget="forget10")
    with pytest.raises(InputError, match="Did you mean 'forget10'"):
        load_hub(str(hub_folder), forget="forget1")


def test_a_broken_hub_file_is_not_quoted(hub_folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    (hub_folder / "forget10.json").write_text(f'{{"question": "{CANARY}", "answer": {CANARY}')
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        load_hub(str(hub_folder), forget="forget10")
    assert CANARY not in str(caught.value) + "".join(capfd.readouterr()) + caplog.text
    assert caught.value.__suppress_context__


def test_without_the_hub_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host")

    for name in ("get_dataset_config_names", "load_dataset"):
        monkeypatch.setattr(datasets, name, unreachable)
        with pytest.raises(InputError, match=r"'locuslab/TOFU' cannot be loaded \(ConnectionError\).*Offline: pass a folder"):
            open_benchmark("locuslab/TOFU")
        monkeypatch.setattr(datasets, "get_dataset_config_names", lambda *args, **kwargs: ["forget05", "retain95"])


def test_data_that_is_nothing_known_says_what_is(tmp_path: Path) -> None:
    for data in ("ficticious", "../no/such/folder", "a b", "", str(tmp_path / "none")):
        with pytest.raises(InputError, match="Expected 'fictitious', a folder or URI"):
            open_benchmark(data)
    file = own(tmp_path, forget=plain_rows(0, 1))["forget"]
    with pytest.raises(InputError, match=r"is a file\. Expected a folder"):
        open_benchmark(str(file))
    with pytest.raises(InputError, match=r"no subset 'forget05'\. Found: forget"):
        open_benchmark(str(tmp_path))


@pytest.fixture(scope="module")
def tofu(shared_data: Path) -> Path:
    return shared_data / "tofu"


def test_tofu_itself(tofu: Path) -> None:
    full = tofu_folder(tofu)["full"]
    assert len(full) == 4000

    def content(records: Iterable[Record]) -> list[tuple[str, str]]:
        return [(record.prompt, record.response) for record in records]

    for forget, num_forget in (("forget01", 40), ("forget05", 200), ("forget10", 400)):
        splits = load_tofu(tofu, forget=forget).splits
        assert content(splits["forget"]) == content(full[-num_forget:])
        assert content(splits["retain"]) == content(full[:-num_forget])
        assert all(len(record.perturbed) == 5 and record.paraphrase and record.paraphrased_prompt for record in splits["forget"])
        assert content(splits["retain_eval"]) == content(full[:400])
        assert {record.id for record in splits["retain_eval"]} <= {record.id for record in splits["retain"]}
        assert {split: len(splits[split]) for split in ("real_authors", "world_facts")} == {"real_authors": 100, "world_facts": 117}


def test_the_first_rows_of_tofu(tofu: Path) -> None:
    benchmark = open_benchmark(str(tofu), forget="forget05", limit_forget=100, limit_retain=200)
    assert [len(benchmark.splits[split]) for split in ("forget", "retain", "retain_eval")] == [100, 200, 200]
