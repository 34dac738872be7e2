"""Exams out of tables and folders, one split per patient, and ids that tell nothing."""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import replace
from pathlib import Path

import pandas
import pytest

from domainssl.errors import ConfigError, DataError
from domainssl.io.ids import KEY_VARIABLE, id_key, ids_of
from domainssl.io.volume.exam import Wanted
from domainssl.io.volume.exams import find_exams

TWO = Wanted(contrasts={"t1": "t1", "flair": "FLAIR"})


def _touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def _relative(root: Path, scans: dict[str, str]) -> dict[str, str]:
    return {name: os.path.relpath(path, root) for name, path in scans.items()}


@pytest.mark.parametrize(
    ("files", "exams"),
    [
        (  # a folder per case
            ["p1/t1.nii.gz", "p1/FLAIR.nii.gz", "p2/t1.nii"],
            {"p1": ("p1", ["flair", "t1"]), "p2": ("p2", ["t1"])},
        ),
        (  # BraTS: the case in the name too
            ["B_001/B_001_t1.nii.gz", "B_001/B_001_flair.nii.gz", "B_001/B_001_t1ce.nii.gz"],
            {"B_001": ("B_001", ["flair", "t1"])},
        ),
        (  # flat
            ["a-t1.nii", "a-FLAIR.nii", "b-t1.nii"],
            {"a": ("a", ["flair", "t1"]), "b": ("b", ["t1"])},
        ),
        (  # a folder per contrast, below one per split
            ["train/t1/a.nii", "train/flair/a.nii", "val/t1/b.nii"],
            {"train/a": ("a", ["flair", "t1"]), "val/b": ("b", ["t1"])},
        ),
        (  # several studies of a patient
            ["p1/2020/t1.nii", "p1/2021/t1.nii", "p1/2021/flair.nii", "p1/2021/._t1.nii"],
            {"p1/2020": ("p1", ["t1"]), "p1/2021": ("p1", ["flair", "t1"])},
        ),
    ],
)
def test_folders_are_exams(
    tmp_path: Path, files: list[str], exams: dict[str, tuple[str, list[str]]]
) -> None:
    _touch(tmp_path, *files)
    found = find_exams(str(tmp_path), TWO)
    assert {e.id: (e.patient, sorted(e.scans)) for e in found.items} == exams
    assert found.layout == "folder" and not found.problems


def test_every_scan_of_a_folder_is_an_exam_if_asked_for(tmp_path: Path) -> None:
    _touch(tmp_path, "a.nii.gz", "sub/b.nii.gz", "sub/b_seg.nii.gz")
    found = find_exams(str(tmp_path), Wanted(contrasts={"ct": "*"}))
    assert {e.id: os.path.basename(e.mask) for e in found.items} == {
        "a": "",
        "sub/b": "b_seg.nii.gz",
    }
    with pytest.raises(DataError, match=r"modalities.ct.contrast[\s\S]*'\*'"):
        find_exams(str(tmp_path), Wanted(contrasts={"ct": "ct"}))


def test_maps_named_after_a_scan_belong_to_its_exam(tmp_path: Path) -> None:
    _touch(tmp_path, "p1/t1.nii", "p1/FLAIR.nii", "p1/flair_seg.nii", "p2/t1.nii", "p3/x_seg.nii")
    found = find_exams(str(tmp_path), TWO)
    assert [bool(exam.mask) for exam in found.items] == [True, False]
    (problem,) = found.problems
    assert "x_seg.nii: belongs to no scan" in problem


def test_a_folder_with_many_exams_is_doubted_to_be_one_patient(tmp_path: Path) -> None:
    _touch(tmp_path, *(f"ct_train/c{i}_image.nii" for i in range(9)), "mr/1_image.nii")
    wanted = Wanted(contrasts={"scan": "image"})
    found = find_exams(str(tmp_path), wanted)
    (problem,) = found.problems
    assert "ct_train: taken for one patient with 9 exams" in problem
    named = find_exams(str(tmp_path), replace(wanted, patient="([^/]+)$"))
    assert not named.problems and len({exam.patient for exam in named.items}) == 10


def test_a_second_scan_of_a_contrast_is_left_out_and_named(tmp_path: Path) -> None:
    _touch(tmp_path, "p1/t1.nii.gz", "p1/old_t1.nii.gz", "p1/FLAIR.nii.gz")
    found = find_exams(str(tmp_path), Wanted(contrasts={"t1": "t1"}))
    assert [e.id for e in found.items] == ["p1", "p1/old"] and not found.problems
    _touch(tmp_path, "p1/t1.nii")
    assert "a second scan of 't1'" in find_exams(str(tmp_path), TWO).problems[0]


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl", "semicolon"])
def test_manifests_hold_exams(tmp_path: Path, ending: str) -> None:
    _touch(tmp_path, "x/1.nii", "x/2.nii", "x/3.nii", "x/m.nii")
    table = pandas.DataFrame(
        {
            "id": [7, 8],
            "patient": ["A", "B"],
            "t1": ["x/1.nii", "x/2.nii"],
            "FLAIR": ["x/3.nii", None],
            "label": [1, None],
            "mask": [None, "x/m.nii"],
            "split": ["training", "val"],
        }
    )
    path = tmp_path / f"table.{'csv' if ending == 'semicolon' else ending}"
    if ending == "parquet":
        table.to_parquet(path)
    elif ending == "jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_csv(path, index=False, sep=";" if ending == "semicolon" else ",")
    first, second = find_exams(str(tmp_path), TWO, manifest=path.name).items
    assert (first.id, first.patient, first.split, first.mask) == ("7", "A", "train", "")
    assert first.label in ("1", "1.0") and second.label == ""
    assert _relative(tmp_path, dict(first.scans)) == {"t1": "x/1.nii", "flair": "x/3.nii"}
    assert sorted(second.scans) == ["t1"] and second.mask == str(tmp_path / "x/m.nii")


def test_mistakes_in_manifests_are_named(tmp_path: Path) -> None:
    _touch(tmp_path, "1.nii")
    path = tmp_path / "manifest.csv"
    wanted = Wanted(contrasts={"t1": "t1"})

    def refused(text: str, match: str) -> None:
        path.write_text(text)
        with pytest.raises(DataError, match=match):
            find_exams(str(tmp_path), wanted)

    refused("id,T1w\na,1.nii\n", r"no column 't1' for the modality 't1', only id, T1w")
    refused("id,t1\na,1.nii\na,1.nii\n", r"line 3: the id 'a' stands twice")
    refused("id,t1\na,2.nii\n", r"1 files that it names are not there, such as .*2\.nii")
    refused("id,t1,split\na,1.nii,tain\n", r"split is 'tain', expected train, val or test")
    refused("id,t1\na,\n", r"no exam with t1")


def test_a_patient_in_two_splits_is_refused_with_the_list(tmp_path: Path) -> None:
    _touch(tmp_path, "1.nii")
    rows = ["id,patient,split,t1", "a,P1,train,1.nii", "b,P1,val,1.nii", "c,P2,val,1.nii"]
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"1 patient\(s\) .*: P1 \(train, val\)"):
        find_exams(str(tmp_path), Wanted(contrasts={"t1": "t1"}))


def test_patients_are_found_by_a_pattern(tmp_path: Path) -> None:
    _touch(tmp_path, "sub01-a_t1.nii", "sub01-b_t1.nii")
    wanted = Wanted(contrasts={"t1": "t1"}, patient="(sub[0-9]+)")
    assert {e.patient for e in find_exams(str(tmp_path), wanted).items} == {"sub01"}
    with pytest.raises(DataError, match="finds no group"):
        find_exams(str(tmp_path), Wanted(contrasts={"t1": "t1"}, patient="(pat[0-9]+)"))


def test_ids_depend_on_a_key_that_only_its_owner_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOMAINSSL_CACHE", str(tmp_path / "cache"))
    first = ids_of(["miller/2020", "smith"], "hashed")
    key = tmp_path / "cache" / "id.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert ids_of(["miller/2020", "smith"], "hashed") == first and len(set(first)) == 2
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in first)
    assert ids_of(["smith"], "plain") == ["smith"]
    assert len(ids_of([os.fsdecode(b"M\xfcller")], "hashed")[0]) == 16  # no UTF-8, as on old disks
    monkeypatch.setenv(KEY_VARIABLE, key.read_text())
    assert ids_of(["miller/2020", "smith"], "hashed") == first  # another machine, the same key
    monkeypatch.setenv(KEY_VARIABLE, "another key, long enough")
    assert ids_of(["smith"], "hashed")[0] != first[1]
    monkeypatch.setenv(KEY_VARIABLE, "short")
    with pytest.raises(ConfigError, match="5 characters, expected at least 16"):
        id_key()
    monkeypatch.delenv(KEY_VARIABLE)
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        id_key()


def _json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_bids_folders_are_exams_per_session(tmp_path: Path) -> None:
    _touch(
        tmp_path,
        "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_ce-gadolinium_T1w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_FLAIR.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_run-1_T1w.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_run-2_T1w.nii.gz",
        "sub-02/anat/sub-02_acq-fast_T1w.nii.gz",
        "sub-02/anat/sub-02_T1w.nii.gz",
        "derivatives/x/sub-02/anat/sub-02_dseg.nii.gz",
        "derivatives/x/sub-02/anat/sub-02_desc-smooth_T1w.nii.gz",
    )
    (tmp_path / "participants.tsv").write_text("participant_id\tlabel\nsub-01\tn/a\nsub-02\tsick\n")
    found = find_exams(
        str(tmp_path), Wanted(contrasts={"t1": "t1", "t1c": "t1c", "flair": "flair"})
    )
    assert found.layout == "bids"
    exams = {e.id: e for e in found.items}
    assert {n: (e.patient, sorted(e.scans)) for n, e in exams.items()} == {
        "sub-01/ses-a": ("sub-01", ["flair", "t1", "t1c"]),
        "sub-01/ses-b": ("sub-01", ["t1"]),
        "sub-02": ("sub-02", ["t1"]),
    }
    assert "ce-gadolinium" in exams["sub-01/ses-a"].scans["t1c"]
    assert exams["sub-02"].scans["t1"].endswith("sub-02_T1w.nii.gz")
    assert exams["sub-02"].label == "sick" and exams["sub-02"].mask.endswith("_dseg.nii.gz")
    (tmp_path / "participants.tsv").write_text("participant_id\tlabel\nP1\tsick\n")
    with pytest.raises(DataError, match="none of its 1 participants has scans: it names 'sub-P1'"):
        find_exams(str(tmp_path), Wanted(contrasts={"t1": "t1"}))
    assert exams["sub-01/ses-a"].label == "" and "run-2" in found.problems[0]
    with pytest.raises(DataError, match=r"ends in 'T2w'[\s\S]*there are .*FLAIR"):
        find_exams(str(tmp_path), Wanted(contrasts={"t2": "t2"}))


def test_contrasts_of_the_decathlon_are_volumes_of_one_file(tmp_path: Path) -> None:
    _touch(tmp_path, "imagesTr/B_1.nii.gz", "labelsTr/B_1.nii.gz", "imagesTs/B_2.nii.gz")
    content = {
        "modality": {"0": "FLAIR", "1": "T1w"},
        "labels": {"0": "background", "1": "edema"},
        "training": [{"image": "./imagesTr/B_1.nii.gz", "label": "./labelsTr/B_1.nii.gz"}],
        "test": ["./imagesTs/B_2.nii.gz"],
    }
    _json(tmp_path / "dataset.json", content)
    wanted = Wanted(contrasts={"t1": "T1w", "flair": "FLAIR"})
    found = find_exams(str(tmp_path), wanted)
    train, test = found.items
    assert dict(train.volumes) == {"t1": 1, "flair": 0} and train.mask.endswith("B_1.nii.gz")
    assert (train.split, test.split, test.mask) == ("", "test", "")
    assert train.scans["t1"] == train.scans["flair"] == str(tmp_path / "imagesTr/B_1.nii.gz")
    assert found.mask_names == {0: "background", 1: "edema"}
    with pytest.raises(DataError, match="no channel 'T2w' .* only FLAIR, T1w"):
        find_exams(str(tmp_path), Wanted(contrasts={"t2": "T2w"}))
    (tmp_path / "imagesTs/B_2.nii.gz").unlink()
    with pytest.raises(DataError, match="1 files that it names are not there"):
        find_exams(str(tmp_path), wanted)
    _json(tmp_path / "dataset.json", {**content, "training": [{"picture": "x"}]})
    with pytest.raises(DataError, match=r"dataset\.json"):
        find_exams(str(tmp_path), wanted)


def test_cases_of_nnunet_have_a_file_per_channel(tmp_path: Path) -> None:
    _touch(
        tmp_path,
        *("imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "imagesTr/b_0000.nii.gz"),
        *("imagesTr/._a_0000.nii.gz", "labelsTr/a.nii.gz", "imagesTs/c_0000.nii.gz"),
    )
    labels = {"background": 0, "liver": 1, "all": [1, 2]}
    content = {"channel_names": {"0": "CT", "1": "PET"}, "labels": labels, "file_ending": ".nii.gz"}
    _json(tmp_path / "dataset.json", content)
    found = find_exams(str(tmp_path), Wanted(contrasts={"ct": "CT", "pet": "PET"}))
    assert found.layout == "nnunet" and found.mask_names == {0: "background", 1: "liver"}
    assert [(e.id, sorted(e.scans), e.split, bool(e.mask)) for e in found.items] == [
        ("imagesTr/a", ["ct", "pet"], "", True),
        ("imagesTr/b", ["ct"], "", False),
        ("imagesTs/c", ["ct"], "test", False),
    ]


def test_the_list_of_nnssl_holds_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _touch(tmp_path, "raw/a.nii.gz", "raw/b.nii.gz", "raw/c.nii.gz", "raw/anon.nii.gz")

    def image(name: str, modality: str, mask: str | None = None) -> dict[str, object]:
        masks = {"anonymization_mask": mask, "anatomy_mask": "$NNSSL_TEST/none.nii.gz"}
        return {"name": name, "modality": modality, "image_path": f"${{NNSSL_TEST}}/{name}.nii.gz",
                "associated_masks": masks if mask else None}  # fmt: skip

    images = [image("a", "T1w", "$NNSSL_TEST/anon.nii.gz"), image("b", "T1w"), image("c", "FLAIR")]
    session = {"s": {"session_info": {}, "images": images}}
    subjects = {"p": {"subject_info": {}, "sessions": session}}
    _json(
        tmp_path / "pretrain_data.json", {"datasets": {"D1": {"name": "x", "subjects": subjects}}}
    )
    both = Wanted(contrasts={"t1": "t1w", "flair": "flair"})
    with pytest.raises(DataError, match=r"export NNSSL_TEST="):
        find_exams(str(tmp_path), both)
    monkeypatch.setenv("NNSSL_TEST", str(tmp_path / "raw"))
    found = find_exams(str(tmp_path), both)
    (exam,) = found.items
    assert (exam.id, exam.patient) == ("D1/p/s", "D1/p") and "1 further images" in found.problems[0]
    assert exam.scans["t1"].endswith("a.nii.gz")
    assert exam.anonymized == {"t1": str(tmp_path / "raw" / "anon.nii.gz")}  # not that of flair
    every = find_exams(str(tmp_path), Wanted(contrasts={"scan": "*"}))
    assert [e.id for e in every.items] == ["D1/p/s/a", "D1/p/s/b", "D1/p/s/c"]
    assert [sorted(e.anonymized) for e in every.items] == [["scan"], [], []]
    (tmp_path / "raw" / "a.nii.gz").rename(tmp_path / "raw" / "a.nii.gz.b2nd")
    with pytest.raises(DataError, match=r"preprocessed.*folder below \$nnssl_raw"):
        find_exams(str(tmp_path), both)


def test_a_table_is_read_as_it_is_meant_whatever_its_columns_are_called(tmp_path: Path) -> None:
    _touch(tmp_path, "a.nii", "b, 2.nii", "c.nii")
    rows = [
        'ID|Patient ID|Split|T1|label',
        "1|p|train|a.nii|NaN",
        "2|p|train|b, 2.nii|x",
        "3|q|Validation|c.nii|n/a",
    ]  # fmt: skip
    (tmp_path / "manifest.csv").write_bytes("\r\n".join(rows).encode("utf-8-sig"))
    found = find_exams(str(tmp_path), Wanted(contrasts={"scan": "T1"}))
    assert [(e.id, e.patient, e.split, e.label) for e in found.items] == [
        ("1", "p", "train", ""),
        ("2", "p", "train", "x"),
        ("3", "q", "val", ""),
    ]
    assert not found.problems


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (
            "id,t1\na,a.nii,b.nii\n",
            "Expected 2 fields in line 2, saw 3.*as many cells as the first",
        ),
        ("id,t1,t1\na,a.nii,b.nii\n", "two columns are named 't1'.*Rename one"),
        ("id,t1,dx\na,a.nii,x\n", "no column 'diagnosis', only id, t1, dx.*labels.column"),
        (
            "id,patient,split,t1\na,p,train,a.nii\nb,q,val,./a.nii\n",
            "a.nii: is a scan of a and of b, which are exams of different patients.*train and val",
        ),
    ],
)
def test_a_table_that_would_be_read_wrongly_is_refused(
    tmp_path: Path, table: str, said: str
) -> None:
    _touch(tmp_path, "a.nii", "b.nii")
    (tmp_path / "manifest.csv").write_text(table)
    label = "diagnosis" if "dx" in table else "label"
    with pytest.raises(DataError, match=said):
        find_exams(str(tmp_path), Wanted(contrasts={"t1": "t1"}, label=label))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("id,subject_id,t1\na,s,a.nii\nb,s,b.nii\n", "no column 'patient'.*Rename 'subject_id'"),
        ("id,patient,t1\na,s,a.nii\nb,,b.nii\n", "1 of 2 rows name no patient in 'patient'"),
        ("id,t1\na,a.nii\nb,a.nii\n", "a.nii: is a scan of a and of b"),
    ],
)
def test_what_may_put_a_patient_into_two_splits_is_said(
    tmp_path: Path, table: str, said: str
) -> None:
    _touch(tmp_path, "a.nii", "b.nii")
    (tmp_path / "manifest.csv").write_text(table)
    (problem,) = find_exams(str(tmp_path), Wanted(contrasts={"t1": "t1"})).problems
    assert re.search(said, problem)


def test_every_scan_of_a_table_and_of_bids(tmp_path: Path) -> None:
    every = Wanted(contrasts={"scan": "*"}, may_lack=True)
    _touch(tmp_path, "a.nii", "bids/sub-1/anat/sub-1_T1w.nii", "bids/sub-1/dwi/sub-1_dwi.nii")
    (tmp_path / "manifest.csv").write_text("id,scan\na,a.nii\n")
    (exam,) = find_exams(str(tmp_path), every).items
    assert _relative(tmp_path, dict(exam.scans)) == {"scan": "a.nii"}
    found = find_exams(str(tmp_path / "bids"), every).items
    assert {e.id: e.patient for e in found} == {
        "sub-1/sub-1_T1w": "sub-1",
        "sub-1/sub-1_dwi": "sub-1",
    }


def test_files_that_a_collection_does_not_name_are_told(tmp_path: Path) -> None:
    names = ("a_0000", "a_0001", "b_0000", "c_0007", "d")
    _touch(tmp_path, *(f"imagesTr/{name}.nii.gz" for name in names))
    about = {"channel_names": {"0": "T2", "1": "FLAIR"}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    found = find_exams(str(tmp_path), Wanted(contrasts={"flair": "FLAIR"}))
    assert [e.id for e in found.items] == ["imagesTr/a"]
    odd, without = found.problems
    assert "2 files are of no channel, such as c_0007.nii.gz, d.nii.gz; expected CASE_NUMBER" in odd
    assert "2 cases have no file of flair, such as b, c" in without
    maps = [f"derivatives/{n}/sub-1/anat/sub-1_dseg.nii" for n in ("fast", "other")]
    _touch(tmp_path / "bids", "sub-1/anat/sub-1_T1w.nii", *maps)
    (problem,) = find_exams(str(tmp_path / "bids"), Wanted(contrasts={"t1": "t1"})).problems
    assert "another segmentation map of sub-1 beside" in problem


def _decathlon(root: Path, **more: object) -> None:
    _touch(root, *(f"imagesTr/{name}.nii.gz" for name in "abc"))
    training = [{"image": f"./imagesTr/{name}.nii.gz"} for name in "abc"]
    known = {"modality": {"0": "CT"}, "training": training, "numTraining": 3}
    _json(root / "dataset.json", {**known, **more})


def test_a_validation_list_of_the_decathlon_is_the_validation_split(tmp_path: Path) -> None:
    entries = [{"image": f"./imagesTr/{name}.nii.gz"} for name in "abc"]
    _decathlon(tmp_path, training=entries[:2], validation=entries[2:])
    found = find_exams(str(tmp_path), Wanted(contrasts={"ct": "CT"}))
    assert [exam.split for exam in found.items] == ["", "", "val"] and not found.problems
    _decathlon(tmp_path, training=[*entries, entries[0]])
    found = find_exams(str(tmp_path), Wanted(contrasts={"ct": "CT"}))
    assert len(found.items) == 3 and "listed twice and taken once" in found.problems[1]
    _decathlon(tmp_path, training=entries[:1])
    [problem] = find_exams(str(tmp_path), Wanted(contrasts={"ct": "CT"})).problems
    assert "numTraining is 3, but 1 cases" in problem


def test_channels_of_one_name_are_told_apart_by_their_numbers(tmp_path: Path) -> None:
    _touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz")
    facts = {"channel_names": {"0": "noNorm", "1": "noNorm"}, "file_ending": ".nii.gz"}
    _json(tmp_path / "dataset.json", facts)
    with pytest.raises(DataError, match=r"2 channels are named 'noNorm', 0 and 1"):
        find_exams(str(tmp_path), Wanted(contrasts={"t1": "noNorm"}))
    [exam] = find_exams(str(tmp_path), Wanted(contrasts={"t1": "0", "t2": "1"})).items
    assert _relative(tmp_path, dict(exam.scans)) == {
        "t1": "imagesTr/a_0000.nii.gz", "t2": "imagesTr/a_0001.nii.gz",
    }  # fmt: skip


def test_files_that_nnunet_lists_itself_stand_above_their_names(tmp_path: Path) -> None:
    _touch(tmp_path, "imagesTr/a_0000.nii.gz", "other/first.nii.gz", "other/map.nii.gz")
    listed = {"a": {"images": ["other/first.nii.gz"], "label": "other/map.nii.gz"}}
    facts = {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "dataset": listed}
    _json(tmp_path / "dataset.json", facts)
    [exam] = find_exams(str(tmp_path), Wanted(contrasts={"ct": "CT"})).items
    assert _relative(tmp_path, {"ct": exam.scans["ct"], "mask": exam.mask}) == {
        "ct": "other/first.nii.gz", "mask": "other/map.nii.gz",
    }  # fmt: skip


def test_images_of_one_name_in_a_session_have_ids_of_their_own(tmp_path: Path) -> None:
    _touch(tmp_path, "a.nii.gz", "b.nii.gz")
    images = [{"name": "x", "modality": "T1w", "image_path": f"{n}.nii.gz"} for n in "ab"]
    sessions = {"1": {"images": images}}
    _json(tmp_path / "pretrain_data.json", {"datasets": {"d": {"subjects": {"s": {
        "sessions": sessions}}}}})  # fmt: skip
    found = find_exams(str(tmp_path), Wanted(contrasts={"mr": "*"}))
    assert [exam.id for exam in found.items] == ["d/s/1/x", "d/s/1/x_2"]


def test_bids_files_that_are_not_read_or_lie_elsewhere_are_told(tmp_path: Path) -> None:
    _touch(
        tmp_path,
        "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-02_T1w.nii.gz",
        "sub-03/anat/sub-03_acq-x_T1w.nii.gz", "sub-03/anat/sub-03_T1W.nii.gz",
    )  # fmt: skip
    found = find_exams(str(tmp_path), Wanted(contrasts={"t1": "T1w"}))
    elsewhere, unlike = found.problems
    (tmp_path / "sub-04" / "anat").mkdir(parents=True)  # git-annex: content that was not fetched
    (tmp_path / "sub-04" / "anat" / "sub-04_T1w.nii.gz").symlink_to(".git/annex/nowhere")
    lost = find_exams(str(tmp_path), Wanted(contrasts={"t1": "T1w"})).problems[1]
    assert "1 left out, linked to nothing: sub-04/anat/sub-04_T1w.nii.gz. " in lost
    assert find_exams(str(tmp_path), Wanted(contrasts={"t1": "T1w", "t2": "t2"}, may_lack=True))
    assert "by its name it is of sub-02" in elsewhere
    assert "2 files end in 'T1w', but have other entities" in unlike and "sub-03_" in unlike


def test_patients_that_differ_in_case_alone_are_told(tmp_path: Path) -> None:
    _touch(tmp_path, "a.nii", "b.nii")
    (tmp_path / "manifest.csv").write_text("id,patient,t1\n1,p1,a.nii\n2,P1,b.nii\n")
    [problem] = find_exams(str(tmp_path), Wanted(contrasts={"t1": "t1"})).problems
    assert "'p1' and 'P1' count as two patients" in problem
