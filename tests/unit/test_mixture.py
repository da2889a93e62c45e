"""Which data sets --dataset names."""

from pathlib import Path

import pytest

from support.command_line import error_of, parse_line
from vico.data.mixture import DatasetChoice, parse_datasets, paths_by_dataset
from vico.errors import UserError


def test_names_and_weights() -> None:
    assert parse_datasets("nextqa") == (DatasetChoice("nextqa"),)
    expected = (DatasetChoice("nextqa"), DatasetChoice("star", 0.5), DatasetChoice("my set.2", 2.0))
    assert parse_datasets(" nextqa, star : 0.5,my set.2:2e0") == expected
    assert ",".join(map(str, expected)) == "nextqa,star:0.5,my set.2:2"
    assert parse_line("--dataset nextqa:1.0").resolve().dataset == "nextqa"


BAD = {
    "": "holds an empty name",
    "nextqa,,star": "holds an empty name",
    ":2": "holds an empty name",
    "nextqa,star,nextqa:2": "names 'nextqa' twice",
    "../nextqa": "'../nextqa' is no plain name of a folder",
    "a/b": "'a/b' is no plain name",
    ".": "'.' is no plain name",
    "..": "'..' is no plain name",
    "a\\b": "is no plain name",
    "a\nb": "is no plain name",
    "star:": "the weight of 'star' is ''; it must be a number above 0",
    "star:0": "the weight of 'star' is '0'",
    "star:-1": "the weight of 'star' is '-1'",
    "star:nan": "the weight of 'star' is 'nan'",
    "star:inf": "the weight of 'star' is 'inf'",
    "star:half": "the weight of 'star' is 'half'",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_dataset(text: str) -> None:
    with pytest.raises(UserError, match=r"^--dataset ") as refusal:
        parse_datasets(text)
    assert BAD[text] in str(refusal.value) and str(refusal.value).isprintable()


def test_an_unknown_name_shows_the_nearest() -> None:
    message = error_of("--dataset nextQA")
    assert message.startswith("--dataset 'nextQA': there is no such data set; it can be nextqa, ")
    assert message.endswith("; did you mean 'nextqa'?")


def test_paths_by_dataset() -> None:
    """A path may hold any character, also those that part the names."""

    def paths(text: str, *names: str) -> dict[str, Path]:
        return paths_by_dataset("captions", Path(text), names)

    assert paths_by_dataset("captions", None, ["a"]) == {}
    assert paths("/x/b=1,c.json", "a") == {"a": Path("/x/b=1,c.json")}
    assert paths("a=/x,y", "a") == {"a": Path("/x,y")}
    assert paths("b=/x,y,a=z=1", "a", "b") == {"b": Path("/x,y"), "a": Path("z=1")}
    assert paths("b=/x", "a", "b") == {"b": Path("/x")}
    bad = {
        "/x": "must be NAME=PATH[,NAME=PATH], since there are several data sets; NAME can be a, b",
        "c=/x": "must be NAME=PATH",
        "a=": "names a without a path",
        "a=x,a=y": "names a twice",
    }
    for text, problem in bad.items():
        with pytest.raises(UserError) as refusal:
            paths(text, "a", "b")
        assert str(refusal.value).startswith(f"--captions {text}: {problem}")
