"""BBQ: the stereotyped target, what is wrong with a file, and which answer counts as correct,
unknown and biased.
"""

import csv
import hashlib
import json

import pandas as pd
import pytest

from conftest import one_sentence
from driftbook.benchmarks import bbq, bbq_lite
from driftbook.study.sections import Source

N_ITEMS = {"Age": 3680, "Religion": 1200, "Nationality": 3080}


@pytest.fixture(scope="module")
def published(shared):
    """{item_id: target_loc} of the authors' own table: the option of the stereotype."""
    with (shared / "bbq" / "published" / "target_loc.csv").open(newline="") as file:
        return {
            f"{row['category']}-{row['example_id']}": (
                int(float(row["target_loc"])) if row["target_loc"] else None
            )
            for row in csv.DictReader(file)
        }


@pytest.fixture(scope="module")
def real(shared):
    return bbq.load(shared / "bbq" / "data")


# ---- real files
def test_all_real_files_load(real):
    assert real.dimension.value_counts().to_dict() == N_ITEMS
    assert real.item_id.is_unique
    assert set(real.context) == {"ambiguous", "disambiguated"}
    assert (real.context == "ambiguous").mean() == 0.5
    assert (
        real.label[real.context == "ambiguous"] == real.unknown[real.context == "ambiguous"]
    ).all()
    assert (
        real.label[real.context == "disambiguated"] != real.unknown[real.context == "disambiguated"]
    ).all()
    assert real.target.notna().all()
    assert (real.target != real.unknown).all()


def test_the_target_is_the_published_one_on_every_item(real, published):
    """Theirs is the biased answer: the stereotyped person of a negative question, the other person
    of a non-negative one.
    """
    assert len(published) == len(real) == sum(N_ITEMS.values())
    items = real.set_index("item_id")
    found = items.target.where(
        items.polarity == "negative", 3 - items.unknown - items.target
    ).astype(int)
    different = [item for item, target in published.items() if found[item] != target]
    assert different == [], f"{len(different)} of {len(published)} items, first {different[:5]}"


def test_some_dimensions_can_be_asked_for(shared):
    assert set(bbq.load(shared / "bbq" / "data", ["Religion"]).dimension) == {"Religion"}
    with pytest.raises(ValueError) as error:
        bbq.load(shared / "bbq" / "data", ["Religion", "SES"])
    assert "SES.jsonl" in one_sentence(error.value)


def test_the_miniatures_files_load_too(data_folder):
    items = bbq.load(data_folder / "bbq")
    assert items.dimension.nunique() == 9
    assert items.target.notna().all()
    assert items.groupby("dimension").question_family.nunique().eq(12).all()


# ---- files that are wrong
@pytest.fixture
def folder(data_folder, tmp_path):
    """One miniature file, to be damaged: (path, its rows)."""
    path = tmp_path / "Age.jsonl"
    path.write_text((data_folder / "bbq" / "Age.jsonl").read_text())
    return path


def rewrite(path, change, at=5):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows[at])
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("field", bbq.FIELDS)
def test_a_missing_field_is_named(folder, field):
    rewrite(folder, lambda row: row.pop(field))
    with pytest.raises(ValueError) as error:
        bbq.load(folder.parent)
    assert field in one_sentence(error.value)
    assert "Age.jsonl" in str(error.value)


def _two_unknown(row):
    row["answer_info"] = {f"ans{i}": [row[f"ans{i}"], "unknown"] for i in range(3)}


@pytest.mark.parametrize(
    "change",
    [
        _two_unknown,
        lambda row: row["answer_info"].update(
            {f"ans{i}": [row[f"ans{i}"], "somebody"] for i in range(3)}
        ),
        lambda row: row["answer_info"].pop("ans1"),
        lambda row: row.update(context_condition="vague"),
        lambda row: row.update(question_polarity="positive"),
        lambda row: row["additional_metadata"].pop("stereotyped_groups"),
        lambda row: row.update(label=3),
    ],
    ids=[
        "two unknown",
        "none unknown",
        "no answer_info",
        "condition",
        "polarity",
        "no groups",
        "label",
    ],
)
def test_an_item_of_another_form_is_refused(folder, change):
    rewrite(folder, change)
    with pytest.raises(ValueError) as error:
        bbq.load(folder.parent)
    assert "Age.jsonl" in one_sentence(error.value)


@pytest.mark.parametrize("kept", [0.5, 0.97])
def test_a_torn_file_is_refused(folder, kept):
    content = folder.read_bytes()
    folder.write_bytes(content[: int(len(content) * kept) - 3])
    with pytest.raises(ValueError) as error:
        bbq.load(folder.parent)
    assert "torn" in one_sentence(error.value)


def test_an_empty_file_is_refused(folder):
    folder.write_text("")
    with pytest.raises(ValueError) as error:
        bbq.load(folder.parent)
    assert "Age.jsonl" in one_sentence(error.value)


def test_a_repeated_item_is_refused_before_it_is_asked(folder):
    content = folder.read_text()
    folder.write_text(content + content.splitlines()[0] + "\n")
    with pytest.raises(ValueError) as error:
        bbq.load(folder.parent)
    assert "repeated" in one_sentence(error.value)


def test_a_folder_without_files_is_refused(tmp_path):
    with pytest.raises(ValueError) as error:
        bbq.load(tmp_path)
    assert "Age.jsonl" in one_sentence(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda row: row.update({f"ans{_unknown_of(row)}": "Nobody knows"}), "Nobody knows"),
        (lambda row: row.update({f"ans{(_unknown_of(row) + 1) % 3}": "Not known."}), "Not known."),
    ],
    ids=["a form never seen", "a person who says unknown"],
)
def test_a_tag_and_a_text_that_disagree_on_unknown_are_refused(folder, change, says):
    rewrite(folder, change)
    with pytest.raises(ValueError) as error:
        bbq.load(folder.parent)
    assert says in one_sentence(error.value)
    assert "Age.jsonl" in str(error.value)


def _unknown_of(row) -> int:
    return next(i for i in range(3) if row["answer_info"][f"ans{i}"][1] == "unknown")


def test_the_real_files_use_exactly_the_ten_forms(real):
    """The list of the authors' script BBQ_calculate_bias_score.R; the miniature's two are in no
    real file.
    """
    said = {str(row[f"ans{row['unknown']}"]).lower() for row in real.to_dict("records")}
    assert said == bbq.UNKNOWN_FORMS - {"unanswerable", "unclear"}
    assert len(said) == 10


# ---- public sources
@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """Names and hashes that would have been fetched; `contents` by the end of the URL is what the
    network would have given.
    """
    asked, contents = [], {}

    def retrieve(url, known_hash, fname, path):
        asked.append((url, known_hash))
        target = path / fname
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(contents[url.rpartition("/")[2]])

    monkeypatch.setattr("pooch.retrieve", retrieve)
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / name)
    return asked, contents


METADATA_HEADER = (
    "category,question_index,example_id,target_loc,label_type,Known_stereotyped_groups\n"
)


def test_bbq_comes_from_its_public_commit(shared, fetched, real):
    asked, contents = fetched
    contents["Age.jsonl"] = (shared / "bbq" / "data" / "Age.jsonl").read_bytes()
    contents["additional_metadata.csv"] = (
        shared / "bbq" / "published" / "target_loc.csv"
    ).read_bytes()
    items = bbq.load(bbq.PUBLIC, ["Age"])
    assert [url for url, _ in asked] == [
        f"https://raw.githubusercontent.com/nyu-mll/BBQ/{bbq.PUBLIC.revision}/{name}"
        for name in ("data/Age.jsonl", bbq.METADATA)
    ]
    assert len(bbq.PUBLIC.revision) == 40
    mine = real[real.dimension.eq("Age")].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        items, mine, check_dtype=False
    )  # the authors' targets are the rule's


def test_the_pinned_hashes_are_those_of_the_files(shared):
    for path in (shared / "bbq" / "data").glob("*.jsonl"):
        assert (
            hashlib.sha256(path.read_bytes()).hexdigest() == bbq.PUBLIC.sha256[f"data/{path.name}"]
        )
    assert set(bbq.PUBLIC.sha256) == set(bbq.PUBLIC.files)
    assert len(bbq.PUBLIC.files) == 12


def test_a_source_that_is_no_place_is_refused():
    for name in ("nyu-mll/BBQ", "miniature:data/bbq"):
        with pytest.raises(ValueError) as error:
            bbq.load(Source(source=name))
        assert name in one_sentence(error.value)


def _row(example_id, category, groups, options, stereotyped, polarity="neg", context="ambig"):
    unknown = options.index("Not known")
    return {
        "example_id": example_id,
        "question_index": "1",
        "question_polarity": polarity,
        "context_condition": context,
        "category": category,
        "answer_info": {f"ans{i}": [group, group] for i, group in enumerate(groups)},
        "context": "Two people met.",
        "question": "Who?",
        "additional_metadata": {
            "subcategory": "None",
            "stereotyped_groups": stereotyped,
            "version": "a",
            "source": "made up",
        },
        **{f"ans{i}": option for i, option in enumerate(options)},
        "label": unknown,
    }


PEOPLE = ["Kim", "Sam", "Not known"]


@pytest.mark.parametrize(
    ("category", "groups", "stereotyped", "target"),
    [
        ("Gender_identity", ["woman", "man", "unknown"], ["F"], 0),
        ("Gender_identity", ["girl", "boy", "unknown"], ["men", "boys"], 1),
        (
            "Gender_identity",
            ["nonTrans", "trans", "unknown"],
            ["Transgender women", "Transgender men"],
            1,
        ),
        ("Race_ethnicity", ["F-White", "F-Black", "unknown"], ["Black", "African American"], 1),
        ("Race_ethnicity", ["African", "African American", "unknown"], ["African American"], 1),
        ("SES", ["lowSES", "highSES", "unknown"], ["low SES"], 0),
        ("Age", ["nonOld", "old", "unknown"], ["old"], 1),
        ("Disability_status", ["nonDisabled", "disabled", "unknown"], ["disabled"], 1),
        ("Race_ethnicity", ["F-Black", "M-Black", "unknown"], ["Black"], None),
        ("Religion", ["Catholic", "Christian", "unknown"], ["Muslim"], None),
        ("Race_x_gender", ["F-Black", "F-White", "unknown"], ["Black"], None),
        ("Race_x_SES", ["lowSES-Black", "", "unknown"], [], None),
    ],
)
def test_tags_in_the_forms_of_all_dimensions(tmp_path, category, groups, stereotyped, target):
    (tmp_path / f"{category}.jsonl").write_text(
        json.dumps(_row(0, category, groups, PEOPLE, stereotyped))
    )
    found = bbq.load(tmp_path).target.iloc[0]
    assert pd.isna(found) if target is None else found == target


def test_the_authors_table_gives_the_target_where_it_lies_in_the_copy(tmp_path):
    rows = [
        _row(i, "Race_x_gender", ["F-Black", "M-White", "unknown"], PEOPLE, [], polarity)
        for i, polarity in enumerate(("neg", "nonneg", "neg"))
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "Race_x_gender.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = tmp_path / bbq.METADATA
    table.parent.mkdir()
    table.write_text(
        METADATA_HEADER
        + "Race_x_gender,1,0,0,label,x\nRace_x_gender,1,1,1,label,x\nRace_x_gender,1,2,NA,label,x\n"
    )
    for source in (tmp_path, tmp_path / "data"):
        assert bbq.load(source).target.tolist()[:2] == [0, 0]
        assert pd.isna(bbq.load(source).target.iloc[2])
    table.write_text(METADATA_HEADER + "Race_x_gender,1,0,0,label,x\n")
    with pytest.raises(ValueError) as error:
        bbq.load(tmp_path)
    assert "Race_x_gender-1" in one_sentence(error.value)


# ---- BBQ-Lite
def test_the_ids_of_the_study_add_up():
    spans = {
        name: sum(last - first + 1 for first, last in ranges)
        for name, ranges in bbq_lite.EXCLUDED.items()
    }
    assert sum(spans.values()) == 200
    assert (
        sum(last - first + 1 for ranges in bbq_lite.CORRECTED.values() for first, last in ranges)
        == 32
    )
    assert sum(bbq_lite.ITEMS.values()) == 16_076
    assert not any(
        bbq_lite.excluded(name, first)
        for name, ranges in bbq_lite.CORRECTED.items()
        for first, _ in ranges
    )


def _lite_file(folder, category, rows):
    (folder / f"{category}.json").write_text(
        json.dumps({"category": category, "canary": "canary", "name": "bbq_lite", "examples": rows})
    )


@pytest.fixture
def lite(tmp_path):
    """All nine files in BBQ-Lite's form and size, with made-up people."""
    for category, n in bbq_lite.ITEMS.items():
        rows = [
            _row(
                i,
                category,
                ["x", "y", "unknown"],
                PEOPLE,
                ["x"],
                ("neg", "nonneg")[i // 2 % 2],
                ("ambig", "disambig")[i % 2],
            )
            for i in range(n)
        ]
        _lite_file(tmp_path, category, rows)
    return tmp_path


@pytest.mark.slow
def test_bbq_lite_as_the_study_asked_it(lite, data_folder):
    items = bbq_lite.load_lite(lite)
    assert len(items) == 15_876
    assert items.dimension.nunique() == 9
    assert items.context.eq("ambiguous").mean() == 0.5
    assert items.item_id.is_unique
    assert items.item_id.str.startswith("lite-").all()
    assert list(items.columns) == list(bbq.load(data_folder / "bbq").columns)
    everything = bbq_lite.load_lite(lite, variant="all")
    gone = everything[~everything.item_id.isin(items.item_id)]
    assert gone.dimension.value_counts().to_dict() == {"Race_ethnicity": 184, "Gender_identity": 16}
    assert (
        {"lite-Gender_identity-284", "lite-Race_ethnicity-1055"}
        < set(gone.item_id)
        < set(everything.item_id)
    )


@pytest.mark.parametrize(
    ("category", "number", "tag", "options", "stereotyped", "target"),
    [
        (
            "Gender_identity",
            48,
            "male teacher",
            ["Not known", "The male teacher", "The female teacher"],
            ["M", "man"],
            1,
        ),
        (
            "Race_ethnicity",
            451,
            "African",
            ["The African student", "Not known", "The African American student"],
            ["African American", "Black"],
            2,
        ),
        (
            "Physical_appearance",
            576,
            "negDress",
            ["The individual with no scars", "Not known", "The individual with scars"],
            ["negDress"],
            2,
        ),
        (
            "Physical_appearance",
            659,
            "notPregnant",
            ["The other employee", "The pregnant employee", "Not known"],
            ["pregnant"],
            1,
        ),
    ],
)
def test_corrected_items_tell_the_two_people_apart(
    tmp_path, monkeypatch, category, number, tag, options, stereotyped, target
):
    monkeypatch.setitem(bbq_lite.ITEMS, category, 2)
    tags = ["unknown" if option == "Not known" else tag for option in options]
    _lite_file(
        tmp_path, category, [_row(i, category, tags, options, stereotyped) for i in (number, 2000)]
    )
    found = bbq_lite.load_lite(tmp_path, [category])
    assert found.target.iloc[0] == target
    assert pd.isna(found.target.iloc[1])  # the same people elsewhere stay as they were tagged
    assert bbq_lite.load_lite(tmp_path, [category], variant="all").target.isna().all()


def test_bbq_lite_comes_from_its_public_commit(lite, fetched):
    asked, contents = fetched
    contents["Religion.json"] = (lite / "Religion.json").read_bytes()
    assert len(bbq_lite.load_lite(dimensions=["Religion"])) == 680
    assert [url for url, _ in asked] == [
        f"https://raw.githubusercontent.com/google/BIG-bench/{bbq_lite.LITE.revision}/"
        "bigbench/benchmark_tasks/bbq_lite/resources/Religion.json"
    ]


@pytest.mark.parametrize(
    "broken", ["absent", "torn", "short", "no examples", "field", "id", "variant"]
)
def test_a_wrong_file_of_bbq_lite_is_one_sentence(lite, broken):
    path, variant = lite / "Religion.json", "study"
    document = json.loads(path.read_text())
    if broken == "absent":
        path.unlink()
    elif broken == "torn":
        path.write_text(path.read_text()[:-40])
    elif broken == "short":
        _lite_file(lite, "Religion", document["examples"][:-1])
    elif broken == "no examples":
        path.write_text(json.dumps(document["examples"]))
    elif broken == "variant":
        variant = "lite"
    else:
        del document["examples"][7]["question" if broken == "field" else "example_id"]
        _lite_file(lite, "Religion", document["examples"])
    with pytest.raises(ValueError) as error:
        bbq_lite.load_lite(lite, ["Religion"], variant)
    assert ("lite" if broken == "variant" else "Religion.json") in one_sentence(error.value)
