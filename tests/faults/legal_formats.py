"""Legal twins: TVQA, STAR and captions in the other forms in which people hold them."""

from collections.abc import Sequence
from typing import Any

from faults.damage import Damage
from faults.damage_tables import star

Item = dict[str, Any]


def star_formats(items: Sequence[Item]) -> dict[str, Damage]:
    by_id = {item["question_id"]: dict(item) for item in items}
    for item in by_id.values():
        del item["question_id"]
    texts = {item["question_id"]: _by_number(item) for item in items}
    return {
        "STAR, an object by id": star(by_id),
        "STAR, an object by id, which the questions have too": star(
            {item["question_id"]: item for item in items}
        ),
        "STAR, choices as texts": star(
            [{**item, "choices": list(texts[item["question_id"]].values())} for item in items]
        ),
        "STAR, choices as an object by number": star(
            [{**item, "choices": texts[item["question_id"]]} for item in items]
        ),
        "STAR, choices as an object by letter": star(
            [{**item, "choices": _by_letter(item)} for item in items]
        ),
        "STAR, answers with a full stop and in capitals": star(
            [{**item, "answer": f" {item['answer'].upper()}."} for item in items]
        ),
        "STAR, answers as numbers": star([{**item, "answer": _place(item)} for item in items]),
        "STAR, answers as letters": star(
            [{**item, "answer": "ABCD"[_place(item)]} for item in items]
        ),
    }


def _by_number(item: Item) -> dict[str, str]:
    choices = sorted(item["choices"], key=lambda choice: choice["choice_id"])
    return {str(choice["choice_id"]): choice["choice"] for choice in choices}


def _by_letter(item: Item) -> dict[str, str]:
    return dict(zip("ABCD", _by_number(item).values(), strict=True))


def _place(item: Item) -> int:
    return list(_by_number(item).values()).index(item["answer"])
