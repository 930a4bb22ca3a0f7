"""Texts that may be published name no user and no folder, and names on the hub stay."""

import json
import string

import nbformat
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftbook.publishing.pages import nameless_notebook
from driftbook.study.nameless import model_name, nameless, nameless_column
from driftbook.study.tables import RUNS

LETTERS = string.ascii_letters + string.digits + "_-.äß中"
WORD = st.text(LETTERS, min_size=1, max_size=9).map(lambda text: f"p{text}q")
USER = "jane.doe"
HOMES = "/".join(["", "home"])  # no file of the project holds such a path
HOME = f"{HOMES}/{USER}"
ROOTS = {  # before the parts, and the separator
    "posix": ("/", "/"),
    "twice": ("//", "/"),
    "drive": ("C:\\", "\\"),
    "escaped": ("C:\\\\", "\\\\"),
    "slashes": ("D:/", "/"),
    "unc": ("\\\\", "\\"),
    "long": ("\\\\?\\C:\\", "\\"),
    "tilde": ("~/", "/"),
    "other": (f"~{USER}/", "/"),
    "variable": ("$HOME/", "/"),
    "braces": ("${SCRATCH}/", "/"),
    "percent": ("%USERPROFILE%\\", "\\"),
    "url": ("file:///", "/"),
    "windows url": ("file:///C:/", "/"),
    "host url": ("file://server/", "/"),
    "up": ("../../", "/"),
    "remote": (f"{USER}@host:/", "/"),
}
SENTENCES = (
    "{}",
    "cannot read {}, and the rest is kept",
    "it was trained on {}; see meta-llama/Llama-3.2-1B",
    "'{}' is torn",
    'File "{}", line 3, in `x`',
    "({})",
    "failed:{}: no such file",
    "path={} and/or 1/2",
    "\x1b[0;32m{}\x1b[0m in a colour",
    "a line\\n{} as JSON writes it",
)


@given(
    st.sampled_from(list(ROOTS)),
    st.lists(WORD, min_size=0, max_size=3),
    st.lists(WORD, min_size=0, max_size=3),
    WORD,
    st.sampled_from(SENTENCES),
    st.sampled_from(["", "/"]),
)
def test_a_path_is_its_last_part(root, before, after, last, sentence, end):
    start, separator = ROOTS[root]
    path = start + separator.join([*before, USER, *after, last])
    path += end if separator == "/" else ""
    assert nameless(sentence.format(path)) == sentence.format(last)


@given(st.sampled_from(["posix", "drive", "slashes"]), st.sampled_from(SENTENCES))
def test_a_users_own_folder_is_a_tilde(root, sentence):
    start, separator = ROOTS[root]
    for home in ("home", "Users", f"mnt{separator}c{separator}Users"):
        path = separator.join([start + home, USER])
        assert nameless(sentence.format(path)) == sentence.format("~")


@given(WORD, WORD, st.sampled_from([one for one in SENTENCES if one[:1] != "'"]))
def test_names_on_the_hub_and_addresses_stay(owner, name, sentence):
    for kept in (
        f"{owner}/{name}",
        f"https://huggingface.co/{owner}/{name}/tree/main",
        f"hf://datasets/{owner}/{name}",
    ):
        assert nameless(sentence.format(kept)) == sentence.format(kept)
    folder = f"{HOME}/.cache/hub/models--{owner}--{name}/snapshots/0a1b"
    assert nameless(sentence.format(folder)) == sentence.format(f"{owner}/{name}")
    assert model_name(folder) == model_name(f"{owner}/{name}") == f"{owner}/{name}"


@pytest.mark.parametrize(
    "text",
    [
        "and/or, 1/2, n/a, tokens/s, a/b/c, p /10, || A || / || B ||",
        "</td></tr><br/>",
        r"(?:.*\.layers\.(0|1)\.(q|v)_proj)",
        "data:image/jpeg;base64,/9j/4AAQ/abc=",
        "s3://bucket/key and https://a.org/x?y=/z/w",
        "no path: 10:30, C: and D: alone, 5 \\ 6",
    ],
)
def test_what_is_no_path_stays(text):
    assert nameless(text) == text


def test_users_and_folders_with_spaces():
    for text, free in {
        r"at C:\Users\Jane Doe\my models\llama 3, and": "at llama 3, and",
        f"'{HOMES}/jane doe/my models/llama 3' is torn": "'llama 3' is torn",
        f"at {HOMES.replace('home', 'Users')}/Jane Doe/llama and more": "at llama and more",
        f"neither {HOMES}/jane nor in meta/x": "neither ~ nor in meta/x",
        "https://jane:secret@a.org/x/y": "https://a.org/x/y",
    }.items():
        assert nameless(text) == free
    assert model_name(r"C:\Users\Jane Doe\my models\llama 3") == "llama 3"
    assert model_name("D:/jane.doe/llama-3-8b/") == model_name("../x/llama-3-8b") == "llama-3-8b"


def test_json_stays_json_and_a_pattern_in_it_stays():
    said = {"output_dir": f"C:\\Users\\{USER}\\out", "rank_pattern": r"\d+\.q_proj", "n": [1, None]}
    column = pd.Series([json.dumps(said), None, "plain"], dtype="string")
    found = nameless_column(column)
    assert json.loads(found[0]) == said | {"output_dir": "out"}
    assert found[1:].equals(column[1:])
    assert found.dtype == column.dtype


def test_no_written_table_names_a_user(tmp_path):
    row = dict.fromkeys(RUNS.columns) | {"run_id": "a", "status": "failed"}
    row |= {"failure": f"no room in {HOME}/out", "trainer_arguments": f'{{"a": "~{USER}/x"}}'}
    RUNS.write(pd.DataFrame([row]), tmp_path)
    read = RUNS.read(tmp_path).iloc[0]
    assert (read["failure"], read["trainer_arguments"]) == ("no room in out", '{"a": "x"}')


def test_no_page_of_a_notebook_names_a_user():
    path = f"{HOME}/x.py"
    cell = nbformat.v4.new_code_cell(
        f'study = "{path}"',
        metadata={"tags": ["injected-parameters"]},
        outputs=[
            nbformat.v4.new_output("stream", text=f"{path}:3: UserWarning"),
            nbformat.v4.new_output("display_data", {"text/html": f"<b>{path}</b>"}),
            nbformat.v4.new_output(
                "error", ename="E", evalue=path, traceback=[f"\x1b[0;32m{path}\x1b[0m"]
            ),
        ],
    )
    shown = nbformat.writes(nameless_notebook(nbformat.v4.new_notebook(cells=[cell])))
    assert USER not in shown
    assert shown.count("x.py") == 5
